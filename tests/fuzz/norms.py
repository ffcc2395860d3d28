"""Calls of the normalisations that have a weight, a bias, a residual and an activation."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import reference
import torch
from hypothesis import strategies as st
from torch import Tensor

import fastnorm.functional as fn

from .bounds import Affine, Slices, named, norm_bounds
from .call import Call
from .tensors import Numbers, choice, dtypes, number, parameter_types, scales, seeds, shapes, strides, yes_or_no

ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "gelu")
EPSILONS = (1e-5, 1e-3, 1e-8, 0.5)


@cache
@st.composite
def _arguments(draw: st.DrawFn, ranks: tuple[int, int], has_bias: bool = True) -> dict[str, Any]:
    """What every normalisation is given; the parameters' shapes are the op's own business."""
    shape = draw(shapes(ranks))
    dtype = draw(dtypes)
    optional = [n for n in ("weight", "bias", "residual") if draw(yes_or_no) and (has_bias or n != "bias")]
    names = ["x", *optional]
    return {
        "shape": shape,
        "dtype": dtype,
        "parameter_type": draw(parameter_types(dtype)),
        "names": names,
        "wanted": [n for n in names if draw(yes_or_no)],
        "act": draw(choice(*ACTIVATIONS)),
        "eps": draw(choice(*EPSILONS)),
        "scale": draw(scales),
        "x_strides": draw(strides(len(shape))),
        "residual_strides": draw(strides(len(shape))),
        "dy_strides": draw(strides(len(shape))),
        "numbers": Numbers(draw(seeds)),
    }


def _tensors(a: dict[str, Any], parameter_shape: tuple[int, ...]) -> dict[str, Tensor]:
    numbers, made = a["numbers"], {}
    for name in a["names"]:
        if name == "x":
            made[name] = a["x_strides"].lay(numbers.normal(a["shape"], a["dtype"], a["scale"]))
        elif name == "residual":
            made[name] = a["residual_strides"].lay(numbers.normal(a["shape"], a["dtype"]))
        else:
            made[name] = numbers.normal(parameter_shape, a["parameter_type"])
    return made


def _call(
    op: str,
    a: dict[str, Any],
    tensors: dict[str, Tensor],
    run: Callable[[dict[str, Tensor]], Tensor],
    run_reference: Callable[[dict[str, Tensor]], Tensor],
    slices: Slices,
    fixed: Affine | Callable[[Tensor], Affine] | None = None,
    more: str = "",
    **rest: Any,
) -> Call:
    names = list(tensors)
    arithmetic = torch.float64 if a["dtype"] == torch.float64 else torch.float32

    def bounds(exact: list[Tensor], dy: Tensor):
        given = fixed(exact[0]) if callable(fixed) else fixed or Affine()
        mean_taken = op != "rms_norm"
        return norm_bounds(named(names, exact), dy, slices, a["act"], a["eps"], given, arithmetic, mean_taken)

    x = tensors["x"]
    described = (
        f"{op}(shape={list(x.shape)}, strides={list(x.stride())}, {x.dtype}, {names}, {a['act']}, {a['eps']}{more})"
    )
    return Call(
        setting=described,
        run=lambda *leaves: run(named(names, leaves)),
        reference=lambda *exact: run_reference(named(names, exact)),
        bounds=bounds,
        tensors=tensors,
        wanted=a["wanted"],
        dy=a["numbers"].normal(tuple(x.shape), a["dtype"]),
        dy_strides=a["dy_strides"],
        keeps_layout=op not in ("layer_norm", "rms_norm"),
        **rest,
    )


def _keywords(a: dict[str, Any], t: dict[str, Tensor]) -> dict[str, Any]:
    return {"eps": a["eps"], "residual": t.get("residual"), "activation": a["act"]}


def _exactly(a: dict[str, Any], t: dict[str, Tensor]) -> dict[str, Any]:
    """The references' arguments but for x and the statistics."""
    keywords = {name: t.get(name) for name in ("weight", "bias", "residual")}
    return {**keywords, "eps": a["eps"], "act": a["act"]}


def _channel(v: Tensor, rank: int) -> Tensor:
    return v.view([1, -1] + [1] * (rank - 2))


