"""Whole models from torch.nn's layers to fastnorm's and back."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import networks
import pytest
import torch
from networks import ResNet, ViT, difference, images, outputs_and_gradients, randomize
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fastnorm

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(4, momentum=None),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4, eps=1e-3, affine=False),
    "BatchNorm3d": lambda: nn.BatchNorm3d(4, track_running_stats=False),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "LayerNorm": lambda: nn.LayerNorm((4, 5), bias=False),
    "RMSNorm": lambda: nn.RMSNorm(5, eps=1e-6),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True),
    "InstanceNorm3d": lambda: nn.InstanceNorm3d(4, affine=True, track_running_stats=True),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(3, k=2.0),
    "Dropout": lambda: nn.Dropout(0.25, inplace=True),
    "Dropout1d": lambda: nn.Dropout1d(0.25),
    "Dropout2d": lambda: nn.Dropout2d(0.25),
    "Dropout3d": lambda: nn.Dropout3d(0.25),
    "AlphaDropout": lambda: nn.AlphaDropout(0.25, inplace=True),
    "FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(0.25, inplace=True),
}
MODELS = {"resnet": ResNet, "vit": ViT}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    randomize(model)
    return model


def types(model: nn.Module) -> list[type[nn.Module]]:
    return [type(m) for m in model.modules()]


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_there_and_back(name: str) -> None:
    layer = LAYERS[name]()
    before, state = dict(vars(layer)), {k: (v, v.clone()) for k, v in layer.state_dict(keep_vars=True).items()}
    text, theirs, ours = repr(layer), type(layer), getattr(fastnorm, name)
    assert fastnorm.convert(layer) is layer and type(layer) is ours
    assert issubclass(ours, nn.modules.batchnorm._BatchNorm if name == "SyncBatchNorm" else theirs)
    fresh = ours(*[0.5] if "Drop" in name else [4, 4] if name == "GroupNorm" else [4])
    assert vars(layer).keys() - {"_inplace_that_torch_ignores"} == vars(fresh).keys()  # nothing is missing or left over
    assert fastnorm.convert(layer) is layer and type(layer) is ours  # again: nothing to do
    assert fastnorm.revert(layer) is layer and type(layer) is theirs
    assert repr(layer) == text and vars(layer) == before
    for key, tensor in layer.state_dict(keep_vars=True).items():
        assert tensor is state[key][0] and torch.equal(tensor, state[key][1])


def test_table_is_complete() -> None:
    """Every normalisation and dropout layer of torch.nn is in LAYERS, or known to be left alone."""
    kinds = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    names = {n for n, k in vars(nn).items() if isinstance(k, type) and issubclass(k, nn.Module)}
    named = {n for n in names if issubclass(getattr(nn, n), kinds) or n.endswith("Norm") or "LRN" in n}
    left = {n for n in named if n.startswith("Lazy")} | {"CrossMapLRN2d"}
    assert named == LAYERS.keys() | left


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name: str, training: bool) -> None:
    """1e-5 of each tensor's norm: some twenty layers, each of which rounds at 6e-8."""
    model = build(name).train(training)
    converted = fastnorm.convert(copy.deepcopy(model))
    report = fastnorm.conversion_report(converted)
    assert len(report.fastnorm) == (20 if name == "resnet" else 15) and not report.convertible and not report.left
    wanted = outputs_and_gradients(model, images())
    got = outputs_and_gradients(converted, images())
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert difference(got[key], tensor) < 1e-5, key
    for key, tensor in model.state_dict().items():  # the running statistics too
        torch.testing.assert_close(converted.state_dict()[key], tensor, rtol=1e-5, atol=1e-6)


def test_a_wrong_layer_would_be_seen() -> None:
    """The comparison above fails where one of the layers has another eps."""
    model = build("resnet").train()
    converted = fastnorm.convert(copy.deepcopy(model))
    converted.layer3[0].bn2.eps *= 20
    wanted, got = (outputs_and_gradients(m, images()) for m in (model, converted))
    assert max(difference(got[key], tensor) for key, tensor in wanted.items()) > 3e-5


@pytest.mark.parametrize("name", MODELS)
def test_converted_then_reverted(name: str) -> None:
    model = build(name)
    before, state = types(model), model.state_dict()
    dictionaries = [dict(vars(m)) for m in model.modules()]
    fastnorm.convert(model)
    assert types(model) != before and model.state_dict().keys() == state.keys()
    fastnorm.revert(model)
    assert types(model) == before and [dict(vars(m)) for m in model.modules()] == dictionaries
    for key, tensor in model.state_dict().items():
        assert tensor.data_ptr() == state[key].data_ptr()


