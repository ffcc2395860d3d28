"""Group normalisation: autograd function, functional and module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnorm import _C, compile
from fastnorm.activation import add_and_activate, check_activation
from fastnorm.double_backward import double_backward
from fastnorm.fallback import TRACED, call_torch, traced_call, uncovered_transform

# num_groups, eps, activation: what no gradient goes to, as one argument, for each argument of an autograd function
# costs time.
_Setting = tuple[int, float, str | None]


class GroupNormFunction(torch.autograd.Function):
    """y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual), see :func:`group_norm`.

    Kept for backward: x, weight, bias, two numbers a group and sample; with a residual and relu or leaky_relu one bit
    an element, with a residual and silu or gelu the residual. The activation's other masks are recomputed from x.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, setting: _Setting
    ) -> Tensor:
        y, statistics, mask = _C.group_norm_forward(input, weight, bias, residual, *setting, True)
        kept_residual = residual if setting[2] in ("silu", "gelu") else None
        ctx.save_for_backward(input, weight, bias, kept_residual, mask, statistics)
        ctx.setting = setting
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradient = GroupNormBackwardFunction.apply if torch.is_grad_enabled() else _gradient
        return *gradient(dy, *ctx.saved_tensors, ctx.setting, ctx.needs_input_grad[:4]), None


