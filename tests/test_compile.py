"""torch.compile and torch.export: the ops of the dispatcher, and networks compiled whole, against eager calls."""

from __future__ import annotations

import contextlib
import copy
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import (
    ResidualBlock,
    ResNet,
    TransformerBlock,
    ViT,
    difference,
    images,
    outputs_and_gradients,
    randomize,
    readme_code,
)
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fastnorm
import fastnorm.functional as fn

OPS = torch.ops.fastnorm
SHAPE = (4, 6, 5, 3)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    torch.manual_seed(0)
    yield
    fastnorm.enable_under_compile(True)


def tensor(*shape: int, grad: bool = False, last: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    t = torch.randn(shape, dtype=dtype)
    if last:
        t = t.contiguous(memory_format=torch.channels_last)
    return t.requires_grad_(grad)


def operators(backend: str = "aot_eager") -> tuple[Callable[..., Any], list[str]]:
    """A backend that runs what it gets, and the list of the ops in it."""
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    return aot_autograd(fw_compiler=record, bw_compiler=record), seen


# ---- the ops by themselves


def forward_samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    def channels(grad: bool = True, last: bool = False, residual: bool = False, shape: tuple[int, ...] = SHAPE) -> Any:
        C = shape[1]
        z = tensor(*shape, grad=grad, last=last) if residual else None
        return tensor(*shape, grad=grad, last=last), tensor(C, grad=grad), tensor(C, grad=grad), z

    def tracked() -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros(6), torch.ones(6), torch.tensor(3)

    none = (None, None, None)
    # of these the mask has no bytes that no element belongs to, which hold anything
    wide, narrow = (4, 8, 4, 4), (64, 2, 2, 2)
    rest = (1e-5, None, False, None, True)
    relu = (1e-5, "relu", False, None, True)
    row = tensor(4, 5, 7, grad=True), tensor(7, grad=True), tensor(7, grad=True)
    state = torch.tensor([12345, 678])
    lrn = (3, 0.3, 0.75, 1.0)
    return {
        "batch_norm": (OPS.batch_norm, (*channels(), *none, True, 0.1, *rest)),
        "batch_norm tracked": (OPS.batch_norm, (*channels(), *tracked(), True, None, *rest)),
        "batch_norm eval": (OPS.batch_norm, (*channels(), *tracked(), False, 0.1, *rest)),
        "batch_norm last": (OPS.batch_norm, (*channels(last=True), *none, True, 0.1, *rest)),
        "batch_norm mask, planes": (OPS.batch_norm, (*channels(residual=True, shape=wide), *none, True, 0.1, *relu)),
        "batch_norm mask, folded": (OPS.batch_norm, (*channels(residual=True, shape=narrow), *none, True, 0.1, *relu)),
        "batch_norm mask, last": (
            OPS.batch_norm,
            (*channels(residual=True, last=True, shape=wide), *none, True, 0.1, *relu),
        ),
        "batch_norm silu": (
            OPS.batch_norm,
            (*channels(residual=True), *none, True, 0.1, 1e-5, "silu", True, None, True),
        ),
        "batch_norm renorm": (
            OPS.batch_norm,
            (*channels(), *tracked(), True, 0.1, 1e-5, None, False, [3.0, 5.0], True),
        ),
        "group_norm": (OPS.group_norm, (*channels(), 3, 1e-5, "gelu", True)),
        "group_norm mask, flat": (
            OPS.group_norm,
            (*channels(residual=True, shape=narrow), 2, 1e-5, "leaky_relu", True),
        ),
        "group_norm mask, planes": (
            OPS.group_norm,
            (*channels(residual=True, shape=wide), 4, 1e-5, "leaky_relu", True),
        ),
        "group_norm mask, last": (
            OPS.group_norm,
            (*channels(residual=True, last=True, shape=wide), 4, 1e-5, "relu", True),
        ),
        "instance_norm": (OPS.instance_norm, (*channels(), None, None, 0.1, 1e-5, None, True)),
        "instance_norm tracked": (
            OPS.instance_norm,
            (*channels(last=True), *tracked()[:2], 0.1, 1e-5, "relu", True),
        ),
        "layer_norm": (OPS.layer_norm, (*row, None, [7], 1e-5, None, True, True)),
        "layer_norm mask": (
            OPS.layer_norm,
            (tensor(4, 8, grad=True), None, None, tensor(4, 8, grad=True), [8], 1e-5, "relu", True, True),
        ),
        "rms_norm": (OPS.layer_norm, (row[0], row[1], None, None, [7], 1e-5, "silu", False, True)),
        "layer_norm without gradients": (
            OPS.layer_norm,
            (*(t.detach() for t in row), None, [7], 1e-5, None, True, False),
        ),
        "local_response_norm": (OPS.local_response_norm, (tensor(*SHAPE, grad=True), *lrn, "inter", "torch")),
        "local_response_norm last": (
            OPS.local_response_norm,
            (tensor(*SHAPE, grad=True, last=True), *lrn, "intra", "paper"),
        ),
        "dropout_state": (OPS.dropout_state, (tensor(*SHAPE, grad=True), 0)),
        "dropout": (OPS.dropout, (tensor(*SHAPE, grad=True, last=True), 0.4, state, 0)),
        "dropout of channels": (OPS.dropout, (tensor(*SHAPE, grad=True), 0.4, state, 2)),
        "alpha_dropout": (OPS.alpha_dropout, (tensor(*SHAPE, grad=True), 0.4, state, 0)),
        "spectral_norm": (
            OPS.spectral_norm,
            (tensor(*SHAPE, grad=True, last=True), tensor(4), tensor(90), 1, 0, 1e-12),
        ),
        "weight_norm": (OPS.weight_norm, (tensor(4, 1, 1, 1, grad=True), tensor(*SHAPE, grad=True, last=True), 0)),
        "weight_norm of all": (OPS.weight_norm, (tensor(grad=True), tensor(*SHAPE, grad=True), -1)),
        "weight_norm of columns": (OPS.weight_norm, (tensor(1, 6, 1, 1, grad=True), tensor(*SHAPE, grad=True), 1)),
        "spectral_norm of columns": (
            OPS.spectral_norm,
            (tensor(*SHAPE, grad=True), tensor(6), tensor(60), 0, 1, 1e-12),
        ),
    }


def backward_samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    x, last = tensor(*SHAPE, grad=True), tensor(*SHAPE, grad=True, last=True)
    dy, weight, row = tensor(*SHAPE, grad=True), tensor(6, grad=True), tensor(4, 7, grad=True)
    _, bn, mask, *_ = OPS.batch_norm(
        last, weight, weight, last, None, None, None, True, 0.1, 1e-5, "relu", False, None, True
    )
    _, gn, no_mask = OPS.group_norm(x, weight, None, None, 2, 1e-5, "silu", True)
    _, instance, *_ = OPS.instance_norm(last, weight, weight, None, None, None, 0.1, 1e-5, None, True)
    _, ln, _ = OPS.layer_norm(row, row[0].detach().clone(), None, None, [7], 1e-5, None, True, True)
    _, u, v, sigma, _, _ = OPS.spectral_norm(x, tensor(4), tensor(90), 0, 0, 1e-12)
    state = torch.tensor([1, 2])
    return {
        "batch_norm": (
            OPS.batch_norm_backward,
            (dy, last, weight, weight, None, mask, bn, True, 0.1, 1e-5, "relu", False, None, [True, True, True, True]),
        ),
        "group_norm": (
            OPS.group_norm_backward,
            (dy, x, weight, None, None, no_mask, gn, 2, 1e-5, "silu", [True, True, False, False]),
        ),
        "instance_norm": (
            OPS.instance_norm_backward,
            (dy, last, weight, weight, None, no_mask, instance, 0.1, 1e-5, None, [True, True, True, False]),
        ),
        "layer_norm": (
            OPS.layer_norm_backward,
            (
                tensor(4, 7), row, row[0].detach().clone(), None, None, no_mask, ln,
                [7], 1e-5, None, True, [False, True, False, False],
            ),
        ),
        "local_response_norm": (
            OPS.local_response_norm_backward,
            (dy, last, 3, 0.3, 0.75, 1.0, "inter", "torch"),
        ),
        "alpha_dropout": (OPS.alpha_dropout_backward, (tensor(*SHAPE, grad=True), 0.4, state, 0)),
        "spectral_norm": (OPS.spectral_norm_backward, (dy.detach(), x.detach(), u, v, sigma, 0)),
    }  # fmt: skip


@pytest.mark.parametrize("name", forward_samples())
def test_opcheck(name: str) -> None:
    op, args = forward_samples()[name]
    torch.library.opcheck(op.default, args)


@pytest.mark.parametrize("name", backward_samples())
def test_opcheck_of_backward(name: str) -> None:
    op, args = backward_samples()[name]
    torch.library.opcheck(op.default, args)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [SHAPE, (70, 2, 3, 2), (2, 3, 17, 7), (9, 67, 3, 3), (3, 1, 5, 5)], ids=str)
