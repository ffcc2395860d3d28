"""Batch normalisation folded into the layers beside it."""

from __future__ import annotations

import copy
import functools
import operator
import pickle
import random
from collections.abc import Callable, Iterator
from itertools import product

import networks
import numpy as np
import pytest
import torch
from ladder.models import BACKENDS, build_model
from ladder.rungs import PRESETS, RUNGS, recipe_of
from networks import ResNet, ViT, difference, images, randomize
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fastnorm
from fastnorm.fold import FoldedBatchNorm

# Folding is done in float64 and rounded once, so the outputs differ by what a convolution and a normalisation of
# float32 round: some 2^-23 * sqrt(C k^2).
TOLERANCE = 1e-5


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def ready(model: nn.Module) -> nn.Module:
    randomize(model)
    return model.eval()


def check(model: nn.Module, x: Tensor, left: int = 0, **arguments: object) -> nn.Module:
    """Folds, and compares the outputs; the original must be as it was, and go on giving what it gave."""
    wanted = model(x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    types = [type(m) for m in model.modules()]
    folded = fastnorm.fold_batch_norm(model, **arguments)
    assert norms(folded) == left
    assert difference(folded(x), wanted) < TOLERANCE
    assert [type(m) for m in model.modules()] == types and torch.equal(model(x), wanted)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return folded


def layers() -> Iterator[tuple[str, Callable[..., nn.Module], Tensor]]:
    for d, transposed, groups in product((1, 2, 3), (False, True), (1, 2, 4)):
        kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{d}d")

        def build(bias: bool, kind: type[nn.Module] = kind, groups: int = groups) -> nn.Module:
            return kind(8, 12, 3, stride=2, padding=1, groups=groups, bias=bias)

        yield f"{kind.__name__}-groups{groups}", build, torch.randn(3, 8, *[7] * d)
    yield "Linear", lambda bias: nn.Linear(8, 12, bias), torch.randn(5, 8)


LAYERS = {name: (build, x) for name, build, x in layers()}


@pytest.mark.parametrize("library", (nn, fastnorm), ids=("torch", "fastnorm"))
@pytest.mark.parametrize("name", LAYERS)
def test_into_the_layer_before(name: str, library: object) -> None:
    build, x = LAYERS[name]
    kind = getattr(library, f"BatchNorm{max(1, x.dim() - 2)}d")
    for bias, affine in product((True, False), repeat=2):
        folded = check(ready(nn.Sequential(build(bias), kind(12, eps=1e-2, affine=affine))), x)
        assert folded[0].bias is not None


def test_without_bias_and_without_weight() -> None:
    for drop in ("bias", "weight"):
        norm = fastnorm.BatchNorm2d(4, bias=drop != "bias")
        if drop == "weight":
            norm.weight = None
        check(ready(nn.Sequential(nn.Conv2d(3, 4, 3), norm)), images(2))


@pytest.mark.parametrize("activation", ("relu", "leaky_relu", "silu", "gelu"))
def test_activation_stays(activation: str) -> None:
    model = ready(nn.Sequential(nn.Conv2d(3, 4, 3), fastnorm.BatchNorm2d(4, activation=activation), nn.Conv2d(4, 4, 1)))
    kind = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU, "gelu": nn.GELU}[activation]
    assert type(check(model, images(2))[1]) is kind


class Residual(nn.Module):
    def __init__(self, activation: str | None = "relu") -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = fastnorm.BatchNorm2d(4, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x), residual=x)


@pytest.mark.parametrize("activation", (None, "gelu"))
def test_residual_stays(activation: str | None) -> None:
    model = ready(nn.Sequential(nn.Conv2d(3, 4, 3), Residual(activation), Residual(activation)))
    folded = check(model, images(2))
    assert repr(folded[1].norm) == f"FoldedBatchNorm({'' if activation is None else 'activation=' + repr(activation)})"
    check(folded, images(2))  # there is nothing left to fold


