"""Builds the .cu files of csrc/cuda with g++ and runs their launchers on CPU tensors in the emulator's device memory.

Three builds of each kernel:

    random   plain: faults show by the order in which threads run, and in memory that starts as NaN
    asan     under AddressSanitizer and UndefinedBehaviorSanitizer, in a process that has asan_environment()
    trace    sees every memory access: races, reads of unwritten memory, bytes and sectors moved, bank conflicts

To try a kernel while writing it:

    from cuda_on_cpu import driver, native
    with driver.settings(order="random", seed=3, misaligned={"x": 1}):
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
import fcntl
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cuda_on_cpu.contracts import CSRC, Contract, contracts

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "cuda_on_cpu"  # of the emulator itself
LIBRARIES = CSRC.parent / "build" / "cuda_on_cpu"

ORDERS = ("first", "last", "random")  # which of the threads that are ready runs next

GUARD = 1024  # bytes of no one's memory before and after a buffer
ALIGNMENT = 256  # of device memory, in bytes, before `misaligned` is added

DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class KernelError(RuntimeError):
    """A launch failed, or the emulator saw a fault."""


class BuildError(RuntimeError):
    """The compiler refused a kernel."""


@dataclass(frozen=True)
class Settings:
    mode: str = "random"
    order: str = "first"
    seed: int = 0
    # the device
    multiprocessors: int = 4
    shared_per_block: int = 227 << 10
    l2: int = 1 << 20
    major: int = 9
    minor: int = 0
    largest_cluster: int = 16
    most_clusters: int = 0  # that run at once, 0: any number
    architecture: int = 90  # that the kernels are compiled for: code for less than 90 has no clusters
    misaligned: dict[str, int] = field(default_factory=dict)  # elements by which a pointer of the contract is off
    plan: dict[str, int] = field(default_factory=dict)  # fields of PlanOverride in plan.h, for the ops that have plans
    # in mode trace: look for races; count what accesses cost
    races: bool = True
    counts: bool = True


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
class Cost:
    """What the accesses to a buffer in global memory cost: a request is an instruction of a warp, a sector 32 bytes."""

    bytes: int = 0
    sectors: int = 0
    requests: int = 0
    ideal_sectors: int = 0  # if every request's bytes lay together

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(Cost)))


@dataclass(frozen=True)
class Report:
    op: str
    launches: tuple[Launch, ...]
    workspace: int  # bytes
    # in mode trace, by the names of the contract's pointers, and "workspace"
    reads: dict[str, Cost] = field(default_factory=dict)
    writes: dict[str, Cost] = field(default_factory=dict)
    shared_turns: int = 0  # of requests to shared memory; more than the ideal: bank conflicts
    ideal_shared_turns: int = 0

    def total(self) -> Cost:
        return sum((*self.reads.values(), *self.writes.values()), Cost())


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
    "random": ["-O1"],  # to compile takes longer than to run
    # Not optimised: to compile would take four times as long. Without the check of shifts: with it, GCC 12 indexes an
    # array in the other operand by what it has not computed yet.
    "asan": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=shift", "-fno-sanitize-recover=all"],
    # Without these optimisations, so that a load of 16 bytes in the source is one load.
    "trace": ["-O1", "-g", "-fsanitize=thread", "-fno-tree-sra", "-fno-tree-fre", "-fno-tree-forwprop"],
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
        raise BuildError(f"{' '.join(command)}\n{done.stderr[:8000]}")
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
        arguments = [*_COMMON, *_NATIVE, "-O2", "-c", str(source)]
        output = BUILD / f"{source.stem}-{_digest([source, *HERE.glob('*.h')], ' '.join(arguments))}.o"
        if not output.exists():
            _compile(arguments, output)
        objects.append(str(output))
    return objects


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """One thread of one process at a time: several libraries, and several processes, may want the same object."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _object(source: Path, flags: list[str], mode: str, entries: str = "") -> Path:
    headers = [*CSRC.glob("*.h"), *CSRC.glob("cuda/*.cuh"), *CSRC.glob("cuda/*.h"), *HERE.glob("*.h")]
    output = LIBRARIES / f"{source.stem}-{mode}-{_digest([source, *headers], ' '.join(flags) + entries)}.o"
    with _alone(output):
        if not output.exists():
            before = output.with_suffix(f".{os.getpid()}.h")
            before.write_text(entries)
            try:
                _compile([*flags, "-include", str(before), "-c", str(source)], output)
            finally:
                before.unlink(missing_ok=True)
    return output


