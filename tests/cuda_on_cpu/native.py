"""The functions of fastnorm._C over the emulated CUDA kernels: the allocation that csrc/<op>.cpp does, once more.

`installed()` puts them in _C's place, so that the modules, functionals and autograd functions of fastnorm run the CUDA
kernels, and with them the cases of tests/cases.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from cuda_on_cpu import driver
from cuda_on_cpu.driver import DTYPES
from fastnorm import _C
from fastnorm.autograd import (
    AlphaDropoutFunction,
    BatchNormFunction,
    DropoutFunction,
    GroupNormFunction,
    InstanceNormFunction,
    LayerNormFunction,
)
from fastnorm.compile import is_differentiated
from fastnorm.norm import NormFunction

ACTIVATIONS = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 3, "gelu": 4}
PIECEWISE = ("relu", "leaky_relu")
CONTIGUOUS, CHANNELS_LAST = 0, 1
Shape = tuple[int, int, int, int]  # N, C, S, layout


def _is_channels_last(t: Tensor) -> bool:
    return t.dim() > 2 and t.movedim(1, -1).is_contiguous()


def shape_of(t: Tensor) -> Shape:
    part = suggest_memory_format(t) != torch.contiguous_format
    last = not t.is_contiguous() and (_is_channels_last(t) or part)
    return t.shape[0], t.shape[1], math.prod(t.shape[2:]), CHANNELS_LAST if last else CONTIGUOUS


def in_layout(t: Tensor | None, layout: int) -> Tensor | None:
    if t is None:
        return None
    return t.contiguous() if layout == CONTIGUOUS else t.movedim(1, -1).contiguous().movedim(-1, 1)


def empty_in_layout(t: Tensor, layout: int) -> Tensor:
    result = in_layout(torch.empty_like(t), layout)
    assert result is not None
    return result


def dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def param_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> int:
    return DTYPES[(weight if weight is not None else bias if bias is not None else x).dtype]


def new_mask(rows: int, length: int) -> Tensor:
    return torch.empty(rows, (length + 7) // 8, dtype=torch.uint8)


def channel_mask(shape: Shape) -> Tensor:
    """As cuda_mask_rows() of mask.h has it: planes' bits by their elements' indices, eight more between two planes."""
    N, C, S, layout = shape
    if layout == CONTIGUOUS and S > 1:
        return torch.empty((N * C * (S + 8) + 7) // 8, dtype=torch.uint8)
    return new_mask(N * S, C)


def _gradients(
    x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, act: str | None, wanted: tuple, layout: int
) -> dict[str, Tensor | None]:
    return {
        "dx": empty_in_layout(x, layout) if wanted[0] else None,
        "dweight": torch.empty(weight.shape, dtype=weight.dtype) if wanted[1] and weight is not None else None,
        "dbias": torch.empty(bias.shape, dtype=bias.dtype) if wanted[2] and bias is not None else None,
        "dresidual": empty_in_layout(x, layout) if wanted[3] and act is not None else None,
    }


def _returned(gradients: dict[str, Tensor | None], dy: Tensor, wanted: tuple, act: str | None) -> tuple:
    dresidual = dy if wanted[3] and act is None else gradients["dresidual"]
    return gradients["dx"], gradients["dweight"], gradients["dbias"], dresidual


# ---- batch_norm


def batch_norm_forward(
    input, weight, bias, residual, running_mean, running_var, num_batches_tracked,
    training, momentum, eps, activation, skip_nonfinite_stats, renorm, keep_mask,
):  # fmt: skip
    shape = shape_of(input)
    C = shape[1]
    r_max, d_max = renorm or (1.0, 0.0)
    corrects = training and (r_max > 1 or d_max > 0)
    x = in_layout(input, shape[3])
    y = empty_in_layout(x, shape[3])
    statistics = torch.empty(4 if corrects else 2, C, dtype=torch.float64)
    mask = channel_mask(shape) if keep_mask and residual is not None and activation in PIECEWISE else None
    driver.call(
        "batch_norm_forward",
        shape=shape,
        dtype=DTYPES[x.dtype],
        param_dtype=param_dtype(x, weight, bias),
        stats_dtype=DTYPES[x.dtype if running_mean is None else running_mean.dtype],
        activation=ACTIVATIONS[activation],
        training=training,
        skip_nonfinite_stats=skip_nonfinite_stats,
        eps=eps,
        momentum=math.nan if momentum is None else momentum,
        x=x,
        residual=in_layout(residual, shape[3]),
        weight=dense(weight),
        bias=dense(bias),
        running_mean=running_mean,
        running_var=running_var,
        num_batches_tracked=num_batches_tracked if training else None,
        y=y,
        mean=statistics[0],
        rstd=statistics[1],
        r=statistics[2] if corrects else None,
        d=statistics[3] if corrects else None,
        r_max=r_max,
        d_max=d_max,
        mask=mask,
    )
    return y, statistics, mask


def _batch_norm_gradients(grad_output, input, weight, bias, residual, mask, statistics, activation, **rest):
    shape = shape_of(input)
    x = in_layout(input, shape[3])
    corrected = len(statistics) == 4
    driver.call(
        "batch_norm_backward",
        shape=shape,
        dtype=DTYPES[x.dtype],
        param_dtype=param_dtype(x, weight, bias),
        activation=ACTIVATIONS[activation],
        x=x,
        dy=in_layout(grad_output, shape[3]),
        residual=in_layout(residual, shape[3]),
        weight=dense(weight),
        bias=dense(bias),
        mean=statistics[0],
        rstd=statistics[1],
        r=statistics[2] if corrected else None,
        d=statistics[3] if corrected else None,
        mask=mask,
        **rest,
    )


def batch_norm_backward(
    grad_output, input, weight, bias, residual, mask, statistics, training, activation, wanted
):  # fmt: skip
    gradients = _gradients(input, grad_output, weight, bias, activation, wanted, shape_of(input)[3])
    operands = grad_output, input, weight, bias, residual, mask, statistics
    _batch_norm_gradients(*operands, activation, training=training, **gradients)
    return _returned(gradients, grad_output, wanted, activation)


def batch_norm_statistics(input):
    shape = shape_of(input)
    statistics = torch.empty(3, shape[1], dtype=torch.float64)
    dtype = DTYPES[input.dtype]
    driver.call(
        "batch_norm_forward",
        shape=shape,
        dtype=dtype,
        param_dtype=dtype,
        stats_dtype=dtype,
        training=True,
        x=in_layout(input, shape[3]),
        mean=statistics[0],
        variance=statistics[1],
        rstd=statistics[2],
    )
    return statistics[:2]


def batch_norm_normalize(input, weight, bias, residual, statistics, activation, keep_mask):
    shape = shape_of(input)
    x = in_layout(input, shape[3])
    y = empty_in_layout(x, shape[3])
    mask = channel_mask(shape) if keep_mask and residual is not None and activation in PIECEWISE else None
    driver.call(
        "batch_norm_forward",
        shape=shape,
        dtype=DTYPES[x.dtype],
        param_dtype=param_dtype(x, weight, bias),
        stats_dtype=DTYPES[x.dtype],
        activation=ACTIVATIONS[activation],
        x=x,
        residual=in_layout(residual, shape[3]),
        weight=dense(weight),
        bias=dense(bias),
        y=y,
        given_mean=statistics[0],
        given_rstd=statistics[1],
        mask=mask,
    )
    return y, mask


def batch_norm_backward_reduce(grad_output, input, weight, bias, residual, mask, statistics, activation):
    sums = torch.empty(2, input.shape[1], dtype=torch.float64)
    operands = grad_output, input, weight, bias, residual, mask, statistics
    _batch_norm_gradients(*operands, activation, training=True, sums=sums)
    return sums


def batch_norm_backward_elements(
    grad_output, input, weight, bias, residual, mask, statistics, sums, count, activation, wanted
):  # fmt: skip
    wanted = (wanted[0], False, False, wanted[1])
    gradients = _gradients(input, grad_output, weight, bias, activation, wanted, shape_of(input)[3])
    operands = grad_output, input, weight, bias, residual, mask, statistics
    _batch_norm_gradients(*operands, activation, training=True, given_sums=sums, count=count, **gradients)
    return _returned(gradients, grad_output, wanted, activation)[::3]


# ---- group_norm and instance_norm


def _normalize_groups(input, groups, weight, bias, residual, eps, activation, keep_mask, want_variance):
    shape = shape_of(input)
    x = in_layout(input, shape[3])
    y = empty_in_layout(x, shape[3])
    statistics = torch.empty(2, shape[0], groups, dtype=torch.float64)
    variance = torch.empty(shape[0], groups, dtype=torch.float64) if want_variance else None
    mask = channel_mask(shape) if keep_mask and residual is not None and activation in PIECEWISE else None
    driver.call(
        "group_norm_forward",
        shape=shape,
        G=groups,
        dtype=DTYPES[x.dtype],
        param_dtype=param_dtype(x, weight, bias),
        activation=ACTIVATIONS[activation],
        eps=eps,
        x=x,
        residual=in_layout(residual, shape[3]),
        weight=dense(weight),
        bias=dense(bias),
        y=y,
        mean=statistics[0],
        rstd=statistics[1],
        variance=variance,
        mask=mask,
    )
    return y, statistics, mask, variance


def group_norm_forward(input, weight, bias, residual, num_groups, eps, activation, keep_mask):
    return _normalize_groups(input, num_groups, weight, bias, residual, eps, activation, keep_mask, False)[:3]


def group_norm_backward(
    grad_output, input, weight, bias, residual, mask, statistics, num_groups, activation, wanted
):  # fmt: skip
    shape = shape_of(input)
    x = in_layout(input, shape[3])
    gradients = _gradients(x, grad_output, weight, bias, activation, wanted, shape[3])
    driver.call(
        "group_norm_backward",
        shape=shape,
        G=num_groups,
        dtype=DTYPES[x.dtype],
        param_dtype=param_dtype(x, weight, bias),
        activation=ACTIVATIONS[activation],
        x=x,
        dy=in_layout(grad_output, shape[3]),
        residual=in_layout(residual, shape[3]),
        weight=dense(weight),
        bias=dense(bias),
        mean=statistics[0],
        rstd=statistics[1],
        mask=mask,
        **gradients,
    )
    return _returned(gradients, grad_output, wanted, activation)


def instance_norm_forward(
    input, weight, bias, residual, running_mean, running_var, momentum, eps, activation, keep_mask
):  # fmt: skip
    y, statistics, mask, variance = _normalize_groups(
        input, input.shape[1], weight, bias, residual, eps, activation, keep_mask, running_mean is not None
    )
    if running_mean is not None:
        driver.call(
            "instance_norm_running",
            shape=shape_of(input),
            stats_dtype=DTYPES[running_mean.dtype],
            momentum=momentum,
            mean=statistics[0],
            variance=variance,
            running_mean=running_mean,
            running_var=running_var,
        )
    return y, statistics, mask


def instance_norm_backward(
    grad_output, input, weight, bias, residual, mask, statistics, activation, wanted
):  # fmt: skip
    return group_norm_backward(
        grad_output, input, weight, bias, residual, mask, statistics, input.shape[1], activation, wanted
    )


# ---- layer_norm and rms_norm


def layer_norm_forward(
    input, weight, bias, residual, normalized_shape, eps, activation, subtract_mean, keep
):  # fmt: skip
    N = math.prod(normalized_shape)
    M = input.numel() // N
    x = input.contiguous()
    y = torch.empty_like(x)
    statistics, mask = None, None
    if keep:
        kept = torch.float64 if x.dtype == torch.float64 else torch.float32
        statistics = torch.empty(3 if subtract_mean else 1, M, dtype=kept)
        if residual is not None and activation in PIECEWISE:
            mask = new_mask(M, N)
    driver.call(
        "layer_norm_forward",
        M=M,
        N=N,
        dtype=DTYPES[x.dtype],
        param_dtype=param_dtype(x, weight, bias),
        activation=ACTIVATIONS[activation],
        subtract_mean=subtract_mean,
        eps=eps,
        x=x,
        residual=dense(residual),
        weight=dense(weight),
        bias=dense(bias),
        y=y,
        rstd=statistics[0] if keep else None,
        mean=statistics[1] if keep and subtract_mean else None,
        rest=statistics[2] if keep and subtract_mean else None,
        mask=mask,
    )
    return y, statistics, mask


def layer_norm_backward(
    grad_output, input, weight, bias, residual, mask, statistics, normalized_shape, activation, subtract_mean, wanted
):  # fmt: skip
    N = math.prod(normalized_shape)
    x = input.contiguous()
    gradients = _gradients(x, grad_output, weight, bias, activation, wanted, CONTIGUOUS)
    driver.call(
        "layer_norm_backward",
        M=x.numel() // N,
        N=N,
        dtype=DTYPES[x.dtype],
        param_dtype=param_dtype(x, weight, bias),
        activation=ACTIVATIONS[activation],
        subtract_mean=subtract_mean,
        x=x,
        dy=grad_output.contiguous(),
        residual=dense(residual),
        weight=dense(weight),
        bias=dense(bias),
        rstd=statistics[0],
        mean=statistics[1] if subtract_mean else None,
        rest=statistics[2] if subtract_mean else None,
        mask=mask,
        **gradients,
    )
    return _returned(gradients, grad_output, wanted, activation)


# ---- dropout

_ALPHA_PRIME = -1.7580993408473766


def _level(p: float) -> tuple[int, float, float, float]:
    """dropout_level() of philox.h: threshold, scale, and the shifts of alpha dropout."""
    if p >= 1:
        return 0, 0.0, 0.0, 0.0
    threshold = min(65535, round(p * 65536))
    return threshold, 65536 / (65536 - threshold), 0.0, 0.0


def _alpha_level(p: float) -> tuple[int, float, float, float]:
    threshold, scale, *_ = _level(p)
    if scale == 0:
        return threshold, 0.0, 0.0, 0.0
    q = threshold / 65536
    a = 1 / math.sqrt((1 - q) * (1 + q * _ALPHA_PRIME**2))
    b = -a * q * _ALPHA_PRIME
    return threshold, a, b, a * _ALPHA_PRIME + b


def _dropout(input: Tensor, level: tuple, state: Tensor, channel_dims: int, inplace: bool) -> Tensor:
    layout, by_channel = CONTIGUOUS, False
    if channel_dims == 2 or (channel_dims == 0 and input.dim() > 2):
        shape = shape_of(input)
        by_channel = channel_dims == 2 and shape[2] != 1
        layout = shape[3]
    elif channel_dims == 1:
        shape = (1, input.shape[0], input.numel() // input.shape[0], CONTIGUOUS)
        by_channel = True
        layout = shape_of(input)[3] if input.dim() > 1 else CONTIGUOUS
    else:
        shape = (1, 1, input.numel(), CONTIGUOUS)
    x = in_layout(input, layout)
    y = x if inplace else empty_in_layout(x, layout)
    driver.call(
        "dropout",
        shape=shape,
        by_channel=by_channel,
        dtype=DTYPES[x.dtype],
        state=state,
        level=level,
        x=x,
        y=y,
    )
    return y


def dropout(input, p, state, channel_dims, inplace):
    return _dropout(input, _level(p), state, channel_dims, inplace)


def alpha_dropout(input, p, state, channel_dims, inplace):
    return _dropout(input, _alpha_level(p), state, channel_dims, inplace)


def alpha_dropout_backward(grad_output, p, state, channel_dims):
    return _dropout(grad_output, (*_alpha_level(p)[:2], 0.0, 0.0), state, channel_dims, False)


# ---- local_response_norm


def _local_response_norm(op, input, size, alpha, beta, k, region, convention, **tensors):
    before, after = size // 2, (size - 1) // 2 if convention == "torch" else size // 2
    a = alpha if convention == "paper" else alpha / size ** (2 if region == "intra" else 1)
    shape = shape_of(input)
    tensors = {name: in_layout(t, shape[3]) for name, t in tensors.items()}
    out = empty_in_layout(input, shape[3])
    driver.call(
        op,
        shape=shape,
        H=input.shape[-2],
        W=input.shape[-1],
        dtype=DTYPES[input.dtype],
        setting=(0 if region == "inter" else 1, before, after, a, beta, k),
        **tensors,
        **{"y" if op.endswith("forward") else "dx": out},
    )
    return out


def local_response_norm_forward(input, size, alpha, beta, k, region, convention):
    if beta == 0:
        return input.clone()
    return _local_response_norm("local_response_norm_forward", input, size, alpha, beta, k, region, convention, x=input)


def local_response_norm_backward(grad_output, input, size, alpha, beta, k, region, convention):
    if beta == 0:
        return grad_output.clone()
    setting = size, alpha, beta, k, region, convention
    return _local_response_norm("local_response_norm_backward", input, *setting, x=input, dy=grad_output)


# ---- weight_norm and spectral_norm


def _dense(t: Tensor) -> Tensor:
    return t if t.is_contiguous() or _is_channels_last(t) else t.contiguous()


class _WeightNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor) -> Tensor:
        v, g = _dense(v), g.contiguous()
        dim = next((d for d, n in enumerate(g.shape) if n != 1), -1)
        C, S = (1, v.numel()) if dim == -1 else (v.shape[dim], v.stride(dim))
        ctx.shape = v.numel() // (C * S), C, S, CONTIGUOUS
        w, norm = torch.empty_like(v), torch.empty(C, dtype=torch.float64)
        driver.call(
            "weight_norm_forward",
            shape=ctx.shape,
            dtype=DTYPES[v.dtype],
            param_dtype=DTYPES[g.dtype],
            v=v,
            g=g,
            w=w,
            norm=norm,
        )
        ctx.save_for_backward(v, g, norm)
        return w

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, Tensor | None]:
        v, g, norm = ctx.saved_tensors
        dv = torch.empty_like(v) if ctx.needs_input_grad[0] else None
        dg = torch.empty_like(g) if ctx.needs_input_grad[1] else None
        driver.call(
            "weight_norm_backward",
            shape=ctx.shape,
            dtype=DTYPES[v.dtype],
            param_dtype=DTYPES[g.dtype],
            v=v,
            g=g,
            dw=torch.empty_like(v).copy_(dw),
            norm=norm,
            dv=dv,
            dg=dg,
        )
        return dv, dg


def weight_norm(v, g, dim):
    return _WeightNorm.apply(v, g)


def _row_order(v: Tensor, weight: Tensor) -> Tensor:
    """A row's elements in the order in which `weight`, channels_last with rows along dimension 0, holds them."""
    row = torch.empty_strided(weight.shape[1:], weight.stride()[1:], dtype=v.dtype)
    return row.copy_(v.view(row.shape)).as_strided((v.numel(),), (1,))


