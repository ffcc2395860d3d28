"""BatchNorm2d against torch.nn's, as a user calls it: module forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import compare
from torch import nn

import fastnorm

SHAPES = ((32, 64, 56, 56), (64, 256, 14, 14), (2, 4, 4, 4))
LAYOUTS = ("contiguous", "channels_last")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("passes", ("forward", "backward", "both"))
def test_training(benchmark: Any, passes: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    ours, theirs = fastnorm.BatchNorm2d(shape[1], dtype=dtype), nn.BatchNorm2d(shape[1], dtype=dtype)
    compare(benchmark, "BatchNorm2d", passes, ours, theirs, shape, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eval(benchmark: Any, shape: tuple[int, ...], layout: str) -> None:
    ours, theirs = fastnorm.BatchNorm2d(shape[1]).eval(), nn.BatchNorm2d(shape[1]).eval()
    compare(benchmark, "BatchNorm2d eval", "forward", ours, theirs, shape, torch.float32, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("passes", ("forward", "backward"))
def test_with_relu(benchmark: Any, passes: str, shape: tuple[int, ...], layout: str) -> None:
    """The fused ReLU against BatchNorm and ReLU one after the other."""
    ours = fastnorm.BatchNorm2d(shape[1], activation="relu")
    theirs = nn.Sequential(nn.BatchNorm2d(shape[1]), nn.ReLU())
    compare(benchmark, "BatchNorm2d + ReLU", passes, ours, theirs, shape, torch.float32, layout)
