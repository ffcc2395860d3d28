"""LocalResponseNorm against torch.nn's, and the window within a channel against its composite of torch's ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import compare
from torch import Tensor, nn

import fastnorm

SHAPES = ((32, 64, 56, 56), (32, 256, 14, 14), (1, 8, 4, 4))
LAYOUTS = ("contiguous", "channels_last")
PASSES = ("forward", "backward", "both")


class WithinChannel(nn.Module):
    """What a user of torch writes for a window of 5 x 5 in the plane."""

    def forward(self, input: Tensor) -> Tensor:
        mean = F.avg_pool2d(input.square(), 5, stride=1, padding=2)
        return input / (1.0 + 1e-4 * mean) ** 0.75


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("passes", PASSES)
def test_inter(benchmark: Any, passes: str, shape: tuple[int, ...], layout: str) -> None:
    ours, theirs = fastnorm.LocalResponseNorm(5), nn.LocalResponseNorm(5)
    compare(benchmark, "LocalResponseNorm", passes, ours, theirs, shape, torch.float32, layout)


class InFloat32(nn.Module):
    """torch has no kernel for bfloat16; a user converts."""

    def forward(self, input: Tensor) -> Tensor:
        return F.local_response_norm(input.float(), 5).to(input.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES[:1], ids=str)
@pytest.mark.parametrize("passes", PASSES)
def test_inter_bfloat16(benchmark: Any, passes: str, shape: tuple[int, ...], layout: str) -> None:
    ours = fastnorm.LocalResponseNorm(5)
    compare(benchmark, "LocalResponseNorm", passes, ours, InFloat32(), shape, torch.bfloat16, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("passes", PASSES)
def test_intra(benchmark: Any, passes: str, shape: tuple[int, ...], layout: str) -> None:
    ours = fastnorm.LocalResponseNorm(5, region="intra")
    compare(benchmark, "LocalResponseNorm intra", passes, ours, WithinChannel(), shape, torch.float32, layout)