def _running(draw: st.DrawFn, a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    dtype = draw(parameter_types(a["dtype"]))
    C = a["shape"][1]
    return a["numbers"].normal((C,), dtype, a["scale"]), a["numbers"].positive((C,), dtype)


def _after(
    a: dict[str, Any], x: Tensor, momentum: float, running: tuple[Tensor, Tensor], by_sample: bool
) -> Callable[[], list[tuple[str, Tensor, Tensor, Tensor]]]:
    """The running statistics and their reference; those of samples are averaged."""
    old = [t.double().clone() for t in running]
    exact = x.detach().double().clone()

    def compare() -> list[tuple[str, Tensor, Tensor, Tensor]]:
        parts = [exact] if not by_sample else exact.split(1)
        if exact.numel() == 0:
            new = old
        else:
            each = [reference.running_statistics(part, *old, momentum) for part in parts]
            new = [sum(values) / len(parts) for values in zip(*each, strict=True)]
        largest = exact.abs().amax([d for d in range(exact.dim()) if d != 1]) if exact.numel() else old[0].abs()
        return [
            ("running_mean", running[0], new[0], old[0].abs() + largest),
            ("running_var", running[1], new[1], old[1].abs() + new[1].abs() + largest),
        ]

    return compare


@st.composite
def batch_norm(draw: st.DrawFn) -> Call:
    a = draw(_arguments((2, 5)))
    shape, rank = a["shape"], len(a["shape"])
    training = draw(yes_or_no) and math.prod(shape) != shape[1]
    momentum = draw(choice(0.1, 0.0, 1.0, 0.37))
    running = _running(draw, a) if not training or draw(yes_or_no) else (None, None)
    given = tuple(None if t is None else t.double().clone() for t in running)
    t = _tensors(a, (shape[1],))
    fixed = None if training else Affine(_channel(given[0], rank), (_channel(given[1], rank) + a["eps"]).rsqrt())
    return _call(
        "batch_norm", a, t,
        lambda t: fn.batch_norm(
            t["x"], *running, t.get("weight"), t.get("bias"), training, momentum, **_keywords(a, t)
        ),
        lambda t: reference.batch_norm(t["x"], statistics=None if training else given, **_exactly(a, t)),
        Slices(shape, tuple(d for d in range(rank) if d != 1), (1, shape[1], *[1] * (rank - 2))),
        fixed,
        more=f", training={training}, momentum={momentum}",
        after=_after(a, t["x"], momentum, running, False) if training and running[0] is not None else list,
    )  # fmt: skip


@st.composite
def batch_renorm(draw: st.DrawFn) -> Call:
    a = draw(_arguments((2, 5)))
    shape, rank = a["shape"], len(a["shape"])
    if math.prod(shape) == shape[1]:
        shape = a["shape"] = (2, *shape[1:])
    r_max, d_max = draw(choice((3.0, 5.0), (1.0, 0.0), (1.5, 0.25), (1.0, 2.0)))
    momentum = draw(choice(0.1, 0.0, 1.0))
    running = _running(draw, a)
    given = tuple(t.double().clone() for t in running)
    t = _tensors(a, (shape[1],))
    dims = tuple(d for d in range(rank) if d != 1)

    def fixed(x: Tensor) -> Affine:
        """r and d, which are constants in backward."""
        mean = x.mean(dims, keepdim=True)
        sigma = ((x - mean).square().mean(dims, keepdim=True) + a["eps"]).sqrt()
        running_sigma = (_channel(given[1], rank) + a["eps"]).sqrt()
        r = (sigma / running_sigma).clamp(1 / r_max, r_max)
        running_mean = _channel(given[0], rank)
        d = ((mean - running_mean) / running_sigma).clamp(-d_max, d_max)
        size = (mean.abs() + running_mean.abs()) / running_sigma if d_max > 0 else 0.0
        return Affine(scale=r, shift=d, size=size)

    return _call(
        "batch_renorm", a, t,
        lambda t: fn.batch_renorm(
            t["x"], *running, t.get("weight"), t.get("bias"), True, momentum,
            r_max=r_max, d_max=d_max, **_keywords(a, t),
        ),
        lambda t: reference.batch_renorm(t["x"], statistics=given, r_max=r_max, d_max=d_max, **_exactly(a, t)),
        Slices(shape, dims, (1, shape[1], *[1] * (rank - 2))),
        fixed,
        more=f", r_max={r_max}, d_max={d_max}, momentum={momentum}",
        after=_after(a, t["x"], momentum, running, False),
    )  # fmt: skip


def _group_slices(shape: tuple[int, ...], groups: int) -> Slices:
    N, C, S = shape[0], shape[1], math.prod(shape[2:])
    return Slices((N, groups, C // max(1, groups), S), (2, 3), (1, groups, C // max(1, groups), 1))


@st.composite
def group_norm(draw: st.DrawFn) -> Call:
    a = draw(_arguments((2, 5)))
    shape = a["shape"]
    groups = draw(choice(*[g for g in range(1, shape[1] + 1) if shape[1] % g == 0] or [1]))
    if math.prod(shape) == groups:  # one value in a group of one sample is an error
        shape = a["shape"] = (2, *shape[1:])
    t = _tensors(a, (shape[1],))
    return _call(
        "group_norm", a, t,
        lambda t: fn.group_norm(t["x"], groups, t.get("weight"), t.get("bias"), **_keywords(a, t)),
        lambda t: reference.group_norm(t["x"], groups, **_exactly(a, t)),
        _group_slices(shape, groups),
        more=f", groups={groups}",
    )  # fmt: skip


@st.composite
def instance_norm(draw: st.DrawFn) -> Call:
    a = draw(_arguments((3, 5)))
    shape, rank = a["shape"], len(a["shape"])
    input_stats = draw(yes_or_no)
    if math.prod(shape[2:]) == 1:
        shape = a["shape"] = (*shape[:2], 2, *shape[3:])
    momentum = draw(choice(0.1, 0.0, 1.0))
    running = _running(draw, a) if not input_stats or draw(yes_or_no) else (None, None)
    given = tuple(None if t is None else t.double().clone() for t in running)
    t = _tensors(a, (shape[1],))
    fixed = None if input_stats else Affine(_channel(given[0], rank), (_channel(given[1], rank) + a["eps"]).rsqrt())

    def run_reference(t: dict[str, Tensor]) -> Tensor:
        if input_stats:
            return reference.group_norm(t["x"], shape[1], **_exactly(a, t))
        return reference.batch_norm(t["x"], statistics=given, **_exactly(a, t))

    if input_stats:
        slices = _group_slices(shape, shape[1])
    else:
        slices = Slices(shape, tuple(d for d in range(rank) if d != 1), (1, shape[1], *[1] * (rank - 2)))
    return _call(
        "instance_norm", a, t,
        lambda t: fn.instance_norm(
            t["x"], *running, t.get("weight"), t.get("bias"), input_stats, momentum, **_keywords(a, t)
        ),
        run_reference,
        slices,
        fixed,
        more=f", use_input_stats={input_stats}, momentum={momentum}",
        after=_after(a, t["x"], momentum, running, True) if input_stats and running[0] is not None else list,
    )  # fmt: skip


@st.composite
def _row_norm(draw: st.DrawFn, op: str) -> Call:
    layer = op == "layer_norm"
    a = draw(_arguments((1, 5), layer))
    shape = a["shape"]
    dims = draw(number(1, len(shape)))
    rows = shape[len(shape) - dims :]
    t = _tensors(a, rows)

    def run(t: dict[str, Tensor]) -> Tensor:
        if layer:
            return fn.layer_norm(t["x"], rows, t.get("weight"), t.get("bias"), **_keywords(a, t))
        return fn.rms_norm(t["x"], rows, t.get("weight"), **_keywords(a, t))

    M, N = math.prod(shape[: len(shape) - dims]), math.prod(rows)
    return _call(
        op, a, t,
        run,
        lambda t: reference.row_norm(t["x"], dims, subtract_mean=layer, **_exactly(a, t)),
        Slices((M, N), (1,), (1, N)),
        more=f", normalized_shape={list(rows)}",
    )  # fmt: skip


layer_norm = _row_norm("layer_norm")
rms_norm = _row_norm("rms_norm")