def test_a_residual_that_is_the_convolution() -> None:
    """norm(c) + c: what goes into the sum must not be scaled."""

    class Twice(Residual):
        def forward(self, x: Tensor) -> Tensor:
            c = self.conv(x)
            return self.norm(c, c)

    check(ready(Twice()), torch.randn(2, 4, 5, 5), left=1)


@pytest.mark.parametrize("padding_mode", ("reflect", "replicate", "circular"))
@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize("d", (1, 2, 3))
def test_into_the_convolution_after(d: int, groups: int, padding_mode: str) -> None:
    if (d, padding_mode) == (3, "reflect"):
        padding_mode = "replicate"
    x = torch.randn(3, 4, *[8] * d)
    norm, conv = getattr(fastnorm, f"BatchNorm{d}d"), getattr(nn, f"Conv{d}d")
    for bias in (True, False):
        exact = conv(4, 6, 3, stride=2, dilation=2, groups=groups, bias=bias)
        check(ready(nn.Sequential(norm(4), exact)), x)
        padded = conv(4, 6, 3, padding=2, padding_mode=padding_mode, groups=groups, bias=bias)
        check(ready(nn.Sequential(norm(4), padded)), x)  # the padding is normalised as well
        zeros = conv(4, 6, 3, padding=1, groups=groups, bias=bias)
        check(ready(nn.Sequential(norm(4), zeros)), x, left=1)  # these zeros are not
    for padding, left in (("valid", 0), ("same", 1)):
        check(ready(nn.Sequential(norm(4), conv(4, 6, 3, padding=padding))), x, left)


def test_zeros_may_be_padded_where_nothing_is_shifted() -> None:
    norm = nn.BatchNorm2d(3, affine=False)
    norm.running_var.uniform_(0.5, 2.0)
    check(nn.Sequential(norm, nn.Conv2d(3, 4, 3, padding=1)).eval(), images(2))


def test_into_the_linear_after() -> None:
    check(ready(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False))), torch.randn(5, 4))
    model = ready(nn.Sequential(nn.BatchNorm1d(4), nn.ConvTranspose1d(4, 6, 3)))
    check(model, torch.randn(5, 4, 9), left=1)  # at the edges fewer taps see the shift
    model = ready(nn.Sequential(fastnorm.BatchNorm2d(3, activation="relu"), nn.Conv2d(3, 4, 1)))
    check(model, images(2), left=1)


def test_chains() -> None:
    """Whatever is between two layers that fold, and gone, no longer stands between them."""
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Identity(), nn.BatchNorm2d(4), nn.BatchNorm2d(4),
        nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), fastnorm.BatchNorm2d(5, activation="silu"),
    )  # fmt: skip
    check(ready(model), images(2))


def test_a_linear_layer_with_more_dimensions() -> None:
    """nn.Linear's features are the last dimension, BatchNorm1d's channels the second: the shape must say that they are
    the same."""
    model = ready(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()))
    folded = check(model, torch.randn(5, 8))
    assert model(torch.randn(5, 8, 8)).shape == (5, 8, 8)
    with pytest.raises(RuntimeError, match=r"^FoldedBatchNorm: input must have 2 dimensions, got shape \[5, 8, 8\]"):
        folded(torch.randn(5, 8, 8))
    check(model, torch.randn(5, 8, 8), left=1, skip="1")
    check(ready(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm2d(8))), torch.randn(2, 8, 3, 8), left=1)
    folded = check(ready(nn.Sequential(nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8))), torch.randn(2, 4, 8))
    with pytest.raises(RuntimeError, match="must have 3 dimensions"):
        folded(torch.randn(4, 8))


