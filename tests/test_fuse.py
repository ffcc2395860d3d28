"""Activations and residuals fused into the normalisations before them."""

from __future__ import annotations

import contextlib
import copy
import cProfile
import dataclasses
import functools
import io
import itertools
import pickle
import pstats
import random
import re
import sys
import traceback
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ladder.models import BACKENDS, build_model
from ladder.rungs import PRESETS, find, recipe_of
from networks import ResidualBlock, ResNet, ViT, difference, images, outputs_and_gradients, randomize
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastnorm


@pytest.fixture(autouse=True)
def _the_same_weights_in_any_order() -> None:
    """The gradient of a bias before a normalisation nearly cancels: torch's own is 2e-5 off with one draw of 60."""
    torch.manual_seed(0)


def activations(model: nn.Module) -> dict[str, str]:
    """The fused ones."""
    found = {name: getattr(module, "activation", None) for name, module in model.named_modules()}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def check(model: nn.Module, x: Tensor, **fused: str) -> nn.Module:
    """Fuses, and compares outputs, gradients and statistics in both modes, and those of a copy fused in eval mode."""
    randomize(model)
    names = [name for name, _ in model.named_parameters()]
    plain, late = copy.deepcopy(model), copy.deepcopy(model).eval()
    flags = [m.training for m in model.modules()]
    assert fastnorm.fuse(model) is model and activations(model) == fused
    assert [m.training for m in model.modules()] == flags and [name for name, _ in model.named_parameters()] == names
    assert activations(fastnorm.fuse(late)) == fused
    for training in (True, False):
        wanted = outputs_and_gradients(plain.train(training), x)
        for other in (model, late):
            got = outputs_and_gradients(other.train(training), x)
            assert got.keys() == wanted.keys()
            for key, tensor in wanted.items():
                assert difference(got[key], tensor) < 1e-5, key  # some tens of layers that round at 6e-8 each
    for key, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=1e-5, atol=1e-6)
    return model


torch.manual_seed(0)  # else each run has inputs of its own, and with some a gradient's sums cancel beyond 1e-5
NORMS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), torch.randn(8, 6)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), torch.randn(2, 6, 4, 5)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(6), torch.randn(2, 6, 2, 4, 5)),
    "SyncBatchNorm": (lambda: fastnorm.SyncBatchNorm(6), torch.randn(8, 6)),
    "LayerNorm": (lambda: nn.LayerNorm(6), torch.randn(8, 6)),
    "RMSNorm": (lambda: nn.RMSNorm(6), torch.randn(8, 6)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), torch.randn(8, 6, 5)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(6), torch.randn(2, 6, 9)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(6, affine=True), torch.randn(2, 6, 4, 5)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(6), torch.randn(2, 6, 2, 4, 5)),
    "BatchRenorm1d": (lambda: fastnorm.BatchRenorm1d(6), torch.randn(8, 6)),
}
LAYERS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU, "gelu": nn.GELU}


@pytest.mark.parametrize("name", NORMS)
def test_in_a_sequential(name: str) -> None:
    build, x = NORMS[name]
    for activation, kind in LAYERS.items():
        model = check(nn.Sequential(build(), kind()), x, **{"0": activation})
        assert type(model) is nn.Sequential and type(model[0]) is getattr(fastnorm, name)
        assert type(model[1]) is nn.Identity
    model = check(nn.Sequential(fastnorm.convert(build()), nn.SiLU(inplace=True)), x, **{"0": "silu"})
    assert str(fastnorm.fuse(model)) == str(model)  # nothing is left to do


class Graph(nn.Module):
    """A model whose forward is a function of it."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.norm, self.other, self.relu = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()
        self.conv = nn.Conv2d(4, 4, 1, bias=False)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


X = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("activation", "forward"),
    (
        ("relu", lambda m, x: F.relu(m.norm(x))),
        ("relu", lambda m, x: F.relu(m.norm(x), inplace=True)),
        ("relu", lambda m, x: torch.relu(m.norm(x))),
        ("relu", lambda m, x: torch.relu_(m.norm(x))),
        ("relu", lambda m, x: m.norm(x).relu()),
        ("relu", lambda m, x: m.norm(x).relu_()),
        ("leaky_relu", lambda m, x: F.leaky_relu(m.norm(x))),
        ("leaky_relu", lambda m, x: F.leaky_relu_(m.norm(x), negative_slope=0.01)),
        ("silu", lambda m, x: F.silu(m.norm(x))),
        ("gelu", lambda m, x: F.gelu(m.norm(x))),
        ("gelu", lambda m, x: F.gelu(m.norm(input=x), approximate="none")),
        ("relu", lambda m, x: m.relu(m.norm(m.conv(x)) + x)),
        ("relu", lambda m, x: m.relu(x + m.norm(m.conv(x)))),
        ("relu", lambda m, x: m.relu(torch.add(x, m.norm(m.conv(x))))),
        ("relu", lambda m, x: m.relu(m.norm(m.conv(x)).add(x))),
        ("relu", lambda m, x: m.relu(m.norm(m.conv(x)).add_(x))),
        ("silu", lambda m, x: F.silu(m.norm(m.conv(x)) + x * x)),
        ("gelu", lambda m, x: F.gelu(m.conv(x) + m.norm(m.conv(x + 1))).sin()),
        ("relu", lambda m, x: m.relu(m.norm(m.conv(x)) + x.relu()) + m.relu(x)),
    ),
)
def test_in_a_forward(activation: str, forward: Callable[..., Tensor]) -> None:
    model = check(Graph(forward), X, norm=activation)
    assert isinstance(model, Graph) and type(model) is not Graph and type(model).__name__ == "Graph"
    assert isinstance(model.relu, nn.ReLU)


def add_in_place(m: nn.Module, x: Tensor) -> Tensor:
    out = m.norm(m.conv(x))
    out += x
    return m.relu(out)


def add_into_the_residual(m: nn.Module, x: Tensor) -> Tensor:
    y = z = x.sin()
    z += m.norm(m.conv(x))
    return m.relu(z) + y


def twice(m: nn.Module, x: Tensor) -> Tensor:
    return m.relu(m.norm(x)) + m.norm(m.conv(x))


@pytest.mark.parametrize(
    "forward",
    (
        lambda m, x: m.norm(x),
        lambda m, x: m.relu(n := m.norm(x)) + n,  # the norm's output goes elsewhere too
        lambda m, x: m.relu(s := m.norm(m.conv(x)) + x) + s,
        lambda m, x: F.leaky_relu(m.norm(x), 0.2),
        lambda m, x: F.leaky_relu(m.norm(x), negative_slope=0.2),
        lambda m, x: F.gelu(m.norm(x), approximate="tanh"),
        lambda m, x: F.relu6(m.norm(x)),
        lambda m, x: m.norm(x).sigmoid(),
        lambda m, x: m.relu(torch.add(m.norm(m.conv(x)), x, alpha=2)),
        lambda m, x: m.relu(m.norm(m.conv(x)) + 1.0),
        lambda m, x: m.relu(m.norm(m.conv(x)) - x),
        lambda m, x: m.relu((n := m.norm(m.conv(x))) + n),
        lambda m, x: m.relu(m.norm(x) + x),  # the norm's input goes elsewhere too, and might be written there
        lambda m, x: m.norm(m.relu(m.norm(x))),
        add_into_the_residual,
            twice,
    ),
)  # fmt: skip
def test_left_alone(forward: Callable[..., Tensor]) -> None:
    model = check(Graph(forward), X)
    assert type(model) is Graph and type(model.norm) is nn.BatchNorm2d and type(model.relu) is nn.ReLU


def test_a_write_between() -> None:
    """y is the norm's input and is written before the addition: the norm must not move there."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = x.sin()
        z = m.norm(y[:])
        y.mul_(2)
        return m.relu(z + y)

    model = Graph(forward)
    with torch.no_grad():
        wanted = copy.deepcopy(model)(X)
        assert torch.equal(fastnorm.fuse(model)(X), wanted) and not activations(model)


