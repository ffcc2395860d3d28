"""The one table of ops and settings. test_ops.py runs every case through every property that all ops share."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import reference
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnorm.functional as fn
from fastnorm import _C
from fastnorm.autograd import SpectralNormFunction

ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "gelu")
TORCH_ACTIVATION = {None: lambda z: z, "relu": F.relu, "leaky_relu": F.leaky_relu, "silu": F.silu, "gelu": F.gelu}

# One element, primes, vector lengths and their neighbours, planes below and above the size that changes the path.
IMAGE_SHAPES = (
    (2, 1, 1, 1),
    (3, 5, 2, 3),
    (2, 3, 17, 31),
    (4, 67, 7, 7),
    (2, 16, 33, 32),
    (5, 130, 4, 4),
    (2, 2, 80, 70),
)


@dataclass(frozen=True)
class Case:
    """An op with one setting.

    `parameters(input)` makes the op's other differentiable tensors; every function takes (input, *parameters) in that
    order.
    """

    name: str
    op: str
    fastnorm: Callable[..., Tensor]
    reference: Callable[..., Tensor]  # float64 in and out
    torch: Callable[..., Tensor]  # torch's own ops, for comparison of errors
    parameters: Callable[[Tensor, torch.Generator], list[Tensor]] = lambda x, generator: []
    shapes: tuple[tuple[int, ...], ...] = IMAGE_SHAPES
    small: tuple[int, ...] = (3, 4, 3, 2)  # for gradcheck
    empty: tuple[tuple[int, ...], ...] = ((0, 3, 4, 4), (2, 3, 0, 4))
    # bytes kept for backward beside the input and the parameters, which are there anyway
    kept: Callable[[Tensor], int] = field(default=lambda x: 0)
    saves_input: bool = True
    saves: tuple[int, ...] | None = None  # which of the parameters may be kept; None: all
    # Allowance in units in the last place, beside torch's own error, for results whose exact value is near zero; exp
    # and erf add their own two to four.
    units: int = 4

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, mean: float = 1.0, std: float = 2.0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.name}{shape}".encode()))
        x = (torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean).to(dtype)
        return [x, *self.parameters(x, generator)]

    def __str__(self) -> str:
        return self.name


def channel_parameters(x: Tensor, generator: torch.Generator, residual: bool) -> list[Tensor]:
    """weight and bias of a channel each, and a residual if wanted."""
    C = x.shape[1]
    weight = torch.rand(C, generator=generator, dtype=torch.float64) + 0.5
    bias = torch.randn(C, generator=generator, dtype=torch.float64)
    extra = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)] if residual else []
    return [weight.to(x.dtype), bias.to(x.dtype), *extra]


def mask_bytes(x: Tensor) -> int:
    """One bit an element, rows padded to whole bytes: at most one more byte for each row of at least 16 elements."""
    return x.numel() // 8 + x.numel() // 16 + 64


# ---- batch_norm


def _batch_norm_case(training: bool, act: str | None, residual: bool) -> Case:
    def statistics(x: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if training:
            return None, None
        ramp = torch.linspace(0.5, 2.0, x.shape[1]).bfloat16()  # numbers that every type holds
        return ramp.to(x.dtype), ramp.flip(0).to(x.dtype)

    def run(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None = None) -> Tensor:
        return fn.batch_norm(x, *statistics(x), weight, bias, training, residual=z, activation=act)

    def run_torch(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None = None) -> Tensor:
        y = F.batch_norm(x, *statistics(x), weight, bias, training)
        return TORCH_ACTIVATION[act](y if z is None else y + z)

    def run_reference(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None = None) -> Tensor:
        given = None if training else statistics(x)
        return reference.batch_norm(x, weight, bias, z, statistics=given, act=act)

    bits = residual and act in ("relu", "leaky_relu")
    return Case(
        name=f"batch_norm-{'train' if training else 'eval'}{'-residual' if residual else ''}{f'-{act}' if act else ''}",
        op="batch_norm",
        fastnorm=run,
        reference=run_reference,
        torch=run_torch,
        parameters=partial(channel_parameters, residual=residual),
        shapes=(*IMAGE_SHAPES[1:], (7, 5), (300, 64), (6, 3, 19), (2, 3, 3, 5, 7)),
        kept=lambda x: 16 * x.shape[1] + (mask_bytes(x) if bits else 0),
        saves=(0, 1, 2) if act in ("silu", "gelu") else (0, 1),
        units=16 if act in ("silu", "gelu") else 4,
    )


# ---- batch_renorm


def _batch_renorm_case(act: str | None, residual: bool) -> Case:
    limits = {"r_max": 2.0, "d_max": 0.5}

    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        """Some channels within the limits, some beyond.

        Where gradients are compared with differences all are far beyond: r and d follow x only within.
        """
        C = x.shape[1]
        if x.shape == case.small:
            return torch.full((C,), 500.0, dtype=x.dtype), torch.full((C,), 4096.0, dtype=x.dtype)
        ramp = torch.linspace(0.5, 2.0, C).bfloat16()  # numbers that every type holds
        return ramp.to(x.dtype), ramp.flip(0).to(x.dtype)

    def run(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None = None) -> Tensor:
        return fn.batch_renorm(x, *statistics(x), weight, bias, True, **limits, residual=z, activation=act)

    def run_reference(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None = None) -> Tensor:
        return reference.batch_renorm(x, weight, bias, z, statistics=statistics(x), act=act, **limits)

    bits = residual and act in ("relu", "leaky_relu")
    case = Case(
        name=f"batch_renorm{'-residual' if residual else ''}{f'-{act}' if act else ''}",
        op="batch_renorm",
        fastnorm=run,
        reference=run_reference,
        torch=run_reference,  # torch has no such op: the formula in the input's own type
        parameters=partial(channel_parameters, residual=residual),
        shapes=(*IMAGE_SHAPES[1:], (7, 5), (300, 64), (6, 3, 19), (2, 3, 3, 5, 7)),
        kept=lambda x: 32 * x.shape[1] + (mask_bytes(x) if bits else 0),
        saves=(0, 1, 2) if act in ("silu", "gelu") else (0, 1),
        units=16,  # dbias is a sum of a thousand float32 terms that nearly cancel
    )
    return case


# ---- dropout


def _seed(seed: int) -> int:
    """The seed of the mask that a generator with this seed gives first."""
    return int(_C.dropout_state(torch.Generator().manual_seed(seed))[0]) & (2**64 - 1)


def _dropout_case(p: float, function: str = "dropout") -> Case:
    channel_dims = 0 if function == "dropout" else 2
    run = getattr(fn, function)
    return Case(
        name=f"{function}-{p}",
        op="dropout",
        fastnorm=lambda x: run(x, p, generator=torch.Generator().manual_seed(7)),
        reference=lambda x: reference.dropout(x, p, _seed(7), channel_dims=channel_dims),
        torch=lambda x: (
            x
            * (fn.dropout2d if channel_dims else fn.dropout)(
                torch.ones_like(x), p, generator=torch.Generator().manual_seed(7)
            )
        ),
        shapes=IMAGE_SHAPES if channel_dims else (*IMAGE_SHAPES, (1,), (1000,), (3, 1023), (2, 3, 5, 7, 11)),
        kept=lambda x: 16,
        saves_input=False,
    )


# ---- weight_norm and spectral_norm


def _weight_norm_case(dim: int | None) -> Case:
    def magnitude(v: Tensor, generator: torch.Generator) -> list[Tensor]:
        shape = [] if dim is None else [n if d == dim else 1 for d, n in enumerate(v.shape)]
        return [(torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5).to(v.dtype)]

    in_torch = -1 if dim is None else dim
    return Case(
        name=f"weight_norm-{dim}",
        op="weight_norm",
        fastnorm=lambda v, g: _C.weight_norm(v, g, in_torch),
        reference=lambda v, g: reference.weight_norm(v, g, dim),
        torch=lambda v, g: torch._weight_norm(v, g, in_torch),
        parameters=magnitude,
        # a slice of one element has the exact gradient 0, to which no error is relative
        shapes=(*IMAGE_SHAPES[1:], *(((7, 5), (300, 64), (6, 3, 19), (2, 3, 3, 5, 7)) if dim != 3 else ())),
        kept=lambda v: 8 * (1 if dim is None else v.shape[dim]),
    )


def _spectral_norm_case(dim: int) -> Case:
    @cache
    def directions(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The first singular vectors of the case's own weight of this shape, rounded to what every type holds."""
        if 0 in shape:
            return torch.zeros(shape[dim]), torch.zeros(math.prod(shape) // max(1, shape[dim]))
        matrix = reference.as_matrix(case.inputs(shape, torch.float64)[0], dim)
        return tuple(t.bfloat16() for t in reference.power_method(matrix, torch.ones_like(matrix[0]), 20))

    def vectors(x: Tensor) -> tuple[Tensor, Tensor]:
        u, v = directions(tuple(x.shape))
        return u.to(x.dtype), v.to(x.dtype)

    def run_torch(x: Tensor) -> Tensor:
        u, v = vectors(x)
        return x / torch.vdot(u, torch.mv(x.movedim(dim, 0).flatten(1), v))

    case = Case(
        name=f"spectral_norm-{dim}",
        op="spectral_norm",
        fastnorm=lambda x: SpectralNormFunction.apply(x, *vectors(x), 0, dim, 1e-12),
        reference=lambda x: reference.spectral_norm(x, *vectors(x), dim),
        torch=run_torch,
        shapes=(*IMAGE_SHAPES, *(((7, 5), (300, 64), (6, 3, 19), (2, 3, 3, 5, 7)) if dim != 3 else ())),
        kept=lambda x: (8 if x.dtype == torch.float64 else 4) * (x.shape[dim] + x.numel() // x.shape[dim]) + 8,
    )
    return case


CASES: tuple[Case, ...] = (
    *(
        _batch_norm_case(training, act, residual)
        for training in (True, False)
        for act in ACTIVATIONS
        for residual in (False, True)
    ),
    *(_batch_renorm_case(act, residual) for act in (None, "relu", "gelu") for residual in (False, True)),
    *(_dropout_case(p) for p in (0.001, 0.5, 1.0)),
    _dropout_case(0.3, "dropout2d"),
    *(_spectral_norm_case(dim) for dim in (0, 1, 3)),
    *(_weight_norm_case(dim) for dim in (0, 1, 3, None)),
)