def build(source: Path, mode: str, entries: str = "", architecture: int = 90) -> Path:
    """The shared library of `source` and of what it calls; `entries`: code that is compiled before it."""
    flags = [*_COMMON, *_NATIVE, *_MODES[mode], f"-I{HERE}", f"-I{CSRC}", f"-I{CSRC / 'cuda'}"]
    flags += [f"-D__CUDA_ARCH__={10 * architecture}"] if architecture < 90 else []
    objects = [_object(source, flags, mode, entries), *(_object(other, flags, mode) for other in _called(source))]
    objects += map(Path, _core())
    library = LIBRARIES / f"{source.stem}-{mode}-{_digest(objects, '')}.so"
    if not library.exists():
        # -fsanitize=thread is not given to the linker: trace.cpp has its functions
        sanitizers = [f for f in flags if f.startswith("-fsanitize=") and mode == "asan"]
        _compile(["-shared", "-Wl,-Bsymbolic", *sanitizers, *map(str, objects)], library)
    return library


def _called(source: Path) -> list[Path]:
    """The .cu files beside it whose interfaces it includes."""
    beside = [source.with_name(f"{stem}.cu") for stem in re.findall(r'#include "(\w+)\.cuh"', source.read_text())]
    return [path for path in beside if path.exists() and path != source]


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    i, i64, p = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.emulator_set_device.argtypes = [i, i64, i64, i, i, i, i64]
    library.emulator_set_order.argtypes = [i, ctypes.c_uint64]
    library.emulator_add_buffer.argtypes = [p, i64, i64, ctypes.c_char_p, i]
    library.emulator_clear_buffers.argtypes = [i64]
    library.emulator_errors.restype = ctypes.c_char_p
    library.emulator_launches.restype = i64
    library.emulator_launch.argtypes = [i64, ctypes.POINTER(i64)]
    library.trace_start.argtypes = [i, i]
    library.trace_add_buffer.argtypes = [p, i64, i64, i64, ctypes.c_char_p, i]
    library.trace_buffer_cost.argtypes = [i64, ctypes.POINTER(i64)]
    library.trace_shared_cost.argtypes = [ctypes.POINTER(i64)]
    return library


def _build_kernels(stem: str, mode: str, architecture: int = 90) -> Path:
    mine = [c for c in contracts().values() if c.stem == stem]
    entries = f'#include "{stem}.h"\n#include "entry.h"\n'
    entries += "".join(f"CUDA_ON_CPU_ENTRY({c.op}, {c.args})\n" for c in mine)
    source = CSRC / "cuda" / f"{stem}.cu"
    if re.search(r'#include "(plan\.h|slice_norm\.cuh)"', source.read_text()):
        entries += '#include "plan.h"\nCUDA_ON_CPU_PLAN\n'
    return build(source, mode, entries, architecture)


_under_way: dict[tuple[str, str, int], Future[Path]] = {}


def build_ahead(mode: str, older: Iterable[str] = ()) -> None:
    """Starts to build all kernels in a mode, two compilers at a time; those of the stems in `older` also for sm_80."""
    _core()
    pool = ThreadPoolExecutor(2)
    stems = [s for s in dict.fromkeys(c.stem for c in contracts().values()) if (CSRC / "cuda" / f"{s}.cu").exists()]
    for wanted in (*((stem, mode, 90) for stem in stems), *((stem, mode, 80) for stem in older)):
        _under_way[wanted] = pool.submit(_build_kernels, *wanted)


@cache
def _kernels(stem: str, mode: str, architecture: int) -> ctypes.CDLL:
    wanted = stem, mode, architecture
    library = load(_under_way[wanted].result() if wanted in _under_way else _build_kernels(*wanted))
    library.entry_error.restype = ctypes.c_char_p
    for c in contracts().values():
        if c.stem != stem:
            continue
        size, workspace, run = (getattr(library, f"{c.op}_{what}") for what in ("size", "workspace", "run"))
        size.restype = workspace.restype = ctypes.c_int64
        workspace.argtypes = [ctypes.c_void_p]
        run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        if size() != ctypes.sizeof(c.structure):
            raise KernelError(f"{c.args}: {size()} bytes in C++, {ctypes.sizeof(c.structure)} in Python")
    return library


def has_kernel(op: str) -> bool:
    return (CSRC / "cuda" / f"{contracts()[op].stem}.cu").exists()


