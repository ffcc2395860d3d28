"""What only GroupNorm has: groups, the ways through memory, module behaviour, and figures that must be exact."""

from __future__ import annotations

import copy
import pickle

import pytest
import reference
import torch
from test_ops import channels_last
from torch import Tensor, nn

import fastnorm
import fastnorm.functional as fn

LAYOUTS = pytest.mark.parametrize("layout", (lambda t: t, channels_last), ids=("contiguous", "channels_last"))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@LAYOUTS
@pytest.mark.parametrize("groups", (1, 2, 3, 4, 6, 12))
@pytest.mark.parametrize("spatial", ((), (2,), (15,), (16,), (5, 13), (63, 2), (4099,)), ids=str)
def test_every_number_of_groups(spatial: tuple[int, ...], groups: int, layout) -> None:
    """Planes below and above the size that changes the path, rows that fold and do not fit, slices of many chunks."""
    if groups == 12 and not spatial:
        return
    x = layout(normal(3, 12, *spatial)).requires_grad_()
    weight, bias = (normal(12, seed=s).requires_grad_() for s in (1, 2))
    dy = layout(normal(3, 12, *spatial, seed=3))
    y, wanted = (f(x, groups, weight, bias) for f in (fn.group_norm, reference.group_norm))
    torch.testing.assert_close(y, wanted)
    gradients, wanted = (torch.autograd.grad(t, (x, weight, bias), dy) for t in (y, wanted))
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, want)


