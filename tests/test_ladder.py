"""The CIFAR-10 ladder (examples/ladder): rungs, training, taking up again, the command line, reports, torchrun."""

from __future__ import annotations

import base64
import csv
import html.parser
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ladder import checkpoint, checks, cli, evaluate, mixing, models, pictures, processes, report, rungs, train
from ladder.recipe import Recipe, Stage
from ladder_small import SMALL, no_network, small_images, use_small_presets, use_small_synthetic, write_binary
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

EXAMPLES = Path(cli.__file__).parents[1]
LADDER = [rung for rung in rungs.RUNGS if "ladder" in rung.groups]


@pytest.fixture
def small_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_presets(monkeypatch)


@pytest.fixture
def short_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SWEEP_RATES", (1e-5, 1e-3, 1e30))
    monkeypatch.setattr(checks, "SWEEP_STEPS", 8)


def recipe_of(name: str, **changes: object) -> Recipe:
    return replace(rungs.recipe_of(rungs.find(name), SMALL), **{"batch_size": 32, "epochs": 1, **changes})


# Rungs


def test_rungs_climb() -> None:
    assert [rung.number for rung in LADDER] == ["0", "1", "2", "3", "4", "5", "5b", "6", "6b", "7", "8", "9"]
    names = [rung.name for rung in rungs.RUNGS]
    assert len(set(names)) == len(names)
    for i, rung in enumerate(rungs.RUNGS):
        assert rung.on is None or rung.on in names[:i]  # what a rung stands on comes before it
        below = SMALL if rung.on is None else rungs.recipe_of(rungs.find(rung.on), SMALL)
        assert rungs.recipe_of(rung, SMALL) == replace(below, **rung.changes)
        assert (rungs.recipe_of(rung, SMALL) == below) == (not rung.changes)
    assert rungs.recipe_of(LADDER[0], SMALL) == SMALL


@pytest.mark.parametrize(
    "wanted, names",
    [
        ("ladder", [rung.name for rung in LADDER]),
        ("all", [rung.name for rung in rungs.RUNGS]),
        ("dropout, 0", ["baseline", "dropout"]),
        ("1,noise,NOISE", ["noise"]),
        ("averaging,6B", ["instancenorm", "tta", "mc_dropout"]),
    ],
)
def test_select(wanted: str, names: list[str]) -> None:
    assert [rung.name for rung in rungs.select(wanted)] == names


@pytest.mark.parametrize("wanted", ["bathnorm", "", "noise,", "99", "-1"])
def test_unknown_rung_lists_the_known_ones(wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([f"--rungs={wanted}"])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "known: 0 baseline, 1 noise, 2 batchnorm, 3 dropout" in message


# Training


def stopping_after(steps: int) -> object:
    """An on_step that presses Ctrl-C."""
    count = 0

    def on_step(*_: int) -> None:
        nonlocal count
        count += 1
        if count == steps:
            raise KeyboardInterrupt

    return on_step


@pytest.mark.parametrize("rung", rungs.RUNGS, ids=lambda rung: rung.name)
def test_every_rung_trains_two_steps(rung: rungs.Rung) -> None:
    recipe = recipe_of(rung.name)
    steps: list[tuple[int, int]] = []
    first, again = (
        train.train_rung(
            recipe, small_images(), backend="fastnorm", seed=0, on_step=lambda *counts: steps.append(counts)
        )
        for _ in range(2)
    )
    assert first.history == again.history  # bit for bit
    assert first.val_accuracy == again.val_accuracy
    assert first.epochs == len(recipe.stages) == len(first.history.val_loss)
    assert {epochs for epochs, _ in steps} == {first.epochs}
    assert 0 <= first.val_accuracy <= 1
    assert np.isfinite(first.history.train_loss + first.history.val_loss).all()
    if rung.number in ("0", "1", "2", "3"):
        assert len(steps) == 2 * 2


@pytest.mark.parametrize(
    "changes",
    [
        {"augment": (rungs.FLIP,)},
        {"mix": mixing.MixUp()},
        {"l1": 1e-3},
        {"l2": 1e-3},
        {"imbalance": 0.05},
        {"class_weights": True},
        {"resample": "over"},
        {"resample": "under"},
    ],
    ids="-".join,
)
def test_every_change_reaches_training(changes: dict[str, object]) -> None:
    plain, changed = (
        train.train_rung(recipe_of("baseline", **fields), small_images(), backend="torch", seed=0).history
        for fields in ({}, changes)
    )
    assert plain != changed


def test_the_final_figures_are_averaged_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def evaluated(model: object, images: torch.Tensor, labels: object, averaging: object = None, *_, **__):
        asked.append((len(images), averaging))
        return 1.0, 0.5

    monkeypatch.setattr(train, "evaluate", evaluated)
    recipe = recipe_of("tta", curve_images=10)
    train.train_rung(recipe, small_images(), backend="torch", seed=0)
    assert asked == [(10, None), (50, recipe.averaging), (64, recipe.averaging)]


def test_another_seed_gives_other_numbers_and_another_backend_works() -> None:
    recipe = recipe_of("crop")
    seeds = [train.train_rung(recipe, small_images(), backend="torch", seed=seed).history for seed in (0, 1)]
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize("backend", models.BACKENDS)
def test_training_learns(backend: str) -> None:
    recipe = recipe_of("batchnorm", epochs=15, lr=3e-3, augment=())
    outcome = train.train_rung(recipe, small_images(), backend=backend, seed=0)
    assert outcome.train_accuracy > 0.9
    assert outcome.history.train_loss[-1] < 0.5 * outcome.history.train_loss[0]


def test_every_step_trains_in_training_mode() -> None:
    trainer = train.Trainer(recipe_of("batchnorm", epochs=3), small_images(), backend="torch", seed=0)
    while not trainer.done:
        trainer.train_epoch()
    assert trainer.model.state_dict()["stages.0.0.norm.num_batches_tracked"] == 3 * 2


def test_penalty_acts() -> None:
    plain, penalised = (
        train.Trainer(recipe_of("baseline", l2=l2, epochs=3), small_images(), backend="torch", seed=0) for l2 in (0, 1)
    )
    for trainer in (plain, penalised):
        trainer.train_epoch()
    assert sum(k.square().sum() for k in penalised.kernels) < 0.99 * sum(k.square().sum() for k in plain.kernels)


@pytest.mark.parametrize(
    "name, factors",
    [("decay", [1, 1, 0.96, 0.96, 0.96**2, 0.96**2]), ("linear", [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])],
)
def test_schedule_acts_at_every_step(name: str, factors: list[float]) -> None:
    trainer = train.Trainer(recipe_of(name, epochs=3, norm=None), small_images(), backend="torch", seed=0)
    rates = []
    while not trainer.done:
        trainer.train_epoch(lambda steps: rates.append(trainer.optimiser.param_groups[0]["lr"]))
    assert rates == pytest.approx([1e-3 * factor for factor in factors])


def test_every_epoch_draws_anew() -> None:
    recipe = recipe_of("noise", lr=0.0, epochs=2)  # the weights stay, and no two epochs see the same images
    first, second = train.train_rung(recipe, small_images(), backend="torch", seed=0).history.train_loss
    assert first != second


def test_stage_lengths() -> None:
    stages = (Stage(0.5), Stage(0.25), Stage(0.25))
    assert train.stage_lengths(replace(SMALL, stages=stages, epochs=25)) == [12, 7, 6]
    assert train.stage_lengths(replace(SMALL, stages=stages, epochs=1)) == [1, 1, 1]
    assert train.stage_lengths(replace(SMALL, epochs=7)) == [7]


def test_stages_change_optimiser_classes_and_head() -> None:
    trainer = train.Trainer(recipe_of("adam_sgd", epochs=4), small_images(), backend="torch", seed=0)
    kinds = []
    while not trainer.done:
        trainer.train_epoch()
        kinds.append(type(trainer.optimiser).__name__)
    assert kinds == ["Adam", "Adam", "SGD", "SGD"]

    trainer = train.Trainer(recipe_of("finetune", epochs=2), small_images(), backend="torch", seed=0)
    trainer.train_epoch()
    assert set(trainer.val_labels.tolist()) == set(rungs.PRETRAINED)
    assert set(trainer.labels[trainer.indices].tolist()) == set(rungs.PRETRAINED)
    before = trainer.model.head.weight.clone(), trainer.model.stages[0][0].conv.weight.clone()
    trainer._enter_afresh(1)
    assert set(trainer.val_labels.tolist()) == set(rungs.NOVEL)
    assert not torch.equal(trainer.model.head.weight, before[0])
    assert torch.equal(trainer.model.stages[0][0].conv.weight, before[1])


def test_early_stopping_returns_the_best_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.1, 0.3, 0.2, 0.3, 0.25])
    monkeypatch.setattr(train, "evaluate", lambda *args, **kwargs: (1.0, next(accuracies, 0.9)))
    recipe = recipe_of("early_stopping", epochs=40, patience=3)
    trainer = train.Trainer(recipe, small_images(), backend="torch", seed=0)
    weights = []
    while not trainer.done:
        trainer.train_epoch()
        weights.append(trainer.model.head.weight.clone())
    assert len(weights) == 2 + 3
    assert not torch.equal(trainer.model.head.weight, weights[1])
    trainer.outcome()
    assert torch.equal(trainer.model.head.weight, weights[1])


