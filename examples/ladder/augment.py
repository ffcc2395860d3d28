"""Augmentation as batched tensor code: one call a batch, on the device where the batch lives, no loop over images.

An augmentation is a callable `(images, generator) -> images`. Images are (B, C, H, W) floating point, already
normalised per channel; the result is a new tensor of the same shape, dtype, device and memory format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


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
        batch, _, height, width = images.shape
        touched, area, y, x = torch.rand(4, batch, 1, generator=generator, device=images.device).unbind()
        smallest, largest = self.scale
        area = (smallest + (largest - smallest) * area) * (height * width)
        side = area.sqrt().round().clamp(max=min(height, width))
        top = (y * (height - side + 1)).floor()
        left = (x * (width - side + 1)).floor()
        rows = torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        in_rows = (rows >= top) & (rows < top + side) & (touched < self.p)
        in_columns = (columns >= left) & (columns < left + side)
        erased = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
        return torch.where(erased, self.value, images)  # masked_fill would drop channels_last
