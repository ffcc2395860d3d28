"""The CUDA kernels, run by the emulator in cuda_on_cpu/: the table of cases.py, and what CUDA adds to it.

In modes random and trace here; in mode asan the same tests in a process of their own, see test_under_sanitizers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zlib

import pytest
import torch
from cases import CASES, Case
from cuda_on_cpu import driver, native
from cuda_on_cpu.contracts import contracts
from test_ops import FLOATS, channels_last, compare, cotangent, differentiate
from torch import Tensor

SANITIZED = "FASTNORM_CUDA_UNDER_SANITIZERS"
MODES = ("asan",) if SANITIZED in os.environ else ("random", "trace")

# The kernels that a case runs, where they are not called as its op is.
KERNELS = {
    "rms_norm": "layer_norm_forward",
    "batch_renorm": "batch_norm_forward",
    "instance_norm": "group_norm_forward",
    **dict.fromkeys(("dropout", "alpha_dropout", "drop_path"), "dropout"),
}

every_mode = pytest.mark.parametrize("mode", MODES)
every_case = pytest.mark.parametrize("case", list({case.name: case for case in CASES}.values()), ids=str)
one_case_an_op = pytest.mark.parametrize("case", list({case.op: case for case in CASES}.values()), ids=str)


def require_kernels(case: Case) -> None:
    op = KERNELS.get(case.op, f"{case.op}_forward")
    if not driver.has_kernel(op):
        pytest.skip(f"{op} has no CUDA kernel yet")


def as_it_is(t: Tensor) -> Tensor:
    return t


def varied(i: int) -> dict[str, object]:
    """Settings that between them have all orders and landings."""
    return {"order": driver.ORDERS[i % 3], "landing": driver.LANDINGS[i // 3 % 3], "seed": i}


@every_mode
@every_case
def test_against_float64(case: Case, mode: str) -> None:
    """Every shape, in a type and a layout each, which the case's name shuffles."""
    require_kernels(case)
    shuffle = zlib.crc32(case.name.encode())
    for i, shape in enumerate(case.shapes, shuffle % 97):
        layout = channels_last if i // 4 % 2 else as_it_is
        with driver.settings(mode=mode, **varied(i)), native.installed():
            compare(case, case.inputs(shape, FLOATS[i % 4]), layout)


@every_mode
@one_case_an_op
def test_mean_far_above_std(case: Case, mode: str) -> None:
    require_kernels(case)
    if not case.subtracts_mean:
        pytest.skip("nothing is subtracted")
    with driver.settings(mode=mode), native.installed():
        for shape in case.shapes[1:4]:
            for layout in (as_it_is, channels_last):
                compare(case, case.inputs(shape, torch.float32, mean=1e5, std=1.0), layout)


def pointers_of(op: str) -> list[str]:
    return [p.name for c in contracts().values() if c.stem == contracts()[op].stem for p in c.pointers]


@every_mode
@one_case_an_op
def test_any_pointer_misaligned(case: Case, mode: str) -> None:
    """Each tensor alone by one element, and all: no bits change where the vectors are cut differently."""
    require_kernels(case)
    names = sorted(set(pointers_of(KERNELS.get(case.op, f"{case.op}_forward"))))
    for name in (*names, *(["all"] if mode == "random" else [])):
        off = dict.fromkeys(names, 1) if name == "all" else {name: 1}
        i = zlib.crc32(name.encode())
        shape = case.shapes[i % len(case.shapes)]
        layout = channels_last if i // 16 % 2 else as_it_is
        with driver.settings(mode=mode, misaligned=off, **varied(i)), native.installed():
            compare(case, case.inputs(shape, FLOATS[1 + i % 3]), layout)


@one_case_an_op
def test_same_bits_in_any_order(case: Case) -> None:
    """Nothing depends on which thread comes first, nor on the number of multiprocessors alone."""
    require_kernels(case)
    if MODES == ("asan",):
        pytest.skip("the sanitizers add nothing")
    for shape in case.shapes[-2:]:
        tensors = case.inputs(shape, torch.float32)
        dy = cotangent(tensors[0])
        results = []
        for i in range(4):
            with driver.settings(**varied(i)), native.installed():
                y, grads = differentiate(case.fastnorm, tensors, dy)
            results.append([y, *grads])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)


@pytest.mark.skipif(MODES == ("asan",), reason="this is that process")
def test_under_sanitizers() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = {**driver.asan_environment(), SANITIZED: "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