def asan_environment() -> dict[str, str]:
    """What a process needs to load kernels built in mode asan."""

    def library(name: str) -> str:
        command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return str(Path(found).resolve())

    return {
        **os.environ,
        # libstdc++ too: AddressSanitizer looks for the function that throws when it starts
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
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

    def __init__(self, name: str, bytes_: int, element: int, writable: bool, content: Tensor | None) -> None:
        off = current.misaligned.get(name, 0) * element
        self.name, self.writable = name, writable
        self._memory = torch.full((bytes_ + 2 * GUARD + 2 * ALIGNMENT,), 0xFF, dtype=torch.uint8)
        self._start = GUARD + ALIGNMENT + off
        self._start += -(self._memory.data_ptr() + GUARD + ALIGNMENT) % ALIGNMENT
        self.bytes = self._memory[self._start : self._start + bytes_]
        if content is not None:
            self.bytes.copy_(content)
        self._before = None if writable else self.bytes.clone()
        self.address = self._memory.data_ptr() + self._start

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


_FREE_PLAN = {"resident": -1, "cluster": 0, "scalar": 0}


class Session:
    """The emulated device with its memory, for one call of a launcher."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.buffers: dict[str, _Buffer] = {}

    def __enter__(self) -> Session:
        c, library = current, self.library
        library.emulator_set_device(
            c.multiprocessors, c.shared_per_block, c.l2, c.major, c.minor, c.largest_cluster, c.most_clusters
        )
        library.emulator_set_order(ORDERS.index(c.order), c.seed)
        if c.mode == "trace":
            library.trace_start(c.races, c.counts)
        if hasattr(library, "force_plan"):
            library.force_plan(*({**_FREE_PLAN, **c.plan}[name] for name in _FREE_PLAN))
        return self

    def add(self, name: str, bytes_: int, element: int, writable: bool, content: Tensor | None) -> _Buffer:
        """Memory of a name; `element`: the bytes that are never shared by two threads."""
        buffer = self.buffers[name] = _Buffer(name, bytes_, element, writable, content)
        guard = GUARD - ALIGNMENT
        self.library.emulator_add_buffer(buffer.address, bytes_, guard, name.encode(), writable)
        if current.mode == "trace":
            holds_data = content is not None
            self.library.trace_add_buffer(buffer.address, bytes_, element, guard, name.encode(), holds_data)
        return buffer

    def check(self, failed: int) -> None:
        message = self.library.entry_error() if failed else self.library.emulator_errors()
        if message:
            raise KernelError(_with_lines(self.library, message.decode()))

    def report(self, op: str, workspace: int) -> Report:
        return Report(op, _launches(self.library), workspace, *_costs(self.library, list(self.buffers)))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.library.emulator_clear_buffers(GUARD - ALIGNMENT)
        self.library.trace_clear()
        if kind is None:
            for buffer in self.buffers.values():
                buffer.check()


def call(op: str, **fields: Any) -> Report:
    """Runs a kernel's launcher. Fields as the contract has them: tensors or None for pointers, tuples for structs."""
    contract: Contract = contracts()[op]
    args = contract.structure()
    names = {p.name for p in contract.pointers}
    for name in fields.keys() - names:
        _set(args, name, fields[name])
    outputs: list[tuple[Tensor, _Buffer]] = []
    with Session(_kernels(contract.stem, current.mode, current.architecture)) as session:
        by_place: dict[tuple[int, int], _Buffer] = {}
        # outputs first, so that an input which is the same memory shares the writable buffer
        for p in sorted(contract.pointers, key=lambda p: p.is_input):
            t = fields.get(p.name)
            if t is None:
                continue
            raw = _raw(t)
            key = raw.data_ptr(), len(raw)
            if key not in by_place:
                keep = p.is_input or p.name in _UPDATED or (op, p.name) in _UPDATED
                keep = keep or any(i.is_input and fields.get(i.name) is t for i in contract.pointers)
                by_place[key] = session.add(p.name, len(raw), t.element_size(), not p.is_input, raw if keep else None)
            setattr(args, p.name, by_place[key].address)
            if not p.is_input:
                outputs.append((raw, by_place[key]))
        bytes_ = getattr(session.library, f"{op}_workspace")(ctypes.byref(args))
        workspace = session.add("workspace", bytes_, 2, True, None)
        session.check(getattr(session.library, f"{op}_run")(ctypes.byref(args), workspace.address))
        report = session.report(op, bytes_)
    for raw, buffer in outputs:
        raw.copy_(buffer.bytes)
    reports.append(report)
    return report


def _with_lines(library: ctypes.CDLL, message: str) -> str:
    """@address@ of trace.cpp as file:line, and those of the functions that it was inlined into."""

    def line(match: re.Match[str]) -> str:
        command = ["addr2line", "-i", "-e", library._name, f"0x{match[1]}"]
        found = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        places = [place.rsplit("/", 1)[-1].split(" ")[0] for place in found]
        return " < ".join(place for place in places if place.split(":")[0].endswith((".cu", ".cuh"))) or match[0]

    return re.sub(r"@([0-9a-f]+)@", line, message)


def _costs(library: ctypes.CDLL, names: list[str]) -> tuple[dict[str, Cost], dict[str, Cost], int, int]:
    if current.mode != "trace":
        return {}, {}, 0, 0
    reads, writes = {}, {}
    for i, name in enumerate(names):
        numbers = (ctypes.c_int64 * 8)()
        library.trace_buffer_cost(i, numbers)
        reads[name], writes[name] = Cost(*numbers[:4]), Cost(*numbers[4:])
    shared = (ctypes.c_int64 * 2)()
    library.trace_shared_cost(shared)
    return reads, writes, *shared


def _launches(library: ctypes.CDLL) -> tuple[Launch, ...]:
    launches = []
    for i in range(library.emulator_launches()):
        numbers = (ctypes.c_int64 * 6)()
        library.emulator_launch(i, numbers)
        x, y, z, threads, cluster, shared = numbers
        launches.append(Launch((x, y, z), threads, cluster, shared))
    return tuple(launches)
