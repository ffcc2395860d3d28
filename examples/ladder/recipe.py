"""What one training run is made of: every field that a rung may change."""

from __future__ import annotations

from dataclasses import dataclass

from .augment import Augmentation
from .averaging import Averaging
from .mixing import Mixing
from .schedules import Schedule, constant


@dataclass(frozen=True)
class Stage:
    """A part of a training run. It starts with a fresh optimiser, and the schedule starts anew in it.

    Attributes:
        share: of the run's epochs, relative to the other stages'; every stage has at least one epoch.
        optimiser, lr: instead of the recipe's.
        from_best: go on from the best weights so far instead of the last ones.
        classes: train and validate on images of these classes alone. Accuracies on other classes do not compare: where
            stages differ in them, none is from_best, and the recipe has no patience.
        fresh_head: start with a new last layer.
    """

    share: float = 1.0
    optimiser: str | None = None
    lr: float | None = None
    from_best: bool = False
    classes: tuple[int, ...] | None = None
    fresh_head: bool = False


@dataclass(frozen=True)
class Recipe:
    """Everything that a rung may change about one training run.

    A checkpoint knows its recipe by repr(), which must be the same in another process: no plain functions in a recipe.

    Attributes:
        epochs: passes over the training images.
        sizes: output channels of each stage of the network, at each level of capacity; a preset has these.
        resnet_width: channels of the speed network's first convolution; a preset has it.
        capacity: which of `sizes` is used.
        network: "convnet" or "resnet9", both in models.py.
        convs_per_stage: every stage ends in a 2x2 max pooling.
        dense: outputs of the first Dense.
        norm: a name in norms.py, or None; between each convolution and its ReLU.
        skip: whether the convolutions after the first of each stage form a residual branch.
        drop_path: the probability that the last residual branch is left out for an image; the first ones less.
        dropout: before the last Dense.
        dropout_after_pooling: whether it also follows every pooling, at half the rate, for these maps are narrow.
        l1, l2: the penalty l1 * sum |w| + l2 * sum w^2 over the weights of convolutions and Dense.
        augment: applied in this order to each training batch.
        mix: mixes the images and the labels of a batch with each other.
        optimiser: "adam" or "sgd".
        lr: learning rate, times the schedule's factor.
        schedule: factor of lr in the course of a stage.
        stages: what the run is divided into.
        batch_size: images a step, those of all processes together.
        patience: stop after so many epochs without a better validation accuracy, and return the best weights.
        imbalance: keep all images of the first class, this share of the last, geometrically between them.
        class_weights: weigh the loss of each class by the inverse of its frequency.
        resample: "over" or "under": draw as many images of each class as the most, or the least, frequent has.
        averaging: how the final figures are predicted; None is one plain pass.
        curve_images: the figures by epoch are of the first so many validation images, the final ones of all.
    """

    epochs: int
    sizes: tuple[tuple[int, ...], ...]
    resnet_width: int = 64
    capacity: int = 0
    network: str = "convnet"
    convs_per_stage: int = 2
    dense: int = 512
    norm: str | None = None
    skip: bool = False
    drop_path: float = 0.0
    dropout: float = 0.0
    dropout_after_pooling: bool = False
    l1: float = 0.0
    l2: float = 0.0
    augment: tuple[Augmentation, ...] = ()
    mix: Mixing | None = None
    optimiser: str = "adam"
    lr: float = 1e-3
    schedule: Schedule = constant
    stages: tuple[Stage, ...] = (Stage(),)
    batch_size: int = 256
    patience: int | None = None
    imbalance: float | None = None
    class_weights: bool = False
    resample: str | None = None
    averaging: Averaging | None = None
    curve_images: int = 10_000

    @property
    def widths(self) -> tuple[int, ...]:
        return self.sizes[self.capacity]
