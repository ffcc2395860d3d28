"""LayerNorm and RMSNorm against torch.nn's."""

from __future__ import annotations

from typing import Any

import pytest
from harness import compare
from workloads import LAYOUTS, PASSES, VIT, Workload, alike, fused, grid, row_elements

SHAPES = VIT | {
    "rows of 1024": (8192, 1024),
    "rows of 64": (4096, 64),
    "rows of 128": (32768, 128),
    "rows of 16384": (128, 16384),
    "rows of 65536": (16, 65536),
    "one row": (1, 4000000),
    "32 elements": (4, 8),
}
SAME = {"layouts": LAYOUTS[:1], "slice_elements": row_elements, "moved_beyond_cache": (3, 5)}
QUICK = {
    "LayerNorm": ("ViT-B batch 8", "rows of 1024", "rows of 128", "32 elements"),
    "RMSNorm": ("ViT-B batch 8", "32 elements"),
}
WORKLOADS = [
    *(
        workload
        for name in ("LayerNorm", "RMSNorm")
        for workload in grid(
            name,
            lambda shape, name=name: alike(name, shape[-1]),
            SHAPES,
            quick=QUICK[name],
            compiles=("ViT-B batch 8",),
            **SAME,
        )
    ),
    *grid(
        "LayerNorm + GELU",
        lambda shape: fused("LayerNorm", "gelu", shape[-1]),
        VIT,
        quick=("ViT-B batch 8",),
        compiles=("ViT-B batch 8",),
        **SAME,
    ),
]


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_layer_norm(benchmark: Any, workload: Workload, passes: str) -> None:
    compare(benchmark, workload, passes)
