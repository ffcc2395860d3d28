"""A part of ``make accuracy``: on hard inputs no op is further from float64 than torch's own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from accuracy import ALIKE, INPUTS, LARGE, LAYOUTS, SLACK, Row, accuracy_cases, rows
from cases import Case

import fastnorm.functional as fn

HARD = ("mean / std 1e+05", "scale 1e-30", "scale 1e+20", "large constant", "denormals", "one outlier of 1e30", "a NaN")
BY_NAME = {case.name: case for case in accuracy_cases()}


def hard(case: Case, *names: str) -> list[Row]:
    return list(rows([case], {name: INPUTS[name] for name in names}, draws=1))


@pytest.mark.parametrize("name", BY_NAME)
def test_no_worse_than_torch(name: str) -> None:
    worse = [row for row in hard(BY_NAME[name], *HARD) if row.worse]
    assert not worse, worse


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("name", ("batch_norm-train", "layer_norm-but-1", "group_norm-some", "instance_norm-input"))
def test_numbers_alike(name: str, shape: tuple[int, ...], layout: str) -> None:
    worse = [row for row in rows([BY_NAME[name]], ALIKE, draws=1, shape=shape, layout=layout) if row.worse]
    assert not worse, worse


CONSTANT_GRADIENTS = [
    *itertools.product(
        ("batch", "group", "instance", "layer"),
        ((16, 16, 28, 28), (64, 256, 14, 14), (64, 16, 7, 7), (4, 4, 80, 80)),
    ),
    ("group", (8, 4096, 2, 2)),  # planes of a few elements go together
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op,shape", CONSTANT_GRADIENTS, ids=str)
def test_a_constant_gradient(op: str, shape: tuple[int, ...], layout: str) -> None:
    """As that of a mean over positions: each addition to a float32 sum of it is rounded the same way.

    dbias to two units of float32, of which it had up to 11. dx, which is 0, to four units of what it is the difference
    of; torch's own has up to 1090 in these shapes.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    dims = 1 if op != "layer" else 3
    weight, bias = (torch.ones(shape[1 : 1 + dims], requires_grad=True) for _ in range(2))
    y = {
        "batch": lambda: fn.batch_norm(x, None, None, weight, bias, training=True),
        "group": lambda: fn.group_norm(x, 4, weight, bias),
        "instance": lambda: fn.instance_norm(x, None, None, weight, bias),
        "layer": lambda: fn.layer_norm(x, shape[1:], weight, bias),
    }[op]()
    dy = torch.full(shape, 0.1)
    dx, _, dbias = torch.autograd.grad(y, (x, weight, bias), dy.contiguous(memory_format=LAYOUTS[layout]))
    eps, count = torch.finfo(torch.float32).eps, x.numel() // bias.numel()
    assert (dbias.double() / (count * dy.flatten()[0].double()) - 1).abs().max() <= 2 * eps
    assert dx.abs().max() <= 4 * eps * dy.flatten()[0]


def test_an_error_is_seen() -> None:
    """Moments of E[x^2] - E[x]^2 lose every digit where the mean is far above the standard deviation; a lost NaN."""
    case = BY_NAME["layer_norm"]

    def naive(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        variance = (x * x).mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2
        return (x - x.mean(-1, keepdim=True)) / (variance.abs() + 1e-5).sqrt() * weight + bias

    worse = {row.result for row in hard(replace(case, fastnorm=naive, torch=case.fastnorm), HARD[0]) if row.worse}
    assert "y" in worse and "dx" in worse
    forgetful = replace(case, fastnorm=lambda x, *rest: case.fastnorm(x.nan_to_num(), *rest))
    lost = next(row for row in hard(forgetful, "a NaN") if row.result == "y")
    assert lost.ours == math.inf and lost.worse and lost.torchs <= SLACK


@pytest.mark.parametrize("at", (0, 700), ids=("among the first", "among the others"))
@pytest.mark.parametrize("outlier", (1e4, 1e6, 1e15))
@pytest.mark.parametrize("op", ("batch", "group", "instance", "layer"))
def test_an_outlier_among_many(op: str, outlier: float, at: int) -> None:
    """In float32 what is added to its square is rounded, and of numbers alike always the same way.

    The error of y there, from that of the variance: one unit of float32, where it was 10.
    """
    norms: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "batch": lambda x: fn.batch_norm(x, None, None, training=True),
        "group": lambda x: fn.group_norm(x, 1),
        "instance": lambda x: fn.instance_norm(x),
        "layer": lambda x: fn.layer_norm(x, x.shape[1:]),
    }
    x = torch.randn(16, 3, 30, 31, generator=torch.Generator().manual_seed(0))
    x[0, 0].view(-1)[at] = outlier
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        given = x.to(dtype)
        y = norms[op](given)[0, 0].view(-1)[at].double()
        wanted = norms[op](given.double())[0, 0].view(-1)[at]
        errors.append(abs(y / wanted - 1).item() / torch.finfo(dtype).eps)
    assert max(errors) <= 1, errors


@pytest.mark.parametrize("side", (5, 6, 7))
def test_planes_of_zeros_then_of_one_number(side: int) -> None:
    """The parts of the sum of squares that come after the zeros' are all rounded to the same place.

    The error of y there, from that of the variance: one unit of float32, where it was two.
    """
    x = torch.arange(64 * side**2).ge(4 * side**2).mul(1.2345).view(64, 1, side, side)
    y = fn.batch_norm(x, None, None, training=True).double()
    wanted = fn.batch_norm(x.double(), None, None, training=True)
    assert abs(y / wanted - 1).flatten()[0] <= 1.1 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("act", (None, "relu", "silu", "gelu"))
@pytest.mark.parametrize("count", (25, 32))
@pytest.mark.parametrize("op", ("batch", "group", "layer"))
def test_numbers_near_the_largest(op: str, count: int, act: str | None) -> None:
    """Of equal ones dx is 0, whatever the elements past the end of a last pack, which are none, come to."""
    x = torch.full((8, 4, count), 3e36, requires_grad=True)
    weight = torch.ones(count if op == "layer" else 4, requires_grad=True)
    if op == "batch":
        y = fn.batch_norm(x, None, None, weight, None, True, activation=act)
    elif op == "group":
        y = fn.group_norm(x, 2, weight, activation=act)
    else:
        y = fn.layer_norm(x, (count,), weight, activation=act)
    for gradient in torch.autograd.grad(y.sum(), (x, weight)):
        assert gradient.eq(0).all()