def test_a_write_inside_a_module_between() -> None:
    """The norm's input may be a part of what the module writes; what a convolution returns is nobody else's."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.conv(x)
        return m.relu(m.small(x[:, :2]) + m.branch(x))

    branch = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    model = Graph(forward, branch=branch, small=nn.BatchNorm2d(2)).eval()
    with torch.no_grad():
        wanted = copy.deepcopy(model)(X)
        assert torch.equal(fastnorm.fuse(model)(X), wanted) and not activations(model)

    branch = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
    check(Graph(lambda m, x: m.relu(m.norm(m.conv(x)) + m.branch(x.sin())), branch=branch), X, norm="relu")


MEAN = torch.randn(1, 4, 1, 1)


class Scaled(nn.Module):
    """Has a tensor of the class."""

    scale = torch.full((1,), 2.0)

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.norm, self.relu, self.function = nn.BatchNorm2d(4), nn.ReLU(), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@pytest.mark.parametrize(
    "forward",
    (
        lambda m, x: m.relu(m.norm(x - MEAN)),
        lambda m, x: m.relu(m.norm(x)) * torch.tensor(2.0),
        lambda m, x: m.relu(m.norm(x)) + torch.arange(6),
        lambda m, x: m.relu(m.norm(x)) * m.scale,
    ),
)
def test_tensors_that_are_not_the_modules(forward: Callable[..., Tensor]) -> None:
    """Layers can be exchanged; in a forward that was generated they would be burnt in, on the device they were on."""
    check(Scaled(forward), X, norm="relu")
    check(nn.Sequential(Scaled(forward), nn.BatchNorm2d(4), nn.ReLU()), X, **{"0.norm": "relu", "1": "relu"})
    model = check(Scaled(lambda m, x: F.relu(forward(m, x) + m.norm(x))), X)
    assert type(model) is Scaled
    model = check(Scaled(lambda m, x: F.relu(m.norm(x)) * forward(m, x)), X)
    assert type(model) is Scaled and vars(model).keys() == vars(Scaled(forward)).keys()


def test_statistics_that_are_read_between() -> None:
    """The norm must not move to the addition, after which they would be read too late."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.norm(m.conv(x))
        mean = m.norm.running_mean.sum() * 1.0
        return m.relu(y + x) + mean

    check(Graph(forward), X)


