"""What of ``make gpu-check`` needs no GPU: its steps, and what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fastnorm

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
from workloads import Workload, alike  # noqa: E402


def python(script: str, log: Path) -> gpu_check.Step:
    return gpu_check.Step([sys.executable, "-c", script], log)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_check.py", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout == "gpu-check: needs an NVIDIA GPU, but torch sees none\n"
    assert not (tmp_path / "out").exists()


def test_steps(tmp_path: Path) -> None:
    soon = time.monotonic() + 60
    good = python("print('first'); print('== 3 passed ==')", tmp_path / "good.log")
    bad = python("print('1 failed'); exit(3)", tmp_path / "bad.log")
    assert gpu_check.results_of_tests({"a": good, "b": bad}, tmp_path, soon) == {
        "tests a": "3 passed",
        "tests b": "failed: exit code 3: 1 failed",
    }
    log = (tmp_path / "tests.log").read_text()
    assert log.index("a\nfirst\n== 3 passed") < log.index("b\n1 failed")


def test_a_step_that_hangs_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    child = "import time; print('child', flush=True); time.sleep(3); print('still here', flush=True)"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    step = python(script, tmp_path / "log")
    while "child" not in step.last_line():
        time.sleep(0.05)
    start = time.monotonic()
    assert step.wait(start) == "failed: not done in time"
    time.sleep(max(0.0, 3.5 - (time.monotonic() - start)))
    assert step.last_line() == "child"


def row(op: str, **ms: float) -> gpu_check.Row:
    return gpu_check.Row(op, "forward", (1024, 1000), "bfloat16", "contiguous", 2 * 2 * 1024 * 1000, ms)


def fake_check(monkeypatch: pytest.MonkeyPatch, checked: dict[str, str]) -> None:
    """A GPU that measures two operations: 0.01 ms for fastnorm's, 0.02 for torch's, and an error."""

    def measure(bench: Any, clock: None, others: tuple[str, ...]) -> list[gpu_check.Row]:
        if bench.op == "LRN":
            raise RuntimeError("no kernel\nfor this")
        if "liger LayerNorm" in others:
            raise TypeError("no such argument")
        ms = {"compile": 0.02} if "compile" in others else {}
        return [row(bench.op, fastnorm=0.01, torch=0.02, copy=0.005, **ms)]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "machine", lambda: {"device": "none"})
    monkeypatch.setattr(gpu_check, "build", lambda out, deadline: "ok")
    monkeypatch.setattr(gpu_check, "check", lambda out, deadline, steps: checked)
    monkeypatch.setattr(gpu_check, "CudaClock", lambda: None)
    monkeypatch.setattr(
        gpu_check, "benches", lambda: [b for b in gpu_check.of_the_host() if b.op in ("LRN", "Dropout")]
    )
    monkeypatch.setattr(gpu_check, "measure", measure)
    monkeypatch.setattr(gpu_check.faulthandler, "dump_traceback_later", lambda *_, **__: None)


def test_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_check(monkeypatch, {"tests dropout": "3 passed, 1 xfailed", "memcheck": "ok"})
    assert gpu_check.main(tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["steps"] == {"build": "ok", "tests dropout": "3 passed, 1 xfailed", "memcheck": "ok"}
    assert [r["op"] for r in report["rows"]] == ["Dropout"]
    assert report["rows"][0]["terabytes_per_s"] == pytest.approx(0.4096)
    assert report["rows"][0]["share_of_copy"] == pytest.approx(0.5)
    assert report["not measured"] == ["LRN [4, 16, 8, 8] float32 contiguous: RuntimeError: no kernel"]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| Dropout | forward | 1024x1000 | bfloat16 | contiguous | 0.0100 | 0.41 | 50% | 2.00 |" in text
    assert "- over torch: geometric mean 2.00, slower in 0 of 1" in text
    assert "failed: nothing" in capsys.readouterr().out


def test_a_failed_step_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_check(monkeypatch, {"racecheck": "failed: not done in time"})
    assert gpu_check.main(tmp_path) == 1
    assert "- racecheck: failed: not done in time" in (tmp_path / "results.md").read_text()


def test_rows_are_written_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_check(monkeypatch, {})
    rows: list[gpu_check.Row] = []
    missing: list[str] = []
    written: list[tuple[int, int]] = []
    write = lambda: written.append((len(rows), len(missing)))  # noqa: E731
    gpu_check.benchmark(time.monotonic() + 60, rows, missing, write)
    assert written == [(0, 1), (1, 1)]
    gpu_check.benchmark(time.monotonic() - 1, rows, missing, write)
    assert len(rows) == 1 and len(missing) == 3 and len(written) == 2  # there was no time


def fake_benchmark(monkeypatch: pytest.MonkeyPatch, *benches: Workload) -> tuple[list[gpu_check.Row], list[str]]:
    fake_check(monkeypatch, {})
    monkeypatch.setattr(gpu_check, "benches", lambda: benches)
    rows: list[gpu_check.Row] = []
    missing: list[str] = []
    gpu_check.benchmark(time.monotonic() + 60, rows, missing, lambda: None)
    return rows, missing


def layer_norm(*shape: int, **settings: Any) -> Workload:
    return Workload("LayerNorm", *alike("LayerNorm", shape[-1]), shape, **settings)


def test_one_large_shape_of_an_op_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, missing = fake_benchmark(monkeypatch, layer_norm(4, 8), layer_norm(2048, 1024), layer_norm(1024, 2048))
    assert ["compile" in r.ms for r in rows] == [False, True, False] and not missing


def test_a_peer_that_fails_takes_no_row_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, missing = fake_benchmark(monkeypatch, layer_norm(2048, 1024, peers=("liger LayerNorm",)))
    assert [r.op for r in rows] == ["LayerNorm"]
    name = "LayerNorm [2048, 1024] float32 contiguous beside liger LayerNorm, compile"
    assert missing == [f"{name}: TypeError: no such argument"]


def test_torchs_op_is_not_measured_for_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    fastnorm.set_fallback("silent")
    fake_benchmark(monkeypatch, layer_norm(4, 8))
    with pytest.raises(NotImplementedError, match="layer_norm: no kernel"):
        fastnorm.functional.layer_norm(torch.ones(4, 8, dtype=torch.complex64), (8,))


def test_every_row_is_of_its_own() -> None:
    found = [(bench.op, bench.shape, bench.dtype, bench.layout) for bench in gpu_check.benches()]
    assert len(set(found)) == len(found) > 50


def test_an_extension_built_elsewhere_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_check(monkeypatch, {})
    monkeypatch.setattr(gpu_check, "build", lambda out, deadline: "failed: exit code 1")
    assert gpu_check.main(tmp_path) == 1
    assert gpu_check.main(tmp_path, built=True) == 0
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == {"build": "ok: made before"}


def test_chosen_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_check(monkeypatch, {})
    wanted: list[Any] = []
    monkeypatch.setattr(gpu_check, "check", lambda out, deadline, steps: wanted.append(steps) or {"tests": "1 passed"})
    assert gpu_check.main(tmp_path, steps_wanted=("tests",)) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    assert wanted == [("tests",)] and report["rows"] == [] and report["steps"]["tests"] == "1 passed"


def test_the_tests_of_a_device_are_found() -> None:
    found = {Path(path).name for path in gpu_check.tested_files()}
    assert {"test_ops.py", "test_cuda.py", "test_autocast.py", "test_determinism.py"} <= found
    assert not found & {"test_cuda_on_cpu.py", "test_cuda_emulator.py", "test_cuda_check.py"}
