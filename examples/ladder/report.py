"""What a run leaves behind: tables, results.json, results.csv, and with pictures.py and page.py all the rest.

Everything is drawn from the content of results.json, so a report can be made again from that file alone.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import page, pictures
from .rungs import Rung, find
from .train import TRAIN_EVAL_IMAGES, Outcome

Content = Mapping[str, Any]

GOAL = 0.94  # what the public speed runs race to
MINUS = "\N{MINUS SIGN}"
COLUMNS = ("number", "name", "adds", "on", "train_accuracy", "val_accuracy", "change", "epochs", "seconds", "step_ms")


# What a report is made from.
_OF_RUN = (*page.SETTINGS, *page.MACHINE, "versions", "interrupted", "failed", "checks")
_OF_RUNG = (*COLUMNS, "label", "groups", "notes", "history", "seconds_to_94")
_NUMBERS = ("train_accuracy", "val_accuracy", "epochs", "seconds", "step_ms")


class ReportError(Exception):
    """What is wrong with a results.json, in one line that names the file."""


def entry(rung: Rung, outcome: Outcome) -> dict[str, Any]:
    """What results.json holds about a finished rung, less the change against another.

    `seconds_to_94` is the time spent on training steps up to the end of the first epoch whose validation accuracy is
    94 % or more, null where there is none.
    """
    described = {name: getattr(rung, name) for name in ("number", "name", "label", "adds", "on")}
    epochs = zip(outcome.history.val_accuracy, outcome.train_seconds, strict=True)
    reached = next((seconds for accuracy, seconds in epochs if accuracy >= GOAL), None)
    return {
        **described,
        "groups": list(rung.groups),
        "notes": asdict(rung.notes),
        **asdict(outcome),
        "seconds_to_94": reached,
    }


def content(
    run: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    *,
    failed: Sequence[Mapping[str, str]] = (),
    interrupted: str | None = None,
    checks: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of results.json: `run`, then the keywords, and one entry a finished rung.

    Accuracies are in [0, 1], times in seconds, step_ms in milliseconds; `history` has one value an epoch, `change` is
    the validation accuracy gained over the rung that it stands `on`, null where that one is not there or does not
    compare.
    """
    accuracy = {one["name"]: one["val_accuracy"] for one in entries}
    rungs = []
    for one in entries:
        compares = one["on"] in accuracy and find(one["name"]).compares
        rungs.append({**one, "change": one["val_accuracy"] - accuracy[one["on"]] if compares else None})
    return {**run, "interrupted": interrupted, "failed": list(failed), "checks": checks, "rungs": rungs}


def _cells(one: Mapping[str, Any], percent: str) -> list[str]:
    """One rung's row: label, what it adds, train, validation, change, notes in both versions, seconds."""

    def share(value: float | None, digits: int = 1) -> str:
        return "" if value is None else f"{100 * value:.{digits}f}{percent}"

    def noted(version: str) -> str:
        value = one["notes"][version]
        return "" if value is None else f"{100 * value:g}{percent}"

    change = one["change"]
    gained = "" if change is None else f"{100 * change:+.1f}".replace("-", MINUS)
    return [
        one["label"],
        one["adds"],
        share(one["train_accuracy"]),
        share(one["val_accuracy"]),
        gained,
        noted("pytorch"),
        noted("earlier"),
        f"{one['seconds']:.0f}",
    ]


def table(results: Content) -> str:
    """The results for a terminal, accuracies in percent."""
    header = ["rung", "what it adds", "train", "val", "change", "notes", "earlier", "seconds"]
    cells = [header, *(_cells(one, "%") for one in results["rungs"])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(left + right).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def rows(results: Content) -> list[list[str]]:
    """The cells of the table, header first."""
    header = ["rung", "what it adds", "train", "validation", "change", "notes, PyTorch", "notes, earlier", "seconds"]
    return [header, *(_cells(one, " %") for one in results["rungs"])]


def markdown(results: Content) -> str:
    """The same as a Markdown table."""
    header, *others = rows(results)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * 2 + ["---:"] * 6, *others))


def footnotes(results: Content) -> str:
    """How to read the table."""
    evaluated = min(TRAIN_EVAL_IMAGES, results["train_images"])
    lines = [
        f"In eval mode, train on {evaluated} of a rung's training images as they are (on all where it has fewer), val "
        f"on {results['val_images']} images (on those of its classes where it learns fewer).",
        "Change in points of val against the rung that it stands on; notes and earlier: the course notes' figures.",
    ]
    if results["dataset"] != "cifar10":
        lines.append("SYNTHETIC IMAGES: these figures are not CIFAR-10's; the notes' are.")
    elif results["train_images"] < 50_000:
        epochs = pictures.epochs_of(one["epochs"] for one in results["rungs"] or [results])
        lines.append(
            f"Trained on {results['train_images']} images for {epochs}; the notes' figures come from all 50000 "
            "and many more steps."
        )
    for one in results["rungs"]:
        if one["seconds_to_94"] is not None:
            lines.append(f"94 % of val after {one['seconds_to_94']:.1f} s of training steps: {one['label']}.")
    return "\n".join(lines)


def csv_text(results: Content) -> str:
    """One line a rung: COLUMNS, then the notes' figures."""
    out = io.StringIO()
    versions = ("pytorch", "pytorch_train", "earlier", "earlier_train")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"notes_{version}" for version in versions)])
    for one in results["rungs"]:
        writer.writerow([*(one[name] for name in COLUMNS), *(one["notes"][version] for version in versions)])
    return out.getvalue()


def write_json(out: Path, results: Content) -> Path:
    """Writes results.json into `out`; it appears whole or not at all."""
    path = out / "results.json"
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def keep_previous(out: Path) -> Path | None:
    """Renames results.json, if it is there and names a finished rung or cannot be read, and says to what."""
    path, kept = out / "results.json", out / "results.previous.json"
    try:
        if not read_json(out)["rungs"]:
            return None
    except ReportError:
        if not path.exists():
            return None
    path.replace(kept)
    return kept


def read_json(out: Path) -> dict[str, Any]:
    """The content of `out`/results.json.

    Raises:
        ReportError: it is missing, truncated or something else.
    """
    path = out / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ReportError(f"{path}: missing") from error
    except ValueError as error:
        raise ReportError(f"{path}: truncated, or not a results.json: {error}") from error
    if not isinstance(results, dict) or not isinstance(results.get("rungs"), list):
        raise ReportError(f"{path}: not a results.json: has no list of rungs")
    _require(path, "the run", results, _OF_RUN)
    for i, one in enumerate(results["rungs"]):
        _require(path, f"rungs[{i}]", one, _OF_RUNG)
        for name in _NUMBERS:
            if isinstance(one[name], bool) or not isinstance(one[name], int | float):
                raise ReportError(f"{path}: not a results.json: rungs[{i}] has {name} {one[name]!r}, wanted a number")
    return results


def _require(path: Path, what: str, one: Any, names: Sequence[str]) -> None:
    lacking = [name for name in names if not isinstance(one, dict) or name not in one]
    if lacking:
        raise ReportError(f"{path}: not a results.json of this version: {what} has no {lacking[0]}")


def write_report(out: Path, results: Content) -> list[Path]:
    """Writes results.csv, table.md, the pictures and report.html into `out`; an earlier run's other pictures go."""
    drawn = pictures.write_all(out, results)
    texts = {
        "results.csv": csv_text(results),
        "table.md": markdown(results) + "\n",
        "report.html": page.html_page(results, rows(results), footnotes(results), drawn),
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [*(out / name for name in texts), *drawn]