def test_writes_in_a_forward_that_is_generated() -> None:
    """torch.fx takes ``+=`` for ``+``: whoever holds the same tensor, here the caller and z, would not see it."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x *= 2
        z = y = x.sin()
        size = count = y.shape[0]
        count += 1
        y += 1
        y /= count
        return F.relu(m.norm(z)) * size

    x, plain = X.clone(), Graph(forward)
    model = copy.deepcopy(plain)
    with torch.no_grad():
        wanted = plain(X.clone())
        assert difference(fastnorm.fuse(model)(x), wanted) < 1e-6
    assert activations(model) and torch.equal(x, 2 * X)

    def sets(m: nn.Module, x: Tensor) -> Tensor:
        y = x.sin()
        y.data += 1
        return F.relu(m.norm(y))

    check(Graph(sets), X)


def test_two_norms_and_one_addition() -> None:
    """As with a projection on the skip connection: one of the two takes the other as its residual."""
    check(Graph(lambda m, x: m.relu(m.norm(m.conv(x)) + m.other(m.conv(2 * x)))), X, norm="relu")
    check(Graph(add_in_place), X, norm="relu")


@pytest.mark.parametrize(
    "residual",
    (
        lambda x: x.mean((2, 3), keepdim=True),  # broadcast
        lambda x: x[:1],
        lambda x: x.unsqueeze(0).expand(2, 3, 4, 5, 6),  # to which the norm's output is broadcast
        lambda x: x.double(),
    ),
)
def test_residuals_that_no_kernel_takes(residual: Callable[[Tensor], Tensor]) -> None:
    model = check(Graph(lambda m, x: m.relu(m.norm(m.conv(x)) + residual(x))), X, norm="relu")
    assert model.norm.num_batches_tracked == 1
    assert model(X).dtype == residual(X).dtype


def test_what_kernels_have_not() -> None:
    class Mine(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    class MyNorm(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for activation in (nn.LeakyReLU(0.2), nn.GELU("tanh"), nn.ReLU6(), nn.Tanh(), Mine()):
        check(nn.Sequential(nn.BatchNorm2d(4), activation), X)
    for norm in (MyNorm(4), nn.LocalResponseNorm(3), nn.Identity()):
        check(nn.Sequential(norm, nn.ReLU()), X)
    check(nn.Sequential(fastnorm.BatchNorm2d(4, activation="relu"), nn.SiLU()), X, **{"0": "relu"})


def test_hooks() -> None:
    """A hook on either sees what it has always seen; those on a module around them stay too."""
    for index in (0, 1):
        model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
        model[index].register_forward_hook(lambda module, args, y: None)
        check(model, X)
    block = Graph(add_in_place)
    seen = []
    block.register_forward_hook(lambda module, args, y: seen.append(y))
    y = fastnorm.fuse(block)(X)
    assert seen[0] is y and activations(block)


def test_shared_layers() -> None:
    relu, norm = nn.ReLU(), nn.BatchNorm2d(4)
    model = nn.Sequential(nn.BatchNorm2d(4), relu, nn.Sequential(nn.GroupNorm(2, 4), relu))
    check(model, X, **{"0": "relu", "2.0": "relu"})
    assert type(model[1]) is nn.Identity and model[2][1] is model[1]
    gelu = nn.GELU()  # twice is not once: where the layer stays for one place, it must stay for the other
    model = nn.Sequential(nn.BatchNorm2d(4), gelu, nn.Conv2d(4, 4, 1), gelu)
    check(model, X)
    model = nn.Sequential(model, Graph(lambda m, x: m.gelu(m.norm(x)), gelu=gelu))
    check(model, X, **{"1.norm": "gelu"})
    assert model[1].gelu is gelu
    both = nn.Sequential(nn.BatchNorm2d(4), gelu, Graph(lambda m, x: m.gelu(m.norm(m.conv(x)) + x), gelu=gelu))
    check(both, X, **{"0": "gelu", "2.norm": "gelu"})
    check(nn.Sequential(norm, nn.ReLU(), nn.Sequential(norm, nn.SiLU())), X)  # one norm before two activations
    block = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    check(nn.Sequential(block, block), X, **{"0.1": "relu"})  # one block at two places


HELD: dict[str, Callable[[nn.Module], object]] = {
    "list": lambda m: [m.norm, m.relu],
    "nested": lambda m: [{"layers": (m.norm, m.relu)}],
    "partial": lambda m: [functools.partial(nn.Sequential.forward, nn.Sequential(m.norm, m.relu))],
    "method": lambda m: [m.norm.forward, m.relu.forward],
    "closure": lambda m: [(lambda norm, relu: lambda x: relu(norm(x)))(m.norm, m.relu)],
    "object": lambda m: SimpleNamespace(norm=m.norm, relu=m.relu),
}


@pytest.mark.parametrize("how", HELD)
def test_layers_that_are_held_elsewhere(how: str) -> None:
    """They are the model's own, but to replace them in _modules does not do it."""

    def flat(value: Any) -> list[Callable[[Tensor], Tensor]]:
        if isinstance(value, (SimpleNamespace, dict)):
            value = list((value if isinstance(value, dict) else vars(value)).values())
        return [f for v in value for f in flat(v)] if isinstance(value, (list, tuple)) else [value]

    model = Graph(lambda m, x: functools.reduce(lambda y, layer: layer(y), flat(m.held), x))
    model.held = HELD[how](model)
    randomize(model)
    wanted = copy.deepcopy(model)(X)
    assert difference(fastnorm.fuse(model)(X), wanted) < 1e-6 and type(model.relu) is nn.ReLU
    object.__setattr__(model := Graph(lambda m, x: m.alias(m.norm(x))), "alias", model.relu)
    wanted = copy.deepcopy(model)(X)
    assert difference(fastnorm.fuse(model)(X), wanted) < 1e-6


def test_layers_that_are_also_called_from_outside() -> None:
    features = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    check(Graph(lambda m, x: m.features(x) + m.features[1](x), features=features), X)

    def taps(m: nn.Module, x: Tensor) -> Tensor:
        outputs = []
        for layer in m.features:
            x = layer(x)
            outputs.append(x)
        return torch.stack(outputs)

    check(Graph(taps, features=features), X)

    def decides(m: nn.Module, x: Tensor) -> Tensor:  # tracing ends before it sees the rest
        return m.first(x) if x.sum() > 1e9 else m.gelu(m.first(x))

    gelu = nn.GELU()
    model = Graph(decides, first=nn.Sequential(nn.BatchNorm2d(4), gelu), gelu=gelu)
    check(model, X)
    assert model.gelu is gelu


