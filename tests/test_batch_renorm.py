"""What only BatchRenorm has: its limits and their schedule, and what it shares with BatchNorm bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import reference
import torch
from test_ops import FLOATS, channels_last, differentiate
from torch import Tensor, nn
from torch_path import by_torch

import fastnorm
import fastnorm.functional as fn

RANKS = (
    (fastnorm.BatchRenorm1d, fastnorm.BatchNorm1d, (6, 5)),
    (fastnorm.BatchRenorm1d, fastnorm.BatchNorm1d, (6, 5, 9)),
    (fastnorm.BatchRenorm2d, fastnorm.BatchNorm2d, (6, 5, 9, 4)),
    (fastnorm.BatchRenorm3d, fastnorm.BatchNorm3d, (3, 5, 2, 3, 4)),
)
every_rank = pytest.mark.parametrize(("renorm", "norm", "shape"), RANKS, ids=["1d-2", "1d-3", "2d", "3d"])
every_layout = pytest.mark.parametrize("layout", (lambda t: t, channels_last), ids=("contiguous", "channels_last"))


def statistics(C: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    ramp = torch.linspace(0.5, 2.0, C).bfloat16().to(dtype)
    return ramp, ramp.flip(0).contiguous()


@every_layout
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_without_correction_it_is_batch_norm_bit_for_bit(dtype: torch.dtype, layout) -> None:
    for shape in ((4, 5, 7, 9), (33, 70, 2, 2), (9, 5)):
        x, residual, dy = (layout(torch.randn(shape).to(dtype)) for _ in range(3))
        weight, bias = torch.randn(2, shape[1]).to(dtype)
        bias[0] = -0.0
        results = []
        for function, limits in ((fn.batch_norm, {}), (fn.batch_renorm, {"r_max": 1.0, "d_max": 0.0})):
            running = statistics(shape[1], dtype)

            def run(x, weight, bias, residual, function=function, limits=limits, running=running) -> Tensor:
                return function(x, *running, weight, bias, True, residual=residual, activation="relu", **limits)

            y, grads = differentiate(run, [x, weight, bias, residual], dy)
            results.append([y, *grads, *running])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@every_rank
def test_evaluation_and_statistics_are_batch_norms(renorm: type, norm: type, shape: tuple[int, ...]) -> None:
    a, b = renorm(5, momentum=0.3), norm(5, momentum=0.3)
    for _ in range(3):
        x = torch.randn(shape) * 2 + 1
        a(x), b(x)
    for key, value in b.state_dict().items():
        assert torch.equal(a.state_dict()[key], value)
    a.eval(), b.eval()
    assert torch.equal(a(x), b(x))
    b.load_state_dict(a.state_dict())
    a.load_state_dict(b.state_dict())


@every_layout
def test_unclipped_it_is_evaluation_by_the_old_statistics(layout) -> None:
    for shape in ((4, 5, 7, 9), (33, 70, 2, 2), (2, 3, 80, 90)):
        x = layout(torch.randn(shape, dtype=torch.float64) * 2 + 1)
        evaluated = fn.batch_renorm(x, *statistics(shape[1], torch.float64))
        inf = float("inf")
        trained = fn.batch_renorm(x, *statistics(shape[1], torch.float64), training=True, r_max=inf, d_max=inf)
        torch.testing.assert_close(trained, evaluated, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limits", ((1.0, 0.3), (1.5, 0.0), (1.0, 5.0), (3.0, 0.0)), ids=str)
def test_each_limit_alone(limits: tuple[float, float]) -> None:
    x, dy = torch.randn(2, 8, 6, 5, 5, dtype=torch.float64)
    weight, bias = torch.randn(2, 6, dtype=torch.float64)
    r_max, d_max = limits
    results = [
        differentiate(f, [x, weight, bias], dy)
        for f in (
            lambda x, w, b: fn.batch_renorm(
                x, *statistics(6, torch.float64), w, b, True, r_max=r_max, d_max=d_max, eps=0.1
            ),
            lambda x, w, b: reference.batch_renorm(
                x, w, b, statistics=statistics(6, torch.float64), r_max=r_max, d_max=d_max, eps=0.1
            ),
        )
    ]
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_schedule_sees_the_batches_before_this_one() -> None:
    seen: list[int] = []

    def r_max(batches: int) -> float:
        seen.append(batches)
        return 1.0 + batches

    norm = fastnorm.BatchRenorm2d(3, r_max=r_max, d_max=lambda batches: 0.0 if batches < 2 else 4.0)
    plain = fastnorm.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5) * 5 + 1
    assert torch.equal(norm(x), plain(x))  # r_max = 1, d_max = 0
    assert not torch.equal(norm(x), plain(x))
    norm.eval()(x)
    assert seen == [0, 1] and norm.num_batches_tracked == 2
    assert repr(norm).endswith("r_max=r_max, d_max=<lambda>)")


def test_repr_deepcopy_and_pickle() -> None:
    norm = fastnorm.BatchRenorm1d(3, r_max=2.0, activation="silu", bias=False)
    assert repr(norm) == repr(fastnorm.BatchNorm1d(3, activation="silu", bias=False)).replace(
        "BatchNorm", "BatchRenorm"
    ).replace(")", ", r_max=2.0, d_max=5.0)")
    x = torch.randn(9, 3) * 3
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(twin(x), copy.deepcopy(norm)(x)) and repr(twin) == repr(norm)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm) and not isinstance(norm, nn.BatchNorm1d)


def test_an_overflowed_batch_leaves_the_statistics_alone() -> None:
    norm = fastnorm.BatchRenorm2d(3, skip_nonfinite_stats=True)
    x = torch.randn(4, 3, 5, 5)
    norm(x)
    before = copy.deepcopy(norm.state_dict())
    x[0, 1, 2, 3] = float("inf")
    assert norm(x)[:, 1].isnan().all()
    for key, value in before.items():
        assert torch.equal(norm.state_dict()[key], value)


def test_fallback_keeps_every_keyword() -> None:
    """torch's ops in place of the kernels: value, statistics; by kernels forward mode's tangent, r and d constant."""
    norm = fastnorm.BatchRenorm2d(3, activation="gelu", momentum=None, r_max=1.2, d_max=0.1)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 0.5, -1.0])), norm.bias.copy_(torch.tensor([0.3, 0.0, 1.0]))
    twin = copy.deepcopy(norm)
    x, residual, tangent = torch.randn(3, 4, 3, 5, 5).unbind(0)
    x = x * 3 + 2  # beyond the limits, which makes r and d constants in truth
    with torch.autograd.forward_ad.dual_level():
        y = norm(torch.autograd.forward_ad.make_dual(x, tangent), residual)
        value, derivative = torch.autograd.forward_ad.unpack_dual(y)
    torch.testing.assert_close(value, copy.deepcopy(twin)(x, residual))
    h = 1e-2
    plus, minus = (copy.deepcopy(twin)(x + s * h * tangent, residual) for s in (1, -1))
    torch.testing.assert_close(derivative, (plus - minus) / (2 * h), rtol=1e-2, atol=1e-2)
    other = copy.deepcopy(twin)
    torch.testing.assert_close(by_torch(other, x, residual), twin(x, residual))
    for module in (norm, other):
        torch.testing.assert_close(module.running_var, twin.running_var)
        assert module.num_batches_tracked == 1


def test_the_schedule_reads_the_count_only_where_something_else_wrote_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CUDA device, where reading it waits for all work before."""
    monkeypatch.setattr(fastnorm.batch_renorm, "_is_at_hand", lambda tensor: False)
    seen: list[int] = []

    def r_max(batches: int) -> float:
        seen.append(batches)
        return 2.0

    norm = fastnorm.BatchRenorm1d(3, r_max=r_max)
    x = torch.randn(8, 3)
    for _ in range(3):
        norm(x)
    norm.num_batches_tracked.data.fill_(100)  # behind autograd's back: would be seen only by reading
    norm(x)
    norm.load_state_dict({**norm.state_dict(), "num_batches_tracked": torch.tensor(20)})
    norm(x)
    copy.deepcopy(norm)(x)
    norm.num_batches_tracked.zero_()
    with pytest.raises(RuntimeError):
        norm(x[:, :2])
    norm(x)
    assert seen == [0, 1, 2, 3, 20, 21, 0, 0]
    careful = fastnorm.BatchRenorm1d(3, r_max=r_max, skip_nonfinite_stats=True)
    for batch in (x, x * float("inf"), x):
        careful(batch)
    assert seen[8:] == [0, 1, 1]


