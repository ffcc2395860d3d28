"""The pictures of a report, drawn from the content of results.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .rungs import PRESETS

Content = Mapping[str, Any]

# Okabe and Ito's colours, told apart by the colour-blind.
VALIDATION = "#0072B2"
TRAINING = "#E69F00"
TIME = "#009E73"
NOTES = "#222222"
EARLIER = "#CC79A7"
PANELS_PER_ROW = 4
NARROWEST = 8.0  # inches that the longest subtitle takes
# Of its axis: a shorter bar has no room for figures, which then stand beyond it.
ROOM = 0.2
# A step of the exponentially weighted mean goes this share of the way to the new value.
MEAN_STEP = 0.5


def write_all(out: Path, results: Content) -> list[Path]:
    """Writes the pictures that there is something to show in, as PNG, and names them; an earlier run's others go."""
    drawers: dict[str, Callable[[Content], Figure | None]] = {
        "ladder.png": ladder_chart,
        "beside.png": beside_chart,
        "zoo.png": zoo_chart,
        "curves.png": learning_curves,
        "lr_sweep.png": sweep_chart,
    }
    paths = []
    for name, draw in drawers.items():
        figure = draw(results)
        if figure is None:
            (out / name).unlink(missing_ok=True)
        else:
            figure.savefig(out / name, dpi=120)
            paths.append(out / name)
    return paths


def epochs_of(counts: Iterable[int]) -> str:
    """Their common number, or the smallest and the largest, with the noun: 1 epoch, 4 to 8 epochs."""
    counts = set(counts)
    fewest, most = min(counts), max(counts)
    numbers = f"{most}" if fewest == most else f"{fewest} to {most}"
    return f"{numbers} epoch{'' if most == 1 else 's'}"


