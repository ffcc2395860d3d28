"""The CUDA kernels, run by the emulator in cuda_on_cpu/: the table of cases.py, and what CUDA adds to it.

In modes random and trace here; in mode asan the same tests in a process of their own, see test_under_sanitizers.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Case
from cuda_on_cpu import driver, native
from cuda_on_cpu.contracts import contracts
from reference import philox4x32
from test_ops import FLOATS, channels_last, compare, cotangent, differentiate
from torch import Tensor

import fastnorm.functional as fn
from fastnorm import _C
from fastnorm.autograd import SpectralNormFunction

SANITIZED = "FASTNORM_CUDA_UNDER_SANITIZERS"
MODES = ("asan",) if SANITIZED in os.environ else ("random", "trace")

# The kernels that a case runs, where they are not called as its op is.
KERNELS = {
    "rms_norm": "layer_norm_forward",
    "batch_renorm": "batch_norm_forward",
    "instance_norm": "group_norm_forward",
    **dict.fromkeys(("dropout", "alpha_dropout", "drop_path"), "dropout"),
}

# All combinations take a quarter of an hour. Unless they are asked for, every n-th runs, in each mode other ones: n is
# prime, so that it goes through all shapes, types and plans.
IN_FULL = "FASTNORM_CUDA_IN_FULL" in os.environ
EVERY = {"random": 7, "trace": 23, "asan": 23}


def thinned(
    *names: str, of: Iterable[tuple[Any, ...]], fold: int = 1, modes: Iterable[str] = MODES
) -> pytest.MarkDecorator:
    """Every n-th of the tuples for each mode, n divided by `fold`; the test gets (mode, *tuple)."""
    chosen = []
    for mode in modes:
        n = 1 if IN_FULL else max(1, EVERY[mode] // fold)
        first = ("random", "trace", "asan").index(mode) % n
        for values in list(of)[first::n]:
            chosen.append(pytest.param(mode, *values, id="-".join(map(_name, (*values, mode)))))
    return pytest.mark.parametrize(("mode", *names), chosen)


def _name(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


UNIQUE = list({case.name: case for case in CASES}.values())
ONE_AN_OP = [case for case in UNIQUE if case.name in (
    "batch_norm-train-residual-relu", "batch_renorm-residual-relu", "group_norm-some-residual-relu",
    "instance_norm-input-residual-gelu", "layer_norm-residual-relu", "rms_norm-residual-gelu", "dropout-0.5",
    "alpha_dropout-0.5", "drop_path-0.5", "dropout2d-0.3", "local_response_norm-inter-torch-size5-beta0.75",
    "local_response_norm-intra-torch-size3-beta0.75", "weight_norm-1", "spectral_norm-1",
)]  # fmt: skip


def require_kernels(of: str) -> None:
    op = KERNELS.get(of, f"{of}_forward")
    if not driver.has_kernel(op):
        pytest.skip(f"{op} has no CUDA kernel yet")


# Stems of kernels with clusters: also compiled for sm_80, which has none.
OLDER = ("batch_norm", "group_norm", "layer_norm")
OLDER_MODES = MODES if IN_FULL else tuple(mode for mode in MODES if mode == "random")

_sanitized: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True, scope="module")
def _the_other_processor_has_work(request: pytest.FixtureRequest) -> None:
    """The compilers, and the tests under sanitizers, run beside the tests here."""
    if any(item.name == "test_under_sanitizers" for item in request.session.items) and MODES != ("asan",):
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--capture=sys", __file__]
        environment = {**driver.asan_environment(), SANITIZED: "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        _sanitized.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    if not IN_FULL:
        for mode in MODES:
            driver.build_ahead(mode, older=OLDER if mode in OLDER_MODES else ())


def as_it_is(t: Tensor) -> Tensor:
    return t


def check(case: Case, shape: tuple[int, ...], mode: str, what: str = "", **changes: Any) -> list[driver.Report]:
    """Against float64, in a type, a layout and an order of threads that the names of all that draw."""
    require_kernels(case.op)
    i = zlib.crc32(f"{case}{shape}{mode}{what}".encode())
    order = {"order": driver.ORDERS[i % 3], "seed": i}
    with driver.settings(mode=mode, **order, **changes) as reports, native.installed():
        compare(case, case.inputs(shape, FLOATS[i // 9 % 4]), channels_last if i // 36 % 2 else as_it_is)
    return reports


@thinned("case", "shape", of=[(case, shape) for case in UNIQUE for shape in case.shapes])
def test_against_float64(mode: str, case: Case, shape: tuple[int, ...]) -> None:
    check(case, shape, mode)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("dtype", FLOATS)
def test_channels_within_a_pack(dtype: torch.dtype, size: int) -> None:
    """A pack of elements has several channels."""
    if "random" not in MODES:
        pytest.skip("no other access to memory than elsewhere")
    (case,) = (c for c in UNIQUE if c.name == "dropout2d-0.3")
    with driver.settings(mode="random", seed=1), native.installed():
        compare(case, case.inputs((2, 21, 1, size), dtype), as_it_is)


@thinned("case", "shape", of=[(c, shape) for c in ONE_AN_OP if c.subtracts_mean for shape in c.shapes[1:4]], fold=2)
def test_mean_far_above_std(mode: str, case: Case, shape: tuple[int, ...]) -> None:
    require_kernels(case.op)
    with driver.settings(mode=mode), native.installed():
        for layout in (as_it_is, channels_last):
            compare(case, case.inputs(shape, torch.float32, mean=1e5, std=1.0), layout)


def pointers_of(case: Case) -> list[str]:
    stem = contracts()[KERNELS.get(case.op, f"{case.op}_forward")].stem
    return sorted({p.name for c in contracts().values() if c.stem == stem for p in c.pointers})


@thinned("case", "pointer", of=[(case, pointer) for case in ONE_AN_OP for pointer in (*pointers_of(case), "all")])
def test_misaligned_by_one_element(mode: str, case: Case, pointer: str) -> None:
    """Each tensor alone, and all; of whole windows."""
    off = dict.fromkeys(pointers_of(case) if pointer == "all" else [pointer], 1)
    shapes = [shape for shape in case.shapes if math.prod(shape) >= 1000]
    for i in range(4 if IN_FULL else 1):
        shape = shapes[(zlib.crc32(pointer.encode()) + i) % len(shapes)]
        check(case, shape, mode, pointer, misaligned=off)


@pytest.mark.skipif(MODES == ("asan",), reason="the sanitizers add nothing")
@pytest.mark.parametrize("case", ONE_AN_OP, ids=str)
def test_same_bits_in_any_order(case: Case) -> None:
    """Nothing depends on which thread comes first."""
    require_kernels(case.op)
    tensors = case.inputs(case.shapes[-2], torch.float32)
    dy = cotangent(tensors[0])
    results = []
    for order in driver.ORDERS:
        with driver.settings(order=order, seed=3), native.installed():
            y, grads = differentiate(case.fastnorm, tensors, dy)
        results.append([y, *grads])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


# ---- what the table of cases does not have, against the CPU's kernels


def _values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _gradients(function: Callable[..., Tensor], *tensors: Tensor | None) -> list[Tensor]:
    """The output and the gradients of those that are there."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    there = [t for t in leaves if t is not None]
    return [y.detach(), *torch.autograd.grad(y, there, cotangent(y))]