def test_masks_of_any_shape(shape: tuple[int, ...], last: bool) -> None:
    x = tensor(*shape, last=last)
    for op, setting in (
        (OPS.batch_norm, (None, None, None, True, 0.1, 1e-5, "relu", False, None, True)),
        (OPS.group_norm, (1, 1e-5, "relu", True)),
        (OPS.instance_norm, (None, None, 0.1, 1e-5, "relu", True)),
        (OPS.layer_norm, (shape[-2:], 1e-5, "relu", True, True)),
    ):
        torch.library.opcheck(op.default, (x, None, None, x, *setting), test_utils="test_faketensor")


def test_every_op_is_checked() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastnorm::")}
    checked = {op.default.name() for op, _ in [*forward_samples().values(), *backward_samples().values()]}
    assert checked == registered


# In these a number that backward takes for a constant depends on the input.
WITH_CONSTANTS = ("batch_norm renorm", "spectral_norm")
TWICE = [
    name
    for name, (_, args) in forward_samples().items()
    if any(isinstance(a, Tensor) and a.requires_grad for a in args) and name not in (*WITH_CONSTANTS, "dropout_state")
]


@pytest.mark.parametrize("name", TWICE)
def test_first_and_second_derivatives(name: str) -> None:
    op, args = forward_samples()[name]
    args = tuple(
        a.detach().double().requires_grad_(a.requires_grad) if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    )
    at = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]

    def run(*leaves: Tensor) -> Tensor:
        called = list(args)
        for i, leaf in zip(at, leaves, strict=True):
            called[i] = leaf
        y = op(*called)
        return y[0] if isinstance(y, tuple | list) else y

    leaves = [args[i] for i in at]
    # second derivatives may be small: spectral_norm's divide by the square of sigma
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True, atol=1e-8)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True, atol=1e-8)


