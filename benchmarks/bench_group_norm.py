"""GroupNorm and InstanceNorm against torch.nn's."""

from __future__ import annotations

from typing import Any

import pytest
from harness import compare
from workloads import PASSES, RESNET50, STYLE, TINY, UNET, UNET3D, Workload, alike, fused, grid, group_elements

WORKLOADS = [
    *grid(
        "GroupNorm",
        lambda shape: alike("GroupNorm", 32, shape[1]),
        UNET | RESNET50,
        quick=("UNet 64x64", "UNet 16x16"),
        compiles=("UNet 64x64",),
        slice_elements=group_elements(32),
        moved_beyond_cache=(3, 5),
    ),
    *grid(
        "GroupNorm", lambda shape: alike("GroupNorm", 2, shape[1]), TINY, quick=TINY, slice_elements=group_elements(2)
    ),
    *grid(
        "GroupNorm + SiLU",
        lambda shape: fused("GroupNorm", "silu", 32, shape[1]),
        UNET,
        quick=("UNet 64x64",),
        compiles=("UNet 64x64",),
        slice_elements=group_elements(32),
        moved_beyond_cache=(3, 5),
    ),
    *grid(
        "InstanceNorm2d",
        lambda shape: alike("InstanceNorm2d", shape[1], affine=True),
        STYLE | RESNET50 | TINY,
        quick=("style transfer", "tiny"),
        slice_elements=group_elements(None),
        moved_beyond_cache=(3, 5),
    ),
    *grid(
        "InstanceNorm3d",
        lambda shape: alike("InstanceNorm3d", shape[1], affine=True),
        UNET3D,
        quick=("3-D UNet level 2",),
        compiles=("3-D UNet level 2",),
        slice_elements=group_elements(None),
        moved_beyond_cache=(3, 5),
    ),
]


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_group_norm(benchmark: Any, workload: Workload, passes: str) -> None:
    compare(benchmark, workload, passes)
