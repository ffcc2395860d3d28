"""Training and evaluating one rung."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import MEAN, STD, Dataset
from .models import build_model
from .rungs import Recipe

EVAL_BATCH = 500
# The training accuracy is measured on this many training images; a fixed share is enough for a tenth of a percent.
TRAIN_EVAL_IMAGES = 10_000


@dataclass
class History:
    """One value an epoch. Training figures are running means over the epoch: augmented images, dropout on."""

    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_accuracy: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """What one rung came to. Accuracies in [0, 1], both in eval mode on images as they are."""

    val_accuracy: float
    train_accuracy: float
    seconds: float
    parameters: int
    history: History


@functools.cache
def _channel_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept: copying them to a GPU for every batch would make the host wait.
    return tuple(255 * torch.tensor(value, device=device).view(3, 1, 1) for value in (MEAN, STD))


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to float32 in channels_last, (x / 255 - mean) / std per channel."""
    mean, std = _channel_constants(images.device)
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, float32 elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in eval mode."""
    model.eval()
    loss = torch.zeros((), device=images.device)
    correct = torch.zeros((), dtype=torch.int64, device=images.device)
    for x, y in zip(images.split(EVAL_BATCH), labels.split(EVAL_BATCH), strict=True):
        with autocast(images.device):
            logits = model(normalise(x))
        loss += F.cross_entropy(logits.float(), y, reduction="sum")
        correct += (logits.argmax(1) == y).sum()
    return loss.item() / len(labels), correct.item() / len(labels)


def train_rung(
    recipe: Recipe,
    data: Dataset,
    *,
    backend: str,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
    on_epoch: Callable[[History], None] = lambda history: None,
) -> Outcome:
    """Trains the recipe's network from scratch on `data`, on the device where `data` lives.

    Every rung starts from the same seed, so weights, batch order and augmentation are common to all of them and a
    rung's result does not depend on which others ran before it.

    Args:
        on_step: called after each optimiser step.
        on_epoch: called after each epoch with the history so far.
    """
    start = time.perf_counter()
    device = data.train_images.device
    torch.manual_seed(seed)  # dropout draws from torch's own generators
    order = torch.Generator().manual_seed(seed)
    augmenting = torch.Generator(device).manual_seed(seed)
    model = build_model(recipe, backend, seed).to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(model.parameters(), lr=recipe.lr, fused=True)
    history = History()
    for _ in range(recipe.epochs):
        model.train()
        # Sums stay on the device: reading them at every step would make the host wait for it.
        loss_sum = torch.zeros((), device=device)
        correct = torch.zeros((), dtype=torch.int64, device=device)
        shuffled = torch.randperm(len(data.train_labels), generator=order).to(device)
        for index in shuffled.split(recipe.batch_size):
            x, y = normalise(data.train_images[index]), data.train_labels[index]
            for augment in recipe.augment:
                x = augment(x, augmenting)
            with autocast(device):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            loss_sum += loss.detach() * len(y)
            correct += (logits.argmax(1) == y).sum()
            on_step()
        history.train_loss.append(loss_sum.item() / len(shuffled))
        history.train_accuracy.append(correct.item() / len(shuffled))
        val_loss, val_accuracy = evaluate(model, data.val_images, data.val_labels)
        history.val_loss.append(val_loss)
        history.val_accuracy.append(val_accuracy)
        on_epoch(history)
    _, train_accuracy = evaluate(model, data.train_images[:TRAIN_EVAL_IMAGES], data.train_labels[:TRAIN_EVAL_IMAGES])
    return Outcome(
        val_accuracy=history.val_accuracy[-1],
        train_accuracy=train_accuracy,
        seconds=time.perf_counter() - start,
        parameters=sum(p.numel() for p in model.parameters()),
        history=history,
    )