def _logical_order(row: Tensor, weight: Tensor) -> Tensor:
    return row.as_strided(weight.shape[1:], weight.stride()[1:]).reshape(-1)


def spectral_norm_forward(weight, u, v, iterations, dim, eps):
    weight = _dense(weight)
    permuted = dim == 0 and not weight.is_contiguous()
    h, w = weight.shape[dim], weight.numel() // weight.shape[dim]
    kept = torch.float64 if weight.dtype == torch.float64 else torch.float32
    kept_u, kept_v = torch.empty(h, dtype=kept), torch.empty(w, dtype=kept)
    sigma, y = torch.empty(1, dtype=torch.float64), torch.empty_like(weight)
    v_row = _row_order(v, weight) if permuted else v
    driver.call(
        "spectral_norm_forward",
        h=h,
        w=w,
        dtype=DTYPES[weight.dtype],
        iterations=iterations,
        eps=eps,
        matrix=weight if dim == 0 else weight.movedim(dim, 0).contiguous(),
        weight=weight,
        y=y,
        u=u,
        v=v_row,
        kept_u=kept_u,
        kept_v=kept_v,
        sigma=sigma,
    )
    if permuted:
        v.copy_(_logical_order(v_row, weight))
        kept_v = _logical_order(kept_v, weight)
    return y, kept_u, kept_v, sigma


