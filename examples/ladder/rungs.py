"""The rungs and the presets.

To add a rung, add one `Rung` to LADDER: its `changes` are applied to the recipe of the rung before it. A trick that
the recipe cannot express yet is one more field of `Recipe`, read where it acts (models.py or train.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .augment import Augmentation, RandomErasing


@dataclass(frozen=True)
class Recipe:
    """Everything that a rung may change about one training run."""

    epochs: int
    widths: tuple[int, ...]  # output channels of each stage; every stage ends in a 2x2 max pooling
    convs_per_stage: int
    dense: int = 512
    norm: str | None = None  # None or "batch", between each convolution and its ReLU
    dropout: float = 0.0
    dropout_after_pooling: bool = False  # where dropout acts besides the last Dense: see models.ConvNet
    augment: tuple[Augmentation, ...] = ()  # applied in this order to each training batch
    lr: float = 1e-3
    batch_size: int = 256


@dataclass(frozen=True)
class Rung:
    """One trick.

    Attributes:
        name: what --rungs calls it.
        adds: what it adds to the rung before it, in a few words for the table.
        changes: fields of Recipe and their new values.
        notes_accuracy: the validation accuracy in [0, 1] that the course notes report for it: their PyTorch
            version where that has the rung, else their earlier version.
    """

    name: str
    adds: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    notes_accuracy: float | None = None


LADDER: tuple[Rung, ...] = (
    Rung("baseline", "3x3 conv + ReLU, max pool, Dense 512", notes_accuracy=0.78),
    Rung("noise", "random erasing", {"augment": (RandomErasing(p=0.75, scale=(0.01, 0.3)),)}, notes_accuracy=0.80),
    Rung("batchnorm", "BatchNorm, no conv bias", {"norm": "batch"}, notes_accuracy=0.82),
    Rung("dropout", "Dropout 50 %", {"dropout": 0.5}, notes_accuracy=0.879),
)


@dataclass(frozen=True)
class Preset:
    """A budget: how many images, and the recipe that the first rung starts from."""

    train_images: int
    recipe: Recipe


PRESETS: dict[str, Preset] = {
    # About a minute a rung on two cores. Dropout stays in the head: after every pooling as well it slows learning by
    # more than so few epochs can win back.
    "quick": Preset(20_000, Recipe(epochs=10, widths=(16, 32, 64), convs_per_stage=2)),
    "full": Preset(50_000, Recipe(epochs=75, widths=(32, 64, 128), convs_per_stage=2, dropout_after_pooling=True)),
}


def recipe_of(rung: Rung, start: Recipe) -> Recipe:
    """The recipe of `rung`: `start` with the changes of every rung up to and including it."""
    recipe = start
    for step in LADDER[: LADDER.index(rung) + 1]:
        recipe = replace(recipe, **step.changes)
    return recipe


def previous_of(rung: Rung) -> Rung | None:
    """The rung that `rung` is compared with; None for the first."""
    index = LADDER.index(rung)
    return LADDER[index - 1] if index else None


def select(wanted: str, ladder: Sequence[Rung] = LADDER) -> list[Rung]:
    """The rungs named in a comma-separated list of names and numbers, in the ladder's order, each once.

    Raises:
        ValueError: an entry is neither a rung's name nor its number; the message lists the known ones.
    """
    chosen = set()
    for entry in (part.strip().lower() for part in wanted.split(",")):
        matches = [i for i, rung in enumerate(ladder) if entry in (rung.name, str(i), "all")]
        if not matches:
            known = ", ".join(f"{i} {rung.name}" for i, rung in enumerate(ladder))
            raise ValueError(f"unknown rung {entry!r}, known: {known}")
        chosen.update(matches)
    return [ladder[i] for i in sorted(chosen)]