class Graph(nn.Module):
    """A model whose forward is a function of it."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv_and_norm(**more: nn.Module) -> dict[str, nn.Module]:
    return {"conv": nn.Conv2d(4, 4, 1), "norm": nn.BatchNorm2d(4), **more}


@pytest.mark.parametrize(
    "forward",
    (
        lambda m, x: m.norm(m.conv(x)) + m.conv(x),  # used twice
        lambda m, x: m.norm(m.conv(m.conv(x))),
        lambda m, x: m.norm(c := m.conv(x)) + c,  # its output goes elsewhere too
        lambda m, x: m.norm(m.conv(x)) + m.norm(x),  # the normalisation has another input
        lambda m, x: m.norm(m.conv(x)) + m.conv.weight.mean(),  # the weight is used elsewhere
        lambda m, x: m.norm(m.conv(x)) + m.norm.running_var.mean(),
        lambda m, x: m.norm(m.conv(x).relu()),
        lambda m, x: m.norm(m.conv(x) + x),
        lambda m, x: m.conv(n := m.norm(x)) + n,
        lambda m, x: m.conv(m.norm(x)) + m.conv(x),
    ),
    ids=("twice", "itself", "output", "input", "weight", "buffer", "relu", "add", "after-output", "after-input"),
)
def test_left_alone(forward: Callable[..., Tensor]) -> None:
    check(ready(Graph(forward, **conv_and_norm())), torch.randn(2, 4, 5, 5), left=1)


@pytest.mark.parametrize(
    "forward",
    (
        lambda m, x: m.norm(m.conv(m.norm(m.conv(x)))),  # a block of which the layers are shared
        lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x)),  # one normalisation for two convolutions
        lambda m, x: m.conv(n := m.norm(x)) + m.other(n),  # and before two
        lambda m, x: m.norm(input=m.conv(input=x)),
    ),
    ids=("block", "two", "two-after", "keywords"),
)
def test_shared_layers_that_fold(forward: Callable[..., Tensor]) -> None:
    check(ready(Graph(forward, **conv_and_norm(other=nn.Conv2d(4, 4, 1)))), torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize(
    ("write", "left"),
    (
        (lambda m, x: m.relu(x), 1),
        (lambda m, x: m.block(x), 1),
        (lambda m, x: nn.functional.relu(x, True), 1),
        (lambda m, x: x[:].add_(1), 1),
        (lambda m, x: operator.iadd(x, 1), 1),
        (lambda m, x: x.sin(), 0),
    ),
    ids=("layer", "block", "function", "method", "augmented", "none"),
)
def test_a_write_into_the_input_of_a_normalisation(write: Callable[..., Tensor], left: int) -> None:
    """nn.Identity, in its place, would return the input itself."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = x.sin()
        h = m.norm(x)
        shortcut = write(m, x)
        return m.conv(h) + shortcut

    block = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
    block.register_forward_hook(lambda module, args, y: None)
    model = Graph(forward, **conv_and_norm(relu=nn.ReLU(inplace=True), block=block))
    check(ready(model), torch.randn(2, 4, 5, 5), left)


def test_layers_that_are_held_elsewhere() -> None:
    """To replace a normalisation in _modules does not do it."""
    for hold in (
        lambda m: [(m.conv, m.norm)],
        lambda m: [(functools.partial(m.conv), m.norm.forward)],
    ):
        model = Graph(lambda m, x: m.held[0][1](m.held[0][0](x)), **conv_and_norm())
        model.held = hold(model)
        check(ready(model), torch.randn(2, 4, 5, 5), left=1)


def test_one_weight_in_two_convolutions() -> None:
    model = ready(Graph(lambda m, x: m.norm(m.conv(x)) + m.other(x), **conv_and_norm(other=nn.Conv2d(4, 4, 1))))
    model.other.weight = model.conv.weight
    check(model, torch.randn(2, 4, 5, 5))


