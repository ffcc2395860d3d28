"""What only BatchNorm has: running statistics, module behaviour, and figures that must be exact."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import reference
import torch
from test_ops import channels_last
from torch import Tensor, nn

import fastnorm
import fastnorm.functional as fn

RANKS = (
    (fastnorm.BatchNorm1d, nn.BatchNorm1d, (6, 5)),
    (fastnorm.BatchNorm1d, nn.BatchNorm1d, (6, 5, 9)),
    (fastnorm.BatchNorm2d, nn.BatchNorm2d, (6, 5, 9, 4)),
    (fastnorm.BatchNorm3d, nn.BatchNorm3d, (3, 5, 2, 3, 4)),
)
every_rank = pytest.mark.parametrize(("ours", "theirs", "shape"), RANKS, ids=["1d-2", "1d-3", "2d", "3d"])


def batches(shape: tuple[int, ...], count: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    return [torch.randn(shape, generator=generator).to(dtype) * 2 + 1 for _ in range(count)]


@pytest.mark.parametrize("setting", [{}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-3}, {"affine": False},
                                     {"track_running_stats": False}])  # fmt: skip
@every_rank
def test_a_few_steps_then_eval_as_torch(ours: type, theirs: type, shape: tuple[int, ...], setting: dict) -> None:
    a, b = ours(shape[1], **setting), theirs(shape[1], **setting)
    for x in batches(shape):
        torch.testing.assert_close(a(x), b(x))
    assert a.state_dict().keys() == b.state_dict().keys()
    for key, value in b.state_dict().items():
        torch.testing.assert_close(a.state_dict()[key], value)
    a.eval(), b.eval()
    torch.testing.assert_close(a(x), b(x))


@pytest.mark.parametrize("gone", (["num_batches_tracked"], ["running_mean", "running_var"]), ids=str)
@pytest.mark.parametrize("momentum", (0.3, None), ids=str)
@every_rank
def test_buffers_that_are_none(
    ours: type, theirs: type, shape: tuple[int, ...], momentum: float | None, gone: list[str]
) -> None:
    """Not counted, the running statistics of momentum=None stay as they are."""
    a, b = ours(shape[1], momentum=momentum), theirs(shape[1], momentum=momentum)
    for norm in (a, b):
        for name in gone:
            setattr(norm, name, None)
    for training in (True, True, False):
        a.train(training), b.train(training)
        for x in batches(shape):
            torch.testing.assert_close(a(x), b(x))
    assert a.state_dict().keys() == b.state_dict().keys()
    for key, value in b.state_dict().items():
        torch.testing.assert_close(a.state_dict()[key], value)


@pytest.mark.parametrize("layout", (lambda t: t, channels_last), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_running_statistics_against_float64(dtype: torch.dtype, layout) -> None:
    for shape in ((4, 3, 5, 7), (3, 70, 2, 2), (2, 5, 60, 70)):
        norm = fastnorm.BatchNorm2d(shape[1], dtype=dtype)
        mean, var = torch.zeros(shape[1], dtype=torch.float64), torch.ones(shape[1], dtype=torch.float64)
        for x in batches(shape, dtype=dtype):
            norm(layout(x))
            mean, var = reference.running_statistics(x.double(), mean, var, 0.1)
        # one rounding to dtype a step
        tolerance = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-13
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(norm.running_var.double(), var, rtol=tolerance, atol=tolerance)
        assert norm.num_batches_tracked == 3


def test_running_statistics_tell_autograd_that_they_changed() -> None:
    norm = fastnorm.BatchNorm2d(3)
    versions = [t._version for t in norm.buffers()]
    norm(torch.randn(2, 3, 4, 4))
    assert all(t._version > v for t, v in zip(norm.buffers(), versions, strict=True))
    with torch.inference_mode():
        fastnorm.BatchNorm2d(3)(torch.randn(2, 3, 4, 4))  # inference tensors have no version


def test_state_dict_both_ways_and_repr() -> None:
    a, b = fastnorm.BatchNorm2d(7), nn.BatchNorm2d(7)
    a(torch.randn(4, 7, 3, 3))
    b.load_state_dict(a.state_dict())
    a.load_state_dict(b.state_dict())
    assert repr(a) == repr(b)
    assert repr(fastnorm.BatchNorm2d(7, activation="relu")).endswith("activation='relu')")
    assert isinstance(a, nn.BatchNorm2d)


def test_bias_false() -> None:
    norm = fastnorm.BatchNorm2d(3, bias=False)
    assert norm.bias is None and list(norm.state_dict()) == [
        "weight",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    ]
    norm.reset_parameters()
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    expected = reference.batch_norm(x.double(), norm.weight.double())
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-6)
    norm(x).square().sum().backward()
    assert norm.weight.grad is not None


def test_deepcopy_and_pickle() -> None:
    norm = fastnorm.BatchNorm2d(3, activation="silu", skip_nonfinite_stats=True)
    x = torch.randn(4, 3, 5, 5)
    norm(x)
    norm.eval()
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(twin(x), norm(x)) and repr(twin) == repr(norm)


def test_constant_channel_gives_exactly_beta() -> None:
    for value in (0.0, 0.1, -3.7, 1e-20, 3e4, 1e30):
        for shape in ((4, 3, 7, 7), (2, 3, 80, 90), (40, 3, 2, 1), (64, 3)):
            for layout in (lambda t: t, channels_last):
                x = layout(torch.full(shape, value))
                bias = torch.tensor([0.3, -1e-3, 7.0])
                y = fn.batch_norm(x, None, None, torch.tensor([2.0, 1.0, 0.5]), bias, True)
                assert torch.equal(y, bias.view([1, 3] + [1] * (len(shape) - 2)).expand(shape)), (value, shape)


@pytest.mark.parametrize("scale", (1e-30, 1e-18, 1e18, 1e30))
def test_scales_whose_squares_leave_float32(scale: float) -> None:
    """eps next to 0 where the scale is small, so that the variance alone decides."""
    for shape in ((4, 3, 9, 9), (8, 70, 2, 2)):
        x = (torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale).float()
        eps = 1e-300 if scale < 1 else 1e-5
        y = fn.batch_norm(x, None, None, training=True, eps=eps)
        torch.testing.assert_close(y.double(), reference.batch_norm(x.double(), eps=eps), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eps", (0, 0.0, -1e-5, float("nan")))
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
def test_eps_is_refused_where_torch_refuses_it(eps: float, training: bool) -> None:
    x, refused = torch.randn(4, 3), []
    for kind in (nn.BatchNorm1d, fastnorm.BatchNorm1d):
        try:
            kind(3, eps=eps).train(training)(x)
            refused.append(False)
        except ValueError as error:
            refused.append("eps" in str(error))
    by_torch, by_fastnorm = refused
    assert by_fastnorm == (eps < 0 or (eps == 0 and training))
    assert by_torch == (by_fastnorm or (eps == 0 and torch.__version__ < "2.12"))  # before, 0 in eval mode, too


def test_nan_and_inf_are_placed_as_by_torch() -> None:
    for poison in (float("nan"), float("inf"), -float("inf")):
        for layout in (lambda t: t, channels_last):
            for activation in (None, "relu", "leaky_relu", "silu", "gelu"):
                if activation == "gelu" and not math.isnan(poison):
                    continue  # torch's own gives NaN at +inf on a CPU, where its limit is inf
                x = torch.randn(4, 3, 7, 7)
                x[1, 2, 3, 4] = poison
                for training in (True, False):
                    statistics = (None, None) if training else (torch.zeros(3), torch.ones(3))
                    ours, theirs = (layout(x).clone().requires_grad_() for _ in range(2))
                    y = fn.batch_norm(ours, *statistics, training=training, activation=activation)
                    z = nn.functional.batch_norm(theirs, *statistics, training=training)
                    z = z if activation is None else getattr(nn.functional, activation)(z)
                    assert torch.equal(y.isnan(), z.isnan()) and torch.equal(y.isinf(), z.isinf())
                    y.backward(torch.ones_like(y))
                    z.backward(torch.ones_like(z))
                    assert torch.equal(ours.grad.isnan(), theirs.grad.isnan())


@pytest.mark.parametrize("activation", ("silu", "gelu"))
def test_smooth_activations_of_any_argument_against_float64(activation: str) -> None:
    """Also where their exponential leaves float32's range, and far beyond."""
    z = torch.cat([torch.linspace(-130, 130, 20001), torch.tensor([1e-40, 0.0, 2.0**18, 2.0**21, 1e18, 3e38])])
    z = torch.cat([z, -z])

    def both(norm: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        y = norm(x.requires_grad_())
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    zero, one = torch.zeros(1), torch.ones(1)
    got = both(lambda x: fn.batch_norm(x, zero, one, eps=0.0, activation=activation), z.view(-1, 1).clone())
    exact = both(getattr(nn.functional, activation), z.double().view(-1, 1))
    for value, wanted in zip(got, exact, strict=True):
        error = (value.double() - wanted).abs() / (1 + wanted.abs())
        assert error.max() < 6e-7, z[error.argmax()]
    # Silu on the left is x * exp(x): it keeps its digits while they are normal numbers.
    if activation == "silu":
        left = (z < 0) & (z > -80)
        torch.testing.assert_close(got[0][left].double(), exact[0][left], rtol=4e-7, atol=0.0)


@pytest.mark.parametrize("activation", (None, "relu", "gelu"))
@pytest.mark.parametrize("shape", ((20, 64, 30, 30), (5, 64, 40, 40), (3, 24, 90, 90)), ids=str)
def test_backward_of_several_chunks_against_float64(shape: tuple[int, ...], activation: str | None) -> None:
    """Chunks of several planes, of two and one, and planes of two chunks, in which backward may go from the last."""
    generator = torch.Generator().manual_seed(0)
    x, residual, dy = (torch.randn(shape, generator=generator) for _ in range(3))
    weight, bias = (torch.randn(shape[1], generator=generator) for _ in range(2))

    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    y = fn.batch_norm(leaves[0], None, None, *leaves[1:3], training=True, residual=leaves[3], activation=activation)
    got = torch.autograd.grad(y, leaves, dy)
    exact = [t.double().requires_grad_() for t in (x, weight, bias, residual)]
    wanted = torch.autograd.grad(reference.batch_norm(*exact, act=activation), exact, dy.double())
    for a, b in zip(got, wanted, strict=True):
        wrong = (a - b).abs() > 1e-5 * b.abs().max()
        assert wrong.sum() <= 3  # where z is 0 but for a rounding, ReLU's derivative may be either


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    ("activation", "with_residual"),
    ((None, False), (None, True), ("relu", False), ("relu", True), ("gelu", False)),
    ids=("none", "residual", "relu", "residual-relu", "gelu"),
)
@pytest.mark.parametrize(
    "shape",
    ((9, 300, 7, 7), (17, 256, 7, 7), (20, 64, 14, 14), (12, 100, 9, 9), (8, 40, 5, 5), (9, 24, 23, 23)),
    ids=str,
)
def test_short_planes_against_float64(
    shape: tuple[int, ...], activation: str | None, with_residual: bool, dtype: torch.dtype
) -> None:
    """Neighbouring planes as one run of each sample: whole cache lines or not, and a last bundle of fewer channels.

    Planes of 23x23 go one by one, past the caches from a cache line on, which lies elsewhere in each.
    """
    generator = torch.Generator().manual_seed(0)
    x, residual, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(shape[1], generator=generator) for _ in range(2))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2

    def close(got: Tensor, wanted: Tensor) -> None:
        wrong = (got - wanted).abs() > tolerance * wanted.abs().max()
        assert wrong.sum() <= 3  # where z is 0 but for a rounding, ReLU's derivative may be either

    tensors = (x, weight, bias, residual) if with_residual else (x, weight, bias)
    leaves = [t.clone().requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    more = {"residual": leaves[3]} if with_residual else {}
    y = fn.batch_norm(leaves[0], None, None, *leaves[1:3], training=True, activation=activation, **more)
    wanted = reference.batch_norm(*exact, act=activation)
    close(y, wanted)
    for pair in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(wanted, exact, dy.double()), strict=True):
        close(*pair)

    mean, var = torch.randn(shape[1], generator=generator), torch.rand(shape[1], generator=generator) + 0.5
    more = {"residual": residual} if with_residual else {}
    y = fn.batch_norm(x, mean, var, weight, bias, training=False, activation=activation, **more)
    close(y, reference.batch_norm(*(t.double() for t in tensors), statistics=(mean, var), act=activation))


