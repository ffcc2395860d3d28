"""Calls of the ops without parameters: local response normalisation and the dropouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import reference
import torch
from cases import _seed as mask_seed
from hypothesis import strategies as st
from torch import Tensor

import fastnorm.functional as fn

from .call import Bounds, Call
from .tensors import Numbers, choice, dtypes, scales, seeds, shapes, strides, yes_or_no


def _call(
    draw: st.DrawFn,
    name: str,
    ranks: tuple[int, int],
    run: Callable[[Tensor], Tensor],
    exact: Callable[[Tensor], Tensor],
    bounds: Callable[[Tensor, Tensor], Bounds],
    scale: tuple[float, float] | None = None,
) -> Call:
    shape, dtype, numbers = draw(shapes(ranks)), draw(dtypes), Numbers(draw(seeds))
    x = draw(strides(len(shape))).lay(numbers.normal(shape, dtype, scale or draw(scales)))
    return Call(
        setting=f"{name}: shape={list(shape)}, strides={list(x.stride())}, {dtype}",
        run=run,
        reference=exact,
        bounds=lambda tensors, dy: bounds(tensors[0], dy),
        tensors={"x": x},
        wanted=["x"] if draw(yes_or_no) else [],
        dy=numbers.normal(shape, dtype),
        dy_strides=draw(strides(len(shape))),
    )


@st.composite
def local_response_norm(draw: st.DrawFn) -> Call:
    region, convention = draw(choice("inter", "intra")), draw(choice("torch", "paper"))
    size = draw(choice(1, 2, 3, 4, 5, 6, 7, 9, 11, 16, 24, 40, 200))
    alpha, beta, k = (
        draw(choice(*values))
        for values in ((1e-4, 0.5, 0.0, 2.0), (0.75, 0.5, 1.0, 1.3, 0.0, -0.6), (1.0, 2.0, 0.5, 1e-2))
    )
    window: dict[str, Any] = {"region": region, "convention": convention}

    def exact(x: Tensor) -> Tensor:
        return reference.local_response_norm(x, size, alpha, beta, k, **window)

    def bounds(x: Tensor, dy: Tensor) -> Bounds:
        """Relative in y; in dx the second term is a sum of products of any sign, here of one."""
        magnitude = x.abs().clamp_min(1e-150).requires_grad_()
        y = exact(magnitude)
        (signed,) = torch.autograd.grad(y, magnitude, dy.abs())
        first = dy.abs() * (y / magnitude).detach()
        growth = 1 + abs(beta)
        return Bounds(growth * y.detach(), [growth * (2 * first + (first - signed).abs())])

    return _call(
        draw,
        f"local_response_norm({size}, {alpha}, {beta}, {k}, {region}, {convention})",
        (3, 5) if region == "inter" else (4, 4),
        lambda x: fn.local_response_norm(x, size, alpha, beta, k, **window),
        exact,
        bounds,
    )


# name: the ranks it takes, and how many leading dimensions have a draw of their own, None for every element
DROPOUTS: dict[str, tuple[tuple[int, int], Callable[[Tensor], int]]] = {
    "dropout": ((1, 5), lambda x: 0),
    "dropout1d": ((2, 3), lambda x: x.dim() - 1),
    "dropout2d": ((4, 4), lambda x: 2),
    "dropout3d": ((4, 5), lambda x: x.dim() - 3),
    "alpha_dropout": ((1, 5), lambda x: 0),
    "feature_alpha_dropout": ((2, 5), lambda x: 2),
    "drop_path": ((1, 5), lambda x: 1),
}


@st.composite
def dropouts(draw: st.DrawFn) -> Call:
    op = draw(choice(*DROPOUTS))
    p = draw(choice(0.5, 0.1, 1e-4, 0.999, 1.0))
    seed = draw(seeds)
    ranks, channel_dims = DROPOUTS[op]
    wanted = reference.alpha_dropout if "alpha" in op else reference.dropout

    def bounds(x: Tensor, dy: Tensor) -> Bounds:
        """x * scale, and for alpha dropout scale * x + shift: neither scale is above 1 / (1 - p) of what is kept."""
        largest = 65536 / max(1, 65536 - round(min(p, 65535 / 65536) * 65536)) if p < 1 else 1.0
        return Bounds(largest * (x.abs() + ("alpha" in op) * 2.0), [largest * dy.abs()])

    return _call(
        draw,
        f"{op}({p})",
        ranks,
        lambda x: getattr(fn, op)(x, p, True, generator=torch.Generator().manual_seed(seed)),
        lambda x: wanted(x, p, mask_seed(seed), channel_dims=channel_dims(x)),
        bounds,
    )
