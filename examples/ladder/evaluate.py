"""Images as the network sees them, and its accuracy."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .averaging import Averaging
from .data import MEAN, STD
from .processes import ALONE, Processes

EVAL_BATCH = 500


@functools.cache
def _channel_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept: copying them to a GPU for every batch would make the host wait.
    return tuple(255 * torch.tensor(value, device=device).view(3, 1, 1) for value in (MEAN, STD))


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to float32 in channels_last, (x / 255 - mean) / std per channel."""
    mean, std = _channel_constants(images.device)
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, float32 elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    averaging: Averaging | None = None,
    processes: Processes = ALONE,
) -> tuple[float, float]:
    """Mean cross-entropy in nats and accuracy in [0, 1], in eval mode, each process looking at its share of the images.

    Args:
        model: not wrapped for several processes.
        averaging: how to predict; None is one plain pass.
    """
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=images.device)
    batches = zip(processes.share(images).split(EVAL_BATCH), processes.share(labels).split(EVAL_BATCH), strict=True)
    for x, y in batches:
        if not len(y):
            continue
        with autocast(images.device):
            logits = model(normalise(x)) if averaging is None else averaging(model, normalise(x))
        sums[0] += F.cross_entropy(logits.float(), y, reduction="sum")
        sums[1] += (logits.argmax(1) == y).sum()
    processes.add_up(sums)
    loss, accuracy = (sums / len(labels)).tolist()
    return loss, accuracy