def test_containers_and_shared_layers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.BatchNorm1d(4)
            self.list = nn.ModuleList([nn.LayerNorm(4), self.shared])
            self.dict = nn.ModuleDict({"a": nn.Sequential(nn.Dropout(0.5)), "b": self.shared})
            self.encoder = nn.TransformerEncoderLayer(4, 2, 8)
            self.unregistered = [self.shared]

    model = Model()
    fastnorm.convert(model)
    assert model.list[1] is model.dict["b"] is model.unregistered[0] is model.shared
    assert type(model.shared) is fastnorm.BatchNorm1d and type(model.list[0]) is fastnorm.LayerNorm
    assert type(model.dict["a"][0]) is fastnorm.Dropout and type(model.encoder.norm1) is fastnorm.LayerNorm
    report = fastnorm.conversion_report(model)
    assert report.left == {"encoder.self_attn": "MultiheadAttention has its dropout (p=0.1) inside"}
    assert [n for n in report.fastnorm if n in ("shared", "list.1", "dict.b")] == ["shared"]  # once


def test_optimiser_goes_on() -> None:
    """Adam's moments stay those of the same parameters: the same steps with and without a conversion midway."""
    x, results = images(), []
    for convert in (False, True):
        model = build("resnet").train()
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        for step in range(4):
            if step == 2 and convert:
                fastnorm.convert(model)
            optimiser.zero_grad()
            model(x).square().mean().backward()
            optimiser.step()
        assert len(optimiser.state) == len(list(model.parameters()))
        results.append(model.bn1.weight.detach().clone())
    # Adam's first steps have length lr whatever the gradient, so rounding may show where a gradient nearly vanishes
    assert (results[1] - results[0]).abs().max() < 1e-5


