"""Wrong calls: the type and words of each error, and that nothing was written before it was raised."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_path import by_torch

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
    "integers": (bn(X(dtype=torch.int64)), NotImplementedError, "batch_norm: no kernel for input of type Long"),
    "complex": (
        bn(X(dtype=torch.complex64)),
        NotImplementedError,
        "batch_norm: no kernel for input of type ComplexFloat",
    ),
    "sparse": (
        bn(X().to_sparse()),
        NotImplementedError,
        "batch_norm: no kernel for input of layout Sparse, wanted Strided",
    ),
    "meta device": (bn(X(device="meta")), NotImplementedError, "batch_norm: no kernel for input on meta, wanted cpu"),
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
        NotImplementedError,
        "batch_norm: no kernel that updates running statistics which are not contiguous",
    ),
    "one value a channel": (
        bn(torch.ones(1, 3, 1, 1), training=True),
        ValueError,
        "expected more than 1 value per channel",
    ),
    "one row": (bn(torch.ones(1, 3), training=True), ValueError, r"more than 1 value.*\[1, 3\]"),
    "sparse weight": (
        bn(weight=torch.ones(3).to_sparse()),
        RuntimeError,
        "batch_norm: weight must be a strided tensor, got Sparse",
    ),
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
    "count of another type": (
        bn(training=True, num_batches_tracked=torch.zeros(())),
        NotImplementedError,
        "batch_norm: no kernel for num_batches_tracked of type Float, wanted Long",
    ),
    "several counts": (
        bn(training=True, num_batches_tracked=torch.zeros(3, dtype=torch.int64)),
        RuntimeError,
        r"num_batches_tracked must be one number, got shape \[3\]",
    ),
    "not a tensor": (
        lambda: fn.batch_norm([1.0], None, None, training=True),
        TypeError,
        "batch_norm: input must be a Tensor, got list",
    ),
    "eps of 0 in training": (
        bn(training=True, eps=0),
        ValueError,
        "batch_norm: eps must be positive in training, got 0",
    ),
    "eps below 0": (bn(eps=-1e-5), ValueError, "batch_norm: eps must be at least 0, got -1e-05"),
    "module: eps of 0 in training": (
        lambda: fastnorm.BatchNorm2d(3, eps=0.0)(X()),
        ValueError,
        "batch_norm: eps must be positive in training, got 0.0",
    ),
    "batch_renorm: eps of 0 in training": (
        lambda: fastnorm.BatchRenorm2d(3, eps=0.0)(X()),
        ValueError,
        "batch_renorm: eps must be positive in training",
    ),
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
        "layer_norm: no kernel for input of type Long",
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
    "rms_norm: not a tensor": (
        lambda: fastnorm.RMSNorm(5)(None),
        TypeError,
        "rms_norm: input must be a Tensor, got NoneT",
    ),
    "rms_norm: weight not a tensor": (
        lambda: fn.rms_norm(X(), (5,), "w"),
        TypeError,
        "^rms_norm: weight must be a Tensor or None, got str$",
    ),
    "batch_norm: residual no tensor": (
        lambda: fastnorm.BatchNorm2d(3)(torch.randn(2, 3, 4, 4), residual=1),
        TypeError,
        "^batch_norm: residual must be a Tensor or None, got int$",
    ),
    "batch_renorm: residual no tensor": (
        lambda: fastnorm.BatchRenorm2d(3)(torch.randn(2, 3, 4, 4), residual=1),
        TypeError,
        "^batch_renorm: residual must be a Tensor or None, got int$",
    ),
    "instance_norm: unbatched, residual no tensor": (
        lambda: fastnorm.InstanceNorm2d(3)(torch.randn(3, 8, 8), residual=1),
        TypeError,
        "^instance_norm: residual must be a Tensor or None, got int$",
    ),
    "layer_norm: eps no number": (
        lambda: fastnorm.LayerNorm(3, eps="a")(torch.randn(2, 3)),
        TypeError,
        "^layer_norm: eps must be a float, got str$",
    ),
    "group_norm: groups no integer": (
        lambda: fn.group_norm(torch.randn(2, 3, 4), 1.5),
        TypeError,
        "^group_norm: num_groups must be an int, got float$",
    ),
    "activation no name": (
        lambda: fastnorm.BatchNorm2d(3, activation=["relu"]),
        ValueError,
        "activation must be None or one of",
    ),
    "InstanceNorm: unbatched residual": (
        lambda: fastnorm.InstanceNorm2d(3)(torch.randn(3, 8, 8), residual=torch.randn(4, 3, 8, 8)),
        RuntimeError,
        r"residual must have input's shape \[3, 8, 8\], got \[4, 3, 8, 8\]",
    ),
    "convert: skip a class": (
        lambda: fastnorm.convert(nn.Sequential(nn.BatchNorm2d(3)), skip=nn.BatchNorm2d),
        TypeError,
        "convert: skip must be names or a function of name and module, got the class BatchNorm2d",
    ),
    **{
        f"{function}: no module": (
            lambda function=function: getattr(fastnorm, function)(torch.relu),
            TypeError,
            f"^{op}: model must be a torch.nn.Module, got builtin_function_or_method$",
        )
        for function, op in (
            ("convert", "convert"),
            ("revert", "revert"),
            ("conversion_report", "convert"),
            ("fuse", "fuse"),
            ("fold_batch_norm", "fold_batch_norm"),
        )
    },
    "fuse: a class": (
        lambda: fastnorm.fuse(nn.BatchNorm2d),
        TypeError,
        "^fuse: model must be a torch.nn.Module, got the class BatchNorm2d$",
    ),
    **{
        f"{kind}: eps {got}": (
            lambda kind=kind, eps=eps, got=got: getattr(fastnorm, kind)(3, eps=eps)(torch.randn(2, 3, 4, 4)),
            TypeError,
            f"^{op}: eps must be a float, got {got}$",
        )
        for kind, op in (("BatchNorm2d", "batch_norm"), ("BatchRenorm2d", "batch_renorm"))
        for eps, got in (("1e-5", "str"), (None, "NoneType"))
    },
    "batch_norm: eps no number": (
        lambda: fn.batch_norm(torch.randn(2, 3, 4, 4), None, None, training=True, eps="1e-5"),
        TypeError,
        "^batch_norm: eps must be a float, got str$",
    ),
    "batch_norm: integer eps of 0": (
        lambda: fn.batch_norm(torch.randn(2, 3, 4, 4), None, None, training=True, eps=0),
        ValueError,
        "^batch_norm: eps must be positive in training, got 0$",
    ),
    "rms_norm: module activation": (lambda: fastnorm.RMSNorm(5, activation="elu"), ValueError, "RMSNorm: activ"),
    "dropout: p above 1": (lambda: fn.dropout(X(), 1.5), ValueError, r"dropout: p must be in \[0, 1\], got 1.5"),
    "dropout: p below 0": (lambda: fn.dropout(X(), -0.1), ValueError, "got -0.1"),
    "dropout: p NaN": (lambda: fn.dropout(X(), nan), ValueError, "got nan"),
    "dropout: p wrong even in eval": (lambda: fn.dropout(X(), 2.0, training=False), ValueError, "got 2.0"),
    "dropout: not a tensor": (
        lambda: fastnorm.Dropout()([1.0]),
        TypeError,
        "dropout: input must be a Tensor, got list",
    ),
    **{
        f"{function}: not a tensor, nothing dropped": (
            lambda function=function: getattr(fn, function)(np.ones((2, 3)), 0.5, False),
            TypeError,
            f"{function}: input must be a Tensor, got ndarray",
        )
        for function in ("dropout", "alpha_dropout", "feature_alpha_dropout", "drop_path")
    },
    "dropout: p of 0, not a tensor": (lambda: fastnorm.Dropout(0.0)(None), TypeError, "must be a Tensor, got NoneType"),
    "dropout: training None": (
        lambda: fn.dropout(X(), 0.5, None),
        TypeError,
        "dropout: training must be a bool, got None",
    ),
    "dropout2d: training 1": (
        lambda: fn.dropout2d(X(), 0.5, 1),
        TypeError,
        "dropout2d: training must be a bool, got int",
    ),
    "dropout: training of numpy": (
        lambda: fn.dropout(X(), 0.5, np.True_),
        TypeError,
        "dropout: training must be a bool, got numpy.bool",
    ),
    "training 1": (bn(training=1), TypeError, "batch_norm: training must be a bool, got int"),
    "training of numpy": (bn(training=np.True_), TypeError, "batch_norm: training must be a bool, got numpy.bool"),
    "batch_renorm: training None": (
        lambda: fn.batch_renorm(X(), torch.zeros(3), torch.ones(3), training=None),
        TypeError,
        "batch_renorm: training must be a bool, got NoneType",
    ),
    "instance_norm: use_input_stats 0": (
        lambda: fn.instance_norm(X(), torch.zeros(3), torch.ones(3), use_input_stats=0),
        TypeError,
        "instance_norm: use_input_stats must be a bool, got int",
    ),
    **{
        f"{function}: {name} requires grad": (
            lambda function=function, name=name: getattr(fn, function)(
                X(), **{n: torch.ones(3, requires_grad=n == name) for n in ("running_mean", "running_var")}
            ),
            RuntimeError,
            f"{function}: not differentiable with respect to running_mean and running_var, got {name} with",
        )
        for function in ("batch_norm", "batch_renorm", "instance_norm")
        for name in ("running_mean", "running_var")
    },
    "dropout1d: rank": (lambda: fn.dropout1d(X()), RuntimeError, r"dropout1d: input must have shape \(N, C, L\)"),
    "dropout2d: rank": (lambda: fn.dropout2d(torch.ones(3)), RuntimeError, "dropout2d: input must have shape"),
    "dropout3d: p": (lambda: fn.dropout3d(X(), -1.0), ValueError, "dropout3d: p must be"),
    "dropout: integers": (
        lambda: fn.dropout(X(dtype=torch.int32)),
        NotImplementedError,
        "dropout: no kernel for input of type Int, wanted Double, Float, BFloat16 or Half",
    ),
    "dropout: module p": (lambda: fastnorm.Dropout2d(nan), ValueError, "Dropout2d: p must be"),
    "dropout: generator": (lambda: fn.dropout(X(), generator=3), TypeError, "Generator"),
    "group_norm: rank": (
        lambda: fn.group_norm(torch.ones(3), 1),
        RuntimeError,
        "group_norm: input must have at least 2 dimensions",
    ),
    "group_norm: groups": (
        lambda: fn.group_norm(X(), 2),
        RuntimeError,
        "group_norm: num_groups must divide the number of channels 3.*got 2",
    ),
    "group_norm: no group": (lambda: fn.group_norm(X(), 0), RuntimeError, "num_groups must be positive, got 0"),
    "group_norm: one value": (
        lambda: fn.group_norm(torch.ones(1, 3, 1, 1), 3),
        ValueError,
        r"group_norm: expected more than 1 value per group, got input shape \[1, 3, 1, 1\] with num_groups=3",
    ),
    "group_norm: weight": (
        lambda: fn.group_norm(X(), 1, torch.ones(4)),
        RuntimeError,
        r"group_norm: weight must have shape \[3\].*got \[4\]",
    ),
    "group_norm: residual": (
        lambda: fn.group_norm(X(), 1, residual=torch.ones(4, 3, 5)),
        RuntimeError,
        "group_norm: residual must have input's shape",
    ),
    "group_norm: activation": (lambda: fn.group_norm(X(), 1, activation="tanh"), ValueError, "got 'tanh'"),
    "group_norm: integers": (
        lambda: fn.group_norm(X(dtype=torch.int64), 1),
        NotImplementedError,
        "group_norm: no kernel for input of type Long",
    ),
    "group_norm: module groups": (lambda: fastnorm.GroupNorm(2, 3), ValueError, "must be divisible"),
    "group_norm: module activation": (
        lambda: fastnorm.GroupNorm(3, 3, activation="mish"),
        ValueError,
        "GroupNorm: activation must be",
    ),
    "instance_norm: one position": (
        lambda: fn.instance_norm(torch.ones(2, 3, 1, 1)),
        ValueError,
        r"instance_norm: expected more than 1 spatial element, got input shape \[2, 3, 1, 1\]",
    ),
    "instance_norm: rank": (lambda: fn.instance_norm(torch.ones(2, 3)), ValueError, "more than 1 spatial element"),
    "instance_norm: no statistics": (
        lambda: fn.instance_norm(X(), use_input_stats=False),
        RuntimeError,
        "instance_norm: running_mean and running_var must be given if use_input_stats=False",
    ),
    "instance_norm: only running_mean": (
        lambda: fn.instance_norm(X(), torch.zeros(3)),
        RuntimeError,
        "instance_norm: running_mean and running_var must be given together, got only running_mean",
    ),
    "instance_norm: running_var's length": (
        lambda: fn.instance_norm(X(), torch.zeros(3), torch.ones(2)),
        RuntimeError,
        r"instance_norm: running_var must have shape \[3\].*got \[2\]",
    ),
    "instance_norm: weight, running statistics": (
        lambda: fn.instance_norm(X(), torch.zeros(3), torch.ones(3), torch.ones(4), use_input_stats=False),
        RuntimeError,
        r"instance_norm: weight must have shape \[3\].*got \[4\]",
    ),
    "instance_norm: module's rank": (
        lambda: fastnorm.InstanceNorm2d(3)(torch.ones(2, 3)),
        ValueError,
        r"InstanceNorm2d: input must have shape \(N, C, H, W\) or \(C, H, W\), got 2 dimensions",
    ),
    "instance_norm: residual": (
        lambda: fn.instance_norm(X(), residual=torch.ones(3)),
        RuntimeError,
        r"instance_norm: residual must have input's shape \[4, 3, 5, 5\], got \[3\]",
    ),
    "instance_norm: activation": (lambda: fn.instance_norm(X(), activation="elu"), ValueError, "instance_norm: activ"),
    "instance_norm: strided statistics": (
        lambda: fn.instance_norm(X(), torch.zeros(6)[::2], torch.ones(3)),
        NotImplementedError,
        "instance_norm: no kernel that updates running statistics which are not contiguous",
    ),
    "instance_norm: statistics of two types": (
        lambda: fn.instance_norm(X(dtype=torch.half), torch.zeros(3), torch.ones(3).half()),
        RuntimeError,
        "running_mean and running_var must be of one type, got Float and Half",
    ),
    "instance_norm: module's channels": (
        lambda: fastnorm.InstanceNorm2d(4, affine=True)(X()),
        ValueError,
        "InstanceNorm2d: input must have num_features=4 channels, got 3",
    ),
    "group_norm: residual's type": (
        lambda: fn.group_norm(X(), 1, residual=X(dtype=torch.float64)),
        RuntimeError,
        "group_norm: residual must be of input's type Float, got Double",
    ),
    "group_norm: bias's type": (
        lambda: fn.group_norm(X(), 1, None, torch.ones(3).double()),
        RuntimeError,
        "group_norm: bias must be of type Float for an input of type Float, got Double",
    ),
    "group_norm: module's channels": (
        lambda: fastnorm.GroupNorm(2, 4)(X()),
        RuntimeError,
        "num_groups must divide the number of channels 3.*got 2",
    ),
    "layer_norm: module's shape": (
        lambda: fastnorm.LayerNorm(7)(X()),
        RuntimeError,
        r"layer_norm: input must have shape \[\*, 7\] \(normalized_shape \[7\]\), got \[4, 3, 5, 5\]",
    ),
    "layer_norm: sparse residual": (
        lambda: fn.layer_norm(X(), (5,), residual=X().to_sparse()),
        RuntimeError,
        "layer_norm: residual must be a strided tensor, got Sparse",
    ),
    "rms_norm: residual": (
        lambda: fn.rms_norm(X(), (5,), residual=torch.ones(5)),
        RuntimeError,
        "rms_norm: residual must have input's shape",
    ),
    "rms_norm: activation": (lambda: fn.rms_norm(X(), (5,), activation="elu"), ValueError, "rms_norm: activation must"),
    "rms_norm: meta device": (
        lambda: fn.rms_norm(X(device="meta"), (5,)),
        NotImplementedError,
        "rms_norm: no kernel for input on meta, wanted cpu",
    ),
    "local_response_norm: size": (
        lambda: fn.local_response_norm(X(), 0),
        RuntimeError,
        "local_response_norm: size must be at least 1, got 0",
    ),
    "local_response_norm: size is no integer": (
        lambda: fn.local_response_norm(X(), 2.5),
        TypeError,
        "local_response_norm",
    ),
    "local_response_norm: region": (
        lambda: fn.local_response_norm(X(), 3, region="both"),
        ValueError,
        "region must be 'inter' or 'intra', got 'both'",
    ),
    "local_response_norm: convention": (
        lambda: fn.local_response_norm(X(), 3, convention="caffe"),
        ValueError,
        "convention must be 'torch' or 'paper', got 'caffe'",
    ),
    "local_response_norm: rank": (
        lambda: fn.local_response_norm(torch.ones(2, 3), 3),
        ValueError,
        r"input must have at least 3 dimensions \(N, C, \*\), got 2 with shape \[2, 3\]",
    ),
    "local_response_norm: rank within channels": (
        lambda: fn.local_response_norm(torch.ones(2, 3, 4), 3, region="intra"),
        ValueError,
        r"must have shape \(N, C, H, W\) for region='intra', got 3 dimensions",
    ),
    "local_response_norm: module's region": (
        lambda: fastnorm.LocalResponseNorm(3, region="x"),
        ValueError,
        "LocalResponseNorm: region must be",
    ),
    "batch_renorm: no statistics": (
        lambda: fn.batch_renorm(X(), None, None, training=True),
        RuntimeError,
        "batch_renorm: running_mean and running_var must be given, for r and d come from them",
    ),
    "batch_renorm: r_max": (
        lambda: fn.batch_renorm(X(), torch.zeros(3), torch.ones(3), training=True, r_max=0.5),
        ValueError,
        "batch_renorm: r_max must be at least 1, got 0.5",
    ),
    "batch_renorm: d_max": (
        lambda: fn.batch_renorm(X(), torch.zeros(3), torch.ones(3), training=True, d_max=-1),
        ValueError,
        "batch_renorm: d_max must be at least 0, got -1",
    ),
    "batch_renorm: one row": (
        lambda: fn.batch_renorm(torch.ones(1, 3), torch.zeros(3), torch.ones(3), training=True),
        ValueError,
        r"batch_renorm: expected more than 1 value per channel in training, got input shape \[1, 3\]",
    ),
    "batch_renorm: module's r_max": (lambda: fastnorm.BatchRenorm2d(3, r_max=0.1), ValueError, "BatchRenorm2d: r_max"),
    "batch_renorm: module's d_max": (lambda: fastnorm.BatchRenorm1d(3, d_max=-1), ValueError, "BatchRenorm1d: d_max"),
    "batch_renorm: module's statistics": (
        lambda: fastnorm.BatchRenorm2d(3, track_running_stats=False),
        ValueError,
        "BatchRenorm2d: track_running_stats must be True",
    ),
    "batch_renorm: module's rank": (
        lambda: fastnorm.BatchRenorm3d(3)(X()),
        ValueError,
        r"BatchRenorm3d: input must have shape \(N, C, D, H, W\), got 4 dimensions",
    ),
    "sync_batch_norm: rank": (
        lambda: fastnorm.SyncBatchNorm(3)(torch.ones(3)),
        ValueError,
        r"SyncBatchNorm: input must have shape \(N, C, \*\), got 1 dimension",
    ),
    "alpha_dropout: p": (lambda: fn.alpha_dropout(X(), 2.0, True), ValueError, r"alpha_dropout: p must be in \[0, 1\]"),
    "alpha_dropout: in place on a leaf": (
        lambda: fn.alpha_dropout(X(requires_grad=True), 0.5, True, True),
        RuntimeError,
        "alpha_dropout: inplace=True on a leaf tensor that requires grad",
    ),
    "dropout: in place on a leaf": (
        lambda: fn.dropout(X(requires_grad=True), 0.5, True, True),
        RuntimeError,
        "dropout: inplace=True on a leaf tensor that requires grad",
    ),
    "feature_alpha_dropout: rank": (
        lambda: fn.feature_alpha_dropout(torch.ones(3), 0.5, True),
        RuntimeError,
        r"feature_alpha_dropout: input must have shape \(N, C, \*\), got \[3\]",
    ),
    "drop_path: p": (lambda: fn.drop_path(X(), 1.2, True), ValueError, r"drop_path: p must be in \[0, 1\], got 1.2"),
    "drop_path: rank": (
        lambda: fn.drop_path(torch.ones(()), 0.5, True),
        RuntimeError,
        r"drop_path: input must have shape \(N, \*\), got \[\]",
    ),
    "DropPath: p": (lambda: fastnorm.DropPath(3.0), ValueError, r"DropPath: p must be in \[0, 1\], got 3.0"),
    "spectral_norm: name": (
        lambda: fastnorm.parametrizations.spectral_norm(nn.Linear(3, 4), "kernel"),
        ValueError,
        "spectral_norm: Linear has no parameter or buffer named 'kernel'",
    ),
    "spectral_norm: iterations": (
        lambda: fastnorm.parametrizations.spectral_norm(nn.Linear(3, 4), n_power_iterations=0),
        ValueError,
        "n_power_iterations to be positive",
    ),
    "weight_norm: name": (
        lambda: fastnorm.parametrizations.weight_norm(nn.Linear(3, 4), "kernel"),
        ValueError,
        "does not have a parameter.*'kernel'",
    ),
    "fold_batch_norm: training": (
        lambda: fastnorm.fold_batch_norm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))),
        ValueError,
        "fold_batch_norm: model must be in eval mode, got BatchNorm2d '1' in training mode",
    ),
    "mc_predict: no dropout": (
        lambda: fastnorm.mc_predict(nn.Linear(2, 2), torch.ones(1, 2)),
        ValueError,
        "model must have at least one dropout layer, got Linear with none",
    ),
    "convert: skip": (
        lambda: fastnorm.convert(nn.Sequential(nn.BatchNorm2d(3)), skip=["7"]),
        ValueError,
        "convert: skip must name modules of the model, got '7'",
    ),
    "explain_launch: no such device": (
        lambda: fastnorm.explain_launch("batch_norm", (4, 3), device="cuda:99"),
        RuntimeError,
        "explain_launch: device must be a CUDA device that torch has here, or .*H100, got 'cuda:99'",
    ),
    "set_fallback": (lambda: fastnorm.set_fallback("loud"), ValueError, "set_fallback: mode must be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_message(name: str) -> None:
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()


MODULES: dict[str, Callable[[], nn.Module]] = {
    "batch_norm": lambda: fastnorm.BatchNorm2d(3),
    "batch_renorm": lambda: fastnorm.BatchRenorm2d(3),
    "group_norm": lambda: fastnorm.GroupNorm(1, 3),
    "instance_norm": lambda: fastnorm.InstanceNorm2d(3),
    "layer_norm": lambda: fastnorm.LayerNorm(5),
    "rms_norm": lambda: fastnorm.RMSNorm(5),
    "local_response_norm": lambda: fastnorm.LocalResponseNorm(3),
    "dropout": lambda: fastnorm.Dropout(),
    "dropout2d": lambda: fastnorm.Dropout2d(),
    "alpha_dropout": lambda: fastnorm.AlphaDropout(),
    "feature_alpha_dropout": lambda: fastnorm.FeatureAlphaDropout(),
    "drop_path": lambda: fastnorm.DropPath(0.5),
}
OF_TYPE = ", wanted Double, Float, BFloat16 or Half$"
NOT_TAKEN: dict[str, tuple[Callable[[], Tensor], str]] = {
    "quantised": (lambda: torch.quantize_per_tensor(X(), 0.1, 0, torch.qint8), f"of type QInt8{OF_TYPE}"),
    "sparse": (lambda: X().to_sparse(), "of layout Sparse, wanted Strided$"),
    "complex": (lambda: X(dtype=torch.complex64), f"of type ComplexFloat{OF_TYPE}"),
    "integers": (lambda: X(dtype=torch.int64), f"of type Long{OF_TYPE}"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", NOT_TAKEN)
@pytest.mark.parametrize("op", MODULES)
def test_what_no_kernel_takes(op: str, kind: str) -> None:
    make, message = NOT_TAKEN[kind]
    with pytest.raises(NotImplementedError, match=f"^{op}: no kernel for input {message}"):
        MODULES[op]()(make())


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
        fastnorm.FallbackWarning, match="dropout: no kernel for input on meta, wanted cpu.*; using torch's own"
    ):
        fn.dropout(x)
    fn.dropout(x)  # pyproject.toml turns a second warning into an error
    fastnorm.set_fallback("silent")
    y = fn.batch_norm(torch.ones(4, 3, device="meta"), None, None, training=True, activation="relu")
    assert y.device.type == "meta"


def test_fallback_keeps_every_keyword() -> None:
    """torch's ops in place of the kernels: value, statistics; and by the kernels the tangent of forward mode."""
    norm = fastnorm.BatchNorm2d(3, activation="gelu", momentum=None, skip_nonfinite_stats=True)
    twin = fastnorm.BatchNorm2d(3, activation="gelu", momentum=None)
    x, residual, tangent = torch.randn(3, 4, 3, 5, 5).unbind(0)
    with torch.autograd.forward_ad.dual_level():
        y = norm(torch.autograd.forward_ad.make_dual(x, tangent), residual)
        value, derivative = torch.autograd.forward_ad.unpack_dual(y)
    other = copy.deepcopy(norm)
    other.reset_running_stats()
    for y, module in ((value, norm), (by_torch(other, x, residual), other)):
        twin.reset_running_stats()
        torch.testing.assert_close(y, twin(x, residual))
        torch.testing.assert_close(module.running_var, twin.running_var)
        assert module.num_batches_tracked == 1
    h = 1e-2
    numerical = (twin(x + h * tangent, residual) - twin(x - h * tangent, residual)) / (2 * h)
    torch.testing.assert_close(derivative, numerical, rtol=1e-2, atol=1e-2)
    norm(torch.full_like(x, float("inf")))
    assert norm.running_var.isfinite().all()