def test_a_second_derivative_without_the_first() -> None:
    """Of the weight, whose gradient was not asked for."""
    x, weight = tensor(4, 7, grad=True), tensor(7, grad=True)
    y, *_ = OPS.layer_norm(x, weight, None, None, [7], 1e-5, None, True, True)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    wanted = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    (first,) = torch.autograd.grad(
        nn.functional.layer_norm(wanted[0], (7,), wanted[1]).square().sum(), wanted[0], create_graph=True
    )
    first.square().sum().backward()
    for got, t in zip((x, weight), wanted, strict=True):
        torch.testing.assert_close(got.grad, t.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_a_second_derivative_is_traced(tracing: str) -> None:
    """make_fx over a gradient of a gradient; the mask of ReLU and residual is read by the op."""

    def second(x: Tensor, residual: Tensor) -> Tensor:
        y = fn.group_norm(x, 2, residual=residual, activation="relu")
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    x, residual = tensor(3, 4, 5, grad=True, dtype=torch.float64), tensor(3, 4, 5, dtype=torch.float64)
    graph = make_fx(second, tracing_mode=tracing)(x, residual)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert "fastnorm.group_norm.default" in targets and "fastnorm.group_norm_backward.default" in targets
    other = tensor(3, 4, 5, grad=True, dtype=torch.float64)
    torch.testing.assert_close(graph(other, residual), second(other, residual), rtol=1e-10, atol=1e-10)


def test_a_compiled_graph_is_differentiated_once() -> None:
    """By torch's own limit."""
    x = tensor(4, 7, grad=True)
    y = torch.compile(lambda x: fn.layer_norm(x, (7,)), backend="aot_eager")(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.sum().backward()


# ---- networks


def fused_resnet() -> nn.Module:
    return fastnorm.fuse(fastnorm.convert(ResNet((4, 6, 8, 8)))).to(memory_format=torch.channels_last)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "ResNet": (lambda: fastnorm.convert(ResNet((4, 6, 8, 8))), images(4)),
    "fused ResNet, channels_last": (fused_resnet, images(4).contiguous(memory_format=torch.channels_last)),
    "ViT": (lambda: fastnorm.convert(ViT(depth=1)), images(4)),
}


def assert_equal_to_eager(model: nn.Module, x: Tensor, **options: Any) -> None:
    """Outputs, gradients, and after two batches running statistics."""
    compiled = copy.deepcopy(model)
    run = torch.compile(compiled, fullgraph=True, **options)
    for _ in range(2):
        wanted, got = outputs_and_gradients(model, x), outputs_and_gradients(run, x)
    got = {name.removeprefix("_orig_mod."): t for name, t in got.items()}
    assert wanted.keys() == got.keys()
    wanted |= dict(model.named_buffers())
    got |= dict(compiled.named_buffers())
    errors = {name: difference(got[name], wanted[name]) for name in wanted}
    assert max(errors.values()) < 1e-5, errors
    if x.is_contiguous(memory_format=torch.channels_last):
        assert got["input"].stride() == wanted["input"].stride()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_network_compiled_whole(name: str, training: bool) -> None:
    make, x = NETWORKS[name]
    model = make()
    randomize(model)
    # Without oneDNN: in torch 2.11 its gradient of a strided 1x1 convolution's weight in channels_last is another at
    # each call on some processors, of torch.nn's network, too.
    with torch.backends.mkldnn.flags(enabled=False):
        assert_equal_to_eager(model.train(training), x, backend="aot_eager")


class Everything(nn.Module):
    """Each norm, with activations and residuals, in both layouts of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = fastnorm.BatchNorm2d(8, momentum=None, activation="relu", skip_nonfinite_stats=True)
        self.renorm = fastnorm.BatchRenorm2d(8, activation="leaky_relu")
        self.gn = fastnorm.GroupNorm(2, 8, activation="relu")
        self.plain = fastnorm.GroupNorm(4, 8)
        self.instance = fastnorm.InstanceNorm2d(8, affine=True, track_running_stats=True, activation="silu")
        self.lrn = fastnorm.LocalResponseNorm(3, alpha=0.1)
        self.ln = fastnorm.LayerNorm(36, activation="relu")
        self.rms = fastnorm.RMSNorm(36, activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x, residual=x)
        x = self.renorm(x, residual=x)
        x = self.gn(x, residual=x)
        x = self.plain(x, residual=x)
        x = self.lrn(self.instance(x, residual=x))
        x = x.flatten(2)
        x = self.ln(x, residual=x)
        return self.rms(x, residual=x)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_norm_with_residual_and_activation(training: bool, last: bool) -> None:
    model, x = Everything().train(training), tensor(4, 3, 8, 8, last=last)
    if last:
        model.to(memory_format=torch.channels_last)
    assert_equal_to_eager(model, x, backend="aot_eager")


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet": (lambda: ResidualBlock(8, 8, 1), (4, 8, 6, 6)),
    "ViT": (lambda: TransformerBlock(16, 4, p=0.0), (2, 9, 16)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_inductor_against_torch(name: str, training: bool) -> None:
    """A converted block, compiled, against torch.nn's, eager; running statistics after two batches too."""
    make, shape = BLOCKS[name]
    model, x = make(), tensor(*shape)
    randomize(model)
    model.train(training)
    converted = fastnorm.convert(copy.deepcopy(model))
    run = torch.compile(converted, fullgraph=True, backend="inductor")
    for _ in range(2):
        wanted, got = outputs_and_gradients(model, x), outputs_and_gradients(run, x)
    got = {name.removeprefix("_orig_mod."): t for name, t in got.items()} | dict(converted.named_buffers())
    wanted |= dict(model.named_buffers())
    assert wanted.keys() == got.keys()
    errors = {name: difference(got[name], wanted[name]) for name in wanted}
    assert max(errors.values()) < 1e-5, errors


def test_a_bias_that_changes_before_backward() -> None:
    """Without an activation no graph keeps it, as eager calls do not."""
    for norm in (fastnorm.BatchNorm2d(4), fastnorm.LayerNorm(5), fastnorm.GroupNorm(2, 4)):
        results = []
        for function in (norm, torch.compile(norm, backend="aot_eager", fullgraph=True)):
            x = torch.linspace(-1, 2, 300).view(3, 4, 5, 5).requires_grad_()
            y = function(x)
            with torch.no_grad():
                norm.bias.add_(1)
            results.append(torch.autograd.grad(y, [x, *norm.parameters()], torch.sin(x).detach()))
        torch.testing.assert_close(*results)


def test_one_graph_for_every_batch_size() -> None:
    model = Everything()
    run = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (4, 7, 12):
            x = tensor(n, 3, 8, 8)
            wanted, got = outputs_and_gradients(model, x), outputs_and_gradients(run, x)
            assert difference(got["output"], wanted["output"]) < 1e-5
            assert difference(got["input"], wanted["input"]) < 1e-5


def test_without_gradients_nothing_is_kept() -> None:
    backend, seen = operators()
    model = fastnorm.BatchNorm2d(8, activation="relu")
    x = tensor(4, 8, 5, 5)
    compiled = copy.deepcopy(model)
    with torch.no_grad():
        y = torch.compile(compiled, fullgraph=True, backend=backend)(x)
        torch.testing.assert_close(y, model(x))
    assert "fastnorm.batch_norm.default" in seen
    assert not any("backward" in op for op in seen)
    assert compiled.num_batches_tracked == 1


@pytest.mark.parametrize("dim", [0, 1, None])
def test_spectral_and_weight_norm(dim: int | None) -> None:
    model = nn.Sequential(
        fastnorm.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        nn.Flatten(),
        fastnorm.parametrizations.weight_norm(nn.Linear(144, 5), dim=dim),
    )
    assert_equal_to_eager(model, tensor(2, 3, 8, 8), backend="aot_eager")
    backend, seen = operators()
    torch.compile(model, fullgraph=True, backend=backend)(tensor(2, 3, 8, 8))
    assert {"fastnorm.weight_norm.default", "fastnorm.spectral_norm.default"} <= set(seen)


def test_weight_norm_twice_differentiable() -> None:
    g, v = tensor(4, 1, grad=True, dtype=torch.float64), tensor(4, 5, grad=True, dtype=torch.float64)
    for dim in (0, -1):
        magnitude = g if dim == 0 else g[0]
        assert torch.autograd.gradgradcheck(lambda g, v, dim=dim: OPS.weight_norm(g, v, dim), (magnitude, v))


# ---- dropout

DROPOUTS = [
    fastnorm.Dropout(0.25),
    fastnorm.Dropout1d(0.25),
    fastnorm.Dropout(0.25, inplace=True),
    fastnorm.AlphaDropout(0.25),
    fastnorm.FeatureAlphaDropout(0.25),
    fastnorm.DropPath(0.25),
]


@pytest.mark.parametrize("module", DROPOUTS, ids=str)
def test_dropout_draws_anew_and_backward_has_the_mask(module: nn.Module) -> None:
    run = torch.compile(lambda x: module(x * 1.0), fullgraph=True, backend="aot_eager")
    x = torch.ones(80, 40, 10, requires_grad=True)
    torch.manual_seed(3)
    first, second = run(x), run(x)
    torch.manual_seed(3)
    torch.testing.assert_close(run(x), first, rtol=0, atol=0)
    assert not torch.equal(first, second)

    kept = first == first.max()
    draws = {"DropPath": 80, "Dropout1d": 3200, "FeatureAlphaDropout": 3200}.get(type(module).__name__, x.numel())
    assert abs(kept.float().mean().item() - 0.75) < 5 * (0.25 * 0.75 / draws) ** 0.5
    first.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad != 0, kept)
    eager = x.detach().clone().requires_grad_()
    module(eager * 1.0).sum().backward()
    assert eager.grad is not None
    torch.testing.assert_close(x.grad.max(), eager.grad.max())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_dropouts_of_one_tensor_have_masks_of_their_own(backend: str) -> None:
    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        return fn.dropout(x, 0.5), fn.dropout(x, 0.5)

    x = torch.ones(1000, requires_grad=True)
    a, b = torch.compile(two, fullgraph=True, backend=backend)(x)
    assert 300 < int((a != b).sum()) < 700
    (gradient,) = torch.autograd.grad((a + 10 * b).sum(), x)
    torch.testing.assert_close(gradient, (a + 10 * b).detach())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_seed_gives_the_masks_of_eager_calls(backend: str) -> None:
    model = nn.Sequential(fastnorm.Dropout(0.5), fastnorm.Dropout2d(0.3), fastnorm.AlphaDropout(0.2))
    run = torch.compile(model, fullgraph=True, backend=backend)
    x = tensor(4, 5, 6, 7)
    torch.manual_seed(3)
    eager = [model(x) for _ in range(2)]
    torch.manual_seed(3)
    for wanted in eager:
        torch.testing.assert_close(run(x), wanted, rtol=0, atol=0)


