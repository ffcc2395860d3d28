"""The normalisations under forward-mode automatic differentiation and torch.func.

:class:`fastnorm.norm.NormFunction` is one kernel from input to activation, but keeps for backward what these transforms
would have to see. Here the kernels only normalise, and scale, shift, residual and activation are torch's ops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastnorm.transforms import first, is_batch_of_gradients, pull_back, refuse_nested_forward_mode

if TYPE_CHECKING:
    from fastnorm.norm import NormFunction, Setting


class NormalizeFunction(torch.autograd.Function):
    """(input, norm, setting) -> xhat and the statistics: what a norm computes before scale, shift and activation.

    The Jacobian J of xhat is symmetric, rstd * (I - 1 1^T / n - xhat xhat^T / n) within a slice of n elements, so the
    norm's native backward is forward mode's kernel as well.
    """

    @staticmethod
    def forward(input: Tensor, norm: type[NormFunction], setting: Setting) -> tuple[Tensor, Tensor]:
        xhat, statistics, _ = norm.native_forward(input, None, None, None, *setting, True)
        return xhat, statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, ctx.norm, setting = inputs
        _, statistics = output
        ctx.setting = (None,) * ctx.norm.tracked + tuple(setting[ctx.norm.tracked :])
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(input, statistics)
        ctx.save_for_forward(input, statistics)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        input, statistics = ctx.saved_tensors
        return _jacobian_times(dy, input, statistics, ctx.norm, ctx.setting), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> tuple[Tensor, None]:
        input, statistics = ctx.saved_tensors
        return _jacobian_times(dx, input, statistics, ctx.norm, ctx.setting), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], input: Tensor, norm: type[NormFunction], setting: Setting
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        dim, _, setting_dims = in_dims
        x = first(input, dim, info.batch_size)
        if norm.updates(setting) and any(t is not None for t in setting[: norm.tracked]):
            return _update_each(info.batch_size, x, norm, setting, setting_dims)
        tracked = [
            None if t is None else first(t, d, info.batch_size).flatten()
            for t, d in zip(setting[: norm.tracked], setting_dims, strict=False)
        ]
        own = norm.folded_setting(setting, info.batch_size)[norm.tracked :]
        xhat, statistics = NormalizeFunction.apply(_fold(norm, x), norm, (*tracked, *own))
        statistics = statistics.unflatten(-1, (info.batch_size, -1))
        xhat, out_dim = _unfold(norm, xhat, info.batch_size)
        return (xhat, statistics), (out_dim, statistics.dim() - 2)


_OF_INPUT = (True, False, False, False)


def _jacobian_times(v: Tensor, input: Tensor, statistics: Tensor, norm: type[NormFunction], setting: Setting) -> Tensor:
    if is_batch_of_gradients(v):
        return norm.op_gradients(setting, _OF_INPUT, v, input, None, None, None, None, statistics)[0]
    return NormalizeJacobianFunction.apply(v, input, statistics, norm, setting)


class NormalizeJacobianFunction(torch.autograd.Function):
    """J v of :class:`NormalizeFunction`, by the native backward."""

    @staticmethod
    def forward(v: Tensor, input: Tensor, statistics: Tensor, norm: type[NormFunction], setting: Setting) -> Tensor:
        return norm.native_gradients(setting, _OF_INPUT, v, input, None, None, None, None, statistics)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        v, input, statistics, ctx.norm, ctx.setting = inputs
        ctx.save_for_backward(v, input, statistics)
        ctx.save_for_forward(v, input, statistics)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        _, input, statistics = ctx.saved_tensors
        dv = _jacobian_times(g, input, statistics, ctx.norm, ctx.setting)
        return dv, _curvature(ctx, g), None, None, None

    @staticmethod
    def jvp(ctx: Any, dv: Tensor | None, dx: Tensor | None, *_: None) -> Tensor:
        refuse_nested_forward_mode()
        _, input, statistics = ctx.saved_tensors
        along_v = None if dv is None else _jacobian_times(dv, input, statistics, ctx.norm, ctx.setting)
        along_x = None if dx is None else _curvature(ctx, dx)
        if along_v is None or along_x is None:
            return along_x if along_v is None else along_v
        return along_v + along_x

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        *tensors, norm, setting = args
        v, input, statistics = (first(t, d, info.batch_size) for t, d in zip(tensors, in_dims, strict=False))
        setting = norm.folded_setting(setting, info.batch_size)
        folded = _fold(norm, v), _fold(norm, input), statistics.movedim(0, -2).flatten(-2).contiguous()
        return _unfold(norm, NormalizeJacobianFunction.apply(*folded, norm, setting), info.batch_size)


def _curvature(ctx: Any, direction: Tensor) -> Tensor:
    """The gradient of <direction, J(x) v> with respect to x, in torch's ops.

    It serves both modes: J v is the gradient of <v, xhat(x)>, and that function's Hessian is symmetric.
    """
    v, input, statistics = ctx.saved_tensors

    def gradient(x: Tensor) -> Tensor:
        return pull_back(lambda t: ctx.norm.composite(t, None, None, statistics, ctx.setting), (x,), v)[0]

    return pull_back(gradient, (input,), direction)[0]


def _fold(norm: type[NormFunction], t: Tensor) -> Tensor:
    """(B, *) as an input whose slices are those of all B inputs."""
    return t.movedim(0, 1).flatten(1, 2) if norm.folds_into_channels else t


def _unfold(norm: type[NormFunction], t: Tensor, batch_size: int) -> tuple[Tensor, int]:
    """What came of it, and where the batch's dimension is."""
    return (t.unflatten(1, (batch_size, -1)), 1) if norm.folds_into_channels else (t, 0)


def _update_each(
    batch_size: int, x: Tensor, norm: type[NormFunction], setting: Setting, dims: tuple[int | None, ...]
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """One call for each element of the batch, with running statistics of its own."""
    tracked = list(zip(setting[: norm.tracked], dims, strict=False))
    if any(t is not None and d is None for t, d in tracked):
        raise RuntimeError(
            f"{norm.op}: running statistics that all elements of vmap's batch share cannot be updated by each; use "
            "none, or stack one for each element"
        )
    results = []
    for i in range(batch_size):
        own = [None if t is None else t.select(d, i) for t, d in tracked]
        results.append(NormalizeFunction.apply(x[i], norm, (*own, *setting[norm.tracked :])))
    xhats, statistics = zip(*results, strict=True)
    return (torch.stack(xhats), torch.stack(statistics)), (0, 0)
