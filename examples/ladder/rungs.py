"""The rungs and the presets.

To add a rung, add one `Rung` to RUNGS: its `changes` are applied to the recipe of the rung that it stands on. A trick
that the recipe cannot express yet is one more field of `Recipe`, read where it acts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .augment import (
    ColourJitter,
    CropAndResize,
    Cutout,
    GaussianNoise,
    HorizontalFlip,
    RandomCrop,
    RandomErasing,
    Rotation,
)
from .averaging import FlipsAndCrops, MonteCarlo
from .mixing import CutMix, MixUp
from .recipe import Recipe, Stage
from .schedules import Cosine, Exponential, Linear, Step, WarmUp, constant


@dataclass(frozen=True)
class Notes:
    """What the course notes report for a rung, validation and training accuracy in [0, 1], in either version."""

    pytorch: float | None = None
    pytorch_train: float | None = None
    earlier: float | None = None
    earlier_train: float | None = None


@dataclass(frozen=True)
class Rung:
    """One trick.

    Attributes:
        number: where it stands in the ladder, "" for a rung beside it.
        name: what --rungs calls it.
        adds: what it adds, in a few words for the table.
        on: the name of the rung that it stands on, with which it is compared; None for one that stands alone.
        changes: fields of Recipe and their new values.
        groups: further names that --rungs knows it by, together with others.
        notes: the course notes' figures.
        compares: whether its accuracy is of the same classes as that of the rung that it stands on.
    """

    number: str
    name: str
    adds: str
    on: str | None
    changes: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[str, ...] = ("ladder",)
    notes: Notes = Notes()
    compares: bool = True

    @property
    def label(self) -> str:
        return f"{self.number} {self.name}".strip()


ERASING = RandomErasing(p=0.75, scale=(0.01, 0.3))
FLIP = HorizontalFlip()
CROP = CropAndResize(scale=(0.7, 1.0))
PRETRAINED, NOVEL = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)

AUGMENTATION, ZOO, AVERAGING = ("augmentation",), ("zoo",), ("averaging",)
SCHEDULES, TRAINING, IMBALANCE, TRANSFER = ("schedules",), ("training",), ("imbalance",), ("transfer",)

RUNGS: tuple[Rung, ...] = (
    Rung("0", "baseline", "3x3 conv + ReLU, max pool, Dense 512", None, notes=Notes(pytorch=0.78, earlier=0.802)),
    Rung("1", "noise", "random erasing", "baseline", {"augment": (ERASING,)}, notes=Notes(pytorch=0.80, earlier=0.809)),
    Rung("2", "batchnorm", "BatchNorm, no conv bias", "noise", {"norm": "batch"}, notes=Notes(earlier=0.82)),
    Rung("3", "dropout", "Dropout 50 %", "batchnorm", {"dropout": 0.5}, notes=Notes(earlier=0.879)),
    Rung("4", "l2", "L2 on the weights", "dropout", {"l2": 1e-4}, notes=Notes(earlier=0.889)),
    Rung("5", "flip", "horizontal flip", "l2", {"augment": (ERASING, FLIP)}, notes=Notes(earlier=0.907)),
    Rung(
        "5b",
        "crop",
        "crop and resize",
        "flip",
        {"augment": (CROP, ERASING, FLIP)},
        notes=Notes(pytorch=0.906, pytorch_train=0.92, earlier=0.912),
    ),
    Rung(
        "6",
        "decay",
        "learning rate x 0.96 an epoch",
        "crop",
        {"schedule": Exponential(0.96)},
        groups=("ladder", *ZOO),
        notes=Notes(pytorch=0.906, pytorch_train=0.98),
    ),
    Rung(
        "6b",
        "instancenorm",
        "InstanceNorm for BatchNorm",
        "decay",
        {"norm": "instance"},
        groups=("ladder", *ZOO),
        notes=Notes(earlier=0.916, earlier_train=0.937),
    ),
    Rung(
        "7",
        "capacity",
        "wider, shift, flip, rotate, erase",
        "decay",
        {"capacity": 1, "augment": (RandomCrop(2), FLIP, Rotation(5.0), ERASING)},
        notes=Notes(pytorch=0.93, pytorch_train=0.96, earlier=0.936, earlier_train=0.979),
    ),
    Rung("8", "skip", "skip connections", "capacity", {"skip": True}, notes=Notes(pytorch=0.93, pytorch_train=0.97)),
    Rung("9", "wide", "wider again", "skip", {"capacity": 2}, notes=Notes(pytorch=0.945, pytorch_train=0.983)),
    # Beside the ladder, each on the rung that shows it best.
    Rung("1b", "gaussian", "Gaussian noise / 100", "baseline", {"augment": (GaussianNoise(),)}, AUGMENTATION),
    Rung("4b", "l1l2", "L1 + L2 on the weights", "dropout", {"l1": 1e-6, "l2": 1e-4}, ("regularisation",)),
    Rung("", "cutout", "cutout for erasing", "decay", {"augment": (CROP, Cutout(), FLIP)}, AUGMENTATION),
    Rung("", "mixup", "mixup", "decay", {"mix": MixUp()}, AUGMENTATION),
    Rung("", "cutmix", "CutMix", "decay", {"mix": CutMix()}, AUGMENTATION),
    Rung("", "jitter", "colour jitter", "decay", {"augment": (CROP, ERASING, FLIP, ColourJitter())}, AUGMENTATION),
    Rung(
        "",
        "resized_crop",
        "random resized crop",
        "decay",
        {"augment": (CropAndResize((0.25, 1.0), (3 / 4, 4 / 3)), ERASING, FLIP)},
        AUGMENTATION,
    ),
    Rung("", "stochastic_depth", "stochastic depth", "skip", {"drop_path": 0.2}, ("regularisation",)),
    Rung("", "no_norm", "no normalisation", "decay", {"norm": None}, ZOO),
    Rung("", "layernorm", "LayerNorm over the channels", "decay", {"norm": "layer"}, ZOO),
    Rung("", "groupnorm", "GroupNorm, 8 channels a group", "decay", {"norm": "group"}, ZOO),
    Rung("", "lrn_inter", "LRN between channels", "decay", {"norm": "lrn_inter"}, ZOO),
    Rung("", "lrn_intra", "LRN within channels", "decay", {"norm": "lrn_intra"}, ZOO),
    Rung("", "batchrenorm", "BatchRenorm", "decay", {"norm": "renorm"}, ZOO),
    Rung("", "weightnorm", "weight normalisation", "decay", {"norm": "weight"}, ZOO),
    Rung("", "spectralnorm", "spectral normalisation", "decay", {"norm": "spectral"}, ZOO),
    Rung("", "tta", "mean over crops and flips", "decay", {"averaging": FlipsAndCrops()}, AVERAGING),
    Rung("", "mc_dropout", "mean over 16 dropout masks", "decay", {"averaging": MonteCarlo()}, AVERAGING),
    Rung("", "step", "x 0.1 at 1/2 and 3/4", "decay", {"schedule": Step()}, SCHEDULES),
    Rung("", "cosine", "cosine", "decay", {"schedule": Cosine()}, SCHEDULES),
    Rung("", "linear", "linear to 0", "decay", {"schedule": Linear()}, SCHEDULES),
    Rung("", "warmup", "warm-up, then cosine", "decay", {"schedule": WarmUp(Cosine())}, SCHEDULES),
    Rung(
        "",
        "stagewise",
        "3 stages from the best weights",
        "decay",
        {
            "schedule": constant,
            "stages": (Stage(0.5), Stage(0.25, lr=3e-4, from_best=True), Stage(0.25, lr=1e-4, from_best=True)),
        },
        TRAINING,
    ),
    Rung("", "early_stopping", "stop early, best weights", "decay", {"patience": 5}, TRAINING),
    Rung(
        "",
        "adam_sgd",
        "Adam first, SGD later",
        "decay",
        {"schedule": constant, "stages": (Stage(0.6), Stage(0.4, optimiser="sgd", lr=0.01))},
        TRAINING,
    ),
    Rung("", "imbalanced", "long-tailed images, 1 to 20", "decay", {"imbalance": 0.05}, IMBALANCE),
    Rung("", "class_weights", "class weights against imbalance", "imbalanced", {"class_weights": True}, IMBALANCE),
    Rung("", "oversampling", "over-sampling against imbalance", "imbalanced", {"resample": "over"}, IMBALANCE),
    Rung("", "undersampling", "under-sampling against imbalance", "imbalanced", {"resample": "under"}, IMBALANCE),
    Rung(
        "",
        "novel",
        "only the last 5 classes",
        "decay",
        {"stages": (Stage(classes=NOVEL),)},
        TRANSFER,
        compares=False,
    ),
    Rung(
        "",
        "finetune",
        "half the time on the first 5",
        "novel",
        {"stages": (Stage(0.5, classes=PRETRAINED), Stage(0.5, classes=NOVEL, fresh_head=True))},
        TRANSFER,
    ),
    # The setting of D. Page's "How to train your ResNet" (2018).
    Rung(
        "",
        "speed",
        "ResNet-9, 94 % in little time",
        None,
        {
            "network": "resnet9",
            "norm": "batch",
            "augment": (RandomCrop(4), FLIP, Cutout(8)),
            "optimiser": "sgd",
            "lr": 0.4,
            "schedule": WarmUp(Linear(), share=0.2),
            "l2": 2.5e-4,
            "batch_size": 512,
            "epochs": 24,
            "averaging": FlipsAndCrops(0),
        },
        ("speed",),
    ),
)


@dataclass(frozen=True)
class Preset:
    """A budget: how many images, and the recipe that the first rung starts from."""

    train_images: int
    recipe: Recipe


PRESETS: dict[str, Preset] = {
    # Two minutes a rung on two cores. So few images are soon known by heart, which is what most tricks are against.
    # Dropout stays in the head: after every pooling as well it slows learning by more than so few steps can win back.
    "quick": Preset(
        8_000,
        Recipe(
            epochs=25,
            sizes=((16, 32, 64), (24, 48, 96), (32, 64, 128)),
            resnet_width=16,
            curve_images=2_000,
        ),
    ),
    "full": Preset(
        50_000,
        Recipe(epochs=75, sizes=((32, 64, 128), (64, 128, 256), (128, 256, 512)), dropout_after_pooling=True),
    ),
}


def find(name: str) -> Rung:
    """The rung of that name."""
    return next(rung for rung in RUNGS if rung.name == name)


def recipe_of(rung: Rung, start: Recipe) -> Recipe:
    """The recipe of `rung`: `start` with the changes of the rungs that it stands on, and its own."""
    below = start if rung.on is None else recipe_of(find(rung.on), start)
    return replace(below, **rung.changes)


def select(wanted: str) -> list[Rung]:
    """The rungs in a comma-separated list of names, numbers and groups, in the order of RUNGS, each once.

    Raises:
        ValueError: an entry is none of these; the message lists the known ones.
    """
    chosen = set()
    for entry in (part.strip().lower() for part in wanted.split(",")):
        matches = [
            i for i, rung in enumerate(RUNGS) if entry and entry in (rung.number, rung.name, *rung.groups, "all")
        ]
        if not matches:
            names = [*(rung.label for rung in RUNGS), *(group for rung in RUNGS for group in rung.groups), "all"]
            known = ", ".join(dict.fromkeys(names))
            raise ValueError(f"unknown rung {entry!r}, known: {known}")
        chosen.update(matches)
    return [RUNGS[i] for i in sorted(chosen)]