def test_a_checkpoint_in_a_graph_draws_the_mask_again() -> None:
    x = torch.ones(1000, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return checkpoint(lambda x: fn.dropout(x.sin(), 0.5).exp(), x, use_reentrant=False)

    y = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient == 0, y == 1)


def test_a_checkpointed_block_of_norms_and_dropout() -> None:
    block = fastnorm.convert(TransformerBlock(32, 4, p=0.2)).train()
    run = torch.compile(lambda x: checkpoint(block, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    results = []
    for call in (block, run):
        torch.manual_seed(5)
        x = tensor(2, 8, 32, grad=True)
        torch.manual_seed(6)
        y = call(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])])
    for wanted, got in zip(*results, strict=True):
        assert difference(got, wanted) < 1e-5


def test_dropout_in_eval_mode_is_left_out() -> None:
    backend, seen = operators()
    x = tensor(3, 4)
    torch.testing.assert_close(torch.compile(fastnorm.Dropout(0.5).eval(), backend=backend)(x) + 0, x)
    assert not any("fastnorm" in op or "rand" in op for op in seen)


def test_a_generator_is_refused() -> None:
    def with_generator(x: Tensor) -> Tensor:
        return make_fx(lambda x: fn.dropout(x, generator=torch.Generator()))(x)

    with pytest.raises(NotImplementedError, match="dropout: generator must be None under"):
        with_generator(tensor(3, 4))