def test_layers_that_are_not_known_to_be_linear() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    class Padded(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight.abs(), bias)

    class Mine(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sigmoid()

    class Same(nn.BatchNorm2d):
        """A subclass by name only."""

    class SameConv(nn.Conv2d):
        pass

    x = images(2)
    check(ready(nn.Sequential(SameConv(3, 4, 3), Same(4))), x)
    for conv, norm in ((Standardised, nn.BatchNorm2d), (Padded, nn.BatchNorm2d), (nn.Conv2d, Mine)):
        check(ready(nn.Sequential(conv(3, 4, 3), norm(4))), x, left=1)
    model = ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).requires_grad_(False)
    for change in (
        lambda m: prune.l1_unstructured(m[0], "weight", 0.5),
        lambda m: fastnorm.parametrizations.weight_norm(m[0]),
        lambda m: parametrize.register_parametrization(m[0], "bias", nn.ReLU()),
        lambda m: m[0].register_forward_hook(lambda module, args, y: y.relu()),
        lambda m: m[1].register_forward_pre_hook(lambda module, args: (args[0].relu(),)),
        lambda m: setattr(m[0], "forward", lambda x: nn.functional.conv2d(x, m[0].weight).relu()),
    ):
        changed = copy.deepcopy(model)
        change(changed)
        check(changed, x, left=1)


def test_subclasses_of_batch_norm() -> None:
    x = images(2)
    for library in (nn, fastnorm):
        check(ready(nn.Sequential(nn.Conv2d(3, 4, 3), library.SyncBatchNorm(4))), x)
    check(ready(nn.Sequential(nn.Conv2d(3, 4, 3), fastnorm.BatchRenorm2d(4, activation="relu"))), x)
    check(ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))), x, left=1)
    assert norms(fastnorm.fold_batch_norm(nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)).eval())) == 1


def test_training_mode_is_refused() -> None:
    model = ResNet().eval()
    model.layer2[1].bn2.train()
    message = r"^fold_batch_norm: model must be in eval mode, got BatchNorm2d 'layer2.1.bn2' in training mode; call"
    with pytest.raises(ValueError, match=message):
        fastnorm.fold_batch_norm(model)
    assert norms(fastnorm.fold_batch_norm(model, skip=["layer2.1.bn2"])) == 1
    frozen = ResNet().train()
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    folded = fastnorm.fold_batch_norm(frozen)
    assert norms(folded) == 0 and folded.training
    with pytest.raises(ValueError, match=r"^fold_batch_norm: skip must name modules of the model, got 'layer9'$"):
        fastnorm.fold_batch_norm(model, skip=["layer9"])


@pytest.mark.parametrize("tools", ("torch", "fastnorm"))
@pytest.mark.parametrize("kind", (ResNet, ViT))
def test_networks(kind: type[nn.Module], tools: str) -> None:
    """The ViT cannot be traced as a whole: its stem, a Sequential, folds all the same."""
    torch.manual_seed(0)
    model = ready(kind())
    if tools == "fastnorm":
        fastnorm.convert(model)
    folded = check(model, images())
    other = pickle.loads(pickle.dumps(folded))
    assert torch.equal(other(images(2)), folded(images(2))) and type(folded) is kind


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ladder(backend: str) -> None:
    for rung in RUNGS:
        if "ladder" not in rung.groups:
            continue
        recipe = recipe_of(rung, PRESETS["quick"].recipe)
        model = ready(build_model(recipe, backend, 0))
        folded = check(model, images(4))
        assert norms(model) == (6 if recipe.norm == "batch" else 0) and type(folded) is type(model)


