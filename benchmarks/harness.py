"""How a row is timed: the library, torch and a plain copy by turns in one process: a noisy machine slows all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Returns what is to be timed, after doing what is not: a backward's forward, say.
Prepare = Callable[[], Callable[[], Any]]


@dataclass(frozen=True)
class Row:
    """One line of the table: medians in seconds."""

    op: str
    passes: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    torch_s: float
    fastnorm_s: float
    copy_s: float  # of a tensor of this shape, dtype and layout
    minimum_bytes: int  # each input read once, each output written once

    @property
    def speed_up(self) -> float:
        return self.torch_s / self.fastnorm_s

    @property
    def gigabytes_per_s(self) -> float:
        return self.minimum_bytes / self.fastnorm_s / 1e9

    @property
    def share_of_copy(self) -> float:
        """How near the row is to the speed of a copy, 1.0 being as fast for the bytes it must move."""
        copied = 2 * torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize
        return (self.minimum_bytes / self.fastnorm_s) / (copied / self.copy_s)


ROWS: list[Row] = []


def in_layout(t: Tensor, layout: str) -> Tensor:
    return t.contiguous() if layout == "contiguous" else t.movedim(1, -1).contiguous().movedim(-1, 1)


def forward_of(module: nn.Module, *inputs: Tensor) -> Prepare:
    return lambda: lambda: module(*inputs)


def backward_of(module: nn.Module, grad_output: Tensor, *inputs: Tensor) -> Prepare:
    leaves = [*inputs, *module.parameters()]

    def prepare() -> Callable[[], Any]:
        y = module(*inputs)
        for leaf in leaves:
            leaf.grad = None
        return lambda: y.backward(grad_output)

    return prepare


def both_of(module: nn.Module, grad_output: Tensor, *inputs: Tensor) -> Prepare:
    leaves = [*inputs, *module.parameters()]

    def prepare() -> Callable[[], Any]:
        for leaf in leaves:
            leaf.grad = None
        return lambda: module(*inputs).backward(grad_output)

    return prepare


PASSES = {
    "forward": (2, lambda module, dy, *inputs: forward_of(module, *inputs)),
    "backward": (3, backward_of),
    "both": (5, both_of),
}


def compare(
    benchmark: Any,
    op: str,
    passes: str,
    ours: nn.Module,
    theirs: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str = "contiguous",
    tensors_moved: int | None = None,
) -> None:
    """Times one pass of two modules on one input and records the row.

    Args:
        benchmark: pytest-benchmark's fixture; it times ours, and runs theirs and the copy before each round.
        passes: "forward", "backward" or "both".
        tensors_moved: tensors of the input's size that any program must read or write, if not the pass's usual 2, 3 or
            5.
    """
    usual, prepare_pass = PASSES[passes]
    generator = torch.Generator().manual_seed(0)
    x = in_layout(torch.randn(shape, generator=generator).to(dtype), layout).requires_grad_()
    dy = in_layout(torch.randn(shape, generator=generator).to(dtype), layout)
    target = torch.empty_like(x, requires_grad=False)
    prepare_ours, prepare_theirs = prepare_pass(ours, dy, x), prepare_pass(theirs, dy, x)
    repeats = 1 if x.numel() > 1 << 16 else 50  # a call of microseconds is timed by the fifty
    torch_times: list[float] = []
    copy_times: list[float] = []

    def timed(runs: list[Callable[[], Any]], times: list[float]) -> None:
        start = time.perf_counter()
        for run in runs:
            run()
        times.append((time.perf_counter() - start) / repeats)

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        timed([lambda: target.copy_(x.detach())] * repeats, copy_times)
        timed([prepare_theirs() for _ in range(repeats)], torch_times)
        return ([prepare_ours() for _ in range(repeats)],), {}

    def run_all(runs: list[Callable[[], Any]]) -> None:
        for run in runs:
            run()

    benchmark.pedantic(run_all, setup=setup, rounds=25, warmup_rounds=3)
    row = Row(
        op=op,
        passes=passes,
        shape=shape,
        dtype=str(dtype)[6:],
        layout=layout,
        torch_s=statistics.median(torch_times[3:]),
        fastnorm_s=benchmark.stats.stats.median / repeats,
        copy_s=statistics.median(copy_times[3:]),
        minimum_bytes=(tensors_moved or usual) * x.numel() * x.element_size(),
    )
    benchmark.extra_info.update(
        torch_ms=row.torch_s * 1e3,
        fastnorm_ms=row.fastnorm_s * 1e3,
        copy_ms=row.copy_s * 1e3,
        speed_up=row.speed_up,
        minimum_bytes=row.minimum_bytes,
        gigabytes_per_s=row.gigabytes_per_s,
        share_of_copy=row.share_of_copy,
    )
    ROWS.append(row)
