"""explain_launch, against the launches that the emulator sees."""

from __future__ import annotations

import re
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_on_cpu import driver, native
from test_ops import channels_last

import fastnorm
import fastnorm.functional as fn
from fastnorm import _C
from fastnorm.explain import H100, Device

SMALL = Device("four multiprocessors", (9, 0), 4, 32 << 10)
OLD = Device("without clusters", (8, 0), 4, 48 << 10)

CALLS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "batch_norm": (lambda x: fn.batch_norm(x, None, None, training=True), (6, 8, 12, 12), {}),
    "group_norm": (lambda x: fn.group_norm(x, 2), (2, 8, 20, 20), {"num_groups": 2}),
    "instance_norm": (fn.instance_norm, (2, 3, 70, 70), {}),
    "layer_norm": (lambda x: fn.layer_norm(x, (24, 40)), (5, 24, 40), {"normalized_dims": 2}),
    "rms_norm": (lambda x: fn.rms_norm(x, (16384,)), (2, 16384), {}),
    "local_response_norm": (lambda x: fn.local_response_norm(x, 3), (2, 40, 9, 8), {"size": 3}),
    "local_response_norm-even": (
        lambda x: fn.local_response_norm(x, 4, region="intra", convention="paper"),
        (1, 20, 70, 60),
        {"size": 4, "region": "intra", "convention": "paper"},
    ),
    "local_response_norm-intra": (
        lambda x: fn.local_response_norm(x, 3, region="intra"),
        (1, 20, 70, 60),
        {"size": 3, "region": "intra"},
    ),
    "local_response_norm-wide": (
        lambda x: fn.local_response_norm(x, 2000),
        (1, 2000, 9, 8),
        {"size": 2000},
    ),
    "weight_norm": (lambda v: _C.weight_norm(v, torch.ones(30, 1, 1, 1), 0), (30, 5, 9, 11), {}),
    "weight_norm-columns": (lambda v: _C.weight_norm(v, torch.ones(1, 70, 1, 1), 1), (30, 70, 3, 3), {"dim": 1}),
    "weight_norm-parts": (lambda v: _C.weight_norm(v, torch.ones(()), -1), (90, 300), {"dim": None}),
    "dropout": (fn.dropout, (3, 40, 9, 11), {}),
    "alpha_dropout": (lambda x: fn.alpha_dropout(x, training=True), (70, 33), {}),
    "dropout2d": (fn.dropout2d, (3, 40, 9, 11), {}),
    "dropout1d": (fn.dropout1d, (64, 130, 1), {}),
    "feature_alpha_dropout": (lambda x: fn.feature_alpha_dropout(x, training=True), (3, 5, 9, 11), {}),
    "drop_path": (lambda x: fn.drop_path(x, 0.5, training=True), (9, 40, 7), {}),
}


@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("device", (SMALL, OLD), ids=lambda d: d.name)
@pytest.mark.parametrize("call", CALLS)
def test_as_it_is_launched(call: str, device: Device, last: bool) -> None:
    function, shape, setting = CALLS[call]
    op = call.split("-")[0]
    if last and len(shape) < 4:
        pytest.skip("one layout")
    x = torch.randn(shape).requires_grad_()
    if last:
        x = channels_last(x.detach()).requires_grad_()
    limits = {
        "multiprocessors": device.multiprocessors,
        "shared_per_block": device.shared_memory,
        "major": device.compute_capability[0],
    }
    with driver.settings(**limits) as reports, native.installed():
        y = function(x)
        y.backward(torch.randn(shape) if not last else channels_last(torch.randn(shape)))
    assert len(reports) == 2
    for direction, report in zip(("forward", "backward"), reports, strict=True):
        told = fastnorm.explain_launch(op, shape, direction=direction, channels_last=last, device=device, **setting)
        launches = [(prod(launch.blocks), launch.threads, launch.cluster) for launch in report.launches]
        assert (told.blocks, told.threads, told.cluster) in launches, told
        if op not in ("layer_norm", "rms_norm"):
            assert told.shared_memory in [launch.shared for launch in report.launches]
            # split: reduced, merged and written by launches of their own
            assert (told.path == "split") == (len(report.launches) > 1), told
        if op == "local_response_norm":
            assert (told.path == "tiles in workspace") == (report.workspace > 0), told


# Multiprocessors, and the most shared memory of a block.
DEVICES = (
    Device("T4", (7, 5), 40, 64 << 10),
    Device("A100", (8, 0), 108, 163 << 10),
    Device("RTX 3090", (8, 6), 82, 99 << 10),
    H100,
    Device("RTX 5090", (12, 0), 170, 99 << 10),
)


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_room_for_what_kernels_have_themselves(device: Device) -> None:
    """CUDA counts static and dynamic shared memory together."""
    sizes = product((1, 2, 4, 8, 16, 32, 64, 128), (64, 320, 640), (14, 28, 48, 56, 112))
    images = [(n, c, s, s) for n, c, s in sizes]
    calls: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [("weight_norm", (8, n << 10), {}) for n in range(1, 65)]
    for shape in images:
        calls += [("batch_norm", shape, {}), ("group_norm", shape, {"num_groups": 32}), ("instance_norm", shape, {})]
        calls += [("local_response_norm", shape, {"size": 25})]  # smaller windows stay in registers
    most = 0
    for op, shape, setting in calls:
        for dtype, direction in product((torch.float32, torch.bfloat16), ("forward", "backward")):
            launch = fastnorm.explain_launch(op, shape, dtype=dtype, direction=direction, device=device, **setting)
            most = max(most, launch.shared_memory)
    assert device.shared_memory // 2 < most + (2 << 10) <= device.shared_memory


