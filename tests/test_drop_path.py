"""Stochastic depth: whole samples."""

from __future__ import annotations

import math

import pytest
import torch
from reference import dropout_keep
from torch import nn

import fastnorm
import fastnorm.functional as fn
from fastnorm import _C


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("p", (0.001, 0.1, 0.5, 0.9))
def test_rate_of_dropping_and_mean(p: float) -> None:
    n = 1 << 18
    y = fn.drop_path(torch.ones(n, 2, dtype=torch.float64), p, True, generator=generator())
    assert torch.equal(y[:, 0], y[:, 1])
    dropped = int((y[:, 0] == 0).sum())
    # five standard deviations of a binomial count, and the rounding of p to a multiple of 2^-16
    assert abs(dropped - n * p) < 5 * math.sqrt(n * p * (1 - p)) + n * 2**-17
    assert len(y.unique()) == 2
    assert abs(y.max().item() - 1 / (1 - p)) < 2**-16 / (1 - p) ** 2


def test_samples_of_any_size_and_layout() -> None:
    seed = int(_C.dropout_state(generator(), torch.empty(0))[0]) & (2**64 - 1)
    for N in (1, 2, 7, 130):
        keep = dropout_keep(N, 0.5, seed)
        for rest in ((), (1,), (63,), (3, 5), (17, 9, 11), (2, 3, 5, 7)):
            x = torch.rand(N, *rest) + 1
            layouts = [x, x.movedim(1, -1).contiguous().movedim(-1, 1)] if len(rest) > 1 else [x]
            for laid in layouts:
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    y = fn.drop_path(laid, 0.5, True, generator=generator())
                    assert torch.equal(y, x * keep.view([N] + [1] * len(rest)) * 2)


def test_large_samples_on_two_threads() -> None:
    """A thread's stretch ends inside a sample."""
    x = torch.rand(9, 50_001) + 1
    y = fn.drop_path(x, 0.5, True, generator=generator(4))
    kept = (y != 0).all(1)
    assert torch.equal(kept, (y != 0).any(1)) and 0 < kept.sum() < 9
    assert torch.equal(y, x * kept[:, None] * 2)


def test_identity_and_edges() -> None:
    x = torch.randn(4, 3)
    assert fn.drop_path(x) is x and fn.drop_path(x, 0.5, False) is x and fn.drop_path(x, 0.0, True) is x
    assert not fn.drop_path(x, 1.0, True).any()
    assert fn.drop_path(x, 0.5, True, True) is x
    assert fn.drop_path(torch.empty(0, 3), 0.5, True).shape == (0, 3)
    with pytest.raises(RuntimeError, match=r"^drop_path: input must have shape \(N, \*\), got \[\]"):
        fn.drop_path(torch.ones(()), 0.5, True)
    with pytest.raises(ValueError, match=r"^drop_path: p must be in \[0, 1\], got nan"):
        fn.drop_path(x, math.nan, True)


def test_complex_numbers_go_to_torch() -> None:
    fastnorm.set_fallback("silent")
    x = torch.ones(64, 3, dtype=torch.complex64)
    for inplace in (False, True):
        y = fn.drop_path(x.clone(), 0.5, True, inplace)
        assert (
            y.dtype == x.dtype
            and set(y.real.unique().tolist()) == {0.0, 2.0}
            and torch.equal(y[:, :1].expand(64, 3), y)
        )


def test_module() -> None:
    assert repr(fastnorm.DropPath(0.1)) == "DropPath(p=0.1)"
    assert repr(fastnorm.DropPath(0.1, inplace=True)) == "DropPath(p=0.1, inplace=True)"
    layer = fastnorm.DropPath()
    assert layer.p == 0.0 and isinstance(layer, nn.Module) and not layer.state_dict()
    with pytest.raises(ValueError, match=r"^DropPath: p must be in \[0, 1\], got 2"):
        fastnorm.DropPath(2)
    x = torch.ones(64, 3)
    torch.manual_seed(5)
    y = fastnorm.DropPath(0.5)(x)
    torch.manual_seed(5)
    assert torch.equal(fn.drop_path(x, 0.5, True), y) and 0 < y.count_nonzero() < 192
    assert fastnorm.DropPath(0.5).eval()(x) is x
    assert fastnorm.DropPath(0.5, inplace=True)(x) is x
