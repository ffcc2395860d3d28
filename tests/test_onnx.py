"""ONNX export, through torch's own ops; where the packages for it are installed."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import pytest
import torch
from networks import ResNet, ViT, difference, images
from torch import Tensor, nn

import fastnorm

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def _torch_ops() -> Iterator[None]:
    fastnorm.enable_under_compile(False)
    yield
    fastnorm.enable_under_compile(True)


def every_layer() -> nn.Module:
    return nn.Sequential(
        fastnorm.BatchNorm2d(6, activation="relu"),
        fastnorm.GroupNorm(2, 6, activation="silu"),
        fastnorm.InstanceNorm2d(6, affine=True),
        fastnorm.LayerNorm(5, activation="gelu"),
        fastnorm.RMSNorm(5, activation="leaky_relu"),
        fastnorm.LocalResponseNorm(3),
        fastnorm.Dropout(0.5),
        fastnorm.parametrizations.weight_norm(nn.Conv2d(6, 3, 1)),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "ResNet": (lambda: fastnorm.convert(ResNet()), images(2)),
    "fused ResNet": (lambda: fastnorm.fuse(fastnorm.convert(ResNet())), images(2)),
    "ViT": (lambda: fastnorm.convert(ViT(depth=1)), images(2)),
    "every layer": (every_layer, torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0))),
}


@pytest.mark.parametrize("name", MODELS)
def test_export(name: str) -> None:
    torch.manual_seed(0)
    make, x = MODELS[name]
    model = make().eval()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert {node.domain for node in program.model.graph} == {""}  # of the standard alone
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert difference(torch.from_numpy(y), model(x)) < 1e-5
