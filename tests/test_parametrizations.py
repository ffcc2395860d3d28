"""weight_norm and spectral_norm as parametrizations: torch's numbers, state_dict and behaviour."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import reference
import torch
from test_ops import FLOATS, channels_last, error
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

import fastnorm
from fastnorm import _C
from fastnorm.parametrizations import spectral_norm, weight_norm

LAYERS = (
    lambda: nn.Linear(8, 8),
    lambda: nn.Linear(1, 3),
    lambda: nn.Linear(300, 130),
    lambda: nn.Conv1d(5, 7, 3),
    lambda: nn.Conv2d(6, 20, 3, groups=2),
    lambda: nn.ConvTranspose2d(6, 10, 3),
    lambda: nn.ConvTranspose3d(4, 3, 2),
    lambda: nn.Conv2d(9, 20, 3).to(memory_format=torch.channels_last),
)
NAMES = ["Linear", "column", "wide", "Conv1d", "groups", "ConvTranspose2d", "ConvTranspose3d", "channels_last"]
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=NAMES)
PAIRS = {"weight_norm": (weight_norm, torch_parametrizations.weight_norm)}
PAIRS["spectral_norm"] = (spectral_norm, torch_parametrizations.spectral_norm)
every_pair = pytest.mark.parametrize("name", PAIRS)


def relative(got: Tensor, wanted: Tensor) -> float:
    return error(got.detach(), wanted.detach().double())


def twins(name: str, layer: nn.Module, **setting: object) -> tuple[nn.Module, nn.Module]:
    """The layer with ours and with torch's, in the same state."""
    ours, theirs = (f(copy.deepcopy(layer), **setting) for f in PAIRS[name])
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@every_pair
@every_layer
def test_a_few_steps_as_torch(layer, name: str) -> None:
    for dim in (0, 1, None, -1):
        ours, theirs = twins(name, layer().double(), dim=dim)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert repr(ours) == repr(theirs)
        for training in (True, True, False, True):
            ours.train(training), theirs.train(training)
            a, b = ours.weight, theirs.weight
            dy = torch.randn_like(a)
            a.backward(dy), b.backward(dy)
            assert relative(a, b) < 1e-13
            with torch.no_grad():
                for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                    if q.grad is not None:  # a slice of one element has the gradient 0, but for rounding
                        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
                        p -= 0.1 * p.grad
                        q -= 0.1 * q.grad
                        p.grad = q.grad = None
            for t, s in zip(ours.buffers(), theirs.buffers(), strict=True):
                assert relative(t, s) < 1e-12
        theirs.load_state_dict(ours.state_dict())
        parametrize.remove_parametrizations(ours, "weight")
        parametrize.remove_parametrizations(theirs, "weight")
        assert type(ours) is type(layer()) and relative(ours.weight, theirs.weight) < 1e-12


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("iterations", (1, 3))
def test_power_method_against_float64(iterations: int, dtype: torch.dtype) -> None:
    """Shapes that split into one task and several, rows together and alone, one column."""
    for shape in ((1, 1), (5, 7), (3, 1), (1, 9), (130, 517), (700, 200), (9, 40000), (6, 3, 3, 3), (64, 20, 3, 3)):
        for layout in (lambda t: t, channels_last):
            generator = torch.Generator().manual_seed(sum(shape))
            weight = layout((torch.randn(shape, generator=generator) * 0.3).to(dtype))
            matrix = reference.as_matrix(weight.double(), 0)
            v = torch.nn.functional.normalize(torch.randn(matrix.shape[1], generator=generator), dim=0).to(dtype)
            u = torch.zeros(matrix.shape[0], dtype=dtype)
            wanted_u, wanted_v = reference.power_method(matrix, v.double(), iterations)
            wanted = reference.spectral_norm(weight.double(), wanted_u, wanted_v, 0)
            y, kept_u, kept_v, sigma = _C.spectral_norm_forward(weight, u, v, iterations, 0, 1e-12)
            # u and v carry the rounding of sums of float32, y one rounding to its type besides
            rounding = 16 * torch.finfo(dtype).eps
            assert relative(y, wanted) <= rounding and y.stride() == weight.stride()
            assert relative(u, wanted_u) <= rounding and relative(v, wanted_v) <= rounding
            kept = 1e-12 if dtype == torch.float64 else 1e-5
            assert relative(kept_u, wanted_u) < kept and relative(kept_v, wanted_v) < kept
            assert abs(sigma.item() / (wanted_u @ matrix @ wanted_v).item() - 1) < kept


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_spectral_gradient_of_one_row_whatever_its_stride(dtype: torch.dtype) -> None:
    """No element is a stride of a dimension of one away, so that torch lets it be any number."""
    layouts = ((1, 3), (5, 1), 0), ((1, 3), (0, 1), 0), ((4, 1), (1, 7), 1), ((2, 1, 5), (5, 100, 1), 1)
    for shape, strides, dim in layouts:
        weight = torch.randn(20).to(dtype).as_strided(shape, strides)
        assert weight.is_contiguous()
        u, v = (nn.functional.normalize(torch.randn(n), dim=0).to(dtype) for n in (1, weight.numel()))
        gradients = []
        for w in (weight, weight.clone(memory_format=torch.contiguous_format)):
            w = w.detach().requires_grad_()
            y = fastnorm.parametrizations.SpectralNormFunction.apply(w, u.clone(), v.clone(), 1, dim, 1e-12)
            gradients += torch.autograd.grad(y, w, torch.arange(1.0, 1 + w.numel()).to(dtype).view(shape))
        assert torch.equal(*gradients)


