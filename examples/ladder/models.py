"""The ladder's network, on fastnorm's layers or on torch.nn's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .rungs import Recipe

BACKENDS = ("fastnorm", "torch")


class ConvBlock(nn.Module):
    """3x3 same-padding convolution, normalisation, ReLU.

    fastnorm's norm applies the ReLU itself; torch.nn's is followed by one. Module names, and so state_dict keys, are
    the same either way. The convolution has no bias where a norm follows: subtracting the mean would cancel it.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: str | None, backend: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=norm is None)
        self.norm: nn.Module = nn.Identity()
        self.activation: nn.Module = nn.ReLU()
        if norm == "batch" and backend == "fastnorm":
            import fastnorm

            self.norm = fastnorm.BatchNorm2d(out_channels, activation="relu")
            self.activation = nn.Identity()
        elif norm == "batch":
            self.norm = nn.BatchNorm2d(out_channels)
        elif norm is not None:
            raise ValueError(f"norm must be None or 'batch', got {norm!r}")

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


def make_dropout(p: float, backend: str) -> nn.Module:
    """Element-wise dropout; nothing at all where p is 0."""
    if p == 0:
        return nn.Identity()
    if backend == "fastnorm":
        import fastnorm

        return fastnorm.Dropout(p)
    return nn.Dropout(p)


class ConvNet(nn.Module):
    """Stages of convolutions, each ending in 2x2 max pooling, then Dense + ReLU and a last Dense to the logits.

    Dropout at the full rate acts before the last Dense. With dropout_after_pooling it also follows every pooling, at
    half the rate, since these feature maps are narrow.

    Args:
        recipe: its widths, convs_per_stage, dense, norm, dropout and dropout_after_pooling are read.
        backend: "fastnorm" or "torch".
        image_size: height and width of the images in pixels.
    """

    def __init__(self, recipe: Recipe, backend: str, *, image_size: int = 32, classes: int = 10) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        stages = []
        channels = 3
        pooling_dropout = recipe.dropout / 2 if recipe.dropout_after_pooling else 0.0
        for width in recipe.widths:
            blocks = []
            for _ in range(recipe.convs_per_stage):
                blocks.append(ConvBlock(channels, width, recipe.norm, backend))
                channels = width
            stages.append(nn.Sequential(*blocks, nn.MaxPool2d(2), make_dropout(pooling_dropout, backend)))
        self.stages = nn.Sequential(*stages)
        features = channels * (image_size >> len(recipe.widths)) ** 2
        self.dense = nn.Linear(features, recipe.dense)
        self.dropout = make_dropout(recipe.dropout, backend)
        self.classifier = nn.Linear(recipe.dense, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(x).flatten(1)
        return self.classifier(self.dropout(self.dense(x).relu()))


def he_init(model: nn.Module, generator: torch.Generator) -> None:
    """He initialisation (He et al. 2015, arXiv:1502.01852) of every convolution and Dense, biases zero.

    Weights are normal with variance 2 / fan_in. Drawn from `generator` in module order, so two models of the same
    shape start from the same numbers whatever their other layers are.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def build_model(recipe: Recipe, backend: str, seed: int) -> ConvNet:
    """The network of `recipe` with its initial weights, which depend on the seed but not on the backend."""
    model = ConvNet(recipe, backend)
    he_init(model, torch.Generator().manual_seed(seed))
    return model