class Flagged(nn.Module):
    """A forward that says no more than once what it does."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm, self.conv, self.kind, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False), kind, None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "no_grad":
            with torch.no_grad():
                x = x * 2
        elif self.kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16, enabled=False):
                x = self.conv(x).float()
        elif self.kind == "training" and not self.training:
            x = x * 2
        elif self.kind == "dropout":
            x = F.dropout(x, 0.0, self.training)
        elif self.kind == "dropout of a layer":
            x = F.dropout(x, 0.0, self.conv.training)
        elif self.kind == "grad" and not torch.is_grad_enabled():
            x = x * 2
        elif self.kind == "random":
            x = x * 2 if torch.rand(()) < 2 else x
        elif self.kind == "sets":
            self.last = x
        elif self.kind == "data" and x.sum() > 0:
            x = x * 2
        elif self.kind in ("reentrant", "non-reentrant"):
            x = checkpoint(self.conv, x, use_reentrant=self.kind == "reentrant")
        return F.relu(self.norm(x))


KINDS = (
    "no_grad", "autocast", "training", "dropout", "dropout of a layer", "grad", "random", "sets", "data", "reentrant",
    "non-reentrant",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_forwards_that_a_graph_does_not_tell(kind: str) -> None:
    assert fastnorm.fuse(Flagged("")).norm.activation == "relu"
    torch.manual_seed(0)
    model = Flagged(kind)
    state = torch.get_rng_state()
    assert fastnorm.fuse(model) is model and type(model) is Flagged and type(model.norm) is nn.BatchNorm2d
    assert torch.equal(torch.get_rng_state(), state) and model.last is None


class Outputs(dict):
    pass


@pytest.mark.parametrize("kind", (dict, OrderedDict, Outputs))
def test_outputs_in_a_dictionary(kind: type[dict]) -> None:
    """torch.fx makes plain ones of all."""
    model = Graph(lambda m, x: kind(y=F.relu(m.norm(m.conv(x))), x=kind()))
    wanted = copy.deepcopy(model)(X)
    got = fastnorm.fuse(model)(X)
    assert type(got) is type(got["x"]) is kind and list(got) == list(wanted)
    assert difference(got["y"], wanted["y"]) < 1e-6 and (type(model) is Graph) == (kind is Outputs)


@dataclasses.dataclass
class Doubled:
    y: Tensor

    def __post_init__(self) -> None:
        self.y = 2 * self.y


class Pair(tuple):
    pass


def test_outputs_that_torch_fx_builds_again() -> None:
    for kind in (Doubled, lambda y: Pair((y,))):
        model = Graph(lambda m, x, kind=kind: kind(F.relu(m.norm(x))))
        wanted = copy.deepcopy(model)(X)
        got = fastnorm.fuse(model)(X)
        assert type(got) is type(wanted) and not activations(model)
        assert difference(*((v.y if isinstance(v, Doubled) else v[0]) for v in (got, wanted))) < 1e-6


def test_numbers_and_names_in_a_forward_that_is_generated() -> None:
    check(Graph(lambda m, x: F.relu(m.norm(x)) * m.scale, scale=np.sqrt(0.5)), X, norm="relu")

    class Named(Graph):
        def forward(this, self: Tensor) -> Tensor:
            return F.relu(this.norm(self))

    model = Named(F.relu)
    wanted = copy.deepcopy(model)(X)
    assert difference(fastnorm.fuse(model)(X), wanted) < 1e-6 and not activations(model)


KINDS_MADE = []


class Registered(Graph):
    def __init_subclass__(cls) -> None:
        KINDS_MADE.append(cls)


def test_a_new_module_of_a_fused_one() -> None:
    """Has nothing fused, and the class is on no list of classes; a subclass and a replica have its forward."""
    plain = type("Block", (Registered,), {})
    model = check(plain(add_in_place), X, norm="relu")
    new = type(model)(forward=add_in_place)
    assert type(new) is plain and KINDS_MADE == [plain] and isinstance(model, plain)
    check(new, X, norm="relu")
    assert type(model._replicate_for_data_parallel()) is type(model)
    assert type(type("Sub", (type(model),), {})(add_in_place)).__name__ == "Sub"


class Keeps(nn.Module):
    """A forward that keeps something in a container."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm, self.conv, self.kind = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False), kind
        containers = {"list": [], "dict": {}, "nested": {"outputs": [1]}, "set": set()}
        containers |= {"object": SimpleNamespace(last=None), "meter": SimpleNamespace(outputs=[])}
        self.kept = {**containers, "deque": deque([1], 1), "counter": Counter()}[kind.split()[0]]

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.kind == "list":
            self.kept.append(y)
        elif self.kind == "dict":
            self.kept["last"] = y
        elif self.kind == "nested":
            self.kept["outputs"][0] = y
        elif self.kind == "set":
            self.kept.add(y)
        elif self.kind == "deque":
            self.kept.append(y)
        elif self.kind == "object":
            self.kept.last = y
        elif self.kind == "meter":
            self.kept.outputs.append(y)
        elif self.kind == "counter":
            self.kept["calls"] += 1
        return F.relu(self.norm(y))


KEEPING = ("list", "dict", "nested", "set", "deque", "counter", "object", "meter", "list unchanged", "meter unchanged")


@pytest.mark.parametrize("kind", KEEPING)
def test_forwards_that_keep_something_in_a_container(kind: str) -> None:
    """They go on to, and the container has nothing of fuse in it."""
    model, plain = nn.Sequential(Keeps(kind)), Keeps(kind)
    kept = model[0].kept
    check(model, X, **{"0.norm": "relu"} if "unchanged" in kind else {})
    fused = fastnorm.fuse(model := nn.Sequential(Keeps(kind)))[0]
    assert fused.kept == plain.kept and type(fused.kept) is type(kept)
    pickle.dumps(fused)
    fused(X)
    assert ("unchanged" in kind) == (str(fused.kept) == str(plain.kept))


class Slots:
    __slots__ = ("__calls", "unset")

    def __init__(self) -> None:
        self.__calls = 0

    def count(self) -> int:
        self.__calls += 1
        return self.__calls


class OfTheClass:
    calls = 0


class Bag:
    """State in all the places that a forward can reach, but no tensors that a module knows of."""

    def __init__(self) -> None:
        global CALLS
        CALLS, SETTINGS.calls, OfTheClass.calls = 0, 0, 0
        LOG.clear()
        self.tensor, self.array, self.objects = torch.zeros(()), np.zeros(2), np.array([None, 0], dtype=object)
        self.constant, self.statistics = torch.ones(1, 2, 32), (torch.zeros(2), torch.ones(2))
        self.view, self.slots = np.zeros(3)[1:], Slots()
        self.numpy, self.legacy = np.random.default_rng(0), np.random.RandomState(0)
        self.python, self.torch = random.Random(0), torch.Generator().manual_seed(0)
        self.parameter = nn.Parameter(torch.zeros(()))
        calls = 0

        def count() -> int:
            nonlocal calls
            calls += 1
            return calls

        self.closure = count


def count_global(bag: Bag) -> int:
    global CALLS
    CALLS += 1
    return CALLS


def count_of_module(bag: Bag) -> int:
    SETTINGS.calls += 1
    return SETTINGS.calls


def set_new(bag: Bag) -> int:
    SETTINGS.later = getattr(SETTINGS, "later", 0) + 1
    return SETTINGS.later


def advance(bag: Bag) -> Tensor:
    bag.tensor += 1
    return bag.tensor


def fill(array: np.ndarray) -> float:
    array[-1] += 1
    return float(array[-1])