@pytest.mark.parametrize("scale", (1e-36, 1e-20, 1e-9, 1e9, 1e18, 1e30))
def test_scales_whose_squares_leave_float32(scale: float) -> None:
    weight = (torch.randn(40, 70, dtype=torch.float64) * scale).float()
    v = torch.nn.functional.normalize(torch.randn(70), dim=0)
    u, wanted_u, wanted_v = torch.zeros(40), *reference.power_method(weight.double(), v.double(), 2, 1e-45)
    y = _C.spectral_norm_forward(weight, u, v, 2, 0, 1e-45)[0]
    assert relative(y, reference.spectral_norm(weight.double(), wanted_u, wanted_v, 0)) < 1e-5
    for dim in (0, 1, -1):
        g = torch.ones([40, 1] if dim == 0 else [1, 70] if dim == 1 else [])
        wanted = reference.weight_norm(weight.double(), g.double(), None if dim == -1 else dim)
        assert relative(_C.weight_norm(weight, g, dim), wanted) < 1e-6


def test_power_method_is_the_same_for_any_number_of_threads() -> None:
    weight, v = torch.randn(700, 300), torch.nn.functional.normalize(torch.randn(300), dim=0)
    results = []
    for threads in (1, 2, 3, 32):
        torch.set_num_threads(threads)
        u, v_now = torch.zeros(700), v.clone()
        results.append([_C.spectral_norm_forward(weight, u, v_now, 2, 0, 1e-12)[0], u, v_now])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("width", [65520, 65528, 65536])
def test_scratch_memory_that_is_almost_full_full_or_too_small(width: int) -> None:
    """In eval mode 8 + width float64 numbers and an array of none: 65,536 numbers are all that a thread keeps."""
    weight, u = torch.randn(8, width), nn.functional.normalize(torch.randn(8), dim=0)
    v = nn.functional.normalize(weight.T @ u, dim=0)
    result = _C.spectral_norm_forward(weight, u, v, 0, 0, 1e-12)[0]
    torch.testing.assert_close(result, weight / (u @ weight @ v), rtol=1e-5, atol=1e-7)


def test_two_forwards_before_the_backward() -> None:
    """As a GAN does it: each backward sees the u and v of its own forward."""
    ours, theirs = twins("spectral_norm", nn.Linear(7, 9).double(), n_power_iterations=2)
    for module in (ours, theirs):
        first, second = module.weight, module.weight
        (first.square().sum() - 3 * second.pow(3).sum()).backward()
    grads = [m.parametrizations.weight.original.grad for m in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_no_power_iteration_in_eval_and_versions_count_updates() -> None:
    module = spectral_norm(nn.Linear(7, 9))
    buffers = list(module.buffers())
    before, versions = [t.clone() for t in buffers], [t._version for t in buffers]
    module.eval()
    assert torch.equal(module.weight, module.weight)
    assert all(torch.equal(t, old) for t, old in zip(buffers, before, strict=True))
    assert [t._version for t in buffers] == versions
    module.train()
    _ = module.weight
    assert all(t._version > old for t, old in zip(buffers, versions, strict=True))


@every_pair
def test_deepcopy_pickle_and_types(name: str) -> None:
    module = PAIRS[name][0](nn.Linear(5, 4))
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(module)  # as torch has it: parametrized classes are made at run time
    twin = copy.deepcopy(module).eval()
    assert torch.equal(twin.weight, module.eval().weight)
    for dtype in FLOATS:
        module.to(dtype)
        assert module.weight.dtype == dtype
        module(torch.ones(2, 5, dtype=dtype)).sum().backward()
        module.zero_grad()


@every_pair
def test_higher_derivatives_of_the_layer(name: str) -> None:
    module = PAIRS[name][0](nn.Conv1d(3, 4, 2).double()).eval()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    parameters = dict(module.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))
    assert torch.autograd.gradgradcheck(run, (x, *parameters.values()))


