"""How large the terms are that each result of a normalisation is made of; rounding errors are some units of them.

With A = rstd * (|x| + mean|x|), the size of xhat before its difference cancels, and so on through the formulas: each
subtraction and each signed sum becomes a sum of magnitudes. All in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from reference import activation
from torch import Tensor

from .call import UNITS, Bounds


@dataclass
class Slices:
    """What is normalised together: x.view(shape) over `dims`; a parameter is seen as `parameters` there."""

    shape: tuple[int, ...]
    dims: tuple[int, ...]
    parameters: tuple[int, ...]


@dataclass
class Affine:
    """xhat * scale + shift before weight and bias; mean and rstd None for those of the slice; `size` of the terms that
    shift is the difference of."""

    mean: Tensor | None = None
    rstd: Tensor | None = None
    scale: Tensor | float = 1.0
    shift: Tensor | float = 0.0
    size: Tensor | float = 0.0


def norm_bounds(
    tensors: dict[str, Tensor],
    dy: Tensor,
    slices: Slices,
    act: str | None,
    eps: float,
    fixed: Affine,
    arithmetic: torch.dtype,
    subtracts_mean: bool = True,
) -> Bounds:
    x, dy = tensors["x"].reshape(slices.shape), dy.reshape(slices.shape)
    weight, bias = (tensors[n].view(slices.parameters) if n in tensors else None for n in ("weight", "bias"))
    w = torch.ones(()).double() if weight is None else weight.abs()
    own_statistics = fixed.rstd is None
    mean = fixed.mean if not own_statistics else x.mean(slices.dims, keepdim=True) if subtracts_mean else 0.0 * x
    centred = x - mean
    rstd = fixed.rstd if not own_statistics else (centred.square().mean(slices.dims, keepdim=True) + eps).rsqrt()
    scale, shift, size = (torch.as_tensor(t, dtype=torch.float64) for t in (fixed.scale, fixed.shift, fixed.size))

    subtracted = (
        0.0 if not subtracts_mean else abs(mean) if not own_statistics else x.abs().mean(slices.dims, keepdim=True)
    )
    A = rstd * (x.abs() + subtracted)
    normalized = A * scale.abs() + size
    z = (centred * rstd * scale + shift) * (1.0 if weight is None else weight)
    terms = w * normalized
    for name, t in (("bias", bias), ("residual", tensors.get("residual"))):
        if t is not None:
            z = z + (t if name == "bias" else t.reshape(slices.shape))
            terms = terms + (t.abs() if name == "bias" else t.reshape(slices.shape).abs())
    smooth = act in ("silu", "gelu")
    y = activation(z, act).abs()

    # |dy| times the derivative and its own error: the activation's second derivative is at most 1
    G = dy.abs() * (1.2 + (terms if smooth else 0.0))
    g = w * G
    if own_statistics:
        over = slices.dims
        drift = g.mean(over, keepdim=True) if subtracts_mean else 0.0
        dx = rstd * scale.abs() * (g + drift + (1 + A) * ((1 + A) * g).mean(over, keepdim=True))
    else:
        dx = rstd * scale.abs() * g
    others = [d for d, n in enumerate(slices.parameters) if n == 1]
    gradients = {
        "x": dx.reshape(tensors["x"].shape),
        "weight": (G * normalized).expand(slices.shape).sum(others),
        "bias": G.expand(slices.shape).sum(others),
        "residual": G.reshape(tensors["x"].shape),
    }
    doubtful = None
    if act in ("relu", "leaky_relu"):
        doubtful = (z.abs() <= UNITS[arithmetic] * torch.finfo(arithmetic).eps * terms).reshape(tensors["x"].shape)
    shaped = [gradients[n].reshape(t.shape) for n, t in tensors.items()]
    return Bounds((1.2 * terms + y).reshape(tensors["x"].shape), shaped, doubtful)


def named(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(names, tensors, strict=True))
