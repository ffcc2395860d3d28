"""Training one rung: stages, epochs, steps; what is kept between them, so that a run can be taken up again."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import checkpoint
from .data import CLASSES, Dataset
from .evaluate import autocast, evaluate, normalise
from .models import build_model, reset_head
from .optimisers import add_penalty_gradient, kernels_of, make_optimiser
from .processes import ALONE, Processes
from .recipe import Recipe, Stage
from .sampling import epoch_indices, inverse_frequency, long_tail

# The training accuracy is measured on this many training images; a fixed share is enough for a tenth of a percent.
TRAIN_EVAL_IMAGES = 10_000


class Diverged(Exception):
    """The loss is no number any more."""


@dataclass
class History:
    """One value an epoch. Training figures are running means over the epoch: augmented images, dropout on."""

    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_accuracy: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """What one rung came to.

    Attributes:
        val_accuracy, train_accuracy: in [0, 1], in eval mode on images as they are.
        seconds: all of it, evaluation too, interruptions not.
        step_ms: the median over the epochs of the mean time of a training step, in milliseconds.
        train_seconds: spent on training steps up to the end of each epoch.
        parameters: of the network.
        epochs: trained.
        history: figures by epoch.
    """

    val_accuracy: float
    train_accuracy: float
    seconds: float
    step_ms: float
    train_seconds: list[float]
    parameters: int
    epochs: int
    history: History


def stage_lengths(recipe: Recipe) -> list[int]:
    """Epochs of each stage, at least one; they add up to the recipe's epochs where there are as many."""
    total = sum(stage.share for stage in recipe.stages)
    ends, before, done = [], 0, 0.0
    for stage in recipe.stages:
        done += stage.share
        before = max(before + 1, round(recipe.epochs * done / total))
        ends.append(before)
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


