"""weight_norm and spectral_norm against torch's: the weight asked for, and its gradient taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import compare
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations

import fastnorm

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear(8, 8)": lambda: nn.Linear(8, 8, bias=False),
    "Conv2d(64, 128, 3)": lambda: nn.Conv2d(64, 128, 3, bias=False),
    "ConvTranspose2d(128, 64, 4)": lambda: nn.ConvTranspose2d(128, 64, 4, bias=False),
    "Linear(1024, 1024)": lambda: nn.Linear(1024, 1024, bias=False),
}


class Weight(nn.Module):
    """A layer's weight as an output, of an input that has its shape and no part in it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, _: Tensor) -> Tensor:
        return self.layer.weight


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("passes", ("forward", "backward", "both"))
@pytest.mark.parametrize("name", ("weight_norm", "spectral_norm"))
def test_training(benchmark: Any, name: str, passes: str, layer: str, dtype: torch.dtype) -> None:
    ours, theirs = (
        Weight(getattr(library, name)(LAYERS[layer]().to(dtype)))
        for library in (fastnorm.parametrizations, torch_parametrizations)
    )
    shape = tuple(ours.layer.weight.shape)
    compare(benchmark, f"{name} {layer.partition('(')[0]}", passes, ours, theirs, shape, dtype)
