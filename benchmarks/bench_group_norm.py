"""GroupNorm and InstanceNorm against torch.nn's, as a user calls them: module forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import compare
from torch import nn

import fastnorm

SHAPES = ((32, 64, 56, 56), (64, 256, 14, 14), (2, 32, 32, 64, 64), (2, 4, 4, 4))
LAYOUTS = ("contiguous", "channels_last")
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
every_pass = pytest.mark.parametrize("passes", ("forward", "backward", "both"))


@every_dtype
@every_layout
@every_shape
@every_pass
def test_group_norm(benchmark: Any, passes: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    setting = (min(32, shape[1] // 2), shape[1])
    ours, theirs = fastnorm.GroupNorm(*setting, dtype=dtype), nn.GroupNorm(*setting, dtype=dtype)
    compare(benchmark, "GroupNorm", passes, ours, theirs, shape, dtype, layout)


@every_dtype
@every_layout
@every_shape
@every_pass
def test_instance_norm(benchmark: Any, passes: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    name = f"InstanceNorm{len(shape) - 2}d"
    ours, theirs = (getattr(m, name)(shape[1], affine=True, dtype=dtype) for m in (fastnorm, nn))
    compare(benchmark, name, passes, ours, theirs, shape, dtype, layout)
