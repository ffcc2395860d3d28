"""Registers, shared memory and spills of every CUDA kernel, from the log of a build with ``-Xptxas=-v``.

``python tests/cuda_check.py LOG``; the exit code is 1 if a kernel spills, keeps an array in local memory, or has more
static shared memory than what launches leave room for.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

SOURCE = re.compile(r"csrc/cuda/(\w+)\.cu\b")  # of the compiler's command, which the build prints before its words
ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+\w?)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
MOST_SHARED = 2 << 10  # static, bytes: kStaticShared of csrc/cuda/sizes.h
WITHOUT_DYNAMIC = re.compile(r"parameter_gradients|update_running|merge_parts")  # kernels that have static alone


@dataclass
class Kernel:
    """One kernel for one architecture, in registers a thread and bytes."""

    source: str
    name: str
    architecture: str
    registers: int = 0
    shared: int = 0  # static; a launch may ask for more
    stack: int = 0
    spilled: int = 0  # stored and loaded

    @property
    def crowds_out(self) -> bool:
        """Whether the static shared memory is more than what launches leave room for beside the dynamic."""
        return self.shared > MOST_SHARED and not WITHOUT_DYNAMIC.search(self.name)


def kernels_of(log: str) -> list[Kernel]:
    """Every kernel that the log tells of.

    Raises:
        ValueError: a kernel is named, but not what it uses.
    """
    kernels: list[Kernel] = []
    expects_frame, source = False, "?"
    for line in log.splitlines():
        if named := SOURCE.search(line):
            source = named[1]
        if entry := ENTRY.search(line):
            kernels.append(Kernel(source, *entry.groups()))
            expects_frame = True
        elif expects_frame and (frame := FRAME.search(line)):
            kernels[-1].stack, stores, loads = map(int, frame.groups())
            kernels[-1].spilled = stores + loads
            expects_frame = (
                False  # functions that the kernel calls have frames of their own, listed after its registers
            )
        elif used := USED.search(line):
            kernels[-1].registers = int(used[1])
            kernels[-1].shared = int(shared[1]) if (shared := SHARED.search(line)) else 0
    silent = [k.name for k in kernels if k.registers == 0]
    if silent or expects_frame:
        raise ValueError(f"cuda_check: the log does not say what these kernels use: {silent or kernels[-1].name}")
    return kernels


def titles(kernels: list[Kernel]) -> list[str]:
    """File and name of each, without the namespace and the parameters."""
    names = "\n".join(k.name for k in kernels)
    shown = subprocess.run(["c++filt", "-p"], input=names, capture_output=True, text=True, check=True).stdout
    plain = re.sub(r"fastnorm::(cuda::)?|\(anonymous namespace\)::|^void ", "", shown, flags=re.MULTILINE)
    return [f"{k.source}: {name}" for k, name in zip(kernels, plain.splitlines(), strict=True)]


def table(kernels: list[Kernel]) -> str:
    """A line for each kernel: its registers for each architecture in turn, and the most of the rest."""
    architectures = sorted({k.architecture for k in kernels}, key=lambda a: int(re.sub(r"\D", "", a)))
    rows: dict[str, dict[str, Kernel]] = defaultdict(dict)
    for kernel, name in zip(kernels, titles(kernels), strict=True):
        rows[name][kernel.architecture] = kernel
    width = max(map(len, rows))
    lines = [f"{'kernel':{width}} " + " ".join(f"{'sm_' + a:>6}" for a in architectures) + "  shared   stack  spills"]
    for name, row in sorted(rows.items()):
        registers = " ".join(f"{row[a].registers if a in row else '-':>6}" for a in architectures)
        shared, stack, spilled = (
            max(getattr(k, field) for k in row.values()) for field in ("shared", "stack", "spilled")
        )
        mark = " <-- spills" if spilled else " <-- a stack frame" if stack else ""
        mark = mark or (" <-- too much shared memory" if any(k.crowds_out for k in row.values()) else "")
        lines.append(f"{name:{width}} {registers} {shared:7} {stack:7} {spilled:7}{mark}")
    return "\n".join(lines)


def main(path: str) -> int:
    kernels = kernels_of(Path(path).read_text())
    if not kernels:
        print(f"cuda_check: {path} tells of no kernel: build with NVCC_APPEND_FLAGS=-Xptxas=-v")
        return 1
    print(table(kernels))
    bad = {(k.source, k.name) for k in kernels if k.spilled or k.stack or k.crowds_out}
    count, most = len({(k.source, k.name) for k in kernels}), max(k.registers for k in kernels)
    print(f"{count} kernels, at most {most} registers, {len(bad)} with spills, a stack frame or too much memory")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
