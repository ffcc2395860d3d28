"""Builds the .cu files of csrc/cuda with g++ and runs their launchers on CPU tensors in the emulator's device memory.

Three builds of each kernel:

    random   plain: faults show by the order in which threads run, and in memory that starts as NaN
    asan     under AddressSanitizer and UndefinedBehaviorSanitizer, in a process that has asan_environment()
    trace    sees every memory access: races, reads of unwritten memory, bytes and sectors moved, bank conflicts

To try a kernel while writing it:

    from cuda_on_cpu import driver, native
    with driver.settings(order="random", seed=3, misaligned={"x": 4}):
        report = driver.call("dropout", shape=(1, 1, 1000, 0), ..., x=x, y=y)  # the fields of the contract struct
        y, *_ = native.layer_norm_forward(x, w, b, None, [64], 1e-5, None, True, True)  # as fastnorm._C has it
    with driver.settings(), native.installed():
        y = fastnorm.functional.layer_norm(x, [64], w, b)  # every op, with autograd, runs the CUDA kernels

From a shell: pytest tests/test_cuda_on_cpu.py -k layer_norm
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cuda_on_cpu.contracts import Contract, contracts

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_on_cpu"

ORDERS = ("first", "last", "random")  # which of the threads that are ready runs next
LANDINGS = ("at once", "late", "random")  # when bulk copies land

GUARD = 1024  # bytes of no one's memory before and after a buffer
ALIGNMENT = 256  # of device memory, in bytes, before `misaligned` is added

DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class KernelError(RuntimeError):
    """A launch failed, or the emulator saw a fault."""


@dataclass(frozen=True)
class Settings:
    mode: str = "random"
    order: str = "first"
    landing: str = "late"
    seed: int = 0
    # the device
    multiprocessors: int = 4
    shared_per_block: int = 227 << 10
    l2: int = 1 << 20
    major: int = 9
    minor: int = 0
    largest_cluster: int = 16
    misaligned: dict[str, int] = field(default_factory=dict)  # bytes by which a pointer of the contract is off


current = Settings()
reports: list[Report] = []  # of the calls since settings() began


@contextlib.contextmanager
def settings(**changes: Any) -> Iterator[list[Report]]:
    """Changes the settings for a while; gives the list that the reports of all calls are added to."""
    global current, reports
    before = current, reports
    current, reports = dataclasses.replace(current, **changes), []
    try:
        yield reports
    finally:
        current, reports = before


@dataclass(frozen=True)
class Launch:
    blocks: tuple[int, int, int]
    threads: int
    cluster: int
    shared: int  # bytes of dynamic shared memory


@dataclass(frozen=True)
class Report:
    op: str
    launches: tuple[Launch, ...]
    workspace: int  # bytes


# ---- building

_COMMON = [
    "-std=c++20",
    "-x",
    "c++",
    "-fPIC",
    "-g1",
    "-w",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    "-ffp-contract=off",
]
_NATIVE = ["-mfma", "-mf16c"] if platform.machine() == "x86_64" else []  # so that fmaf is one instruction
_MODES = {
    "random": ["-O2"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    # Without these optimisations, so that a load of 16 bytes in the source is one load.
    "trace": ["-O1", "-fsanitize=thread", "-fno-tree-sra", "-fno-tree-fre", "-fno-tree-forwprop"],
}
CORE = ("emulator.cpp", "trace.cpp")


def _compile(arguments: list[str], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    made = output.with_name(f"{output.name}.{os.getpid()}")
    command = [os.environ.get("CXX", "g++"), *arguments, "-o", str(made)]
    # the compiler itself must not run under a sanitizer
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    if done.returncode != 0:
        raise KernelError(f"{' '.join(command)}\n{done.stderr[:8000]}")
    made.rename(output)


def _digest(paths: list[Path], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _core() -> list[str]:
    """The emulator's own objects, the same for every kernel and mode."""
    objects = []
    for name in CORE:
        source = HERE / name
        if not source.exists():
            continue
        arguments = [*_COMMON, *_NATIVE, "-O2", "-c", str(source)]
        output = BUILD / f"{source.stem}-{_digest([source, *HERE.glob('*.h')], ' '.join(arguments))}.o"
        if not output.exists():
            _compile(arguments, output)
        objects.append(str(output))
    return objects


