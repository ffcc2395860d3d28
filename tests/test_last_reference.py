"""Backward writes dx over dy where the engine alone has it, else over nothing (last_reference_or_empty, tensors.h)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from test_ops import channels_last
from torch import Tensor

import fastnorm.functional as fn

Peak = Callable[[Callable[[], Any], str], int]

SHAPE = (8, 32, 31, 33)  # a megabyte of float32

# (x, residual) -> y; a residual's gradient is a tensor of its own where there is an activation
OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "batch_norm": lambda x, r: fn.batch_norm(x, None, None, training=True),
    "batch_norm-eval-relu": lambda x, r: fn.batch_norm(x, *statistics(), activation="relu"),
    "batch_norm-residual-relu": lambda x, r: fn.batch_norm(x, None, None, training=True, residual=r, activation="relu"),
    "batch_norm-residual-silu": lambda x, r: fn.batch_norm(x, None, None, training=True, residual=r, activation="silu"),
    "group_norm": lambda x, r: fn.group_norm(x, 4),
    "group_norm-gelu": lambda x, r: fn.group_norm(x, 4, activation="gelu"),
    "instance_norm-residual-relu": lambda x, r: fn.instance_norm(x, residual=r, activation="relu"),
    "layer_norm": lambda x, r: fn.layer_norm(x, x.shape[-1:]),
    "rms_norm-residual-silu": lambda x, r: fn.rms_norm(x, x.shape[-2:], residual=r, activation="silu"),
    "dropout": lambda x, r: fn.dropout(x, 0.5, generator=torch.Generator().manual_seed(1)),
    "dropout2d": lambda x, r: fn.dropout2d(x, 0.5, generator=torch.Generator().manual_seed(1)),
    "alpha_dropout": lambda x, r: fn.alpha_dropout(x, 0.5, True, generator=torch.Generator().manual_seed(1)),
}
every_op = pytest.mark.parametrize("op", OPS)
every_layout = pytest.mark.parametrize("layout", (torch.clone, channels_last), ids=("contiguous", "channels_last"))


@pytest.fixture
def peak_bytes(monkeypatch: pytest.MonkeyPatch) -> Peak:
    """That of benchmarks/, which does not travel with an installation's tests."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    return pytest.importorskip("memory").peak_bytes


def statistics() -> tuple[Tensor, Tensor]:
    return torch.zeros(SHAPE[1]), torch.ones(SHAPE[1])


def tensors(layout: Callable[[Tensor], Tensor] = torch.clone) -> tuple[Tensor, Tensor, Tensor]:
    """x, a residual and dy."""
    generator = torch.Generator().manual_seed(0)
    x, residual, dy = (layout(torch.randn(SHAPE, generator=generator)) for _ in range(3))
    return x.requires_grad_(), residual.requires_grad_(), dy


def gradients(y: Tensor, leaves: tuple[Tensor, Tensor], dy: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(y, leaves, dy, allow_unused=True, retain_graph=True))


