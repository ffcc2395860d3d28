"""Tensors of more than 2^31 elements in bfloat16, 4.3 GB each, forward and backward: `make slow`, 16 GB of memory.

A small tensor is repeated along one dimension, so that every part of the result is known from the small one. Each test
is one place where an index of 32 bits would wrap: many slices, one slice of more than 2^31 elements, channels_last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import reference
import torch
from cases import _seed as mask_seed
from torch import Tensor

import fastnorm.functional as fn

pytestmark = pytest.mark.slow

BEYOND = 2**31 + 2**20
# bfloat16 has 8 bits: results of other sums differ by one unit in the last place
UNIT = 2.0**-7


def repeated(small: Tensor, dim: int, channels_last: bool = False) -> Tensor:
    """More than 2^31 elements: `small`, which has one element along `dim`, again and again."""
    count = BEYOND // small.numel() + 1
    sizes = [count if d == dim else n for d, n in enumerate(small.shape)]
    if not channels_last:
        return small.expand(sizes).contiguous()
    return small.expand(sizes).movedim(1, -1).contiguous().movedim(-1, 1)


def assert_repeats(large: Tensor, small: Tensor, dim: int) -> None:
    """Every part of it, some million elements at a time, within a unit of the largest."""
    step, allowed = max(1, 2**24 // small.numel()), UNIT * small.abs().max()
    for begin in range(0, large.shape[dim], step):
        part = large.narrow(dim, begin, min(step, large.shape[dim] - begin))
        assert (part - small).abs_().max() <= allowed, f"in the slices from {begin}"


def check(run: Callable[..., Tensor], small: list[Tensor], dim: int, channels_last: bool = False) -> None:
    """run(x, *parameters) of the repeated x against that of the small one; the gradients of parameters add up."""
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(small[0].shape, generator=generator).bfloat16()
    leaves = [t.clone().requires_grad_() for t in small]
    y = run(*leaves)
    wanted = torch.autograd.grad(y, leaves, dy)

    x = repeated(small[0], dim, channels_last).requires_grad_()
    count = x.numel() // small[0].numel()
    parameters = [t.clone().requires_grad_() for t in small[1:]]
    large_y = run(x, *parameters)
    assert large_y.stride() == x.stride()
    assert_repeats(large_y.detach(), y.detach(), dim)
    large_y.untyped_storage().resize_(0)  # no op keeps its output
    dx, *others = torch.autograd.grad(large_y, [x, *parameters], repeated(dy, dim, channels_last))
    assert_repeats(dx, wanted[0], dim)
    for got, one in zip(others, wanted[1:], strict=True):
        torch.testing.assert_close(got, one * count, rtol=2 * UNIT, atol=UNIT * count)


@pytest.fixture
def numbers() -> Iterator[Callable[..., Tensor]]:
    generator = torch.Generator().manual_seed(0)
    yield lambda *shape, dtype=torch.bfloat16: torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("channels_last", (False, True))
def test_batch_norm(numbers: Callable[..., Tensor], channels_last: bool) -> None:
    tensors = [numbers(1, 64, 4096), numbers(64, dtype=torch.float32), numbers(64, dtype=torch.float32)]

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return fn.batch_norm(x, None, None, w, b, training=True, activation="relu")

    check(run, tensors, 0, channels_last)


def test_batch_norm_one_channel(numbers: Callable[..., Tensor]) -> None:
    check(lambda x: fn.batch_norm(x, None, None, training=True), [numbers(1, 1, 2**20)], 0)


@pytest.mark.parametrize("groups", (1, 8))
def test_group_norm(numbers: Callable[..., Tensor], groups: int) -> None:
    """One group: a slice beyond 2^31."""
    tensors = [numbers(1, 8, 1, 2**15), numbers(8, dtype=torch.float32), numbers(8, dtype=torch.float32)]
    check(lambda x, w, b: fn.group_norm(x, groups, w, b), tensors, 2)


def test_group_norm_channels_last(numbers: Callable[..., Tensor]) -> None:
    check(lambda x: fn.group_norm(x, 4), [numbers(1, 16, 1, 2**12)], 2, channels_last=True)


def test_instance_norm(numbers: Callable[..., Tensor]) -> None:
    check(lambda x: fn.instance_norm(x), [numbers(1, 2, 1, 2**16)], 2)


def test_layer_norm(numbers: Callable[..., Tensor]) -> None:
    tensors = [numbers(1, 2**12), numbers(2**12, dtype=torch.float32), numbers(2**12, dtype=torch.float32)]
    check(lambda x, w, b: fn.layer_norm(x, [2**12], w, b, activation="gelu"), tensors, 0)


def test_layer_norm_one_row(numbers: Callable[..., Tensor]) -> None:
    check(lambda x: fn.layer_norm(x, list(x.shape[1:])), [numbers(1, 1, 2**20)], 1)


def test_rms_norm(numbers: Callable[..., Tensor]) -> None:
    tensors = [numbers(1, 2**10), numbers(2**10, dtype=torch.float32)]
    check(lambda x, w: fn.rms_norm(x, [2**10], w), tensors, 0)


@pytest.mark.parametrize("channels_last", (False, True))
def test_local_response_norm(numbers: Callable[..., Tensor], channels_last: bool) -> None:
    check(lambda x: fn.local_response_norm(x, 5, 0.5), [numbers(1, 32, 64, 64)], 0, channels_last)


def test_local_response_norm_within_channels(numbers: Callable[..., Tensor]) -> None:
    check(lambda x: fn.local_response_norm(x, 3, 0.5, region="intra"), [numbers(1, 8, 64, 64)], 0)


def test_dropout() -> None:
    """The mask beyond 2^31 is Philox's at those counters, not what it was at the beginning."""
    x = torch.ones(BEYOND, dtype=torch.bfloat16)
    y = fn.dropout(x, 0.5, generator=torch.Generator().manual_seed(5))
    del x
    seed = mask_seed(5)
    for begin in (0, 2**31 - 2**10, 2**31, BEYOND - 2**10):
        blocks = np.arange(begin // 8, begin // 8 + 2**7, dtype=np.uint64)
        zeros = np.zeros_like(blocks)
        counter = np.stack([blocks & 0xFFFFFFFF, blocks >> 32, zeros, zeros], axis=1).astype(np.uint32)
        words = reference.philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32), reference.DROPOUT_ROUNDS)
        keep = np.stack([words & 0xFFFF, words >> 16], axis=2).reshape(-1) >= reference.dropout_threshold(0.5)
        assert torch.equal(y[begin : begin + 2**10].float(), 2.0 * torch.from_numpy(keep))


@pytest.mark.parametrize("rows", (1, 64))
def test_drop_path_and_channels(rows: int) -> None:
    x = torch.ones(rows, BEYOND // rows, dtype=torch.bfloat16)
    y = fn.drop_path(x, 0.5, True, generator=torch.Generator().manual_seed(6))
    keep = reference.dropout_keep(rows, 0.5, mask_seed(6))
    assert torch.equal(y[:, -1].float(), 2.0 * keep) and torch.equal(y[:, 0], y[:, -1])
    assert torch.equal(y.amin(1), y.amax(1))
