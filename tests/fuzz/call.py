"""One call of an op: what it is given, what it should give, and how far from that it may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .tensors import Strides


@dataclass
class Bounds:
    """Of each number, the size of the terms it is made of: its rounding errors are some units of these.

    `doubtful` marks the elements so near an activation's corner that rounding decides which slope they get.
    """

    y: Tensor
    gradients: list[Tensor]
    doubtful: Tensor | None = None


@dataclass
class Call:
    setting: str  # for the message of a failure
    run: Callable[..., Tensor]  # of the tensors below
    reference: Callable[..., Tensor]  # of their float64 copies
    bounds: Callable[[Sequence[Tensor], Tensor], Bounds]  # of the copies and dy; dy is not to be used for `doubtful`
    tensors: dict[str, Tensor]
    wanted: list[str]  # which of them want a gradient
    dy: Tensor
    dy_strides: Strides
    keeps_layout: bool = True
    # name, value after the call, its float64 reference, its terms
    after: Callable[[], list[tuple[str, Tensor, Tensor, Tensor]]] = field(default=list)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints of a failing call: its tensors follow from the seed."""
        printer.text(self.setting)


# Units of the arithmetic's precision. The constant covers the few roundings of each formula and the sums' own, which
# grow with the number of the terms that are added one after another.
UNITS = {torch.float64: 64.0, torch.float32: 16.0}


def check(call: Call) -> None:
    """Raises AssertionError if a result is wrong, or anything was written that must not be."""
    leaves = {name: t.requires_grad_(name in call.wanted) for name, t in call.tensors.items()}
    before = [t.detach().clone() for t in leaves.values()]
    exact = [t.detach().double().requires_grad_(name in call.wanted) for name, t in leaves.items()]

    dy = call.dy_strides.lay(call.dy)
    if call.wanted and call.dy.numel() > 0:
        doubtful = call.bounds([t.detach() for t in exact], dy.double()).doubtful
        if doubtful is not None and doubtful.any():
            dy = call.dy_strides.lay(torch.where(doubtful.any(), dy.masked_fill(doubtful, 0.0), dy))
            if call.dy_strides.expanded is not None:  # the whole line of an expanded dimension, so that it stays one
                line = doubtful.any(call.dy_strides.expanded, keepdim=True).expand_as(dy)
                dy = call.dy_strides.lay(call.dy.masked_fill(line, 0.0))

    y = call.run(*leaves.values())
    wanted_y = call.reference(*exact)
    bounds = call.bounds([t.detach() for t in exact], dy.double())
    x = next(iter(leaves.values()))
    assert y.dtype == x.dtype, f"{call.setting}: y is {y.dtype}"
    if not call.keeps_layout:
        assert y.is_contiguous(), f"{call.setting}: y has strides {y.stride()}"
    _compare(call, "y", y.detach(), wanted_y.detach(), bounds.y)
    for name, got, wanted, terms in call.after():
        _compare(call, name, got, wanted, terms)

    assert y.requires_grad == bool(call.wanted), f"{call.setting}: y.requires_grad is {y.requires_grad}"
    if call.wanted:
        wanted_leaves = [leaves[name] for name in call.wanted]
        gradients = torch.autograd.grad(y, wanted_leaves, dy, retain_graph=True)
        over_dy = torch.autograd.grad(y * 1, wanted_leaves, dy)  # from a gradient that nobody else holds
        for name, got, same in zip(call.wanted, gradients, over_dy, strict=True):
            assert torch.equal(got, same), f"{call.setting}: the gradient of {name} is another, written over dy"
        by_name = dict(zip(leaves, exact, strict=True))
        references = torch.autograd.grad(
            wanted_y, [by_name[name] for name in call.wanted], dy.double(), materialize_grads=True
        )
        terms = dict(zip(leaves, bounds.gradients, strict=True))
        for name, got, wanted in zip(call.wanted, gradients, references, strict=True):
            assert got.dtype == leaves[name].dtype, f"{call.setting}: the gradient of {name} is {got.dtype}"
            _compare(call, f"the gradient of {name}", got, wanted, terms[name])
    for (name, t), old in zip(leaves.items(), before, strict=True):
        assert torch.equal(t, old), f"{call.setting}: {name} was written"


def _compare(call: Call, name: str, got: Tensor, wanted: Tensor, terms: Tensor) -> None:
    """Within half a unit of the result's type (that it is rounded to) and UNITS of the arithmetic's type."""
    assert got.shape == wanted.shape, f"{call.setting}: {name} has shape {list(got.shape)}, not {list(wanted.shape)}"
    if got.numel() == 0:
        return
    info, arithmetic = torch.finfo(got.dtype), torch.float64 if got.dtype == torch.float64 else torch.float32
    own = UNITS[arithmetic] * torch.finfo(arithmetic).eps * terms
    allowed = 0.5 * info.eps * (wanted.abs() + own) + own + info.smallest_normal * info.eps
    wrong = ~((got.double() - wanted).abs() <= allowed) & (wanted.abs() < info.max / 2)
    if wrong.any():
        first = tuple(int(i) for i in wrong.nonzero()[0])
        share = ((got.double() - wanted).abs() / allowed).nan_to_num(math.inf)[wrong].max().item()
        raise AssertionError(
            f"{call.setting}: {name}{list(first)} is {got[first].item()!r}, should be {wanted[first].item()!r} within "
            f"{allowed[first].item():.3g}; {int(wrong.sum())} of {got.numel()} are wrong, by up to {share:.3g} bounds"
        )