class GroupNormBackwardFunction(torch.autograd.Function):
    """The gradients of :class:`GroupNormFunction` as a function that can itself be differentiated."""

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
        num_groups, eps, activation = ctx.setting
        slopes = None if mask is None else _C.group_norm_mask_slopes(input, mask, activation)
        # Where the residual was not kept, its value does not matter: what follows is linear in it.
        stand_in = residual is None and grad_grads[3] is not None
        if stand_in:
            residual = torch.zeros_like(input).requires_grad_()

        def forward(input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
            z = _composite(input, weight, bias, num_groups, eps)
            if slopes is None:
                return add_and_activate(z, residual, activation)
            return (z if residual is None else z + residual) * slopes

        ddy, dx, dweight, dbias, dresidual = double_backward(forward, [input, weight, bias, residual], dy, grad_grads)
        return ddy, dx, dweight, dbias, None if stand_in else dresidual, None, None, None, None


def _composite(input: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float) -> Tensor:
    """Group normalisation in elementary ops, differentiable any number of times."""
    x = input if input.dtype == torch.float64 else input.float()
    slices = x.reshape(x.shape[0], num_groups, -1)
    centred = slices - slices.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    z = (centred * rstd).view(x.shape)
    shape = [1, -1] + [1] * (x.dim() - 2)
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
    setting: _Setting,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    num_groups, _, activation = setting
    return _C.group_norm_backward(
        dy, input, weight, bias, residual, mask, statistics, num_groups, activation, wanted
    )  # fmt: skip


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Group normalisation (Wu & He 2018, arXiv:1803.08494), with a residual and an activation in the same kernel.

        y = activation((x - mean) * rstd * weight + bias + residual),   rstd = 1 / sqrt(var + eps)

    mean and var (biased) are those of each sample and group: C / num_groups neighbouring channels, all positions.

    Args:
        input: (N, C, *), float64, float32, bfloat16 or float16. Contiguous and channels_last tensors of any number of
            dimensions are read as they lie, other strides take one copy. The output has the input's layout.
        num_groups: divides C.
        weight, bias: (C), of the input's type or, for bfloat16 and float16, float32; each may be None.
        eps: added to the variance, in units of input squared.
        residual: added before the activation; input's shape and type.
        activation: None, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"`` or ``"gelu"`` (the erf form).

    Raises:
        ValueError: one sample of one value per group; an unknown activation.
        RuntimeError: num_groups does not divide C; a shape, type or device that does not fit.

    Example:
        >>> x = torch.randn(8, 4, 5, 5).contiguous(memory_format=torch.channels_last)
        >>> y = fastnorm.functional.group_norm(x, 2, activation="silu")
        >>> y.shape, y.is_contiguous(memory_format=torch.channels_last)
        (torch.Size([8, 4, 5, 5]), True)
    """
    return _group_norm(input, weight, bias, residual, (num_groups, eps, activation))


def _group_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, setting: _Setting
) -> Tensor:
    reason = uncovered_transform("group_norm")
    if reason is None:
        try:
            if torch.is_grad_enabled() and (
                input.requires_grad
                or (weight is not None and weight.requires_grad)
                or (bias is not None and bias.requires_grad)
                or (residual is not None and residual.requires_grad)
            ):
                return GroupNormFunction.apply(input, weight, bias, residual, setting)
            return _C.group_norm_forward(input, weight, bias, residual, *setting, False)[0]
        except NotImplementedError as uncovered:
            reason = str(uncovered)
    elif reason is TRACED:
        return traced_call("group_norm", _traced_group_norm, _torch_group_norm, input, weight, bias, residual, *setting)
    return call_torch(reason, _torch_group_norm, input, weight, bias, residual, *setting)


def _torch_group_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    eps: float,
    activation: str | None,
) -> Tensor:
    check_activation("group_norm", activation)
    return add_and_activate(F.group_norm(input, num_groups, weight, bias, eps), residual, activation)


# ---- as ops of the dispatcher


def _traced_group_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *setting: Any
) -> Tensor:
    check_activation("group_norm", setting[2])
    keep_mask = compile.is_differentiated(input, weight, bias, residual)
    return _forward_op(input, weight, bias, residual, *setting, keep_mask)[0]


def fake_groups(
    input: Tensor, residual: Tensor | None, num_groups: int, activation: str | None, keep_mask: bool
) -> tuple[Tensor | None, ...]:
    """y, statistics and mask of group or instance normalisation."""
    statistics = input.new_empty((2, input.size(0), num_groups), dtype=torch.float64)
    mask = None
    if compile.keeps_mask(keep_mask, residual, activation) and input.numel() > 0:
        mask = input.new_empty(_mask_bytes(input), dtype=torch.uint8)
    return compile.empty_in_layout(input), statistics, mask


def _mask_bytes(input: Tensor) -> int:
    """Of group_mask_rows in csrc/group_norm.h."""
    if input.is_cuda:
        return compile.cuda_mask_bytes(input)
    N, C, S = input.size(0), input.size(1), compile.spatial_size(input)
    if compile.is_channels_last(input):
        fold = compile.folded(C, S)
        return N * ((S + fold - 1) // fold) * ((fold * C + 7) // 8)
    return N * ((C * S + 7) // 8) if S < 16 else N * C * ((S + 7) // 8)


def _fake(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    eps: float,
    activation: str | None,
    keep_mask: bool,
) -> tuple[Tensor, ...]:
    return compile.defined(fake_groups(input, residual, num_groups, activation, keep_mask), input)


def _fake_backward(
    dy: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return compile.fake_gradients(input, weight, bias, rest[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, num_groups, _, activation, _ = inputs
    compile.keep_for_backward(ctx, inputs, output, activation)
    ctx.setting = num_groups, activation


def _op_gradient(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return *compile.norm_gradients(ctx, dy, backward_op, *ctx.setting), *[None] * 4


_forward_op = compile.register(
    "group_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, SymInt num_groups, float eps, "
    "str? activation, bool keep_mask) -> (Tensor, Tensor, Tensor)",
    compile.forward_kernel(_C.group_norm_forward),
    _fake,
    _op_gradient,
    _setup_context,
)
backward_op = compile.register(
    "group_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor mask, Tensor statistics, SymInt num_groups, str? activation, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    compile.backward_kernel(_C.group_norm_backward),
    _fake_backward,
)


class GroupNorm(nn.GroupNorm):
    """torch.nn.GroupNorm on fastnorm's kernels: the same arguments, parameters, state_dict and numbers.

    Args:
        num_groups, num_channels, eps, affine, device, dtype: as torch.nn.GroupNorm has them.
        bias: False leaves out the bias of an affine layer.
        activation: fused into the kernel: None, "relu", "leaky_relu", "silu" or "gelu".

    Shape:
        input, and ``residual`` where one is given to forward: (N, num_channels, *); output the same.

    Raises:
        ValueError: num_groups does not divide num_channels; an unknown activation.

    Example:
        >>> norm = fastnorm.GroupNorm(4, 16, activation="relu")
        >>> norm(torch.randn(8, 16, 4, 4)).shape
        torch.Size([8, 16, 4, 4])
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        check_activation("GroupNorm", activation)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.activation = activation

    def reset_parameters(self) -> None:
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        # Module.__getattr__ takes 0.3 us a tensor; a parametrised weight is not in the dictionary, though
        parameters = self._parameters
        weight = parameters["weight"] if "weight" in parameters else self.weight
        bias = parameters["bias"] if "bias" in parameters else self.bias
        return _group_norm(input, weight, bias, residual, (self.num_groups, self.eps, self.activation))

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.activation is None else f", activation={self.activation!r}")
