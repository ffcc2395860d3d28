"""Predictions averaged over several passes: `(model, images) -> log-probabilities`, with the model in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Averaging = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class FlipsAndCrops:
    """Mean probabilities over views that keep the label: the image and its mirror image, each where it is and
    shifted by `shift` pixels towards the four corners (the edge repeated), ten passes in all; only the two mirror
    images where `shift` is 0.
    """

    shift: int = 2

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padded = F.pad(images, (self.shift,) * 4, mode="replicate") if self.shift else images
        middle, end = self.shift, 2 * self.shift
        corners = {(middle, middle), (0, 0), (0, end), (end, 0), (end, end)}
        total = torch.zeros((), device=images.device)
        for top, left in sorted(corners):
            view = padded[:, :, top : top + height, left : left + width]
            for mirrored in (view, view.flip(3)):
                x = mirrored.contiguous(memory_format=torch.channels_last)
                total = total + model(x).float().softmax(1)
        return (total / (2 * len(corners))).log()


@dataclass(frozen=True)
class MonteCarlo:
    """Mean probabilities over `samples` passes with dropout on (Gal & Ghahramani 2016, arXiv:1506.02142)."""

    samples: int = 16

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        import fastnorm

        return fastnorm.mc_predict(nn.Sequential(model, nn.Softmax(1)).eval(), images, samples=self.samples).mean.log()