def test_what_survives() -> None:
    norm = nn.BatchNorm2d(4, dtype=torch.float64).eval()
    norm.weight.requires_grad_(False)
    norm.note = "mine"
    norm.register_buffer("more", torch.ones(1), persistent=False)
    model = nn.Sequential(nn.Sequential(norm), nn.Dropout(0.5)).train()
    norm.eval()
    seen: list[str] = []
    norm.register_forward_hook(lambda module, *_: seen.append(f"forward {module.note}"))
    norm.register_forward_pre_hook(lambda *_: seen.append("pre"))
    norm.register_full_backward_hook(lambda *_: seen.append("backward"))
    names = [n for n, _ in model.named_modules()]
    fastnorm.convert(model)
    assert model[0][0] is norm and type(norm) is fastnorm.BatchNorm2d and [n for n, _ in model.named_modules()] == names
    assert not norm.training and model[1].training and norm.note == "mine" and norm.more is norm._buffers["more"]
    assert not norm.weight.requires_grad and norm.bias.requires_grad and norm.weight.dtype == torch.float64
    model(torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert seen == ["pre", "forward mine", "backward"] and norm.weight.grad is None and norm.bias.grad is not None


def test_without_memory() -> None:
    with torch.device("meta"):
        model = fastnorm.convert(nn.Sequential(nn.BatchNorm1d(4), nn.GroupNorm(2, 4)))
    assert model[0].weight.is_meta and type(model[1]) is fastnorm.GroupNorm
    model.to_empty(device="cpu")
    assert not model[0].weight.is_meta


def test_skip() -> None:
    def kinds(**arguments: object) -> str:
        shared = nn.LayerNorm(4)
        inner = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
        model = nn.ModuleDict({"a": inner, "b": nn.BatchNorm1d(4), "c": shared, "d": shared})
        before = fastnorm.conversion_report(model, **arguments)
        fastnorm.convert(model, **arguments)
        after = fastnorm.conversion_report(model)
        assert before.convertible == after.fastnorm and before.left.keys() == after.convertible.keys()
        assert set(before.left.values()) <= {"skipped"}
        return " ".join(after.fastnorm)

    assert kinds() == "a.0 a.1 b c"
    assert kinds(skip="a") == kinds(skip=["a"]) == "b c"  # with everything inside
    assert kinds(skip=("a.1", "b")) == "a.0 c"
    assert kinds(skip=["d"]) == "a.0 a.1 b"  # a shared layer by any of its names
    assert kinds(skip="") == ""
    assert kinds(skip=lambda name, module: isinstance(module, nn.Dropout) or name == "b") == "a.0 c"
    model = nn.Sequential(nn.LayerNorm(4))
    for function in (fastnorm.convert, fastnorm.conversion_report):
        with pytest.raises(ValueError, match=r"^convert: skip must name modules of the model, got 'layer9'$"):
            function(model, skip=["0", "layer9"])
    assert type(model[0]) is nn.LayerNorm


def test_report_says_why() -> None:
    class Scaled(nn.BatchNorm1d):
        pass

    class Affine(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + 1

    replaced = nn.LayerNorm(4)
    replaced.forward = lambda x: x
    parametrised = nn.LayerNorm(4)
    parametrize.register_parametrization(parametrised, "weight", Affine())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Dropout(0.5))
    layers = {
        "lazy": nn.LazyBatchNorm1d(),
        "sub": Scaled(4),
        "replaced": replaced,
        "parametrised": parametrised,
        "quantised": torch.ao.nn.quantized.BatchNorm2d(4),
        "scripted": scripted,
        "lrn": nn.CrossMapLRN2d(3),
        "lstm": nn.LSTM(4, 4, 2, dropout=0.5),
        "gru": nn.GRU(4, 4),
        "renorm": fastnorm.BatchRenorm1d(4),
        "path": fastnorm.DropPath(0.5),
        "linear": nn.Linear(4, 4),
        "norm": nn.GroupNorm(2, 4),
    }
    model = nn.ModuleDict(layers)
    before = types(model)
    report = fastnorm.conversion_report(model)
    assert report.fastnorm == {"renorm": "BatchRenorm1d", "path": "DropPath"}
    assert report.convertible == {"norm": "GroupNorm"}
    assert report.left == {
        "lazy": "LazyBatchNorm1d is lazy, convert after the first batch",
        "sub": "Scaled is a subclass of BatchNorm1d, its forward may do something else",
        "replaced": "LayerNorm has a forward of its own, set on the instance",
        "parametrised": "ParametrizedLayerNorm is parametrised, convert before registering the parametrisation",
        "quantised": "BatchNorm2d is quantised",
        "scripted": "Dropout is scripted, which fastnorm's layers cannot be",
        "lrn": "fastnorm has no CrossMapLRN2d",
        "lstm": "LSTM has its dropout (p=0.5) inside",
    }
    fastnorm.convert(model)
    changed = [n for n, old in zip(model.keys(), before[1:], strict=False) if type(model[n]) is not type(layers[n])]
    assert not changed and type(model["norm"]) is fastnorm.GroupNorm and types(model)[:-1] == before[:-1]
    layers["lazy"](torch.randn(3, 4))
    assert type(fastnorm.convert(model)["lazy"]) is fastnorm.BatchNorm1d  # now that it has seen a batch


@pytest.mark.parametrize(
    ("layer", "name", "value"),
    (
        (lambda: nn.BatchNorm2d(4), "activation", "relu"),
        (lambda: nn.BatchNorm2d(4), "activation", None),
        (lambda: nn.BatchNorm2d(4), "skip_nonfinite_stats", True),
        (lambda: nn.LayerNorm(4), "activation", nn.ReLU()),
        (lambda: nn.GroupNorm(2, 4), "activation", nn.Parameter(torch.ones(1))),
        (lambda: nn.LocalResponseNorm(3), "region", "Europe"),
        (lambda: nn.LocalResponseNorm(3), "convention", 1),
    ),
)
def test_an_attribute_by_the_name_of_a_setting(layer: Callable[[], nn.Module], name: str, value: object) -> None:
    """It is the user's: neither overwritten nor, by revert, deleted."""
    model = nn.Sequential(layer())
    setattr(model[0], name, value)
    kind = type(model[0])
    wanted = {"0": f"{kind.__name__} has an attribute {name}, a setting of fastnorm's"}
    assert fastnorm.conversion_report(model).left == wanted
    for change in (
        fastnorm.convert,
        fastnorm.SyncBatchNorm.convert_sync_batchnorm,
        lambda m: fastnorm.fuse(nn.Sequential(m[0], nn.ReLU())),
        fastnorm.revert,
    ):
        change(model)
        assert type(model[0]) is kind and getattr(model[0], name) is value
    assert fastnorm.conversion_report(model).left == wanted


def test_report_as_text() -> None:
    text = str(fastnorm.conversion_report(nn.Sequential(nn.LayerNorm(4), nn.LazyBatchNorm1d())))
    assert text.splitlines() == [
        "fastnorm: 0", "convertible: 1", "  0: LayerNorm", "left as they are: 1",
        "  1: LazyBatchNorm1d is lazy, convert after the first batch",
    ]  # fmt: skip
    assert "  (the model): LayerNorm" in str(fastnorm.conversion_report(nn.LayerNorm(4)))


@pytest.mark.parametrize("name", ("AlphaDropout", "FeatureAlphaDropout"))
def test_alpha_dropout_that_says_inplace(name: str) -> None:
    """torch ignores it: the input must stay as it was, also where it is used a second time."""
    model = fastnorm.convert(nn.Sequential(getattr(nn, name)(0.5, inplace=True)))
    for m in (model, copy.deepcopy(model)):
        x = torch.randn(8, 16)
        before = x.clone()
        assert not torch.equal(m(x), x) and torch.equal(x, before)
        fastnorm.revert(m)
        assert m[0].inplace and vars(m[0]).keys() == vars(nn.Dropout()).keys()


def test_revert_keeps_what_torch_has_not() -> None:
    class Mine(fastnorm.LayerNorm):
        pass

    model = nn.Sequential(
        fastnorm.BatchNorm1d(4, activation="gelu"), fastnorm.BatchNorm1d(4, skip_nonfinite_stats=True),
        fastnorm.LocalResponseNorm(3, region="intra"), fastnorm.BatchRenorm1d(4), fastnorm.DropPath(0.5), Mine(4),
        fastnorm.BatchNorm1d(4, bias=False),
    )  # fmt: skip
    before = types(model)
    with pytest.warns(UserWarning) as caught:
        fastnorm.revert(model)
    assert str(caught[0].message) == (
        "revert: torch.nn has no counterpart for 0 (BatchNorm1d, activation='gelu'); 1 (BatchNorm1d, "
        "skip_nonfinite_stats=True); 2 (LocalResponseNorm, region='intra'); 3 (BatchRenorm1d); 4 (DropPath); 5 (Mine)"
    )
    assert len(caught) == 1 and caught[0].filename == __file__
    assert types(model)[:-1] == before[:-1] and type(model[6]) is nn.BatchNorm1d
    model[6](torch.randn(8, 4)).sum().backward()


def test_copies_and_files() -> None:
    model = fastnorm.convert(build("resnet")).eval()
    wanted = model(images(2))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert types(other) == types(model) and torch.equal(other(images(2)), wanted)
        assert types(fastnorm.revert(other)) == types(ResNet())
    plain = ResNet()
    assert plain.load_state_dict(model.state_dict()) == ([], [])  # and so a file of either loads into the other
    assert difference(plain.eval()(images(2)), wanted) < 1e-5
    assert fastnorm.convert(ResNet()).load_state_dict(plain.state_dict()) == ([], [])


def test_requires_grad_changes_between_calls() -> None:
    model = build("resnet").train()
    converted = fastnorm.convert(copy.deepcopy(model))
    for frozen in (False, True, False):
        for m in (model, converted):
            for module in m.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(not frozen)
                    module.zero_grad()
        wanted, got = (outputs_and_gradients(m, images()) for m in (model, converted))
        assert got.keys() == wanted.keys() and ("layer2.0.bn1.weight" in got) is not frozen
        assert all(difference(got[key], tensor) < 1e-5 for key, tensor in wanted.items())


@pytest.mark.parametrize("reentrant", (True, False), ids=("reentrant", "non-reentrant"))
def test_activation_checkpointing(reentrant: bool) -> None:
    """The same gradients, dropout's masks included, with the activations recomputed in backward."""
    model = ViT(p=0.2).train()
    fastnorm.convert(model)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        x = model.stem(images(4)).flatten(2).transpose(1, 2)
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant) if checkpointed else block(x)
        model.zero_grad()
        model.head(model.norm(x).mean(1)).sum().backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys() and len(results[0]) > 30
    for name, gradient in results[0].items():
        assert torch.equal(results[1][name], gradient), name


def test_readme() -> None:
    exec(networks.readme_code("convert and revert"), names := {})
    assert type(names["model"][1]) is nn.BatchNorm2d
