"""What a run leaves behind: the table, results.json, and the pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .rungs import Rung, previous_of
from .train import TRAIN_EVAL_IMAGES, Outcome

# Okabe and Ito's colours, told apart by the colour-blind.
VALIDATION = "#0072B2"
TRAINING = "#E69F00"
NOTES = "#444444"
PANELS_PER_ROW = 4


@dataclass(frozen=True)
class Finished:
    """A rung and what it came to."""

    number: int
    rung: Rung
    outcome: Outcome

    @property
    def label(self) -> str:
        return f"{self.number} {self.rung.name}"


def change(finished: Finished, others: Sequence[Finished]) -> float | None:
    """Validation accuracy gained over the rung before it; None where that one is not among `others`."""
    before = previous_of(finished.rung)
    for other in others:
        if other.rung is before:
            return finished.outcome.val_accuracy - other.outcome.val_accuracy
    return None


def table(finished: Sequence[Finished]) -> str:
    """The results for a terminal, accuracies in percent."""
    rows = [("rung", "what it adds", "train acc", "val acc", "change", "notes", "seconds")]
    for one in finished:
        gained, notes = change(one, finished), one.rung.notes_accuracy
        rows.append(
            (
                one.label,
                one.rung.adds,
                f"{one.outcome.train_accuracy:.1%}",
                f"{one.outcome.val_accuracy:.1%}",
                "" if gained is None else f"{100 * gained:+.1f}",
                "" if notes is None else f"{100 * notes:g}%",
                f"{one.outcome.seconds:.1f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def footnotes(run: dict[str, Any]) -> str:
    """How to read the table."""
    evaluated = min(TRAIN_EVAL_IMAGES, run["train_images"])
    notes = f"The last epoch's weights in eval mode; train acc on {evaluated} training images as they are, val acc on "
    notes += f"{run['val_images']} images; change in points against the rung before."
    if run["dataset"] != "cifar10":
        return notes + "\nSYNTHETIC IMAGES: these figures are not CIFAR-10's; the notes' are."
    if run["preset"] == "quick":
        notes += (
            f"\nThe quick preset trains on {run['train_images']} images for {run['epochs']} epochs; "
            "the notes' figures come from all 50000 and many more epochs."
        )
    return notes


def results(finished: Sequence[Finished], run: dict[str, Any], interrupted: str | None) -> dict[str, Any]:
    """The content of results.json: `run`, the interrupted rung's name or null, and one entry a finished rung.

    Accuracies are in [0, 1]; `history` has one value an epoch.
    """
    rungs = [
        {
            "number": one.number,
            "name": one.rung.name,
            "adds": one.rung.adds,
            "notes_accuracy": one.rung.notes_accuracy,
            "change": change(one, finished),
            **asdict(one.outcome),
        }
        for one in finished
    ]
    return {**run, "interrupted": interrupted, "rungs": rungs}


def write_results(out: Path, finished: Sequence[Finished], run: dict[str, Any], interrupted: str | None = None) -> Path:
    """Writes results.json into `out`; it appears whole or not at all."""
    path = out / "results.json"
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(results(finished, run, interrupted), indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def write_pictures(out: Path, finished: Sequence[Finished], run: dict[str, Any]) -> list[Path]:
    """Writes curves.png and ladder.png into `out`, nothing where no rung is finished."""
    if not finished:
        return []
    title = f"{_dataset_title(run)}, {run['preset']} preset, {run['train_images']} training images"
    paths = [out / "curves.png", out / "ladder.png"]
    for path, draw in zip(paths, (learning_curves, ladder_chart), strict=True):
        draw(finished, title).savefig(path, dpi=150)
    return paths


def _dataset_title(run: dict[str, Any]) -> str:
    return "CIFAR-10" if run["dataset"] == "cifar10" else "Synthetic images (not CIFAR-10)"


def learning_curves(finished: Sequence[Finished], title: str) -> Figure:
    """Accuracy and loss by epoch, a column a rung; every panel of a kind has the same axis."""
    columns = min(len(finished), PANELS_PER_ROW)
    blocks = math.ceil(len(finished) / columns)
    figure = Figure(figsize=(max(2.7 * columns, 5.5) + 0.6, 4.6 * blocks + 0.8), layout="constrained")
    axes = figure.subplots(2 * blocks, columns, squeeze=False)
    histories = [one.outcome.history for one in finished]
    lowest = min(min(h.train_accuracy + h.val_accuracy) for h in histories)
    losses = [value for h in histories for value in h.train_loss + h.val_loss]
    for i in range(blocks * columns):
        upper, lower = axes[2 * (i // columns)][i % columns], axes[2 * (i // columns) + 1][i % columns]
        if i >= len(finished):
            upper.set_axis_off()
            lower.set_axis_off()
            continue
        history = histories[i]
        upper.set_title(finished[i].label, fontsize=11)
        _pair(upper, history.train_accuracy, history.val_accuracy)
        _pair(lower, history.train_loss, history.val_loss)
        upper.set_ylim(max(0.0, math.floor(10 * lowest) / 10), 1.0)
        upper.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        lower.set_ylim(0.0, 1.05 * max(losses))
        lower.set_xlabel("epoch")
        if i % columns == 0:
            upper.set_ylabel("accuracy")
            lower.set_ylabel("cross-entropy (nats)")
        else:
            upper.tick_params(labelleft=False)
            lower.tick_params(labelleft=False)
        upper.tick_params(labelbottom=False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"Learning curves\n{title}", fontsize=12)
    return figure


def _pair(axes: Axes, training: Sequence[float], validation: Sequence[float]) -> None:
    epochs = range(1, len(training) + 1)
    marker = "o" if len(training) <= 20 else None
    style = {"marker": marker, "markersize": 3, "linewidth": 1.6}
    axes.plot(
        epochs, training, color=TRAINING, linestyle="--", label="training (running, as augmented, dropout on)", **style
    )
    axes.plot(epochs, validation, color=VALIDATION, label="validation", **style)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def ladder_chart(finished: Sequence[Finished], title: str) -> Figure:
    """Validation accuracy by rung as bars, with the training accuracy and the notes' figure marked on each."""
    figure = Figure(figsize=(max(1.6 * len(finished), 4.5) + 1.2, 4.8), layout="constrained")
    axes = figure.subplots()
    positions = range(len(finished))
    validation = [one.outcome.val_accuracy for one in finished]
    training = [one.outcome.train_accuracy for one in finished]
    notes = [(i, one.rung.notes_accuracy) for i, one in enumerate(finished) if one.rung.notes_accuracy is not None]
    axes.bar(positions, validation, width=0.6, color=VALIDATION, label="validation")
    axes.plot(positions, training, "D", color=TRAINING, markeredgecolor="black", markersize=7, label="training")
    axes.hlines(
        [value for _, value in notes],
        [i - 0.38 for i, _ in notes],
        [i + 0.38 for i, _ in notes],
        color=NOTES,
        linewidth=2,
        linestyle=(0, (3, 1.5)),
        label="validation, course notes (CIFAR-10, all 50000 images)",
    )
    for one, i in zip(finished, positions, strict=True):
        gained = change(one, finished)
        text = f"{one.outcome.val_accuracy:.1%}" + ("" if gained is None else f"\n{100 * gained:+.1f}")
        # At the bar's foot, clear of the two kinds of mark.
        axes.text(i, 0.03, text, ha="center", va="bottom", color="white", fontsize=10, fontweight="bold")
    axes.set_xticks(positions, [f"{one.label}\n{_wrapped(one.rung.adds)}" for one in finished], fontsize=9)
    axes.set_xlim(-0.6, len(finished) - 0.4)
    axes.set_ylim(0.0, 1.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("accuracy")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    axes.set_title(f"The ladder: each rung keeps the tricks before it\n{title}", fontsize=11)
    return figure


def _wrapped(text: str) -> str:
    return text.replace(", ", ",\n")
