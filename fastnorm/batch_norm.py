"""Batch normalisation: autograd function, functional and modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnorm import _C, compile
from fastnorm.activation import add_and_activate, check_activation
from fastnorm.double_backward import double_backward
from fastnorm.fallback import TRACED, call_torch, traced_call, uncovered_transform

# running_mean, running_var, num_batches_tracked, training, momentum, eps, activation, skip_nonfinite_stats, renorm
# (r_max and d_max of batch_renorm, or None): what no gradient goes to, as one argument, for each argument of an
# autograd function costs time.
Setting = tuple[
    Tensor | None, Tensor | None, Tensor | None,
    bool, float | None, float, str | None, bool, tuple[float, float] | None,
]  # fmt: skip


class BatchNormFunction(torch.autograd.Function):
    """y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual), see :func:`batch_norm`.

    Kept for backward: x, weight, bias, two numbers a channel; with a residual and relu or leaky_relu one bit an
    element, with a residual and silu or gelu the residual. The activation's other masks are recomputed from x.
    :func:`batch_renorm` keeps two numbers a channel more.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, setting: Setting
    ) -> Tensor:
        y, statistics, mask = _C.batch_norm_forward(input, weight, bias, residual, *setting, True)
        _, _, _, training, _, eps, activation, _, _ = setting
        kept_residual = residual if activation in ("silu", "gelu") else None
        ctx.save_for_backward(input, weight, bias, kept_residual, mask, statistics)
        ctx.setting = training, eps, activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradient = BatchNormBackwardFunction.apply if torch.is_grad_enabled() else _gradient
        return *gradient(dy, *ctx.saved_tensors, ctx.setting, ctx.needs_input_grad[:4]), None


class BatchNormBackwardFunction(torch.autograd.Function):
    """The gradients of :class:`BatchNormFunction` as a function that can itself be differentiated."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        *saved, setting, _ = args
        ctx.save_for_backward(dy, *saved)
        ctx.setting = setting
        ctx.set_materialize_grads(False)
        gradients = _gradient(dy, *args)
        # an input may not be returned as it is: it would be taken for the output's own history
        return tuple(g.view_as(g) if g is dy else g for g in gradients)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, input, weight, bias, residual, mask, statistics = ctx.saved_tensors
        training, eps, activation = ctx.setting
        slopes = None if mask is None else _C.batch_norm_mask_slopes(input, mask, activation)
        # Where the residual was not kept, its value does not matter: what follows is linear in it.
        stand_in = residual is None and grad_grads[3] is not None
        if stand_in:
            residual = torch.zeros_like(input).requires_grad_()

        def forward(input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
            z = _composite(input, weight, bias, statistics, training, eps)
            if slopes is None:
                return add_and_activate(z, residual, activation)
            return (z if residual is None else z + residual) * slopes

        ddy, dx, dweight, dbias, dresidual = double_backward(forward, [input, weight, bias, residual], dy, grad_grads)
        return ddy, dx, dweight, dbias, None if stand_in else dresidual, None, None, None, None


def _composite(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, training: bool, eps: float
) -> Tensor:
    """Batch normalisation in elementary ops, differentiable any number of times.

    torch's own op is not: its double backward takes the statistics for constants.
    """
    shape = [1, -1] + [1] * (input.dim() - 2)
    x = input if input.dtype == torch.float64 else input.float()
    if training:
        dims = [d for d in range(input.dim()) if d != 1]
        centred = x - x.mean(dims, keepdim=True)
        rstd = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    else:
        mean, rstd = (s.to(x.dtype).view(shape) for s in statistics)
        centred = x - mean
    z = centred * rstd
    if len(statistics) == 4:
        r, d = (s.to(x.dtype).view(shape) for s in statistics[2:])
        z = z * r + d
    z = z if weight is None else z * weight.view(shape)
    z = z if bias is None else z + bias.view(shape)
    return z.to(input.dtype)


def _gradient(
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    statistics: Tensor,
    setting: tuple[bool, float, str | None],
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    training, _, activation = setting
    return _C.batch_norm_backward(
        dy, input, weight, bias, residual, mask, statistics, training, activation, wanted
    )  # fmt: skip


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    skip_nonfinite_stats: bool = False,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Batch normalisation (Ioffe & Szegedy 2015, arXiv:1502.03167), residual and activation in the same kernel.

        y = activation((x - mean) * rstd * weight + bias + residual),   rstd = 1 / sqrt(var + eps)

    In training, mean and var (biased) are those of each channel over the batch and the spatial positions, and the
    running statistics take them in, the variance unbiased: ``running = (1 - momentum) * running + momentum * new``.
    Otherwise mean and var are the running statistics.

    Args:
        input: (N, C, *), float64, float32, bfloat16 or float16. Contiguous and channels_last tensors are read as they
            lie, other strides take one copy. The output has the input's layout.
        running_mean, running_var: (C), of the input's type or float32; may be None in training.
        weight, bias: (C), of the input's type or, for bfloat16 and float16, float32; each may be None.
        training: use the batch's statistics, and update the running ones.
        momentum: weight of the new value, in [0, 1]; None for the cumulative average, which needs
            ``num_batches_tracked``.
        eps: added to the variance, in units of input squared.
        residual: added before the activation; input's shape and type.
        activation: None, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"`` or ``"gelu"`` (the erf form).
        skip_nonfinite_stats: a batch whose mean or variance is inf or NaN in any channel, as after an overflow under
            automatic mixed precision, leaves the running statistics and num_batches_tracked alone.
        num_batches_tracked: one int64, counted up in training.

    Raises:
        ValueError: one value per channel in training; an unknown activation.
        RuntimeError: a shape, type or device that does not fit; nothing has been written then.

    Example:
        >>> x = torch.randn(8, 4, 5, 5)
        >>> y = fastnorm.functional.batch_norm(x, None, None, training=True, activation="relu")
        >>> y.shape
        torch.Size([8, 4, 5, 5])
    """
    setting = (
        running_mean, running_var, num_batches_tracked,
        training, momentum, eps, activation, skip_nonfinite_stats, None,
    )  # fmt: skip
    return batch_norm_or_renorm(input, weight, bias, residual, setting)