@every_pair
def test_zeros(name: str) -> None:
    """A slice of zeros, and a weight of zeros, as in torch: NaN in the same places."""
    for rows in ([0], slice(None)):
        for dim in (0, 1, None):
            layer = nn.Linear(6, 5)
            with torch.no_grad():
                layer.weight[rows] = 0
            ours, theirs = (f(copy.deepcopy(layer), dim=dim) for f in PAIRS[name])
            a, b = ours.weight, theirs.weight
            assert torch.equal(a.isnan(), b.isnan())
            a.sum().backward(), b.sum().backward()
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                if q.grad is not None:
                    assert torch.equal(p.grad.isnan(), q.grad.isnan())


def test_weight_norm_takes_the_older_names() -> None:
    with pytest.warns(FutureWarning):
        old = torch.nn.utils.weight_norm(nn.Linear(4, 3))
    module = nn.Sequential(weight_norm(nn.Linear(4, 3)))
    module.load_state_dict({f"0.{key}": value for key, value in old.state_dict().items()})
    old(torch.ones(1, 4))
    torch.testing.assert_close(module[0].weight, old.weight)


def test_weight_norm_frees_and_guards_what_it_saved() -> None:
    v, g = torch.randn(4, 3, requires_grad=True), torch.ones(4, 1, requires_grad=True)
    w = _C.weight_norm(v, g, 0)
    w.sum().backward()
    with pytest.raises(RuntimeError, match="a second time"):
        w.sum().backward()
    w = _C.weight_norm(v, g, 0)
    with torch.no_grad():
        v.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        w.sum().backward()


def test_weight_norm_of_float32_length_for_low_precision() -> None:
    v, g = torch.randn(5, 8).bfloat16().requires_grad_(), torch.rand(5, 1).requires_grad_()
    w = _C.weight_norm(v, g, 0)
    assert w.dtype == torch.bfloat16
    assert relative(w, reference.weight_norm(v.double(), g.double(), 0)) < torch.finfo(torch.bfloat16).eps
    w.float().square().sum().backward()
    assert g.grad.dtype == torch.float32 and v.grad.dtype == torch.bfloat16


@every_pair
def test_what_no_kernel_covers_goes_to_torch(name: str) -> None:
    fastnorm.set_fallback("warn")
    with pytest.warns(fastnorm.FallbackWarning, match=f"{name}: no kernel for (v|weight) on meta"):
        assert PAIRS[name][0](nn.Linear(5, 4, device="meta")).weight.is_meta
    fastnorm.set_fallback("silent")
    if name == "spectral_norm":  # torch has no weight_norm of complex numbers on a CPU
        ours, theirs = twins(name, nn.Linear(5, 4, dtype=torch.complex64))
        assert torch.equal(ours.weight, theirs.weight)
    module = PAIRS[name][0](nn.Linear(5, 4)).eval()
    parameters = dict(module.named_parameters())
    tangents = {key: torch.randn_like(p) for key, p in parameters.items()}

    def run(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, values, torch.ones(1, 5))

    value, derivative = torch.func.jvp(run, (parameters,), (tangents,))
    torch.testing.assert_close(value, module(torch.ones(1, 5)))
    assert derivative.shape == value.shape


def test_vectors() -> None:
    """A vector's spectral norm is its length; its weight norm over dim 0 has one length an element."""
    ours, theirs = (f(nn.LayerNorm(6)) for f in PAIRS["spectral_norm"])
    assert torch.equal(ours.weight, theirs.weight)
    ours, theirs = (f(nn.LayerNorm(6)) for f in PAIRS["weight_norm"])
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_hooks_that_change_the_strides_of_what_is_kept() -> None:
    layer = weight_norm(nn.Linear(6, 4))
    parameters = list(layer.parametrizations.weight.parameters())
    factor = torch.arange(24.0).view(4, 6)
    wanted = torch.autograd.grad((layer.weight * factor).sum(), parameters)
    every_other = torch.autograd.graph.saved_tensors_hooks(
        lambda t: torch.stack([t.detach()] * 2, -1), lambda t: t[..., 0]
    )
    with every_other:
        weight = layer.weight
    for got, w in zip(torch.autograd.grad((weight * factor).sum(), parameters), wanted, strict=True):
        assert torch.equal(got, w)