def _running_statistics(momentum: float | None, dtype: torch.dtype, last: bool = False) -> list[Tensor]:
    """`last`: more channels than a block of the merge has teams."""
    C = 40 if last else 5
    mean, var, count = torch.full((C,), 0.5), torch.full((C,), 2.0), torch.tensor(3)
    for seed in range(2):
        x = _values(6, C, 9, 7, seed=seed).to(dtype)
        x = channels_last(x) if last else x
        fn.batch_norm(x, mean, var, None, None, True, momentum, num_batches_tracked=count)
    return [mean, var, count]


def _skipped_statistics() -> list[Tensor]:
    """Of an infinite element, and of variances that the type of the running one does not hold."""
    mean, var, count = torch.full((3,), 0.5), torch.full((3,), 2.0), torch.tensor(3)
    for last in (math.inf, 1e25):
        x = _values(4, 3, 5)
        x[1, 2, 3] = last
        fn.batch_norm(x, mean, var, None, None, True, skip_nonfinite_stats=True, num_batches_tracked=count)
    halves = [torch.full((3,), 0.5).half(), torch.full((3,), 2.0).half(), torch.tensor(3)]
    x = (1000 * _values(4, 3, 5)).half()
    fn.batch_norm(x, *halves[:2], None, None, True, skip_nonfinite_stats=True, num_batches_tracked=halves[2])
    assert halves[2] == count == 3 and var.eq(2).all() and halves[1].eq(2).all()
    return [mean, var, count, *halves]