def test_what_decides() -> None:
    shape = (32, 64, 56, 56)
    launch = fastnorm.explain_launch("batch_norm", shape, device=H100)
    assert launch.path == "split" and launch.cluster == 1 and launch.tensors_moved == 3
    launch = fastnorm.explain_launch("batch_norm", (32, 256, 7, 7), device=H100)
    assert launch.path == "resident" and launch.blocks == 256 and launch.tensors_moved == 2
    for device, shares in ((H100, True), (OLD, False)):  # fewer slices than multiprocessors
        launch = fastnorm.explain_launch("group_norm", (2, 64, 64, 64), num_groups=8, device=device)
        assert launch.path == "resident" and (launch.cluster > 1) == shares
    last = fastnorm.explain_launch("group_norm", (2, 64, 64, 64), num_groups=8, channels_last=True, device=H100)
    assert last.path == "split"
    assert fastnorm.explain_launch("batch_norm", shape, dtype=torch.bfloat16, device=H100).window == 8
    assert fastnorm.explain_launch("layer_norm", (8, 1027), device=H100).window == 1
    assert fastnorm.explain_launch("layer_norm", (8, 1 << 20), direction="backward", device=OLD).path == "long rows"
    images, intra = (256, 96, 55, 55), {"region": "intra", "direction": "backward"}
    assert fastnorm.explain_launch("local_response_norm", images, device=H100).parts == 1
    near = fastnorm.explain_launch("local_response_norm", (1, 8, 500, 500), device=H100, **intra)
    assert near.path == "registers" and near.parts > 1 and near.tensors_moved == 3
    large = fastnorm.explain_launch("local_response_norm", (1, 8, 500, 500), device=H100, size=11, **intra)
    assert large.path == "tiles" and large.parts > 1 and large.tensors_moved == 3
    small = fastnorm.explain_launch("local_response_norm", (1, 8, 500, 500), device=OLD, size=99, **intra)
    assert small.path == "tiles in workspace" and small.shared_memory == 0
    dropped = fastnorm.explain_launch("dropout", (8192, 8192), direction="backward", dtype=torch.float16, device=H100)
    assert (dropped.blocks, dropped.window, dropped.tensors_moved) == (8192 * 8192 // 8 // 256, 8, 2)


@pytest.mark.parametrize(
    ("arguments", "setting", "message"),
    (
        (("softmax", (4, 4)), {}, "op must be one of batch_norm, .*, got 'softmax'"),
        (("batch_norm", (4, 4)), {"direction": "both"}, "direction must be 'forward' or 'backward', got 'both'"),
        (("batch_norm", (4, 4)), {"dtype": torch.int8}, "dtype must be .*, got torch.int8"),
        (("batch_norm", (4,)), {}, r"batch_norm cannot take shape \[4\]"),
        (("instance_norm", (4, 0, 3)), {}, r"instance_norm cannot take shape \[4, 0, 3\]"),
        (("group_norm", (2, 6, 4)), {"num_groups": 4}, "6 channels cannot be split into num_groups=4"),
        (("layer_norm", (2, 6)), {"normalized_dims": 3}, r"layer_norm of 3 dimensions cannot take shape \[2, 6\]"),
        (
            ("local_response_norm", (4, 3)),
            {},
            r"local_response_norm cannot take shape \[4, 3\]: wanted \(N, C, L, \*\)",
        ),
        (("local_response_norm", (4, 3, 2)), {"region": "intra"}, r".* \[4, 3, 2\]: wanted \(N, C, H, W\)"),
        (("local_response_norm", (4, 3, 2)), {"size": 0}, "local_response_norm cannot take size=0, region='inter'"),
        (("weight_norm", (2, 6)), {"dim": 2}, r"weight_norm along dim=2 cannot take shape \[2, 6\]"),
        (("dropout2d", (4,)), {}, r"dropout2d cannot take shape \[4\]"),
        (("drop_path", ()), {}, r"drop_path cannot take shape \[\]"),
    ),
    ids=str,
)
def test_what_it_does_not_know(arguments: tuple[Any, ...], setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^explain_launch: {message}"):
        fastnorm.explain_launch(*arguments, device=H100, **setting)


def test_the_clusters_in_the_documentation() -> None:
    ops = {"BatchNorm": "batch_norm", "GroupNorm(32)": "group_norm", "InstanceNorm": "instance_norm"}
    text = (Path(__file__).parent.parent / "docs" / "cuda_kernels.md").read_text()
    row = r"^\| (\S+?),? [^|]*\| ([\dx]+) \| (\w*) ?\| [\d.]+ \| (\d+) / (\d+) \|"
    half, single = text.split("\nfloat32:\n")
    for dtype, table in ((torch.bfloat16, half), (torch.float32, single)):
        rows = re.findall(row, table, re.M)
        assert len(rows) > 10
        for op, sizes, layout, *clusters in rows:
            for direction, wanted in zip(("forward", "backward"), clusters, strict=True):
                launch = fastnorm.explain_launch(
                    ops.get(op, "layer_norm"),
                    tuple(map(int, sizes.split("x"))),
                    dtype=dtype,
                    direction=direction,
                    channels_last=layout == "channels_last",
                    num_groups=32,
                    device=H100,
                )
                assert int(wanted) == (0 if launch.path == "split" else launch.cluster), (op, sizes, layout, launch)
