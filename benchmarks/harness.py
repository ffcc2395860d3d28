"""Measures one pass of a workload and records it as a row of pytest-benchmark's."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import memory
import torch
from ladder.allocator import keep_freed_memory
from timing import CpuClock, CudaClock, Prepare, Times, by_turns, clock_of
from torch import Tensor, nn
from workloads import Workload

SECONDS, QUICK_SECONDS = 1.5, 0.3  # that the rounds of one row may take, beyond the first few


class Replay:
    """The timer that pytest-benchmark is given: it shows what has been measured here, by CUDA events for one."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


REPLAY = Replay()


@dataclass
class Session:
    """What the command line says."""

    device: str = "cpu"
    quick: bool = False


SESSION = Session()


@functools.cache
def keeps_freed_memory() -> bool:
    """Whether the allocator keeps what is freed, from the first question on.

    Left to itself it returns memory to the system when enough of it lies together: whichever library frees the last
    piece pays for all, ten milliseconds at times, and the next that allocates pays to have it back.
    """
    return keep_freed_memory()


@functools.lru_cache(maxsize=1)
def clock(device: str) -> CpuClock | CudaClock:
    if device == "cpu":
        keeps_freed_memory()
    return clock_of(device)


@dataclass(frozen=True)
class Subjects:
    """A workload's modules by library, and what they are given."""

    modules: dict[str, nn.Module]
    inputs: tuple[Tensor, ...]
    dy: Tensor
    target: Tensor  # that the input is copied into

    def forward(self, library: str) -> Tensor:
        return self.modules[library](*self.inputs)

    def gradients(self, library: str, y: Tensor) -> tuple[Tensor, ...]:
        leaves = (*self.inputs, *self.modules[library].parameters())
        return torch.autograd.grad(y, leaves, self.dy, allow_unused=True)

    def prepare(self, library: str, passes: str) -> Prepare:
        if passes == "forward":
            return lambda: lambda: self.forward(library)
        if passes == "both":
            return lambda: lambda: self.gradients(library, self.forward(library))

        def backward() -> Any:
            y = self.forward(library)
            return lambda: self.gradients(library, y)

        return backward

    def copy(self) -> Any:
        return lambda: self.target.copy_(self.inputs[0].detach())


# The passes of one workload come one after the other: torch.compile works once for them.
@functools.lru_cache(maxsize=1)
def subjects(workload: Workload, device: str) -> Subjects:
    generator = torch.Generator().manual_seed(0)
    x, dy, residual = (workload.tensor(device, generator) for _ in range(3))
    inputs = (x.requires_grad_(), residual.requires_grad_()) if workload.residual else (x.requires_grad_(),)
    modules = {"fastnorm": workload.ours(), "torch": workload.theirs()}
    modules = {name: module.to(device, workload.dtype) for name, module in modules.items()}
    if workload.compiles:
        torch._dynamo.reset()
        modules["compile"] = torch.compile(workload.theirs().to(device, workload.dtype), dynamic=False)
    return Subjects(modules, inputs, dy, torch.empty_like(dy))


@functools.lru_cache(maxsize=1)
def footprint(workload: Workload, device: str) -> dict[str, dict[str, int]]:
    """Bytes kept for backward and the peak of both passes, by library."""
    made = subjects(workload, device)
    libraries = ("fastnorm", "torch")
    return {
        "saved_bytes": {
            name: memory.saved_bytes(lambda name=name: made.forward(name), made.modules[name].parameters())
            for name in libraries
        },
        "peak_bytes": {
            name: memory.peak_bytes(lambda name=name: made.gradients(name, made.forward(name)), device)
            for name in libraries
        },
    }


def row(workload: Workload, passes: str, times: dict[str, Times], device: str) -> dict[str, Any]:
    """The measurement as it goes into JSON: seconds and bytes."""
    minimum = workload.minimum_bytes(passes, clock(device).cache_bytes)
    median = {name: t.median for name, t in times.items()}
    speed, copied = minimum / median["fastnorm"], 2 * workload.tensor_bytes / median["copy"]
    return {
        "op": workload.op,
        "passes": passes,
        "network": workload.network,
        "shape": list(workload.shape),
        "dtype": str(workload.dtype)[6:],
        "layout": workload.layout,
        "device": device,
        "rounds": len(times["fastnorm"].rounds),
        "seconds": {name: {"median": t.median, "quartiles": t.quartiles} for name, t in times.items()},
        "speed_up": {name: median[name] / median["fastnorm"] for name in ("torch", "compile") if name in median},
        "tensor_bytes": workload.tensor_bytes,
        "minimum_bytes": minimum,
        "gigabytes_per_s": speed / 1e9,
        "share_of_copy": speed / copied,
        "page_faults": {name: t.page_faults for name, t in times.items()},
        **footprint(workload, device),
    }


def measure(workload: Workload, passes: str, device: str, seconds: float) -> tuple[dict[str, Any], Times]:
    """The row, and the rounds of ours."""
    made = subjects(workload, device)
    prepare = {"copy": made.copy} | {name: made.prepare(name, passes) for name in reversed(made.modules)}
    times = by_turns(prepare, clock(device), tiny=workload.tiny, seconds=seconds)
    return row(workload, passes, times, device), times["fastnorm"]


def compare(benchmark: Any, workload: Workload, passes: str) -> None:
    """Times one pass of a workload and records it.

    Args:
        benchmark: pytest-benchmark's fixture; the statistics are those of ours, ``extra_info`` has the others'.
        passes: "forward", "backward" or "both".
    """
    if benchmark.disabled:  # a run of the tests that measures nothing
        made = subjects(workload, SESSION.device)
        made.prepare("fastnorm", passes)()()
        return
    measured, ours = measure(workload, passes, SESSION.device, QUICK_SECONDS if SESSION.quick else SECONDS)
    benchmark.extra_info.update(measured)
    rounds = iter(ours.rounds)

    def pass_time() -> None:
        REPLAY.now += next(rounds)

    benchmark.pedantic(pass_time, rounds=len(ours.rounds))