def build(source: Path, mode: str, entries: str = "", csrc: Path = ROOT / "csrc") -> ctypes.CDLL:
    """`source` as a shared library; `entries`: code that is compiled behind it."""
    flags = [*_COMMON, *_NATIVE, *_MODES[mode], f"-I{HERE}", f"-I{csrc}", f"-I{csrc / 'cuda'}"]
    read = [source, *csrc.glob("*.h"), *csrc.glob("cuda/*.cuh"), *(HERE / n for n in CORE), *HERE.glob("*.h")]
    name = f"{source.stem}-{mode}-{_digest([p for p in read if p.exists()], ' '.join(flags) + entries)}"
    library = BUILD / f"{name}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unit = BUILD / f"{name}.{os.getpid()}.cpp"
        unit.write_text(f'#include "{source}"\n{entries}')
        kernel = BUILD / f"{name}.{os.getpid()}.o"
        try:
            _compile([*flags, "-c", str(unit)], kernel)
            # -fsanitize=thread is not given to the linker: trace.cpp has its functions
            sanitizers = [f for f in flags if f.startswith("-fsanitize=") and mode == "asan"]
            _compile(["-shared", "-Wl,-Bsymbolic", *sanitizers, str(kernel), *(o for o in _core())], library)
        finally:
            unit.unlink(missing_ok=True)
            kernel.unlink(missing_ok=True)
    return _declare(ctypes.CDLL(str(library)))


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    i, i64, p = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.emulator_set_device.argtypes = [i, i64, i64, i, i, i]
    library.emulator_set_order.argtypes = [i, i, ctypes.c_uint64]
    library.emulator_add_buffer.argtypes = [p, i64, i64, ctypes.c_char_p, i]
    library.emulator_clear_buffers.argtypes = [i64]
    library.emulator_errors.restype = ctypes.c_char_p
    library.emulator_launches.restype = i64
    library.emulator_launch.argtypes = [i64, ctypes.POINTER(i64)]
    return library


@cache
def _kernels(stem: str, mode: str, csrc: Path) -> ctypes.CDLL:
    mine = [c for c in contracts().values() if c.stem == stem]
    entries = f'#include "{stem}.h"\n#include "entry.h"\n'
    entries += "".join(f"CUDA_ON_CPU_ENTRY({c.op}, {c.args})\n" for c in mine)
    library = build(csrc / "cuda" / f"{stem}.cu", mode, entries, csrc)
    library.entry_error.restype = ctypes.c_char_p
    for c in mine:
        size, workspace, run = (getattr(library, f"{c.op}_{what}") for what in ("size", "workspace", "run"))
        size.restype = workspace.restype = ctypes.c_int64
        workspace.argtypes = [ctypes.c_void_p]
        run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        if size() != ctypes.sizeof(c.structure):
            raise KernelError(f"{c.args}: {size()} bytes in C++, {ctypes.sizeof(c.structure)} in Python")
    return library


csrc = ROOT / "csrc"  # where the kernels are; mutations have a copy


def has_kernel(op: str) -> bool:
    return (csrc / "cuda" / f"{contracts()[op].stem}.cu").exists()


