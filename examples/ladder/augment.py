"""Augmentation as batched tensor code: one call a batch, on the device where the batch lives, no loop over images.

An augmentation is a callable `(images, generator) -> images`. Images are (B, C, H, W) floating point, already
normalised per channel; the result is a new tensor of the same shape, dtype, device and memory format.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def _uniform(count: int, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """`count` numbers from U(0, 1) for each image, as tensors (B,)."""
    return torch.rand(count, len(images), generator=generator, device=images.device).unbind()


def _squares(images: Tensor, top: Tensor, left: Tensor, side: Tensor) -> Tensor:
    """A mask (B, 1, H, W) of one square an image; what lies outside the image is cut off."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    top, left, side = top[:, None], left[:, None], side[:, None]
    in_rows = (rows >= top) & (rows < top + side)
    in_columns = (columns >= left) & (columns < left + side)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


@dataclass(frozen=True)
class RandomErasing:
    """Blanks a random square in a random part of the images (Zhong et al. 2017, arXiv:1708.04896).

    torchvision's RandomErasing with ratio=(1, 1): with probability p an image loses a square of area
    U(scale) * H * W, its side rounded to whole pixels, anywhere it fits.

    Args:
        p: the probability that an image is touched, in [0, 1].
        scale: smallest and largest share of the image's area, in (0, 1].
        value: what the square is filled with; on normalised images 0 is the data set's mean colour.
    """

    p: float = 0.75
    scale: tuple[float, float] = (0.01, 0.3)
    value: float = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        height, width = images.shape[-2:]
        touched, area, y, x = _uniform(4, images, generator)
        smallest, largest = self.scale
        area = (smallest + (largest - smallest) * area) * (height * width)
        side = area.sqrt().round().clamp(max=min(height, width))
        top = (y * (height - side + 1)).floor()
        left = (x * (width - side + 1)).floor()
        erased = _squares(images, top, left, torch.where(touched < self.p, side, 0.0))
        return torch.where(erased, self.value, images)  # masked_fill would drop channels_last


@dataclass(frozen=True)
class Cutout:
    """Blanks a square of `side` pixels around a random pixel of each image (DeVries & Taylor 2017, arXiv:1708.04552).

    The square's centre is uniform over the image, so that it may hang over the edge.
    """

    side: int = 16

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        height, width = images.shape[-2:]
        y, x = _uniform(2, images, generator)
        top = (y * height).floor() - self.side // 2
        left = (x * width).floor() - self.side // 2
        return torch.where(_squares(images, top, left, torch.full_like(top, self.side)), 0.0, images)


@dataclass(frozen=True)
class GaussianNoise:
    """Adds N(0, std^2) to every number of a random part of the images.

    Args:
        std: in units of the normalised images; the course notes divide standard normal numbers by 100.
        p: the probability that an image is touched.
    """

    std: float = 0.01
    p: float = 0.5

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        (touched,) = _uniform(1, images, generator)
        # randn_like takes no generator.
        noise = torch.empty_like(images).normal_(0.0, self.std, generator=generator)
        return images + noise * (touched < self.p)[:, None, None, None]


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirrors each image with probability p."""

    p: float = 0.5

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        (drawn,) = _uniform(1, images, generator)
        return torch.where((drawn < self.p)[:, None, None, None], images.flip(3), images)


@dataclass(frozen=True)
class RandomCrop:
    """Shifts each image by up to `padding` whole pixels each way; what comes in from outside is 0.

    torchvision's RandomCrop(size of the image, padding).
    """

    padding: int = 2

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        height, width = images.shape[-2:]
        y, x = _uniform(2, images, generator)
        shifts = 2 * self.padding + 1
        rows = (y * shifts).long()[:, None] + torch.arange(height, device=images.device)
        columns = (x * shifts).long()[:, None] + torch.arange(width, device=images.device)
        # Gathered with the channels last, as they lie in memory.
        padded = F.pad(images, (self.padding,) * 4).permute(0, 2, 3, 1)
        image = torch.arange(len(images), device=images.device)[:, None, None]
        return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _resample(images: Tensor, transform: Tensor) -> Tensor:
    """Each image seen through its affine map (B, 2, 3), bilinear; what comes in from outside is 0.

    The map takes (x, y, 1), output coordinates from -1 to 1, to input coordinates.
    """
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    sampled = F.grid_sample(images, grid.to(images.dtype), padding_mode="zeros", align_corners=False)
    return sampled.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Rotation:
    """Turns each image about its middle by an angle from U(-degrees, degrees); bilinear, 0 from outside."""

    degrees: float = 5.0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        height, width = images.shape[-2:]
        (drawn,) = _uniform(1, images, generator)
        angle = (2.0 * drawn - 1.0) * math.radians(self.degrees)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        # Coordinates run from -1 to 1 along either side, so that sin takes the sides' ratio.
        upper = torch.stack([cos, sin * (height / width), zero], 1)
        lower = torch.stack([-sin * (width / height), cos, zero], 1)
        return _resample(images, torch.stack([upper, lower], 1))


@dataclass(frozen=True)
class CropAndResize:
    """Cuts a random box out of each image and stretches it to the image's size (Szegedy et al. 2014, arXiv:1409.4842).

    Args:
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest ratio of the box's width to its height, log-uniform; clipped to what fits.
    """

    scale: tuple[float, float] = (0.7, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        area, ratio, y, x = _uniform(4, images, generator)
        smallest, largest = self.scale
        area = smallest + (largest - smallest) * area
        low, high = map(math.log, self.ratio)
        aspect = (low + (high - low) * ratio).exp()
        # The box's half sides and centre, the image reaching from -1 to 1.
        half_width = (area * aspect).sqrt().clamp(max=1.0)
        half_height = (area / aspect).sqrt().clamp(max=1.0)
        centre_x = (2.0 * x - 1.0) * (1.0 - half_width)
        centre_y = (2.0 * y - 1.0) * (1.0 - half_height)
        zero = torch.zeros_like(area)
        upper = torch.stack([half_width, zero, centre_x], 1)
        lower = torch.stack([zero, half_height, centre_y], 1)
        return _resample(images, torch.stack([upper, lower], 1))


@dataclass(frozen=True)
class ColourJitter:
    """Changes brightness, contrast and saturation of each image, in this order.

        x = x + U(-brightness, brightness)
        x = mean(x) + U(1 - contrast, 1 + contrast) * (x - mean(x)),   mean over the image
        x = grey + U(1 - saturation, 1 + saturation) * (x - grey),     grey the mean over its colours, by pixel

    In units of the normalised images, that is of the data set's standard deviation.
    """

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        brightness, contrast, saturation = (
            (2.0 * drawn - 1.0)[:, None, None, None] for drawn in _uniform(3, images, generator)
        )
        images = images + self.brightness * brightness
        images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, 1.0 + self.contrast * contrast)
        return torch.lerp(images.mean(1, keepdim=True), images, 1.0 + self.saturation * saturation)
