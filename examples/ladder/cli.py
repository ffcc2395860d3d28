"""The command line of the ladder."""

from __future__ import annotations

import argparse
import math
import platform
import sys
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy
import torch
from tqdm import tqdm

from . import report
from .data import DataError, Dataset, UrlOpener, load
from .models import BACKENDS
from .rungs import LADDER, PRESETS, Recipe, Rung, recipe_of, select
from .train import History, Outcome, train_rung

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


def main(argv: Sequence[str] | None = None, *, open_url: UrlOpener = urllib.request.urlopen) -> int:
    """Runs the ladder; returns the exit status. Bad arguments leave through SystemExit(2), as argparse has it."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.backend == "fastnorm":
        _require_fastnorm(parser)
    try:
        return _run(args, open_url)
    except (DataError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("\ninterrupted before the first rung", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(args: argparse.Namespace, open_url: UrlOpener) -> int:
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    preset_name = args.preset or ("full" if device.type == "cuda" else "quick")
    preset = PRESETS[preset_name]
    asked = {"epochs": args.epochs, "batch_size": args.batch_size}
    start = replace(preset.recipe, **{name: value for name, value in asked.items() if value is not None})
    data = load(args.dataset, args.data, train_images=preset.train_images, seed=args.seed, open_url=open_url)
    run = {
        "dataset": data.name,
        "preset": preset_name,
        "backend": args.backend,
        "seed": args.seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16 autocast" if device.type == "cuda" else "float32",
        "train_images": len(data.train_labels),
        "val_images": len(data.val_labels),
        "epochs": start.epochs,
        "batch_size": start.batch_size,
        "versions": _versions(args.backend),
    }
    data = data.to(device)
    print(
        f"{data.name}: {run['train_images']} training and {run['val_images']} validation images ({data.source}); "
        f"{preset_name} preset, {start.epochs} epochs, backend {args.backend}, {run['device']}"
    )
    finished: list[report.Finished] = []
    interrupted: Rung | None = None
    for rung in args.rungs:
        number = LADDER.index(rung)
        try:
            outcome = _with_progress(f"{number} {rung.name}", recipe_of(rung, start), data, args)
            finished.append(report.Finished(number, rung, outcome))
            report.write_results(args.out, finished, run)
        except KeyboardInterrupt:
            interrupted = rung
            break
    results = report.write_results(args.out, finished, run, interrupted and interrupted.name)
    paths = [results, *report.write_pictures(args.out, finished, run)]
    if finished:
        print(f"\n{report.table(finished)}\n\n{report.footnotes(run)}")
    print(f"written: {', '.join(map(str, paths))}")
    if interrupted is not None:
        print(f"interrupted in rung {interrupted.name}: finished before it: {len(finished)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _with_progress(label: str, recipe: Recipe, data: Dataset, args: argparse.Namespace) -> Outcome:
    steps = recipe.epochs * math.ceil(len(data.train_labels) / recipe.batch_size)
    # tqdm draws nothing where the output is not a terminal; the line printed at the end is there either way.
    with tqdm(total=steps, desc=f"{label:<12}", unit="step", disable=None, leave=False) as bar:

        def on_epoch(history: History) -> None:
            bar.set_postfix_str(f"train {history.train_accuracy[-1]:.1%} val {history.val_accuracy[-1]:.1%}")

        on_step: Callable[[], Any] = bar.update
        outcome = train_rung(recipe, data, backend=args.backend, seed=args.seed, on_step=on_step, on_epoch=on_epoch)
    print(f"{label:<12} val {outcome.val_accuracy:.1%}  train {outcome.train_accuracy:.1%}  {outcome.seconds:.1f} s")
    return outcome


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch built without CUDA raises AssertionError
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"wanted a device that torch has here, got {name!r} ({reason})") from error
    return device


def _rungs(wanted: str) -> list[Rung]:
    try:
        return select(wanted)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _require_fastnorm(parser: argparse.ArgumentParser) -> None:
    try:
        import fastnorm  # noqa: F401
    except ImportError as error:
        reason = str(error).splitlines()[0]
        parser.error(f"--backend fastnorm: cannot be imported ({reason}); run make, or use --backend torch")


def _versions(backend: str) -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    if backend == "fastnorm":
        import fastnorm

        versions["fastnorm"] = fastnorm.__version__
    return versions


def _at_least(smallest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = smallest - 1
        if value < smallest:
            raise argparse.ArgumentTypeError(f"wanted an integer of at least {smallest}, got {text!r}")
        return value

    return parse


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """argparse's, without the usage in front: the reason is what the reader needs."""
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    rungs = "\n".join(f"  {i}  {rung.name:<11} {rung.adds}" for i, rung in enumerate(LADDER))
    parser = _OneLineParser(
        prog="cifar_ladder.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trains one small CNN on CIFAR-10 again and again, one trick more each time, and shows what each\n"
        "trick bought: a table, results.json, learning curves and a chart of the ladder.",
        epilog=f"rungs, each with the tricks of those before it:\n{rungs}\n\n"
        "Ctrl-C keeps the results of the rungs that are finished. Exit status: 0, 2 for bad input, 130 for Ctrl-C.",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder that holds CIFAR-10's binary or python version, unpacked or as the published .tar.gz "
        "(default: the cache folder, ~/.cache/fastnorm, with a download into it if need be)",
    )
    data.add_argument(
        "--dataset",
        choices=("auto", "cifar10", "synthetic"),
        default="auto",
        help="auto takes CIFAR-10 and, where it cannot be had, synthetic images (default: %(default)s)",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="quick: about a minute a rung on two CPU cores, on a share of the images; full: all images and "
        "many epochs, for a GPU (default: full on a GPU, else quick)",
    )
    training.add_argument(
        "--rungs",
        type=_rungs,
        default="all",
        metavar="LIST",
        help="names or numbers, comma-separated, or all (default: all)",
    )
    training.add_argument("--epochs", type=_at_least(1), metavar="N", help="instead of the preset's")
    training.add_argument("--batch-size", type=_at_least(1), metavar="N", help="instead of 256")
    training.add_argument(
        "--seed",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="weights, order, augmentation, dropout; the same seed gives the same numbers on a CPU (default: 0)",
    )
    training.add_argument(
        "--device", type=_device, metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)"
    )
    training.add_argument(
        "--backend",
        choices=BACKENDS,
        default="fastnorm",
        help="whose normalisation and dropout layers to train with (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/ladder"), metavar="DIR", help="for the results (default: %(default)s)"
    )
    return parser
