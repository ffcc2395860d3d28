"""The command line of the ladder."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import math
import os
import platform
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy
import torch
from tqdm import tqdm

from . import checkpoint, report
from .allocator import keep_freed_memory
from .checkpoint import CheckpointError
from .checks import run_checks
from .data import DataError, Dataset, UrlOpener, load
from .models import BACKENDS, needs_fastnorm
from .pictures import epochs_of, milliseconds
from .processes import FailedElsewhere, Processes, joined, local_device
from .recipe import Recipe
from .rungs import PRESETS, RUNGS, Rung, recipe_of, select
from .train import Diverged, History, Outcome, seconds_of_an_epoch, stage_lengths, train_rung

EXIT_FAILED = 1  # a check or a rung
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


class _SettingsError(Exception):
    """Arguments that do not go together, in one line."""


def main(argv: Sequence[str] | None = None, *, open_url: UrlOpener = urllib.request.urlopen) -> int:
    """Runs the ladder; returns the exit status. Bad arguments leave through SystemExit(2), as argparse has it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the tables' minus sign is not in every encoding
    parser = _parser()
    args = parser.parse_args(argv)
    if args.backend == "fastnorm" and args.report is None:
        _require_fastnorm(parser)
    try:
        if args.report is not None:
            return _report_again(args.report)
        device = local_device(args.device)
        if device.type == "cpu":
            keep_freed_memory()
        with joined(device) as processes:
            # Of several processes one speaks.
            with contextlib.nullcontext() if processes.is_first else contextlib.redirect_stdout(io.StringIO()):
                return _Run(args, device, processes, open_url).climb()
    except (DataError, CheckpointError, report.ReportError, _SettingsError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except FailedElsewhere:
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)  # between the rungs: before the first one, or while a report is made
        return EXIT_INTERRUPTED


def _report_again(out: Path) -> int:
    results = report.read_json(out)
    paths = report.write_report(out, results)
    print(f"{report.markdown(results)}\n\n{report.footnotes(results)}\n\nwritten: {', '.join(map(str, paths))}")
    return 0