def count_objects(bag: Bag) -> int:
    bag.objects[1] += 1
    return bag.objects[1]


def out_of(bag: Bag) -> Tensor:
    return torch.add(bag.tensor, 1.0, out=bag.tensor)


def foreach(bag: Bag) -> Tensor:
    torch._foreach_add_([bag.tensor], 1.0)
    return bag.tensor


def count_of_class(bag: Bag) -> int:
    OfTheClass.calls += 1
    return OfTheClass.calls


def log(bag: Bag) -> int:
    LOG.append(1)
    return len(LOG)


def statistics_by(norm: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Callable[[Bag], float]:
    def count(bag: Bag) -> float:
        norm(bag.constant, *bag.statistics, *args, **kwargs)
        return float(bag.statistics[0].sum())

    return count


def statistics_in_a_mode(bag: Bag) -> float:
    with FlopCounterMode(display=False):
        return statistics_by(fastnorm.functional.batch_norm, training=True)(bag)


def drop_in_place(bag: Bag) -> Tensor:
    fastnorm.functional.dropout(bag.constant, 0.1, inplace=True)
    return bag.constant.sum()


def set_data(bag: Bag) -> Tensor:
    bag.tensor.data = bag.tensor + 1
    return bag.tensor.clone()


def of_parameter(bag: Bag) -> Tensor:
    bag.parameter.data.add_(1.0)
    return bag.parameter.detach().clone()


CALLS, LOG = 0, [1]
SETTINGS = ModuleType("settings")
CHANGING: dict[str, Callable[[Bag], Any]] = {
    "a tensor": advance,
    "a part of a tensor": lambda bag: bag.tensor[None][:1].add_(1)[0],
    "a tensor by out=": out_of,
    "tensors in a list": foreach,
    "a tensor's data": set_data,
    "a parameter": of_parameter,
    "torch's running statistics": statistics_by(F.batch_norm, training=True),
    "running statistics": statistics_by(fastnorm.functional.batch_norm, training=True),
    "running statistics in a mode of forward's own": statistics_in_a_mode,
    "running statistics of instances": statistics_by(fastnorm.functional.instance_norm),
    "a tensor by dropout": drop_in_place,
    "an array": lambda bag: fill(bag.array),
    "an array through torch": lambda bag: torch.from_numpy(bag.array).add_(1)[0].item(),
    "a view of an array": lambda bag: fill(bag.view),
    "an array of objects": count_objects,
    "slots": lambda bag: bag.slots.count(),
    "a slot that was empty": lambda bag: setattr(bag.slots, "unset", 1) or 1 + bag.slots.count(),
    "a class": count_of_class,
    "a global": count_global,
    "a global list": log,
    "a module": count_of_module,
    "a module's new name": set_new,
    "a closure": lambda bag: bag.closure(),
    "numpy's generator": lambda bag: bag.numpy.random(),
    "numpy's old generator": lambda bag: bag.legacy.rand(),
    "Python's generator": lambda bag: bag.python.random(),
    "torch's generator": lambda bag: torch.rand((), generator=bag.torch),
}


class Changing(nn.Module):
    def __init__(self, change: Callable[[Bag], Any]) -> None:
        super().__init__()
        self.norm, self.bag, self.change = nn.BatchNorm2d(4), Bag(), change

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x)) * (1 + self.change(self.bag))


