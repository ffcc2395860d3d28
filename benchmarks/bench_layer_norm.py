"""LayerNorm and RMSNorm against torch.nn's, as a user calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import compare
from torch import nn

import fastnorm

SHAPES = ((8192, 1024), (64, 197, 768), (4096, 64), (32768, 128), (128, 16384), (16, 65536), (1, 4000000), (4, 8))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("passes", ("forward", "backward", "both"))
@pytest.mark.parametrize("name", ("LayerNorm", "RMSNorm"))
def test_norm(benchmark: Any, name: str, passes: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ours, theirs = (getattr(package, name)(shape[-1], dtype=dtype) for package in (fastnorm, nn))
    compare(benchmark, name, passes, ours, theirs, shape, dtype)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("passes", ("forward", "backward"))
def test_with_gelu(benchmark: Any, passes: str, shape: tuple[int, ...]) -> None:
    """The fused GELU against LayerNorm and GELU one after the other."""
    ours = fastnorm.LayerNorm(shape[-1], activation="gelu")
    theirs = nn.Sequential(nn.LayerNorm(shape[-1]), nn.GELU())
    compare(benchmark, "LayerNorm + GELU", passes, ours, theirs, shape, torch.float32)
