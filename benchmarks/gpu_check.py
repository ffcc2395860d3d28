"""``make gpu-check OUT=DIR``: on a machine with an NVIDIA GPU, builds for it, tests, looks for errors, and measures.

1. The extension for the present device, in place.
2. The tests that run on a CUDA device, several processes at once.
3. compute-sanitizer, memcheck and racecheck, on every case of the table at two small shapes.
4. The benchmarks: fastnorm, torch, torch.compile and whichever of Liger and apex can be imported.

Logs, ``results.json`` and ``results.md`` go to DIR. The exit code is 1 if there is no GPU, or 1 to 3 failed.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timing import MAX_ROUNDS, MIN_ROUNDS, CudaClock, by_turns
from torch import Tensor, nn
from workloads import DropPath, WithinChannel, Workload, alike, fastnorm, fused

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
SECONDS = 9 * 60  # for everything; what the benchmarks have not reached by then, they say

# ---- build, tests, compute-sanitizer


def run(command: list[str], log: Path, **environment: str) -> bool:
    """Whether the command succeeds; what it says goes to the log."""
    with log.open("w") as out:
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, stdout=out, stderr=out)
    return done.returncode == 0


def build(out: Path) -> bool:
    major, minor = torch.cuda.get_device_capability()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return run(command, out / "build.log", TORCH_CUDA_ARCH_LIST=f"{major}.{minor}", FASTNORM_CUDA="1")


def test(out: Path) -> dict[str, str]:
    """The last line of pytest for each share of the tests; a share is an op, or what belongs to none."""
    sys.path.insert(0, str(TESTS))
    cases = importlib.import_module("cases")
    ops = sorted({case.op for case in cases.CASES})
    shares = {op: f"cuda and {op}" for op in ops} | {"rest": f"cuda and not ({' or '.join(ops)})"}
    running = {}
    for name, expression in shares.items():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", expression, "tests"]
        command += [f"--ignore=tests/test_cuda_{name}.py" for name in ("on_cpu", "emulator", "traffic")]  # need no GPU
        log = (out / f"tests_{name}.log").open("w")
        running[name] = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    results = {}
    for name, process in running.items():
        process.wait()
        words = (out / f"tests_{name}.log").read_text().strip().splitlines()
        results[name] = words[-1].strip("= ") if words else "no output"
        if process.returncode != 0 and "failed" not in results[name]:
            results[name] += f" (failed: exit code {process.returncode})"
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


def sanitize(out: Path) -> dict[str, str]:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        return {"compute-sanitizer": "not run: it is not installed"}
    results = {}
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--kernel-name", "kns=fastnorm", "--error-exitcode", "1"]
        if tool == "memcheck":
            command += ["--report-api-errors", "no"]  # torch asks the driver things that it may refuse
        command += [sys.executable, __file__, "--sample"]
        # without torch's cache each tensor is an allocation of its own, whose end memcheck knows
        ok = run(command, out / f"{tool}.log", PYTORCH_NO_CUDA_MEMORY_CACHING="1", PYTHONPATH=str(ROOT))
        results[tool] = "ok" if ok else "failed"
    return results


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
    images = [bench for dtype in dtypes for layout in layouts for bench in of_images(dtype=dtype, layout=layout)]
    return [*images, *(bench for dtype in dtypes for bench in of_rows(dtype)), *of_the_host()]


def libraries(bench: Workload, compiles: bool) -> dict[str, nn.Module]:
    """The modules to compare, by library."""
    modules = {"fastnorm": bench.ours(), "torch": bench.theirs()}
    for peer in bench.peers:
        if make := _peer(*PEERS[peer]):
            modules[peer.split()[0]] = make(bench.shape[-1])
    modules = {name: module.to("cuda", bench.dtype) for name, module in modules.items()}
    if compiles:
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


def measure(bench: Workload, clock: CudaClock, compiles: bool) -> list[Row]:
    """A row for each pass."""

    def make() -> Tensor:
        t = torch.randn(bench.shape, device="cuda").to(bench.dtype)
        return t if bench.layout == "contiguous" else t.movedim(1, -1).contiguous().movedim(-1, 1)

    x, dy, target = make(), make(), make()
    inputs = [x.requires_grad_(), *([make().requires_grad_()] if bench.residual else [])]
    tiny = x.numel() < MEBI
    passes = {
        name: forward_and_backward(module, dy, inputs)
        for name, module in libraries(bench, compiles and not tiny).items()
    }
    rows = []
    for index, passed in enumerate(("forward", "backward")):
        prepare = {name: both[passed] for name, both in passes.items()}
        prepare["copy"] = lambda: lambda: target.copy_(x.detach())
        times = by_turns(prepare, clock, tiny=tiny)
        row = Row(
            bench.op, passed, bench.shape, str(bench.dtype)[6:], bench.layout,
            bench.moved[index] * x.numel() * x.element_size(), {name: t.median * 1e3 for name, t in times.items()},
        )  # fmt: skip
        rows.append(row)
    return rows


def benchmark(deadline: float) -> tuple[list[Row], list[str]]:
    """The rows, and what there was no time for. torch.compile takes the most, so it stops first."""
    clock = CudaClock()
    rows: list[Row] = []
    missing: list[str] = []
    compiled: set[tuple[str, torch.dtype, str]] = set()
    started = time.monotonic()
    for bench in benches():
        name = f"{bench.op} {list(bench.shape)} {str(bench.dtype)[6:]} {bench.layout}"
        if time.monotonic() > deadline:
            missing.append(name)
            continue
        # one shape of each op, in the first half of the time
        key = bench.op, bench.dtype, bench.layout
        compiles = key not in compiled and time.monotonic() < (started + deadline) / 2
        compiled.add(key)
        try:
            rows += measure(bench, clock, compiles)
        except Exception as error:  # a peer's, perhaps: the other rows are still worth having
            missing.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return rows, missing


# ---- report


def geometric_mean(values: list[float]) -> float:
    return statistics.geometric_mean(values) if values else float("nan")


def machine() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
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


def main(out: Path) -> int:
    if not torch.cuda.is_available():
        print("gpu-check: needs an NVIDIA GPU, but torch sees none")
        return 1
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    steps: dict[str, str] = {}
    report: dict[str, Any] = {"machine": machine(), "steps": steps, "not measured": [], "rows": []}
    rows: list[Row] = []

    def write() -> None:
        """After each step, so that a machine that is lost leaves what it had."""
        report["seconds"] = round(time.monotonic() - started)
        (out / "results.json").write_text(json.dumps(report, indent=1))
        (out / "results.md").write_text(markdown(report, rows))

    steps["build"] = "ok" if build(out) else "failed, see build.log"
    write()
    if steps["build"] != "ok":
        print(f"gpu-check: the build failed, see {out}/build.log")
        return 1
    sys.path.insert(0, str(ROOT))
    for step in (test, sanitize):
        steps |= {f"{step.__name__} {name}": result for name, result in step(out).items()}
        write()
    rows, report["not measured"] = benchmark(started + SECONDS - 30)
    report["rows"] = [
        asdict(r) | {"terabytes_per_s": r.terabytes_per_s, "share_of_copy": r.share_of_copy} for r in rows
    ]
    write()
    print((out / "results.md").read_text())
    failed = [name for name, result in steps.items() if "failed" in result or "error" in result]
    print(f"gpu-check: {report['seconds']} s; failed: {', '.join(failed) or 'nothing'}; tables in {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--sample"]:
        sample()
    elif len(sys.argv) == 2:
        sys.exit(main(Path(sys.argv[1]).resolve()))
    else:
        sys.exit("usage: gpu_check.py DIR")
