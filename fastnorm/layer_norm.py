"""Layer normalisation: autograd function, functional and module. RMS normalisation is the same op without the mean."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnorm import _C, compile
from fastnorm.activation import add_and_activate, check_activation
from fastnorm.double_backward import double_backward
from fastnorm.fallback import TRACED, call_torch, traced_call, uncovered_transform

# normalized_shape, eps, activation, subtract_mean: what no gradient goes to, as one argument
_Setting = tuple[list[int], float, str | None, bool]


class LayerNormFunction(torch.autograd.Function):
    """y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual), see :func:`layer_norm`; without
    ``subtract_mean`` y = activation(x / sqrt(mean(x^2) + eps) * weight + bias + residual), see :func:`rms_norm`.

    Kept for backward: x, weight, bias, three numbers a row (float32, float64 for float64; without the mean one); with a
    residual and relu or leaky_relu one bit an element, with a residual and silu or gelu the residual. The activation's
    other masks are recomputed from x.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, setting: _Setting
    ) -> Tensor:
        y, statistics, mask = _C.layer_norm_forward(input, weight, bias, residual, *setting, True)
        kept_residual = residual if setting[2] in ("silu", "gelu") else None
        ctx.save_for_backward(input, weight, bias, kept_residual, mask, statistics)
        ctx.setting = setting
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradient = LayerNormBackwardFunction.apply if torch.is_grad_enabled() else _gradient
        return *gradient(dy, *ctx.saved_tensors, ctx.setting, ctx.needs_input_grad[:4]), None


