"""BatchRenorm2d, which torch has not, against torch's BatchNorm2d: the correction should cost nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import compare
from torch import nn

import fastnorm

SHAPES = ((32, 64, 56, 56), (64, 256, 14, 14), (2, 4, 4, 4))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("passes", ("forward", "backward"))
def test_training(benchmark: Any, passes: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    ours, theirs = fastnorm.BatchRenorm2d(shape[1], dtype=dtype), nn.BatchNorm2d(shape[1], dtype=dtype)
    compare(benchmark, "BatchRenorm2d", passes, ours, theirs, shape, dtype, layout)
