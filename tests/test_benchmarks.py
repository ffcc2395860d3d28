"""The benchmarks: a small run of theirs, what they count, and what the report makes of it."""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

import fastnorm

pytest.importorskip("matplotlib")
pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import harness  # noqa: E402
import memory  # noqa: E402
import report  # noqa: E402
import timing  # noqa: E402
import train_step  # noqa: E402
from workloads import Workload, alike, channel_elements  # noqa: E402


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pytest benchmarks` writes of LayerNorm on 32 elements."""
    path = tmp_path_factory.mktemp("benchmarks") / "results.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only", "--quick"]
    command += ["-k", "LayerNorm-4x8-float32", f"--benchmark-json={path}", "benchmarks/bench_layer_norm.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_XDIST_WORKER", None)  # within a worker of pytest-xdist pytest-benchmark measures nothing
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "share of copy" in done.stdout
    return path


def test_a_run_records_both_libraries(results: Path) -> None:
    content = json.loads(results.read_text())
    rows = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
    assert [row["passes"] for row in rows] == ["forward", "backward"]
    for benchmark, row in zip(content["benchmarks"], rows, strict=True):
        median = {name: one["median"] for name, one in row["seconds"].items()}
        assert set(median) == {"copy", "torch", "fastnorm"}
        assert all(0 < time < 60 for time in median.values())
        assert benchmark["stats"]["median"] == pytest.approx(median["fastnorm"])
        assert row["speed_up"]["torch"] == pytest.approx(median["torch"] / median["fastnorm"])
        assert row["gigabytes_per_s"] == pytest.approx(row["minimum_bytes"] / median["fastnorm"] / 1e9)
        for one in row["seconds"].values():
            first, third = one["quartiles"]
            assert first <= one["median"] <= third
        copied = 2 * row["tensor_bytes"] / median["copy"] / 1e9
        assert row["share_of_copy"] == pytest.approx(row["gigabytes_per_s"] / copied)
        assert row["tensor_bytes"] == 128
    assert [row["minimum_bytes"] for row in rows] == [2 * 128, 3 * 128]


def test_results_name_the_machine_but_not_the_host(results: Path) -> None:
    text = results.read_text()
    machine = json.loads(text)["machine_info"]
    assert machine["fastnorm"]["torch"] == torch.__version__
    assert machine["threads"] >= 1 and machine["device"]
    assert machine["keeps_freed_memory"] == (platform.libc_ver()[0] == "glibc")
    assert str(ROOT) not in text
    assert set(json.loads(text)["commit_info"]) == {"id", "time", "dirty"}
    assert "node" not in machine and f'"{platform.node()}"' not in text


def test_report_of_what_is_none(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    for path, message in ((tmp_path / "missing.json", "No such file"), (other, "not results of pytest benchmarks")):
        with pytest.raises(report.ReportError, match=message):
            report.write([path], tmp_path)


def test_report(results: Path, tmp_path: Path) -> None:
    """Losses are listed as such, and a file that comes later replaces rows of those before it."""
    content = json.loads(results.read_text())
    slow, fast = copy.deepcopy(content), copy.deepcopy(content)
    for changed, ratio in ((slow, 0.25), (fast, 7.0)):
        for benchmark in changed["benchmarks"]:
            benchmark["extra_info"]["speed_up"]["torch"] = ratio
    paths = [tmp_path / "slow.json", tmp_path / "fast.json"]
    for path, changed in zip(paths, (slow, fast), strict=True):
        path.write_text(json.dumps(changed))
    written = report.write(paths[:1], tmp_path / "one")
    assert {path.name for path in written} == {"README.md", "speed_up.png", "memory_limit.png", "memory_kept.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written if path.suffix == ".png")
    text = written[0].read_text()
    assert "## Slower than torch: 2 of 2 rows" in text
    assert "| LayerNorm | 2 | 0.25 | 0.25 | 2 |" in text
    text = report.write(paths, tmp_path / "both")[0].read_text()
    assert "## Slower than torch: 0 of 2 rows" in text
    assert "| LayerNorm | 2 | 7.00 | 7.00 | 0 |" in text
    with pytest.raises(report.ReportError, match="no rows"):
        report.write([_without_rows(content, tmp_path)], tmp_path)


def _without_rows(content: dict[str, Any], folder: Path) -> Path:
    path = folder / "empty.json"
    path.write_text(json.dumps({**content, "benchmarks": []}))
    return path


def test_report_of_compiled_rows(results: Path, tmp_path: Path) -> None:
    content = json.loads(results.read_text())
    for benchmark, ratio in zip(content["benchmarks"], (0.5, 8.0), strict=True):
        benchmark["extra_info"]["speed_up"] = {"torch": ratio, "compile": ratio}
    path = tmp_path / "compiled.json"
    path.write_text(json.dumps(content))
    text = report.write([path], tmp_path)[0].read_text()
    assert "| LayerNorm | 2 | 2.00 | 0.50 | 1 | 2.00 | 1 of 2 |" in text  # geometric means
    assert "## Slower than torch.compile: 1 of 2 rows" in text


def test_report_of_a_few_rows(results: Path, tmp_path: Path) -> None:
    """Of an op that no chart knows, and of one that keeps no tensor worth a chart."""
    content = json.loads(results.read_text())
    path = tmp_path / "few.json"
    for op, charts in (("Softmax", 3), ("weight_norm", 2)):
        content["benchmarks"][0]["extra_info"]["op"] = op
        path.write_text(json.dumps({**content, "benchmarks": content["benchmarks"][:1]}))
        table, *pictures = report.write([path], tmp_path / op)
        assert len(pictures) == charts
        assert all(f"]({picture.name})" in table.read_text() for picture in pictures)


def test_report_leaves_other_files_alone(results: Path, tmp_path: Path) -> None:
    """As the README in the folder of a repository; a report of before is replaced."""
    (tmp_path / "README.md").write_text("# fastnorm\n")
    with pytest.raises(report.ReportError, match="is not a report and would be lost"):
        report.write([results], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    for _ in range(2):
        report.write([results], tmp_path / "report")


def test_report_says_where_all_rows_are_from(results: Path, tmp_path: Path) -> None:
    content = json.loads(results.read_text())
    first, second = copy.deepcopy(content), copy.deepcopy(content)
    first["commit_info"], second["commit_info"] = {"id": "a" * 40, "dirty": False}, {"id": "unversioned", "dirty": True}
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, changed in zip(paths, (first, second), strict=True):
        path.write_text(json.dumps(changed))
    assert ", commit aaaaaaaa and unversioned with changes, " in report.write(paths, tmp_path / "one")[0].read_text()
    second["machine_info"]["cache_mib"] += 1
    paths[1].write_text(json.dumps(second))
    with pytest.raises(report.ReportError, match=r"second.json: of another machine than .*first.json, by cache_mib$"):
        report.write(paths, tmp_path / "two")
    del second["machine_info"]["threads"]
    paths[1].write_text(json.dumps(second))
    with pytest.raises(report.ReportError, match=r"not results of pytest benchmarks \(KeyError\('threads'\)\)"):
        report.write(paths[1:], tmp_path / "two")


def test_rows_below_the_memorys_limit_are_listed(results: Path) -> None:
    info = json.loads(results.read_text())["benchmarks"][0]["extra_info"]
    large = {**info, "tensor_bytes": 1 << 30}
    rows = [report.Row.of({**large, "share_of_copy": share}) for share in (0.5, 0.7)]
    small = report.Row.of({**info, "share_of_copy": 0.5})
    assert report.below_the_limit([*rows, small], cache_mib=32) == rows[:1]
    faster = [replace(row, speed_up={"torch": ratio}) for row, ratio in zip(rows, (0.9, 2.8), strict=True)]
    text = " ".join(report.limit_line([*faster, small], cache_mib=32))
    assert "Of the 2 rows" in text and "is 1.59." in text and "it would be 2.68, and 1 of them" in text
    assert report.limit_line([small], cache_mib=32) == []
    above = replace(rows[0], speed_up={"torch": 3.0}, share_of_copy=1.5)  # a copy's speed would not be less
    assert "it would be 3.00," in " ".join(report.limit_line([above], cache_mib=32))
    half = replace(small, tensor_bytes=16 << 20)  # as large as the cache are input and output together
    assert not half.is_memory_bound(32) and replace(half, tensor_bytes=(16 << 20) + 1).is_memory_bound(32)


def test_torch_compile_beside_torch(results: Path) -> None:
    info = json.loads(results.read_text())["benchmarks"][0]["extra_info"]
    alone = report.Row.of(info)
    slower, faster = (replace(alone, speed_up={"torch": 2.0, "compile": ratio}) for ratio in (5.0, 0.5))
    text = " ".join(report.compile_line([alone, slower, faster]))
    assert "Of the 2 rows" in text and "slower than torch itself in 1." in text
    assert "mean is 1.00, the lowest 0.50." in text
    assert report.compile_line([replace(alone, speed_up={"torch": 2.0})]) == []


def test_what_limits_a_row(results: Path) -> None:
    info = json.loads(results.read_text())["benchmarks"][0]["extra_info"]
    quiet = {name: {"median": 1.0, "quartiles": [0.95, 1.05]} for name in ("fastnorm", "torch", "copy")}
    row = report.Row.of({**info, "op": "GroupNorm + SiLU", "seconds": quiet, "page_faults": {"fastnorm": 0.0}})
    by_turns = "each slice read, then written, where a copy does both at once"
    assert report.limited_by(row) == f"{by_turns}, exponentials"
    assert report.limited_by(replace(row, op="LayerNorm")) == ""
    last = replace(row, op="BatchNorm2d", layout="channels_last")
    assert report.limited_by(last) == "inputs read twice, from the last-level cache"
    assert report.limited_by(replace(last, op="BatchNorm2d eval")) == ""
    assert report.limited_by(replace(last, layout="contiguous")) == by_turns
    faulting = replace(row, op="LocalResponseNorm", page_faults={"fastnorm": 300.0})
    assert report.limited_by(faulting) == "fresh memory, sums over windows, powers"
    noisy = replace(row, op="RMSNorm", seconds={**quiet, "copy": {"median": 1.0, "quartiles": [0.8, 1.2]}})
    assert report.limited_by(noisy) == "spread"


def test_minimum_bytes_depend_on_what_fits_in_the_cache() -> None:
    def workload(layout: str) -> Workload:
        shape = (8, 16, 32, 32)
        return Workload(
            "BatchNorm2d",
            *alike("BatchNorm2d", 16),
            shape,
            layout,
            moved_beyond_cache=(3, 5),
            slice_elements=channel_elements(shape, layout),
        )

    numel, cache = 8 * 16 * 32 * 32, 8 * 32 * 32 * 4  # one channel
    assert workload("contiguous").minimum_bytes("forward", cache) == 2 * 4 * numel
    assert workload("contiguous").minimum_bytes("both", cache - 1) == 8 * 4 * numel
    assert workload("channels_last").minimum_bytes("backward", cache) == 5 * 4 * numel
    assert workload("channels_last").minimum_bytes("backward", 4 * numel) == 3 * 4 * numel


def workloads() -> list[Workload]:
    """Of each op and layout the smallest, in float32."""
    smallest: dict[tuple[str, str], Workload] = {}
    for path in sorted((ROOT / "benchmarks").glob("bench_*.py")):
        for workload in importlib.import_module(path.stem).WORKLOADS:
            key = workload.op, workload.layout
            if workload.dtype == torch.float32 and workload.numel < getattr(smallest.get(key), "numel", math.inf):
                smallest[key] = workload
    return list(smallest.values())


@pytest.mark.parametrize("workload", workloads(), ids=str)
def test_both_sides_of_a_pair_compute_the_same(workload: Workload) -> None:
    torch.manual_seed(0)
    made = harness.subjects(replace(workload, compiles=False), "cpu")
    last = made.inputs[0].movedim(1, -1).is_contiguous() and not made.inputs[0].is_contiguous()
    assert last == (workload.layout == "channels_last")
    ours, theirs = made.modules["fastnorm"], made.modules["torch"]
    ours.load_state_dict({key.removeprefix("norm."): value for key, value in theirs.state_dict().items()})
    y = {name: made.forward(name) for name in made.modules}
    assert all(t.shape == made.dy.shape for t in y.values())
    if "rop" in workload.op:  # other masks
        assert all((t == 0).any() or "Alpha" in workload.op for t in y.values())
        return
    if workload.op != "BatchRenorm2d":  # which torch has not
        torch.testing.assert_close(y["fastnorm"], y["torch"])
        gradients = {name: made.gradients(name, y[name]) for name in made.modules}
        for a, b in zip(gradients["fastnorm"], gradients["torch"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_each_pass_times_itself_alone() -> None:
    made = harness.subjects(Workload("LayerNorm", *alike("LayerNorm", 8), (4, 8)), "cpu")
    calls: list[str] = []
    made.modules["fastnorm"].register_forward_hook(lambda *_: calls.append("forward"))
    made.inputs[0].register_hook(lambda _: calls.append("backward"))
    for passes, before, timed in (
        ("forward", [], ["forward"]),
        ("backward", ["forward"], ["backward"]),
        ("both", [], ["forward", "backward"]),
    ):
        calls.clear()
        call = made.prepare("fastnorm", passes)()
        assert calls == before
        calls.clear()
        call()
        assert calls == timed


def test_saved_bytes_count_a_storage_once() -> None:
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    after_convolution = x * 1.0
    assert memory.saved_bytes(lambda: after_convolution.sigmoid().tanh(), []) == 2 * x.nbytes
    twice = after_convolution.view(-1)
    assert memory.saved_bytes(lambda: (after_convolution.sin(), twice.cos()), []) == x.nbytes
    view = after_convolution[:2]
    assert memory.saved_bytes(lambda: view.exp() + view.sin(), []) == x.nbytes + x.nbytes // 2
    layer = nn.Linear(16, 16)
    assert memory.saved_bytes(lambda: layer(after_convolution), layer.parameters()) == x.nbytes
    dropout = fastnorm.Dropout(0.5)
    assert memory.saved_bytes(lambda: dropout(after_convolution), []) == 16  # the mask's seed and offset


def test_peak_bytes_is_what_was_allocated_at_once() -> None:
    one = 4 << 20

    def run() -> None:
        a = torch.empty(one, dtype=torch.int8)
        b = torch.empty(one, dtype=torch.int8)
        del a, b
        torch.empty(one, dtype=torch.int8)

    assert memory.peak_bytes(run, "cpu") == 2 * one
    held: list[torch.Tensor | None] = [torch.empty(one, dtype=torch.int8)]

    def replace_held() -> None:  # as a training step does with its gradients
        held[0] = None
        held[0] = torch.empty(one, dtype=torch.int8)

    assert memory.peak_bytes(replace_held, "cpu") == 0


def test_calls_are_timed_by_turns() -> None:
    order: list[str] = []

    class Clock(timing.CpuClock):
        def page_faults(self) -> int:
            return 100 * len(order)

        def seconds(self, calls: list[Any], tiny: bool) -> float:
            order.append(calls[0]())
            return {"a": 1.0, "b": 2.0}[order[-1]] * len(calls)

    prepare = {name: lambda name=name: lambda: name for name in "ab"}
    times = timing.by_turns(prepare, Clock(), tiny=True, seconds=0.0)
    rounds = list(zip(order[::2], order[1::2], strict=True))
    assert len(rounds) == timing.WARM_UP + timing.MIN_ROUNDS
    assert set(rounds) == {("a", "b"), ("b", "a")}  # none always comes after the same
    assert times["a"].rounds == (1.0,) * timing.MIN_ROUNDS
    assert (times["b"].median, times["b"].quartiles) == (2.0, (2.0, 2.0))
    assert times["a"].page_faults == 100 / timing.REPEATS  # in a call


def test_training_step(capfd: pytest.CaptureFixture[str]) -> None:
    """A network with one normalisation: the fused one keeps no more than torch's, and the table has a line for each."""

    def network() -> nn.Module:
        layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Dropout(0.5)]
        return nn.Sequential(*layers, nn.AvgPool2d(30), nn.Flatten(), nn.Linear(8, 10))

    training = train_step.Training("small", network, 4)
    assert isinstance(train_step.variants(training)["fused"][2], nn.Identity)
    results = train_step.measure(training, "channels_last", "cpu", seconds=0.0)
    assert [result.library for result in results] == ["torch", "converted", "fused", train_step.RECOMPUTED]
    theirs, converted, fused, recomputed = results
    assert theirs.share_in_norms is not None and 0 < theirs.share_in_norms < 1
    assert fused.saved_bytes <= converted.saved_bytes < theirs.saved_bytes  # dropout's mask
    assert fused.saved_bytes - recomputed.saved_bytes == 4 * 8 * 30 * 30 * 4  # the second convolution's input
    assert 0 < fused.peak_bytes < theirs.peak_bytes
    assert len(train_step.markdown(results).splitlines()) == 6
    assert "before the profiling started" not in capfd.readouterr().err


def test_table_of_training_steps() -> None:
    def result(library: str, median: float, share: float | None, kept: int) -> train_step.Result:
        quartiles = (0.9 * median, 1.1 * median)
        return train_step.Result("small", 4, "contiguous", "cpu", library, median, quartiles, 7, share, 3 << 20, kept)

    text = train_step.markdown([result("torch", 1.0, 0.2, 10 << 20), result("fused", 0.9, None, 8 << 20)])
    assert "| small, batch 4 | contiguous | torch | 1000 ±10% |  | 20% |  | 3 | 10 |  |" in text
    assert "| small, batch 4 | contiguous | fused | 900 ±10% | 1.11 |  | 50% | 3 | 8 | 80% |" in text


def test_share_of_a_gpus_time() -> None:
    """What an op has others do is its own; kernels, which a profile lists as well, do not count twice."""

    def event(name: str, time: float, *children: Any, device: Any = DeviceType.CPU) -> SimpleNamespace:
        made = SimpleNamespace(name=name, device_type=device, device_time_total=time, cpu_children=children)
        made.cpu_parent = None
        for child in children:
            child.cpu_parent = made
        return made

    def listed(*events: Any) -> list[Any]:
        return [one for made in events for one in (made, *listed(*made.cpu_children))]

    events = listed(
        event("aten::conv2d", 4.0, event("aten::cudnn_convolution", 4.0)),
        event("aten::batch_norm", 2.0, event("aten::cudnn_batch_norm", 2.0)),
        event("aten::relu", 1.0, event("aten::clamp_min", 1.0)),
        event("aten::add_", 1.0),
        event("autograd::engine::evaluate_function: X", 2.5, event("aten::cudnn_batch_norm_backward", 2.0)),
        event("autograd::engine::evaluate_function: Y", 1.0, event("aten::add_", 1.0)),
        event("Optimizer.step#SGD.step", 0.5, event("aten::add_", 0.5)),
    )
    kernels = [event("sgemm", 5.0, device=DeviceType.CUDA), event("bn_fw_tr", 5.0, device=DeviceType.CUDA)]
    assert train_step.share_of_kernels([*events, *kernels]) == pytest.approx(0.5)  # of 12


def test_training_steps_say_where_they_are_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the words of the other benchmarks."""
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--networks", "ViT", "--out", str(tmp_path)])
    monkeypatch.setattr(train_step, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(harness, "keeps_freed_memory", lambda: True)
    monkeypatch.setattr(train_step, "measure", lambda *_: [])
    train_step.main()
    content = json.loads((tmp_path / "train_step.json").read_text())
    assert set(content) == {"machine_info", "commit_info", "results"}
    about = report.machine_line(content["machine_info"], [content["commit_info"]])
    assert (tmp_path / "train_step.md").read_text().startswith(f"{about}\n\n| network |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--networks AlexNet", "none of ResNet-18, VGG 32-64-128, ViT, 6 blocks of 192 contains 'AlexNet'"),
        ("--batch 0", "--batch: at least 1, got 0"),
        ("--device cuda", "--device: torch sees no GPU"),
        ("--seconds -1", "--seconds: at least 0, got -1.0"),
        ("--seconds nan", "--seconds: at least 0, got nan"),
        (f"--out {Path(__file__).name}", f"--out: [Errno 17] File exists: '{Path(__file__).name}'"),
    ],
)
def test_training_step_refuses(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_step.py", *arguments.split()])
    monkeypatch.chdir(Path(__file__).parent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train_step, "measure", lambda *_: [])
    with pytest.raises(SystemExit):
        train_step.main()
    assert message in capsys.readouterr().err