# ---- export, and what decides


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export(training: bool) -> None:
    make, x = NETWORKS["ViT"]
    model = make().train(training)
    exported = torch.export.export(copy.deepcopy(model), (x,)).module()
    operators = {str(node.target) for node in exported.graph.nodes}
    assert {"fastnorm.batch_norm.default", "fastnorm.layer_norm.default"} <= operators
    assert difference(exported(x), model(x)) < 1e-5
    buffers = dict(exported.named_buffers())
    for name, wanted in model.named_buffers():
        torch.testing.assert_close(buffers[name], wanted)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_handed_back_to_torch(training: bool) -> None:
    model = nn.Sequential(Everything(), fastnorm.Dropout(0.5), fastnorm.AlphaDropout(0.5)).train(training)
    model[0].bn.momentum = 0.1  # None has torch's own read num_batches_tracked, which breaks the graph
    seen: dict[bool, list[str]] = {}
    for enabled in (True, False):
        fastnorm.enable_under_compile(enabled)
        torch.compiler.reset()
        backend, seen[enabled] = operators()
        x = tensor(4, 3, 8, 8)
        y = torch.compile(model[0], fullgraph=True, backend=backend)(x)
        y.sum().backward()
        model.eval()
        torch.testing.assert_close(torch.compile(model[0], fullgraph=True, backend=backend)(x), model[0](x))
        model.train(training)
        torch.compile(model[1:], fullgraph=True, backend=backend)(x)
    assert any("fastnorm" in op for op in seen[True])
    assert not any("fastnorm" in op for op in seen[False])


