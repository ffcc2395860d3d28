"""BatchNorm2d against torch.nn's: in training, for inference, and with what fastnorm fuses."""

from __future__ import annotations

from typing import Any

import pytest
from harness import compare
from workloads import CIFAR, PASSES, RESNET50, TINY, Shape, Workload, alike, channel_elements, fused, grid

SHAPES = RESNET50 | CIFAR | TINY
FUSED_SHAPES = RESNET50 | TINY
QUICK = ("ResNet-50 stage 1", "ResNet-50 stage 3", "tiny")


def evaluated(shape: Shape) -> Any:
    return tuple(lambda make=make: make().eval() for make in alike("BatchNorm2d", shape[1]))


WORKLOADS = [
    *grid(
        "BatchNorm2d",
        lambda shape: alike("BatchNorm2d", shape[1]),
        SHAPES,
        quick=QUICK,
        compiles=("ResNet-50 stage 1", "ResNet-50 stage 3"),
        slice_elements=channel_elements,
        moved_beyond_cache=(3, 5),
    ),
    *grid("BatchNorm2d eval", evaluated, FUSED_SHAPES, quick=("ResNet-50 stage 1", "tiny")),
    *grid(
        "BatchNorm2d + ReLU",
        lambda shape: fused("BatchNorm2d", "relu", shape[1]),
        FUSED_SHAPES,
        quick=("ResNet-50 stage 1",),
        compiles=("ResNet-50 stage 1",),
        slice_elements=channel_elements,
        moved_beyond_cache=(3, 5),
    ),
    *grid(
        "BatchNorm2d + add + ReLU",
        lambda shape: fused("BatchNorm2d", "relu", shape[1]),
        FUSED_SHAPES,
        quick=("ResNet-50 stage 1",),
        compiles=("ResNet-50 stage 1",),
        slice_elements=channel_elements,
        residual=True,
        moved=(3, 4),
        moved_beyond_cache=(4, 6),
    ),
]


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_batch_norm(benchmark: Any, workload: Workload, passes: str) -> None:
    compare(benchmark, workload, passes)
