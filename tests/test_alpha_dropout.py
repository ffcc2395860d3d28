"""Alpha dropout, by element and by channel: its statistics, its mask, and what torch does at the edges."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from reference import dropout_keep
from torch import Tensor, nn

import fastnorm
import fastnorm.functional as fn
from fastnorm import _C

# Five standard deviations of an estimate: a correct op fails one seed in two million, and the seeds here are fixed.
SIGMAS = 5
FUNCTIONS = pytest.mark.parametrize("function", (fn.alpha_dropout, fn.feature_alpha_dropout), ids=lambda f: f.__name__)


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dropped(function, x: Tensor, p: float) -> Tensor:
    """Which elements of x, finite and far from alpha', were replaced."""
    return function(torch.full_like(x, 4.0), p, True, generator=generator()) < 0


@pytest.mark.parametrize("p", (0.05, 0.3, 0.9))
def test_mean_and_variance_of_a_standard_normal_input_stay(p: float) -> None:
    x = torch.randn(1 << 21, generator=generator(1))
    y = fn.alpha_dropout(x, p, True, generator=generator()).double()
    kurtosis = (y**4).mean().item()  # of a variable with mean 0 and variance 1
    assert abs(y.mean().item()) < SIGMAS / math.sqrt(y.numel())
    assert abs(y.var().item() - 1) < SIGMAS * math.sqrt((kurtosis - 1) / y.numel())


@pytest.mark.parametrize("p", (0.001, 0.3, 0.5, 0.9))
def test_rate_of_dropping(p: float) -> None:
    for function, x in ((fn.alpha_dropout, torch.ones(1 << 20)), (fn.feature_alpha_dropout, torch.ones(512, 512, 2))):
        mask = dropped(function, x, p)
        mask = mask[..., 0] if x.dim() == 3 else mask
        spread = math.sqrt(mask.numel() * p * (1 - p))
        # p is drawn as a multiple of 2^-16, half of one away at most
        assert abs(mask.sum().item() - mask.numel() * p) < SIGMAS * spread + mask.numel() * 2**-17


@pytest.mark.parametrize("p", (0.25, 0.5, 0.75))  # multiples of 2^-16, so that nothing is rounded
def test_the_two_values_are_those_of_torch(p: float) -> None:
    x = torch.full((4096,), 0.7, dtype=torch.float64)
    ours, theirs = (f(x, p, True).unique() for f in (fn.alpha_dropout, F.alpha_dropout))
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)


def test_mask_is_that_of_dropout_for_any_type_layout_and_number_of_threads() -> None:
    shape = (8, 24, 17, 19)
    seed = int(_C.dropout_state(generator(), torch.empty(0))[0]) & (2**64 - 1)
    wanted = ~dropout_keep(math.prod(shape), 0.3, seed).view(shape)
    assert torch.equal(fn.dropout(torch.ones(shape), 0.3, generator=generator()) == 0, wanted)
    channels = ~dropout_keep(8 * 24, 0.3, seed).view(8, 24, 1, 1).expand(shape)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x = torch.empty(shape, dtype=dtype, memory_format=memory_format)
                assert torch.equal(dropped(fn.alpha_dropout, x, 0.3), wanted)
                assert torch.equal(dropped(fn.feature_alpha_dropout, x, 0.3), channels)


def test_number_of_channels_per_draw() -> None:
    """A draw of 64 bits begins at a whole block of eight: every remainder of n * C by 8, and C beyond one draw."""
    for C in (1, 3, 7, 55, 56, 57, 64, 65, 113, 130):
        x = torch.empty(9, C, 2, 3)
        mask = dropped(fn.feature_alpha_dropout, x, 0.5)
        last = dropped(fn.feature_alpha_dropout, x.to(memory_format=torch.channels_last), 0.5)
        assert torch.equal(mask, last)
        assert torch.equal(mask[:, :, :1, :1].expand_as(mask), mask)
        # without spatial positions a channel is an element
        assert torch.equal(dropped(fn.feature_alpha_dropout, x[:, :, 0, 0], 0.5), mask[:, :, 0, 0])


@FUNCTIONS
def test_nan_and_infinity_as_in_torch(function) -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    x = values.view(4, 1, 1).expand(4, 64, 3).contiguous()
    keep = ~dropped(function, x, 0.5)
    y = function(x, 0.5, True, generator=generator())
    assert torch.equal(y.isnan(), x.isnan() | (x.isinf() & ~keep))
    assert torch.equal(y.isinf(), x.isinf() & keep)
    assert torch.equal(function(x, 1.0, True).isnan(), ~x.isfinite())
    torch_y = getattr(F, function.__name__)(x, 1.0, True)
    assert torch.equal(function(x, 1.0, True).nan_to_num(), torch_y.nan_to_num())


@FUNCTIONS
def test_where_nothing_is_dropped_the_input_comes_back(function) -> None:
    x = torch.randn(3, 4)
    assert function(x) is x  # training=False is torch's default
    assert function(x, 0.5, False) is x and function(x, 0.0, True) is x
    torch.testing.assert_close(function(x, 2.0**-18, True), x)  # rounded to p = 0