def milliseconds(value: float) -> str:
    """Three digits, or all of a thousand and more."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _subtitle(results: Content) -> str:
    images = "CIFAR-10" if results["dataset"] == "cifar10" else "Synthetic images (not CIFAR-10)"
    epochs = epochs_of(one["epochs"] for one in results["rungs"] or [results])  # a rung may have its own number of them
    return f"{images}, {results['preset']} preset: {results['train_images']} training images, {epochs}"


def _plain(axes: Axes, grid: str = "both") -> None:
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _of_group(results: Content, group: str) -> list[Mapping[str, Any]]:
    return [one for one in results["rungs"] if group in one["groups"]]


# The ladder


def ladder_chart(results: Content) -> Figure | None:
    """Validation accuracy by rung as bars, with the training accuracy and the notes' figures marked on each."""
    rungs = _of_group(results, "ladder")
    if not rungs:
        return None
    width = max(1.25 * len(rungs) + 1.2, NARROWEST)
    figure = Figure(figsize=(width, 5.0), layout="constrained")
    axes = figure.subplots()
    positions = range(len(rungs))
    axes.bar(positions, [one["val_accuracy"] for one in rungs], width=0.7, color=VALIDATION, label="validation")
    training = [one["train_accuracy"] for one in rungs]
    markers = {"markersize": 6, "markeredgecolor": "black", "clip_on": False}  # whole ones at 100 %, too
    axes.plot(positions, training, "D", color=TRAINING, label="training", **markers)
    styles = {"pytorch": (NOTES, "solid", "PyTorch version"), "earlier": (EARLIER, (0, (2, 1)), "earlier version")}
    for version, (colour, dashes, words) in styles.items():
        marked = [(i, one["notes"][version]) for i, one in enumerate(rungs) if one["notes"][version] is not None]
        if marked:
            axes.hlines(
                [value for _, value in marked],
                [i - 0.42 for i, _ in marked],
                [i + 0.42 for i, _ in marked],
                color=colour,
                linewidth=2.2,
                linestyle=dashes,
                label=f"validation, course notes' {words} (50000 images)",
            )
    for i, one in enumerate(rungs):
        gained = one["change"]
        text = f"{one['val_accuracy']:.1%}" + ("" if gained is None else f"\n{100 * gained:+.1f}")
        # At the bar's foot, clear of all marks, or above it and the training accuracy.
        short = one["val_accuracy"] < ROOM
        y, colour = (max(one["val_accuracy"], one["train_accuracy"]) + 0.03, NOTES) if short else (0.03, "white")
        axes.text(i, y, text, ha="center", va="bottom", color=colour, fontsize=10, fontweight="bold")
    axes.set_xticks(positions, [_under_bar(results, i, rungs) for i in positions], fontsize=8)
    axes.set_xlim(-0.6, len(rungs) - 0.4)
    axes.set_ylim(0.0, 1.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("accuracy")
    _plain(axes, "y")
    figure.legend(loc="outside lower center", ncols=2 if width > 8.5 else 1, frameon=False, fontsize=9)
    axes.set_title(
        "The ladder: each rung changes one thing of the rung that it stands on, to its left or as named\n"
        f"{_subtitle(results)}",
        fontsize=11,
    )
    return figure


def _under_bar(results: Content, i: int, rungs: Sequence[Mapping[str, Any]]) -> str:
    """A rung's label, what it adds, and the rung that it stands on where that is not the one to its left."""
    one = rungs[i]
    lines = [one["label"], _wrapped(one["adds"])]
    if one["on"] and (i == 0 or rungs[i - 1]["name"] != one["on"]):
        label = next((other["label"] for other in results["rungs"] if other["name"] == one["on"]), one["on"])
        lines.append(f"(on {label})")
    return "\n".join(lines)


def _wrapped(text: str, width: int = 15) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def beside_chart(results: Content) -> Figure | None:
    """The rungs beside the ladder: validation accuracy, and that of the rung that each stands on."""
    rungs = [one for one in results["rungs"] if "ladder" not in one["groups"]]
    if not rungs:
        return None
    accuracy = {one["name"]: one["val_accuracy"] for one in results["rungs"]}
    figure = Figure(figsize=(9.0, 0.34 * len(rungs) + 1.8), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        range(len(rungs)), [one["val_accuracy"] for one in rungs], height=0.7, color=VALIDATION, label="validation"
    )
    below = [(i, accuracy[one["on"]]) for i, one in enumerate(rungs) if one["change"] is not None]
    if below:
        axes.vlines(
            [value for _, value in below],
            [i - 0.42 for i, _ in below],
            [i + 0.42 for i, _ in below],
            color=NOTES,
            linewidth=2.2,
            label="validation, the rung that it stands on",
        )
    for i, one in enumerate(rungs):
        text = f"{one['val_accuracy']:.1%}" + ("" if one["change"] is None else f"  {100 * one['change']:+.1f}")
        ends = one["val_accuracy"], accuracy.get(one["on"], one["val_accuracy"])
        x, colour = (max(ends), NOTES) if min(ends) < ROOM else (0.0, "white")
        axes.text(x + 0.01, i, text, va="center", color=colour, fontsize=9, fontweight="bold")
    on = {one["name"]: f" (on {one['on']})" if one["on"] else "" for one in rungs}
    axes.set_yticks(range(len(rungs)), [f"{one['adds']}{on[one['name']]}" for one in rungs], fontsize=9)
    axes.set_ylim(len(rungs) - 0.4, -0.6)
    axes.set_xlim(0.0, 1.0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("accuracy")
    _plain(axes, "x")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    axes.set_title(f"Beside the ladder\n{_subtitle(results)}", fontsize=11)
    return figure


def zoo_chart(results: Content) -> Figure | None:
    """The same network under each normalisation: accuracy and the time of a training step, side by side."""
    rungs = _of_group(results, "zoo")
    if len(rungs) < 2:
        return None
    labels = ["BatchNorm" if one["name"] == "decay" else one["adds"].removesuffix(" for BatchNorm") for one in rungs]
    figure = Figure(figsize=(10.0, 0.42 * len(rungs) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    positions = range(len(rungs))
    left.barh(positions, [one["val_accuracy"] for one in rungs], height=0.65, color=VALIDATION)
    right.barh(positions, [one["step_ms"] for one in rungs], height=0.65, color=TIME)
    longest = max(one["step_ms"] for one in rungs)
    for i, one in enumerate(rungs):
        for axes, value, whole, text in (
            (left, one["val_accuracy"], 1.0, f"{one['val_accuracy']:.1%}"),
            (right, one["step_ms"], longest, f"{milliseconds(one['step_ms'])} ms"),
        ):
            short = value < ROOM * whole
            axes.annotate(
                text,
                (value if short else 0, i),
                (4, 0),
                textcoords="offset points",
                va="center",
                color=NOTES if short else "white",
                fontweight="bold",
                fontsize=9,
            )
    left.set_yticks(positions, labels, fontsize=9)
    left.set_ylim(len(rungs) - 0.4, -0.6)
    left.set_xlim(0.0, 1.0)
    left.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    left.set_xlabel("validation accuracy")
    right.set_xlabel("time of a training step (ms)")
    for axes in (left, right):
        _plain(axes, "x")
    figure.suptitle(f"The same network under each normalisation\n{_subtitle(results)}", fontsize=11)
    return figure


# Curves


def exponential_mean(values: Sequence[float]) -> list[float]:
    """m_1 = x_1, m_i = m_{i-1} + MEAN_STEP * (x_i - m_{i-1})."""
    means = [values[0]]
    for value in values[1:]:
        means.append(means[-1] + MEAN_STEP * (value - means[-1]))
    return means


def learning_curves(results: Content) -> Figure | None:
    """Accuracy and loss by epoch, two panels a rung; every panel of a kind has the same axes."""
    rungs = results["rungs"]
    if not rungs:
        return None
    columns = min(len(rungs), PANELS_PER_ROW)
    blocks = math.ceil(len(rungs) / columns)
    figure = Figure(figsize=(max(2.7 * columns + 0.6, NARROWEST), 4.4 * blocks + 0.9), layout="constrained")
    panels = figure.subplots(2 * blocks, columns, squeeze=False)
    histories = [one["history"] for one in rungs]
    lowest = min(min(h["train_accuracy"] + h["val_accuracy"]) for h in histories)
    losses = sorted(value for h in histories for value in h["train_loss"] + h["val_loss"])
    # A first epoch that went wild must not flatten all the others.
    highest = min(losses[-1], 1.5 * losses[int(0.98 * (len(losses) - 1))])
    longest = max(len(h["train_loss"]) for h in histories)
    shown = PRESETS[results["preset"]].recipe.curve_images
    validation = "validation" if shown >= results["val_images"] else f"validation (the first {shown} images)"
    for i in range(blocks * columns):
        upper, lower = panels[2 * (i // columns)][i % columns], panels[2 * (i // columns) + 1][i % columns]
        if i >= len(rungs):
            upper.set_axis_off()
            lower.set_axis_off()
            continue
        upper.set_title(rungs[i]["label"], fontsize=11)
        for axes, figure_of in ((upper, "accuracy"), (lower, "loss")):
            _pair(axes, histories[i][f"train_{figure_of}"], histories[i][f"val_{figure_of}"], validation)
            axes.set_xlim(0.0, longest + 1.0)
        upper.set_ylim(max(0.0, math.floor(10 * lowest) / 10), 1.0)
        upper.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        lower.set_ylim(0.0, 1.05 * highest)
        lower.set_xlabel("epoch")
        if i % columns == 0:
            upper.set_ylabel("accuracy")
            lower.set_ylabel("cross-entropy (nats)")
        else:
            upper.tick_params(labelleft=False)
            lower.tick_params(labelleft=False)
        upper.tick_params(labelbottom=False)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(
        f"Learning curves: each epoch, and the exponentially weighted mean\n{_subtitle(results)}", fontsize=12
    )
    return figure


def _pair(axes: Axes, training: Sequence[float], validation: Sequence[float], label_of_validation: str) -> None:
    epochs = range(1, len(training) + 1)
    kinds = (
        (training, TRAINING, "--", "training (running, as augmented, dropout on)"),
        (validation, VALIDATION, "-", label_of_validation),
    )
    for values, colour, line, label in kinds:
        axes.plot(epochs, values, ".", color=colour, markersize=4, alpha=0.5)
        marker = "D" if len(values) == 1 else ""  # of one epoch there is no line
        axes.plot(epochs, exponential_mean(values), line, color=colour, linewidth=1.8, marker=marker, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    _plain(axes)


# The checks


def sweep_chart(results: Content) -> Figure | None:
    """The learning-rate sweep of `--check`."""
    checks = results["checks"]
    if checks is None:
        return None
    sweep = checks["lr_sweep"]
    figure = Figure(figsize=(NARROWEST, 4.2), layout="constrained")
    axes = figure.subplots()
    highest = 1.6 * sweep["initial_loss"]
    losses = [math.inf if loss is None else loss for loss in sweep["loss"]]
    measured = [(lr, loss) for lr, loss in zip(sweep["lr"], losses, strict=True) if loss < highest]
    axes.plot([lr for lr, _ in measured], [loss for _, loss in measured], "o-", color=VALIDATION, label="measured")
    beyond = [lr for lr, loss in zip(sweep["lr"], losses, strict=True) if loss >= highest]
    if beyond:
        label = "larger, or not finite"
        axes.plot(beyond, [highest] * len(beyond), "^", color=EARLIER, markersize=9, clip_on=False, label=label)
    axes.axhline(sweep["initial_loss"], color=NOTES, linestyle=":", label="before training")
    axes.axvline(sweep["chosen"], color=TRAINING, linestyle="--", label=f"the recipe's, {sweep['chosen']:g}")
    axes.set_xscale("log")
    axes.set_ylim(0.0, highest)
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"training loss after {sweep['steps']} steps (nats)")
    axes.set_title(f"Learning-rate sweep, rung {checks['rung']}\n{_subtitle(results)}", fontsize=11)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _plain(axes)
    return figure
