"""Inverted dropout, alpha dropout and stochastic depth: autograd functions, functionals and modules."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function_unary

from fastnorm import _C, compile
from fastnorm.op import apply_of, carry, check_tensor, refuse_bool
from fastnorm.overrides import overridden, recorded_call
from fastnorm.transforms import (
    inside_vmap,
    is_batch_of_gradients,
    is_for_kernels,
    is_for_ops,
    loop_over_batch,
    outside_transforms,
)


class MaskFunction(torch.autograd.Function):
    """A function of (input, p, state, channel_dims, inplace) whose mask is one of ``state`` (seed and offset) and the
    element's index alone. Kept for backward: the state.

    Its derivative is linear and its own adjoint, so backward and forward mode are the same function of the gradient and
    of the tangent, and derivatives of every order are.
    """

    derivative: ClassVar[type[MaskFunction]]
    op: ClassVar[Callable[..., Tensor]]  # of the dispatcher

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, p, state, channel_dims, inplace = inputs
        if inplace:
            ctx.mark_dirty(input)
        ctx.setting = p, state, channel_dims

    @classmethod
    def jvp(cls, ctx: Any, dx: Tensor, *_: None) -> Tensor:
        if is_batch_of_gradients(dx):
            return cls.derivative.op(dx, *ctx.setting)
        return cls.derivative.apply(dx, *ctx.setting, False)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return loop_over_batch(cls, info, in_dims, *args)


class DropoutFunction(MaskFunction):
    """y = input * mask / (1 - p)."""

    @staticmethod
    def forward(input: Tensor, p: float, state: Tensor, channel_dims: int, inplace: bool) -> Tensor:
        return _C.dropout(input, p, state, channel_dims, inplace)


class AlphaDropoutFunction(MaskFunction):
    """y = a * (input where mask, else alpha') + b, see :func:`alpha_dropout`."""

    @staticmethod
    def forward(input: Tensor, p: float, state: Tensor, channel_dims: int, inplace: bool) -> Tensor:
        return _C.alpha_dropout(input, p, state, channel_dims, inplace)


class AlphaDropoutBackwardFunction(MaskFunction):
    """dx = a * mask * dy."""

    @staticmethod
    def forward(dy: Tensor, p: float, state: Tensor, channel_dims: int, inplace: bool) -> Tensor:
        return _C.alpha_dropout_backward(dy, p, state, channel_dims)


DropoutFunction.derivative = DropoutFunction
AlphaDropoutFunction.derivative = AlphaDropoutBackwardFunction.derivative = AlphaDropoutBackwardFunction


def _dropping(
    name: str, torch_op: Callable[[Tensor, float, bool, bool], Tensor], alpha: bool = False
) -> Callable[..., Tensor]:
    """The op as a function of (input, p, channel_dims, inplace, generator), in training and with 0 < p <= 1."""
    function = AlphaDropoutFunction if alpha else DropoutFunction
    # looked up here, for Dynamo, which follows ``traced``, looks nothing up on an autograd function
    apply, op = apply_of(function), function.op

    def eager(input: Tensor, p: float, channel_dims: int, inplace: bool, generator: torch.Generator | None) -> Tensor:
        differentiated = input.requires_grad and torch.is_grad_enabled()
        if inplace and differentiated and (input.is_leaf or ((base := input._base) is not None and base.is_leaf)):
            raise RuntimeError(
                f"{name}: inplace=True on a leaf tensor that requires grad, or a view of one, whose value the graph "
                "needs"
            )
        state = _C.dropout_state(generator, input)
        if not inplace:
            return _C.differentiable_dropout(input, p, state, channel_dims, alpha)
        if differentiated:
            return apply(input, p, state, channel_dims, inplace)
        return (_C.alpha_dropout if alpha else _C.dropout)(input, p, state, channel_dims, inplace)

    def transformed(
        input: Tensor, p: float, channel_dims: int, inplace: bool, generator: torch.Generator | None
    ) -> Tensor:
        if inside_vmap():  # whose randomness= says whether all draw one mask or each its own, or that neither may be
            state = _random_state(input, generator)
        else:
            with outside_transforms():
                state = _C.dropout_state(generator, torch.empty(0, device=input.device))
        y = function.apply(input, p, state, channel_dims, False)
        return input.copy_(y) if inplace else y

    def traced(input: Tensor, p: float, channel_dims: int, inplace: bool, generator: torch.Generator | None) -> Tensor:
        if generator is not None:
            raise NotImplementedError(f"{name}: generator must be None under torch.compile and torch.export")
        y = op(input, p, _traced_state(input), channel_dims)
        return input.copy_(y) if inplace else y

    def torch_dropout(
        input: Tensor, p: float, channel_dims: int, inplace: bool, generator: torch.Generator | None
    ) -> Tensor:
        if generator is not None:
            raise NotImplementedError(f"{name}: generator must be None, for torch's own op takes none")
        return torch_op(input, p, True, inplace)

    return carry(name, eager=eager, transformed=transformed, traced=traced, torch_op=torch_dropout)


def _whole(op: str, input: Tensor, p: float, training: bool) -> Tensor:
    """What comes of a call that drops nothing: the input, or an error."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: p must be in [0, 1], got {p}")
    if training is not False and training is not True:
        refuse_bool(op, "training", training)
    if not isinstance(input, Tensor):
        check_tensor(op, input)
    return input


def _random_state(input: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=input.device, generator=generator)


# ---- as ops of the dispatcher


def _traced_state(input: Tensor) -> Tensor:
    """Seed and offset of one mask, drawn when the graph runs."""
    return _dropout_state_op(input, _site())


def _site() -> int:
    """Another number for each call in a graph: of calls of an op with equal arguments a compiler makes one, even where
    the op is tagged as random, and two layers would share a mask."""
    return next(_sites)


_sites = itertools.count()
# What torch.compiler.assume_constant_result does, without its import of the compiler: two seconds of every start.
_site._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, state, ctx.channel_dims = inputs
    ctx.save_for_backward(state)


_dropout_state_op = compile.register(
    "dropout_state(Tensor input, int site) -> Tensor",
    lambda input, site: _C.dropout_state(None, input),
    lambda input, site: input.new_empty(2, dtype=torch.int64),
    setup_context=lambda ctx, inputs, output: ctx.mark_non_differentiable(output),
    tags=(torch.Tag.nondeterministic_seeded,),
)


def _register(name: str, function: type[MaskFunction]) -> None:
    function.op = compile.register(
        f"{name}(Tensor input, float p, Tensor state, int channel_dims) -> Tensor",
        lambda *args: function.forward(*args, False),
        lambda input, *_: compile.empty_in_layout(input),
        lambda ctx, dy: (function.derivative.op(dy, ctx.p, *ctx.saved_tensors, ctx.channel_dims), None, None, None),
        _setup_context,
    )


_register("dropout", DropoutFunction)
_register("alpha_dropout", AlphaDropoutFunction)
_register("alpha_dropout_backward", AlphaDropoutBackwardFunction)


def _backward_of(function: type[MaskFunction]) -> Callable[..., tuple[Tensor | None, ...]]:
    derivative = function.derivative
    op = derivative.op  # for Dynamo, which under compiled autograd follows backward, looks nothing up there

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if is_for_kernels(dy):
            dx = derivative.forward(dy, *ctx.setting, False)
        elif is_for_ops(dy):
            dx = op(dy, *ctx.setting)
        else:
            dx = derivative.apply(dy, *ctx.setting, False)
        return dx, None, None, None, None

    return backward


for _function in (DropoutFunction, AlphaDropoutFunction, AlphaDropoutBackwardFunction):
    _function.backward = staticmethod(_backward_of(_function))  # type: ignore[method-assign]


def _torch_drop_path(input: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
    dtype = input.dtype.to_real() if input.is_complex() else input.dtype
    ones = torch.ones([input.size(0)] + [1] * (input.dim() - 1), dtype=dtype, device=input.device)
    keep = F.dropout(ones, p, training)
    return input.mul_(keep) if inplace else input * keep


_dropout = _dropping("dropout", F.dropout)
_dropout1d = _dropping("dropout1d", F.dropout1d)
_dropout2d = _dropping("dropout2d", F.dropout2d)
_dropout3d = _dropping("dropout3d", F.dropout3d)
_alpha_dropout = _dropping("alpha_dropout", F.alpha_dropout, alpha=True)
_feature_alpha_dropout = _dropping("feature_alpha_dropout", F.feature_alpha_dropout, alpha=True)
_drop_path = _dropping("drop_path", _torch_drop_path)


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Inverted dropout (Srivastava et al. 2014): zeroes elements with probability p, scales the others.

        y[i] = input[i] * keep[i] / (1 - p),   P(keep[i]) = 1 - p

    The mask comes from Philox4x32-7 (Salmon et al. 2011), 16 bits an element, at the element's index in logical order:
    one seed gives one mask whatever the device, the data type, the layout or the number of threads. p is rounded to a
    multiple of 2**-16, and the scale is the reciprocal of what is then kept. A dropped NaN or inf gives NaN, as in
    torch.

    Args:
        input: any shape; float64, float32, bfloat16 or float16.
        p: probability of an element to be zeroed, in [0, 1].
        training: False returns the input.
        inplace: write the result into the input.
        generator: where the seed comes from, 64 bits a call: one of the input's device or, for one mask on every
            device, of the CPU. If None torch's default one of the input's device, so torch.manual_seed and
            torch.random.fork_rng act as they do on torch's dropout. A captured CUDA graph draws another mask at each
            replay.

    Raises:
        ValueError: p outside [0, 1], or NaN.
        RuntimeError: inplace on a leaf that requires grad, or a view of one.

    Example:
        >>> x = torch.ones(4, 1000)
        >>> y = fastnorm.functional.dropout(x, 0.25, generator=torch.Generator().manual_seed(0))
        >>> sorted(y.unique().tolist())
        [0.0, 1.3333333730697632]
    """
    if has_torch_function_unary(input) and not is_dynamo_compiling():
        return overridden(dropout, locals())
    if training is True and 0.0 < p <= 1.0:
        return _dropout(input, p, 0, inplace, generator)
    return _whole("dropout", input, p, training)


_CHANNELS_DOC = """Zeroes whole channels with probability p and scales the others (Tompson et al. 2015,
arXiv:1411.4280).

        y[n, c, ...] = input[n, c, ...] * keep[n, c] / (1 - p)

    Args:
        input: {shape}.
        p, training, inplace, generator: as in :func:`dropout`.

    Raises:
        ValueError: p outside [0, 1], or NaN.
        {errors}
    """


def dropout1d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    if has_torch_function_unary(input) and not is_dynamo_compiling():
        return overridden(dropout1d, locals())
    if input.dim() not in (2, 3):
        raise RuntimeError(f"dropout1d: input must have shape (N, C, L) or (C, L), got {list(input.shape)}")
    if training is True and 0.0 < p <= 1.0:
        return _dropout1d(input, p, input.dim() - 1, inplace, generator)
    return _whole("dropout1d", input, p, training)


def dropout2d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    if has_torch_function_unary(input) and not is_dynamo_compiling():
        return overridden(dropout2d, locals())
    _check_channels("dropout2d", "(N, C, H, W)", input, (4,))
    if training is True and 0.0 < p <= 1.0:
        return _dropout2d(input, p, 2, inplace, generator)
    return _whole("dropout2d", input, p, training)


def dropout3d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    if has_torch_function_unary(input) and not is_dynamo_compiling():
        return overridden(dropout3d, locals())
    _check_channels("dropout3d", "(N, C, D, H, W) or (C, D, H, W)", input, (4, 5))
    if training is True and 0.0 < p <= 1.0:
        return _dropout3d(input, p, 1 if input.dim() == 4 else 2, inplace, generator)
    return _whole("dropout3d", input, p, training)


def _check_channels(op: str, wanted: str, input: Tensor, ranks: tuple[int, ...]) -> None:
    """Other ranks are read as (N, C, *) with a warning, as torch does for now."""
    if input.dim() < 2:
        raise RuntimeError(f"{op}: input must have shape {wanted}, got {list(input.shape)}")
    if input.dim() not in ranks:
        instead = "dropout1d" if input.dim() == 3 else "dropout"
        warnings.warn(
            f"{op}: input should have shape {wanted}, got {list(input.shape)}, which is read as (N, C, *); "
            f"use {instead} instead",
            stacklevel=4,
        )


dropout1d.__doc__ = _CHANNELS_DOC.format(
    shape="(N, C, L) or (C, L)", errors="RuntimeError: another number of dimensions."
)
dropout2d.__doc__ = _CHANNELS_DOC.format(
    shape="(N, C, H, W); other shapes are read as (N, C, *) with a warning",
    errors="RuntimeError: fewer than two dimensions.",
)
dropout3d.__doc__ = _CHANNELS_DOC.format(
    shape="(N, C, D, H, W) or (C, D, H, W); other shapes are read as (N, C, *) with a warning",
    errors="RuntimeError: fewer than two dimensions.",
)


def alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Alpha dropout (Klambauer et al. 2017, arXiv:1706.02515): an input of mean 0 and variance 1 keeps both.

        y[i] = a * (input[i] if keep[i] else alpha') + b,   P(keep[i]) = 1 - p
        alpha' = -1.7580993,   a = ((1 - p) * (1 + p * alpha'^2))^(-1/2),   b = -a * p * alpha'

    alpha' is the value that SELU saturates at. The mask, and the p that a and b are computed from, are those of
    :func:`dropout`: one seed gives both the same mask. p = 1 gives zeros; a dropped NaN or inf gives NaN, both as in
    torch.

    Args:
        input: any shape; float64, float32, bfloat16 or float16.
        p: probability of an element to be set to alpha', in [0, 1].
        training: False, torch's default for this function, returns the input.
        inplace, generator: as in :func:`dropout`.

    Raises:
        ValueError: p outside [0, 1], or NaN.
        RuntimeError: inplace on a leaf that requires grad, or a view of one.

    Example:
        >>> x = torch.ones(4, 1000)
        >>> y = fastnorm.functional.alpha_dropout(x, 0.5, True, generator=torch.Generator().manual_seed(0))
        >>> [round(value, 4) for value in sorted(y.unique().tolist())]
        [-0.7792, 1.6656]
    """
    if has_torch_function_unary(input) and not is_dynamo_compiling():
        return overridden(alpha_dropout, locals())
    if training is True and 0.0 < p <= 1.0:
        return _alpha_dropout(input, p, 0, inplace, generator)
    return _whole("alpha_dropout", input, p, training)


def feature_alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`alpha_dropout` of whole channels: keep[n, c] in place of keep[i].

    Args:
        input: (N, C, *), read so whatever its rank, as torch reads it: there is no form without a batch.
        p: probability of a channel to be set to alpha', in [0, 1].
        training: False, torch's default for this function, returns the input.
        inplace, generator: as in :func:`dropout`.

    Raises:
        ValueError: p outside [0, 1], or NaN.
        RuntimeError: fewer than two dimensions, in training; inplace on a leaf that requires grad, or a view of one.

    Example:
        >>> y = fastnorm.functional.feature_alpha_dropout(torch.randn(4, 10, 7, 7), 0.25, True)
        >>> y.shape
        torch.Size([4, 10, 7, 7])
    """
    if has_torch_function_unary(input) and not is_dynamo_compiling():
        return overridden(feature_alpha_dropout, locals())
    if training and p != 0.0 and input.dim() < 2:
        raise RuntimeError(f"feature_alpha_dropout: input must have shape (N, C, *), got {list(input.shape)}")
    if training is True and 0.0 < p <= 1.0:
        return _feature_alpha_dropout(input, p, 2, inplace, generator)
    return _whole("feature_alpha_dropout", input, p, training)