def spectral_norm_backward(grad_output, weight, u, v, sigma, dim):
    weight = _dense(weight)
    permuted = dim == 0 and not weight.is_contiguous()
    weight = weight if permuted else weight.contiguous()
    h, S = weight.shape[dim], weight.numel() // weight.shape[dim] if permuted else weight.stride(dim)
    dweight = torch.empty_like(weight)
    driver.call(
        "spectral_norm_backward",
        shape=(weight.numel() // (h * S), h, S, CONTIGUOUS),
        dtype=DTYPES[weight.dtype],
        weight=weight,
        dy=torch.empty_like(weight).copy_(grad_output),
        u=u,
        v=_row_order(v, weight) if permuted else v,
        sigma=sigma,
        dweight=dweight,
    )
    return dweight


FUNCTIONS = (
    batch_norm_forward,
    batch_norm_backward,
    batch_norm_statistics,
    batch_norm_normalize,
    batch_norm_backward_reduce,
    batch_norm_backward_elements,
    group_norm_forward,
    group_norm_backward,
    instance_norm_forward,
    instance_norm_backward,
    layer_norm_forward,
    layer_norm_backward,
    dropout,
    alpha_dropout,
    alpha_dropout_backward,
    local_response_norm_forward,
    local_response_norm_backward,
    weight_norm,
    spectral_norm_forward,
    spectral_norm_backward,
)


def _norm(function: type[NormFunction]) -> Callable[..., Tensor]:
    def call(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *setting: Any
    ) -> Tensor:
        if is_differentiated(input, weight, bias, residual):
            return function.apply(input, weight, bias, residual, setting)
        return function.native_forward(input, weight, bias, residual, *setting, False)[0]

    return call


def _differentiable_dropout(input: Tensor, p: float, state: Tensor, channel_dims: int, alpha: bool) -> Tensor:
    return (AlphaDropoutFunction if alpha else DropoutFunction).apply(input, p, state, channel_dims, False)


# Of these _C has nodes that call its own kernels: in their place, the autograd functions in Python, which look them up.
DIFFERENTIABLE = {
    "batch_norm": _norm(BatchNormFunction),
    "layer_norm": _norm(LayerNormFunction),
    "group_norm": _norm(GroupNormFunction),
    "instance_norm": _norm(InstanceNormFunction),
    "differentiable_dropout": _differentiable_dropout,
}


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """_C's functions are these.

    Raises:
        RuntimeError: none of them was called, so that what was tested was not a CUDA kernel.
    """
    before = {name: getattr(_C, name) for name in (*(f.__name__ for f in FUNCTIONS), *DIFFERENTIABLE)}
    called: list[str] = []

    def noted(f: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            called.append(f.__name__)
            return f(*args)

        return call

    try:
        for f in FUNCTIONS:
            setattr(_C, f.__name__, noted(f))
        for name, f in DIFFERENTIABLE.items():
            setattr(_C, name, f)
        yield
        if not called:
            raise RuntimeError("none of the emulator's functions was called")
    finally:
        for name, f in before.items():
            setattr(_C, name, f)