def batch_norm_or_renorm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, setting: Setting
) -> Tensor:
    """The kernel through :class:`BatchNormFunction`, or past it where no gradient is due, or torch's op."""
    op = "batch_norm" if setting[-1] is None else "batch_renorm"
    reason = uncovered_transform(op)
    if reason is None:
        try:
            if torch.is_grad_enabled() and (
                input.requires_grad
                or (weight is not None and weight.requires_grad)
                or (bias is not None and bias.requires_grad)
                or (residual is not None and residual.requires_grad)
            ):
                return BatchNormFunction.apply(input, weight, bias, residual, setting)
            return _C.batch_norm_forward(input, weight, bias, residual, *setting, False)[0]
        except NotImplementedError as uncovered:
            reason = str(uncovered)
    elif reason is TRACED:
        return traced_call(op, _traced_batch_norm, _torch_batch_norm, input, weight, bias, residual, *setting)
    return call_torch(reason, _torch_batch_norm, input, weight, bias, residual, *setting)


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str | None,
    skip_nonfinite_stats: bool,
    renorm: tuple[float, float] | None,
) -> Tensor:
    check_activation("batch_norm" if renorm is None else "batch_renorm", activation)
    if training and renorm is not None:
        weight, bias = _renormalized(input, weight, bias, running_mean, running_var, eps, *renorm)
    tracked = (running_mean, running_var, num_batches_tracked)
    on_trial = training and skip_nonfinite_stats
    # torch's backward keeps the running statistics it was given: they must not be written after it
    mean, var, batches = compile.clones(tracked) if on_trial else tracked
    if training and batches is not None:
        batches.add_(1)
        if momentum is None:
            momentum = 1.0 / float(batches)
    z = F.batch_norm(input, mean, var, weight, bias, training, momentum or 0.0, eps)
    if on_trial and mean is not None and var is not None:
        finite = mean.isfinite().all() & var.isfinite().all()
        for t, new in zip(tracked, (mean, var, batches), strict=True):
            if t is not None and new is not None:
                t.copy_(torch.where(finite, new, t))
    return add_and_activate(z, residual, activation)


def _renormalized(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    r_max: float,
    d_max: float,
) -> tuple[Tensor, Tensor]:
    """The weight * r and bias + weight * d that make batch normalisation batch renormalisation."""
    if running_mean is None or running_var is None:
        raise RuntimeError("batch_renorm: running_mean and running_var must be given, for r and d come from them")
    with torch.no_grad():
        x = input if input.dtype == torch.float64 else input.float()
        var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
        sigma = (running_var.to(x.dtype) + eps).sqrt()
        r = ((var + eps).sqrt() / sigma).clamp(1 / r_max, r_max)
        d = ((mean - running_mean) / sigma).clamp(-d_max, d_max)
    like = input if weight is None else weight
    r, d = r.to(like.dtype), d.to(like.dtype)
    scale, shift = (r, d) if weight is None else (weight * r, weight * d)
    return scale, shift if bias is None else bias + shift


# ---- as ops of the dispatcher


def _traced_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    *setting: Any,
) -> Tensor:
    _, _, activation, _, renorm = setting
    check_activation("batch_norm" if renorm is None else "batch_renorm", activation)
    tracked = (running_mean, running_var, num_batches_tracked)
    keep_mask = compile.is_differentiated(input, weight, bias, residual)
    y, _, _, *new = _forward_op(input, weight, bias, residual, *tracked, training, *setting, keep_mask)
    if training:
        compile.write_back(tracked, new)
    return y


