"""The dropout family against torch.nn's, and DropPath against the few torch ops that others write it in."""

from __future__ import annotations

from typing import Any

import pytest
from harness import compare
from workloads import LAYOUTS, PASSES, RESNET50, TINY, VIT, DropPath, Workload, alike, fastnorm, grid

ROWS = {"AlexNet classifier": (128, 4096), "32 elements": (4, 8)} | VIT
IMAGES = {name: RESNET50[name] for name in ("ResNet-50 stage 1", "ResNet-50 stage 3")} | TINY


def drop_path(_: Any) -> Any:
    return lambda: fastnorm().DropPath(0.5), lambda: DropPath(0.5)


WORKLOADS = [
    *grid(
        "Dropout",
        lambda shape: alike("Dropout", 0.5),
        ROWS,
        layouts=LAYOUTS[:1],
        moved=(2, 2),
        quick=("ViT-B batch 8", "32 elements"),
        compiles=("ViT-B batch 8",),
    ),
    *grid("Dropout", lambda shape: alike("Dropout", 0.5), IMAGES, moved=(2, 2), quick=("ResNet-50 stage 3",)),
    *(
        workload
        for name in ("Dropout2d", "AlphaDropout", "FeatureAlphaDropout")
        for workload in grid(
            name, lambda shape, name=name: alike(name, 0.5), IMAGES, moved=(2, 2), quick=("ResNet-50 stage 3",)
        )
    ),
    *grid("DropPath", drop_path, VIT, layouts=LAYOUTS[:1], moved=(2, 2), quick=("ViT-B batch 8",)),
    *grid("DropPath", drop_path, IMAGES, moved=(2, 2)),
]


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_dropout(benchmark: Any, workload: Workload, passes: str) -> None:
    compare(benchmark, workload, passes)