def test_export_for_others_has_only_torch_ops() -> None:
    fastnorm.enable_under_compile(False)
    model = nn.Sequential(fastnorm.BatchNorm2d(3, activation="relu"), fastnorm.Dropout(0.5)).eval()
    graph = torch.export.export(model, (tensor(2, 3, 4, 4),)).graph
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == [
        "aten.batch_norm.default",
        "aten.relu.default",
    ]


def test_a_torch_func_transform_inside_goes_to_torch() -> None:
    def rows(x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: fn.layer_norm(row, (7,)))(x)

    fastnorm.set_fallback("silent")
    x = tensor(4, 5, 7)
    y = torch.compile(rows, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, fn.layer_norm(x, (7,)))


TRANSFORMED = {
    "LayerNorm": lambda: fastnorm.LayerNorm(5),
    "RMSNorm": lambda: fastnorm.RMSNorm(5),
    "GroupNorm": lambda: fastnorm.GroupNorm(3, 6),
    "BatchNorm1d": lambda: fastnorm.BatchNorm1d(6).eval(),
    "InstanceNorm1d": lambda: fastnorm.InstanceNorm1d(6),
    "LocalResponseNorm": lambda: fastnorm.LocalResponseNorm(3),
}


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_fallback_warning_inside_a_transform(name: str, backend: str) -> None:
    """Without a break of the graph, which Dynamo could not mend there."""
    norm, x = TRANSFORMED[name](), tensor(3, 2, 6, 5)

    def per_sample(x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda sample: norm(sample).exp().sum()))(x)

    wanted = per_sample(x)
    fastnorm.set_fallback("warn")
    compiled = torch.compile(per_sample, backend=backend, fullgraph=True)
    with pytest.warns(fastnorm.FallbackWarning, match="torch.func inside of torch.compile; using torch's own op"):
        torch.testing.assert_close(compiled(x), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastnorm.FallbackWarning)
        torch.testing.assert_close(compiled(x), wanted)


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_graph_that_breaks_inside_a_transform(name: str, backend: str) -> None:
    """The rest of it then runs eagerly, on the kernels; Dynamo breaks it by itself where vmap takes a module."""
    if backend == "eager" and torch.__version__ < "2.12":
        pytest.skip("Dynamo of torch 2.11 fails at a break inside of vmap, with torch.nn's layers, too")
    norm, x = TRANSFORMED[name](), tensor(3, 2, 6, 5)

    def breaking(sample: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return norm(sample).exp().sum()

    def per_sample(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.vmap(norm)(x), torch.func.vmap(torch.func.grad(breaking))(x)

    fastnorm.set_fallback("silent")
    torch.testing.assert_close(torch.compile(per_sample, backend=backend)(x), per_sample(x))


def test_eager_calls_do_not_go_through_the_dispatcher() -> None:
    model, x = Everything(), tensor(4, 3, 8, 8)
    with torch.profiler.profile() as profile:
        model(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "aten::convolution" in names
    assert not any(name.startswith("fastnorm::") for name in names)


def test_profiles_and_anomaly_mode_name_the_ops() -> None:
    x = tensor(4, 6, 5, 5).requires_grad_()
    ops: dict[str, Callable[[], torch.Tensor]] = {
        "batch_norm": lambda: fn.batch_norm(x, None, None, training=True),
        "layer_norm": lambda: fn.layer_norm(x, (5,)),
        "rms_norm": lambda: fn.rms_norm(x, (5,)),
        "group_norm": lambda: fn.group_norm(x, 2),
        "instance_norm": lambda: fn.instance_norm(x),
        "dropout": lambda: fn.dropout(x),
        "alpha_dropout": lambda: fn.alpha_dropout(x, training=True),
        "weight_norm": lambda: fastnorm.parametrizations.weight_norm(nn.Linear(3, 2)).weight,
    }
    nodes = {"rms_norm": "LayerNorm", "alpha_dropout": "Dropout"}
    for name, op in ops.items():
        with torch.no_grad(), torch.profiler.profile() as profile:
            op()
        assert f"fastnorm.{name}" in {event.key for event in profile.key_averages()}
        node = f"Fastnorm{nodes.get(name) or ''.join(word.capitalize() for word in name.split('_'))}Backward"
        with torch.profiler.profile() as profile:
            y = op()
            assert y.grad_fn is not None and y.grad_fn.name() == node
            y.sum().backward()
        names = {event.key for event in profile.key_averages()}
        assert f"fastnorm.{name}" in names and node in names
    infinite = torch.full((2, 5), math.inf, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True), pytest.raises(RuntimeError, match="'FastnormLayerNormBackward'"):
        fn.layer_norm(infinite, (5,)).sum().backward()


def test_eager_calls_take_the_short_ways_through_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of fastnorm.op.apply_of, which a new version of torch could close without a number being wrong."""

    def detour(*_: object) -> None:
        raise AssertionError("a call went the long way")

    model, x = Everything(), tensor(4, 3, 8, 8)
    monkeypatch.setattr(torch.autograd.Function, "apply", classmethod(detour))
    monkeypatch.setattr(torch.autograd.function.BackwardCFunction, "apply", detour)
    fn.dropout(fn.alpha_dropout(model(x))).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_compiled_autograd() -> None:
    """A backward compiled as one graph, of a forward that was not."""
    spectral = fastnorm.parametrizations.spectral_norm(nn.Linear(36, 5))
    weight = fastnorm.parametrizations.weight_norm(nn.Linear(5, 5))
    model = nn.Sequential(Everything(), spectral, fastnorm.Dropout(0.4), weight, fastnorm.AlphaDropout(0.3)).double()
    x = tensor(4, 3, 8, 8, dtype=torch.float64)  # gradients of a weight-normalised layer are differences
    backend, seen = operators()

    def gradients(compiler: Callable[..., Any] | None) -> list[Tensor]:
        copied = copy.deepcopy(model)
        torch.manual_seed(0)
        loss = copied(x).square().sum()
        with compiled_autograd._enable(compiler) if compiler else contextlib.nullcontext():
            loss.backward()
        return [p.grad for p in copied.parameters()]

    wanted = gradients(None)
    assert not seen
    for found, gradient in zip(gradients(torch.compile(backend=backend, fullgraph=True)), wanted, strict=True):
        torch.testing.assert_close(found, gradient)
    ops = ("batch_norm", "group_norm", "instance_norm", "layer_norm", "local_response_norm", "spectral_norm")
    assert {f"fastnorm.{op}_backward.default" for op in (*ops, "alpha_dropout")} <= set(seen)
    assert "fastnorm.dropout.default" in seen


def test_tracing_without_torch_compile() -> None:
    graph = make_fx(lambda x: fn.layer_norm(x, (7,)))(tensor(4, 7))
    assert any("fastnorm.layer_norm" in str(node.target) for node in graph.graph.nodes)
    x = tensor(5, 7)
    torch.testing.assert_close(graph(x), fn.layer_norm(x, (7,)))


def test_what_no_kernel_takes() -> None:
    x, weight = tensor(4, 7), tensor(7, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"dropout: no kernel for input of type torch\.complex64"):
        make_fx(lambda x: fn.dropout(x))(x.to(torch.complex64))
    with pytest.raises(NotImplementedError, match=r"rms_norm: no kernel for a weight of type torch\.float64"):
        make_fx(lambda x: fn.rms_norm(x, (7,), weight))(x)
    fastnorm.set_fallback("silent")
    run = torch.compile(lambda x, weight: fn.rms_norm(x, (7,), weight), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x, weight), nn.functional.rms_norm(x, (7,), weight), check_dtype=False)


def test_the_import_is_light() -> None:
    script = "import sys, torch, fastnorm; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_readme() -> None:
    exec(readme_code("torch.compile and torch.export"), {})
