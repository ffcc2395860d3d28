"""Arguments and modes with a __torch_function__: torch.fx's proxies, subclasses of Tensor, TorchFunctionMode."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from networks import ResNet, ViT, images, randomize
from test_modules import equal, every_module, module_and_input, run
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

import fastnorm
import fastnorm.functional as fn


class Unit(Tensor):
    """A subclass that notes the functions it is handed."""

    seen: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Silent(Tensor):
    pass


class Noting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **kwargs or {})


def targets(graph: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op not in ("placeholder", "output")]


def pickled(graph: fx.GraphModule) -> fx.GraphModule:
    for node in graph.graph.nodes:
        node.type = None  # torch.fx cannot pickle annotations that are strings
    graph.recompile()
    return pickle.loads(pickle.dumps(graph))


FUNCTIONS = {getattr(fn, name) for name in fn.__all__}


# ---- torch.fx


@pytest.mark.parametrize("network", (ResNet, ViT))
def test_a_converted_model_is_traced_as_its_original(network: Callable[[], nn.Module]) -> None:
    """With the same graph, state_dict and numbers, and modes that can still be changed."""
    torch.manual_seed(0)
    original = network()
    randomize(original)
    model = fastnorm.convert(copy.deepcopy(original))
    traced = fx.symbolic_trace(model)
    assert str(traced.graph) == str(fx.symbolic_trace(original).graph)
    assert list(traced.state_dict()) == list(fx.symbolic_trace(original).state_dict())
    traced, x = pickled(traced), images()
    for training in (True, False, True):
        assert equal(run(traced.train(training), x), run(model.train(training), x))
        assert equal(list(traced.buffers()), list(model.buffers()))


@every_module
def test_every_module_is_a_node(name: str) -> None:
    module, x = module_and_input(name)
    model = nn.Sequential(nn.Identity(), module)
    traced = fx.symbolic_trace(model)
    assert targets(traced) == ["0", "1"] and traced.get_submodule("1") is module
    again = pickled(traced)
    for training in (True, False):
        assert equal(run(again.train(training), x), run(model.train(training), x))
    assert equal(list(again.buffers()), list(model.buffers()))


def test_a_residual() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = fastnorm.InstanceNorm2d(4, activation="relu")

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.norm(x, residual=y)

    block, x, y = Block(), torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    traced = fx.symbolic_trace(block)
    assert targets(traced) == ["norm"] and torch.equal(traced(x, y), block(x, y))


class _Doubling(fastnorm.BatchNorm2d):
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return 2 * super().forward(input, residual)


def _with_a_hook() -> nn.Module:
    norm = fastnorm.BatchNorm2d(4)
    norm.register_forward_hook(lambda module, args, y: 2 * y)
    return norm


def _with_a_forward_of_its_own() -> nn.Module:
    norm = fastnorm.BatchNorm2d(4)
    norm.forward = lambda x: 2 * fastnorm.BatchNorm2d.forward(norm, x)
    return norm


@pytest.mark.parametrize("make", (lambda: _Doubling(4), _with_a_hook, _with_a_forward_of_its_own))
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
def test_a_forward_that_does_more_is_followed(make: Callable[[], nn.Module], training: bool) -> None:
    """What is added is done once, and the mode is that of tracing, as with functions of torch."""
    model, x = nn.Sequential(make()).train(training), torch.randn(2, 4, 3, 3)
    twin = fastnorm.BatchNorm2d(4).train(training)
    traced = fx.symbolic_trace(model)
    assert fn.batch_norm in targets(traced)
    assert torch.equal(traced(x), 2 * twin(x))
    assert torch.equal(model[0].running_var, twin.running_var) and (twin.running_var.mean() != 1) == training


def test_a_module_traced_for_itself() -> None:
    norm, x = fastnorm.LayerNorm(5, activation="gelu"), torch.randn(3, 5)
    traced = fx.symbolic_trace(norm)
    assert targets(traced) == ["weight", "bias", fn.layer_norm] and torch.equal(traced(x), norm(x))


def test_functionals_are_recorded() -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        x = fn.batch_norm(x, None, None, w, training=True, residual=x)
        x = fn.batch_renorm(x, w, w, training=False)
        x = fn.instance_norm(x, weight=w)
        x = fn.local_response_norm(fn.group_norm(x, 2, activation="relu"), 3, region="intra")
        x = fn.rms_norm(fn.layer_norm(x, (5,)), (5,))
        x = fn.dropout(fn.dropout1d(x[0], 0.0), 0.0)[None]
        x = fn.dropout2d(fn.dropout3d(x, 0.0), 0.0, inplace=True)
        return fn.drop_path(fn.feature_alpha_dropout(fn.alpha_dropout(x)))

    traced, x, w = fx.symbolic_trace(forward), torch.randn(2, 4, 3, 5), torch.rand(4)
    assert set(targets(traced)) & FUNCTIONS == FUNCTIONS
    assert torch.equal(pickled(traced)(x, w), forward(x, w))
    (dropout2d,) = (node for node in traced.graph.nodes if node.target is fn.dropout2d)
    assert dropout2d.kwargs == {"p": 0.0, "training": True, "inplace": True}  # by name, as torch.fx has torch's


def test_a_fused_model_is_traced() -> None:
    model = fastnorm.fuse(fastnorm.convert(ResNet())).eval()
    traced, x = fx.symbolic_trace(model), images()
    assert fastnorm.activation.norm_with_residual in targets(traced) and torch.equal(traced(x), model(x))


# ---- subclasses and modes


@every_module
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
def test_a_subclass_stays_one(name: str, training: bool) -> None:
    module, x = module_and_input(name)
    twin = copy.deepcopy(module.train(training))
    Unit.seen.clear()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = module(leaf.as_subclass(Unit))
    assert type(y) is Unit and set(Unit.seen) & FUNCTIONS
    y = y.as_subclass(Tensor)
    parameters = [p for p in module.parameters() if p.requires_grad]
    got = [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *parameters])]
    assert equal(got, run(twin, x)) and equal(list(module.buffers()), list(twin.buffers()))


def test_a_subclass_anywhere() -> None:
    x, plain = torch.randn(2, 4, 3, 3), fastnorm.GroupNorm(2, 4)
    norm = copy.deepcopy(plain)
    norm.weight = nn.Parameter(norm.weight.detach().as_subclass(Unit))
    for y in (
        norm(x),
        plain(x, x.as_subclass(Unit)),
        fn.batch_norm(x, torch.zeros(4).as_subclass(Unit), torch.ones(4)),
    ):
        assert type(y) is Unit
    assert type(fastnorm.activation.norm_with_residual(plain, x, x.as_subclass(Unit))) is Unit
    assert torch.equal(norm(x).as_subclass(Tensor), plain(x))


def test_functions_have_names_of_torchs() -> None:
    """For subclasses that go by them."""
    for function in FUNCTIONS - {fn.batch_renorm, fn.drop_path}:
        assert hasattr(F, function.__name__)


@every_module
def test_a_mode_sees_the_function(name: str) -> None:
    module, x = module_and_input(name)
    twin = copy.deepcopy(module)
    with Noting() as mode:
        got = run(module, x)
    assert len([f for f in mode.seen if f in FUNCTIONS]) == 1
    assert equal(got, run(twin, x)) and equal(list(module.buffers()), list(twin.buffers()))


def test_errors_are_the_same() -> None:
    norm = fastnorm.BatchNorm2d(4)
    with pytest.raises(ValueError, match="BatchNorm2d: input must have shape"):
        norm(torch.randn(2, 4).as_subclass(Unit))
    with pytest.raises(ValueError, match="batch_norm: activation must be"):
        fn.batch_norm(torch.randn(2, 4).as_subclass(Unit), None, None, training=True, activation="tanh")


@pytest.mark.parametrize("kind", ("subclass", "mode"))
def test_under_torch_compile(kind: str) -> None:
    model = nn.Sequential(
        fastnorm.BatchNorm2d(4), fastnorm.InstanceNorm2d(4), fastnorm.GroupNorm(2, 4), fastnorm.LocalResponseNorm(3),
        fastnorm.LayerNorm(3), fastnorm.RMSNorm(3), fastnorm.Dropout(0.0),
    )  # fmt: skip
    x = torch.randn(2, 4, 3, 3)
    wanted = copy.deepcopy(model)(x)
    torch.compiler.reset()
    # torch cannot run its own ops on a subclass in "aot_eager" either
    compiled = torch.compile(model, backend="eager" if kind == "subclass" else "aot_eager", fullgraph=True)
    if kind == "subclass":
        y = compiled(x.as_subclass(Silent))
        assert type(y) is Silent
        torch.testing.assert_close(y.as_subclass(Tensor), wanted)
    else:
        with torch.device("cpu"):
            torch.testing.assert_close(compiled(x), wanted)