def drop_path(
    input: Tensor,
    p: float = 0.0,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): in training drops whole samples of a residual branch.

        y[n, ...] = input[n, ...] * keep[n] / (1 - p),   P(keep[n]) = 1 - p

    The mask, and the rounding of p, are those of :func:`dropout` at the sample's index. The arguments are in the order
    of timm's drop_path; torchvision's stochastic_depth(input, p, "row", training) computes the same.

    Args:
        input: (N, *), float64, float32, bfloat16 or float16; contiguous and channels_last tensors are read as they lie.
        p: probability of a sample to be dropped, in [0, 1].
        training: False returns the input.
        inplace, generator: as in :func:`dropout`.

    Raises:
        ValueError: p outside [0, 1], or NaN.
        RuntimeError: a tensor without dimensions, in training; inplace on a leaf that requires grad, or a view of one.

    Example:
        >>> x, branch = torch.randn(8, 4, 5, 5), torch.nn.Conv2d(4, 4, 3, padding=1)
        >>> y = x + fastnorm.functional.drop_path(branch(x), 0.1, training=True)
    """
    if has_torch_function_unary(input) and not is_dynamo_compiling():
        return overridden(drop_path, locals())
    if training and p != 0.0 and input.dim() < 1:
        raise RuntimeError(f"drop_path: input must have shape (N, *), got {list(input.shape)}")
    if training is True and 0.0 < p <= 1.0:
        return _drop_path(input, p, 1, inplace, generator)
    return _whole("drop_path", input, p, training)


_MODULE_DOC = """torch.nn.{name} on fastnorm's kernels, see :func:`fastnorm.functional.{function}`.

    That has the formula and the source.

    Args:
        p: probability of {what} to be zeroed, in [0, 1].
        inplace: write the result into the input.

    Shape:
        input: {shape}; output the same. In eval mode the output is the input.

    Raises:
        ValueError: p outside [0, 1], or NaN.

    Example:
        >>> fastnorm.{name}(0.25)(torch.ones({example})).shape
        torch.Size([{example}])
    """


class _Dropout(nn.modules.dropout._DropoutNd):
    """The functional that a module is of. p that is NaN passes torch's own check; not here."""

    _function: Callable[[Tensor, float, bool, bool], Tensor]
    __prepare_scriptable__ = compile.refuse_scripting

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"{type(self).__name__}: p must be in [0, 1], got {p}")
        super().__init__(p, inplace)

    def forward(self, input: Tensor) -> Tensor:
        if has_torch_function_unary(input) and (call := recorded_call(self, input)) is not None:
            return call
        return self._function(input, self.p, self.training, self.inplace)


