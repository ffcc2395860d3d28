"""BatchRenorm2d, which torch has not, against torch's BatchNorm2d: the correction should cost nothing."""

from __future__ import annotations

from typing import Any

import pytest
from harness import compare
from torch import nn
from workloads import PASSES, RESNET50, TINY, Workload, channel_elements, fastnorm, grid

WORKLOADS = grid(
    "BatchRenorm2d",
    lambda shape: (lambda: fastnorm().BatchRenorm2d(shape[1]), lambda: nn.BatchNorm2d(shape[1])),
    {name: RESNET50[name] for name in ("ResNet-50 stage 1", "ResNet-50 stage 3")} | TINY,
    quick=("ResNet-50 stage 3",),
    slice_elements=channel_elements,
    moved_beyond_cache=(3, 5),
)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_batch_renorm(benchmark: Any, workload: Workload, passes: str) -> None:
    compare(benchmark, workload, passes)
