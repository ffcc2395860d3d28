"""What programs do with modules of torch.nn, with every module of fastnorm: copies, files, replicas, checkpoints."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_type_hints
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import replicate
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fastnorm

SHAPES = {1: (4, 6, 5), 2: (4, 6, 5, 3), 3: (4, 6, 2, 3, 2)}
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{
        f"{kind}{d}d": (lambda kind=kind, d=d: getattr(fastnorm, f"{kind}{d}d")(6), SHAPES[d])
        for kind in ("BatchNorm", "BatchRenorm")
        for d in SHAPES
    },
    **{
        f"InstanceNorm{d}d": (
            lambda d=d: getattr(fastnorm, f"InstanceNorm{d}d")(6, affine=True, track_running_stats=True),
            SHAPES[d],
        )
        for d in SHAPES
    },
    **{f"Dropout{d}d": (lambda d=d: getattr(fastnorm, f"Dropout{d}d")(0.4), SHAPES[d]) for d in SHAPES},
    "fused": (lambda: fastnorm.BatchNorm2d(6, activation="gelu", bias=False, skip_nonfinite_stats=True), SHAPES[2]),
    "SyncBatchNorm": (lambda: fastnorm.SyncBatchNorm(6), SHAPES[2]),
    "LayerNorm": (lambda: fastnorm.LayerNorm(5, activation="silu"), SHAPES[1]),
    "RMSNorm": (lambda: fastnorm.RMSNorm(5), SHAPES[1]),
    "GroupNorm": (lambda: fastnorm.GroupNorm(3, 6), SHAPES[2]),
    "LocalResponseNorm": (lambda: fastnorm.LocalResponseNorm(3, convention="paper"), SHAPES[2]),
    "Dropout": (lambda: fastnorm.Dropout(0.4), SHAPES[2]),
    "AlphaDropout": (lambda: fastnorm.AlphaDropout(0.4), SHAPES[2]),
    "FeatureAlphaDropout": (lambda: fastnorm.FeatureAlphaDropout(0.4), SHAPES[2]),
    "DropPath": (lambda: fastnorm.DropPath(0.4), SHAPES[2]),
}
every_module = pytest.mark.parametrize("name", MODULES)


def module_and_input(name: str) -> tuple[nn.Module, Tensor]:
    """A module whose parameters and buffers are no ones and zeros any more."""
    torch.manual_seed(0)
    make, shape = MODULES[name]
    module, x = make(), torch.randn(shape)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    for _ in range(2):
        module(x * 2 + 1)
    return module, x


def run(module: Callable[[Tensor], Tensor], x: Tensor, seed: int = 1) -> list[Tensor]:
    """Output and gradients, dropout's mask from a seed."""
    torch.manual_seed(seed)
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    parameters = [p for p in module.parameters() if p.requires_grad] if isinstance(module, nn.Module) else []
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *parameters])]


