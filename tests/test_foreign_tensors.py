"""Tensors that have no memory of their own: torch's op does what a kernel could not, with a word about it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import fastnorm
from fastnorm.parametrizations import spectral_norm, weight_norm

SHAPE = (4, 6, 5, 5)
LAYERS: dict[str, tuple[nn.Module, nn.Module]] = {
    "BatchNorm2d": (fastnorm.BatchNorm2d(6), nn.BatchNorm2d(6)),
    "BatchNorm2d-relu": (fastnorm.BatchNorm2d(6, activation="relu"), nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())),
    "GroupNorm": (fastnorm.GroupNorm(2, 6), nn.GroupNorm(2, 6)),
    "InstanceNorm2d": (fastnorm.InstanceNorm2d(6), nn.InstanceNorm2d(6)),
    "LayerNorm": (fastnorm.LayerNorm(5), nn.LayerNorm(5)),
    "RMSNorm": (fastnorm.RMSNorm(5), nn.RMSNorm(5)),
    "LocalResponseNorm": (fastnorm.LocalResponseNorm(3), nn.LocalResponseNorm(3)),
}
DROPOUTS = (fastnorm.Dropout(0.5), fastnorm.Dropout2d(0.5), fastnorm.AlphaDropout(0.5), fastnorm.DropPath(0.5))


@pytest.fixture(autouse=True)
def _says_so() -> Iterator[None]:
    fastnorm.set_fallback("warn")  # conftest.py lets none pass
    with pytest.warns(fastnorm.FallbackWarning, match="without memory of its own"):
        yield
    fastnorm.set_fallback("error")


@pytest.mark.parametrize("name", LAYERS)
def test_a_wrapping_subclass(name: str) -> None:
    ours, torchs = LAYERS[name]
    x = torch.randn(SHAPE)
    pairs = [TwoTensor(x.clone(), 2 * x).requires_grad_() for _ in range(2)]
    y, wanted = ours(pairs[0]), torchs(pairs[1])
    assert type(y) is TwoTensor
    for half in ("a", "b"):
        assert torch.equal(getattr(y, half), getattr(wanted, half))
    y.sum().backward()
    assert type(pairs[0].grad) is TwoTensor


@pytest.mark.parametrize("module", DROPOUTS, ids=lambda m: type(m).__name__)
def test_dropout_of_a_wrapping_subclass(module: nn.Module) -> None:
    x = torch.randn(SHAPE)
    assert type(module(TwoTensor(x, x))) is TwoTensor


@pytest.mark.parametrize("name", ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm2d"))
def test_a_wrapped_parameter(name: str) -> None:
    """It had been taken for none."""
    ours, torchs = (type(m)(*arguments) for m, arguments in zip(LAYERS[name], 2 * [_arguments(name)], strict=True))
    for layer in (ours, torchs):
        w = torch.linspace(1, 2, layer.weight.numel())
        layer.weight = nn.Parameter(TwoTensor(w, 3 * w))
    x = torch.randn(SHAPE)
    y, wanted = ours(x), torchs(x)
    assert type(y) is TwoTensor
    assert torch.equal(y.a, wanted.a) and torch.equal(y.b, wanted.b)


def _arguments(name: str) -> tuple[int, ...]:
    return {"GroupNorm": (2, 6), "BatchNorm2d": (6,)}.get(name, (5,))


@pytest.mark.parametrize("parametrize", (weight_norm, spectral_norm))
def test_a_wrapped_weight(parametrize: type) -> None:
    layer = nn.Linear(5, 5)
    w = layer.weight.detach()
    layer.weight = nn.Parameter(TwoTensor(w, w))
    parametrize(layer)
    assert type(layer.weight) is TwoTensor


@pytest.mark.parametrize("module", (fastnorm.LayerNorm(5), fastnorm.Dropout(0.5)), ids=("LayerNorm", "Dropout"))
def test_a_nested_tensor(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype stage")
        x = torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)])
    y = module(x)
    assert y.is_nested
    if isinstance(module, fastnorm.LayerNorm):
        torch.testing.assert_close(y[1], nn.functional.layer_norm(x[1], (5,)))


@pytest.mark.parametrize("module", (fastnorm.Dropout(0.5), fastnorm.LocalResponseNorm(3)), ids=("Dropout", "LRN"))
def test_a_fake_tensor_outside_of_its_mode(module: nn.Module) -> None:
    with FakeTensorMode():
        x: Tensor = torch.randn(SHAPE)
    y = module(x)
    assert isinstance(y, FakeTensor) and y.shape == SHAPE


@pytest.mark.parametrize("what", ("input", "weight"))
def test_memory_that_was_given_back(what: str) -> None:
    """As FSDP does with a parameter's: torch's op finds no data, and says so."""
    x, weight = torch.randn(4, 8), torch.randn(8)
    {"input": x, "weight": weight}[what].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"not allocated|storage"):
        fastnorm.functional.layer_norm(x, (8,), weight)
