"""Which training images an epoch shows: imbalanced sets, and what is done about them. On the host, between epochs."""

from __future__ import annotations

import torch
from torch import Tensor

RESAMPLING = ("over", "under")


def long_tail(labels: Tensor, ratio: float, classes: int) -> Tensor:
    """Indices of a long-tailed part of the images (Cui et al. 2019, arXiv:1901.05555), in their order.

    Of class c the first round(n * ratio ** (c / (classes - 1))) images are kept, n being the class's number of them:
    all of class 0, the share `ratio` of the last.
    """
    kept = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(classes):
        members = (labels == c).nonzero().squeeze(1)
        kept[members[: max(1, round(len(members) * ratio ** (c / (classes - 1))))]] = True
    return kept.nonzero().squeeze(1)


def inverse_frequency(labels: Tensor, classes: int) -> Tensor:
    """The weight of each class, len(labels) / (classes * count): the mean over the images is 1; 0 for an empty one."""
    counts = torch.bincount(labels, minlength=classes)
    return torch.where(counts > 0, len(labels) / (classes * counts.clamp(min=1)), 0.0)


def epoch_indices(labels: Tensor, resample: str | None, generator: torch.Generator) -> Tensor:
    """The images of an epoch in random order, as indices into `labels`.

    Args:
        resample: None: each image once. "over": of each class as many as the most frequent has, its images as often as
            each other but for one. "under": of each class as many as the least frequent has, drawn anew each time.
    """
    if resample is None:
        return torch.randperm(len(labels), generator=generator)
    if resample not in RESAMPLING:
        raise ValueError(f"resample must be None or one of {', '.join(RESAMPLING)}, got {resample!r}")
    counts = torch.bincount(labels)
    counts = counts[counts > 0]
    size = int(counts.max() if resample == "over" else counts.min())
    drawn = []
    for c in labels.unique():
        members = (labels == c).nonzero().squeeze(1)
        whole, rest = divmod(size, len(members))
        drawn += [members] * whole
        drawn.append(members[torch.randperm(len(members), generator=generator)[:rest]])
    indices = torch.cat(drawn)
    return indices[torch.randperm(len(indices), generator=generator)]