def test_parts_of_what_cannot_be_traced() -> None:
    """Inside a forward that decides by its input, and one that iterates over what it holds."""

    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
            self.b = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.Identity(), nn.BatchNorm2d(3)))
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(x))  # it will never be known where else these are called
            return self.a(x) if x.sum() > 0 else self.b(x)

    model = ready(
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Decides(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    )
    for sign in (1, -1):
        model[1].bias.data.fill_(5.0 * sign)
        check(model, images(2), left=1)


@pytest.mark.parametrize("kind", (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.DataParallel))
def test_containers(kind: type[nn.Module]) -> None:
    """Of blocks, as a model, in one that can be traced and in one that cannot; of layers that are used one by one."""
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def contain(m: nn.Module) -> nn.Module:
        return kind({"a": m}) if kind is nn.ModuleDict else kind([m]) if kind is nn.ModuleList else kind(m)

    def inside(m: nn.Module) -> nn.Module:
        return {nn.ModuleList: lambda: m[0], nn.ModuleDict: lambda: m["a"]}.get(kind, lambda: m)()

    assert norms(fastnorm.fold_batch_norm(contain(block).eval())) == 0
    for forward in (
        lambda m, x: inside(m.container)(x),
        lambda m, x: inside(m.container)(x) if x.sum() < 1e9 else x,
    ):
        check(ready(Graph(forward, container=contain(block))), images(2))
    if kind is nn.ModuleList:
        layers = nn.ModuleList(block)
        check(ready(Graph(lambda m, x: m.layers[1](m.layers[0](x)), layers=layers)), images(2))
        uses = Graph(lambda m, x: m.layers[1](y := m.layers[0](x)) + y if x.sum() < 1e9 else x, layers=layers)
        check(ready(uses), images(2), left=1)


def test_arguments_that_can_be_left_out() -> None:
    """With and without them, the convolution must only lead to the normalisation."""

    class Optional(nn.Module):
        def __init__(self, given: bool) -> None:
            super().__init__()
            self.conv, self.norm, self.given = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), given

        def forward(self, x: Tensor, scale: Tensor | None = None, times: int = 2) -> Tensor:
            x = self.conv(x)
            if (scale is None) is self.given:
                return x * times
            return self.norm(x)

    class Same(Optional):
        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            x = self.norm(self.conv(x if scale is None else x * scale))
            return x if isinstance(scale, type(None)) else x / scale

    for given in (False, True):
        check(ready(Optional(given)), images(2), left=1)
    check(ready(Same(False)), images(2), left=1)

    class Decided(Same):
        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            return self.norm(self.conv(x if scale is None else x * scale))

    folded = check(model := ready(Decided(False)), images(2))
    assert difference(folded(images(2), torch.tensor(3.0)), model(images(2), torch.tensor(3.0))) < TOLERANCE

    class Asked(Optional):
        def forward(self, x: Tensor, scale: Tensor | None) -> Tensor:
            x = self.conv(x)
            return x if scale is None else self.norm(x)

    model = ready(Asked(False))
    folded = fastnorm.fold_batch_norm(model)
    for scale in (None, images(2)):
        assert difference(folded(images(2), scale), model(images(2), scale)) < TOLERANCE


def exists(value: object) -> bool:
    return value is not None


def caught(m: nn.Module, x: dict[str, Tensor]) -> Tensor:
    y = m.conv(x["x"])
    try:
        return m.norm(y) + x["mask"]
    except KeyError:
        return y


@pytest.mark.parametrize(
    "forward",
    (
        lambda m, x: m.norm(m.conv(x["x"])) if x.get("mask") is not None else m.conv(x["x"]),
        lambda m, x: m.norm(m.conv(x["x"])) if exists(x["none"]) else m.conv(x["x"]),
        lambda m, x: m.norm(m.conv(x["x"])) if x["x"].dtype is torch.float64 else m.conv(x["x"]),
        lambda m, x: m.norm(m.conv(x["x"])) if torch.is_grad_enabled() else m.conv(x["x"]),
        lambda m, x: m.norm(m.conv(x["x"])) if not torch.is_inference_mode_enabled() else m.conv(x["x"]),
        caught,
    ),
    ids=("get", "helper", "type", "grad", "inference", "try"),
)
def test_what_only_a_value_can_answer(forward: Callable[..., Tensor]) -> None:
    """A proxy is never None; and forward may be called in another mode than it was traced in."""
    model = ready(Graph(forward, **conv_and_norm()))
    folded, x = fastnorm.fold_batch_norm(model), {"x": torch.randn(2, 4, 5, 5), "none": None}
    with torch.inference_mode():
        assert difference(folded(x), model(x)) < TOLERANCE