def asan_environment() -> dict[str, str]:
    """What a process needs to load kernels built in mode asan."""
    libasan = subprocess.run(
        [os.environ.get("CXX", "g++"), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return {
        **os.environ,
        "LD_PRELOAD": str(Path(libasan).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


# ---- device memory


def _raw(t: Tensor) -> Tensor:
    """The bytes of a dense tensor, in the order in which they lie."""
    assert t.numel() == 0 or sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 == t.numel(), (
        "device memory is dense"
    )
    return t.detach().as_strided((t.numel(),), (1,)).view(torch.uint8)


class _Buffer:
    """A tensor's copy in the emulator's memory: exact size, every other byte around it 0xff, which makes NaNs."""

    def __init__(self, library: ctypes.CDLL, name: str, bytes_: int, writable: bool, content: Tensor | None) -> None:
        off = current.misaligned.get(name, 0)
        self.name, self.writable = name, writable
        self._memory = torch.full((bytes_ + 2 * GUARD + 2 * ALIGNMENT,), 0xFF, dtype=torch.uint8)
        self._start = GUARD + ALIGNMENT + off
        self._start += -(self._memory.data_ptr() + GUARD + ALIGNMENT) % ALIGNMENT
        self.bytes = self._memory[self._start : self._start + bytes_]
        if content is not None:
            self.bytes.copy_(content)
        self._before = None if writable else self.bytes.clone()
        self.address = self._memory.data_ptr() + self._start
        library.emulator_add_buffer(self.address, bytes_, GUARD - ALIGNMENT, name.encode(), writable)

    def check(self) -> None:
        """After the emulator let go of the memory."""
        around = (self._memory[: self._start], self._memory[self._start + len(self.bytes) :])
        if any(bool((part != 0xFF).any()) for part in around):
            raise KernelError(f"wrote outside of {self.name}")
        if self._before is not None and not torch.equal(self._before, self.bytes):
            raise KernelError(f"wrote to {self.name}, an input")


# Written, but what they held before counts.
_UPDATED = {
    "running_mean",
    "running_var",
    "num_batches_tracked",
    *(("spectral_norm_forward", name) for name in ("u", "v")),
}


def _set(structure: ctypes.Structure, name: str, value: Any) -> None:
    of = dict(structure._fields_)[name]
    setattr(structure, name, of(*value) if isinstance(value, tuple) else value)


def call(op: str, **fields: Any) -> Report:
    """Runs a kernel's launcher. Fields as the contract has them: tensors or None for pointers, tuples for structs."""
    contract: Contract = contracts()[op]
    library = _kernels(contract.stem, current.mode, csrc)
    args = contract.structure()
    buffers: dict[str, _Buffer] = {}
    outputs: list[tuple[Tensor, _Buffer]] = []
    c = current
    library.emulator_set_device(c.multiprocessors, c.shared_per_block, c.l2, c.major, c.minor, c.largest_cluster)
    library.emulator_set_order(ORDERS.index(c.order), LANDINGS.index(c.landing), c.seed)
    try:
        pointers = {p.name: p for p in contract.pointers}
        for name in fields:
            if name not in pointers:
                _set(args, name, fields[name])
        by_place: dict[tuple[int, int], _Buffer] = {}
        # outputs first, so that an input which is the same memory shares the writable buffer
        for p in sorted(contract.pointers, key=lambda p: p.is_input):
            t = fields.get(p.name)
            if t is None:
                continue
            raw = _raw(t)
            key = raw.data_ptr(), len(raw)
            if key in by_place:
                if p.is_input and by_place[key].writable:
                    by_place[key].bytes.copy_(raw)
            else:
                keep = p.is_input or p.name in _UPDATED or (op, p.name) in _UPDATED
                by_place[key] = _Buffer(library, p.name, len(raw), not p.is_input, raw if keep else None)
            buffers[p.name] = by_place[key]
            setattr(args, p.name, buffers[p.name].address)
            if not p.is_input:
                outputs.append((raw, buffers[p.name]))
        bytes_ = getattr(library, f"{op}_workspace")(ctypes.byref(args))
        buffers["workspace"] = _Buffer(library, "workspace", bytes_, True, None)
        failed = getattr(library, f"{op}_run")(ctypes.byref(args), buffers["workspace"].address)
        if failed:
            raise KernelError(library.entry_error().decode())
        if errors := library.emulator_errors().decode():
            raise KernelError(f"{op}: {errors}")
        report = Report(op, _launches(library), bytes_)
    finally:
        library.emulator_clear_buffers(GUARD - ALIGNMENT)
    for buffer in buffers.values():
        buffer.check()
    for raw, buffer in outputs:
        raw.copy_(buffer.bytes)
    reports.append(report)
    return report


def _launches(library: ctypes.CDLL) -> tuple[Launch, ...]:
    launches = []
    for i in range(library.emulator_launches()):
        numbers = (ctypes.c_int64 * 6)()
        library.emulator_launch(i, numbers)
        x, y, z, threads, cluster, shared = numbers
        launches.append(Launch((x, y, z), threads, cluster, shared))
    return tuple(launches)
