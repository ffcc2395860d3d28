"""How calls are timed: those that are compared by turns in one process, so that a noisy machine slows all alike."""

from __future__ import annotations

import gc
import random
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Returns what is to be timed, after doing what is not: a backward's forward, say.
Prepare = Callable[[], Callable[[], Any]]

WARM_UP, MIN_ROUNDS, MAX_ROUNDS = 3, 7, 25
REPEATS = 50  # calls of tiny tensors, microseconds each, that are timed as one


class CpuClock:
    """Wall-clock time."""

    @property
    def cache_bytes(self) -> int:
        """Of the last level, as Linux has it, 32 MiB where that is not known; and 64 MiB at most: a larger cache is a
        whole socket's, and of the 480 MiB that one system told no more were to be had."""
        sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        told = max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=32 << 20)
        return min(told, 64 << 20)

    def seconds(self, calls: list[Callable[[], Any]], tiny: bool) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - start

    def page_faults(self) -> int:
        """Pages that the system has provided to the process so far, 4 KiB or huge ones."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class CudaClock:
    """CUDA events around calls that find the L2 cache filled with something else.

    The fill also keeps the device busy while the host prepares what is timed, so that small kernels are not measured by
    the host's speed; calls of tiny tensors, whose speed it is, are timed with a warm cache and an idle device.
    """

    def __init__(self) -> None:
        self.other = torch.empty(4 * self.cache_bytes, dtype=torch.int8, device="cuda")

    @property
    def cache_bytes(self) -> int:
        return torch.cuda.get_device_properties(0).L2_cache_size

    def seconds(self, calls: list[Callable[[], Any]], tiny: bool) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if tiny:
            torch.cuda.synchronize()
        else:
            self.other.zero_()
            torch.cuda._sleep(400_000)  # cycles: 0.2 ms
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def page_faults(self) -> int:
        """The device has none."""
        return 0


def clock_of(device: str) -> CpuClock | CudaClock:
    return CudaClock() if device == "cuda" else CpuClock()


@dataclass(frozen=True)
class Times:
    """Seconds a call of each round, by which the spread is known."""

    rounds: tuple[float, ...]
    page_faults: float = 0.0  # in a call, on average: how much of the memory that it writes is fresh

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third."""
        first, _, third = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return first, third


def by_turns(
    prepare: dict[str, Prepare], clock: CpuClock | CudaClock, *, tiny: bool = False, seconds: float = 1.0
) -> dict[str, Times]:
    """Times each of several calls once a round, in another order each: what comes after a call finds the caches as it
    left them, and gets the memory that it freed.

    Args:
        prepare: by name; each does what is not timed and returns what is.
        tiny: calls of microseconds, of which a round has fifty.
        seconds: after which no further round begins, if there are seven; there are twenty-five at most.
    """
    repeats = REPEATS if tiny else 1
    times: dict[str, list[float]] = {name: [] for name in prepare}
    faults = dict.fromkeys(prepare, 0)
    orders = random.Random(0)

    def measure() -> None:
        for name in orders.sample(list(prepare), len(prepare)):
            calls = [prepare[name]() for _ in range(repeats)]
            before = clock.page_faults()
            times[name].append(clock.seconds(calls, tiny) / repeats)
            faults[name] += clock.page_faults() - before

    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(WARM_UP):
            measure()
        times, faults = {name: [] for name in prepare}, dict.fromkeys(prepare, 0)
        end = time.perf_counter() + seconds
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and time.perf_counter() > end:
                break
            measure()
    finally:
        if collects:
            gc.enable()
    return {name: Times(tuple(rounds), faults[name] / (len(rounds) * repeats)) for name, rounds in times.items()}
