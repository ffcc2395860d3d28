"""What only dropout has: the generator's known answers, statistics of the mask, and torch's random state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from test_ops import channels_last
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastnorm
import fastnorm.functional as fn
from fastnorm import _C

# Known answers published with the generator (Random123), words as hexadecimal numbers.
KNOWN = (
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def words(text: str) -> list[int]:
    return [int(w, 16) for w in text.split()]


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("rounds", "counter", "key", "answer"), KNOWN)
def test_the_reference_generator_is_philox(rounds: int, counter: str, key: str, answer: str) -> None:
    k0, k1 = words(key)
    got = reference.philox4x32(np.array([words(counter)], dtype=np.uint32), (k0, k1), rounds)
    assert got[0].tolist() == words(answer)


@pytest.mark.parametrize("offset", (0, 1, 2**32 + 5, 2**63 - 1))
@pytest.mark.parametrize("seed", (0, 1, 2**32, 2**63 - 1))
def test_mask_of_any_seed_and_offset(seed: int, offset: int) -> None:
    state = torch.tensor([seed, offset])
    kept = _C.dropout(torch.ones(1001), 0.3, state, 0, False) != 0
    assert torch.equal(kept, reference.dropout_keep(1001, 0.3, seed, offset))


@pytest.mark.parametrize("function", ("dropout", "dropout2d"))
def test_one_mask_for_every_dtype_and_layout(function: str) -> None:
    small = ((3, 10, 6, 7), (2, 17, 5, 5), (4, 33, 8, 8), (1, 3, 70, 3), (5, 8, 1, 9))
    # In channels_last, 64 channels at a time, 256 positions, or 248 where channels begin within a Philox block.
    large = ((2, 70, 16, 16), (1, 65, 3, 83), (2, 130, 1, 257), (1, 66, 8, 33), (1, 65, 9, 56), (2, 5, 23, 22))
    for shape in small + large:
        masks = [
            getattr(fn, function)(layout(torch.ones(shape, dtype=dtype)), 0.4, generator=seeded()) != 0
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
            for layout in (lambda t: t, channels_last)
        ]
        for mask in masks[1:]:
            assert torch.equal(mask, masks[0])


@pytest.mark.parametrize("p", (1e-4, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999))
def test_rate_and_mean(p: float) -> None:
    """Drops are Bernoulli with p rounded to 2^-16: their number lies within five standard deviations."""
    n = 4_000_000
    y = fn.dropout(torch.ones(n, dtype=torch.float64), p, generator=seeded())
    drawn = reference.dropout_threshold(p) / 65536
    assert abs((y == 0).sum().item() - n * drawn) < 5 * math.sqrt(n * drawn * (1 - drawn))
    assert y.max().item() == 1 / (1 - drawn)
    assert abs(y.mean().item() - 1) < 5 * math.sqrt(drawn / (1 - drawn) / n)


def test_drops_are_independent_of_their_neighbours() -> None:
    kept = (fn.dropout(torch.ones(2_000_000), 0.5, generator=seeded()) != 0).double() - 0.5
    for lag in (1, 2, 7, 8, 16, 63, 64, 128, 1024):
        correlation = (kept[:-lag] * kept[lag:]).mean().item() * 4
        assert abs(correlation) < 5 / math.sqrt(len(kept) - lag), lag


@pytest.mark.parametrize("other", ((1, 0), (2**32, 0), (0, 1), (0, 2**32)), ids=str)
def test_masks_of_neighbouring_seeds_and_offsets_have_nothing_in_common(other: tuple[int, int]) -> None:
    """All 256 patterns of a Philox block's eight elements are as frequent, in a mask and where two masks differ."""
    first, second = (
        _C.dropout(torch.ones(2**21), 0.5, torch.tensor(state), 0, False).bool() for state in ((0, 0), other)
    )
    for bits in (first, second, first ^ second):
        patterns = (bits.view(-1, 8) << torch.arange(8)).sum(1)
        expected = len(patterns) / 256
        chi_squared = ((torch.bincount(patterns, minlength=256) - expected) ** 2 / expected).sum().item()
        assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255)


def test_p_zero_and_one_are_exact() -> None:
    x = torch.randn(100, requires_grad=True)
    assert fn.dropout(x, 0.0) is x and fn.dropout(x, 0.5, training=False) is x
    y = fn.dropout(x, 1.0)
    assert not y.any()
    y.sum().backward()
    assert not x.grad.any()
    poisoned = torch.tensor([float("nan"), float("inf"), 1.0])
    assert torch.equal(fn.dropout(poisoned, 1.0).isnan(), nn.functional.dropout(poisoned, 1.0).isnan())