def equal(got: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(got) == len(wanted) and all(map(torch.equal, got, wanted))


def test_every_module_is_here() -> None:
    public = {n for n in fastnorm.__all__ if isinstance(k := getattr(fastnorm, n), type) and issubclass(k, nn.Module)}
    assert {type(make()).__name__ for make, _ in MODULES.values()} == public


@every_module
def test_arguments_are_torchs(name: str) -> None:
    """Of constructor and forward, in the same order with the same names and defaults; what is more comes after them."""
    kind = type(MODULES[name][0]())
    torchs = getattr(nn, kind.__name__, None)
    for method in ("__init__", "forward") if torchs else ():
        ours, wanted = (inspect.signature(getattr(k, method)).parameters.values() for k in (kind, torchs))
        positional = [(p.name, p.default) for p in wanted if p.kind is not p.KEYWORD_ONLY]
        assert [(p.name, p.default) for p in ours][: len(positional)] == positional
        assert {p.name for p in wanted} <= {p.name for p in ours}


def test_annotations_allow_what_torchs_do() -> None:
    """A type checker had refused a tuple as a shape, a number as a device, and what a Linear returned as a Linear."""
    for function in (fastnorm.functional.layer_norm, fastnorm.functional.rms_norm):
        assert get_type_hints(function)["normalized_shape"] == Sequence[int]
    for make, _ in MODULES.values():
        assert get_type_hints(type(make()).__init__).get("device", torch.types.Device) == torch.types.Device
    tools = fastnorm.parametrizations.weight_norm, fastnorm.SyncBatchNorm.convert_sync_batchnorm
    for tool in tools:
        assert get_type_hints(tool)["return"] == get_type_hints(tool)["module"] != nn.Module


def through_a_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_a_state_dict(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(module)
    for t in [*other.parameters(), *other.buffers()]:
        t.data.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


COPIES = (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_a_file, through_a_state_dict)


@every_module
@pytest.mark.parametrize("copied", COPIES, ids=("deepcopy", "pickle", "save", "state_dict"))
def test_copies(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    module, x = module_and_input(name)
    other = copied(module)
    assert type(other) is type(module) and repr(other) == repr(module) and vars(other).keys() == vars(module).keys()
    assert not {id(t) for t in other.state_dict(keep_vars=True).values()} & {
        id(t) for t in module.state_dict(keep_vars=True).values()
    }
    for training in (True, False):
        assert equal(run(other.train(training), x), run(module.train(training), x))
    assert equal(list(other.state_dict().values()), list(module.state_dict().values()))


@every_module
def test_inference_mode(name: str) -> None:
    """The same numbers, running statistics too; and what was made there has no history."""
    module, x = module_and_input(name)
    twin = copy.deepcopy(module)
    for training in (True, False):
        torch.manual_seed(1)
        wanted = twin.train(training)(x)
        torch.manual_seed(1)
        with torch.inference_mode():
            y = module.train(training)(x)
            assert y.is_inference() or y is x
        assert torch.equal(y, wanted)
    assert equal(list(module.state_dict().values()), list(twin.state_dict().values()))
    run(module.train(), x)  # an ordinary call afterwards


class NoGradient(torch.autograd.Function):
    """Its input, of which nothing depends on what comes after."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        return None


@every_module
def test_a_gradient_that_is_not_there(name: str) -> None:
    """Then there is none of the input and the parameters either, or it is zero."""
    module, x = module_and_input(name)
    leaf = x.clone().requires_grad_()
    NoGradient.apply(module(leaf)).sum().backward()
    assert all(t.grad is None or not t.grad.any() for t in (leaf, *module.parameters()))


@every_module
def test_requires_grad_changes_between_calls(name: str) -> None:
    module, x = module_and_input(name)
    parameters = list(module.parameters())
    for frozen in (True, False, True):
        module.requires_grad_(not frozen)
        assert module(x).requires_grad is (bool(parameters) and not frozen)
        got = run(copy.deepcopy(module), x)
        assert len(got) == 2 + len(parameters) * (not frozen)


def replicas(module: nn.Module, count: int) -> list[nn.Module]:
    """What DataParallel makes of a module for several GPUs, with copies on the CPU in place of broadcasts."""

    def broadcast(tensors: list[Tensor], devices: list[object], detach: bool = False) -> list[list[Tensor]]:
        return [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]

    # by the function's globals: Python 3.10 takes the module's name for the function, which is called the same
    changes = {"_broadcast_coalesced_reshape": broadcast, "_get_device_index": lambda device, optional: device}
    with mock.patch.dict(replicate.__globals__, changes):
        return replicate(module, list(range(count)))


@every_module
def test_replicas_of_data_parallel(name: str) -> None:
    """Their parameters are plain tensors, no longer in _parameters; gradients reach the module's own."""
    module, x = module_and_input(name)
    copies = replicas(module, 2)
    assert all(type(c) is type(module) for c in copies)
    for c, part in zip(copies, x.chunk(2), strict=True):
        torch.manual_seed(1)
        y = c(part)
        torch.manual_seed(1)
        assert torch.equal(y, copy.deepcopy(module)(part))
    if any(True for _ in module.parameters()):
        copies = replicas(module, 2)
        sum(c(part).square().sum() for c, part in zip(copies, x.chunk(2), strict=True)).backward()
        together = [p.grad for p in module.parameters()]
        alone = [run(copy.deepcopy(module), part)[2:] for part in x.chunk(2)]
        for got, a, b in zip(together, *alone, strict=True):
            torch.testing.assert_close(got, a + b)


def test_replicas_at_once() -> None:
    """In threads, as DataParallel runs them."""
    module, x = module_and_input("BatchNorm2d")
    parts = [(x[i : i + 2],) for i in (0, 2)] * 4
    wanted = [copy.deepcopy(module)(*part) for part in parts]
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda replica, part: replica(*part), replicas(module, 8), parts))
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@every_module
@pytest.mark.parametrize("reentrant", (True, False), ids=("reentrant", "non-reentrant"))
def test_checkpoint(name: str, reentrant: bool) -> None:
    """Run again in backward it computes the same: dropout draws the same mask."""
    module, x = module_and_input(name)
    if name.startswith("BatchRenorm"):  # r and d follow the running statistics, which the first time has updated
        module.r_max, module.d_max = 1.0, 0.0
    plain, again = copy.deepcopy(module), copy.deepcopy(module)
    wanted = run(plain, x)
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    y = checkpoint(again, leaf, use_reentrant=reentrant)
    torch.rand(3)  # the generator is elsewhere when backward comes
    y.square().sum().backward()
    assert equal([y.detach(), leaf.grad, *[p.grad for p in again.parameters()]], wanted)


class Doubled(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return 2 * t


@pytest.mark.parametrize("name", [n for n, (make, _) in MODULES.items() if list(make().parameters())])
def test_parametrised(name: str) -> None:
    """torch.nn.utils.parametrize takes the parameter out of _parameters and makes a property of the class."""
    module, x = module_and_input(name)
    doubled = copy.deepcopy(module)
    with torch.no_grad():
        for p in doubled.parameters():
            p *= 2
    for parameter in [n for n, _ in module.named_parameters()]:
        parametrize.register_parametrization(module, parameter, Doubled())
    got, wanted = run(module, x), run(doubled, x)
    assert equal(got[:2], wanted[:2]) and len(got) == len(wanted)
    for g, w in zip(got[2:], wanted[2:], strict=True):
        torch.testing.assert_close(g, 2 * w)
    for parameter in list(module.parametrizations):
        parametrize.remove_parametrizations(module, parameter)
    assert type(module) is type(doubled) and equal(run(module, x), run(doubled, x))


def as_an_attribute(module: nn.Module, name: str) -> None:
    buffer = getattr(module, name)
    delattr(module, name)
    setattr(module, name, buffer)


def as_a_parameter(module: nn.Module, name: str) -> None:
    buffer = getattr(module, name)
    delattr(module, name)
    module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))


