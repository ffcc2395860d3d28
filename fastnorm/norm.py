"""What the normalisations have in common: y = activation(norm(x) * weight + bias + residual).

A norm's file says what is its own, from top to bottom: a subclass of :class:`NormFunction`, its two ops of the
dispatcher, the functional, the module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastnorm import _C, compile, recomputation
from fastnorm.activation import add_and_activate, check_activation
from fastnorm.double_backward import double_backward
from fastnorm.fallback import call_torch
from fastnorm.normalize import NormalizeFunction
from fastnorm.op import apply_of, carry
from fastnorm.transforms import is_for_kernels, is_for_ops, loop_over_batch

# What no gradient goes to, in the order in which the native forward takes it after (input, weight, bias, residual). One
# argument, for each argument of an autograd function costs time.
Setting = tuple[Any, ...]


class NormFunction(torch.autograd.Function):
    """y = activation(norm(x) * weight + bias + residual), once differentiable through the native backward, any number
    of times through a composite of torch's ops.

    Kept for backward: x, weight, the statistics; bias with an activation, and for its type without a weight; with a
    residual and relu or leaky_relu one bit an element, with a residual and silu or gelu the residual. The activation's
    other masks are recomputed from x. A subclass gives the attributes and the functions below.

    The native functions are three of _C, looked up at each call, for tests put an emulator's there:

        <op>_forward: (input, weight, bias, residual, *setting, keep) -> y, statistics, mask; the last two None unless
            kept
        <op>_backward: (dy, input, weight, bias, residual, mask, statistics, *backward_setting(setting), wanted)
            -> dx, dweight, dbias, dresidual
        <op>: (input, weight, bias, residual, *setting) -> y, differentiable as it is: what this class is, in C++
            (csrc/autograd.cpp), which a call takes where nothing is to be recomputed
    """

    op: ClassVar[str]  # of the dispatcher
    activation_at: ClassVar[int]  # where in the setting the activation is
    backward_setting: ClassVar[itemgetter[Any]]  # what the native backward takes of the setting
    tracked: ClassVar[int] = 0  # how many tensors the setting begins with that training updates
    empty_like = staticmethod(compile.empty_in_layout)  # an output for an input
    folds_into_channels: ClassVar[bool] = (
        True  # inputs are normalised together as one of more channels, or of more rows
    )
    # of complete_norm()
    forward_op: ClassVar[Callable[..., tuple[Tensor, ...]]]
    backward_op: ClassVar[Callable[..., tuple[Tensor, ...]]]
    op_gradients: ClassVar[Callable[..., tuple[Tensor | None, ...]]]  # what native_gradients does, by backward_op

    @staticmethod
    def updates(setting: Setting) -> bool:
        """Whether a call with this setting updates the tracked tensors."""
        return True

    @staticmethod
    def is_repeatable(setting: Setting) -> bool:
        """Whether :meth:`again` covers this setting."""
        return True

    @staticmethod
    def composite(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, setting: Setting
    ) -> Tensor:
        """norm(input) * weight + bias in elementary ops, differentiable any number of times."""
        raise NotImplementedError

    @staticmethod
    def torch_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, setting: Setting) -> Tensor:
        """norm(input) * weight + bias by torch's own op, which also updates the tracked tensors."""
        raise NotImplementedError

    @staticmethod
    def fake_statistics(input: Tensor, setting: Setting, keep: bool) -> Tensor | None:
        """What the native forward makes of an input that has no data."""
        raise NotImplementedError

    @staticmethod
    def fake_mask(input: Tensor, setting: Setting) -> Tensor | None:
        """Likewise, where a mask is kept."""
        raise NotImplementedError

    @staticmethod
    def folded_setting(setting: Setting, batch_size: int) -> Setting:
        """The setting, but for tracked tensors, for that many inputs folded into one."""
        return setting

    @staticmethod
    def parameter_shape(input: Tensor, setting: Setting) -> list[int]:
        """Of weight and bias."""
        return [input.size(1)]

    @staticmethod
    def scale_and_shift(z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """z * weight + bias."""
        return scale_and_shift(z, weight, bias)

    @staticmethod
    def uncovered_when_traced(input: Tensor, weight: Tensor | None, setting: Setting) -> str | None:
        """Why there is no kernel for these; an eager call asks the native forward instead."""
        return None

    @classmethod
    def native_forward(cls, *args: Any) -> tuple[Any, ...]:
        return getattr(_C, f"{cls.op}_forward")(*args)

    @classmethod
    def again(
        cls,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        statistics: Tensor,
        setting: Setting,
    ) -> Tensor:
        """What forward returned, bit for bit, with no tracked tensor updated."""
        own = setting[cls.tracked :]
        return cls.native_forward(input, weight, bias, residual, *[None] * cls.tracked, *own, False)[0]

    @classmethod
    def native_gradients(
        cls, setting: Setting, wanted: Sequence[bool], dy: Tensor, *saved: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Of input, weight, bias and residual, by the kernel; ``saved`` as forward saves it."""
        return getattr(_C, f"{cls.op}_backward")(dy, *saved, *cls.backward_setting(setting), wanted)


def kept_of(
    weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: str | None
) -> tuple[Tensor | None, Tensor | None]:
    """What is kept of bias and residual.

    Without an activation nothing depends on the value of bias, so that it may be changed before backward: weight stands
    for it, for its shape and type.
    """
    stands_in = activation is None and weight is not None and bias is not None
    return weight if stands_in else bias, residual if activation in ("silu", "gelu") else None


def _forward_of(norm: type[NormFunction]) -> Callable[..., Tensor]:
    native, activation_at = f"{norm.op}_forward", norm.activation_at

    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        setting: Setting,
    ) -> Tensor:
        y, statistics, mask = getattr(_C, native)(input, weight, bias, residual, *setting, True)
        ctx.save_for_backward(input, weight, *kept_of(weight, bias, residual, setting[activation_at]), mask, statistics)
        ctx.setting = setting
        if recomputation.contexts and norm.is_repeatable(setting):
            recomputation.note(ctx, norm, (input, weight, bias), residual, statistics, setting)
        return y

    return forward


def _op_gradients_of(norm: type[NormFunction]) -> Callable[..., tuple[Tensor | None, ...]]:
    backward_op, activation_at, tracked = norm.backward_op, norm.activation_at, norm.tracked

    def op_gradients(
        setting: Setting, wanted: Sequence[bool], dy: Tensor, input: Tensor, *saved: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *parameters, mask, statistics = saved
        mask = input.new_empty(0, dtype=torch.uint8) if mask is None else mask
        # Without an activation the residual's gradient is dy, and an op must not return its argument.
        passed_on = wanted[3] and setting[activation_at] is None
        asked = [*wanted[:3], wanted[3] and not passed_on]
        gradients = backward_op(dy, input, *parameters, mask, statistics, *setting[tracked:], asked)
        dx, dweight, dbias, dresidual = (g if is_asked else None for g, is_asked in zip(gradients, asked, strict=True))
        return dx, dweight, dbias, dy if passed_on else dresidual

    return op_gradients


def _backward_of(norm: type[NormFunction]) -> Callable[..., tuple[Tensor | None, ...]]:
    native, backward_setting, op_gradients = f"{norm.op}_backward", norm.backward_setting, norm.op_gradients

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:4]
        if is_for_kernels(dy):
            found = getattr(_C, native)(dy, *ctx.saved_tensors, *backward_setting(ctx.setting), wanted)
        elif is_for_ops(dy):
            found = op_gradients(ctx.setting, wanted, dy, *ctx.saved_tensors)
        else:
            found = NormBackwardFunction.apply(norm, ctx.setting, wanted, dy, *ctx.saved_tensors)
        dx, dweight, dbias, dresidual = found  # *found would take 0.3 us
        return dx, dweight, dbias, dresidual, None

    return backward


class NormBackwardFunction(torch.autograd.Function):
    """The gradients of a :class:`NormFunction` as a function that can itself be differentiated."""

    @staticmethod
    def forward(
        norm: type[NormFunction],
        setting: Setting,
        wanted: Sequence[bool],
        dy: Tensor,
        input: Tensor,
        *saved: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        gradients = norm.native_gradients(setting, wanted, dy, input, *saved)
        # an input may not be returned as it is: it would be taken for the output's own history
        return tuple(g.view_as(g) if g is dy else g for g in gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.norm, ctx.setting, _, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        again = _second_gradients(ctx.norm.native_gradients, ctx.norm, ctx.setting, grad_grads, *ctx.saved_tensors)
        return None, None, None, *again, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return loop_over_batch(NormBackwardFunction, info, in_dims, *args)


def _second_gradients(
    gradients: Callable[..., tuple[Tensor | None, ...]],
    norm: type[NormFunction],
    setting: Setting,
    grad_grads: Sequence[Tensor | None],
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    statistics: Tensor,
) -> list[Tensor | None]:
    """Of (dy, input, weight, bias, residual), where grad_grads are those of what ``gradients`` makes of these."""
    slopes = None
    if mask is not None and mask.numel():  # the activation's derivative is the residual's gradient where dy is 1
        saved = input.detach(), weight, bias, residual, mask, statistics
        slopes = gradients(setting, (False, False, False, True), torch.ones_like(dy), *saved)[3]
    # Where bias and residual were not kept, their values do not matter: what follows is linear in them.
    if setting[norm.activation_at] is None and bias is not None and grad_grads[2] is not None:
        bias = torch.zeros_like(bias).requires_grad_()
    stand_in = residual is None and grad_grads[3] is not None
    if stand_in:
        residual = torch.zeros_like(input).requires_grad_()

    def forward(input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        z = norm.composite(input, weight, bias, statistics, setting)
        if slopes is None:
            return add_and_activate(z, residual, setting[norm.activation_at])
        return (z if residual is None else z + residual) * slopes

    found = double_backward(forward, [input, weight, bias, residual], dy, grad_grads)
    return [*found[:4], None] if stand_in else found


def norm_op(name: str, norm: type[NormFunction], autocast_as: tuple[str, ...] = ()) -> Callable[..., Tensor]:
    """The function of (input, weight, bias, residual, setting) that functionals and modules call.

    Args:
        name: what warnings and errors call it.
        autocast_as: see :func:`fastnorm.op.carry`.
    """
    apply, op = apply_of(norm), norm.op
    # looked up here, for Dynamo, which follows ``traced`` and ``torch_op``, looks nothing up on an autograd function
    forward_op, torch_norm, uncovered_when_traced = norm.forward_op, norm.torch_norm, norm.uncovered_when_traced
    activation_at, tracked, updates = norm.activation_at, norm.tracked, norm.updates
    parameter_shape = norm.parameter_shape

    def transformed(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, setting: Setting
    ) -> Tensor:
        activation = setting[activation_at]
        check_activation(name, activation)
        shape = parameter_shape(input, setting)
        for what, parameter in (("weight", weight), ("bias", bias)):
            if parameter is not None and list(parameter.shape) != shape:
                raise RuntimeError(f"{name}: {what} must have shape {shape}, got {list(parameter.shape)}")
        # xhat of bfloat16 and float16 in float32, unless running statistics of their type rule that out
        widen = input.dtype in (torch.bfloat16, torch.float16)
        widen = widen and all(t is None or t.dtype != input.dtype for t in setting[:tracked])
        xhat, _ = NormalizeFunction.apply(
            input.float() if widen else input,
            norm,
            (*setting[:activation_at], None, *setting[activation_at + 1 :]),
        )
        z = norm.scale_and_shift(xhat, weight, bias).to(input.dtype)
        return add_and_activate(z, residual, activation)

    def eager(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, setting: Setting
    ) -> Tensor:
        if recomputation.contexts and compile.is_differentiated(input, weight, bias, residual):
            return apply(input, weight, bias, residual, setting)
        return getattr(_C, op)(input, weight, bias, residual, *setting)

    def traced(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, setting: Setting
    ) -> Tensor:
        check_activation(name, setting[activation_at])
        reason = uncovered_when_traced(input, weight, setting)
        if reason is not None:
            return call_torch(name, reason, torch_op, input, weight, bias, residual, setting)
        keep = compile.is_differentiated(input, weight, bias, residual)
        y, _, _, *new = forward_op(input, weight, bias, residual, *setting, keep)
        if updates(setting):
            compile.write_back(setting[:tracked], new)
        return y

    def torch_op(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, setting: Setting
    ) -> Tensor:
        activation = setting[activation_at]
        check_activation(name, activation)
        return add_and_activate(torch_norm(input, weight, bias, setting), residual, activation)

    return carry(name, eager=eager, transformed=transformed, traced=traced, torch_op=torch_op, autocast_as=autocast_as)


# ---- as ops of the dispatcher


def complete_norm(norm: type[NormFunction], setting: str) -> None:
    """Registers the two ops of a norm, ``forward_op`` and ``backward_op``, and makes ``forward``, ``backward`` and
    ``op_gradients``.

    These are functions that have the norm's attributes at hand: to look them up takes 1 us of a small call's 20, and
    Dynamo, which follows backward under compiled autograd, looks none up on an autograd function.

    Args:
        setting: the part of the forward's schema that is the norm's own; the backward has it but for tracked tensors.
    """
    norm.forward_op = _register_forward(norm, setting)
    norm.backward_op = _register_backward(norm, ", ".join(setting.split(", ")[norm.tracked :]))
    norm.op_gradients = staticmethod(_op_gradients_of(norm))
    norm.forward = staticmethod(_forward_of(norm))  # type: ignore[method-assign]
    norm.backward = staticmethod(_backward_of(norm))  # type: ignore[method-assign]


def _register_forward(norm: type[NormFunction], setting: str) -> Callable[..., tuple[Tensor, ...]]:
    """The op (input, weight, bias, residual, *setting, keep) -> (y, statistics, mask, *updated tracked tensors)."""

    def kernel(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        tracked, own, keep = rest[: norm.tracked], rest[norm.tracked : -1], rest[-1]
        new = compile.clones(tracked) if norm.updates(rest[:-1]) else [None] * norm.tracked
        used = new if norm.updates(rest[:-1]) else tracked
        results = norm.native_forward(input, weight, bias, residual, *used, *own, keep)
        return compile.defined((*results, *new), input)

    def fake(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        setting, keep = rest[:-1], rest[-1]
        masked = keep and residual is not None and setting[norm.activation_at] in ("relu", "leaky_relu")
        mask = norm.fake_mask(input, setting) if masked else None
        new = compile.clones(setting[: norm.tracked]) if norm.updates(setting) else [None] * norm.tracked
        statistics = norm.fake_statistics(input, setting, keep)
        return compile.defined((norm.empty_like(input), statistics, mask, *new), input)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, weight, bias, residual, *setting, _ = inputs
        _, statistics, mask, *_ = output
        ctx.setting = (None,) * norm.tracked + tuple(setting[norm.tracked :])
        kept = kept_of(weight, bias, residual, setting[norm.activation_at])
        ctx.save_for_backward(input, weight, *kept, mask, statistics)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def gradient(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        needed, not_differentiable = ctx.needs_input_grad[:4], ctx.needs_input_grad[4:]
        return *norm.op_gradients(ctx.setting, needed, dy, *ctx.saved_tensors), *[None] * len(not_differentiable)

    return compile.register(
        f"{norm.op}(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, {setting}, bool keep) "
        f"-> ({', '.join(['Tensor'] * (3 + norm.tracked))})",
        kernel,
        fake,
        gradient,
        setup_context,
    )


def _register_backward(norm: type[NormFunction], setting: str) -> Callable[..., tuple[Tensor, ...]]:
    """The op (grad_output, input, weight, bias, residual, mask, statistics, *setting, wanted) -> the four gradients."""
    untracked = (None,) * norm.tracked

    def kernel(dy: Tensor, input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        weight, bias, residual, mask, statistics, *own, wanted = rest
        saved = input, weight, bias, residual, mask if mask.numel() else None, statistics
        return compile.defined(norm.native_gradients((*untracked, *own), wanted, dy, *saved), input)

    def fake(dy: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        like = (input, norm.empty_like), (weight, compile.empty_contiguous), (bias, compile.empty_contiguous)
        made: Sequence[Tensor | None] = [
            make(t) if t is not None and wanted else None
            for (t, make), wanted in zip((*like, like[0]), rest[-1], strict=True)
        ]
        return compile.defined(made, input)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *own, wanted = inputs[7:]
        ctx.setting = (*untracked, *own)
        ctx.save_for_backward(*inputs[:7])
        ctx.mark_non_differentiable(*(g for g, is_wanted in zip(output, wanted, strict=True) if not is_wanted))
        ctx.set_materialize_grads(False)

    def gradient(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        again = _second_gradients(norm.op_gradients, norm, ctx.setting, grad_grads, *ctx.saved_tensors)
        return *again, *[None] * (len(ctx.needs_input_grad) - 5)

    return compile.register(
        f"{norm.op}_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
        f"Tensor mask, Tensor statistics, {setting}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
        kernel,
        fake,
        gradient,
        setup_context,
    )


# ---- what norms over channels share


def along_channels(parameter: Tensor, input: Tensor) -> Tensor:
    """(C) as a tensor that broadcasts with (N, C, *)."""
    return parameter.view([1, -1] + [1] * (input.dim() - 2))


def scale_and_shift(z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """z * weight + bias of (N, C, *), weight and bias (C) or None."""
    z = z if weight is None else z * along_channels(weight, z)
    return z if bias is None else z + along_channels(bias, z)
