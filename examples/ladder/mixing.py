"""Mixing a batch with itself: `(images, labels, generator) -> (images, targets)`.

Labels are int64 (B,), targets are class probabilities (B, classes). Both draw one share lam from U(0, 1), which is
Beta(1, 1) as in the papers' CIFAR-10 runs, and pair the images by a random permutation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import CLASSES

Mixing = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


def _partners(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Each image's partner, and the targets of both."""
    order = torch.randperm(len(images), generator=generator, device=images.device)
    targets = F.one_hot(labels, CLASSES).float()
    return images[order], targets, targets[order]


@dataclass(frozen=True)
class MixUp:
    """x = lam * x_i + (1 - lam) * x_j, and the targets likewise (Zhang et al. 2017, arXiv:1710.09412)."""

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        others, targets, other_targets = _partners(images, labels, generator)
        lam = torch.rand((), generator=generator, device=images.device)
        return torch.lerp(others, images, lam), torch.lerp(other_targets, targets, lam)


@dataclass(frozen=True)
class CutMix:
    """A box of each image comes from its partner, and so does the box's share of the target.

    The box has the image's aspect ratio and the area 1 - lam, its centre is uniform, and what hangs over the edge is
    cut off, which the targets take into account (Yun et al. 2019, arXiv:1905.04899).
    """

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        others, targets, other_targets = _partners(images, labels, generator)
        height, width = images.shape[-2:]
        lam, y, x = torch.rand(3, generator=generator, device=images.device).unbind()
        half = 0.5 * (1.0 - lam).sqrt()
        rows = (torch.arange(height, device=images.device) + 0.5) / height
        columns = (torch.arange(width, device=images.device) + 0.5) / width
        box = ((rows - y).abs() < half)[:, None] & ((columns - x).abs() < half)[None, :]
        share = box.float().mean()
        return torch.where(box, others, images), torch.lerp(targets, other_targets, share)