@pytest.mark.parametrize("change", CHANGING)
def test_forwards_that_change_what_is_outside_of_them(change: str) -> None:
    """They go on to, from where they were: no call of fuse's counts."""

    def outputs(fuse: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(Changing(CHANGING[change]))
        vars(SETTINGS).pop("later", None)
        if fuse:
            fastnorm.fuse(model)
            assert not activations(model) and type(model[0]) is Changing
            assert not hasattr(SETTINGS, "later") and not hasattr(model[0].bag.slots, "unset")
        return [model(X) for _ in range(3)]

    wanted = outputs(False)
    assert not torch.equal(wanted[0], wanted[1])
    torch.testing.assert_close(outputs(True), wanted, rtol=0, atol=0)


def test_forwards_that_only_read_what_is_outside_of_them() -> None:
    """And write into tensors and arrays of their own."""

    def read(bag: Bag) -> float:
        mask, array = torch.zeros(3), bag.array.copy()
        mask[1:] = bag.tensor
        mask.add_(torch.tensor([1.0, 2.0, 3.0]).mul_(2))
        array += 1
        return float(mask.sum()) + float(array[0]) + OfTheClass.calls + len(LOG)

    check(Changing(read), X, norm="relu")


def test_what_cannot_be_set_back_is_not_taken() -> None:
    """A forward that can reach an iterator or a file is not run to be looked at, whether or not it takes from it."""
    for reached in (itertools.count(), iter([1, 2]), (i for i in range(2)), io.StringIO("one\ntwo")):
        model = Changing(lambda bag: 0)
        model.bag.iterator = reached
        assert not activations(fastnorm.fuse(model)) and next(reached) in (0, 1, "one\n")


def test_arguments_that_can_be_left_out() -> None:
    """torch.fx would take them for given, and a list for a tensor."""

    class Optional(Graph):
        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            if shift is not None:
                x = x + shift
            return F.relu(self.norm(x))

    class Listed(Graph):
        def forward(self, x: Tensor | list[Tensor]) -> Tensor:
            if isinstance(x, Tensor):
                x = [x]
            return F.relu(self.norm(torch.cat(x)))

    class Anything(Graph):
        def forward(self, *args: Tensor) -> Tensor:
            return F.relu(self.norm(args[0]))

    for kind in (Optional, Listed, Anything):
        check(kind(F.relu), X)


@pytest.mark.parametrize(
    "forward",
    (
        lambda self, x, y: self.norm(x) if y is None else self.relu(self.norm(x)) * y,
        lambda self, x, y: F.relu(self.norm(x if None is y else x + y)),
        lambda self, x, y: (z := self.norm(x), F.relu(z) if y is not None else z)[1],
        lambda self, x, y: next(F.relu(self.norm(x)) if y is None else y for _ in range(1)),
        lambda self, x, y: F.relu(self.norm(x)) if type(y) is Tensor else self.norm(x),
        lambda self, x, y: F.relu(self.norm(x)) if hasattr(y, "shape") else self.norm(x),
        lambda self, x, y: self.norm(x) if y is X else F.relu(self.norm(x)),
        lambda self, x, y: F.relu(self.norm(x)) if getattr(y, "shape", None) else self.norm(x),
    ),
)
def test_arguments_that_may_be_no_tensors(forward: Callable[..., Tensor]) -> None:
    """Without a default, too. A proxy is never None, and takes everything for an attribute."""
    block = type("Block", (Graph,), {"forward": forward})
    check(Graph(lambda m, x: m.block(x, None) + m.block(x, X), block=block(F.relu)), X)


def exists(value: object) -> bool:
    return value is not None


def unpacked(m: nn.Module, x: Any) -> Tensor:
    x, skip = x
    return F.relu(m.norm(x if skip is None else x + skip))


def caught(m: nn.Module, x: Any) -> Tensor:
    try:
        return F.relu(m.norm(x["x"])) * x["mask"]
    except KeyError:
        return F.relu(m.norm(x["x"]))


def suppressed(m: nn.Module, x: Any) -> Tensor:
    with contextlib.suppress(KeyError):
        x["x"] += x["mask"]
    return F.relu(m.norm(x["x"]))


def matched(m: nn.Module, x: Any) -> Tensor:
    match x:
        case {"x": y}:
            x = y
        case _:
            pass
    return F.relu(m.norm(x))


def renamed(m: nn.Module, x: Any) -> Tensor:
    mask, x = x["mask"], x["x"]
    before = mask
    y = F.relu(m.norm(x))
    return y if before is None else y * before


ASKS: dict[str, tuple[Callable[[nn.Module, Any], Tensor], Any]] = {
    "unpacked": (unpacked, (X, None)),
    "get": (lambda m, x: F.relu(m.norm(x["x"])) if x.get("mask") is None else x["x"], {"x": X}),
    "helper": (lambda m, x: F.relu(m.norm(x[0])) if exists(x[1]) else x[0], (X, None)),
    "renamed": (renamed, {"x": X, "mask": None}),
    "or": (lambda m, x: F.relu(m.norm(x[0] if (x[1] if m.relu else m) is None else -x[0])), (X, None)),
    "type": (lambda m, x: F.relu(m.norm(x)) * (2 if x.dtype is torch.float32 else 3), X),
    "hasattr": (lambda m, x: F.relu(m.norm(x["x"])) * (2 if hasattr(x["x"], "mask") else 3), {"x": X}),
    "is_tensor": (lambda m, x: F.relu(m.norm(x)) if torch.is_tensor(x) else m.norm(x), X),
    "try": (caught, {"x": X}),
    "suppress": (suppressed, {"x": X}),
    "match": (matched, {"x": X}),
    "inference": (lambda m, x: F.relu(m.norm(x)) if torch.is_inference_mode_enabled() else m.norm(x), X),
}


@pytest.mark.parametrize("kind", ASKS)
def test_what_only_a_value_can_answer(kind: str) -> None:
    """And a proxy answers all the same."""
    forward, x = ASKS[kind]
    model = Graph(forward)
    with torch.inference_mode():
        wanted = copy.deepcopy(model)(x)
    fastnorm.fuse(model)
    with torch.inference_mode():
        assert difference(model(x), wanted) < 1e-6 and not activations(model)


def test_what_a_model_says_of_itself() -> None:
    """Whether it has a layer, or an attribute, is always the same; and what a layer returns is a tensor."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.conv(x) if m.missing is None and hasattr(m, "relu") and getattr(m, "oth" + "er") else x
        y = helper(m, y, m.conv(y), None)
        return F.relu(m.norm(y))

    def helper(m: nn.Module, x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        x = x if scale is None else x * scale
        return x if shift is None else x + shift

    check(Graph(forward, missing=None), X, norm="relu")


class Features(nn.Module):
    """A forward in two halves, of which the first is called from outside as well."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.norm, self.gelu = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.GELU()
        self.kind = kind

    def forward_features(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.kind == "outside":
            return y
        return self.gelu(y) if self.kind == "layer" else F.gelu(y + x)

    def forward(self, x: Tensor) -> Tensor:
        y = self.forward_features(x)
        return F.gelu(y) if self.kind == "outside" else y.sin()


class CallsFeatures(nn.Module):
    """By one that cannot be traced."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.forward_features(x) + self.net(x) if x.sum() < 1e9 else x


@pytest.mark.parametrize("activation", ("outside", "layer", "generated"))
def test_methods_that_forward_calls(activation: str) -> None:
    """They give the numbers that they have always given, and are fused where the activation follows in them too."""
    fused = {} if activation == "outside" else {"norm": "gelu"}
    plain = Features(activation)
    randomize(plain)
    model = check(copy.deepcopy(plain), X, **fused).eval()
    check(CallsFeatures(copy.deepcopy(plain)), X, **{f"net.{name}": value for name, value in fused.items()})
    plain.load_state_dict(model.state_dict())
    assert difference(model.forward_features(X), plain.eval().forward_features(X)) < 1e-6
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(other.forward_features(X), model.forward_features(X)) and torch.equal(other(X), model(X))
    assert isinstance(model.gelu, nn.Identity) == (activation == "layer")

    class Inherits(Features):
        def forward_features(self, x: Tensor) -> Tensor:
            return super().forward_features(x) * 2

    model = check(Inherits(activation), X, **fused)
    plain = Inherits(activation)
    plain.load_state_dict(model.state_dict())
    assert difference(model.eval().forward_features(X), plain.eval().forward_features(X)) < 1e-6


class Plain(Graph):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Overrides(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x)) + F.relu(self.other(x))

    def method(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Extends(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x)) + F.relu(self.other(x))

    def method(self, x: Tensor) -> Tensor:
        return Plain.forward(self, x)


@pytest.mark.parametrize("kind", (Overrides, Extends))
def test_a_forward_that_is_overridden_and_called_by_another_method(kind: type[Graph]) -> None:
    """Also when fused again, though the class has a forward of its own by then."""
    model = kind(F.relu)
    for _ in range(2):
        check(model, X, other="relu")
        plain = kind(F.relu).eval()
        plain.load_state_dict(model.state_dict())
        assert difference(model.eval().method(X), plain.method(X)) < 1e-6
    only = type("Only", (Plain,), {"forward": lambda self, x: F.relu(Plain.forward(self, x))})
    check(only(F.relu), X, norm="relu")


def test_fused_in_two_turns() -> None:
    """The second class has all that was generated for the first."""

    class Net(Features):
        def __init__(self) -> None:
            super().__init__("generated")
            self.last = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.last(self.forward_features(x)))

    model = Net()
    hook = model.last.register_forward_hook(lambda module, args, y: None)
    check(model, X, norm="gelu")
    hook.remove()
    plain = Net()
    plain.load_state_dict(model.state_dict())
    assert activations(fastnorm.fuse(model.eval())) == {"norm": "gelu", "last": "relu"}
    assert difference(model(X), plain.eval()(X)) < 1e-6
    assert difference(model.forward_features(X), plain.forward_features(X)) < 1e-6


OTHERS: dict[str, Callable[..., Tensor]] = {
    "call": lambda self, x: self.norm(x),
    "forward": lambda self, x: self.norm.forward(x),
    "pair": lambda self, x: F.relu(self.norm(x)),
    "loop": lambda self, x: [layer(x) for layer in (self.conv, self.norm)][1],
    "nested": lambda self, x: (lambda: self.norm(x))(),
    "optional": lambda self, x, y=None: self.norm(x),
    "variable": lambda self, x: next(m.norm(x) for m in (self,)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_methods_that_forward_does_not_call(other: str) -> None:
    """They are not run, and what they use stays."""

    class Net(Graph):
        method = OTHERS[other]

    model = check(Net(lambda m, x: F.relu(m.norm(x))), X)
    assert type(model.norm) is nn.BatchNorm2d
    check(nn.Sequential(Net(lambda m, x: F.relu(m.norm(x)))), X)

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Graph(lambda m, x: F.relu(m.norm(x)))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    check(Owner(), X, **{"net.norm": "relu"})
    check(type("Reaches", (Owner,), {"method": lambda self, x: self.net.norm(x)})(), X)
    decides = {"forward": lambda self, x: self.net(x) + self.net.norm(x) if x.sum() < 1e9 else x}
    check(type("Decides", (Owner,), decides)(), X)


@pytest.mark.parametrize(
    "method",
    (
        lambda self, x: self.net[1](self.net[0](x)),
        lambda self, x: self.net[:2](x),
        lambda self, x: functools.reduce(lambda y, layer: layer(y), self.net[:2], x),
    ),
    ids=("by index", "slice", "loop"),
)
def test_layers_that_another_method_takes_out_of_a_sequential(method: Callable[..., Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        features = method

    model = Net().eval()
    wanted = model.features(X)
    fastnorm.fuse(model)
    assert difference(model.features(X), wanted) < 1e-6


def test_methods_that_do_no_harm() -> None:
    """Tensors of a layer, torch's functions, layers of the same name elsewhere."""

    class Net(Graph):
        def initialise(self) -> None:
            nn.init.zeros_(self.norm.weight)
            self.norm.reset_parameters()
            assert self.norm is None, "not to be run"

        def method(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x)) + torch.norm(x)

    check(nn.Sequential(Net(lambda m, x: m.relu(m.other(x)))), X, **{"0.other": "relu"})

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = Graph(lambda m, x: F.relu(m.norm(x))), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.inner(x))

        def method(self, x: Tensor) -> Tensor:
            return self.norm(x)

    check(Outer(), X, **{"inner.norm": "relu"})