def _infinite_gradient() -> list[Tensor]:
    """Of weight and bias, from one infinite element, which threads meet an element at a time."""
    weight, bias = (_values(5, seed=seed).requires_grad_() for seed in range(2))
    dy = _values(6, 5, 9, 7)
    dy[3, 2, 4, 1] = math.inf
    y = fn.batch_norm(channels_last(_values(6, 5, 9, 7, seed=1)), None, None, weight, bias, True)
    return list(torch.autograd.grad(y, (weight, bias), channels_last(dy)))


def _two_processes(activation: str | None, last: bool) -> list[Tensor]:
    """A batch shared by two processes, as SyncBatchNorm takes it."""
    x, dy, residual = (channels_last(t) if last else t for t in (_values(6, 8, 5, 7, seed=seed) for seed in range(3)))
    weight, bias = _values(8) + 1, _values(8, seed=1)
    statistics = torch.stack([x.double().mean((0, 2, 3)), (x.double().var((0, 2, 3), False) + 1e-5).rsqrt()])
    operands, sums, results = [], [], []
    for part in (slice(0, 2), slice(2, 6)):
        own = x[part], weight, bias, residual[part]
        y, mask = _C.batch_norm_normalize(*own, statistics, activation, True)
        operands.append((dy[part], *own[:3], None if mask is not None else own[3], mask, statistics))
        sums.append(_C.batch_norm_backward_reduce(*operands[-1], activation))
        results += [y, sums[-1].float(), _C.batch_norm_statistics(x[part]).float()]
    for each in operands:
        results += _C.batch_norm_backward_elements(*each, sums[0] + sums[1], 6.0 * 35, activation, (True, True))
    return results


def _instance_statistics() -> list[Tensor]:
    mean, var = torch.full((5,), 0.5), torch.full((5,), 2.0)
    y = fn.instance_norm(_values(6, 5, 9, 7), mean, var, use_input_stats=True)
    return [y, mean, var]


def _wide_parameters(norm: Callable[..., Tensor]) -> list[Tensor]:
    """bfloat16 data with float32 parameters."""
    return _gradients(norm, _values(6, 8, 9, 7).bfloat16(), _values(8) + 1, _values(8))


def _drop_in_place() -> list[Tensor]:
    x = _values(3, 1023)
    fn.dropout(x, 0.4, True, inplace=True, generator=torch.Generator().manual_seed(7))
    return [x]


