"""What only local response normalisation has: windows, conventions, the power, and figures that must be exact."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import SLACK
from test_ops import channels_last, differentiate, error
from torch import Tensor, nn
from torch_path import by_torch

import fastnorm
import fastnorm.functional as fn

LAYOUTS = pytest.mark.parametrize("layout", (lambda t: t, channels_last), ids=("contiguous", "channels_last"))
# size, alpha, beta, k
ALEXNET = (5, 1e-4, 0.75, 2.0)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_example_of_the_course_notes() -> None:
    """n=2, k=0, alpha=1, beta=1 over channels (2, 1, 2): the middle is 1 / (4 + 1 + 4)."""
    x = torch.tensor([2.0, 1.0, 2.0]).view(1, 3, 1)
    y = fn.local_response_norm(x, 2, 1.0, 1.0, 0.0, convention="paper").flatten()
    torch.testing.assert_close(y, torch.tensor([2 / 5, 1 / 9, 2 / 5]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("convention", ("torch", "paper"))
@pytest.mark.parametrize("size", (1, 2, 3, 4, 5, 6, 9, 100))
def test_each_window_holds_exactly_what_it_should(size: int, convention: str) -> None:
    """beta=-1, k=0: y[i] is x[i] times a times the window's sum, and powers of two show which elements are in it."""
    C = 11
    x = (2.0 ** torch.arange(C, dtype=torch.float64)).view(1, C, 1)
    after = size // 2 if convention == "paper" else (size - 1) // 2
    a = 1.0 if convention == "paper" else 1.0 / size
    for i, y in enumerate(fn.local_response_norm(x, size, 1.0, -1.0, 0.0, convention=convention).flatten().tolist()):
        window = range(max(0, i - size // 2), min(C, i + after + 1))
        assert y == pytest.approx(2.0**i * a * sum(4.0**j for j in window), rel=1e-14)


@pytest.mark.parametrize("size", (1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 300))
@LAYOUTS
def test_the_window_is_torchs(size: int, layout) -> None:
    for shape in ((2, 7, 5), (2, 40, 9, 11), (1, 6, 3, 4, 5)):
        x = noise(*shape)
        y = fn.local_response_norm(layout(x), size, 0.9, 0.75, 1.5)
        torch.testing.assert_close(y, F.local_response_norm(x, size, 0.9, 0.75, 1.5), rtol=1e-13, atol=1e-13)


@LAYOUTS
def test_intra_is_inter_on_a_plane_of_one_column(layout) -> None:
    """A square window on H x 1 sums a column, as an inter window does over channels; alpha differs by the divisor."""
    for size in (2, 3, 5, 12):
        for convention in ("torch", "paper"):
            x = noise(3, 4, 50, 1)
            alpha = 0.7 * (size if convention == "torch" else 1)
            intra = fn.local_response_norm(layout(x), size, alpha, 0.75, 1.0, region="intra", convention=convention)
            inter = fn.local_response_norm(x.transpose(1, 2), size, 0.7, 0.75, 1.0, convention=convention)
            torch.testing.assert_close(intra, inter.transpose(1, 2), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("region", ("inter", "intra"))
@pytest.mark.parametrize("size", (3, 5, 20))
@LAYOUTS
def test_scales_of_a_huge_value_end_with_its_window(layout, size: int, region: str) -> None:
    """A sum that is kept up by adding and subtracting would carry 1e18's rounding error on for ever."""
    x = noise(2, 40, 45, 30)
    x[:, 3, 4, 5] = 1e9
    x = x.float()
    setting = (size, 1.0, 0.75, 1.0)
    far = torch.ones(x.shape, dtype=torch.bool)
    if region == "inter":
        far[:, : 4 + size, 4, 5] = False
    else:
        far[:, 3, : 5 + size, : 6 + size] = False
    dy = noise(2, 40, 45, 30, seed=1).float()
    y, (dx,) = differentiate(lambda t: fn.local_response_norm(t, *setting, region=region), [layout(x)], layout(dy))
    wanted_y, (wanted_dx,) = differentiate(
        lambda t: reference.local_response_norm(t, *setting, region=region), [x.double()], dy.double()
    )
    assert error(y[far], wanted_y[far]) < 1e-6
    assert error(dx[far], wanted_dx[far]) < 1e-6


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("region", ("inter", "intra"))
def test_scales_whose_squares_overflow_float16(dtype: torch.dtype, region: str) -> None:
    x = (noise(2, 9, 6, 7) * 2000).to(dtype)
    for layout in (lambda t: t, channels_last):
        y = fn.local_response_norm(layout(x), *ALEXNET, region=region)
        wanted = reference.local_response_norm(x.double(), *ALEXNET, region=region)
        assert error(y, wanted) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("beta", (0.5, 0.75, 1.0, 1.7))
@pytest.mark.parametrize("factor", (1e-18, 1e-15, 1e-6, 1.0, 1e6, 1e15, 1e18))
def test_scales_of_every_magnitude(factor: float, beta: float) -> None:
    """k=0, so that the scale goes from 1e-36 to 1e36: no result may lose its digits before it leaves float32."""
    x = ((noise(3, 33, 7, 5).abs() + 0.5) * factor).float()
    y = fn.local_response_norm(x, 3, 1.0, beta, 0.0)
    wanted = reference.local_response_norm(x.double(), 3, 1.0, beta, 0.0)
    power = x / wanted  # scale^beta, which must be a number of float32, too
    there = torch.stack([wanted.abs(), power]).log10().abs().amax(0) < 37
    # beta = 1.7 is rounded to float32 itself, which counts times log(scale) <= 83
    torch.testing.assert_close(y.double()[there], wanted[there], rtol=1e-6 if beta != 1.7 else 1e-5, atol=0)


@pytest.mark.parametrize("beta", (0.5, 0.75, 1.0))
@pytest.mark.parametrize("k", (1e-40, 1.0, 1e10, 3e38))
def test_scales_from_float64_as_near_as_torchs(k: float, beta: float) -> None:
    """s^-beta itself, over every mantissa: the average error, too, is no larger than torch's."""
    x = noise(64, 8, 33, 32).float() * k**0.5
    ours = fn.local_response_norm(x, 5, 1.0, beta, k).double()
    theirs = F.local_response_norm(x, 5, 1.0, beta, k).double()
    wanted = reference.local_response_norm(x.double(), 5, 1.0, beta, float(torch.tensor(k)))

    def errors(y: Tensor) -> Tensor:
        relative = (y / wanted - 1).abs()
        return relative[wanted.abs() > 1e-37]  # below, float32 has fewer digits

    assert errors(ours).max() <= SLACK * max(errors(theirs).max().item(), 4 * 2**-24)
    assert errors(ours).mean() <= SLACK * 1.02 * errors(theirs).mean()


@pytest.mark.parametrize("beta", (0.0, 0.5, 0.75, 1.0, 2.0, 1.3))
@LAYOUTS
def test_nan_inf_and_scales_of_zero_as_torch(layout, beta: float) -> None:
    for k, alpha in ((1.0, 1e-4), (0.0, 1.0), (-1.0, 0.3), (1.0, -1.0)):
        for poison in (float("nan"), float("inf"), -float("inf"), 1e30, 0.0):
            x = noise(2, 9, 4, 5).float()
            x[:, 2:5] = 0
            x[1, 6, 2, 3] = poison
            ours, theirs = (
                fn.local_response_norm(layout(x), 3, alpha, beta, k),
                F.local_response_norm(x, 3, alpha, beta, k),
            )
            if beta == 0:
                assert torch.equal(ours.nan_to_num(7.0), x.nan_to_num(7.0))
                continue
            assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())
            # k and the sum may cancel where their signs differ
            tolerance = 1e-5 if k >= 0 and alpha > 0 else 1e-3
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("beta", (0.5, 0.75, 1.0, 1.3))
@pytest.mark.parametrize("region", ("inter", "intra"))
@LAYOUTS
def test_what_is_not_finite_stays_within_its_window(layout, region: str, beta: float) -> None:
    """Not a bit of any other element changes, also where its scale is computed beside one that is infinite."""
    x, dy = noise(2, 20, 9, 21).float(), noise(2, 20, 9, 21, seed=1).float()
    poisoned = x.clone()
    poisoned[0, 10, 4, 8] = float("inf")
    forward = [torch.zeros(x.shape, dtype=torch.bool) for _ in range(2)]
    for window, reach in zip(forward, (1, 2), strict=True):  # dx depends on scales in the window of the window
        if region == "inter":
            window[0, 10 - reach : 11 + reach, 4, 8] = True
        else:
            window[0, 10, 4 - reach : 5 + reach, 8 - reach : 9 + reach] = True
    results = []
    for t in (x, poisoned):
        y, (dx,) = differentiate(
            lambda t: fn.local_response_norm(t, 3, 0.5, beta, 1.0, region=region), [layout(t)], layout(dy)
        )
        results.append((y, dx))
    for clean, other, window in zip(*results, forward, strict=True):
        assert torch.equal(clean[~window], other[~window])
        assert not torch.equal(clean[window], other[window])


def test_beta_zero_is_a_copy() -> None:
    x = noise(2, 3, 4, 5).requires_grad_()
    y = fn.local_response_norm(x, 3, 0.5, 0.0, 1.0)
    assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(dx, 2 * x)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("region", ("inter", "intra"))
@pytest.mark.parametrize("size", (3, 40))
def test_tiles_of_large_tensors(region: str, size: int, dtype: torch.dtype) -> None:
    """Channels and images beyond what one tile holds, cut across the window; whole planes and strips of them; rows that
    begin at cache lines of the buffers and rows that do not."""
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for shape in ((1, 5000, 3, 33), (1, 1, 700, 400), (1, 40, 70, 90), (1, 100, 27, 27), (1, 1, 1100, 61)):
        x, dy = noise(*shape).to(dtype), noise(*shape, seed=1).to(dtype)
        wanted, (wanted_dx,) = differentiate(
            lambda t: reference.local_response_norm(t, size, 0.5, 0.75, 1.0, region=region), [x.double()], dy.double()
        )
        for layout in (lambda t: t, channels_last):
            y, (dx,) = differentiate(
                lambda t: fn.local_response_norm(t, size, 0.5, 0.75, 1.0, region=region), [layout(x)], layout(dy)
            )
            assert error(y, wanted) < tolerance and error(dx, wanted_dx) < tolerance


def test_layouts_give_the_same_bits() -> None:
    """The terms of a window are added in one order, however the tensor lies."""
    for region in ("inter", "intra"):
        for size in (3, 5, 20):
            x = noise(2, 35, 21, 19).float()
            y = fn.local_response_norm(x, size, 0.5, region=region)
            assert torch.equal(fn.local_response_norm(channels_last(x), size, 0.5, region=region), y)


def test_module_is_torchs_with_two_keywords_more() -> None:
    ours, theirs = fastnorm.LocalResponseNorm(*ALEXNET), nn.LocalResponseNorm(*ALEXNET)
    assert isinstance(ours, nn.LocalResponseNorm)
    assert repr(ours) == repr(theirs) and ours.state_dict() == theirs.state_dict() == {}
    x = noise(2, 8, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    norm = fastnorm.LocalResponseNorm(3, region="intra", convention="paper")
    assert repr(norm) == "LocalResponseNorm(3, alpha=0.0001, beta=0.75, k=1.0, region='intra', convention='paper')"
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(twin(x), norm(x)) and repr(twin) == repr(norm)


def test_fallback_is_the_same_op() -> None:
    x, tangent = noise(2, 9, 6, 7), noise(2, 9, 6, 7, seed=1)
    for region in ("inter", "intra"):
        for convention in ("torch", "paper"):
            for size in (2, 3, 30):
                run = partial(
                    fn.local_response_norm,
                    size=size, alpha=0.5, beta=0.75, k=1.0, region=region, convention=convention,
                )  # fmt: skip
                y, derivative = torch.func.jvp(run, (x,), (tangent,))
                for other in (y, by_torch(run, x)):
                    torch.testing.assert_close(other, run(x), rtol=1e-13, atol=1e-13)
                leaf = x.clone().requires_grad_()
                (dx,) = torch.autograd.grad(run(leaf), leaf, tangent)
                numerical = (run(x + 1e-6 * tangent) - run(x - 1e-6 * tangent)) / 2e-6
                torch.testing.assert_close(derivative, numerical, rtol=1e-6, atol=1e-8)
                torch.testing.assert_close((dx * x).sum(), (tangent * torch.func.jvp(run, (x,), (x,))[1]).sum())


X = torch.ones(2, 3, 4, 5)
WRONG = {
    "rank": (
        lambda: fn.local_response_norm(X[0, 0], 3),
        ValueError,
        r"at least 3 dimensions \(N, C, \*\), got 2.*\[4, 5\]",
    ),
    "rank of intra": (
        lambda: fn.local_response_norm(X[0], 3, region="intra"),
        ValueError,
        r"must have shape \(N, C, H, W\) for region='intra', got 3 dimensions",
    ),
    "volume for intra": (
        lambda: fn.local_response_norm(X.unsqueeze(2), 3, region="intra"),
        ValueError,
        "got 5 dimensions",
    ),
    "size 0": (
        lambda: fn.local_response_norm(X, 0),
        RuntimeError,
        "local_response_norm: size must be at least 1, got 0",
    ),
    "size below 0": (lambda: fn.local_response_norm(X, -2, region="intra"), RuntimeError, "got -2"),
    "size that is no integer": (
        lambda: fn.local_response_norm(X, 2.5),
        TypeError,
        "local_response_norm: size must be an int, got float",
    ),
    "region": (
        lambda: fn.local_response_norm(X, 3, region="within"),
        ValueError,
        "region must be 'inter' or 'intra', got",
    ),
    "convention": (
        lambda: fn.local_response_norm(X, 3, convention="caffe"),
        ValueError,
        "convention must be 'torch' or",
    ),
    "integers": (
        lambda: fn.local_response_norm(X.long(), 3),
        NotImplementedError,
        "local_response_norm: no kernel for input of type Long",
    ),
    "module's region": (
        lambda: fastnorm.LocalResponseNorm(3, region="both"),
        ValueError,
        "LocalResponseNorm: region must be",
    ),
    "module's convention": (
        lambda: fastnorm.LocalResponseNorm(3, convention="caffe"),
        ValueError,
        "LocalResponseNorm: convention must be",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_message(name: str) -> None:
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()