class Trainer:
    """One rung in training. What random numbers are drawn in an epoch depends on the seed, the epoch and the process
    alone, so the state between two epochs is all that a checkpoint needs.
    """

    def __init__(self, recipe: Recipe, data: Dataset, *, backend: str, seed: int, processes: Processes = ALONE) -> None:
        self.recipe, self.seed, self.processes = recipe, seed, processes
        self.device = data.train_images.device
        self.data = data
        self.labels = data.train_labels.cpu()  # the order of the images is drawn on the host
        self.pool = torch.arange(len(self.labels))
        if recipe.imbalance is not None:
            self.pool = long_tail(self.labels, recipe.imbalance, CLASSES)
        self.model = build_model(recipe, backend, seed).to(self.device, memory_format=torch.channels_last)
        self.parallel = processes.wrap(self.model)
        self.kernels = kernels_of(self.model)
        self.lengths = stage_lengths(recipe)
        self.history = History()
        self.epoch = 0  # finished ones
        self.stopped = False
        self.best: dict[str, Tensor] | None = None
        self.best_accuracy = -1.0
        self.best_epoch = 0
        self.seconds = 0.0
        self.train_seconds: list[float] = []
        self.step_ms: list[float] = []
        self._stage_index = -1

    @property
    def done(self) -> bool:
        return self.stopped or self.epoch >= sum(self.lengths)

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self._stage_index]

    def _enter(self, index: int) -> None:
        """A new optimiser, and the images of the stage's classes."""
        self._stage_index = index
        stage = self.stage
        optimiser = stage.optimiser or self.recipe.optimiser
        self.lr = stage.lr if stage.lr is not None else self.recipe.lr
        self.optimiser = make_optimiser(optimiser, self.model.parameters(), self.lr)
        self.val_images, self.val_labels = self.data.val_images, self.data.val_labels
        self.indices = self.pool
        if stage.classes is not None:
            classes = torch.tensor(stage.classes)
            chosen = torch.isin(self.val_labels, classes.to(self.device))
            self.val_images, self.val_labels = self.val_images[chosen], self.val_labels[chosen]
            self.indices = self.pool[torch.isin(self.labels[self.pool], classes)]
        self.class_weights = None
        if self.recipe.class_weights:
            self.class_weights = inverse_frequency(self.labels[self.indices], CLASSES).to(self.device)

    def _enter_afresh(self, index: int) -> None:
        """The same at the start of a stage, which may also change the weights."""
        stage = self.recipe.stages[index]
        if stage.from_best and self.best is not None:
            self.model.load_state_dict(self.best)
        if stage.fresh_head:
            reset_head(self.model, torch.Generator().manual_seed(self._seed("head")))
        self._enter(index)

    def _seed(self, purpose: str, *, of_process: bool = False) -> int:
        """A seed for this epoch and purpose, the same in every process or one's own."""
        key = [self.seed, self.epoch, self.processes.rank if of_process else 0, *purpose.encode()]
        return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)

    def train_epoch(self, on_step: Callable[[int], None] = lambda steps: None) -> None:
        """One epoch and its validation.

        Args:
            on_step: called after each optimiser step with the number of steps in the epoch.

        Raises:
            Diverged: the epoch's mean training loss, or the validation loss, is not finite.
        """
        start = time.perf_counter()
        stage = next(i for i in range(len(self.lengths)) if self.epoch < sum(self.lengths[: i + 1]))
        if stage != self._stage_index:
            self._enter_afresh(stage)
        train_loss, train_accuracy, steps = self._train(on_step)
        train_seconds = time.perf_counter() - start
        self._require_finite("training", train_loss)
        curve = slice(self.recipe.curve_images)
        val_loss, val_accuracy = evaluate(
            self.model, self.val_images[curve], self.val_labels[curve], processes=self.processes
        )
        self._require_finite("validation", val_loss)  # the epoch's last step may have spoilt the weights
        self.epoch += 1
        for values, value in zip(
            vars(self.history).values(), (train_loss, train_accuracy, val_loss, val_accuracy), strict=True
        ):
            values.append(value)
        self._keep_best(val_accuracy)
        self.train_seconds.append(train_seconds + (self.train_seconds[-1] if self.train_seconds else 0.0))
        self.step_ms.append(1e3 * train_seconds / steps)
        self.seconds += time.perf_counter() - start

    def _train(self, on_step: Callable[[int], None]) -> tuple[float, float, int]:
        """The epoch's steps; mean loss, accuracy and the number of steps."""
        recipe, data, device = self.recipe, self.data, self.device
        torch.manual_seed(self._seed("dropout", of_process=True))  # dropout draws from torch's own generators
        drawing = torch.Generator(device).manual_seed(self._seed("augment", of_process=True))
        order = torch.Generator().manual_seed(self._seed("order"))
        shuffled = self.indices[epoch_indices(self.labels[self.indices], recipe.resample, order)].to(device)
        # A rest too small to give each process an image is left out.
        batches = [batch for batch in shuffled.split(recipe.batch_size) if len(batch) >= self.processes.world]
        epoch_in_stage = self.epoch - sum(self.lengths[: self._stage_index])
        # Sums stay on the device: reading them at every step would make the host wait for it.
        sums = torch.zeros(2, device=device)
        self.parallel.train()
        for i, batch in enumerate(batches):
            factor = recipe.schedule(epoch_in_stage + i / len(batches), self.lengths[self._stage_index])
            for group in self.optimiser.param_groups:
                group["lr"] = self.lr * factor
            index = self.processes.share(batch)
            x, y = normalise(data.train_images[index]), data.train_labels[index]
            for augment in recipe.augment:
                x = augment(x, drawing)
            target = y
            if recipe.mix is not None:
                x, target = recipe.mix(x, y, drawing)
            with autocast(device):
                logits = self.parallel(x)
            # The mean over the batch of all processes: DistributedDataParallel divides the gradients by their number.
            loss = F.cross_entropy(logits.float(), target, self.class_weights, reduction="sum") * (
                self.processes.world / len(batch)
            )
            self.optimiser.zero_grad()
            loss.backward()
            if recipe.l1 or recipe.l2:
                add_penalty_gradient(self.kernels, recipe.l1, recipe.l2)
            self.optimiser.step()
            sums[0] += loss.detach() * (len(batch) / self.processes.world)
            sums[1] += (logits.argmax(1) == y).sum()
            on_step(len(batches))
        self.processes.add_up(sums)
        loss_mean, accuracy = (sums / sum(map(len, batches))).tolist()
        return loss_mean, accuracy, len(batches)

    def _require_finite(self, kind: str, loss: float) -> None:
        if not math.isfinite(loss):
            raise Diverged(f"the {kind} loss became {loss} in epoch {self.epoch + 1}")

    def _keep_best(self, val_accuracy: float) -> None:
        if self.recipe.patience is None and not any(stage.from_best for stage in self.recipe.stages):
            return
        if val_accuracy > self.best_accuracy:
            self.best_accuracy, self.best_epoch = val_accuracy, self.epoch
            self.best = copy.deepcopy(self.model.state_dict())
        if self.recipe.patience is not None and self.epoch - self.best_epoch >= self.recipe.patience:
            self.stopped = True

    def outcome(self) -> Outcome:
        """The final figures. With early stopping they are those of the best weights, which the model then has."""
        start = time.perf_counter()
        if self.recipe.patience is not None and self.best is not None:
            self.model.load_state_dict(self.best)
        averaging = self.recipe.averaging
        torch.manual_seed(self._seed("averaging", of_process=True))
        _, val_accuracy = evaluate(self.model, self.val_images, self.val_labels, averaging, self.processes)
        seen = self.indices[:TRAIN_EVAL_IMAGES].to(self.device)
        images, labels = self.data.train_images[seen], self.data.train_labels[seen]
        _, train_accuracy = evaluate(self.model, images, labels, averaging, self.processes)
        return Outcome(
            val_accuracy=val_accuracy,
            train_accuracy=train_accuracy,
            seconds=self.seconds + time.perf_counter() - start,
            step_ms=statistics.median(self.step_ms),
            train_seconds=self.train_seconds,
            parameters=sum(p.numel() for p in self.model.parameters()),
            epochs=self.epoch,
            history=self.history,
        )

    _SIMPLE = ("epoch", "stopped", "best", "best_accuracy", "best_epoch", "seconds", "train_seconds", "step_ms")

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on."""
        return {
            "recipe": repr(self.recipe),
            "seed": self.seed,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "stage": self._stage_index,
            "history": asdict(self.history),
            **{name: getattr(self, name) for name in self._SIMPLE},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state_dict` was taken.

        Raises:
            ValueError: the state is of another recipe or seed.
        """
        if (state.get("recipe"), state.get("seed")) != (repr(self.recipe), self.seed):
            raise ValueError("it is of a run with other settings")
        self._enter(state["stage"])
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.history = History(**state["history"])
        for name in self._SIMPLE:
            setattr(self, name, state[name])