def as_parametrised(module: nn.Module, name: str) -> None:
    parametrize.register_parametrization(module, name, nn.Identity())


@pytest.mark.parametrize("name", [n for n, (make, _) in MODULES.items() if list(make().buffers())])
@pytest.mark.parametrize("move", (as_an_attribute, as_a_parameter, as_parametrised))
def test_running_statistics_that_are_no_buffers(name: str, move: Callable[[nn.Module, str], None]) -> None:
    """torch.nn takes them for what self.running_mean is."""
    module, x = module_and_input(name)
    names = list(dict(module.named_buffers()))
    moved = copy.deepcopy(module)
    for buffer in names:
        if move is not as_a_parameter or buffer != "num_batches_tracked":  # parameters are floating-point numbers
            move(moved, buffer)
    for training in (True, False, True):
        assert equal(run(moved.train(training), x), run(module.train(training), x))
        assert equal([getattr(moved, b) for b in names], [getattr(module, b) for b in names])


def test_without_num_batches_tracked() -> None:
    module, x = module_and_input("BatchNorm2d")
    without = copy.deepcopy(module)
    del without.num_batches_tracked
    without.num_batches_tracked = None
    assert equal(run(without, x), run(module, x)) and torch.equal(without.running_var, module.running_var)


def _strided(module: nn.Module) -> None:
    for name in ("running_mean", "running_var"):
        setattr(module, name, torch.stack(2 * [getattr(module, name)], dim=1)[:, 0])


BUFFERS: dict[str, Callable[[nn.Module], None]] = {
    "float": lambda m: m.load_state_dict({k: t.float() for k, t in m.state_dict().items()}, assign=True),
    "int32": lambda m: setattr(m, "num_batches_tracked", m.num_batches_tracked.int()),
    "strided": _strided,
}


@pytest.mark.parametrize("momentum", (0.1, None))
@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_that_no_kernel_updates(kind: str, momentum: float | None) -> None:
    """torch takes a count of any type, and statistics in any layout."""
    ours, torchs = (BatchNorm(6, momentum=momentum) for BatchNorm in (fastnorm.BatchNorm2d, nn.BatchNorm2d))
    x = torch.randn(SHAPES[2]) + 1
    for module in (ours, torchs):
        BUFFERS[kind](module)
    fastnorm.set_fallback("warn")
    with pytest.warns(fastnorm.FallbackWarning, match="no kernel"):
        y = ours(x)
    torch.testing.assert_close(y, torchs(x))
    fastnorm.set_fallback("silent")
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(ours, backend="aot_eager")(x), torchs(x))
    for got, wanted in zip(ours.buffers(), torchs.buffers(), strict=True):
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))


def test_weight_norm_on_a_norm() -> None:
    module = fastnorm.parametrizations.weight_norm(fastnorm.LayerNorm(5))
    x = torch.randn(3, 5)
    torch.testing.assert_close(module(x), fastnorm.LayerNorm(5)(x))
    module(x).sum().backward()
    assert module.parametrizations.weight.original1.grad is not None


@every_module
def test_other_types(name: str) -> None:
    module, x = module_and_input(name)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        other = copy.deepcopy(module).to(dtype)
        assert all(t.dtype == dtype for t in other.state_dict().values() if t.is_floating_point())
        assert run(other, x.to(dtype))[0].dtype == dtype


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@every_module
def test_torch_jit_script_is_told_what_to_use(name: str) -> None:
    module, _ = module_and_input(name)
    model = nn.Sequential(nn.Identity(), module)
    with pytest.raises(
        NotImplementedError, match=rf"^{type(module).__name__}: torch.jit.script cannot .* torch.compile"
    ):
        torch.jit.script(model)
    assert model[1] is module


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
@pytest.mark.parametrize(
    "module",
    (
        fastnorm.BatchNorm2d(4, activation="relu").eval(),
        fastnorm.LayerNorm(5),
        fastnorm.GroupNorm(2, 4, activation="gelu"),
        fastnorm.LocalResponseNorm(3, region="intra"),
        fastnorm.Dropout(1.0),
    ),
    ids=lambda m: type(m).__name__,
)
def test_torch_jit_trace_records_torchs_own_ops(module: nn.Module) -> None:
    traced = torch.jit.trace(module, torch.randn(2, 4, 5, 5))
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(traced(x), module(x))
    assert not any("Python" in node.kind() for node in traced.inlined_graph.nodes())
