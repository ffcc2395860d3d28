"""The ladder's network.

It is written with torch.nn's layers. For `--backend fastnorm` whole models change hands as a user's would:
fastnorm.convert makes its normalisations and dropouts fastnorm's, fastnorm.fuse puts ReLUs and residuals into them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .averaging import MonteCarlo
from .data import CLASSES
from .norms import FASTNORM_ONLY, WITH_BIAS, make_norm, parametrise
from .recipe import Recipe

BACKENDS = ("fastnorm", "torch")
# The last layer starts smaller than He's, whose factor is for a ReLU behind it: so the first loss is near log(10).
HEAD_SCALE = 0.1


def make_conv(in_channels: int, out_channels: int, norm: str | None) -> nn.Conv2d:
    """3x3, same padding; no bias where the norm behind it has one or would cancel it."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=norm not in WITH_BIAS)


class ConvBlock(nn.Module):
    """relu(norm(conv(x)))."""

    def __init__(self, in_channels: int, out_channels: int, norm: str | None) -> None:
        super().__init__()
        self.conv = make_conv(in_channels, out_channels, norm)
        self.norm = make_norm(norm, out_channels)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


class Residual(nn.Module):
    """relu(norm(conv(body(x))) + x), body being one ConvBlock fewer than `convs` (He et al. 2015, arXiv:1512.03385)."""

    def __init__(self, channels: int, convs: int, norm: str | None) -> None:
        super().__init__()
        self.body = nn.Sequential(*(ConvBlock(channels, channels, norm) for _ in range(convs - 1)))
        self.conv = make_conv(channels, channels, norm)
        self.norm = make_norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(self.body(x))) + x)


class StochasticResidual(Residual):
    """A residual block whose branch is left out with probability p for each image while training.

    Stochastic depth (Huang et al. 2016, arXiv:1603.09382); what stays is divided by 1 - p.
    """

    def __init__(self, channels: int, convs: int, norm: str | None, p: float) -> None:
        import fastnorm

        super().__init__(channels, convs, norm)
        self.drop_path = fastnorm.DropPath(p)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.drop_path(self.norm(self.conv(self.body(x)))) + x)


def make_dropout(p: float) -> nn.Module:
    """Element-wise dropout; nothing at all where p is 0."""
    return nn.Dropout(p) if p else nn.Identity()


class ConvNet(nn.Module):
    """Stages of convolutions, each ending in 2x2 max pooling, then Dense + ReLU and a last Dense to the logits.

    Dropout acts before the last Dense and, with dropout_after_pooling, at half the rate after every pooling.

    Args:
        recipe: its widths, convs_per_stage, dense, norm, skip, drop_path, dropout, dropout_after_pooling are read.
        image_size: height and width of the images in pixels.
    """

    def __init__(self, recipe: Recipe, *, image_size: int = 32) -> None:
        super().__init__()
        stages = []
        channels = 3
        pooling_dropout = recipe.dropout / 2 if recipe.dropout_after_pooling else 0.0
        for i, width in enumerate(recipe.widths):
            blocks: list[nn.Module] = [ConvBlock(channels, width, recipe.norm)]
            rest = recipe.convs_per_stage - 1
            if recipe.skip and rest and recipe.drop_path:
                # Rising linearly with depth, as in the paper.
                p = recipe.drop_path * (i + 1) / len(recipe.widths)
                blocks.append(StochasticResidual(width, rest, recipe.norm, p))
            elif recipe.skip and rest:
                blocks.append(Residual(width, rest, recipe.norm))
            else:
                blocks += [ConvBlock(width, width, recipe.norm) for _ in range(rest)]
            stages.append(nn.Sequential(*blocks, nn.MaxPool2d(2), make_dropout(pooling_dropout)))
            channels = width
        self.stages = nn.Sequential(*stages)
        features = channels * (image_size >> len(recipe.widths)) ** 2
        self.dense = nn.Linear(features, recipe.dense)
        self.dropout = make_dropout(recipe.dropout)
        self.head = nn.Linear(recipe.dense, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(x).flatten(1)
        return self.head(self.dropout(self.dense(x).relu()))


class ResNet9(nn.Module):
    """The network of the public CIFAR-10 speed runs: D. Page, "How to train your ResNet" (2018).

    A convolution, then three stages of convolution and pooling that double the channels, a residual block of two
    convolutions after the first and the last; the maximum over what is left, one Dense, its result divided by 8.
    """

    def __init__(self, width: int, norm: str | None) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            ConvBlock(3, width, norm),
            ConvBlock(width, 2 * width, norm),
            nn.MaxPool2d(2),
            Residual(2 * width, 2, norm),
            ConvBlock(2 * width, 4 * width, norm),
            nn.MaxPool2d(2),
            ConvBlock(4 * width, 8 * width, norm),
            nn.MaxPool2d(2),
            Residual(8 * width, 2, norm),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(8 * width, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x)) * 0.125


def he_init(modules: nn.Module, generator: torch.Generator, scale: float = 1.0) -> None:
    """He initialisation (He et al. 2015, arXiv:1502.01852) of every convolution and Dense, biases zero.

    Weights are normal with standard deviation scale * sqrt(2 / fan_in). Drawn from `generator` in module order, so two
    models of the same shape start from the same numbers whatever their other layers are.
    """
    for module in modules.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            # Drawn where the generator lives, for the network may lie on another device.
            weight = torch.empty(module.weight.shape, device=generator.device)
            nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
            with torch.no_grad():
                module.weight.copy_(weight.mul_(scale))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def reset_head(model: ConvNet | ResNet9, generator: torch.Generator) -> None:
    """Gives the last layer new initial weights, in place."""
    he_init(model.head, generator, HEAD_SCALE)


def needs_fastnorm(recipe: Recipe) -> bool:
    """Whether the recipe uses what torch.nn does not have."""
    return recipe.norm in FASTNORM_ONLY or recipe.drop_path > 0 or isinstance(recipe.averaging, MonteCarlo)


def build_model(recipe: Recipe, backend: str, seed: int) -> ConvNet | ResNet9:
    """The network of `recipe` with its initial weights, which depend on the seed but not on the backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for what draws from torch's own generator: spectral normalisation's vectors
        if recipe.network == "resnet9":
            model: ConvNet | ResNet9 = ResNet9(recipe.resnet_width, recipe.norm)
        else:
            model = ConvNet(recipe)
        generator = torch.Generator().manual_seed(seed)
        he_init(model, generator)
        reset_head(model, generator)
        parametrise(model, recipe.norm, backend)
    if backend == "fastnorm":
        import fastnorm

        fastnorm.fuse(fastnorm.convert(model))
    return model
