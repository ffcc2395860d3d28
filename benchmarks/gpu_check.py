"""``make gpu-check OUT=DIR``: on a machine with an NVIDIA GPU, builds for it, tests, looks for errors, and measures.

1. The extension for the present device, in place; of the CPU's kernels the plain ones alone. Not with ``--built``: then
   the extension that is there is used.
2. All at once: the tests that run on a CUDA device, in several processes, and compute-sanitizer's memcheck and
   racecheck on every case of the table at two small shapes.
3. The benchmarks: fastnorm, torch, torch.compile and whichever of Liger and apex can be imported; and which kernels of
   fastnorm's ran for how long, as torch's profiler has it.

Logs, ``results.json`` and ``results.md`` go to DIR, the results anew after every step and row, and what takes too long
is stopped, so that a kernel that hangs costs no more than what waits for it. The exit code is 1 if there is no GPU, or
something failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timing import MAX_ROUNDS, MIN_ROUNDS, CudaClock, by_turns
from torch import Tensor, nn
from workloads import DropPath, WithinChannel, Workload, alike, fastnorm, fused

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
STEPS = ("tests", "sanitizer", "benchmarks")
# For everything, and for the build. What comes before the benchmarks has a part of it; those say what they have not
# reached by the end.
SECONDS, BUILD_SECONDS = 9 * 60, 4 * 60

# ---- build, tests, compute-sanitizer


class Step:
    """A command that runs beside others, what it says in a log."""

    def __init__(self, command: list[str], log: Path, **environment: str) -> None:
        self.log = log
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
            )

    def wait(self, deadline: float) -> str:
        """Either "ok", or "failed: " and why. At the deadline it is stopped, and what it started."""
        try:
            code = self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return "failed: not done in time"
        return "ok" if code == 0 else f"failed: exit code {code}"

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip("= ") if lines else "no output"


def build(out: Path, deadline: float) -> str:
    major, minor = torch.cuda.get_device_capability()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    architecture = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "FASTNORM_CUDA": "1", "FASTNORM_PLAIN": "1"}
    return Step(command, out / "build.log", **architecture).wait(deadline)


def tested_files() -> list[str]:
    """The tests that run on a device."""
    without = ("on_cpu", "emulator", "traffic", "check")  # need no GPU
    found = (path for path in TESTS.glob("test_*.py") if "DEVICES" in path.read_text())
    return sorted(str(path) for path in found if path.stem not in {f"test_cuda_{name}" for name in without})


def start_tests(logs: Path) -> dict[str, Step]:
    """A process for each share of the tests; a share is an op, or what belongs to none."""
    sys.path.insert(0, str(TESTS))
    cases = importlib.import_module("cases")
    ops = sorted({case.op for case in cases.CASES})
    shares = {op: f"cuda and {op}" for op in ops} | {"rest": f"cuda and not ({' or '.join(ops)})"}
    steps = {}
    for name, expression in shares.items():
        # verbose: the log of a test that hangs ends with its name
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", expression, *tested_files()]
        steps[name] = Step(command, logs / f"{name}.log", OMP_NUM_THREADS="1")
    return steps


def results_of_tests(steps: dict[str, Step], out: Path, deadline: float) -> dict[str, str]:
    """What each share ends with; all that they say goes to tests.log."""
    results = {}
    for name, step in steps.items():
        how = step.wait(deadline)
        results[f"tests {name}"] = step.last_line() if how == "ok" else f"{how}: {step.last_line()}"
    logs = (f"######## {name}\n{step.log.read_text(errors='replace')}\n" for name, step in steps.items())
    (out / "tests.log").write_text("".join(logs))
    return results


def sample() -> None:
    """Every case forward and backward at two shapes, in both layouts: what compute-sanitizer watches."""
    sys.path.insert(0, str(TESTS))
    cases, test_ops = importlib.import_module("cases"), importlib.import_module("test_ops")
    for case in cases.CASES:
        for shape in case.shapes[1:3]:
            for dtype in (torch.float32, torch.bfloat16):
                for layout in (lambda t: t, test_ops.channels_last):
                    made = case.inputs(shape, dtype, "cuda")
                    tensors = [layout(t) if t.dim() == made[0].dim() else t for t in made]
                    test_ops.differentiate(case.fastnorm, tensors, layout(test_ops.cotangent(made[0])))
    torch.cuda.synchronize()


def start_sanitizers(out: Path) -> dict[str, Step]:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    steps = {}
    for tool in ("memcheck", "racecheck") if Path(program).exists() else ():
        command = [program, "--tool", tool, "--kernel-name", "kns=fastnorm", "--error-exitcode", "1"]
        if tool == "memcheck":
            command += ["--report-api-errors", "no"]  # torch asks the driver things that it may refuse
        command += [sys.executable, __file__, "--sample"]
        # without torch's cache each tensor is an allocation of its own, whose end memcheck knows
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
        steps[tool] = Step(command, out / f"{tool}.log", **environment)
    return steps


def check(out: Path, deadline: float, steps: Collection[str] = STEPS) -> dict[str, str]:
    """The tests and compute-sanitizer, by name."""
    results: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as logs:
        tests = start_tests(Path(logs)) if "tests" in steps else {}
        sanitizers = start_sanitizers(out) if "sanitizer" in steps else {}
        if tests:
            results = results_of_tests(tests, out, deadline)
        results |= {name: step.wait(deadline) for name, step in sanitizers.items()}
    missing = "sanitizer" in steps and not sanitizers
    return results | ({"compute-sanitizer": "not run: it is not installed"} if missing else {})


# ---- benchmarks

MEBI = 1 << 20


@dataclass
class Row:
    """One line of the table: medians in milliseconds."""

    op: str
    passes: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    minimum_bytes: int
    ms: dict[str, float] = field(default_factory=dict)  # by library, and "copy" of a tensor of this shape
    kernels: dict[str, float] = field(default_factory=dict)  # milliseconds of each of fastnorm's, by name

    @property
    def terabytes_per_s(self) -> float:
        return self.minimum_bytes / self.ms["fastnorm"] / 1e9

    @property
    def share_of_copy(self) -> float:
        copied = 2 * torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize
        return self.terabytes_per_s / (copied / self.ms["copy"] / 1e9)

    def speed_up(self, library: str) -> float:
        return self.ms[library] / self.ms["fastnorm"]


def _peer(module: str, name: str) -> Callable[..., nn.Module] | None:
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:  # not installed, or not for this version of torch
        return None


# Where other libraries keep their modules; all take what torch's take.
PEERS = {
    "liger LayerNorm": ("liger_kernel.transformers", "LigerLayerNorm"),
    "liger RMSNorm": ("liger_kernel.transformers", "LigerRMSNorm"),
    "apex LayerNorm": ("apex.normalization", "FusedLayerNorm"),
    "apex RMSNorm": ("apex.normalization", "FusedRMSNorm"),
}


def of_images(**setting: Any) -> list[Workload]:
    large, unet = (128, 256, 56, 56), (32, 320, 64, 64)
    return [
        *(
            Workload("BatchNorm", *alike("BatchNorm2d", shape[1]), shape, **setting)
            for shape in ((128, 64, 56, 56), large, (256, 1024, 14, 14))
        ),
        Workload(
            "BatchNorm + add + ReLU",
            *fused("BatchNorm2d", "relu", large[1]),
            large,
            residual=True,
            moved=(3, 4),
            **setting,
        ),
        *(
            Workload("GroupNorm", *alike("GroupNorm", 32, shape[1]), shape, **setting)
            for shape in (unet, (128, 512, 28, 28))
        ),
        Workload(
            "GroupNorm + SiLU",
            *fused("GroupNorm", "silu", 32, unet[1]),
            unet,
            **setting,
        ),
        Workload("InstanceNorm", *alike("InstanceNorm2d", 64, affine=True), (32, 64, 128, 128), **setting),
        Workload("LRN", *alike("LocalResponseNorm", 5), (256, 96, 55, 55), **setting),
        Workload(
            "LRN within channels",
            lambda: fastnorm().LocalResponseNorm(5, region="intra"),
            WithinChannel,
            (256, 96, 55, 55),
            **setting,
        ),
        Workload("Dropout2d", *alike("Dropout2d", 0.5), large, moved=(2, 2), **setting),
    ]


def of_rows(dtype: torch.dtype) -> list[Workload]:
    shapes, square = ((16384, 4096), (1024, 12288), (32768, 1024), (1024, 65536)), (8192, 8192)
    return [
        *(
            Workload(name, *alike(name, shape[1]), shape, dtype=dtype, peers=(f"liger {name}", f"apex {name}"))
            for name in ("LayerNorm", "RMSNorm")
            for shape in shapes
        ),
        *(Workload(n, *alike(n, 0.5), square, dtype=dtype, moved=(2, 2)) for n in ("Dropout", "AlphaDropout")),
        Workload(
            "DropPath", lambda: fastnorm().DropPath(0.5), lambda: DropPath(0.5), square, dtype=dtype, moved=(2, 2)
        ),
    ]


def of_the_host() -> list[Workload]:
    """Sizes at which the host's work is the time."""
    image, rows = (4, 16, 8, 8), (16, 256)
    return [
        Workload("BatchNorm", *alike("BatchNorm2d", 16), image),
        Workload("GroupNorm", *alike("GroupNorm", 4, 16), image),
        Workload("LRN", *alike("LocalResponseNorm", 5), image),
        Workload("LayerNorm", *alike("LayerNorm", 256), rows),
        Workload("Dropout", *alike("Dropout", 0.5), rows, moved=(2, 2)),
    ]