def seconds_of_an_epoch(
    recipe: Recipe,
    data: Dataset,
    *,
    backend: str,
    seed: int,
    processes: Processes = ALONE,
    on_step: Callable[[], object] = lambda: None,
) -> float:
    """What the recipe's first epoch takes with its validation; the mean of the processes. What it learns is lost."""
    trainer = Trainer(recipe, data, backend=backend, seed=seed, processes=processes)
    start = time.perf_counter()
    with contextlib.suppress(Diverged):
        trainer.train_epoch(lambda steps: on_step())
    total = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=trainer.device)
    processes.add_up(total)
    return total.item() / processes.world


def train_rung(
    recipe: Recipe,
    data: Dataset,
    *,
    backend: str,
    seed: int,
    processes: Processes = ALONE,
    saved: Path | None = None,
    resume: bool = False,
    on_step: Callable[[int, int], None] = lambda epochs, steps: None,
    on_epoch: Callable[[History], None] = lambda history: None,
) -> Outcome:
    """Trains the recipe's network on `data`, on the device where `data` lives.

    Every rung starts from the same seed, so weights, batch order and augmentation are common to all of them and a
    rung's result does not depend on which others ran before it.

    Args:
        saved: the checkpoint, written after each epoch.
        resume: go on from the checkpoint if there is one.
        on_step: called after each optimiser step with the numbers of epochs in all and of steps in this one.
        on_epoch: called after each epoch with the history so far, also after those of a checkpoint.

    Raises:
        Diverged: the loss is not finite.
        CheckpointError: the checkpoint cannot be read, or is of another run.
    """
    trainer = Trainer(recipe, data, backend=backend, seed=seed, processes=processes)
    epochs = sum(trainer.lengths)
    if saved is not None and resume and saved.exists():
        try:
            trainer.load_state_dict(checkpoint.load(saved, trainer.device))
        except (ValueError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise checkpoint.CheckpointError(f"{saved}: cannot be gone on from: {reason}") from error
        on_epoch(trainer.history)
    while not trainer.done:
        trainer.train_epoch(lambda steps: on_step(epochs, steps))
        if saved is not None:
            with processes.together():
                if processes.is_first:
                    checkpoint.save(saved, trainer.state_dict())
        on_epoch(trainer.history)
    return trainer.outcome()
