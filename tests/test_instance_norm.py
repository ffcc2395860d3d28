"""What only InstanceNorm has: running statistics, unbatched input, and what torch's modules check."""

from __future__ import annotations

import copy
import pickle

import pytest
import reference
import torch
from test_ops import channels_last
from torch import Tensor, nn

import fastnorm
import fastnorm.functional as fn

RANKS = (
    (fastnorm.InstanceNorm1d, nn.InstanceNorm1d, (6, 5, 9)),
    (fastnorm.InstanceNorm2d, nn.InstanceNorm2d, (6, 5, 9, 4)),
    (fastnorm.InstanceNorm3d, nn.InstanceNorm3d, (3, 5, 2, 3, 4)),
)
every_rank = pytest.mark.parametrize(("ours", "theirs", "shape"), RANKS, ids=["1d", "2d", "3d"])
SETTINGS = (
    {},
    {"affine": True},
    {"affine": True, "track_running_stats": True},
    {"track_running_stats": True, "momentum": 0.3, "eps": 1e-3},
    {"track_running_stats": True, "momentum": None},
)


def batches(shape: tuple[int, ...], count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    return [torch.randn(shape, generator=generator) * 2 + 1 for _ in range(count)]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@every_rank
def test_a_few_steps_then_eval_as_torch(ours: type, theirs: type, shape: tuple[int, ...], setting: dict) -> None:
    a, b = ours(5, **setting), theirs(5, **setting)
    for training in (True, False):
        a.train(training)
        b.train(training)
        for x in batches(shape):
            for layout in (lambda t: t, channels_last):
                torch.testing.assert_close(a(layout(x)), b(x))
    assert list(a.state_dict()) == list(b.state_dict())
    for ours_value, theirs_value in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(ours_value, theirs_value)
    b.load_state_dict(a.state_dict())
    a.load_state_dict(b.state_dict())
    assert repr(a) == repr(b) and isinstance(a, theirs)


@every_rank
def test_input_without_a_batch(ours: type, theirs: type, shape: tuple[int, ...]) -> None:
    for training in (True, False):
        a = ours(5, affine=True, track_running_stats=True, activation="relu").train(training)
        x, residual = torch.randn(shape[1:]), torch.randn(shape[1:])
        twin = copy.deepcopy(a)
        assert torch.equal(a(x, residual), twin(x[None], residual[None])[0])
        for one, other in zip(a.buffers(), twin.buffers(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_running_statistics_against_float64(dtype: torch.dtype) -> None:
    x = (torch.randn(5, 3, 40, 41, dtype=torch.float64) * 2 + 3).to(dtype)
    for layout in (lambda t: t, channels_last):
        mean, var = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
        fn.instance_norm(layout(x), mean, var, momentum=0.25)
        samples = [reference.running_statistics(s[None].double(), torch.zeros(3), torch.ones(3), 0.25) for s in x]
        for got, wanted in ((mean, [m for m, _ in samples]), (var, [v for _, v in samples])):
            wanted = torch.stack(wanted).mean(0).double()
            assert ((got - wanted) / wanted).abs().max() <= max(torch.finfo(dtype).eps, 1e-12)


def test_running_statistics_tell_autograd_that_they_changed() -> None:
    norm = fastnorm.InstanceNorm2d(3, track_running_stats=True)
    versions = [t._version for t in (norm.running_mean, norm.running_var)]
    norm(torch.randn(2, 3, 4, 4))
    assert [t._version for t in (norm.running_mean, norm.running_var)] > versions
    with torch.inference_mode():
        fastnorm.InstanceNorm2d(3, track_running_stats=True)(torch.randn(2, 3, 4, 4))


def test_no_channels() -> None:
    """No groups then, for the backward that it shares with group_norm; torch's has an empty gradient."""
    x = torch.ones(2, 0, 3, 3, requires_grad=True)
    norm = fastnorm.InstanceNorm2d(0, affine=True, track_running_stats=True)
    norm(x).sum().backward()
    assert x.grad.shape == x.shape and norm.weight.grad.shape == (0,)


def test_an_empty_batch_teaches_nothing() -> None:
    norm = fastnorm.InstanceNorm2d(3, track_running_stats=True)
    assert norm(torch.ones(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    assert not norm.running_mean.any() and torch.equal(norm.running_var, torch.ones(3))


def test_another_number_of_channels() -> None:
    x = torch.randn(2, 4, 5, 5)
    with pytest.raises(ValueError, match="InstanceNorm2d: input must have num_features=3 channels, got 4"):
        fastnorm.InstanceNorm2d(3, affine=True)(x)
    with pytest.warns(UserWarning, match="num_features is not used"):
        y = fastnorm.InstanceNorm2d(3)(x)
    torch.testing.assert_close(y, nn.functional.instance_norm(x))


def test_a_state_dict_of_version_1_says_what_is_wrong() -> None:
    norm = fastnorm.InstanceNorm2d(3)
    with pytest.raises(RuntimeError, match="does not track running stats by default"):
        norm.load_state_dict({"running_mean": torch.zeros(3), "running_var": torch.ones(3)})


def test_bias_false_and_reset() -> None:
    norm = fastnorm.InstanceNorm2d(3, affine=True, bias=False)
    assert norm.bias is None and list(norm.state_dict()) == ["weight"]
    norm.reset_parameters()
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(norm(x), nn.functional.instance_norm(x))


def test_deepcopy_pickle_and_repr() -> None:
    norm = fastnorm.InstanceNorm2d(3, affine=True, track_running_stats=True, activation="silu")
    assert repr(norm).endswith("activation='silu')")
    x = torch.randn(4, 3, 5, 5)
    norm(x)
    norm.eval()
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(twin(x), norm(x)) and repr(twin) == repr(norm)


@pytest.mark.parametrize(
    "wrong", [{"residual": torch.ones(1)}, {"activation": "tanh"}, {"weight": torch.ones(7)}], ids=str
)
def test_statistics_are_as_they_were_after_an_error(wrong: dict) -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises((RuntimeError, ValueError)):
        fn.instance_norm(torch.ones(2, 3, 4, 4), mean, var, **wrong)
    assert not mean.any() and torch.equal(var, torch.ones(3)) and (mean._version, var._version) == (0, 0)