@pytest.mark.parametrize("parametrize", (weight_norm, spectral_norm))
@pytest.mark.parametrize(
    "weight",
    (
        torch.randn(6, 8).t(),
        torch.randn(8, 6, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.randn(8, 6, 4, 4).contiguous(memory_format=torch.channels_last)[:, :3],
        torch.randn(4, 8, 5).permute(1, 2, 0),
    ),
    ids=("transposed", "channels_last", "part", "permuted"),
)
def test_compiled_as_a_weight_lies(parametrize: Callable[..., nn.Module], weight: Tensor) -> None:
    """What the compiler is told of the output's strides is what the kernel makes of them."""
    layer = nn.Module()
    layer.weight = nn.Parameter(weight)
    layer.forward = lambda: layer.weight * 2
    parametrize(layer).eval()
    wanted = layer().detach()
    torch._dynamo.reset()
    compiled = torch.compile(lambda: layer.weight * 2, backend="inductor")
    torch.testing.assert_close(compiled(), wanted)


V, G = torch.ones(4, 3, 2), torch.ones(4, 1, 1)
U4, V6 = torch.ones(4), torch.ones(6)
WRONG = {
    "g's shape": (
        lambda: _C.weight_norm(V, torch.ones(4), 0),
        RuntimeError,
        r"g must have shape \[4, 1, 1\].*got \[4\]",
    ),
    "g of another dim": (lambda: _C.weight_norm(V, G, 1), RuntimeError, r"g must have shape \[1, 3, 1\]"),
    "g for the whole": (lambda: _C.weight_norm(V, G, -1), RuntimeError, r"\[1, 1, 1\] or \[\].*got \[4, 1, 1\]"),
    "g's type": (
        lambda: _C.weight_norm(V, G.half(), 0),
        RuntimeError,
        "g must be of v's type Float, got Half",
    ),
    "g's device": (lambda: _C.weight_norm(V, G.to("meta"), 0), RuntimeError, "weight_norm: g must be on cpu"),
    "dim": (lambda: weight_norm(nn.Linear(2, 3), dim=2), IndexError, "(?i)dim"),
    "dim, native": (lambda: _C.weight_norm(V, G, 3), IndexError, r"weight_norm: dim must be in \[-3, 2\].*got 3"),
    "integers": (
        lambda: _C.weight_norm(V.long(), G, 0),
        NotImplementedError,
        "weight_norm: no kernel for v of type Long",
    ),
    "no such parameter": (lambda: weight_norm(nn.ReLU()), (AttributeError, ValueError), "weight"),
    "spectral: no such parameter": (
        lambda: spectral_norm(nn.ReLU()),
        ValueError,
        "spectral_norm: ReLU has no",
    ),
    "spectral: dim": (lambda: spectral_norm(nn.Linear(2, 3), dim=2), IndexError, "(?i)dimension out of range"),
    "spectral: iterations": (
        lambda: spectral_norm(nn.Linear(2, 3), n_power_iterations=0),
        ValueError,
        "n_power_iterations",
    ),
    "u": (lambda: _C.spectral_norm_forward(V, V6, V6, 1, 0, 0.0), RuntimeError, r"u must have shape \[4\].*got \[6\]"),
    "v": (lambda: _C.spectral_norm_forward(V, U4, U4, 1, 0, 0.0), RuntimeError, r"v must have shape \[6\].*got \[4\]"),
    "u's type": (
        lambda: _C.spectral_norm_forward(V, U4.double(), V6, 1, 0, 0.0),
        RuntimeError,
        "u must be of type Float.*got Double",
    ),
    "v strided": (
        lambda: _C.spectral_norm_forward(V, U4, torch.ones(12)[::2], 1, 0, 0.0),
        RuntimeError,
        "v must be contiguous",
    ),
    "vector": (lambda: _C.spectral_norm_forward(U4, U4, U4, 1, 0, 0.0), RuntimeError, "at least 2 dimensions, got 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_message(name: str) -> None:
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()
    assert torch.equal(U4, torch.ones(4)) and torch.equal(V6, torch.ones(6))


def test_sparse_gradient_of_spectral_norm() -> None:
    torch.manual_seed(0)
    gradients = []
    embedding = torch.nn.Embedding(5, 4)
    for module, sparse in ((fastnorm.parametrizations, True), (torch.nn.utils.parametrizations, False)):
        layer = torch.nn.Embedding(5, 4, sparse=sparse, _weight=embedding.weight.detach().clone())
        layer.weight.requires_grad_()
        torch.manual_seed(1)
        layer = module.spectral_norm(layer)
        layer(torch.tensor([1, 2, 1])).square().sum().backward()
        gradients.append(layer.parametrizations.weight.original.grad)
    torch.testing.assert_close(*gradients)
