"""LocalResponseNorm against torch.nn's, and the window within a channel against its composite of torch's ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import compare
from torch import Tensor, nn
from workloads import ALEXNET, PASSES, TINY, Shape, WithinChannel, Workload, alike, fastnorm, grid

QUICK = ("AlexNet conv2", "tiny")


class InFloat32(nn.Module):
    """torch has no kernel for bfloat16; a user converts."""

    def forward(self, input: Tensor) -> Tensor:
        return F.local_response_norm(input.float(), 5).to(input.dtype)


def in_float32(shape: Shape) -> tuple[Callable[[], nn.Module], Callable[[], nn.Module]]:
    return alike("LocalResponseNorm", 5)[0], InFloat32


def within(shape: Shape) -> tuple[Callable[[], nn.Module], Callable[[], nn.Module]]:
    return lambda: fastnorm().LocalResponseNorm(5, region="intra"), WithinChannel


SHAPES = ALEXNET | TINY
WORKLOADS = [
    *grid(
        "LocalResponseNorm",
        lambda shape: alike("LocalResponseNorm", 5),
        SHAPES,
        dtypes=(torch.float32,),
        quick=QUICK,
        compiles=("AlexNet conv2",),
    ),
    *grid("LocalResponseNorm", in_float32, SHAPES, dtypes=(torch.bfloat16,), quick=QUICK[:1]),
    *grid("LocalResponseNorm intra", within, SHAPES, quick=QUICK[:1]),
]


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_local_response_norm(benchmark: Any, workload: Workload, passes: str) -> None:
    compare(benchmark, workload, passes)