class Dropout(_Dropout, nn.Dropout):
    __doc__ = _MODULE_DOC.format(name="Dropout", function="dropout", what="an element", shape="any", example="4, 10")

    _function = staticmethod(dropout)


class Dropout1d(_Dropout, nn.Dropout1d):
    __doc__ = _MODULE_DOC.format(
        name="Dropout1d", function="dropout1d", what="a channel", shape="(N, C, L) or (C, L)", example="4, 10, 7"
    )

    _function = staticmethod(dropout1d)


class Dropout2d(_Dropout, nn.Dropout2d):
    __doc__ = _MODULE_DOC.format(
        name="Dropout2d", function="dropout2d", what="a channel", shape="(N, C, H, W)", example="4, 10, 7, 7"
    )

    _function = staticmethod(dropout2d)


class Dropout3d(_Dropout, nn.Dropout3d):
    __doc__ = _MODULE_DOC.format(
        name="Dropout3d", function="dropout3d", what="a channel", shape="(N, C, D, H, W) or (C, D, H, W)",
        example="4, 10, 3, 7, 7",
    )  # fmt: skip

    _function = staticmethod(dropout3d)


class AlphaDropout(_Dropout, nn.AlphaDropout):
    __doc__ = _MODULE_DOC.format(
        name="AlphaDropout", function="alpha_dropout", what="an element", shape="any", example="4, 10"
    ).replace("zeroed", "set to alpha'")

    _function = staticmethod(alpha_dropout)


class FeatureAlphaDropout(_Dropout, nn.FeatureAlphaDropout):
    __doc__ = _MODULE_DOC.format(
        name="FeatureAlphaDropout",
        function="feature_alpha_dropout",
        what="a channel",
        shape="(N, C, *)",
        example="4, 10, 7, 7",
    ).replace("zeroed", "set to alpha'")

    _function = staticmethod(feature_alpha_dropout)


class DropPath(_Dropout):
    """Stochastic depth for a residual branch, see :func:`fastnorm.functional.drop_path`.

        x + drop_path(branch(x))

    Args:
        p: probability of a sample to be dropped, in [0, 1]. Huang et al. let it grow linearly with depth.
        inplace: write the result into the input.

    Raises:
        ValueError: p outside [0, 1], or NaN.

    Example:
        >>> fastnorm.DropPath(0.1)
        DropPath(p=0.1)
    """

    def __init__(self, p: float = 0.0, inplace: bool = False) -> None:
        super().__init__(p, inplace)

    _function = staticmethod(drop_path)

    def extra_repr(self) -> str:
        return f"p={self.p}" + (", inplace=True" if self.inplace else "")