def test_torch_random_state_is_respected() -> None:
    x = torch.ones(1000)
    torch.manual_seed(5)
    first, second = fn.dropout(x), fn.dropout(x)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(fn.dropout(x), first)
    state = torch.get_rng_state()
    third = fn.dropout(x)
    torch.set_rng_state(state)
    assert torch.equal(fn.dropout(x), third)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        assert torch.equal(fn.dropout(x), first)
    generator = seeded()
    a, b = fn.dropout(x, generator=generator), fn.dropout(x, generator=generator)
    assert not torch.equal(a, b) and torch.equal(fn.dropout(x, generator=seeded()), a)


@pytest.mark.parametrize("use_reentrant", (True, False))
def test_checkpointing_draws_the_same_mask_again(use_reentrant: bool) -> None:
    layer = nn.Sequential(nn.Linear(50, 50), fastnorm.Dropout(0.5), nn.Linear(50, 50))
    x = torch.randn(8, 50)
    results = []
    for run in (lambda v: layer(v), lambda v: checkpoint(layer, v, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        v = x.clone().requires_grad_()
        layer.zero_grad()
        run(v).square().sum().backward()
        results.append([v.grad, *[q.grad.clone() for q in layer.parameters()]])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", ("dropout", "dropout2d"))
def test_in_place(function: str) -> None:
    run = getattr(fn, function)
    for layout in (lambda t: t, channels_last, lambda t: t.transpose(-1, -2)):
        x = layout(torch.randn(3, 5, 6, 7))
        expected = run(x, 0.4, generator=seeded())
        y = run(x, 0.4, inplace=True, generator=seeded())
        assert y is x and torch.equal(x, expected)
        a, b = (torch.randn(3, 5, 6, 7, generator=seeded(9)).requires_grad_() for _ in range(2))
        run(layout(a * 2), 0.4, inplace=True, generator=seeded()).square().sum().backward()
        run(layout(b * 2), 0.4, generator=seeded()).square().sum().backward()
        assert torch.equal(a.grad, b.grad)


def test_in_place_on_a_leaf_is_refused_before_anything_is_written() -> None:
    x = torch.ones(10, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        fn.dropout(x, 0.5, inplace=True)
    assert torch.equal(x.detach(), torch.ones(10))


CHANNELS = (
    ("Dropout1d", (4, 9, 5), 2),
    ("Dropout1d", (9, 5), 1),
    ("Dropout2d", (4, 9, 5, 3), 2),
    ("Dropout3d", (4, 9, 2, 5, 3), 2),
    ("Dropout3d", (9, 2, 5, 3), 1),
)


@pytest.mark.parametrize(("name", "shape", "channels"), CHANNELS)
def test_whole_channels(name: str, shape: tuple[int, ...], channels: int) -> None:
    y = getattr(fastnorm, name)(0.5)(torch.ones(shape)).flatten(channels)
    assert torch.equal(y, y[..., :1].expand_as(y)) and set(y.unique().tolist()) == {0.0, 2.0}


def test_dropout2d_reads_other_ranks_as_torch_does() -> None:
    for shape in ((4, 9, 5), (4, 9), (2, 3, 4, 5, 6)):
        x = torch.ones(shape)
        with pytest.warns(UserWarning, match="dropout2d: input should have shape"):
            y = fn.dropout2d(x).flatten(2) if x.dim() > 2 else fn.dropout2d(x)[..., None]
        assert torch.equal(y, y[..., :1].expand_as(y))


def test_module_repr_state_and_eval() -> None:
    for name in ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d"):
        ours, theirs = getattr(fastnorm, name)(0.2, True), getattr(nn, name)(0.2, True)
        assert repr(ours) == repr(theirs) and isinstance(ours, type(theirs)) and not ours.state_dict()
        x = torch.ones(3, 4, 5) if name == "Dropout1d" else torch.ones(3, 4, 5, 6)
        assert ours.eval()(x) is x


def test_scaled_mask_reaches_the_gradient() -> None:
    x = torch.randn(1000, requires_grad=True)
    y = fn.dropout(x, 0.3)
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y))
    mask: Tensor = torch.where(y == 0, 0.0, y / x)
    torch.testing.assert_close(g, mask.detach())


@pytest.mark.parametrize("name", ["dropout", "alpha_dropout", "drop_path"])
def test_sparse_gradient(name: str) -> None:
    """Of an embedding whose weight is dropped in part: as sparse as torch's, and the same mask."""
    function = getattr(fn, name)
    for sparse in (True, False):
        weight = torch.randn(5, 4, requires_grad=True)
        torch.manual_seed(0)
        nn.functional.embedding(
            torch.tensor([0, 1, 2, 3, 4, 1]), function(weight, 0.5, training=True), sparse=sparse
        ).sum().backward()
        assert weight.grad.is_sparse is sparse
        if sparse:
            found = weight.grad.to_dense()
    torch.testing.assert_close(found, weight.grad)
    assert found.any()