def test_the_schedule_sees_every_count_on_a_cpu() -> None:
    seen: list[int] = []
    norm = fastnorm.BatchRenorm1d(3, r_max=lambda batches: seen.append(batches) or 2.0)
    x = torch.randn(8, 3)
    norm(x)
    norm.num_batches_tracked.data.fill_(100)
    norm(x)
    norm.num_batches_tracked.data = torch.tensor(7)
    norm(x)
    assert seen == [0, 100, 7] and norm.num_batches_tracked == 8


X = torch.ones(4, 3, 5, 5)
WRONG = {
    "r_max": (lambda: fn.batch_renorm(X, *statistics(3), training=True, r_max=0.9), ValueError, "r_max must be at l"),
    "r_max NaN": (lambda: fn.batch_renorm(X, *statistics(3), r_max=float("nan")), ValueError, "r_max.*got nan"),
    "d_max": (lambda: fn.batch_renorm(X, *statistics(3), training=True, d_max=-1.0), ValueError, "d_max.*got -1"),
    "no statistics": (lambda: fn.batch_renorm(X, None, None, training=True), RuntimeError, "batch_renorm: running_m"),
    "their length": (lambda: fn.batch_renorm(X, *statistics(4)), RuntimeError, r"batch_renorm: running_mean.*\[3\]"),
    "integers": (lambda: fn.batch_renorm(X.long(), *statistics(3)), NotImplementedError, "batch_renorm: no kernel"),
    "module: r_max": (lambda: fastnorm.BatchRenorm2d(3, r_max=0.5), ValueError, "BatchRenorm2d: r_max must be"),
    "module: d_max": (lambda: fastnorm.BatchRenorm2d(3, d_max=float("nan")), ValueError, "BatchRenorm2d: d_max must"),
    "module: rank": (lambda: fastnorm.BatchRenorm1d(3)(X), ValueError, "BatchRenorm1d: input must have shape"),
    "module: statistics": (
        lambda: fastnorm.BatchRenorm2d(3, track_running_stats=False),
        ValueError,
        "track_running_stats must be True",
    ),
    "schedule": (lambda: fastnorm.BatchRenorm2d(3, r_max=lambda batches: 0.0)(X), ValueError, "r_max must be at least"),
}


@pytest.mark.parametrize("name", WRONG)
def test_message(name: str) -> None:
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()