class LayerNormBackwardFunction(torch.autograd.Function):
    """The gradients of :class:`LayerNormFunction` as a function that can itself be differentiated."""

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
        dy, input, weight, bias, residual, mask, _ = ctx.saved_tensors
        normalized_shape, eps, activation, subtract_mean = ctx.setting
        slopes = None if mask is None else _slopes(mask, input, math.prod(normalized_shape), activation)
        # Where the residual was not kept, its value does not matter: what follows is linear in it.
        stand_in = residual is None and grad_grads[3] is not None
        if stand_in:
            residual = torch.zeros_like(input).requires_grad_()

        def forward(input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
            z = _composite(input, weight, bias, normalized_shape, eps, subtract_mean)
            if slopes is None:
                return add_and_activate(z, residual, activation)
            return (z if residual is None else z + residual) * slopes

        ddy, dx, dweight, dbias, dresidual = double_backward(forward, [input, weight, bias, residual], dy, grad_grads)
        return ddy, dx, dweight, dbias, None if stand_in else dresidual, None, None, None, None


def _composite(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_shape: list[int],
    eps: float,
    subtract_mean: bool,
) -> Tensor:
    """The norm in elementary ops, differentiable any number of times."""
    dims = list(range(-len(normalized_shape), 0))
    x = input if input.dtype == torch.float64 else input.float()
    if subtract_mean:
        x = x - x.mean(dims, keepdim=True)
    z = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    z = z if weight is None else z * weight
    return (z if bias is None else z + bias).to(input.dtype)


def _slopes(mask: Tensor, input: Tensor, length: int, activation: str) -> Tensor:
    """The derivative of a piecewise linear activation at every element, from the kernel's mask: a row of bits a row."""
    bits = mask.unsqueeze(-1) >> torch.arange(8, device=mask.device, dtype=torch.uint8) & 1
    positive = bits.flatten(1)[:, :length].reshape(input.shape).bool()
    return torch.where(positive, 1.0, 0.0 if activation == "relu" else 0.01).to(input.dtype)


def _gradient(
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    statistics: Tensor,
    setting: _Setting,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    normalized_shape, _, activation, subtract_mean = setting
    return _C.layer_norm_backward(
        dy, input, weight, bias, residual, mask, statistics, normalized_shape, activation, subtract_mean, wanted
    )


def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Layer normalisation (Ba, Kiros & Hinton 2016, arXiv:1607.06450), with a residual and an activation fused.

        y = activation((x - mean) * rstd * weight + bias + residual),   rstd = 1 / sqrt(var + eps)

    where mean and var (biased) are those of the elements that the last dimensions, ``normalized_shape``, hold together.

    Args:
        input: (*, normalized_shape), float64, float32, bfloat16 or float16; rows that are not contiguous take one
            copy. The output is contiguous.
        normalized_shape: the sizes of the dimensions to normalise over, the input's last.
        weight, bias: normalized_shape, of the input's type or, for bfloat16 and float16, float32; each may be None.
        eps: added to the variance, in units of input squared.
        residual: added before the activation; input's shape and type.
        activation: None, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"`` or ``"gelu"`` (the erf form).

    Raises:
        ValueError: an unknown activation.
        RuntimeError: a shape, type or device that does not fit.

    Example:
        >>> x = torch.randn(4, 10, 16)
        >>> y = fastnorm.functional.layer_norm(x, (16,), residual=x, activation="gelu")
        >>> y.shape
        torch.Size([4, 10, 16])
    """
    return _norm(input, weight, bias, residual, (normalized_shape, eps, activation, True))


def _norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, setting: _Setting
) -> Tensor:
    """layer_norm and rms_norm."""
    op = "layer_norm" if setting[3] else "rms_norm"
    reason = uncovered_transform(op)
    if reason is None:
        try:
            if torch.is_grad_enabled() and (
                input.requires_grad
                or (weight is not None and weight.requires_grad)
                or (bias is not None and bias.requires_grad)
                or (residual is not None and residual.requires_grad)
            ):
                return LayerNormFunction.apply(input, weight, bias, residual, setting)
            return _C.layer_norm_forward(input, weight, bias, residual, *setting, False)[0]
        except NotImplementedError as uncovered:
            reason = str(uncovered)
    check_activation(op, setting[2])
    if reason is TRACED:
        return traced_call(op, _traced_norm, _torch_norm, input, weight, bias, residual, *setting)
    return call_torch(reason, _torch_norm, input, weight, bias, residual, *setting)


def _torch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    normalized_shape: list[int],
    eps: float,
    activation: str | None,
    subtract_mean: bool,
) -> Tensor:
    if subtract_mean:
        z = F.layer_norm(input, normalized_shape, weight, bias, eps)
    else:
        z = F.rms_norm(input, normalized_shape, weight, eps)
    return add_and_activate(z, residual, activation)


# ---- as ops of the dispatcher


def _traced_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *setting: Any
) -> Tensor:
    *_, subtract_mean = setting
    if not subtract_mean and weight is not None and weight.dtype != input.dtype:
        if weight.dtype != torch.float32 or input.dtype == torch.float64:
            reason = f"rms_norm: no kernel for a weight of type {weight.dtype} with an input of type {input.dtype}"
            return call_torch(reason, _torch_norm, input, weight, bias, residual, *setting)
    keep = compile.is_differentiated(input, weight, bias, residual)
    return _forward_op(input, weight, bias, residual, *setting, keep)[0]


def _fake(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    normalized_shape: list[int],
    eps: float,
    activation: str | None,
    subtract_mean: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    y = compile.empty_contiguous(input)
    if not keep:
        return compile.defined([y, None, None], input)
    rows = math.prod(input.shape[: input.dim() - len(normalized_shape)])
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    statistics = input.new_empty((3 if subtract_mean else 1, rows), dtype=dtype)
    mask = None
    if compile.keeps_mask(keep, residual, activation):
        mask = input.new_empty((rows, (math.prod(normalized_shape) + 7) // 8), dtype=torch.uint8)
    return compile.defined([y, statistics, mask], input)


def _fake_backward(
    dy: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return compile.fake_gradients(input, weight, bias, rest[-1], compile.empty_contiguous)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, normalized_shape, _, activation, subtract_mean, _ = inputs
    compile.keep_for_backward(ctx, inputs, output, activation)
    ctx.setting = normalized_shape, activation, subtract_mean


def _op_gradient(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return *compile.norm_gradients(ctx, dy, _backward_op, *ctx.setting), *[None] * 5


_forward_op = compile.register(
    "layer_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, SymInt[] normalized_shape, float eps, "
    "str? activation, bool subtract_mean, bool keep) -> (Tensor, Tensor, Tensor)",
    compile.forward_kernel(_C.layer_norm_forward),
    _fake,
    _op_gradient,
    _setup_context,
)
_backward_op = compile.register(
    "layer_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor mask, Tensor statistics, SymInt[] normalized_shape, str? activation, bool subtract_mean, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    compile.backward_kernel(_C.layer_norm_backward),
    _fake_backward,
)


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm on fastnorm's kernels: the same arguments, parameters, state_dict and numbers.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as torch.nn.LayerNorm has them.
        activation: fused into the kernel: None, "relu", "leaky_relu", "silu" or "gelu".

    Shape:
        input, and ``residual`` where one is given to forward: (*, normalized_shape); output the same.

    Example:
        >>> norm = fastnorm.LayerNorm(16, activation="relu")
        >>> norm(torch.randn(8, 5, 16)).shape
        torch.Size([8, 5, 16])
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        check_activation("LayerNorm", activation)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        parameters = self._parameters  # Module.__getattr__ takes 0.3 us a tensor; a parametrised weight is not in there
        weight = parameters["weight"] if "weight" in parameters else self.weight
        bias = parameters["bias"] if "bias" in parameters else self.bias
        return _norm(input, weight, bias, residual, (self.normalized_shape, self.eps, self.activation, True))

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.activation is None else f", activation={self.activation!r}")
