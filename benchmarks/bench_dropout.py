"""Dropout and Dropout2d against torch.nn's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import compare
from torch import nn

import fastnorm

SHAPES = ((32, 64, 56, 56), (64, 256, 14, 14), (2, 4, 4, 4))
LAYOUTS = ("contiguous", "channels_last")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("passes", ("forward", "backward"))
@pytest.mark.parametrize("name", ("Dropout", "Dropout2d"))
def test_training(
    benchmark: Any, name: str, passes: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    ours, theirs = getattr(fastnorm, name)(0.5), getattr(nn, name)(0.5)
    compare(benchmark, name, passes, ours, theirs, shape, dtype, layout, tensors_moved=2)