def test_blocks_that_ask_in_one_that_does_not() -> None:
    """Of what the block before returns, it is not known whether it is None: both fold by themselves."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
            return self.norm(self.conv(x if skip is None else x + skip))

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.norm(m.conv(x))
        return m.b(m.a(x, None), x[:, :3])

    layers = {"conv": nn.Conv2d(3, 3, 1), "norm": nn.BatchNorm2d(3)}
    check(ready(Graph(forward, a=Block(), b=Block(), **layers)), images(2))


def test_layers_of_a_sequential_that_are_used_one_by_one() -> None:
    """As in a perceptual loss: the output of the convolution is taken out before it is normalised."""

    def taps(m: nn.Module, x: Tensor) -> Tensor:
        outputs = []
        for layer in m.features:
            x = layer(x)
            outputs.append(x.mean((1, 2, 3)))
        return torch.stack(outputs)

    check(ready(Graph(taps, features=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))), images(2), left=1)


def test_a_layer_that_an_untraceable_forward_holds_too() -> None:
    """Tracing ends before the convolution's output is seen to go elsewhere."""
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model = Graph(lambda m, x: m.block(x) if x.sum() > 1e9 else m.conv(m.block(x)), block=block, conv=block[0])
    check(ready(model), images(2), left=1)


MEAN = torch.randn(1, 3, 1, 1)


def test_tensors_that_are_not_the_modules() -> None:
    """torch.fx makes attributes of them while it traces."""
    for forward in (
        lambda m, x: m.norm(m.conv(x - MEAN)),
        lambda m, x: m.norm(m.conv(x)) * torch.tensor(2.0),
        lambda m, x: m.norm(m.conv(x)) + torch.arange(32),
    ):
        model = ready(Graph(forward, conv=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3)))
        folded = check(model, images(2))
        assert vars(folded).keys() == vars(model).keys()
        check(nn.Sequential(model, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval(), images(2))
    check(ready(Graph(lambda m, x: m.norm(m.conv(x) + MEAN), conv=model.conv, norm=model.norm)), images(2), left=1)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_and_traced_parts() -> None:
    """They are left alone, and what is around them folds."""
    inner = ready(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    for scripted in (torch.jit.script(inner), torch.jit.trace(inner, images(2))):
        check(scripted, images(2))
        check(
            ready(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), scripted, nn.BatchNorm2d(3))), images(2), left=1
        )


