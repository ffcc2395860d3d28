"""Wrong calls: the type and words of each error, and that nothing was written before it was raised."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import fastnorm
import fastnorm.functional as fn

X = partial(torch.ones, 4, 3, 5, 5)
nan = float("nan")


def bn(*args: object, **kwargs: object) -> Callable[[], Tensor]:
    """fn.batch_norm(x, mean, var, ...) with what is not given filled in."""
    x = args[0] if args else X()
    mean, var = (kwargs.pop(name, torch.zeros(3)) for name in ("mean", "var"))
    return lambda: fn.batch_norm(x, mean, var, **kwargs)


# each: a call, its exception, words of its message in their order
WRONG = {
    "rank 1": (bn(torch.ones(3)), RuntimeError, "batch_norm: input must have at least 2 dimensions"),
    "integers": (bn(X(dtype=torch.int64)), NotImplementedError, "batch_norm: no kernel for Long"),
    "complex": (bn(X(dtype=torch.complex64)), NotImplementedError, "batch_norm: no kernel for ComplexFloat"),
    "sparse": (bn(X().to_sparse()), NotImplementedError, "batch_norm: no kernel for a Sparse tensor"),
    "meta device": (bn(X(device="meta")), NotImplementedError, "batch_norm: no kernel for a Strided tensor on meta"),
    "weight's length": (bn(weight=torch.ones(4)), RuntimeError, r"weight must have shape \[3\].*got \[4\]"),
    "weight's rank": (bn(weight=torch.ones(3, 1)), RuntimeError, r"weight must have shape \[3\].*got \[3, 1\]"),
    "bias's length": (bn(bias=torch.ones(2)), RuntimeError, r"bias must have shape \[3\].*got \[2\]"),
    "weight's type": (bn(weight=torch.ones(3).double()), RuntimeError, "weight must be of type Float.*got Double"),
    "weight of low precision": (
        bn(weight=torch.ones(3).half()),
        RuntimeError,
        "weight must be of type Float.*got Half",
    ),
    "float64 weight for bfloat16": (
        bn(X(dtype=torch.bfloat16), weight=torch.ones(3).double()),
        RuntimeError,
        "weight must be of type BFloat16 or Float.*got Double",
    ),
    "weight and bias of two types": (
        bn(X(dtype=torch.bfloat16), weight=torch.ones(3), bias=torch.ones(3).bfloat16()),
        RuntimeError,
        "weight and bias must be of one type, got Float and BFloat16",
    ),
    "weight's device": (bn(weight=torch.ones(3, device="meta")), RuntimeError, "weight must be on cpu.*got meta"),
    "running_mean's length": (
        bn(mean=torch.zeros(5), training=True),
        RuntimeError,
        r"running_mean must have shape \[3\]",
    ),
    "running_var's length": (bn(var=torch.zeros(1)), RuntimeError, r"running_var must have shape \[3\].*got \[1\]"),
    "only running_mean": (bn(var=None, training=True), RuntimeError, "must be given together, got only running_mean"),
    "no statistics in eval": (bn(mean=None, var=None), RuntimeError, "must be given if training=False"),
    "strided statistics": (
        bn(mean=torch.zeros(6)[::2], training=True),
        RuntimeError,
        "running_mean and running_var must be contiguous to be updated",
    ),
    "one value a channel": (
        bn(torch.ones(1, 3, 1, 1), training=True),
        ValueError,
        "expected more than 1 value per channel",
    ),
    "one row": (bn(torch.ones(1, 3), training=True), ValueError, r"more than 1 value.*\[1, 3\]"),
    "residual's shape": (
        bn(residual=torch.ones(4, 3, 5, 4)),
        RuntimeError,
        r"residual must have input's shape.*got \[4, 3, 5, 4\]",
    ),
    "residual's type": (
        bn(residual=X(dtype=torch.float64)),
        RuntimeError,
        "residual must be of input's type Float, got Double",
    ),
    "residual's device": (bn(residual=X(device="meta")), RuntimeError, "residual must be on cpu"),
    "activation": (bn(activation="tanh"), ValueError, "activation must be None, 'relu'.*got 'tanh'"),
    "cumulative without a count": (
        bn(training=True, momentum=None),
        ValueError,
        "momentum=None.*needs num_batches_tracked",
    ),
    "count of the wrong type": (
        bn(training=True, num_batches_tracked=torch.zeros(())),
        RuntimeError,
        "num_batches_tracked must be one number of type Long",
    ),
    "not a tensor": (lambda: fn.batch_norm([1.0], None, None, training=True), AttributeError, "requires_grad"),
    "module: rank for 1d": (
        lambda: fastnorm.BatchNorm1d(3)(X()),
        ValueError,
        r"BatchNorm1d: input must have shape \(N, C\) or",
    ),
    "module: rank for 2d": (
        lambda: fastnorm.BatchNorm2d(3)(torch.ones(4, 3, 5)),
        ValueError,
        "BatchNorm2d.*got 3 dimensions",
    ),
    "module: rank for 3d": (
        lambda: fastnorm.BatchNorm3d(3)(X()),
        ValueError,
        r"BatchNorm3d: input must have shape \(N, C, D, H",
    ),
    "module: channels": (
        lambda: fastnorm.BatchNorm2d(4)(X()),
        RuntimeError,
        r"must have shape \[3\] \(input.size\(1\)\), got \[4\]",
    ),
    "module: activation": (
        lambda: fastnorm.BatchNorm2d(4, activation="elu"),
        ValueError,
        "BatchNorm2d: activation must be",
    ),
    "layer_norm: no dimension": (
        lambda: fn.layer_norm(X(), ()),
        RuntimeError,
        "normalized_shape must have at least one",
    ),
    "layer_norm: shape": (
        lambda: fn.layer_norm(X(), (7,)),
        RuntimeError,
        r"layer_norm: input must have shape \[\*, 7\].*got \[4, 3, 5, 5\]",
    ),
    "layer_norm: more dimensions than input": (
        lambda: fn.layer_norm(torch.ones(5), (5, 5)),
        RuntimeError,
        r"input must have shape \[\*, 5, 5\].*got \[5\]",
    ),
    "layer_norm: normalized_shape is a number": (lambda: fn.layer_norm(X(), 5), TypeError, "layer_norm"),
    "layer_norm: weight's shape": (
        lambda: fn.layer_norm(X(), (5, 5), torch.ones(25)),
        RuntimeError,
        r"weight must have shape \[5, 5\] \(normalized_shape\), got \[25\]",
    ),
    "layer_norm: bias's shape": (
        lambda: fn.layer_norm(X(), (5,), None, torch.ones(1)),
        RuntimeError,
        r"bias must have shape \[5\]",
    ),
    "layer_norm: weight's type": (
        lambda: fn.layer_norm(X(), (5,), torch.ones(5).double()),
        RuntimeError,
        "layer_norm: weight must be of type Float.*got Double",
    ),
    "layer_norm: weight and bias of two types": (
        lambda: fn.layer_norm(X(dtype=torch.half), (5,), torch.ones(5), torch.ones(5).half()),
        RuntimeError,
        "weight and bias must be of one type",
    ),
    "layer_norm: residual": (
        lambda: fn.layer_norm(X(), (5,), residual=torch.ones(5)),
        RuntimeError,
        "layer_norm: residual must have input's shape",
    ),
    "layer_norm: activation": (lambda: fn.layer_norm(X(), (5,), activation="tanh"), ValueError, "got 'tanh'"),
    "layer_norm: integers": (
        lambda: fn.layer_norm(X(dtype=torch.int64), (5,)),
        NotImplementedError,
        "layer_norm: no kernel for Long",
    ),
    "layer_norm: module activation": (lambda: fastnorm.LayerNorm(5, activation="elu"), ValueError, "LayerNorm: activ"),
    "rms_norm: shape": (lambda: fn.rms_norm(X(), (7,)), RuntimeError, r"rms_norm: input must have shape \[\*, 7\]"),
    "rms_norm: weight's shape": (
        lambda: fn.rms_norm(X(), (5,), torch.ones(4)),
        RuntimeError,
        r"rms_norm: weight must have shape \[5\]",
    ),
    "rms_norm: a weight that torch would promote": (
        lambda: fn.rms_norm(X(), (5,), torch.ones(5).double()),
        NotImplementedError,
        "rms_norm: no kernel for a weight of type Double",
    ),
    "rms_norm: module activation": (lambda: fastnorm.RMSNorm(5, activation="elu"), ValueError, "RMSNorm: activ"),
    "dropout: p above 1": (lambda: fn.dropout(X(), 1.5), ValueError, r"dropout: p must be in \[0, 1\], got 1.5"),
    "dropout: p below 0": (lambda: fn.dropout(X(), -0.1), ValueError, "got -0.1"),
    "dropout: p NaN": (lambda: fn.dropout(X(), nan), ValueError, "got nan"),
    "dropout: p wrong even in eval": (lambda: fn.dropout(X(), 2.0, training=False), ValueError, "got 2.0"),
    "dropout1d: rank": (lambda: fn.dropout1d(X()), RuntimeError, r"dropout1d: input must have shape \(N, C, L\)"),
    "dropout2d: rank": (lambda: fn.dropout2d(torch.ones(3)), RuntimeError, "dropout2d: input must have shape"),
    "dropout3d: p": (lambda: fn.dropout3d(X(), -1.0), ValueError, "dropout3d: p must be"),
    "dropout: integers": (lambda: fn.dropout(X(dtype=torch.int32)), NotImplementedError, "dropout: no kernel for Int"),
    "dropout: module p": (lambda: fastnorm.Dropout2d(nan), ValueError, "Dropout2d: p must be"),
    "dropout: generator": (lambda: fn.dropout(X(), generator=3), TypeError, "Generator"),
    "set_fallback": (lambda: fastnorm.set_fallback("loud"), ValueError, "set_fallback: mode must be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_message(name: str) -> None:
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    "wrong",
    [{"residual": torch.ones(1)}, {"activation": "tanh"}, {"weight": torch.ones(7)}, {"bias": torch.ones(3).double()}],
    ids=lambda w: next(iter(w)),
)
def test_statistics_are_as_they_were(wrong: dict) -> None:
    mean, var, count = torch.zeros(3), torch.ones(3), torch.tensor(0)
    with pytest.raises((RuntimeError, ValueError)):
        fn.batch_norm(X(), mean, var, training=True, num_batches_tracked=count, **wrong)
    assert not mean.any() and torch.equal(var, torch.ones(3)) and count == 0
    assert (mean._version, var._version, count._version) == (0, 0, 0)


def test_a_wrong_batch_is_not_counted() -> None:
    norm = fastnorm.BatchNorm2d(3)
    for x in (torch.ones(1, 3, 1, 1), torch.ones(2, 4, 2, 2), torch.ones(2, 3)):
        with pytest.raises((RuntimeError, ValueError)):
            norm(x)
    assert norm.num_batches_tracked == 0


def test_fallback_warns_once_for_each_op_and_reason() -> None:
    fastnorm.set_fallback("warn")
    x = torch.ones(4, 3, device="meta")
    with pytest.warns(
        fastnorm.FallbackWarning, match="dropout: no kernel for a Strided tensor on meta; using torch's own"
    ):
        fn.dropout(x)
    fn.dropout(x)  # pyproject.toml turns a second warning into an error
    fastnorm.set_fallback("silent")
    y = fn.batch_norm(torch.ones(4, 3, device="meta"), None, None, training=True, activation="relu")
    assert y.device.type == "meta"


def test_fallback_keeps_every_keyword() -> None:
    """torch's ops in place of the kernels, for forward-mode AD: value, tangent, statistics."""
    fastnorm.set_fallback("silent")
    norm = fastnorm.BatchNorm2d(3, activation="gelu", momentum=None, skip_nonfinite_stats=True)
    twin = fastnorm.BatchNorm2d(3, activation="gelu", momentum=None)
    x, residual, tangent = torch.randn(3, 4, 3, 5, 5).unbind(0)
    with torch.autograd.forward_ad.dual_level():
        y = norm(torch.autograd.forward_ad.make_dual(x, tangent), residual)
        value, derivative = torch.autograd.forward_ad.unpack_dual(y)
    torch.testing.assert_close(value, twin(x, residual))
    torch.testing.assert_close(norm.running_var, twin.running_var)
    assert norm.num_batches_tracked == 1
    h = 1e-2
    numerical = (twin(x + h * tangent, residual) - twin(x - h * tangent, residual)) / (2 * h)
    torch.testing.assert_close(derivative, numerical, rtol=1e-2, atol=1e-2)
    norm(torch.full_like(x, float("inf")))
    assert norm.running_var.isfinite().all()
