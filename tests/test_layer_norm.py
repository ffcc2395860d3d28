"""What only LayerNorm and RMSNorm have: module behaviour, eps, mixed types, long rows, and exact figures."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import reference
import torch
from test_ops import differentiate, error
from torch import nn
from torch_path import by_torch

import fastnorm
import fastnorm.functional as fn

LOW = (torch.bfloat16, torch.float16)
PAIRS = ((fastnorm.LayerNorm, nn.LayerNorm), (fastnorm.RMSNorm, nn.RMSNorm))
every_module = pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["LayerNorm", "RMSNorm"])


def sample(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 1.0, std: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean).to(dtype)


@pytest.mark.parametrize("setting", [{}, {"eps": 1e-2}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("shape", [12, (12,), [3, 4], torch.Size([2, 3, 4])], ids=str)
@every_module
def test_module_as_torch(ours: type, theirs: type, shape: object, setting: dict) -> None:
    a, b = ours(shape, **setting), theirs(shape, **setting)
    assert repr(a) == repr(b) and isinstance(a, theirs)
    for parameter in b.parameters():
        nn.init.normal_(parameter)
    a.load_state_dict(b.state_dict())
    assert a.state_dict().keys() == b.state_dict().keys()
    x = sample(5, *a.normalized_shape)
    torch.testing.assert_close(a(x), b(x))
    torch.testing.assert_close(copy.deepcopy(a)(x), b(x))


@every_module
def test_a_shape_of_numpy_s_integers(ours: type, theirs: type) -> None:
    """As np.prod(shape) gives them."""
    for shape in (np.prod([3, 4]), [np.int64(3), np.int32(4)]):
        a, b = ours(shape), theirs(shape)
        x = sample(5, *map(int, a.normalized_shape)).requires_grad_()
        torch.testing.assert_close(a(x), b(x))
        a(x).square().sum().backward()


def test_layer_norm_without_bias_and_rms_norm_of_torch_s_default_eps() -> None:
    x = sample(4, 9) * 1e-4  # eps matters
    torch.testing.assert_close(fastnorm.LayerNorm(9, bias=False)(x), nn.LayerNorm(9, bias=False)(x))
    for dtype in (torch.float64, torch.float32, *LOW):
        small = x.to(dtype)
        torch.testing.assert_close(fn.rms_norm(small, (9,)), nn.functional.rms_norm(small, (9,)))


@every_module
def test_repr_and_residual(ours: type, theirs: type) -> None:
    norm, x, z = ours(8, activation="silu"), sample(3, 8), sample(8, 3).view(3, 8)
    assert repr(norm).endswith("activation='silu')")
    torch.testing.assert_close(norm(x, z), nn.functional.silu(theirs(8)(x) + z))
    torch.testing.assert_close(norm(x, residual=z), norm(x, z))


@every_module
def test_a_parametrised_weight_is_used(ours: type, theirs: type) -> None:
    norm = ours(6)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    x = sample(4, 6)
    torch.testing.assert_close(norm(x), theirs(6)(x) * norm.weight)


@pytest.mark.parametrize("value", (0.0, 3.0, 1e6, 0.1, -7e-3, 65504.0))
@pytest.mark.parametrize("length", (1, 7, 64, 1000, 5000))
def test_a_constant_row_gives_the_bias_exactly(length: int, value: float) -> None:
    bias = sample(length)
    for dtype in (torch.float64, torch.float32, *LOW):
        x = torch.full((5, length), min(value, torch.finfo(dtype).max), dtype=dtype)
        y = fn.layer_norm(x, (length,), torch.ones(length, dtype=dtype), bias.to(dtype))
        assert torch.equal(y, bias.to(dtype).expand(5, -1))


def test_rows_of_one_element() -> None:
    x = sample(6, 1).requires_grad_()
    weight, bias = torch.tensor([2.0], requires_grad=True), torch.tensor([0.5])
    y = fn.layer_norm(x, (1,), weight, bias)
    y.sum().backward()
    assert torch.equal(y, torch.full((6, 1), 0.5)) and not x.grad.any() and not weight.grad.any()
    torch.testing.assert_close(fn.rms_norm(x, (1,)), x.sign())


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", ("layer_norm", "rms_norm"))
def test_float32_parameters_of_low_precision_input(name: str, dtype: torch.dtype) -> None:
    x, weight, bias, z = (
        sample(40, 70, dtype=dtype),
        sample(70),
        sample(70, std=1.0),
        sample(70, 40, dtype=dtype).view(40, 70),
    )
    layer = name == "layer_norm"
    tensors = [x, weight, bias, z] if layer else [x, weight, z]
    dy = sample(40, 70, dtype=dtype, mean=0.0)

    def run(x, weight, *rest):
        parameters = (weight, rest[0]) if layer else (weight,)
        return getattr(fn, name)(x, (70,), *parameters, 1e-5, residual=rest[-1], activation="relu")

    def run_reference(x, weight, *rest):
        return reference.row_norm(x, 1, weight, rest[0] if layer else None, rest[-1], subtract_mean=layer, act="relu")

    y, grads = differentiate(run, tensors, dy)
    wanted_y, wanted = differentiate(run_reference, [t.double() for t in tensors], dy.double())
    assert error(y, wanted_y) <= torch.finfo(dtype).eps
    for g, t, w in zip(grads, tensors, wanted, strict=True):
        # the parameters' gradients are float32 sums of exact products: their rounding is float32's
        assert g.dtype == t.dtype and error(g, w) <= (torch.finfo(dtype).eps if t.dtype == dtype else 1e-5)


@pytest.mark.parametrize("mean", (0.0, 1e3, 1e6))
@pytest.mark.parametrize("shape", ((1, 70001), (3, 40000), (70, 33000), (65, 5000), (130, 768)), ids=str)
def test_long_rows_are_no_less_exact_than_torch_s(shape: tuple[int, int], mean: float) -> None:
    N = shape[1]
    tensors = [sample(*shape, mean=mean, std=1.0), sample(N), sample(N, mean=0.0)]
    dy = sample(*shape, mean=0.0).flip(-1)
    results = []
    for function, cast in (
        (lambda x, w, b: fn.layer_norm(x, (N,), w, b), torch.float32),
        (lambda x, w, b: nn.functional.layer_norm(x, (N,), w, b), torch.float32),
        (lambda x, w, b: reference.row_norm(x, 1, w, b), torch.float64),
    ):
        y, grads = differentiate(function, [t.to(cast) for t in tensors], dy.to(cast))
        results.append([y, *grads])
    for ours, theirs, wanted in zip(*results, strict=True):
        assert error(ours, wanted) <= max(error(theirs, wanted), 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("shape", ((3, 40000), (70, 33000), (200, 515), (9, 4000)), ids=str)
def test_same_bits_for_any_number_of_threads_in_every_partition(shape: tuple[int, int]) -> None:
    N = shape[1]
    tensors, dy = [sample(*shape), sample(N), sample(N, mean=0.0)], sample(*shape).flip(-1)
    for name in ("layer_norm", "rms_norm"):
        function = getattr(fn, name)
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            given = tensors if name == "layer_norm" else tensors[:2]
            y, grads = differentiate(lambda x, *p, f=function: f(x, (N,), *p), given, dy)
            results.append([y, *grads])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ("layer_norm", "rms_norm"))
def test_a_row_does_not_depend_on_the_rows_around_it(name: str) -> None:
    function = getattr(fn, name)
    for N in (5, 100, 1000, 5000):
        x = sample(11, N)
        alone = torch.cat([function(row, (N,)) for row in x.split(1)])
        assert torch.equal(function(x, (N,)), alone)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("N", (1030, 2055, 4099))
def test_rows_that_begin_anywhere_within_a_cache_line(N: int, dtype: torch.dtype) -> None:
    """Where they are written past the caches, their packs begin at any column: for the sanitizers, see sanitize.py."""
    x, weight, bias = sample(9, N).to(dtype), sample(N).to(dtype), sample(N).to(dtype)
    for w, b in ((weight, bias), (weight.float(), bias.float()), (None, bias), (None, None)):
        y = fn.layer_norm(x, (N,), w, b)
        wanted = nn.functional.layer_norm(x.double(), (N,), *(None if t is None else t.double() for t in (w, b)))
        assert error(y, wanted) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ("layer_norm", "rms_norm"))
def test_scales_far_from_one(name: str) -> None:
    """Squares that leave float32's range, above and below."""
    for scale in (1e-30, 1e30):
        x = sample(6, 50, dtype=torch.float64) * scale
        y = getattr(fn, name)(x.float(), (50,), eps=0.0)
        wanted = reference.row_norm(x.float().double(), 1, subtract_mean=name == "layer_norm", eps=0.0)
        assert error(y, wanted) <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", ("layer_norm", "rms_norm"))