def test_stagewise_goes_on_from_the_best_weights() -> None:
    stages = (Stage(0.75), Stage(0.25, lr=0.0, from_best=True))
    recipe = recipe_of("decay", epochs=12, stages=stages, lr=0.03, norm=None, dropout=0.0)
    trainer = train.Trainer(recipe, small_images(), backend="torch", seed=0)
    while not trainer.done:
        trainer.train_epoch()
    values = trainer.history.val_accuracy
    assert values[9:] == [max(values[:9])] * 3 != values[8:9] * 3  # a learning rate of 0 leaves the weights alone


def test_imbalance_reaches_training() -> None:
    trainer = train.Trainer(recipe_of("class_weights"), small_images(), backend="torch", seed=0)
    trainer.train_epoch()
    counts = torch.bincount(trainer.labels[trainer.indices], minlength=10)
    assert counts.sum() < 64
    assert counts[0] == (trainer.labels == 0).sum()
    assert trainer.class_weights is not None
    assert trainer.class_weights[9] > trainer.class_weights[0]


def test_divergence_stops_the_rung() -> None:
    with pytest.raises(train.Diverged, match="the training loss became nan in epoch 1"):
        train.train_rung(recipe_of("baseline", lr=1e30), small_images(), backend="torch", seed=0)
    # One step an epoch: its loss is that of the weights before it.
    with pytest.raises(train.Diverged, match="the validation loss became nan in epoch 1"):
        train.train_rung(recipe_of("baseline", lr=1e30, batch_size=64), small_images(), backend="torch", seed=0)


