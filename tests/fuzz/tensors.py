"""Shapes, strides and numbers to draw."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Around the lengths of vectors (8, 16, 32) and of blocks of them, primes, one.
_SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 61, 64, 65, 127, 129, 257, 1023, 1025)
_MOST_ELEMENTS = 6000

# (mean, standard deviation)
_SCALES = ((0.0, 1.0), (1.0, 2.0), (-3.0, 0.5), (0.0, 1e-3), (60.0, 1.0), (0.0, 30.0))


# A strategy is checked when it is first drawn from: most of the time, where each call makes its own.
number = cache(st.integers)
shuffled = cache(st.permutations)


@cache
def choice(*values: object) -> st.SearchStrategy:
    return st.sampled_from(values)


yes_or_no = st.booleans()


@cache
@st.composite
def shapes(draw: st.DrawFn, ranks: tuple[int, int], empty: bool = True) -> tuple[int, ...]:
    """Of few enough elements; one in about twenty is empty."""
    left, sizes = _MOST_ELEMENTS, []
    for _ in range(draw(number(*ranks))):
        fitting = tuple(n for n in _SIZES if n <= left)
        sizes.append(draw(choice(*fitting)))
        left //= sizes[-1]
    shape = list(draw(shuffled(tuple(sizes))))
    if empty and draw(number(0, 19)) == 7:
        shape[draw(number(0, len(shape) - 1))] = 0
    return tuple(shape)


@dataclass(frozen=True)
class Strides:
    """How a tensor lies in memory."""

    order: tuple[int, ...]  # of the dimensions, outermost first
    steps: tuple[int, ...]  # between neighbours along each dimension, in elements that the storage has there
    offset: int
    expanded: int | None  # a dimension of stride 0

    def lay(self, t: Tensor) -> Tensor:
        """t's values with these strides; along an expanded dimension those at its beginning."""
        if self.expanded is not None and t.shape[self.expanded] > 0:
            return self._lay(t.narrow(self.expanded, 0, 1)).expand(t.shape)
        return self._lay(t)

    def _lay(self, t: Tensor) -> Tensor:
        room = [t.shape[d] * self.steps[d] for d in self.order]
        storage = t.new_full((self.offset + torch.Size(room).numel(),), float("nan"))  # to be seen if it is read
        view = storage[self.offset :].view(room)
        for place, d in enumerate(self.order):
            view = view[(slice(None),) * place + (slice(None, None, self.steps[d]),)]
        back = sorted(range(t.dim()), key=lambda place: self.order[place])
        return view.permute(back).copy_(t)


@cache
@st.composite
def strides(draw: st.DrawFn, rank: int) -> Strides:
    kind = draw(choice("contiguous", "channels_last", "offset", "permuted", "sliced", "expanded", "all"))
    order, steps = tuple(range(rank)), (1,) * rank
    offset, expanded = 0, None
    if kind == "channels_last" and rank > 2:
        order = (0, *range(2, rank), 1)
    if kind in ("permuted", "all"):
        order = tuple(draw(shuffled(order)))
    if kind in ("sliced", "all"):
        sliced = draw(number(0, rank - 1))
        steps = tuple(draw(number(2, 3)) if d == sliced else 1 for d in range(rank))
    if kind in ("offset", "all"):
        offset = draw(number(1, 17))
    if kind == "expanded":
        expanded = draw(number(0, rank - 1))
    return Strides(order, steps, offset, expanded)


class Numbers:
    """Random numbers from one drawn seed, so that a failing call is shrunk by its shape and settings alone."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, scale: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        mean, std = scale
        return (torch.randn(shape, generator=self._generator, dtype=torch.float64) * std + mean).to(dtype)

    def positive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return (torch.rand(shape, generator=self._generator, dtype=torch.float64) + 0.5).to(dtype)


seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from(_SCALES)
dtypes = st.sampled_from(DTYPES)


def parameter_types(dtype: torch.dtype) -> st.SearchStrategy[torch.dtype]:
    """The input's type or, for types of 16 bits, float32."""
    return choice(dtype, torch.float32) if dtype.itemsize == 2 else choice(dtype)