def test_a_nan_or_inf_stays_in_its_row(name: str) -> None:
    for bad in (float("nan"), float("inf")):
        x = sample(9, 40)
        clean = getattr(fn, name)(x, (40,))
        x[4, 7] = bad
        y = getattr(fn, name)(x, (40,))
        assert y[4].isnan().any() and torch.equal(y[torch.arange(9) != 4], clean[torch.arange(9) != 4])
        assert torch.equal(y.isnan(), getattr(nn.functional, name)(x, (40,)).isnan())


def test_fallback_keeps_every_keyword() -> None:
    fastnorm.set_fallback("silent")
    x, z = sample(4, 16), sample(16, 4).view(4, 16)
    for module in (fastnorm.LayerNorm, fastnorm.RMSNorm):
        norm = module(16, activation="gelu")
        torch.testing.assert_close(by_torch(norm, x, z), norm(x, z))
    weight = torch.ones(16).double()
    torch.testing.assert_close(fn.rms_norm(x, (16,), weight), nn.functional.rms_norm(x, (16,), weight))


@pytest.mark.parametrize("activation", ("gelu", "silu"))
@pytest.mark.parametrize("shape", [(70, 100), (130, 4100)], ids=str)
def test_smooth_activation_in_backward(shape: tuple[int, int], activation: str) -> None:
    """dz is kept from the sums' sweep for the one that writes dx, also in rows that are summed in several chunks."""
    x, dy = sample(*shape), sample(*shape, mean=0.0, std=1.0)
    weight, bias = (sample(shape[1], mean=m, std=0.5) for m in (1.0, 0.0))

    def gradients(layer_norm: object, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        x, weight, bias = (t.clone().requires_grad_() for t in inputs)
        return torch.autograd.grad(layer_norm(x, (shape[1],), weight, bias), (x, weight, bias), dy.to(x.dtype))

    got = gradients(lambda *args: fn.layer_norm(*args, activation=activation), [x, weight, bias])
    act = getattr(nn.functional, activation)
    wanted = gradients(lambda *args: act(nn.functional.layer_norm(*args)), [t.double() for t in (x, weight, bias)])
    for a, b in zip(got, wanted, strict=True):
        # float32's rounding, and in the parameters' sums over rows that of each term; 7.5e-8 is Phi's own error
        assert (a.double() - b).norm() <= 1e-6 * b.norm()


def test_gelu_keeps_its_left_tail() -> None:
    """1 + erf cancels there, and from z = -5.5 on gives 0 in float32."""
    z = torch.tensor([[-3.0, -4.0, -5.0, -6.0, -8.0]])
    y = fn.batch_norm(z, torch.zeros(5), torch.ones(5), eps=0.0, activation="gelu")
    torch.testing.assert_close(y.double(), nn.functional.gelu(z.double()), rtol=0.05, atol=0.0)