def test_accuracy_is_measured_in_eval_mode_on_clean_images() -> None:
    class Fixed(torch.nn.Module):
        """Answers with the class that `labels` has next; class 0 in training mode."""

        def __init__(self, labels: torch.Tensor) -> None:
            super().__init__()
            self.left = list(labels.split(evaluate.EVAL_BATCH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            labels = torch.zeros(len(x), dtype=torch.int64) if self.training else self.left.pop(0)
            return 20.0 * torch.nn.functional.one_hot(labels, 10)

    labels = torch.arange(1, 1_301) % 9 + 1
    images = small_images().train_images[:1].expand(1_300, -1, -1, -1)
    assert evaluate.evaluate(Fixed(labels), images, labels) == (pytest.approx(0.0, abs=1e-6), 1.0)
    wrong = torch.where(torch.arange(1_300) < 325, 0, labels)
    assert evaluate.evaluate(Fixed(wrong), images, labels) == (pytest.approx(5.0, abs=1e-3), 0.75)


# Taking up again


@pytest.mark.parametrize(
    "name, steps", [("wide", 7), ("adam_sgd", 3), ("adam_sgd", 6), ("early_stopping", 5), ("spectralnorm", 3)]
)
def test_resumed_equals_uninterrupted(tmp_path: Path, name: str, steps: int) -> None:
    recipe = recipe_of(name, epochs=4)
    setting = {"backend": "fastnorm", "seed": 0}
    whole = train.train_rung(recipe, small_images(), **setting)
    saved = tmp_path / "saved.pt"
    with pytest.raises(KeyboardInterrupt):
        train.train_rung(recipe, small_images(), **setting, saved=saved, on_step=stopping_after(steps))
    torch.manual_seed(99)  # as in another process
    trained = []
    resumed = train.train_rung(
        recipe, small_images(), **setting, saved=saved, resume=True, on_step=lambda *_: trained.append(1)
    )
    assert len(trained) < 4 * 2  # some epochs came from the checkpoint
    assert resumed.history == whole.history  # bit for bit
    assert (resumed.val_accuracy, resumed.train_accuracy) == (whole.val_accuracy, whole.train_accuracy)


def test_a_checkpoint_s_recipe_is_the_same_in_another_process() -> None:
    program = (
        "from ladder.rungs import PRESETS, RUNGS, recipe_of\n"
        "for rung in RUNGS: print(repr(recipe_of(rung, PRESETS['quick'].recipe)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=EXAMPLES, capture_output=True, text=True, check=True)
    start = rungs.PRESETS["quick"].recipe
    assert done.stdout.splitlines() == [repr(rungs.recipe_of(rung, start)) for rung in rungs.RUNGS]
    assert " at 0x" not in done.stdout  # an address, by chance the same


def test_bad_checkpoint_is_named(tmp_path: Path) -> None:
    saved = tmp_path / "saved.pt"
    setting = {"backend": "torch", "seed": 0, "saved": saved}
    recipe = recipe_of("baseline", epochs=2)
    train.train_rung(recipe, small_images(), **setting)
    good = saved.read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match=r"saved\.pt: cannot be gone on from: .* other settings"):
        train.train_rung(replace(recipe, lr=0.5), small_images(), **setting, resume=True)
    with pytest.raises(checkpoint.CheckpointError, match="other settings"):
        train.train_rung(recipe, small_images(), **setting | {"seed": 1}, resume=True)
    for content in (good[: len(good) // 2], b"", b"%PDF-1.7 and more", b"\x80\x02cos\nsystem\n.", b"\x80\x02}}}s."):
        saved.write_bytes(content)
        with pytest.raises(checkpoint.CheckpointError, match=r"saved\.pt: truncated, or not a checkpoint") as caught:
            train.train_rung(recipe, small_images(), **setting, resume=True)
        assert "\n" not in str(caught.value)


def test_checkpoint_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    saved = tmp_path / "saved.pt"
    checkpoint.save(saved, {"epoch": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, hard))  # a write stops halfway, as on a full disk
    try:
        with pytest.raises(checkpoint.CheckpointError, match=r"saved\.pt: cannot be written: File too large"):
            checkpoint.save(saved, {"epoch": 2, "weights": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.load(saved, torch.device("cpu")) == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["saved.pt"]


# Checks


@pytest.mark.usefixtures("short_sweep")
def test_checks_pass_on_a_sound_network() -> None:
    found = checks.run_checks(recipe_of("batchnorm"), small_images(), backend="fastnorm", seed=0)
    assert found.problems == []
    assert found.initial_loss == pytest.approx(math.log(10), abs=0.1)
    assert found.overfit_accuracy == 1.0
    slow, right, wild = found.sweep.values()
    assert slow is not None and right is not None and right < slow - 0.05
    assert wild is None


@pytest.mark.usefixtures("short_sweep")
def test_checks_see_wrong_labels_and_a_wild_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "HEAD_SCALE", 30.0)
    monkeypatch.setattr(checks, "OVERFIT_EPOCHS", 3)
    images = small_images()
    same = replace(images, train_images=images.train_images[:1].expand(64, -1, -1, -1))  # one image, all labels
    found = checks.run_checks(recipe_of("baseline"), same, backend="torch", seed=0)
    assert len(found.problems) == 2
    assert "the first loss must be near log(10) = 2.303" in found.problems[0]
    assert "must be learnt to 100 %" in found.problems[1]


# The command line


def run_cli(out: Path, *arguments: str) -> int:
    common = ["--dataset", "synthetic", "--out", str(out), "--device", "cpu", "--backend", "torch"]
    return cli.main([*common, *arguments], open_url=no_network)


def results_in(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def is_png(content: bytes) -> bool:
    return content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 5_000


class _Page(html.parser.HTMLParser):
    """The pictures and the table cells of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[bytes] = []
        self.cells: list[str] = []
        self.tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tag = tag
        if tag == "img":
            source = dict(attributes)["src"] or ""
            assert source.startswith("data:image/png;base64,")
            self.images.append(base64.b64decode(source.split(",", 1)[1]))

    def handle_data(self, text: str) -> None:
        if self.tag == "td" and text.strip():
            self.cells.append(text)


@pytest.mark.usefixtures("small_presets", "short_sweep")
def test_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a"
    arguments = ["--epochs", "2", "--batch-size", "16", "--seed", "5", "--check"]
    assert run_cli(out, "--backend", "fastnorm", "--rungs", "0,2,decay,layernorm,tta,cosine", *arguments) == 0
    printed = capsys.readouterr().out
    content = results_in(out)
    assert content["dataset"] == "synthetic"
    assert (content["backend"], content["seed"], content["batch_size"], content["epochs"]) == ("fastnorm", 5, 16, 2)
    assert (content["preset"], content["processes"]) == ("quick", 1)
    assert content["threads"] == torch.get_num_threads()
    assert (content["interrupted"], content["failed"]) == (None, [])
    assert set(content["versions"]) == {"python", "torch", "numpy", "fastnorm"}
    assert len(content["checks"]["lr_sweep"]["lr"]) == len(checks.SWEEP_RATES)
    by_name = {rung["name"]: rung for rung in content["rungs"]}
    assert list(by_name) == ["baseline", "batchnorm", "decay", "layernorm", "tta", "cosine"]
    for rung in content["rungs"]:
        assert 0 <= rung["train_accuracy"] <= 1
        assert (rung["val_accuracy"] == rung["history"]["val_accuracy"][-1]) or rung["name"] == "tta"
        assert rung["seconds"] > rung["train_seconds"][-1] > 0 and rung["step_ms"] > 0
        assert {len(values) for values in rung["history"].values()} == {2}
        assert f"{rung['val_accuracy']:.1%}" in printed
    assert by_name["baseline"]["change"] is by_name["batchnorm"]["change"] is None  # `noise` is not among them
    for name in ("layernorm", "tta", "cosine"):
        wanted = by_name[name]["val_accuracy"] - by_name["decay"]["val_accuracy"]
        assert by_name[name]["change"] == pytest.approx(wanted)
    assert by_name["tta"]["history"] == by_name["decay"]["history"]
    assert "NOT CIFAR-10's" in printed

    drawn = {"ladder.png", "beside.png", "zoo.png", "curves.png", "lr_sweep.png"}
    files = {path.name for path in out.iterdir()} - {"checkpoints"}
    assert files == {"results.json", "results.csv", "table.md", "report.html"} | drawn
    assert list((out / "checkpoints").iterdir()) == []
    assert all(is_png((out / name).read_bytes()) for name in drawn)
    with (out / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == list(by_name)
    for line in lines:
        assert float(line["val_accuracy"]) == by_name[line["name"]]["val_accuracy"]
    page = _Page((out / "report.html").read_text())
    assert sorted(page.images) == sorted((out / name).read_bytes() for name in drawn)
    assert set(page.cells) >= {rung["adds"] for rung in content["rungs"]}
    assert (out / "table.md").read_text().count("\n") == 2 + 6

    # The report alone, again.
    (out / "ladder.png").unlink()
    assert cli.main(["--report", str(out)]) == 0
    assert (out / "table.md").read_text() in capsys.readouterr().out
    assert is_png((out / "ladder.png").read_bytes())


@pytest.mark.parametrize("content", [None, "{", "[1]", "{}", '{"rungs": []}'])
def test_report_of_what_is_none(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert cli.main(["--report", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "results.json: " in message and message.count("\n") == 1


@pytest.mark.usefixtures("small_presets")
@pytest.mark.parametrize("lost", ["failed", "seconds_to_94", None])
def test_report_of_what_lacks_something(tmp_path: Path, lost: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(tmp_path, "--rungs", "0,1") == 0
    content = results_in(tmp_path)
    content.pop(lost, None)
    content["rungs"][1] = {name: value for name, value in content["rungs"][1].items() if name != lost} if lost else 1
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert cli.main(["--report", str(tmp_path)]) == 2
    wanted = {"failed": "the run has no failed", None: "rungs[1] has no number"}.get(lost, f"rungs[1] has no {lost}")
    assert capsys.readouterr().err.endswith(f"results.json: not a results.json of this version: {wanted}\n")


@pytest.mark.usefixtures("small_presets")
@pytest.mark.parametrize("finished", [0, 2])
def test_interrupted_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finished: int
) -> None:
    common = ["--rungs", "0,1,2", "--epochs", "3"]
    assert run_cli(tmp_path / "whole", *common) == 0
    real = train.train_rung
    calls = []

    def interrupted(*args: object, **kwargs: object) -> train.Outcome:
        calls.append(1)
        if len(calls) > finished:
            kwargs["on_step"] = stopping_after(4)
        return real(*args, **kwargs)

    out = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(cli, "train_rung", interrupted)
        assert run_cli(out, *common) == 130
    names = ["baseline", "noise", "batchnorm"]
    content = results_in(out)
    assert [rung["name"] for rung in content["rungs"]] == names[:finished]
    assert content["interrupted"] == names[finished]
    assert (out / "curves.png").exists() == (finished > 0)
    assert names[finished] in capsys.readouterr().err

    assert run_cli(out, *common, "--resume", "--seed", "1") == 2  # another run's
    assert "of a run with seed 0, this one has 1" in capsys.readouterr().err
    again = []
    monkeypatch.setattr(cli, "train_rung", lambda *args, **kwargs: again.append(1) or real(*args, **kwargs))
    assert run_cli(out, *common, "--resume") == 0
    assert len(again) == 3 - finished
    resumed, whole = results_in(out), results_in(tmp_path / "whole")
    assert resumed["interrupted"] is None
    for one, other in zip(resumed["rungs"], whole["rungs"], strict=True):
        assert one["history"] == other["history"]
        assert one["val_accuracy"] == other["val_accuracy"]
        assert one["change"] == other["change"]


@pytest.mark.parametrize(("minutes", "epochs"), [("0.001", 1), ("0.49", 2), ("0.5", 3), ("1e308", 3)])
def test_as_many_epochs_as_there_is_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], minutes: str, epochs: int
) -> None:
    """An epoch of the two rungs takes 4.5 + 3 s, and is paid for once more by having been timed."""
    use_small_synthetic(monkeypatch)
    preset = rungs.Preset(64, replace(SMALL, epochs=3))
    monkeypatch.setattr(cli, "PRESETS", {name: preset for name in rungs.PRESETS})
    clock = iter((0.0, 4.5, 10.0, 13.0))

    def timed(*args: Any, on_step: Callable[[], object], **kwargs: Any) -> float:
        start = next(clock)
        train.seconds_of_an_epoch(*args, on_step=on_step, **kwargs)
        return next(clock) - start

    monkeypatch.setattr(cli, "seconds_of_an_epoch", timed)
    assert run_cli(tmp_path / "minutes", "--rungs", "0,1", "--minutes", minutes) == 0
    assert f"takes 7.5 s: {epochs} of 3 epochs, for --minutes {float(minutes):g}\n" in (out := capsys.readouterr().out)
    assert ("--epochs 3 trains all." in out) == (epochs < 3)
    assert run_cli(tmp_path / "epochs", "--rungs", "0,1", "--epochs", str(epochs)) == 0
    one, other = results_in(tmp_path / "minutes"), results_in(tmp_path / "epochs")
    assert one["epochs"] == other["epochs"] == epochs
    assert [rung["history"] for rung in one["rungs"]] == [rung["history"] for rung in other["rungs"]]

    assert run_cli(tmp_path / "minutes", "--rungs", "0,1,2", "--resume") == 0  # which times nothing
    assert [rung["epochs"] for rung in results_in(tmp_path / "minutes")["rungs"]] == [epochs] * 3


def test_an_out_that_cannot_be_written_to_is_noticed_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_small_synthetic(monkeypatch)
    monkeypatch.setattr(cli, "seconds_of_an_epoch", lambda *_, **__: pytest.fail("timed"))
    (tmp_path / "file").touch()
    assert run_cli(tmp_path / "file" / "out", "--rungs", "0", "--minutes", "1") == 2
    assert "file" in (message := capsys.readouterr().err) and message.count("\n") == 1


def test_seconds_of_an_epoch() -> None:
    """Of all its steps and the validation, also where it diverges."""
    steps: list[int] = []
    recipe = replace(SMALL, batch_size=16)
    settings: dict[str, Any] = {"backend": "torch", "seed": 0, "on_step": lambda: steps.append(1)}
    start = time.perf_counter()
    seconds = train.seconds_of_an_epoch(recipe, small_images(), **settings)
    assert len(steps) == 4 and 0 < seconds < time.perf_counter() - start
    assert train.seconds_of_an_epoch(replace(recipe, lr=math.inf), small_images(), **settings) > 0


@pytest.mark.usefixtures("small_presets")
def test_a_killed_run_is_taken_up_with_its_own_settings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in its first rung, with no time to write anything but a checkpoint; beside the results of another run."""

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    common = ["--rungs", "0", "--epochs", "2"]
    real = train.train_rung
    assert run_cli(tmp_path, *common, "--seed", "1") == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(cli, "train_rung", lambda *args, **kwargs: real(*args, **kwargs | {"on_epoch": killed}))
        run_cli(tmp_path, *common)
    assert (tmp_path / "checkpoints" / "baseline.pt").exists()
    assert run_cli(tmp_path, *common, "--resume", "--backend", "fastnorm") == 2
    assert "is of a run with backend torch, this one has fastnorm" in capsys.readouterr().err
    assert run_cli(tmp_path, *common, "--resume") == 0


@pytest.mark.usefixtures("small_presets")
def test_resume_refuses_other_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many of the same name, but labels of a file are others."""
    folder, out = write_binary(tmp_path / "data", count=20), tmp_path / "out"
    common = [out, "--data", str(folder), "--dataset", "cifar10", "--rungs"]
    assert run_cli(*common, "0") == 0
    for name in ("data_batch_1.bin", "test_batch.bin"):
        path = folder / name
        before = path.read_bytes()
        changed = bytearray(before)
        changed[::3073] = bytes((label + 1) % 10 for label in before[::3073])  # a label and an image each
        path.write_bytes(changed)
        assert run_cli(*common, "0,1", "--resume") == 2
        assert re.search(r"is of a run with images \w{16}, this one has \w{16}", capsys.readouterr().err)
        path.write_bytes(before)
    assert run_cli(*common, "0,1", "--resume") == 0


@pytest.mark.usefixtures("small_presets")
@pytest.mark.parametrize("resume", ((), ("--resume",)), ids=("anew", "resume"))
def test_another_run_in_the_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], resume: tuple[str, ...]
) -> None:
    real, codes = train.train_rung, []

    def train_beside_another(*args: Any, **kwargs: Any) -> Any:
        before = (tmp_path / "results.json").read_bytes()
        monkeypatch.setattr(cli, "train_rung", real)
        codes.append(run_cli(tmp_path, "--rungs", "1", *resume))
        assert (tmp_path / "results.json").read_bytes() == before
        return real(*args, **kwargs)

    monkeypatch.setattr(cli, "train_rung", train_beside_another)
    assert run_cli(tmp_path, "--rungs", "0") == 0 and codes == [2]
    assert f"error: --out: another run is writing to {tmp_path}\n" in capsys.readouterr().err
    assert run_cli(tmp_path, "--rungs", "0,1", "--resume") == 0  # nothing is left behind


@pytest.mark.usefixtures("small_presets")
def test_results_of_an_earlier_run_are_kept_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(tmp_path, "--rungs", "0") == 0
    assert "earlier run" not in capsys.readouterr().out
    first = (tmp_path / "results.json").read_bytes()
    assert run_cli(tmp_path, "--rungs", "0,1", "--resume") == 0  # adds to them
    assert not (tmp_path / "results.previous.json").exists()
    (tmp_path / "results.json").write_bytes(first)
    assert run_cli(tmp_path, "--rungs", "1") == 0
    assert "holds results of an earlier run: now results.previous.json" in capsys.readouterr().out
    assert (tmp_path / "results.previous.json").read_bytes() == first
    assert [rung["name"] for rung in results_in(tmp_path)["rungs"]] == ["noise"]


def test_ctrl_c_while_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(EXAMPLES / "cifar_ladder.py"), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted")


@pytest.mark.usefixtures("small_presets")
@pytest.mark.parametrize("module, name", [(cli, "load"), (report, "write_json"), (report, "write_report")])
def test_ctrl_c_between_the_rungs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: object,
    name: str,
) -> None:
    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, pressed)
    assert run_cli(tmp_path, "--rungs", "0") == 130
    assert capsys.readouterr().err.strip() == "interrupted"


@pytest.mark.usefixtures("small_presets", "short_sweep")
def test_resume_keeps_what_the_checks_found(tmp_path: Path) -> None:
    assert run_cli(tmp_path, "--rungs", "0", "--check") == 0
    found = results_in(tmp_path)["checks"]
    assert run_cli(tmp_path, "--rungs", "0,1", "--resume") == 0
    assert results_in(tmp_path)["checks"] == found is not None


@pytest.mark.usefixtures("small_presets")
def test_another_run_leaves_nothing_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_cli(tmp_path, "--rungs", "decay,layernorm") == 0
    assert (tmp_path / "zoo.png").exists() and "layernorm" in (tmp_path / "report.html").read_text()
    real = train.train_rung
    stopped = stopping_after(1)
    monkeypatch.setattr(cli, "train_rung", lambda *args, **kwargs: real(*args, **kwargs | {"on_step": stopped}))
    assert run_cli(tmp_path, "--rungs", "0") == 130
    assert not list(tmp_path.glob("*.png"))
    page = (tmp_path / "report.html").read_text()
    assert "layernorm" not in page and "Interrupted in rung baseline" in page
    assert [(tmp_path / name).read_text().count("\n") for name in ("table.md", "results.csv")] == [2, 1]


@pytest.mark.usefixtures("small_presets")
def test_the_largest_numbers_are_taken(tmp_path: Path) -> None:
    largest = str(2**63 - 1)
    assert run_cli(tmp_path, "--rungs", "batchnorm", "--seed", largest, "--batch-size", largest) == 0


@pytest.mark.usefixtures("small_presets")
def test_a_new_run_removes_the_ladder_s_checkpoints_and_no_other_file(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("noise.pt", "wide.part", "mine.pt", "notes.txt"):
        (folder / name).write_bytes(b"an earlier run's, or none of the ladder's")
    assert run_cli(tmp_path, "--rungs", "0") == 0
    assert sorted(path.name for path in folder.iterdir()) == ["mine.pt", "notes.txt"]


def break_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rung diverges."""
    broken = replace(rungs.find("noise"), changes={"lr": 1e30})
    listed = [broken if rung.name == "noise" else rung for rung in rungs.RUNGS]
    for module in (rungs, cli):
        monkeypatch.setattr(module, "RUNGS", tuple(listed))
    monkeypatch.setattr(rungs, "find", lambda name: next(rung for rung in listed if rung.name == name))
    monkeypatch.setattr(cli, "recipe_of", lambda rung, start: replace(start, **rung.changes))


@pytest.mark.usefixtures("small_presets")
def test_a_rung_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_noise(monkeypatch)
    assert run_cli(tmp_path, "--rungs", "0,1,2") == 1
    content = results_in(tmp_path)
    assert [rung["name"] for rung in content["rungs"]] == ["baseline", "batchnorm"]
    assert content["failed"][0]["name"] == "noise"
    assert "the training loss became nan" in content["failed"][0]["reason"]
    assert "1 noise          failed" in capsys.readouterr().out
    assert "the training loss became nan" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("small_presets")
def test_resume_keeps_what_failed_until_it_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        break_noise(patch)
        assert run_cli(tmp_path, "--rungs", "0,1") == 1
        failed = results_in(tmp_path)["failed"]
        assert [one["name"] for one in failed] == ["noise"]
        assert run_cli(tmp_path, "--rungs", "2", "--resume") == 0  # of the rungs that were asked for none failed
        assert results_in(tmp_path)["failed"] == failed
        assert "noise" in (tmp_path / "report.html").read_text()
        assert run_cli(tmp_path, "--rungs", "0,1,2", "--resume") == 1
        assert results_in(tmp_path)["failed"] == failed
    assert run_cli(tmp_path, "--rungs", "1", "--resume") == 0
    content = results_in(tmp_path)
    assert content["failed"] == []
    assert [rung["name"] for rung in content["rungs"]] == ["baseline", "noise", "batchnorm"]


@pytest.mark.usefixtures("small_presets", "short_sweep")
def test_a_failed_check_stops_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "OVERFIT_EPOCHS", 1)
    assert run_cli(tmp_path, "--rungs", "0", "--check") == 1
    assert "check baseline failed: 64 images must be learnt to 100 %" in capsys.readouterr().err
    assert results_in(tmp_path)["rungs"] == []
    assert is_png((tmp_path / "lr_sweep.png").read_bytes())


@pytest.mark.usefixtures("small_presets")
def test_trains_on_published_files(tmp_path: Path) -> None:
    write_binary(tmp_path / "cifar-10-batches-bin", count=20)
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--rungs", "0", "--backend", "torch"]
    assert cli.main(arguments, open_url=no_network) == 0
    content = results_in(tmp_path / "out")
    assert (content["dataset"], content["train_images"], content["val_images"]) == ("cifar10", 64, 20)
    assert str(tmp_path) not in json.dumps(content)


def test_bad_data_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_binary(tmp_path) / "data_batch_4.bin"
    path.write_bytes(path.read_bytes()[:-7])
    assert cli.main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--backend", "torch"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "data_batch_4.bin" in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_what_only_fastnorm_has_needs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(tmp_path, "--rungs", "baseline,batchrenorm,stochastic_depth") == 2
    assert "not in torch.nn: stochastic_depth, batchrenorm;" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--epochs", "0"], "wanted an integer of at least 1, got '0'"),
        (["--minutes", "0"], "wanted a positive number, got '0'"),
        (["--minutes", "nan"], "wanted a positive number, got 'nan'"),
        (["--minutes", "5", "--epochs", "5"], "not allowed with argument --minutes"),
        (["--batch-size", "many"], "wanted an integer of at least 1, got 'many'"),
        (["--seed", "-1"], "at least 0, got '-1'"),
        (["--seed", str(2**63)], "at most 9223372036854775807, got '9223372036854775808'"),
        (["--batch-size", str(2**63)], "at most 9223372036854775807, got '9223372036854775808'"),
        (["--device", "abacus"], "got 'abacus'"),
        (["--device", "meta"], "got 'meta'"),
        (["--backend", "numpy"], "fastnorm"),
        (["--preset", "slow"], "quick"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1


def test_a_batch_has_an_image_for_each_process() -> None:
    args = cli._parser().parse_args(["--batch-size", "3"])
    with pytest.raises(cli._SettingsError, match="--batch-size: wanted an image for each of 4 processes, got 3"):
        cli._Run(args, torch.device("cpu"), processes.Processes(0, 4), no_network)
    cli._Run(args, torch.device("cpu"), processes.Processes(0, 3), no_network)


def test_a_terminal_without_the_minus_sign(tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "results" / "quick_cpu" / "results.json", tmp_path)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "cifar_ladder.py"), "--report", str(tmp_path)],
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        encoding="latin-1",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "| 91.0 % | 61.1 % | ?0.4 |" in done.stdout


@pytest.mark.parametrize("module", ["tqdm", "matplotlib"])
def test_a_module_that_is_not_installed_is_named(module: str) -> None:
    run = "runpy.run_path('cifar_ladder.py', run_name='__main__')"
    program = f"import runpy, sys; sys.modules[{module!r}] = None; {run}"
    done = subprocess.run([sys.executable, "-c", program], cwd=EXAMPLES, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"error: needs {module}" in done.stderr and done.stderr.count("\n") == 1


# Tables and pictures


def finished(name: str, accuracy: float) -> dict:
    history = train.History([2.0, 1.0], [0.3, 0.6], [1.9, 1.2], [0.35, 0.5])
    return report.entry(rungs.find(name), train.Outcome(accuracy, 0.75, 12.34, 5.0, [6.0, 12.0], 1000, 2, history))


def test_tables() -> None:
    results = report.content({}, [finished("baseline", 0.5), finished("noise", 0.48), finished("cosine", 0.6)])
    lines = report.table(results).splitlines()
    assert lines[2].split()[-5:] == ["75.0%", "50.0%", "78%", "80.2%", "12"]
    assert lines[3].split()[-6:] == ["75.0%", "48.0%", "−2.0", "80%", "80.9%", "12"]
    rows = report.markdown(results).splitlines()
    assert rows[2].split("|")[-7:-1] == [" 75.0 % ", " 50.0 % ", "  ", " 78 % ", " 80.2 % ", " 12 "]
    assert rows[4].startswith("| cosine | cosine | 75.0 % | 60.0 % |  |  |  | 12 |")
    assert {row.count("|") for row in rows} == {9}


def test_accuracies_on_other_classes_are_not_compared() -> None:
    entries = [finished("decay", 0.6), finished("novel", 0.8), finished("finetune", 0.9)]
    changes = [rung["change"] for rung in report.content({}, entries)["rungs"]]
    assert changes == [None, None, pytest.approx(0.1)]


def test_epochs_are_those_that_were_trained() -> None:
    """Not the preset's, where a rung has a number of its own."""
    start = {"dataset": "cifar10", "preset": "full", "train_images": 8_000, "val_images": 10_000, "epochs": 75}
    rungs = [finished("speed", 0.5), {**finished("decay", 0.5), "epochs": 5}]
    for entries, wanted in ((rungs[:1], "2 epochs"), (rungs, "2 to 5 epochs")):
        results = report.content(start, entries)
        assert f"Trained on 8000 images for {wanted};" in report.footnotes(results)
        figure = pictures.learning_curves(results)
        assert figure.get_suptitle().endswith(f"CIFAR-10, full preset: 8000 training images, {wanted}")


def test_make_trains_four_rungs() -> None:
    """A comma is also what make divides a function's arguments by."""
    # As from a shell: the make that runs the tests hands its own flags, level and ARGS on.
    outside = {name: value for name, value in os.environ.items() if "MAKE" not in name and name != "ARGS"}
    for arguments, wanted in (
        ([], "--rungs 0,1,2,3 --minutes 5"),
        (["ARGS=--rungs 4,5 --seed 1"], "--rungs 4,5 --seed 1"),
    ):
        command = ["make", "--dry-run", "ladder", *arguments]
        run = subprocess.run(command, cwd=EXAMPLES.parent, env=outside, capture_output=True, text=True, check=True)
        assert run.stdout.splitlines()[-1].endswith(f"cifar_ladder.py {wanted}")


def test_time_to_the_goal() -> None:
    history = train.History([1.0] * 3, [0.9] * 3, [1.0] * 3, [0.93, 0.94, 0.95])
    outcome = train.Outcome(0.95, 0.99, 9.0, 5.0, [2.0, 4.5, 6.0], 1000, 3, history)
    results = report.content(
        {"dataset": "cifar10", "train_images": 50_000, "val_images": 10_000},
        [report.entry(rungs.find("speed"), outcome), finished("baseline", 0.5)],
    )
    assert [rung["seconds_to_94"] for rung in results["rungs"]] == [4.5, None]
    assert "94 % of val after 4.5 s of training steps: speed." in report.footnotes(results)


def test_a_bar_names_its_rung_where_that_is_not_the_one_before_it() -> None:
    start = {"dataset": "synthetic", "preset": "quick", "train_images": 8000, "val_images": 50, "epochs": 25}
    names = ("baseline", "noise", "decay", "instancenorm", "capacity")
    figure = pictures.ladder_chart(report.content(start, [finished(name, 0.5) for name in names]))
    assert figure is not None
    last = [label.get_text().splitlines()[-1] for label in figure.axes[0].get_xticklabels()]
    on = [line if line.startswith("(on ") else None for line in last]
    assert on == [None, None, "(on crop)", None, "(on 6 decay)"]


@pytest.mark.parametrize("val_images, wanted", [(10_000, "validation (the first 2000 images)"), (50, "validation")])
def test_curves_say_what_they_are_of(val_images: int, wanted: str) -> None:
    start = {"dataset": "synthetic", "preset": "quick", "train_images": 8000, "val_images": val_images, "epochs": 25}
    figure = pictures.learning_curves(report.content(start, [finished("baseline", 0.5)]))
    assert figure is not None
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == wanted


def test_a_rate_that_is_too_large_is_seen() -> None:
    sweep = {"lr": [0.1, 1.0, 10.0], "loss": [1.0, 50.0, None], "initial_loss": 2.3, "chosen": 0.1, "steps": 5}
    start = {"dataset": "synthetic", "preset": "quick", "train_images": 8000, "val_images": 50, "epochs": 25}
    results = report.content(start, [], checks={"rung": "baseline", "lr_sweep": sweep})
    figure = pictures.sweep_chart(results)
    assert figure is not None
    drawn = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert drawn["measured"] == [0.1] and drawn["larger, or not finite"] == [1.0, 10.0]


@pytest.mark.parametrize("draw", [pictures.ladder_chart, pictures.learning_curves])
@pytest.mark.parametrize("count", (1, 4, 6, 12))
def test_legend_and_title_are_not_cut_off(count: int, draw: Callable[[dict], Figure]) -> None:
    start = {"dataset": "synthetic", "preset": "quick", "train_images": 8000, "val_images": 10_000, "epochs": 25}
    figure = draw(report.content(start, [finished(rung.name, 0.5) for rung in LADDER[:count]]))
    FigureCanvasAgg(figure).draw()
    titles = [figure._suptitle] if figure.get_suptitle() else [figure.axes[0].title]
    for drawn in (*figure.legends, *titles):
        extent = drawn.get_window_extent()
        assert extent.x0 >= 0 and extent.x1 <= figure.bbox.width


@pytest.mark.parametrize("draw", [pictures.ladder_chart, pictures.beside_chart, pictures.zoo_chart])
def test_what_is_written_in_a_bar_has_room_there(draw: Callable[[dict], Figure]) -> None:
    start = {"dataset": "synthetic", "preset": "quick", "train_images": 8000, "val_images": 5000, "epochs": 1}
    values = {"baseline": 0.05, "noise": 0.1, "batchnorm": 0.2, "decay": 0.15, "no_norm": 0.5, "layernorm": 0.1}
    values |= {"dropout": 0.5, "l1l2": 0.6}
    entries = [{**finished(name, value), "step_ms": 200 * value} for name, value in values.items()]
    figure = draw(report.content(start, entries))
    FigureCanvasAgg(figure).draw()
    written = [(axes, text) for axes in figure.axes for text in axes.texts]
    white = [(axes, text.get_window_extent()) for axes, text in written if text.get_color() == "white"]
    assert 0 < len(white) < len(written)
    for axes, text in white:
        bars = [bar.get_window_extent() for bar in axes.patches]
        assert any(bar.contains(*text.p0) and bar.contains(*text.p1) for bar in bars)


def test_milliseconds() -> None:
    assert [pictures.milliseconds(value) for value in (0.1234, 12.34, 999.4, 999.6, 1234.5)] == [
        "0.123", "12.3", "999", "1000", "1234",
    ]  # fmt: skip


def test_epochs_of() -> None:
    assert [pictures.epochs_of(counts) for counts in ([1], [8, 8], [12, 1, 8])] == [
        "1 epoch",
        "8 epochs",
        "1 to 12 epochs",
    ]


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_curve_of_one_epoch_is_seen(epochs: int) -> None:
    start = {"dataset": "synthetic", "preset": "quick", "train_images": 8000, "val_images": 10_000, "epochs": epochs}
    one = finished("baseline", 0.5)
    history = {name: values[:1] * epochs for name, values in one["history"].items()}
    drawn = pictures.learning_curves(report.content(start, [{**one, "epochs": epochs, "history": history}]))
    assert f"training images, {epochs} epoch{'s' * (epochs > 1)}" in drawn.get_suptitle()
    for axes in drawn.axes[:2]:
        means = [line for line in axes.lines if not line.get_label().startswith("_")]
        assert len(means) == 2
        assert all((line.get_marker() == "D") == (epochs == 1) for line in means)


def test_exponential_mean() -> None:
    assert pictures.exponential_mean([1.0, 2.0, 0.0]) == pytest.approx([1.0, 1.5, 0.75])


# Several processes


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert processes.local_device(torch.device("cuda")) == torch.device("cuda", 3)
    assert processes.local_device(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert processes.local_device(torch.device("cpu")) == torch.device("cpu")
    for there, device in ((True, "cuda:3"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert processes.local_device(None) == torch.device(device)
    monkeypatch.delenv("LOCAL_RANK")
    assert processes.local_device(torch.device("cuda")) == torch.device("cuda", 0)


def run_processes(tmp_path: Path, count: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The small ladder under torchrun."""
    launcher = tmp_path / "launch.py"
    launcher.write_text(
        "import os\n"
        "import sys\n"
        "import pytest\n"
        "from ladder import cli, rungs\n"
        "from ladder_small import use_small_presets\n"
        "use_small_presets(pytest.MonkeyPatch())\n"
        "rungs.ERASING.__class__.__call__ = lambda self, images, generator: images\n"  # it draws by process
        "status = cli.main(sys.argv[1:])\n"
        "sys.stdout.flush(), sys.stderr.flush()\n"
        # A thread of torch's own that asks for the interpreter while it ends aborts the process, on rare occasions.
        "os._exit(status)\n"
    )
    path = [str(EXAMPLES), str(Path(__file__).parent), str(Path(models.__file__).parents[2])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":  # the loopback address, whatever this machine calls itself
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += [str(launcher), "--device", "cpu", "--epochs", "2"]
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)


def test_torchrun(tmp_path: Path) -> None:
    """Two processes on halves of each batch come to what one comes to on the whole, but for rounding."""
    both = []
    for count in (1, 2):
        out = tmp_path / str(count)
        done = run_processes(tmp_path, count, "--dataset", "synthetic", "--rungs", "0,2,wide", "--out", str(out))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("written:") == 1  # one of them speaks
        both.append(results_in(out))
    assert [results["processes"] for results in both] == [1, 2]
    for name in ("baseline", "batchnorm"):
        one, two = (next(r for r in results["rungs"] if r["name"] == name)["history"] for results in both)
        # Sums in another order, carried through four steps of Adam.
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-3)
        assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-3)
    assert re.fullmatch(r"[\d.]+", str(both[1]["rungs"][2]["val_accuracy"]))


@pytest.mark.parametrize("kind", ["data", "out"])
def test_what_one_process_fails_at_ends_all_of_them(tmp_path: Path, kind: str) -> None:
    """With its one line; the traceback is torchrun's own."""
    (tmp_path / "file").write_text("x")
    arguments = {
        "data": ["--data", str(write_binary(tmp_path / "broken", count=0))],
        "out": ["--dataset", "synthetic", "--out", str(tmp_path / "file" / "out")],
    }[kind]
    done = run_processes(tmp_path, 2, *arguments)
    assert done.returncode != 0
    assert done.stderr.count("cifar_ladder.py: error: ") == 1
    assert done.stderr.count("Traceback (most recent call last)") == 1 and "exitcode  : 2" in done.stderr
