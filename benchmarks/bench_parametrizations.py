"""weight_norm and spectral_norm against torch's: the weight asked for, and its gradient taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from harness import compare
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from workloads import LAYOUTS, PASSES, Shape, Workload, fastnorm, grid

LAYERS: dict[Shape, Callable[[], nn.Module]] = {
    (8, 8): lambda: nn.Linear(8, 8, bias=False),
    (128, 64, 3, 3): lambda: nn.Conv2d(64, 128, 3, bias=False),
    (128, 64, 4, 4): lambda: nn.ConvTranspose2d(128, 64, 4, bias=False),
    (1024, 1024): lambda: nn.Linear(1024, 1024, bias=False),
}
NAMES = dict(zip(("Linear 8", "Conv2d", "ConvTranspose2d", "Linear 1024"), LAYERS, strict=True))


class Weight(nn.Module):
    """A layer's weight as an output, of an input that has its shape and no part in it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, _: Tensor) -> Tensor:
        return self.layer.weight


def of(name: str) -> Callable[[Shape], tuple[Callable[[], nn.Module], Callable[[], nn.Module]]]:
    """The parametrization of that name, of a layer whose weight has the shape."""
    return lambda shape: (
        lambda: Weight(getattr(fastnorm().parametrizations, name)(LAYERS[shape]())),
        lambda: Weight(getattr(torch_parametrizations, name)(LAYERS[shape]())),
    )


WORKLOADS = [
    *grid("weight_norm", of("weight_norm"), NAMES, layouts=LAYOUTS[:1], quick=("Conv2d", "Linear 8")),
    *grid("spectral_norm", of("spectral_norm"), NAMES, layouts=LAYOUTS[:1], quick=("Conv2d",)),
]


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_parametrization(benchmark: Any, workload: Workload, passes: str) -> None:
    compare(benchmark, workload, passes)
