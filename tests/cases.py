"""The one table of ops and settings. test_ops.py runs every case through every property that all ops share."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import reference
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnorm.functional as fn
from fastnorm import _C
from fastnorm.autograd import SpectralNormFunction
from fastnorm.build import devices
from fastnorm.norm import kept_of

ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "gelu")
TORCH_ACTIVATION = {None: lambda z: z, "relu": F.relu, "leaky_relu": F.leaky_relu, "silu": F.silu, "gelu": F.gelu}

# Tests hold the library to torch's own error where vectors are widest. Shorter ones make longer chains of additions of
# the same sum, and plain x86-64 rounds twice where the others multiply and add at once: there, results near torch's
# error may exceed it, by up to this factor.
SLACK = 1.0 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 2.0

# Where the table runs: on the CPU, and on a CUDA device if there is one and the build has kernels for it.
DEVICES = tuple(dict.fromkeys(device.type for device in devices()))


@cache
def ramps(C: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Statistics of C channels, of numbers that every type holds; made on the CPU, for every device alike.

    Not to be written, and made once, so that nothing is copied to a device while a graph is captured there.
    """
    ramp = torch.linspace(0.5, 2.0, C).bfloat16()
    return ramp.to(device, dtype), ramp.flip(0).to(device, dtype)


# One element, primes, vector lengths and their neighbours, planes below and above the size that changes the path.
IMAGE_SHAPES = (
    (2, 1, 1, 1),
    (3, 5, 2, 3),
    (2, 3, 17, 31),
    (4, 67, 7, 7),
    (2, 16, 33, 32),
    (5, 130, 4, 4),
    (2, 2, 80, 70),
    (1, 3, 47, 53),
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
    keeps_layout: bool = True  # the output lies as the input does; else it is contiguous
    differentiable_twice: bool = True
    subtracts_mean: bool = True  # so that its errors do not grow with |mean| / std
    # Allowance in units in the last place, beside torch's own error, for results whose exact value is near zero; exp
    # and erf add their own two to four.
    units: int = 4

    def inputs(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", mean: float = 1.0, std: float = 2.0
    ) -> list[Tensor]:
        """The same numbers on every device."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.name}{shape}".encode()))
        x = (torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean).to(dtype)
        return [t.to(device) for t in (x, *self.parameters(x, generator))]

    def __str__(self) -> str:
        return self.name


def channel_parameters(x: Tensor, generator: torch.Generator, residual: bool) -> list[Tensor]:
    """weight and bias of a channel each, and a residual if wanted."""
    C = x.shape[1]
    weight = torch.rand(C, generator=generator, dtype=torch.float64) + 0.5
    bias = torch.randn(C, generator=generator, dtype=torch.float64)
    extra = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)] if residual else []
    return [weight.to(x.dtype), bias.to(x.dtype), *extra]


def _saved(act: str | None, bias: bool = True) -> tuple[int, ...]:
    """Which of weight, bias and residual backward needs: the weight, and for an activation's slope the others."""
    if act is None:
        return (0,)
    return tuple(range(1 + bias + (act in ("silu", "gelu"))))


def mask_bytes(x: Tensor) -> int:
    """One bit an element, rows padded to whole bytes: at most one more byte for each row of at least 16 elements."""
    return x.numel() // 8 + x.numel() // 16 + 64


# ---- batch_norm


def _batch_norm_case(training: bool, act: str | None, residual: bool) -> Case:
    def statistics(x: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        return (None, None) if training else ramps(x.shape[1], x.dtype, x.device)

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
        saves=_saved(act),
        units=16 if act in ("silu", "gelu") else 4,
    )


class _FourSteps(torch.autograd.Function):
    """batch_norm as SyncBatchNorm takes it, of one process: its statistics and sums leave the kernels in between."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, act: str | None
    ) -> Tensor:
        mean, var = _C.batch_norm_statistics(x)
        statistics = torch.stack([mean, (var + eps).rsqrt()])
        y, mask = _C.batch_norm_normalize(x, weight, bias, residual, statistics, act, True)
        ctx.save_for_backward(x, weight, *kept_of(weight, bias, residual, act), mask, statistics)
        ctx.act = act
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *_ = operands = ctx.saved_tensors
        sums = _C.batch_norm_backward_reduce(dy, *operands, ctx.act)
        count, wanted = x.numel() / x.shape[1], (ctx.needs_input_grad[0], ctx.needs_input_grad[3])
        dx, dresidual = _C.batch_norm_backward_elements(dy, *operands, sums, count, ctx.act, wanted)
        dbias, dweight = sums.to(x.dtype)
        return dx, dweight, dbias, dresidual, None, None


def _in_four_steps(case: Case, act: str | None) -> Case:
    def run(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None = None) -> Tensor:
        return _FourSteps.apply(x, weight, bias, z, 1e-5, act)

    return replace(case, name=f"sync_{case.name}", fastnorm=run, differentiable_twice=False)


# ---- batch_renorm


def _batch_renorm_case(act: str | None, residual: bool) -> Case:
    limits = {"r_max": 2.0, "d_max": 0.4}

    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        """Some channels within the limits, some beyond.

        Where gradients are compared with differences all are far beyond: r and d follow x only within.
        """
        C = x.shape[1]
        if x.shape == case.small:
            return x.new_full((C,), 500.0), x.new_full((C,), 4096.0)
        mean, var = (t.clone() for t in ramps(C, x.dtype, x.device))
        var[1::2] *= 16  # r near 1 / r_max, elsewhere near r_max
        return mean, var

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
        saves=_saved(act),
        units=16,  # dbias is a sum of a thousand float32 terms that nearly cancel
    )
    return case


# ---- group_norm and instance_norm

# (N, C) alone, tiny and long planes, one slice as long as some chunks.
GROUP_SHAPES = (*IMAGE_SHAPES[1:], (7, 6), (300, 64), (6, 3, 19), (2, 3, 3, 5, 7), (2, 12, 300, 3), (1, 2, 2, 5000))


def _middle(channels: int) -> int:
    """The largest number of groups that is no larger than the groups."""
    return max(g for g in range(1, channels + 1) if channels % g == 0 and g * g <= channels)


GROUPS = {"one": lambda channels: 1, "some": _middle, "all": lambda channels: channels}


def _group_norm_case(groups: str, act: str | None, residual: bool) -> Case:
    def run(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None = None) -> Tensor:
        return fn.group_norm(x, GROUPS[groups](x.shape[1]), weight, bias, residual=z, activation=act)

    def run_torch(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None = None) -> Tensor:
        y = F.group_norm(x, GROUPS[groups](x.shape[1]), weight, bias)
        return TORCH_ACTIVATION[act](y if z is None else y + z)

    def run_reference(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None = None) -> Tensor:
        return reference.group_norm(x, GROUPS[groups](x.shape[1]), weight, bias, z, act=act)

    bits = residual and act in ("relu", "leaky_relu")
    return Case(
        name=f"group_norm-{groups}{'-residual' if residual else ''}{f'-{act}' if act else ''}",
        op="group_norm",
        fastnorm=run,
        reference=run_reference,
        torch=run_torch,
        parameters=partial(channel_parameters, residual=residual),
        # a slice of one element has nothing but rounding errors for a gradient
        shapes=tuple(s for s in GROUP_SHAPES if len(s) > 2 or groups != "all"),
        kept=lambda x: 16 * x.shape[0] * GROUPS[groups](x.shape[1]) + (mask_bytes(x) if bits else 0),
        saves=_saved(act),
        units=16 if act in ("silu", "gelu") else 8,  # sums of thousands of terms that cancel
    )


def _instance_norm_case(input_stats: bool, act: str | None, residual: bool) -> Case:
    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = ramps(x.shape[1], x.dtype, x.device)
        return mean.clone(), var.clone()

    def run(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None = None) -> Tensor:
        return fn.instance_norm(x, *statistics(x), weight, bias, input_stats, residual=z, activation=act)

    def run_torch(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None = None) -> Tensor:
        y = F.instance_norm(x, *statistics(x), weight, bias, input_stats)
        return TORCH_ACTIVATION[act](y if z is None else y + z)

    def run_reference(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None = None) -> Tensor:
        if input_stats:
            return reference.group_norm(x, x.shape[1], weight, bias, z, act=act)
        return reference.batch_norm(x, weight, bias, z, statistics=statistics(x), act=act)

    source = "input" if input_stats else "running"
    bits = residual and act in ("relu", "leaky_relu")
    return Case(
        name=f"instance_norm-{source}{'-residual' if residual else ''}{f'-{act}' if act else ''}",
        op="instance_norm",
        fastnorm=run,
        reference=run_reference,
        torch=run_torch,
        parameters=partial(channel_parameters, residual=residual),
        shapes=tuple(s for s in GROUP_SHAPES if len(s) > 2) if input_stats else IMAGE_SHAPES,
        kept=lambda x: 16 * x.shape[1] * (x.shape[0] if input_stats else 1) + (mask_bytes(x) if bits else 0),
        saves=_saved(act),
        units=16 if act in ("silu", "gelu") else 8,  # sums of thousands of terms that cancel
    )


# ---- dropout


def _seed(seed: int) -> int:
    """The seed of the mask that a generator with this seed gives first."""
    return int(_C.dropout_state(torch.Generator().manual_seed(seed), torch.empty(0))[0]) & (2**64 - 1)


_DRAWN_DIMS = {"dropout": 0, "dropout2d": 2, "alpha_dropout": 0, "feature_alpha_dropout": 2, "drop_path": 1}


def _dropout_case(p: float, function: str = "dropout") -> Case:
    channel_dims = _DRAWN_DIMS[function]
    wanted = reference.alpha_dropout if "alpha" in function else reference.dropout

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(7)

    def run_torch(x: Tensor) -> Tensor:
        # the reference's mask: with the library's own, a wrong one would excuse itself
        ones = torch.ones_like(x, device="cpu")
        factor = reference.dropout(ones, p, _seed(7), channel_dims=channel_dims).to(x.device)
        if "alpha" not in function or p == 1:
            return x * factor
        return torch_alpha_dropout(x, factor != 0, p)

    return Case(
        name=f"{function}-{p}",
        op=function.replace("feature_", "").replace("2d", ""),
        fastnorm=lambda x: getattr(fn, function)(x, p, True, generator=generator()),
        reference=lambda x: wanted(x, p, _seed(7), channel_dims=channel_dims),
        torch=run_torch,
        shapes=IMAGE_SHAPES if channel_dims == 2 else (*IMAGE_SHAPES, (1,), (1000,), (3, 1023), (2, 3, 5, 7, 11)),
        kept=lambda x: 16,
        saves_input=False,
    )


def torch_alpha_dropout(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """The operations of torch's own alpha dropout, in its order, with a given mask."""
    alpha = 1.7580993408473766
    a = 1 / ((alpha**2 * p + 1) * (1 - p)) ** 0.5
    noise = keep.to(x.dtype)
    return x * (noise * a) + ((noise - 1) * (alpha * a) + alpha * a * p)


# ---- layer_norm and rms_norm

# Rows below, at and above a vector's length, a group of rows, a chunk of a row; few and many of them.
ROW_SHAPES = (
    (1, 6),
    (7, 3, 5),
    (5, 3, 1023),
    (2, 5, 17, 31),
    (131, 64),
    (67, 33, 32),
    (70, 1025),
    (3, 4097),
    (66, 2, 2500),
)


def _row_parameters(x: Tensor, generator: torch.Generator, dims: int, bias: bool, residual: bool) -> list[Tensor]:
    """weight, and bias and residual if wanted."""
    shape = x.shape[x.dim() - dims :]
    made = [torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5]
    if bias:
        made.append(torch.randn(shape, generator=generator, dtype=torch.float64))
    if residual:
        made.append(torch.randn(x.shape, generator=generator, dtype=torch.float64))
    return [t.to(x.dtype) for t in made]


def _row_norm_case(op: str, act: str | None, residual: bool, leading: int | None = None) -> Case:
    """Over the last dimension, or over all but the `leading` first ones."""
    layer = op == "layer_norm"
    norm, torch_norm = (fn.layer_norm, F.layer_norm) if layer else (fn.rms_norm, F.rms_norm)

    def dims(x: Tensor) -> int:
        return 1 if leading is None else x.dim() - leading

    def arguments(x: Tensor, tensors: tuple[Tensor, ...]) -> tuple[tuple, Tensor | None]:
        """What the functions take by position, and the residual."""
        shape = x.shape[x.dim() - dims(x) :]
        return (x, shape, *tensors[: 1 + layer], 1e-5), tensors[-1] if residual else None

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        positional, z = arguments(x, tensors)
        return norm(*positional, residual=z, activation=act)

    def run_torch(x: Tensor, *tensors: Tensor) -> Tensor:
        positional, z = arguments(x, tensors)
        y = torch_norm(*positional)
        return TORCH_ACTIVATION[act](y if z is None else y + z)

    def run_reference(x: Tensor, weight: Tensor, *tensors: Tensor) -> Tensor:
        bias, z = tensors[0] if layer else None, tensors[-1] if residual else None
        return reference.row_norm(x, dims(x), weight, bias, z, subtract_mean=layer, act=act)

    bits = residual and act in ("relu", "leaky_relu")
    where = "" if leading is None else f"-but-{leading}"
    return Case(
        name=f"{op}{where}{'-residual' if residual else ''}{f'-{act}' if act else ''}",
        op=op,
        fastnorm=run,
        reference=run_reference,
        torch=run_torch,
        parameters=partial(_row_parameters, dims=1, bias=layer, residual=residual)
        if leading is None
        else lambda x, generator: _row_parameters(x, generator, x.dim() - leading, layer, residual),
        shapes=ROW_SHAPES,
        empty=((0, 3, 4), (2, 3, 0)),
        kept=lambda x: (
            (12 if layer else 4) * (x.numel() // math.prod(x.shape[x.dim() - dims(x) :]))
            + (mask_bytes(x) if bits else 0)
        ),
        keeps_layout=False,
        saves=_saved(act, bias=layer),
        units=8 if act in ("silu", "gelu") else 4,
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
        units=16 if dim is None else 4,  # one sum over the whole weight, of terms that nearly cancel
    )


def _spectral_norm_case(dim: int) -> Case:
    @cache
    def directions(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first singular vectors of the case's own weight of this shape, rounded to what every type holds."""
        if 0 in shape:
            lengths = shape[dim], math.prod(shape) // max(1, shape[dim])
            return tuple(torch.zeros(n, dtype=dtype, device=device) for n in lengths)
        matrix = reference.as_matrix(case.inputs(shape, torch.float64)[0], dim)
        found = reference.power_method(matrix, torch.ones_like(matrix[0]), 20)
        return tuple(t.bfloat16().to(device, dtype) for t in found)

    def vectors(x: Tensor) -> tuple[Tensor, Tensor]:
        return directions(tuple(x.shape), x.dtype, x.device)

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


# ---- local_response_norm


def _torch_local_response_norm(x: Tensor, size: int, *setting: float, region: str, convention: str) -> Tensor:
    """torch's own op has the windows along the channels, divided by their size; the rest is put together.

    From a float32 copy of bfloat16 and float16, for which torch has no kernel.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    if region == "inter" and convention == "torch":
        return F.local_response_norm(wide, size, *setting).to(x.dtype)
    alpha, beta, k = setting
    axes = 1 if region == "inter" else 2
    planes = wide.flatten(2).unsqueeze(1) if region == "inter" else wide.flatten(0, 1).unsqueeze(1)
    before, after = size // 2, (size - 1) // 2 if convention == "torch" else size // 2
    taps = before + 1 + after
    along = (before, after) if region == "intra" else (0, 0)
    squares = F.pad(planes**2, (*along, before, after))
    mean = F.avg_pool2d(squares, (taps, taps if region == "intra" else 1), stride=1).view(x.shape)
    scale = mean * (alpha if convention == "torch" else alpha * taps**axes) + k
    return (wide / scale**beta).to(x.dtype)


def _local_response_norm_case(
    size: int, alpha: float, beta: float, k: float, region: str = "inter", convention: str = "torch"
) -> Case:
    def bind(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: function(x, size, alpha, beta, k, region=region, convention=convention)

    # a window of more than 20 x 20 elements takes torch, which is the measure, too long in larger planes
    large = ((1, 2, 270, 250), (1, 33, 5, 300)) if size <= 20 else ()
    more = ((6, 3, 19), (2, 70, 300), (2, 3, 3, 5, 7)) if region == "inter" else large
    return Case(
        name=f"local_response_norm-{region}-{convention}-size{size}-beta{beta}",
        op="local_response_norm",
        fastnorm=bind(fn.local_response_norm),
        reference=bind(reference.local_response_norm),
        torch=bind(_torch_local_response_norm),
        shapes=(*IMAGE_SHAPES, *more),
        subtracts_mean=False,
    )


CASES: tuple[Case, ...] = (
    *(
        _batch_norm_case(training, act, residual)
        for training in (True, False)
        for act in ACTIVATIONS
        for residual in (False, True)
    ),
    _in_four_steps(_batch_norm_case(True, None, False), None),
    _in_four_steps(_batch_norm_case(True, "relu", True), "relu"),
    _in_four_steps(_batch_norm_case(True, "gelu", True), "gelu"),
    *(
        _row_norm_case(op, act, residual)
        for op in ("layer_norm", "rms_norm")
        for act in ACTIVATIONS
        for residual in (False, True)
    ),
    _row_norm_case("layer_norm", None, False, leading=1),
    _row_norm_case("layer_norm", "leaky_relu", True, leading=1),
    _row_norm_case("rms_norm", "gelu", True, leading=1),
    _row_norm_case("layer_norm", None, False, leading=0),
    *(_group_norm_case("some", act, residual) for act in ACTIVATIONS for residual in (False, True)),
    _group_norm_case("one", None, False),
    _group_norm_case("all", "relu", True),
    _instance_norm_case(True, None, False),
    _instance_norm_case(True, "gelu", True),
    _instance_norm_case(False, "relu", False),
    *(_dropout_case(p) for p in (0.001, 0.5, 1.0)),
    _dropout_case(0.3, "dropout2d"),
    *(_dropout_case(p, "alpha_dropout") for p in (0.001, 0.5, 1.0)),
    _dropout_case(0.3, "feature_alpha_dropout"),
    *(_dropout_case(p, "drop_path") for p in (0.25, 0.5)),
    *(_batch_renorm_case(act, residual) for act in (None, "relu", "gelu") for residual in (False, True)),
    *(_spectral_norm_case(dim) for dim in (0, 1, 3)),
    *(_weight_norm_case(dim) for dim in (0, 1, 3, None)),
    _local_response_norm_case(1, 0.5, 0.75, 1.0),
    _local_response_norm_case(5, 1e-4, 0.75, 1.0),
    _local_response_norm_case(4, 0.5, 0.75, 2.0),
    _local_response_norm_case(4, 0.3, 1.0, 0.5, convention="paper"),
    _local_response_norm_case(13, 0.8, 0.5, 1.0),
    _local_response_norm_case(1000, 0.8, 0.75, 1.0),
    _local_response_norm_case(3, 0.7, -1.3, 1.0),
    _local_response_norm_case(3, 0.7, 0.0, 1.0),
    _local_response_norm_case(3, 0.6, 0.75, 1.0, region="intra"),
    _local_response_norm_case(2, 0.6, 1.0, 1.0, region="intra"),
    _local_response_norm_case(4, 0.2, 0.5, 1.0, region="intra", convention="paper"),
    _local_response_norm_case(11, 0.9, 0.75, 1.0, region="intra"),
    _local_response_norm_case(100, 0.1, 1.3, 1.0, region="intra", convention="paper"),
)