class Methods(nn.Module):
    """features(x) is the convolution's output; called by forward, or not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
        self.after, self.kind = nn.BatchNorm2d(3), kind

    def features(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def embedding(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "called":
            return self.norm(self.features(x)) + self.after(self.embedding(x))
        return self.norm(self.conv(x)) + self.after(self.stem(x))


@pytest.mark.parametrize("kind", ("called", "not called"))
def test_other_methods(kind: str) -> None:
    """They give the numbers that they have always given, also to a forward that cannot be traced."""
    model = ready(Methods(kind))
    folded = check(model, x := images(2), left=2)  # norm and after; the pair inside stem folds
    for name in ("features", "embedding"):
        assert difference(getattr(folded, name)(x), getattr(model, name)(x)) < TOLERANCE

    def decides(m: nn.Module, x: Tensor) -> Tensor:
        return m.net.features(x) + m.net.stem(x) + m.net(x) if x.sum() < 1e9 else x

    check(ready(Graph(decides, net=model)), x, left=2)


def test_a_forward_that_is_overridden_and_called_by_another_method() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    class Normalised(Raw):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))

        def raw(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Extended(Normalised):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(Raw.forward(self, x))

    for kind in (Normalised, Extended):
        folded = check(model := ready(kind()), images(2), left=1)
        assert difference(folded.raw(images(2)), model.raw(images(2))) < TOLERANCE


def test_a_method_with_both() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def both(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))

        def forward(self, x: Tensor) -> Tensor:
            return self.both(x).relu()

    model = ready(Both())
    folded = check(model, images(2))
    assert difference(folded.both(images(2)), model.both(images(2))) < TOLERANCE


def test_a_module_with_hooks_is_entered_on_its_own() -> None:
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    block.register_forward_hook(lambda module, args, y: -y)
    folded = check(ready(nn.Sequential(block, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))), images(2))
    assert len(folded[0]._forward_hooks) == 1


def test_an_identity_with_a_forward_of_its_own() -> None:
    model = ready(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity(), nn.BatchNorm2d(3)))
    model[1].forward = torch.relu
    check(model, images(2), left=1)


def test_looking_leaves_no_trace() -> None:
    """Attributes that forward sets, and random numbers that it draws, are as if it had never run."""

    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.last, self.log = None, nn.Linear(1, 1)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.norm(self.conv(x))
            self.new = torch.rand(3), random.random(), np.random.rand()
            return self.last

    class Counts(Remembers):
        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return self.norm(self.conv(x))

    class Draws(Remembers):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) if torch.rand(()) > 2 else self.norm(x) + self.norm(self.conv(x))

    class Keeps(Remembers):
        def __init__(self) -> None:
            super().__init__()
            self.kept = {"outputs": []}

        def forward(self, x: Tensor) -> Tensor:
            self.kept["outputs"].append(self.conv(x))
            return self.norm(self.kept["outputs"][-1])

    for kind in (Remembers, Counts, Draws, Keeps):
        model = ready(kind())
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        folded = fastnorm.fold_batch_norm(model)
        assert (torch.get_rng_state() == states[0]).all() and random.getstate() == states[1]
        assert np.random.get_state()[1].tolist() == states[2]
        assert folded.last is None and not hasattr(folded, "new") and folded.count == model.count == 0
        assert norms(folded) == 1 and getattr(folded, "kept", {"outputs": []}) == {"outputs": []}


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=lambda d: str(d)[6:])
def test_types_and_layouts(dtype: torch.dtype) -> None:
    model = ready(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))).to(dtype)
    model = model.to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    folded = fastnorm.fold_batch_norm(model)
    for parameter in folded[0].parameters():
        assert parameter.dtype == dtype and not parameter.requires_grad
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last) and folded[0].weight.grad_fn is None
    allowed = 1e-14 if dtype == torch.float64 else 0.02  # bfloat16 rounds the weights at 2^-9 each
    assert difference(folded(images(2).to(dtype)), model(images(2).to(dtype))) < allowed


def test_accuracy_where_the_mean_is_large() -> None:
    """bias - mean * scale, two numbers of a thousand whose difference is one: float32 would leave 1e-4 of it."""
    conv, norm = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)
    randomize(norm)
    norm.running_mean += 1e3
    conv.bias.data.add_(1e3)
    model = nn.Sequential(conv, norm).eval()
    folded = fastnorm.fold_batch_norm(model)
    exact = copy.deepcopy(model).double()
    scale = exact[1].weight * torch.rsqrt(exact[1].running_var + exact[1].eps)
    bias = (exact[0].bias - exact[1].running_mean) * scale + exact[1].bias
    assert difference(folded[0].bias, bias) < 1e-7
    assert torch.equal(folded[0].weight, (exact[0].weight * scale.view(-1, 1, 1, 1)).float())  # rounded once
    assert difference(folded(images(2)), exact(images(2).double())) < 1e-6


def test_folded_batch_norm_by_itself() -> None:
    layer = FoldedBatchNorm("relu", 2)
    assert repr(layer) == "FoldedBatchNorm(activation='relu', dims=2)"
    assert layer(torch.tensor([[-1.0, 2.0]])).tolist() == [[0.0, 2.0]]


def test_readme() -> None:
    exec(networks.readme_code("fold_batch_norm"), names := {})
    assert norms(names["folded"]) == 0
