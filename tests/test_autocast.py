"""Automatic mixed precision: each op in the type that torch gives its own, and steps that overflow."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES
from networks import ResNet, ViT, difference, images
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations

import fastnorm
import fastnorm.functional as fn

HALF = (torch.bfloat16, torch.float16)
every_device = pytest.mark.parametrize("device", DEVICES)
every_half = pytest.mark.parametrize("half", HALF, ids=str)


def _pair(name: str, *args: object, **kwargs: object) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def of(module: object) -> Callable[..., Tensor]:
        return lambda x, *parameters: getattr(module, name)(x, *args, *parameters, **kwargs)

    return of(fn), of(F)


# fastnorm's function and torch's, and the shape of weight and bias
OPS: dict[str, tuple[tuple[Callable[..., Tensor], Callable[..., Tensor]], tuple[int, ...], int]] = {
    "batch_norm": (_pair("batch_norm", None, None, training=True), (6,), 0),
    "group_norm": (_pair("group_norm", 2), (6,), 2),
    "instance_norm": (_pair("instance_norm"), (6,), 0),
    "layer_norm": (_pair("layer_norm", (5,)), (5,), 2),
    "rms_norm": (_pair("rms_norm", (5,)), (5,), 1),
    "local_response_norm": (_pair("local_response_norm", 3), (), 0),
    "dropout": (_pair("dropout"), (), 0),
    "alpha_dropout": (_pair("alpha_dropout", 0.5, True), (), 0),
}


@every_device
@every_half
@pytest.mark.parametrize("name", OPS)
def test_types_as_torch_has_them(name: str, half: torch.dtype, device: str) -> None:
    (ours, theirs), shape, affine = OPS[name]
    for dims in (3, 4, 5):
        for given in (half, torch.float32):
            x = torch.randn((4, 6, 5, 5, 5)[:dims], device=device).to(given)
            parameters = [torch.rand(shape, device=device) + 0.5 for _ in range(affine)]
            leaves = [[t.clone().requires_grad_() for t in (x, *parameters)] for _ in range(2)]
            with torch.autocast(device, dtype=half):
                got, wanted = (f(*p) for f, p in zip((ours, theirs), leaves, strict=True))
            assert got.dtype == wanted.dtype
            if "dropout" not in name:
                eps = torch.finfo(wanted.dtype).eps
                if device == "cuda" and name == "local_response_norm":
                    eps = torch.finfo(given).eps  # torch squares in the input's type there, and only then widens
                assert difference(got, wanted) < 4 * eps
            for y in (got, wanted):
                y.float().square().sum().backward()
            for a, b in zip(*leaves, strict=True):
                assert a.grad.dtype == b.grad.dtype == a.dtype


def test_what_torch_widens_on_a_gpu() -> None:
    """Read off torch itself, for there float32 is expected of these; no GPU is needed to ask."""
    from fastnorm.op import _has_autocast_rule

    assert _has_autocast_rule("cuda", ("layer_norm",)) and _has_autocast_rule("cuda", ("group_norm",))
    assert not _has_autocast_rule("cpu", ("layer_norm", "group_norm", "rms_norm"))
    assert not _has_autocast_rule("cuda", ("batch_norm", "instance_norm", "dropout"))


def test_without_autocast_nothing_changes() -> None:
    x = torch.randn(2, 6, 5, 5, dtype=torch.bfloat16)
    assert fn.local_response_norm(x, 3).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        assert fn.local_response_norm(x, 3).dtype == torch.bfloat16


def test_under_torch_compile() -> None:
    torch.compiler.reset()
    x = torch.randn(2, 6, 5, 5, dtype=torch.bfloat16)
    run = torch.compile(lambda x: fn.local_response_norm(x, 3), fullgraph=True, backend="aot_eager")
    assert run(x).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, fn.local_response_norm(x, 3))


@pytest.mark.parametrize("name", ("weight_norm", "spectral_norm"))
def test_parametrizations(name: str) -> None:
    layers = [getattr(m, name)(nn.Linear(6, 4)) for m in (fastnorm.parametrizations, torch_parametrizations)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layers[0].weight.dtype == layers[1].weight.dtype == torch.float32
        got, wanted = (layer.eval()(x) for layer in layers)
    assert got.dtype == wanted.dtype and difference(got, wanted) < 0.02


@every_device
@pytest.mark.parametrize("make", (ResNet, ViT))
def test_networks(make: type[nn.Module], device: str) -> None:
    """Converted, a network under autocast is as far from its float32 self as torch's: bfloat16 has 8 bits."""
    torch.manual_seed(0)
    model = make().to(device).train()
    converted = fastnorm.convert(copy.deepcopy(model))
    x = images(8).to(device)
    with torch.no_grad():
        exact = model(x)
    results = []
    for m in (model, converted):
        with torch.autocast(device, dtype=torch.bfloat16):
            y = m(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in m.parameters() if p.grad is not None)
        results.append(difference(y, exact))
    assert results[1] < 2 * results[0] < 0.2


# ---- GradScaler


@every_device
def test_an_overflowed_step(device: str) -> None:
    """GradScaler leaves the parameters alone, skip_nonfinite_stats the running statistics; then both go on."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), fastnorm.BatchNorm2d(4, activation="relu", skip_nonfinite_stats=True),
        nn.Flatten(), nn.Linear(4 * 36, 2),
    ).to(device)  # fmt: skip
    careless = fastnorm.BatchNorm2d(4).to(device)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)

    def step(x: Tensor) -> None:
        optimiser.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = model(x).float().square().mean()
            careless(model[0](x))
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()

    x = torch.randn(8, 3, 8, 8, device=device)
    step(x)
    assert scaler.get_scale() == 2.0**8 and model[1].num_batches_tracked == 1
    before = copy.deepcopy(model.state_dict())
    step(x * 3e4)  # the convolution's output exceeds 65504
    assert scaler.get_scale() == 2.0**7
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not careless.running_var.isfinite().all()  # what the setting is for
    step(x)
    assert model[1].num_batches_tracked == 2 and model[1].running_var.isfinite().all()
    assert not torch.equal(model[0].weight, before["0.weight"])