def _kernel(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    tracked = [running_mean, running_var, num_batches_tracked]
    new = compile.clones(tracked) if training else [None] * 3
    used = new if training else tracked
    return compile.defined((*_C.batch_norm_forward(input, weight, bias, residual, *used, training, *rest), *new), input)


def _fake(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str | None,
    skip_nonfinite_stats: bool,
    renorm: list[float] | None,
    keep_mask: bool,
) -> tuple[Tensor, ...]:
    r_max, d_max = renorm or (1.0, 0.0)
    corrects = training and (r_max > 1 or d_max > 0)
    statistics = input.new_empty((4 if corrects else 2, input.size(1)), dtype=torch.float64)
    mask = None
    if compile.keeps_mask(keep_mask, residual, activation) and input.numel() > 0:
        mask = input.new_empty(_mask_bytes(input), dtype=torch.uint8)
    new = compile.clones([running_mean, running_var, num_batches_tracked]) if training else [None] * 3
    return compile.defined((compile.empty_in_layout(input), statistics, mask, *new), input)


def _mask_bytes(input: Tensor) -> int:
    """Of mask_rows in csrc/batch_norm.h."""
    if input.is_cuda:
        return compile.cuda_mask_bytes(input)
    N, C, S = input.size(0), input.size(1), compile.spatial_size(input)
    last = compile.is_channels_last(input)
    if not last and S >= 16:
        return N * C * ((S + 7) // 8)
    rows, width = (N * S, C) if last else (N, C * S)
    fold = compile.folded(width, rows)
    return (rows + fold - 1) // fold * ((fold * width + 7) // 8)


def _fake_backward(
    dy: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return compile.fake_gradients(input, weight, bias, rest[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, training, _, _, activation, _, _, _ = inputs
    compile.keep_for_backward(ctx, inputs, output, activation)
    ctx.setting = training, activation


def _op_gradient(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return *compile.norm_gradients(ctx, dy, _backward_op, *ctx.setting), *[None] * 10


_forward_op = compile.register(
    "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? running_mean, "
    "Tensor? running_var, Tensor? num_batches_tracked, bool training, float? momentum, float eps, str? activation, "
    "bool skip_nonfinite_stats, float[]? renorm, bool keep_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
    _op_gradient,
    _setup_context,
)
_backward_op = compile.register(
    "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor mask, Tensor statistics, bool training, str? activation, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    compile.backward_kernel(_C.batch_norm_backward),
    _fake_backward,
)


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """What the three modules add to torch's."""

    _input_dims: tuple[int, ...]
    _input_shape: str
    _renorm: tuple[float, float] | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        skip_nonfinite_stats: bool = False,
    ) -> None:
        check_activation(type(self).__name__, activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.activation = activation
        self.skip_nonfinite_stats = skip_nonfinite_stats

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self._input_dims:
            raise ValueError(
                f"{type(self).__name__}: input must have shape {self._input_shape}, got {input.dim()} dimensions with "
                f"shape {list(input.shape)}"
            )

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        training = self.training
        running_mean = running_var = num_batches_tracked = None
        # Module.__getattr__ takes 0.3 us a tensor; a parametrised weight is not in the dictionary, though
        buffers, parameters = self._buffers, self._parameters
        if self.track_running_stats or not training:
            running_mean, running_var = buffers["running_mean"], buffers["running_var"]
            if training:
                num_batches_tracked = buffers["num_batches_tracked"]
        weight = parameters["weight"] if "weight" in parameters else self.weight
        bias = parameters["bias"] if "bias" in parameters else self.bias
        by_batch = training or (running_mean is None and running_var is None)
        setting = (
            running_mean, running_var, num_batches_tracked,
            by_batch, self.momentum, self.eps, self.activation, self.skip_nonfinite_stats, self._renorm,
        )  # fmt: skip
        return batch_norm_or_renorm(input, weight, bias, residual, setting)

    def extra_repr(self) -> str:
        extra = "" if self.activation is None else f", activation={self.activation!r}"
        return super().extra_repr() + extra + (", skip_nonfinite_stats=True" if self.skip_nonfinite_stats else "")


_MODULE_DOC = """torch.nn.{name} on fastnorm's kernels: the same arguments, parameters, buffers, state_dict and numbers.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as torch.nn.{name} has them.
        bias: False leaves out the bias of an affine layer.
        activation: fused into the kernel: None, "relu", "leaky_relu", "silu" or "gelu".
        skip_nonfinite_stats: see :func:`fastnorm.functional.batch_norm`.

    Shape:
        input, and ``residual`` where one is given to forward: {shape}; output the same.

    Example:
        >>> norm = fastnorm.{name}(16, activation="relu")
        >>> norm(torch.randn({example})).shape
        torch.Size([{example}])
    """


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    __doc__ = _MODULE_DOC.format(name="BatchNorm1d", shape="(N, C) or (N, C, L)", example="8, 16")
    _input_dims = (2, 3)
    _input_shape = "(N, C) or (N, C, L)"


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    __doc__ = _MODULE_DOC.format(name="BatchNorm2d", shape="(N, C, H, W)", example="8, 16, 4, 4")
    _input_dims = (4,)
    _input_shape = "(N, C, H, W)"


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    __doc__ = _MODULE_DOC.format(name="BatchNorm3d", shape="(N, C, D, H, W)", example="8, 16, 2, 4, 4")
    _input_dims = (5,)
    _input_shape = "(N, C, D, H, W)"