@LAYOUTS
@pytest.mark.parametrize("activation", (None, "leaky_relu"))
def test_many_shapes_give_the_same_bits_on_any_number_of_threads(activation: str | None, layout) -> None:
    """Few and many slices, samples and parts of them, around every choice that the number of threads decides."""
    for shape, groups in (
        ((1, 6, 130, 130), 3), ((2, 8, 9000), 1), ((3, 130, 70, 3), 13),
        ((40, 64, 3), 8), ((9, 3, 64, 65), 3), ((300, 96), 4),
    ):  # fmt: skip
        x, residual, dy = (layout(normal(*shape, seed=s)).float().requires_grad_(s < 2) for s in range(3))
        weight = normal(shape[1], seed=4).float().requires_grad_()
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = fn.group_norm(x, groups, weight, residual=residual, activation=activation)
            results.append((y, *torch.autograd.grad(y, (x, residual, weight), dy)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), shape


@LAYOUTS
def test_a_constant_slice_gives_exactly_beta(layout) -> None:
    for value in (0.0, 0.1, -3.7, 1e-20, 3e4, 1e30):
        for shape in ((4, 6, 7, 7), (2, 6, 80, 90), (40, 6, 2, 1), (64, 6)):
            x = layout(torch.full(shape, value))
            bias = torch.tensor([0.3, -1e-3, 7.0, 0.0, 1.0, -2.0])
            y = fn.group_norm(x, 2, torch.tensor([2.0, 1.0, 0.5, 3.0, 0.0, -1.0]), bias)
            assert torch.equal(y, bias.view([1, 6] + [1] * (len(shape) - 2)).expand(shape)), (value, shape)


def test_rows_of_more_channels_than_are_swept_together() -> None:
    """And rows that no four stretches of them make up, for every number that is left."""
    weight, bias = (normal(2070, seed=s).requires_grad_() for s in (1, 2))
    for S in (16, 17, 18, 19):
        x, dy = (channels_last(normal(2, 2070, S, seed=s)) for s in (0, 3))
        x.requires_grad_()
        for ours, wanted in (
            (fn.group_norm(x, 6, weight, bias), reference.group_norm(x, 6, weight, bias)),
            (
                fn.batch_norm(x, None, None, weight, bias, training=True),
                nn.functional.batch_norm(x, None, None, weight, bias, True),
            ),
        ):
            torch.testing.assert_close(ours, wanted)
            for got, want in zip(*(torch.autograd.grad(y, (x, weight, bias), dy) for y in (ours, wanted)), strict=True):
                torch.testing.assert_close(got, want)


@LAYOUTS
@pytest.mark.parametrize("scale", (1e-30, 1e-18, 1e18, 1e30))
def test_scales_whose_squares_leave_float32(scale: float, layout) -> None:
    """eps=0 where the scale is small, so that the variance alone decides."""
    for shape in ((4, 6, 9, 9), (8, 70, 2, 2), (2, 4, 70, 70)):
        x = layout((normal(*shape) * scale).float())
        eps = 0.0 if scale < 1 else 1e-5
        y = fn.group_norm(x, 2, eps=eps)
        torch.testing.assert_close(y.double(), reference.group_norm(x.double(), 2, eps=eps), rtol=1e-5, atol=1e-5)


@LAYOUTS
def test_a_step_after_a_long_constant_start(layout) -> None:
    """The start says nothing of the rest: deviations from its mean are all large."""
    for S in (600, 4096, 20000):
        for start in (S // 100, S // 8, S // 2):
            x = torch.randn(2, 4, S, generator=torch.Generator().manual_seed(S)) + 1e4
            x[:, :, :start] = 0
            y = fn.group_norm(layout(x), 2)
            wanted = reference.group_norm(x.double(), 2)
            assert (y - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@LAYOUTS
def test_nan_stays_in_its_slice(layout) -> None:
    for shape in ((3, 6, 7, 7), (3, 6, 2, 2), (3, 6, 70, 70)):
        for poison in (float("nan"), float("inf")):
            x = torch.ones(shape)
            x[1, 2, 1, 1] = poison
            bad = torch.zeros(shape, dtype=torch.bool)
            bad[1, 2:4] = True
            assert torch.equal(fn.group_norm(layout(x), 3).isnan(), bad)


def test_state_dict_both_ways_and_repr() -> None:
    a, b = fastnorm.GroupNorm(3, 12), nn.GroupNorm(3, 12)
    b.load_state_dict(a.state_dict())
    a.load_state_dict(b.state_dict())
    assert repr(a) == repr(b) and isinstance(a, nn.GroupNorm)
    assert repr(fastnorm.GroupNorm(3, 12, activation="relu")).endswith("activation='relu')")
    assert not list(fastnorm.GroupNorm(3, 12, affine=False).parameters())


def test_bias_false() -> None:
    norm = fastnorm.GroupNorm(2, 4, bias=False)
    assert norm.bias is None and list(norm.state_dict()) == ["weight"]
    norm.reset_parameters()
    x = torch.randn(4, 4, 5, 5)
    torch.testing.assert_close(norm(x), nn.functional.group_norm(x, 2))
    norm(x).square().sum().backward()
    assert norm.weight.grad is not None


def test_deepcopy_and_pickle() -> None:
    norm = fastnorm.GroupNorm(2, 4, activation="silu")
    x = torch.randn(4, 4, 5, 5)
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(twin(x), norm(x)) and repr(twin) == repr(norm)


def test_residual_may_have_another_layout_and_its_own_gradient() -> None:
    x, residual = (torch.randn(3, 6, 5, 4) for _ in range(2))
    norm = fastnorm.GroupNorm(2, 6, activation="relu")
    expected = norm(x, residual)
    assert torch.equal(norm(x, channels_last(residual)), expected)
    mixed = norm(channels_last(x), residual)
    assert mixed.stride() == channels_last(x).stride()
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_low_precision_input_with_float32_parameters(dtype: torch.dtype) -> None:
    x = normal(3, 4, 9, 9).to(dtype)
    weight, bias = (normal(4, seed=s).float().requires_grad_() for s in (1, 2))
    y = fn.group_norm(x, 2, weight, bias)
    assert y.dtype == dtype
    wanted = reference.group_norm(x.double(), 2, weight.double(), bias.double())
    torch.testing.assert_close(y.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    gradients = torch.autograd.grad(y.double().square().sum(), (weight, bias))
    assert all(g.dtype == torch.float32 for g in gradients)


def test_parametrised_weight() -> None:
    norm = fastnorm.GroupNorm(2, 4)
    nn.utils.parametrizations.weight_norm(norm, dim=None)
    x = torch.randn(4, 4, 5, 5)
    torch.testing.assert_close(norm(x), nn.functional.group_norm(x, 2, norm.weight, norm.bias))