def test_an_activation_that_another_method_uses() -> None:
    """It stays for that; forward, which has to be without, is generated."""

    class Net(Graph):
        def forward_fuse(self, x: Tensor) -> Tensor:
            return self.relu(self.conv(x))

    model = check(Net(lambda m, x: m.relu(m.norm(m.conv(x)))), X, norm="relu")
    assert type(model.relu) is nn.ReLU and torch.equal(model.forward_fuse(X), model.conv(X).relu())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_and_traced_parts() -> None:
    """They are left alone, and what is around them is fused."""
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    for scripted in (torch.jit.script(inner), torch.jit.trace(inner, X)):
        assert fastnorm.fuse(scripted) is scripted
        around = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), scripted, nn.ReLU())
        inside = Graph(lambda m, x: F.relu(m.norm(m.script(x))), script=scripted)
        for model, fused in ((around, {"0": "relu"}), (inside, {"norm": "relu"})):
            with torch.no_grad():
                wanted = model.eval()(X)
                assert difference(fastnorm.fuse(model)(X), wanted) < 1e-6
            assert activations(model) == fused
        assert around[2] is inside.script is scripted


def test_parts_of_what_cannot_be_traced() -> None:
    """In a ViT whose blocks unpack a shape, the stem, a Sequential, is fused; in one that decides, so is each arm."""
    vit = check(ViT(), images(4), **{"stem.1": "relu"})
    assert type(vit.blocks[0].norm1) is nn.LayerNorm
    arm = nn.Sequential(nn.BatchNorm2d(4), nn.SiLU())
    check(Graph(lambda m, x: m.arm(x) if x.sum() > 0 else x, arm=arm), X.abs(), **{"arm.0": "silu"})


RESNET = {"bn1": "relu"} | {f"layer{i}.{j}.bn{k}": "relu" for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)}


@pytest.mark.parametrize("converted", (False, True), ids=("torch", "converted"))
def test_resnet(converted: bool) -> None:
    torch.manual_seed(0)
    model = ResNet()
    if converted:
        fastnorm.convert(model)
    check(model, images(), **RESNET)
    assert type(model) is ResNet and isinstance(model.layer2[0], ResidualBlock)
    assert type(model.layer1[0]) is type(model.layer1[1]) is type(model.layer3[1])  # the same code, the same class
    assert type(model.layer2[0].downsample[1]) is (fastnorm.BatchNorm2d if converted else nn.BatchNorm2d)
    assert list(ResNet().state_dict()) == list(model.state_dict())
    before = str(model)
    assert str(fastnorm.fuse(model)) == before  # again: nothing to do
    folded = fastnorm.fold_batch_norm(model.eval())
    assert difference(folded(images(4)), model(images(4))) < 1e-5
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


