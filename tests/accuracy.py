"""How exact each op is on hard inputs, beside torch's own: ``python tests/accuracy.py [--all]``.

An error is the largest difference from the float64 reference over the largest magnitude of the reference, in units of
the type (its eps), and the largest of DRAWS inputs: rounding the exact result gives up to half a unit. A result is
worse than torch's if its error exceeds both torch's and SLACK units; it is infinitely wrong where it is not finite but
the reference is, or where NaNs and infinities are neither as in the reference nor as torch has them. Exit status 1 if
any result is worse.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from cases import CASES, Case
from torch import Tensor

SHAPE = (6, 12, 9, 11)
LARGE = ((16, 16, 28, 28), (64, 16, 7, 7))  # planes of long sums, and many short ones
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# In float32 the arithmetic's own roundings show: (x - mean) * rstd * weight + bias has four, of half a unit each, and a
# sum of hundreds of terms for a parameter's gradient one unit more.
SLACK = 3.0
DRAWS = 3

Input = Callable[[Tensor], Tensor]  # of standard normal numbers in float64


def _with(x: Tensor, *values: float) -> Tensor:
    """The values at places of their own, the first in the first sample and channel."""
    x = x.clone()
    for i, value in enumerate(values):
        x.view(-1)[5 + i * (x.numel() // len(values))] = value
    return x


INPUTS: dict[str, Input] = {
    **{f"mean / std {ratio:.0e}": lambda x, ratio=ratio: x + ratio for ratio in (1e3, 1e4, 1e5, 1e6)},
    **{f"scale {scale:.0e}": lambda x, scale=scale: x * scale for scale in (1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30)},
    "constant": lambda x: torch.full_like(x, 1.1),
    "large constant": lambda x: torch.full_like(x, 12345.678),
    "zeros": torch.zeros_like,
    "denormals": lambda x: x * 1e-40,
    "float16's denormals": lambda x: x * 1e-6,
    "one outlier of 1e4": lambda x: _with(x, 1e4),
    "one outlier of 1e30": lambda x: _with(x, 1e30),
    "a NaN": lambda x: _with(x, math.nan),
    "an infinity": lambda x: _with(x, math.inf),
    "both infinities": lambda x: _with(x, math.inf, -math.inf),
    "both infinities in a channel": lambda x: torch.cat(
        [_with(x.view(-1)[:64], math.inf, -math.inf), x.view(-1)[64:]]
    ).view(x.shape),
}

# Numbers much alike, of which a long sum in float32 is rounded the same way again and again, and sorted ones, whose
# first elements are far from the others' mean. Of LARGE shapes, in both layouts.
ALIKE: dict[str, Input] = {
    "few ones": lambda x: (x > 2.3) * 1.2345,
    "zeros and ones": lambda x: (x > 0) * 1.2345,
    "a fourth's levels": lambda x: (x * 4).round() / 4 + 0.1,
    "planes of one number": lambda x: (x.mean((2, 3), keepdim=True) > 0).expand(x.shape) * 1.2345,
    "few zeros, then ones": lambda x: torch.arange(x.numel()).view(x.shape).ge(x.numel() // 16) * 1.2345,
    "sorted": lambda x: x.flatten().sort().values.view(x.shape),
    "sorted planes": lambda x: x.flatten(2).sort(-1).values.view(x.shape),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# No random masks, whose op is one multiplication, and no activations, whose derivatives jump where z is 0. No
# weight_norm of a whole tensor: its magnitude's gradient is one number, and as often as not nearly zero, so that the
# error relative to it is chance.
NAMES = (
    "batch_norm-train", "batch_norm-train-residual", "batch_norm-eval", "layer_norm", "layer_norm-but-1", "rms_norm",
    "group_norm-one", "group_norm-some", "instance_norm-input", "weight_norm-0", "weight_norm-1",
    "local_response_norm-inter-torch-size5-beta0.75", "local_response_norm-intra-torch-size3-beta0.75",
)  # fmt: skip


@dataclass
class Row:
    op: str
    dtype: torch.dtype
    input: str
    result: str
    ours: float  # in units
    torchs: float

    @property
    def worse(self) -> bool:
        return self.ours > max(self.torchs, SLACK)


def _differentiate(function: Callable[..., Tensor], tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def _kinds(t: Tensor) -> Tensor:
    """0 for a finite number, 1 and -1 for the infinities, 2 for NaN."""
    return torch.where(t.isnan(), 2.0, torch.where(t.isinf(), t.sign(), 0.0))


def _units(got: Tensor, wanted: Tensor, torchs: Tensor | None = None) -> float:
    """The error in units of got's type; infinite where a number should be finite and is not, or the other way round.

    What is not finite in the reference, or not in the type, may be as it is there or as torch has it.
    """
    kinds, rounded = _kinds(got), _kinds(wanted.to(got.dtype))
    allowed = kinds == rounded
    if torchs is not None:
        allowed |= (rounded != 0) & (kinds == _kinds(torchs))
        if not allowed.all():
            return math.inf
    elif (rounded == 0).logical_and(kinds != 0).any():
        return math.inf
    finite = (kinds == 0) & (rounded == 0)
    if not finite.any():
        return 0.0
    info, wanted = torch.finfo(got.dtype), wanted[finite]
    difference = (got[finite].double() - wanted).abs().max().item()
    return difference / (max(wanted.abs().max().item(), info.smallest_normal) * info.eps)


def _row_errors(
    case: Case, dtype: torch.dtype, make: Input, seed: int, shape: tuple[int, ...], layout: str
) -> Iterator[tuple[str, float, float]]:
    """Each result's name, error and torch's error; none if the type does not hold the input."""
    generator = torch.Generator().manual_seed(seed)
    exact = make(torch.randn(shape, generator=generator, dtype=torch.float64))
    x = exact.to(dtype, memory_format=LAYOUTS[layout])
    if (x.isinf() & exact.isfinite()).any():
        return
    tensors = [x, *case.parameters(x, generator)]
    dy = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype, memory_format=LAYOUTS[layout])
    ours = _differentiate(case.fastnorm, tensors, dy)
    torchs = _differentiate(case.torch, tensors, dy)
    wanted = _differentiate(case.reference, [t.double() for t in tensors], dy.double())
    names = ("y", "dx", "dweight", "dbias", "dresidual")
    for result, a, b, w in zip(names, ours, torchs, wanted, strict=False):
        yield result, _units(a, w, b), _units(b, w)


def rows(
    cases: list[Case],
    inputs: dict[str, Input] = INPUTS,
    draws: int = DRAWS,
    shape: tuple[int, ...] = SHAPE,
    layout: str = "contiguous",
) -> Iterator[Row]:
    where = "" if shape == SHAPE else f", {'x'.join(map(str, shape))} {layout}"
    for case in cases:
        for dtype in DTYPES:
            for name, make in inputs.items():
                largest: dict[str, tuple[float, float]] = {}
                for seed in range(draws):
                    for result, ours, torchs in _row_errors(case, dtype, make, seed, shape, layout):
                        before = largest.get(result, (0.0, 0.0))
                        largest[result] = max(ours, before[0]), max(torchs, before[1])
                for result, (ours, torchs) in largest.items():
                    yield Row(case.name, dtype, name + where, result, ours, torchs)


def accuracy_cases() -> list[Case]:
    by_name = {case.name: case for case in CASES}
    return [by_name[name] for name in NAMES]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="a line for each input, too")
    arguments = parser.parse_args()
    cases = accuracy_cases()
    found = list(rows(cases))
    norms = [case for case in cases if not case.name.startswith(("weight_norm", "local_response_norm"))]
    for shape in LARGE:
        for layout in LAYOUTS:
            found += rows(norms, ALIKE, shape=shape, layout=layout)
    largest: dict[tuple[str, torch.dtype, str], Row] = {}
    for row in found:
        key = row.op, row.dtype, row.result
        # the input on which this op does worst, compared with torch
        if key not in largest or (row.worse, row.ours) > (largest[key].worse, largest[key].ours):
            largest[key] = row
    shown = found if arguments.all else list(largest.values())
    print(f"{'op':46} {'type':9} {'result':9} {'fastnorm':>10} {'torch':>10}  input")
    for row in shown:
        mark = "  WORSE" if row.worse else ""
        print(
            f"{row.op:46} {str(row.dtype)[6:]:9} {row.result:9} {row.ours:10.3g} {row.torchs:10.3g}  {row.input}{mark}"
        )
    worse = sum(row.worse for row in found)
    print(f"{len(found)} results, {worse} worse than torch's; errors in units of the type, slack {SLACK}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
