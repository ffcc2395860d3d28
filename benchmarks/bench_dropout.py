"""The dropout family against torch.nn's, and DropPath against the few torch ops that others write it in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import compare
from torch import Tensor, nn

import fastnorm


class TorchDropPath(nn.Module):
    """Stochastic depth as it is commonly written."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        keep = input.new_empty([input.size(0)] + [1] * (input.dim() - 1)).bernoulli_(1 - self.p)
        return input * keep.div_(1 - self.p)


SHAPES = ((32, 64, 56, 56), (64, 256, 14, 14), (2, 4, 4, 4))
LAYOUTS = ("contiguous", "channels_last")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("passes", ("forward", "backward"))
@pytest.mark.parametrize("name", ("Dropout", "Dropout2d", "AlphaDropout", "FeatureAlphaDropout", "DropPath"))
def test_training(
    benchmark: Any, name: str, passes: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    ours, theirs = getattr(fastnorm, name)(0.5), getattr(nn, name, TorchDropPath)(0.5)
    compare(benchmark, name, passes, ours, theirs, shape, dtype, layout, tensors_moved=2)