def _power_method(dim: int, *shape: int) -> list[Tensor]:
    weight = _values(*shape)
    h = weight.shape[dim]
    u, v = _values(h, seed=1), _values(weight.numel() // h, seed=2)
    return [*_gradients(lambda w: SpectralNormFunction.apply(w, u, v, 3, dim, 1e-12), weight), u, v]


NORMS: dict[str, Callable[..., Tensor]] = {
    "batch_norm": lambda x, w=None, b=None: fn.batch_norm(x, None, None, w, b, True),
    "group_norm": lambda x, w=None, b=None: fn.group_norm(x, 4, w, b),
    "instance_norm": lambda x, w=None, b=None: fn.instance_norm(x, weight=w, bias=b),
    "layer_norm": lambda x, w=None, b=None: fn.layer_norm(x.transpose(1, -1), [8], w, b),
    "rms_norm": lambda x, w=None, b=None: fn.rms_norm(x.transpose(1, -1), [8], w),
}

OTHERS: dict[str, Callable[[], list[Tensor]]] = {
    **{
        f"batch_norm-statistics-{momentum}-{str(dtype)[6:]}": partial(_running_statistics, momentum, dtype)
        for momentum, dtype in ((0.1, torch.float32), (None, torch.float32), (0.3, torch.bfloat16))
    },
    "batch_norm-statistics-last": partial(_running_statistics, 0.1, torch.float32, last=True),
    "batch_norm-skipped-statistics": _skipped_statistics,
    "batch_norm-infinite-gradient": _infinite_gradient,
    **{
        f"batch_norm-two-processes-{activation}{'-last' if last else ''}": partial(_two_processes, activation, last)
        for activation, last in (("relu", False), ("silu", True), (None, False), ("leaky_relu", True))
    },
    "instance_norm-statistics": _instance_statistics,
    **{f"{name}-wide-parameters": partial(_wide_parameters, NORMS[name]) for name in NORMS if name != "rms_norm"},
    **{
        f"{name}-without-{'-'.join(missing)}": partial(
            _gradients,
            NORMS[name],
            _values(6, 8, 9, 7),
            None if "weight" in missing else _values(8) + 1,
            None if "bias" in missing else _values(8),
        )
        for name in NORMS
        for missing in (("weight",), ("bias",), ("weight", "bias"))
        if name != "rms_norm"
    },
    "dropout-in-place": _drop_in_place,
    **{
        f"spectral_norm-power-method-{dim}-{'x'.join(map(str, shape))}": partial(_power_method, dim, *shape)
        for dim in (0, 1)
        for shape in ((7, 5, 3, 3), (130, 40))
    },
    "spectral_norm-power-method-in-more-parts-than-blocks": partial(_power_method, 0, 700, 12),
    # no float32 is near the mean
    "layer_norm-far-above": lambda: [fn.layer_norm(_values(5, 200) + 1e7, [200])],
    # squares beyond float32's range, above and below
    **{
        f"{name}-scaled-{scale}": partial(norm, _values(5, 200) * scale)
        for scale in (1e25, 1e-25)
        for name, norm in {
            "batch_norm": lambda x: [fn.batch_norm(x.view(5, 8, 25), None, None, training=True, eps=1e-300)],
            "batch_norm-warps": lambda x: [
                fn.batch_norm(x.repeat(13, 1).view(65, 2, 100), None, None, training=True, eps=1e-300)
            ],
            "group_norm": lambda x: [fn.group_norm(channels_last(x.view(5, 8, 25)), 4, eps=0.0)],
            "layer_norm": lambda x: [fn.layer_norm(x, [200], eps=0.0)],
            "rms_norm": lambda x: [fn.rms_norm(x, [200], eps=0.0)],
            "weight_norm-0": lambda x: [_C.weight_norm(x, torch.ones(5, 1), 0)],
            "weight_norm-1": lambda x: [_C.weight_norm(x, torch.ones(1, 200), 1)],
        }.items()
    },
}


@thinned("name", of=[(name,) for name in OTHERS], fold=5)
def test_as_the_cpu(mode: str, name: str) -> None:
    op = name.split("-")[0]
    require_kernels(op)
    wanted = OTHERS[name]()
    small = DEVICES["one-multiprocessor"] if "parts" in name else {}
    with driver.settings(mode=mode, order="random", seed=5, **small), native.installed():
        got = OTHERS[name]()
    for a, b in zip(got, wanted, strict=True):
        units = 64 if a.dtype == torch.float32 else 2  # sums of some hundred terms in another order
        eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0
        torch.testing.assert_close(a, b, rtol=units * eps, atol=units * eps, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("seed", "offset", "added"), [(0, 0, 0), (1, 4, 8), (-1, 2**32 - 1, 5), (2**63 - 25, 2**62 + 3, 2**40)]
)
def test_dropout_state(mode: str, seed: int, offset: int, added: int) -> None:
    """What a captured graph draws its masks from, against Philox in numpy (philox.h: dropout_seed)."""
    state = torch.full((2,), 7)
    given = {"seed": torch.tensor([seed]), "offset": torch.tensor([offset])}
    with driver.settings(mode=mode):
        driver.call("dropout_state", **given, added=added, state=state)
    low, high = (offset + added) & 0xFFFFFFFF, (offset + added) >> 32
    counter = np.array([[low, high, 0xFFFFFFFF, 0xFFFFFFFF]], dtype=np.uint32)
    drawn = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF), rounds=10)
    first, second, *_ = (int(word) for word in drawn[0])
    assert [s & (2**64 - 1) for s in state.tolist()] == [first | second << 32, 0]


# ---- every launch path: the launchers choose by what the device has

DEVICES: dict[str, dict[str, Any]] = {
    **{f"cluster-{n}": {"largest_cluster": n, "shared_per_block": 18 << 10} for n in (8, 16)},
    "sm_80": {"major": 8, "shared_per_block": 163 << 10},
    "sm_75": {"major": 7, "minor": 5, "shared_per_block": 64 << 10},
    "one-multiprocessor": {"multiprocessors": 1},
    "h200": {"multiprocessors": 132},
    "few-clusters": {"shared_per_block": 18 << 10, "most_clusters": 1},
}