def test_a_wrong_fusion_would_be_seen() -> None:
    model = ResNet()
    plain = copy.deepcopy(model)
    fastnorm.fuse(model).layer3[0].bn2.activation = "leaky_relu"
    assert difference(model(images()), plain(images())) > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ladder(backend: str) -> None:
    model = build_model(recipe_of(find("batchnorm"), PRESETS["quick"].recipe), backend, 0)
    check(model, images(4), **{f"stages.{i}.{j}.norm": "relu" for i in range(3) for j in range(2)})


@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "error::torch.jit.TracerWarning")
def test_torch_jit_trace_has_nothing_to_warn_of() -> None:
    """As of the model on torch.nn; what it records takes other sizes, too."""
    model = ResNet().eval()
    torch.jit.trace(model, images(2))
    traced = torch.jit.trace(fastnorm.fuse(copy.deepcopy(model)), images(2))
    torch.testing.assert_close(traced(images(3)), model(images(3)))


def test_under_a_fake_tensor_mode() -> None:
    """Where a model is made to see what it would take, and no tensor is a real one but the generator's state."""
    with FakeTensorMode():
        model = fastnorm.fuse(ResNet())
        assert activations(model) == RESNET
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_copies_and_files() -> None:
    model = fastnorm.fuse(ResNet()).eval()
    wanted = model(images(2))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(other(images(2)), wanted) and activations(other) == RESNET
        assert type(other.layer1[0]) is type(model.layer1[0]) and other.layer1[0].bn1 is not model.layer1[0].bn1
        assert other.layer1[0].bn1.weight.requires_grad
    plain = ResNet().eval()
    plain.load_state_dict(model.state_dict())
    assert difference(plain(images(2)), wanted) < 1e-5


def test_a_parametrised_block() -> None:
    """Its class, which torch made, is in torch.nn; what it calls counts. It stays, for torch takes it away again."""

    class Scaled(Graph):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.pair(x) + m.scale * m.pair[0](x) + m.relu(m.norm(x)) + F.relu(m.other(x)))
            self.pair, self.scale = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.Parameter(torch.zeros(1))

    model = Scaled()
    parametrize.register_parametrization(model, "scale", nn.Softplus())
    plain = copy.deepcopy(model)
    wanted = plain.train()(X)
    assert difference(fastnorm.fuse(model).train()(X), wanted) < 1e-6
    parametrize.remove_parametrizations(model, "scale")
    model.load_state_dict({k: v for k, v in plain.state_dict().items() if "param" not in k}, strict=False)
    assert type(model) is Scaled and difference(model(X), wanted) < 1e-6

    model = fastnorm.fuse(Graph(add_in_place))  # the other way round, and fused again
    model.register_parameter("scale", nn.Parameter(torch.zeros(1)))
    parametrize.register_parametrization(model, "scale", nn.Softplus())
    wanted = model(X)
    assert torch.equal(fastnorm.fuse(model)(X), wanted) and model.scale > 0


def test_a_graph_module() -> None:
    """Of which the class has its own way of being pickled: only layers are exchanged."""
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    check(model, X, **{"1": "relu"})
    check(torch.fx.symbolic_trace(Graph(add_in_place)), X)


def test_checkpointing_and_changes_of_requires_grad() -> None:
    model = fastnorm.fuse(ResNet()).train()
    x = images(4)
    wanted = outputs_and_gradients(copy.deepcopy(model), x)
    for reentrant in (True, False):
        other = copy.deepcopy(model)

        class Checkpointed(nn.Module):
            def __init__(self, inner: nn.Module, reentrant: bool) -> None:
                super().__init__()
                self.inner, self.reentrant = inner, reentrant

            def forward(self, x: Tensor) -> Tensor:
                return checkpoint(self.inner, x, use_reentrant=self.reentrant)

        other.layer2 = Checkpointed(other.layer2, reentrant)
        got = outputs_and_gradients(other, x)
        assert all(torch.equal(got[k.replace("layer2", "layer2.inner")], v) for k, v in wanted.items())
    model.layer3[0].bn2.requires_grad_(False)
    model.zero_grad()
    assert "layer3.0.bn2.weight" not in outputs_and_gradients(model, x)
    model.layer3[0].bn2.requires_grad_(True)
    assert "layer3.0.bn2.weight" in outputs_and_gradients(model, x)


def test_traceback_shows_the_generated_line() -> None:
    model = fastnorm.fuse(Graph(add_in_place))
    with pytest.raises(RuntimeError) as caught:
        model(torch.randn(3, 5, 2, 2))
    assert "conv = self.conv(x)" in "".join(traceback.format_tb(caught.tb))


def test_revert_keeps_what_is_fused() -> None:
    model = fastnorm.fuse(fastnorm.convert(ResNet())).eval()
    wanted = model(images(2))
    with pytest.warns(UserWarning, match=re.escape("layer4.1.bn2 (BatchNorm2d, activation='relu')")):
        fastnorm.revert(model)
    assert activations(model) == RESNET and type(model.layer2[0].downsample[1]) is nn.BatchNorm2d
    assert difference(model(images(2)), wanted) < 1e-5


def test_readme() -> None:
    exec(networks.readme_code("fuse"), names := {})
    assert list(activations(names["model"]).values()) == ["gelu", "relu"]


def test_a_profiler_goes_on() -> None:
    """cProfile's, which sys.getprofile names before Python 3.12, is no function."""

    def later() -> None:
        torch.ones(3).sum()

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    with cProfile.Profile() as profile:
        fastnorm.fuse(model)
        later()
    assert isinstance(model[1], fastnorm.BatchNorm2d) and model[1].activation == "relu"
    assert any(name == "later" for _, _, name in pstats.Stats(profile).stats)

    seen = []
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, _: seen.append(frame.f_code.co_name))
    fastnorm.fuse(model)
    later()
    sys.setprofile(before)
    assert model[1].activation == "relu" and "later" in seen