def benches() -> list[Workload]:
    dtypes, layouts = (torch.bfloat16, torch.float32), ("contiguous", "channels_last")
    found = of_the_host()
    for dtype in dtypes:
        found += [bench for layout in layouts for bench in of_images(dtype=dtype, layout=layout)] + of_rows(dtype)
    return found


def libraries(bench: Workload, others: tuple[str, ...]) -> dict[str, nn.Module]:
    """The modules to compare, by library: fastnorm's, torch's and of the others those that can be imported."""
    modules = {"fastnorm": bench.ours(), "torch": bench.theirs()}
    for peer in bench.peers:
        if peer in others and (make := _peer(*PEERS[peer])):
            modules[peer.split()[0]] = make(bench.shape[-1])
    modules = {name: module.to("cuda", bench.dtype) for name, module in modules.items()}
    if "compile" in others:
        torch._dynamo.reset()
        modules["compile"] = torch.compile(bench.theirs().to("cuda", bench.dtype), dynamic=False)
    return modules


def forward_and_backward(module: nn.Module, dy: Tensor, inputs: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """For each pass a function that does what comes before it and returns the pass."""
    leaves = [*inputs, *module.parameters()]

    def backward() -> Callable[[], Any]:
        y = module(*inputs)
        return lambda: torch.autograd.grad(y, leaves, dy)

    return {"forward": lambda: lambda: module(*inputs), "backward": backward}


def kernel_times(prepare: Callable[[], Callable[[], Any]], clock: CudaClock) -> dict[str, float]:
    """Milliseconds of each kernel that a call starts, the mean of a few calls that find the L2 cache filled."""
    calls = [prepare() for _ in range(3)]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for call in calls:
            clock.other.zero_()
            call()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profile.events() or ():
        if "fastnorm" in event.name:
            name = event.name.replace("fastnorm::cuda::(anonymous namespace)::", "").split("(")[0]
            found[name] = found.get(name, 0.0) + event.device_time / 1e3 / len(calls)
    return found


def measure(bench: Workload, clock: CudaClock, others: tuple[str, ...]) -> list[Row]:
    """A row for each pass; ``others`` are peers and "compile"."""

    def make() -> Tensor:
        t = torch.randn(bench.shape, device="cuda").to(bench.dtype)
        return t if bench.layout == "contiguous" else t.movedim(1, -1).contiguous().movedim(-1, 1)

    x, dy, target = make(), make(), make()
    inputs = [x.requires_grad_(), *([make().requires_grad_()] if bench.residual else [])]
    passes = {name: forward_and_backward(module, dy, inputs) for name, module in libraries(bench, others).items()}
    rows = []
    for index, passed in enumerate(("forward", "backward")):
        prepare = {name: both[passed] for name, both in passes.items()}
        prepare["copy"] = lambda: lambda: target.copy_(x.detach())
        times = by_turns(prepare, clock, tiny=bench.numel < MEBI, seconds=0.3)
        row = Row(
            bench.op, passed, bench.shape, str(bench.dtype)[6:], bench.layout,
            bench.moved[index] * x.numel() * x.element_size(), {name: t.median * 1e3 for name, t in times.items()},
            kernel_times(prepare["fastnorm"], clock),
        )  # fmt: skip
        rows.append(row)
    return rows


def benchmark(
    deadline: float, rows: list[Row], missing: list[str], write: Callable[[], None], *, compiled_share: float = 0.5
) -> None:
    """Adds the rows, and what there was no time for; `write` after each. torch.compile takes the most, so it stops
    first, after its share of the time.
    """
    fastnorm().set_fallback("error")  # torch's own op would be measured under fastnorm's name
    clock = CudaClock()
    compiled: set[tuple[str, torch.dtype, str]] = set()
    started = time.monotonic()
    for bench in benches():
        name = f"{bench.op} {list(bench.shape)} {str(bench.dtype)[6:]} {bench.layout}"
        if time.monotonic() > deadline:
            missing.append(name)
            continue
        # one shape of each op
        key = bench.op, bench.dtype, bench.layout
        in_time = time.monotonic() < started + compiled_share * (deadline - started)
        compiles = key not in compiled and bench.numel >= MEBI and in_time
        if compiles:
            compiled.add(key)
        others = (*bench.peers, *(["compile"] if compiles else []))
        for tried in (others, ()) if others else ((),):  # an error may be a peer's or the compiler's
            try:
                rows += measure(bench, clock, tried)
                break
            except Exception as error:  # the other rows are still worth having
                what = f"{name} beside {', '.join(tried)}" if tried else name
                missing.append(f"{what}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        write()


# ---- report


def geometric_mean(values: list[float]) -> float:
    return statistics.geometric_mean(values) if values else float("nan")


def machine() -> dict[str, str]:
    git = shutil.which("git") or "false"
    commit = subprocess.run([git, "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "commit": commit.stdout.strip() or "unknown",
    }


def markdown(report: dict[str, Any], rows: list[Row]) -> str:
    lines = ["# gpu-check", "", ", ".join(f"{k} {v}" for k, v in report["machine"].items()), ""]
    lines += [f"- {step}: {result}" for step, result in report["steps"].items()]
    libraries = [name for name in ("torch", "compile", "liger", "apex") if any(name in r.ms for r in rows)]
    rounds = f"Medians of {MIN_ROUNDS} to {MAX_ROUNDS} rounds in turn"
    lines += ["", f"{rounds}, CUDA events, cold L2 (tensors below a million elements:"]
    lines += ["50 calls at once). TB/s and share of the copy count the bytes that any program must move.", ""]
    lines += ["| op | pass | shape | dtype | layout | fastnorm ms | TB/s | share of copy | speed-up over: "]
    lines[-1] += " | ".join(libraries) + " |"
    lines += ["|" + "---|" * (8 + len(libraries))]
    for r in rows:
        ratios = [f"{r.speed_up(name):.2f}" if name in r.ms else "-" for name in libraries]
        shape = "x".join(map(str, r.shape))
        lines.append(
            f"| {r.op} | {r.passes} | {shape} | {r.dtype} | {r.layout} | {r.ms['fastnorm']:.4f} | "
            f"{r.terabytes_per_s:.2f} | {r.share_of_copy:.0%} | {' | '.join(ratios)} |"
        )
    lines.append("")
    for name in libraries:
        ratios = [r.speed_up(name) for r in rows if name in r.ms]
        slower = sum(ratio < 1 for ratio in ratios)
        lines.append(f"- over {name}: geometric mean {geometric_mean(ratios):.2f}, slower in {slower} of {len(ratios)}")
    lines += [f"- not measured: {name}" for name in report["not measured"]]
    return "\n".join(lines) + "\n"


def main(
    out: Path,
    *,
    built: bool = False,
    steps_wanted: Collection[str] = STEPS,
    seconds: float = SECONDS,
    compiled_share: float = 0.5,
) -> int:
    if not torch.cuda.is_available():
        print("gpu-check: needs an NVIDIA GPU, but torch sees none")
        return 1
    faulthandler.dump_traceback_later(seconds + 15, exit=True)  # nothing else ends a benchmark whose kernel hangs
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    steps: dict[str, str] = {}
    rows: list[Row] = []
    missing: list[str] = []
    report: dict[str, Any] = {"machine": machine(), "steps": steps, "not measured": missing}

    def write() -> None:
        report["seconds"] = round(time.monotonic() - started)
        report["rows"] = [
            asdict(r) | {"terabytes_per_s": r.terabytes_per_s, "share_of_copy": r.share_of_copy} for r in rows
        ]
        (out / "results.json").write_text(json.dumps(report, indent=1))
        (out / "results.md").write_text(markdown(report, rows))

    steps["build"] = "ok: made before" if built else build(out, started + min(BUILD_SECONDS, seconds))
    write()
    if not steps["build"].startswith("ok"):
        print(f"gpu-check: the build {steps['build']}, see {out}/build.log")
        return 1
    sys.path.insert(0, str(ROOT))
    now = time.monotonic()
    left = started + seconds - now
    steps |= check(out, now + (0.6 * left if "benchmarks" in steps_wanted else left), steps_wanted)
    write()
    if "benchmarks" in steps_wanted:
        benchmark(started + seconds - 0.05 * seconds, rows, missing, write, compiled_share=compiled_share)
        write()
    print((out / "results.md").read_text())
    failed = [name for name, result in steps.items() if result.startswith("failed")]
    print(f"gpu-check: {report['seconds']} s; failed: {', '.join(failed) or 'nothing'}; tables in {out}")
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.py", description="Build, tests, compute-sanitizer, benchmarks.")
    parser.add_argument("out", type=Path, metavar="DIR", help="where logs and tables go")
    parser.add_argument("--built", action="store_true", help="use the extension that is there")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="beside the build; all unless given")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (%(default)s)")
    parser.add_argument(
        "--compiled-share", type=float, default=0.5, help="of the benchmarks' time with torch.compile (%(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:] == ["--sample"]:
        sample()
    else:
        args = parse()
        sys.exit(
            main(
                args.out.resolve(),
                built=args.built,
                steps_wanted=args.steps,
                seconds=args.seconds,
                compiled_share=args.compiled_share,
            )
        )