def assert_same(got: list[Tensor | None], wanted: list[Tensor | None]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


@pytest.mark.parametrize(
    ("op", "layout"),
    [(op, torch.clone) for op in OPS]
    + [(op, channels_last) for op in OPS if not op.startswith(("layer", "rms"))],  # these read copies of their own
)
def test_dx_takes_no_memory_of_its_own(op: str, layout: Callable[[Tensor], Tensor], peak_bytes: Peak) -> None:
    x, residual, dy = tensors(layout)
    y = OPS[op](x, residual) * 1  # whose backward makes dy anew
    leaves = tuple(t for t in (x, residual) if t is x or "residual" in op)
    most = peak_bytes(lambda: gradients(y, leaves, dy), "cpu")
    one = x.numel() * x.element_size()
    assert len(leaves) * one <= most < (len(leaves) + 0.3) * one  # dy, and dresidual; 0.3 for statistics


@pytest.mark.parametrize("op", ("batch_norm", "layer_norm", "dropout"))
def test_where_a_copy_of_dy_was_due_it_is_written_over(op: str, peak_bytes: Peak) -> None:
    """Of a gradient that does not lie as kernels read it: the copy, not dy."""
    x, residual, dy = tensors()
    expanded = dy[:, :, :1, :1].expand(SHAPE)
    y = OPS[op](x, residual)
    most = peak_bytes(lambda: gradients(y, (x,), expanded), "cpu")
    assert most < 1.3 * x.numel() * x.element_size()
    assert_same(gradients(y, (x,), expanded), gradients(y, (x,), expanded.contiguous()))


@every_layout
@every_op
def test_what_a_caller_holds_is_not_written(op: str, layout: Callable[[Tensor], Tensor]) -> None:
    x, residual, dy = tensors(layout)
    before = dy.clone()
    y = OPS[op](x, residual)
    wanted = gradients(y, (x, residual), dy)
    assert torch.equal(dy, before)
    assert_same(gradients(y, (x, residual), dy), wanted)

    of_numpy = before.numpy().copy()
    assert_same(gradients(y, (x, residual), torch.from_numpy(of_numpy)), wanted)
    assert numpy.array_equal(of_numpy, before.numpy())


@every_layout
@every_op
def test_what_hooks_hold_is_not_written(op: str, layout: Callable[[Tensor], Tensor]) -> None:
    """A tensor's own gradient, a hook on it, and one after its node, each with a gradient that the engine has made."""
    x, residual, dy = tensors(layout)
    y = OPS[op](x, residual)
    wanted = gradients(y, (x, residual), dy)

    y = OPS[op](x, residual)
    y.retain_grad()
    assert_same(gradients(y * 1, (x, residual), dy), wanted)
    assert y.grad is not None and torch.equal(y.grad, dy)

    seen: list[Tensor] = []
    y = OPS[op](x, residual)
    y.register_hook(seen.append)
    assert_same(gradients(y * 1, (x, residual), dy), wanted)

    y = OPS[op](x, residual)
    y.grad_fn.register_hook(lambda inputs, outputs: seen.extend(outputs))
    assert_same(gradients(y * 1, (x, residual), dy), wanted)

    y = OPS[op](x, residual)
    flat = y.view_as(y)  # whose gradient is another tensor on the same memory
    got = torch.autograd.grad(flat * 1, (x, residual, flat), dy, allow_unused=True)
    assert_same(list(got), [*wanted, dy])

    y = OPS[op](x, residual)
    assert_same(list(torch.autograd.grad(y * 1, (x, residual, y), dy, allow_unused=True)), [*wanted, dy])
    assert len(seen) == 2 and all(torch.equal(t, dy) for t in seen)


@every_layout
@every_op
def test_a_gradient_of_two_is_not_written(op: str, layout: Callable[[Tensor], Tensor]) -> None:
    """An addition hands both of its terms the one tensor; a concatenation's terms have parts of one."""
    x, residual, dy = tensors(layout)
    y = OPS[op](x, residual)
    wanted = gradients(y, (x, residual), dy)
    other = x.detach().clone().requires_grad_()
    for first, second in ((0, 1), (1, 0)):
        both = (OPS[op](x, residual), other.sin())
        got = torch.autograd.grad((both[first] + both[second]) * 1, (x, residual, other), dy, allow_unused=True)
        assert_same(list(got[:2]), wanted)
        assert torch.equal(got[2], dy * other.cos())

    for dim in (None, 0, 1):
        ys = OPS[op](x, residual), OPS[op](other, residual.detach())
        joined, d = (ys[0] + ys[1], dy) if dim is None else (torch.cat(ys, dim), torch.cat((dy, dy), dim))
        got = torch.autograd.grad(joined * 1, (x, residual, other), d, allow_unused=True)
        assert_same(list(got[:2]), wanted)
        assert torch.equal(got[2], got[0])


class From(torch.autograd.Function):
    """The gradient is what a function says."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gradient: Callable[[], Tensor]) -> Tensor:
        ctx.gradient = gradient
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient(), None


@every_op
def test_memory_of_others_is_not_written(op: str) -> None:
    """Of numpy, whose array torch's tensor does not count as a reference."""
    x, residual, dy = tensors()
    wanted = gradients(OPS[op](x, residual), (x, residual), dy)
    array = dy.numpy().copy()
    y = From.apply(OPS[op](x, residual), lambda: torch.from_numpy(array))
    assert_same(gradients(y, (x, residual), dy), wanted)
    assert numpy.array_equal(array, dy.numpy())


@every_op
def test_dx_is_a_gradient_and_no_more(op: str) -> None:
    """Neither one with a history nor all the memory of which dy was a part."""
    x, residual, dy = tensors()
    wanted = gradients(OPS[op](x, residual), (x,), dy)

    def with_history() -> Tensor:
        with torch.enable_grad():
            return dy.clone().requires_grad_() * 1

    got = gradients(From.apply(OPS[op](x, residual), with_history), (x,), dy)
    assert_same(got, wanted)
    assert got[0] is not None and not got[0].requires_grad

    def part() -> Tensor:
        both = torch.cat((dy, dy))
        return torch.empty(0).set_(both.untyped_storage(), 0, dy.shape, dy.stride())

    got = gradients(From.apply(OPS[op](x, residual), part), (x,), dy)
    assert_same(got, wanted)
    assert got[0] is not None and got[0].untyped_storage().nbytes() == x.numel() * x.element_size()


@pytest.mark.parametrize("training", (True, False))
def test_a_residual_that_has_dy_for_its_gradient(training: bool) -> None:
    """Without an activation: dx must not be written over it."""
    x, residual, dy = tensors()
    ops: list[Callable[[], Tensor]] = [
        lambda: fn.batch_norm(x, *statistics(), training=training, residual=residual),
        lambda: fn.group_norm(x, 4, residual=residual),
        lambda: fn.layer_norm(x, SHAPE[-1:], residual=residual),
        lambda: fn.instance_norm(x, residual=residual),
    ]
    for op in ops:
        wanted = gradients(op(), (x, residual), dy)
        got = gradients(op() * 1, (x, residual), dy)
        assert_same(got, wanted)
        assert got[1] is not None and torch.equal(got[1], dy)


@every_op
def test_under_create_graph_dy_is_an_input(op: str) -> None:
    x, residual, dy = tensors()
    dy.requires_grad_()
    (dx,) = torch.autograd.grad(OPS[op](x, residual) * 1, (x,), dy, create_graph=True)
    before = dx.detach().clone()
    torch.autograd.grad(dx, (dy,), dx.detach())
    (again,) = torch.autograd.grad(OPS[op](x, residual), (x,), dy.detach())
    torch.testing.assert_close(before, again)


@every_op
def test_a_chain_is_one_tensor_through_and_through(op: str, peak_bytes: Peak) -> None:
    """dx of one layer is the dy that the layer before it writes over; x.grad is then that memory, and x is not."""
    x, residual, dy = tensors()
    y = x
    for _ in range(3):
        y = OPS[op](y, residual.detach())
    wanted = gradients(y, (x,), dy)
    chain = y * 1
    most = peak_bytes(lambda: gradients(chain, (x,), dy), "cpu")
    assert most < 1.5 * x.numel() * x.element_size()
    values = x.detach().clone()
    chain.backward(dy)
    assert_same([x.grad], wanted)
    assert torch.equal(x, values)