@dataclass
class _Run:
    """One call of the program."""

    args: argparse.Namespace
    device: torch.device
    processes: Processes
    open_url: UrlOpener

    def __post_init__(self) -> None:
        args, device = self.args, self.device
        self.preset_name = args.preset or ("full" if device.type == "cuda" else "quick")
        self.preset = PRESETS[self.preset_name]
        asked = {"epochs": args.epochs, "batch_size": args.batch_size}
        self.asked = {name: value for name, value in asked.items() if value is not None}
        self.start = replace(self.preset.recipe, **self.asked)
        world = self.processes.world
        if self.start.batch_size < world:
            raise _SettingsError(f"--batch-size: wanted an image for each of {world} processes, got {args.batch_size}")
        if args.backend == "torch":
            lacking = [rung.name for rung in args.rungs if needs_fastnorm(self.recipe(rung))]
            if lacking:
                raise _SettingsError(f"not in torch.nn: {', '.join(lacking)}; needs --backend fastnorm")
            if world > 1:
                raise _SettingsError("several processes need --backend fastnorm, for SyncBatchNorm on any device")

    def recipe(self, rung: Rung) -> Recipe:
        """The rung's recipe, with what was asked for on the command line."""
        return replace(recipe_of(rung, self.preset.recipe), **self.asked)

    def load(self) -> Dataset:
        """The images, on the device. The first process goes first, for it may have to fetch them."""
        args = self.args
        for first in (True, False):
            with self.processes.together():
                if first == self.processes.is_first:
                    data = load(
                        args.dataset,
                        args.data,
                        train_images=self.preset.train_images,
                        seed=args.seed,
                        open_url=self.open_url,
                    )
        return data.to(self.device)

    def choose_epochs(self, data: Dataset) -> None:
        """Where --epochs does not say: those of the run that is resumed, or as many as --minutes has time for."""
        args, epochs = self.args, self.start.epochs
        if args.epochs is None and args.resume and (args.out / "results.json").exists():
            before = report.read_json(args.out).get("epochs")
            epochs = before if type(before) is int and before > 0 else epochs
        elif args.minutes is not None:
            epochs = self._epochs_in(args.minutes, data)
        if epochs != self.start.epochs:
            self.asked["epochs"] = epochs
            self.start = replace(self.start, epochs=epochs)

    def _epochs_in(self, minutes: float, data: Dataset) -> int:
        """How many epochs of all rungs take that long, at most the preset's; one of each is timed and thrown away."""
        args, seconds = self.args, 0.0
        with self._steps("one epoch of each rung") as bar:
            for rung in args.rungs:
                seconds += seconds_of_an_epoch(
                    self.recipe(rung),
                    data,
                    backend=args.backend,
                    seed=args.seed,
                    processes=self.processes,
                    on_step=bar.update,
                )
        wanted = self.start.epochs
        epochs = max(1, int(min(60 * minutes / seconds - 1, wanted)))
        print(f"one epoch of each rung takes {seconds:.1f} s: {epochs} of {wanted} epochs, for --minutes {minutes:g}")
        if epochs < wanted:
            print(f"Tricks against overfitting cost more than they bring in few epochs; --epochs {wanted} trains all.")
        return epochs

    def settings(self, data: Dataset) -> dict[str, Any]:
        """The head of results.json."""
        on_gpu = self.device.type == "cuda"
        return {
            "dataset": data.name,
            "preset": self.preset_name,
            "backend": self.args.backend,
            "seed": self.args.seed,
            "device": torch.cuda.get_device_name(self.device) if on_gpu else self.device.type,
            "processes": self.processes.world,
            "threads": torch.get_num_threads(),
            "dtype": "bfloat16 autocast" if on_gpu else "float32",
            "train_images": len(data.train_labels),
            "val_images": len(data.val_labels),
            "images": data.checksum(),
            "epochs": self.start.epochs,
            "batch_size": self.start.batch_size,
            "versions": _versions(self.args.backend),
        }

    def climb(self) -> int:
        data = self.load()
        with contextlib.ExitStack() as held:
            with self.processes.together():
                if self.processes.is_first:
                    held.enter_context(_alone_in(self.args.out))  # before --minutes takes its time
            return self._climb(data)

    def _climb(self, data: Dataset) -> int:
        args, out = self.args, self.args.out
        checkpoints = out / "checkpoints"
        self.choose_epochs(data)
        run = self.settings(data)
        epochs = epochs_of(sum(stage_lengths(self.recipe(rung))) for rung in args.rungs)
        print(
            f"{data.name}: {run['train_images']} training and {run['val_images']} validation images ({data.source}); "
            f"{self.preset_name} preset, {epochs}, backend {args.backend}, {run['device']}"
        )
        before = self._before(run) if args.resume else None
        done = {one["name"]: one for one in before["rungs"]} if before else {}
        checks = before["checks"] if before else None
        failed = {one["name"]: one for one in before["failed"]} if before else {}
        with self.processes.together():
            if self.processes.is_first:
                if not args.resume:
                    kept = report.keep_previous(out)
                    if kept is not None:
                        print(
                            f"{out} holds results of an earlier run: now {kept.name}; pictures and tables are replaced"
                        )
                    checkpoint.discard(checkpoints, [rung.name for rung in RUNGS])
                # Before the first checkpoint, so that --resume knows whose it is.
                report.write_json(out, self._content(run, done, failed, None, checks))

        interrupted: Rung | None = None
        passed = True
        if args.check:
            checks, passed = self._check(args.rungs[0], data)
        for rung in args.rungs if passed else ():
            if rung.name in done:
                continue
            saved = checkpoint.of_rung(checkpoints, rung.name)
            try:
                done[rung.name] = report.entry(rung, self._train(rung, data, saved))
                failed.pop(rung.name, None)
            except Diverged as error:
                failed[rung.name] = {"name": rung.name, "label": rung.label, "reason": str(error)}
                print(f"{rung.label:<16} failed: {error}; on to the next")
            except KeyboardInterrupt:
                interrupted = rung
                break
            with self.processes.together():
                if self.processes.is_first:
                    report.write_json(out, self._content(run, done, failed, None, checks))
                    saved.unlink(missing_ok=True)
        if self.processes.is_first:
            self._close(self._content(run, done, failed, interrupted, checks))
        if interrupted is not None:
            print(f"interrupted in rung {interrupted.name}: finished: {len(done)}; --resume goes on", file=sys.stderr)
            return EXIT_INTERRUPTED
        return EXIT_FAILED if not passed or any(rung.name in failed for rung in args.rungs) else 0

    @staticmethod
    def _content(
        run: dict[str, Any],
        done: dict[str, dict[str, Any]],
        failed: dict[str, dict[str, str]],
        interrupted: Rung | None,
        checks: dict[str, Any] | None,
    ) -> dict[str, Any]:
        entries = [done[rung.name] for rung in RUNGS if rung.name in done]
        failures = [failed[rung.name] for rung in RUNGS if rung.name in failed]
        stopped = interrupted and interrupted.name
        return report.content(run, entries, failed=failures, interrupted=stopped, checks=checks)

    def _close(self, results: dict[str, Any]) -> None:
        """Writes everything and prints the table."""
        paths = [report.write_json(self.args.out, results), *report.write_report(self.args.out, results)]
        if results["rungs"]:
            print(f"\n{report.table(results)}\n\n{report.footnotes(results)}")
        print(f"written: {', '.join(map(str, paths))}")

    def _before(self, run: dict[str, Any]) -> dict[str, Any] | None:
        """An interrupted run's results.json; None where there is no such file."""
        if not (self.args.out / "results.json").exists():
            return None
        results = report.read_json(self.args.out)
        for name, value in run.items():
            if results.get(name) != value:
                raise _SettingsError(
                    f"--resume: {self.args.out} is of a run with {name} {results.get(name)}, this one has {value}"
                )
        return results

    def _check(self, rung: Rung, data: Dataset) -> tuple[dict[str, Any], bool]:
        """What the checks found, for results.json, and whether all is well."""
        recipe = self.recipe(rung)
        with self._steps("checks") as bar:
            checks = run_checks(recipe, data, backend=self.args.backend, seed=self.args.seed, on_step=bar.update)
        print(
            f"check {rung.name}: first loss {checks.initial_loss:.3f} (log 10 = 2.303); {checks.overfit_images} images "
            f"learnt to {checks.overfit_accuracy:.1%} in {checks.overfit_epochs} epochs"
        )
        for lr, loss in checks.sweep.items():
            print(f"check {rung.name}: learning rate {lr:.1e}: loss {'not finite' if loss is None else f'{loss:.3f}'}")
        for problem in checks.problems:
            print(f"check {rung.name} failed: {problem}", file=sys.stderr)
        return checks.as_dict(rung.name, recipe.lr), not checks.problems

    def _steps(self, what: str) -> tqdm:
        """A progress bar of the first process, which draws nothing where the output is not a terminal."""
        return tqdm(desc=what, unit="step", disable=None if self.processes.is_first else True, leave=False)

    def _train(self, rung: Rung, data: Dataset, saved: Path) -> Outcome:
        with self._steps(f"{rung.label:<16}") as bar:

            def on_step(epochs: int, steps: int) -> None:
                bar.total = epochs * steps
                bar.update()

            def on_epoch(history: History) -> None:
                bar.set_postfix_str(f"train {history.train_accuracy[-1]:.1%} val {history.val_accuracy[-1]:.1%}")

            outcome = train_rung(
                self.recipe(rung),
                data,
                backend=self.args.backend,
                seed=self.args.seed,
                processes=self.processes,
                saved=saved,
                resume=self.args.resume,
                on_step=on_step,
                on_epoch=on_epoch,
            )
        print(
            f"{rung.label:<16} val {outcome.val_accuracy:.1%}  train {outcome.train_accuracy:.1%}  "
            f"{outcome.seconds:.1f} s  {milliseconds(outcome.step_ms)} ms a step",
            flush=True,
        )
        return outcome


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Makes the folder if need be, and keeps other runs out of it, where its file system has locks.

    Raises:
        OSError: it cannot be made or written to.
        _SettingsError: another run is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _SettingsError(f"--out: another run is writing to {folder}") from None
        except OSError:
            pass
        yield
    finally:
        os.close(lock)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device).tolist()  # the meta device has no numbers to give back
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
    largest = 2**63 - 1  # of torch's integers

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = smallest - 1
        if value < smallest:
            raise argparse.ArgumentTypeError(f"wanted an integer of at least {smallest}, got {text!r}")
        if value > largest:
            raise argparse.ArgumentTypeError(f"wanted an integer of at most {largest}, got {text!r}")
        return value

    return parse


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"wanted a positive number, got {text!r}")
    return value


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """argparse's, without the usage in front: the reason is what the reader needs."""
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    rungs = "\n".join(f"  {rung.number:<3}{rung.name:<17}{rung.adds:<38}{', '.join(rung.groups)}" for rung in RUNGS)
    parser = _OneLineParser(
        prog="cifar_ladder.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trains one small CNN on CIFAR-10 again and again, one trick more each time, and shows what each\n"
        "trick bought: tables, results.json, pictures, and report.html, which has them all.",
        epilog=f"rungs: number, name, what it adds, groups; the ladder's keep the tricks before them:\n{rungs}\n\n"
        "Ctrl-C keeps the finished rungs, and --resume goes on. torchrun --nproc-per-node N cifar_ladder.py shares\n"
        "the work of each batch. Exit status: 0, 1 for a check or a rung that failed, 2 for bad input, 130 for Ctrl-C.",
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
        help="quick: one to three minutes a rung on two CPU cores, on a share of the images; full: all images and "
        "many epochs, for a GPU (default: full on a GPU, else quick)",
    )
    training.add_argument(
        "--rungs",
        type=_rungs,
        default="ladder",
        metavar="LIST",
        help="names, numbers or groups, comma-separated, or all (default: ladder, that is 0 to 9)",
    )
    length = training.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs",
        type=_at_least(1),
        metavar="N",
        help="instead of the preset's; a rung of several stages takes one for each at least",
    )
    length.add_argument(
        "--minutes",
        type=_minutes,
        metavar="M",
        help="as many epochs as all rungs together have time for, at most the preset's; one of each is timed first",
    )
    training.add_argument(
        "--batch-size", type=_at_least(1), metavar="N", help="instead of the rung's, which is 256 for all but speed"
    )
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
    training.add_argument(
        "--check",
        action="store_true",
        help="before training: is the first loss near log(10), are a few batches learnt to 100 %%, which learning "
        "rates work; of the first rung asked for. No training where this fails",
    )
    training.add_argument(
        "--resume",
        action="store_true",
        help="go on where a run with the same settings and --out was interrupted; the numbers are those of a run that "
        "was not",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        default=Path("runs/ladder"),
        metavar="DIR",
        help="for the results (default: %(default)s); without --resume an earlier run's are replaced, but for its "
        "results.json, which becomes results.previous.json",
    )
    output.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="train nothing: make the report in DIR again from its results.json, and print the table as Markdown",
    )
    return parser