@FUNCTIONS
def test_inplace(function) -> None:
    x = torch.randn(4, 6, 5, 5)
    wanted = function(x, 0.5, True, generator=generator())
    for layout in (lambda t: t, lambda t: t.to(memory_format=torch.channels_last), lambda t: t.mT.contiguous().mT):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            z = layout(x.to(dtype))
            z = z.clone() if z is x else z
            expected = function(x.to(dtype), 0.5, True, generator=generator())
            assert function(z, 0.5, True, True, generator=generator()) is z
            assert torch.equal(z, expected)
    leaf = x.clone().requires_grad_()
    y = function(leaf * 1, 0.5, True, True, generator=generator())
    assert torch.equal(y, wanted)
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(dx == 0, dropped(function, x, 0.5))
    for written in (leaf, leaf[0], leaf.view(-1, 5)):
        before = leaf.detach().clone()
        with pytest.raises(RuntimeError, match=f"^{function.__name__}: inplace=True on a leaf"):
            function(written, 0.5, True, True)
        assert torch.equal(leaf, before)


@pytest.mark.parametrize("function", (fn.alpha_dropout, fn.dropout, fn.drop_path), ids=lambda f: f.__name__)
def test_autograd_hears_of_inplace(function) -> None:
    x, weight = torch.randn(3, 4), torch.ones(3, 4, requires_grad=True)
    product = (x * weight).sum()  # keeps x
    function(x, 0.5, True, True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        inference = torch.ones(3, 4)
        function(inference, 0.5, True, True)
    before = inference.clone()
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        function(inference, 0.5, True, True)
    assert torch.equal(inference, before)


@FUNCTIONS
def test_errors(function) -> None:
    name = function.__name__
    for p in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=rf"^{name}: p must be in \[0, 1\], got"):
            function(torch.ones(2, 3), p, True)
    with pytest.raises(NotImplementedError, match=f"^{name}: no kernel for input of type Long, "):
        function(torch.ones(2, 3, dtype=torch.int64), 0.5, True)
    state = _C.dropout_state(None, torch.empty(0))
    for wrong in (state[:1], state.int()):
        with pytest.raises(RuntimeError, match=r"^alpha_dropout: state must be"):
            _C.alpha_dropout(torch.ones(2, 3), 0.5, wrong, 0, False)
    with pytest.raises(RuntimeError, match=r"^alpha_dropout: channel_dims must be in \[0, 2\], got 3"):
        _C.alpha_dropout(torch.ones(2, 3, 4), 0.5, state, 3, False)


def test_feature_alpha_dropout_needs_channels() -> None:
    for shape in ((), (3,)):
        with pytest.raises(RuntimeError, match=r"^feature_alpha_dropout: input must have shape \(N, C, \*\), got"):
            fn.feature_alpha_dropout(torch.ones(shape), 0.5, True)
        assert fn.feature_alpha_dropout(torch.ones(shape), 0.5, False).shape == shape  # as in torch
    assert fn.alpha_dropout(torch.ones(()), 0.5, True).shape == ()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own forward mode uses it
def test_torchs_op_where_there_is_no_kernel() -> None:
    fastnorm.set_fallback("silent")
    primal = torch.ones(4, 6)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(primal, torch.ones(4, 6))
        y, tangent = torch.autograd.forward_ad.unpack_dual(fn.alpha_dropout(dual, 0.5, True))
        assert torch.equal(tangent == 0, y < 0)
        y, tangent = torch.autograd.forward_ad.unpack_dual(fn.drop_path(dual, 0.5, True))
        assert torch.equal(tangent, y)
        assert torch.equal(y, y[:, :1].expand(4, 6))


@pytest.mark.parametrize("name", ("AlphaDropout", "FeatureAlphaDropout"))
def test_modules(name: str) -> None:
    ours, theirs = getattr(fastnorm, name), getattr(nn, name)
    assert issubclass(ours, theirs) and repr(ours(0.2)) == repr(theirs(0.2))
    assert repr(ours(0.2, True)) == repr(theirs(0.2, inplace=True)) and not ours().state_dict()
    assert ours().p == theirs().p
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=rf"^{name}: p must be in \[0, 1\], got"):
            ours(p)
    layer, x = ours(0.5), torch.randn(4, 6, 7)
    torch.manual_seed(11)
    y = layer(x)
    torch.manual_seed(11)
    assert torch.equal(layer(x), y) and not torch.equal(layer(x), y)
    assert layer.eval()(x) is x
    assert ours(0.5, inplace=True)(x) is x


def test_channels_last_is_not_copied() -> None:
    class Copies(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function in (torch.ops.aten.copy_.default, torch.ops.aten.clone.default)
            return function(*args, **(kwargs or {}))

    x = torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last)
    for function in (fn.alpha_dropout, fn.feature_alpha_dropout, fn.drop_path):
        for inplace in (False, True):
            with Copies() as copies:
                y = function(x, 0.5, True, inplace)
            assert copies.count == 0 and y.is_contiguous(memory_format=torch.channels_last)
    with Copies() as copies:
        fn.alpha_dropout(x.mT, 0.5, True)
    assert copies.count == 1  # so that the count is seen to count