@pytest.mark.parametrize("momentum", (0.1, None))
def test_an_overflowed_batch_leaves_the_statistics_alone(momentum: float | None) -> None:
    norm = fastnorm.BatchNorm2d(3, momentum=momentum, skip_nonfinite_stats=True)
    good, bad = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    bad[0, 1, 2, 3] = float("inf")
    norm(good)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    for layout in (lambda t: t, channels_last):
        assert norm(layout(bad))[:, 1].isnan().all()
        for key, value in before.items():
            assert torch.equal(norm.state_dict()[key], value)
    norm(good)
    assert norm.num_batches_tracked == 2 and norm.running_var.isfinite().all()
    careless = fastnorm.BatchNorm2d(3)
    careless(bad)
    assert not careless.running_var.isfinite().all()


@pytest.mark.parametrize("momentum", (0.1, None))
@pytest.mark.parametrize(
    "dtype, stats_dtype, std",
    ((torch.float32, torch.float32, 1e20), (torch.bfloat16, torch.float32, 1e20), (torch.float16, torch.float16, 1e3)),
    ids=str,
)
def test_statistics_that_their_type_does_not_hold_are_not_finite(
    dtype: torch.dtype, stats_dtype: torch.dtype, std: float, momentum: float | None
) -> None:
    """A variance that is finite in float64, in which it is computed."""
    norm = fastnorm.BatchNorm2d(3, momentum=momentum, affine=False, skip_nonfinite_stats=True).to(stats_dtype)
    x = torch.randn(8, 3, 5, 5)
    norm(x.to(dtype))
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    large = x.clone()
    large[:, 1] *= std
    norm(large.to(dtype))
    for key, value in before.items():
        assert torch.equal(norm.state_dict()[key], value)
    norm(x.to(dtype))
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_low_precision_input_with_float32_parameters(dtype: torch.dtype) -> None:
    norm, theirs = fastnorm.BatchNorm2d(5), nn.BatchNorm2d(5)
    x = torch.randn(4, 5, 6, 6).to(dtype)
    y, z = norm(x), theirs(x)
    assert y.dtype == z.dtype == dtype and norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(y, z, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(norm.running_var, theirs.running_var, rtol=1e-5, atol=1e-6)
    y.sum().backward()
    assert norm.weight.grad.dtype == torch.float32


def test_empty_batch_is_counted_but_teaches_nothing() -> None:
    for module in (fastnorm.BatchNorm2d(3), nn.BatchNorm2d(3)):
        assert module(torch.zeros(0, 3, 4, 4)).shape == (0, 3, 4, 4)
        assert module.num_batches_tracked == 1 and torch.equal(module.running_var, torch.ones(3))


def test_residual_may_have_another_layout_and_its_own_gradient() -> None:
    x, r = torch.randn(2, 5, 6, 6), torch.randn(2, 5, 6, 6)
    for activation in (None, "relu", "gelu"):
        norm = fastnorm.BatchNorm2d(5, activation=activation)
        results = []
        for layout in (lambda t: t, channels_last):
            a, b = x.clone().requires_grad_(), layout(r).clone().requires_grad_()
            y = norm(a, b)
            y.square().sum().backward()
            results.append((y, a.grad, b.grad))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("activation", (None, "relu", "silu", "gelu"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", ((6, 40, 70, 70), (130, 40, 5, 7)), ids=str)
def test_more_channels_than_threads_and_fewer_give_the_same_bits(
    shape: tuple[int, ...], dtype: torch.dtype, activation: str | None
) -> None:
    """Two ways of sharing the work, the same sums: a channel is reduced in the same order whoever does it. In one of
    them alone backward keeps what an exponential gave."""
    x, dy = torch.randn(2, *shape, dtype=dtype).unbind(0)
    weight, bias = torch.randn(2, shape[1], dtype=dtype).unbind(0)
    results = []
    for threads in (1, 32):  # a task one channel or some; 40 channels are too few for 32 threads
        torch.set_num_threads(threads)
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = fn.batch_norm(leaves[0], None, None, *leaves[1:], training=True, activation=activation)
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_module_without_buffers_in_eval_uses_the_batch() -> None:
    norm = fastnorm.BatchNorm2d(3, track_running_stats=False).eval()
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(norm(x).double(), reference.batch_norm(x.double()), rtol=1e-5, atol=1e-6)


def test_parametrised_weight() -> None:
    class Positive(nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            return v.exp()

    norm = fastnorm.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(norm, "weight", Positive())
    x = torch.randn(4, 3, 5, 5)
    norm(x).sum().backward()
    expected = reference.batch_norm(x.double(), torch.full((3,), torch.e, dtype=torch.float64))
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert norm.parametrizations.weight.original.grad is not None


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_16_bit_types_are_read_and_rounded_as_torchs(dtype: torch.dtype) -> None:
    """Every number, and every float32 between two of them and next to it: ties to even, subnormal numbers, overflow."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)

    def scaled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x * weight in float32, rounded to x's type."""
        channels = weight.numel()
        return fn.batch_norm(x.view(1, -1), torch.zeros(channels), torch.ones(channels), weight, eps=0.0)[0]

    torch.testing.assert_close(scaled(every, torch.ones(2**16)), every, rtol=0, atol=0, equal_nan=True)
    finite = every.float()[every.isfinite()].sort().values
    middle = (finite[1:].double() + finite[:-1].double()).div(2).float()
    beyond = torch.tensor([65519.0, 65520.0, 65521.0, 1e30, 3.4e38, math.inf, math.nan])
    infinity = torch.tensor(math.inf)
    weight = torch.cat([finite, middle, middle.nextafter(infinity), middle.nextafter(-infinity), beyond, -beyond])
    rounded = scaled(torch.ones(weight.numel(), dtype=dtype), weight)
    torch.testing.assert_close(rounded, weight.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["BatchNorm1d", "InstanceNorm1d"])
def test_an_input_that_cannot_be_kept_leaves_the_statistics(name: str) -> None:
    norm = getattr(fastnorm, name)(3, affine=True, track_running_stats=True)
    with torch.inference_mode():
        x = torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        norm(x)
    assert not norm.running_mean.any() and (norm.running_var == 1).all()