@thinned("case", "device", "shape", of=[(c, d, shape) for c in ONE_AN_OP for d in DEVICES for shape in c.shapes[-3:]])
def test_on_every_device(mode: str, case: Case, device: str, shape: tuple[int, ...]) -> None:
    check(case, shape, mode, device, **DEVICES[device])


@pytest.mark.parametrize("most", (0, 3))
def test_no_more_clusters_than_run_at_once(most: int) -> None:
    """One that waits for another's end would double the time, for each has its share of the work."""
    rows = torch.randn(12, 12288, requires_grad=True)
    weight = torch.ones(12288, requires_grad=True)
    device = {"multiprocessors": 132, "shared_per_block": 8 << 10, "most_clusters": most}
    with driver.settings(**device) as reports, native.installed():
        fn.layer_norm(rows, (12288,), weight).sum().backward()
    started = [[prod(launch.blocks) // launch.cluster for launch in report.launches if launch.cluster > 1]
               for report in reports]  # fmt: skip
    # layer_norm's forward has a cluster a row, whose end is its own
    assert started == ([[12], [12]] if most == 0 else [[12], [3]])


@thinned(
    "case", "plan", "last", "device", modes=OLDER_MODES, fold=7,
    of=[(case, plan, last, device) for case in CASES for plan in ("whole", "split", "scalar") for last in (False, True)
        for device in ("sm_80", "h200") if case.name in (
            "batch_norm-train", "batch_norm-train-residual-relu", "group_norm-one", "instance_norm-input",
            "group_norm-some-residual-leaky_relu", "layer_norm-residual-relu")],
)  # fmt: skip
def test_compiled_for_sm_80(mode: str, case: Case, plan: str, last: bool, device: str) -> None:
    """Without clusters in what is compiled: for such a device, or by a newer one's driver from PTX."""
    require_kernels(case.op)
    forced = {"whole": {"resident": 1}, "split": {"resident": 0}, "scalar": {"scalar": 1}}[plan]
    with driver.settings(mode=mode, architecture=80, plan=forced, **DEVICES[device]) as reports, native.installed():
        compare(case, case.inputs((3, 8, 33, 31), torch.float32), channels_last if last else as_it_is)
    assert {launch.cluster for report in reports for launch in report.launches} == {1}


@dataclass(frozen=True)
class Path:
    """What only larger shapes or smaller devices reach."""

    case: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    last: bool = False
    device: dict[str, Any] = field(default_factory=dict)
    clusters: bool = False  # the path is one of clusters
    workspace: bool = False  # forward has one

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        of = "".join(f"-{name}{value}" for name, value in self.device.items())
        return f"{self.case}-{sizes}-{str(self.dtype)[6:]}{'-last' if self.last else ''}{of}"


SM_80 = {"major": 8}
PATHS = (
    # long rows: in clusters, or read again; whole accesses, and an element each
    Path("layer_norm-residual-relu", (3, 16384), clusters=True),
    Path("rms_norm-silu", (2, 16384), torch.bfloat16, clusters=True),
    Path("layer_norm-residual-gelu", (3, 8200), device=SM_80),
    Path("layer_norm-residual-leaky_relu", (3, 16392), torch.float16, device=SM_80),
    Path("rms_norm", (2, 4099), torch.bfloat16, device=SM_80),
    # parts of a slice, along the rows, the columns, or both
    *(Path("local_response_norm-intra-torch-size3-beta0.75", (1, 20, 40, 30), last=last,
           device={"shared_per_block": 10 << 10}) for last in (False, True)),
    *(Path("local_response_norm-inter-torch-size13-beta0.5", (2, 300, 9, 8), last=last,
           device={"shared_per_block": 6 << 10}) for last in (False, True)),
    # windows in registers: parts of the rows, and strips of a plane with margins
    Path("local_response_norm-inter-torch-size5-beta0.75", (2, 70, 9, 8)),
    Path("local_response_norm-inter-torch-size5-beta0.75", (3, 96, 5, 5), torch.bfloat16, last=True),
    *(Path("local_response_norm-intra-torch-size3-beta0.75", (1, 5, 70, 230), last=last) for last in (False, True)),
    # windows wider than the parts could be
    *(Path("local_response_norm-inter-torch-size1000-beta0.75", (2, 300, 4, 9), last=last,
           device={"shared_per_block": 4 << 10, "multiprocessors": 1}, workspace=True) for last in (False, True)),
    *(Path("local_response_norm-intra-paper-size100-beta1.3", (2, 4, 30, 20), torch.float16, last=last,
           device={"shared_per_block": 4 << 10, "multiprocessors": 1}, workspace=True) for last in (False, True)),
    # merges of more parts than two a thread of a warp: of a channel, and of a group's channels
    Path("batch_norm-train", (4, 2, 171, 153), device={"multiprocessors": 132}, workspace=True),
    Path("group_norm-one", (2, 3, 171, 153), device={"multiprocessors": 132, **SM_80}, workspace=True),
    # of several channels, and with teams that have none
    Path("batch_norm-train", (4, 3, 171, 153), device={"multiprocessors": 132}, workspace=True),
    Path("group_norm-one", (1, 2, 171, 153), device={"multiprocessors": 132, **SM_80}, workspace=True),
    # a slice of more channels than backward's table has room for, so that backward is split
    Path("group_norm-one", (1, 1500, 2, 2), device={"multiprocessors": 1, "shared_per_block": 48 << 10}),
    # slices of 48 KiB: too much beside what a kernel has itself, unless the launch asks
    Path("weight_norm-0", (3, 12288)),
    # slices cut in parts
    Path("weight_norm-1", (4099, 5), workspace=True),
    Path("weight_norm-None", (4099, 5), torch.float16, workspace=True),
    Path("weight_norm-0", (3, 20000), workspace=True),
)  # fmt: skip


@thinned("path", of=[(path,) for path in PATHS], fold=5)
def test_every_path(mode: str, path: Path) -> None:
    case = next(case for case in CASES if case.name == path.case)
    require_kernels(case.op)
    with driver.settings(mode=mode, order="random", seed=1, **path.device) as reports, native.installed():
        compare(case, case.inputs(path.shape, path.dtype), channels_last if path.last else as_it_is)
    assert path.clusters == any(launch.cluster > 1 for report in reports for launch in report.launches)
    assert path.workspace == (reports[0].workspace > 0)


PLANS: dict[str, dict[str, int]] = {
    "split": {"resident": 0},
    "split-scalar": {"resident": 0, "scalar": 1},
    "scalar": {"scalar": 1},
    "resident": {"resident": 1},
    **{f"cluster-{n}": {"resident": 1, "cluster": n} for n in (1, 2, 4, 8)},
}
PLANNED = [case for case in CASES if case.name in (
    "batch_norm-train", "batch_norm-train-residual-relu", "batch_norm-train-residual-gelu", "batch_renorm-relu",
    "group_norm-some", "group_norm-some-residual-leaky_relu", "group_norm-one", "instance_norm-input",
)]  # fmt: skip


# Slices that are long enough for eight blocks, some of an odd length.
PLANNED_SHAPES = ((4, 4, 40, 40), (8, 24, 12, 12), (3, 6, 33, 31))


@thinned("case", "plan", "shape", of=[(case, p, shape) for case in PLANNED for p in PLANS for shape in PLANNED_SHAPES])
def test_every_plan(mode: str, case: Case, plan: str, shape: tuple[int, ...]) -> None:
    reports = check(case, shape, mode, plan, plan=PLANS[plan])
    if PLANS[plan].get("resident") == 0:
        assert {launch.cluster for report in reports for launch in report.launches} == {1}


@pytest.mark.skipif(MODES == ("asan",), reason="the sanitizers add nothing")
@pytest.mark.parametrize("plan", ("split", "resident"))
@pytest.mark.parametrize("name", ("batch_norm-train", "group_norm-one", "layer_norm"))
def test_a_slice_that_drifts(name: str, plan: str) -> None:
    """The first elements, whose mean deviations may be taken from, are far from the others."""
    case = next(case for case in CASES if case.name == name)
    x, *parameters = case.inputs((3, 4, 64, 64), torch.float32)
    ramp = torch.linspace(0, 50, 64 * 64).view(1, 1, 64, 64)
    for layout in (as_it_is, channels_last):
        with driver.settings(plan=PLANS[plan], multiprocessors=16), native.installed():
            compare(case, [x + ramp, *parameters], layout)


@pytest.mark.skipif(MODES == ("asan",), reason="this is that process")
def test_under_sanitizers() -> None:
    output, _ = _sanitized[0].communicate()
    assert _sanitized[0].returncode == 0, output[-8000:]
