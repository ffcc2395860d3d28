"""`--check`: what is looked at before an hour is spent on training.

The first loss is near log(10), for the network knows nothing yet; a few batches can be learnt by heart, or something
between the images and the loss is broken; and the learning rate is neither too small nor too large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import CLASSES, Dataset
from .evaluate import autocast, normalise
from .models import build_model
from .optimisers import make_optimiser
from .recipe import Recipe

# How far the first loss may be from log(10), in nats. Logits of standard deviation s add s^2 / 2 to it.
LOSS_MARGIN = 0.2
OVERFIT_BATCHES = 4
OVERFIT_BATCH = 64
OVERFIT_EPOCHS = 150
SWEEP_RATES = tuple(10 ** (exponent / 2) for exponent in range(-10, 1))  # 1e-5 to 1
SWEEP_STEPS = 30


@dataclass(frozen=True)
class Checks:
    """What the checks found.

    Attributes:
        initial_loss: cross-entropy of the untrained network in nats.
        overfit_accuracy: on `overfit_images` images after `overfit_epochs` epochs on them, in training mode.
        sweep: learning rates, and the training loss after SWEEP_STEPS steps with each; None where it is no number.
    """

    initial_loss: float
    overfit_accuracy: float
    overfit_images: int
    overfit_epochs: int
    sweep: dict[float, float | None]

    @property
    def problems(self) -> list[str]:
        """What is wrong, a sentence each."""
        found = []
        if not abs(self.initial_loss - math.log(CLASSES)) < LOSS_MARGIN:
            found.append(
                f"the first loss must be near log({CLASSES}) = {math.log(CLASSES):.3f}, got {self.initial_loss:.3f}"
            )
        if self.overfit_accuracy < 1.0:
            found.append(f"{self.overfit_images} images must be learnt to 100 %, got {self.overfit_accuracy:.1%}")
        return found

    def as_dict(self, rung: str, lr: float) -> dict[str, Any]:
        """For results.json."""
        return {
            "rung": rung,
            "initial_loss": self.initial_loss,
            "overfit_accuracy": self.overfit_accuracy,
            "overfit_images": self.overfit_images,
            "overfit_epochs": self.overfit_epochs,
            "lr_sweep": {
                "lr": list(self.sweep),
                "loss": list(self.sweep.values()),
                "steps": SWEEP_STEPS,
                "initial_loss": self.initial_loss,
                "chosen": lr,
            },
        }


def run_checks(
    recipe: Recipe, data: Dataset, *, backend: str, seed: int, on_step: Callable[[], object] = lambda: None
) -> Checks:
    """Runs all three on the recipe's network, without dropout and augmentation: these are to be seen through."""
    plain = replace(recipe, dropout=0.0, drop_path=0.0, augment=(), mix=None)
    batch = min(plain.batch_size, len(data.train_labels))
    # Adam at its usual rate whatever the recipe has, for here the network and the data are on trial.
    model = _Training(replace(plain, optimiser="adam"), backend, seed, data, 1e-3)
    initial_loss = model.loss(slice(0, batch)).item()
    images = min(OVERFIT_BATCHES * OVERFIT_BATCH, len(data.train_labels))
    epochs, accuracy = _overfit(model, images, on_step)
    sweep: dict[float, float | None] = {}
    for lr in SWEEP_RATES:
        trained = _Training(plain, backend, seed, data, lr)
        losses = [trained.step(chosen) for chosen in _batches(len(data.train_labels), batch, on_step)]
        last = torch.stack(losses[-5:]).mean().item()
        sweep[lr] = last if math.isfinite(last) else None
    return Checks(initial_loss, accuracy, images, epochs, sweep)


class _Training:
    """A network, its optimiser, and the bare training step."""

    def __init__(self, recipe: Recipe, backend: str, seed: int, data: Dataset, lr: float) -> None:
        device = data.train_images.device
        self.data = data
        self.model = build_model(recipe, backend, seed).to(device, memory_format=torch.channels_last).train()
        self.optimiser = make_optimiser(recipe.optimiser, self.model.parameters(), lr)
        self.logits = torch.empty(0)

    def loss(self, chosen: slice) -> Tensor:
        images, labels = self.data.train_images[chosen], self.data.train_labels[chosen]
        with autocast(images.device):
            self.logits = self.model(normalise(images)).float()
        return F.cross_entropy(self.logits, labels)

    def step(self, chosen: slice) -> Tensor:
        loss = self.loss(chosen)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return loss.detach()


def _overfit(model: _Training, images: int, on_step: Callable[[], object]) -> tuple[int, float]:
    """Epochs until the first `images` images are known by heart, or OVERFIT_EPOCHS, and the accuracy then."""
    accuracy = 0.0
    for epoch in range(1, OVERFIT_EPOCHS + 1):
        correct = 0
        for start in range(0, images, OVERFIT_BATCH):
            chosen = slice(start, min(start + OVERFIT_BATCH, images))
            model.step(chosen)
            correct += int((model.logits.argmax(1) == model.data.train_labels[chosen]).sum())
            on_step()
        accuracy = correct / images
        if accuracy == 1.0:
            return epoch, accuracy
    return OVERFIT_EPOCHS, accuracy


def _batches(images: int, size: int, on_step: Callable[[], object]) -> Iterator[slice]:
    for i in range(SWEEP_STEPS):
        start = i * size % max(1, images - size + 1)
        yield slice(start, start + size)
        on_step()
