"""Dropout that stays on at test time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastnorm


def every_kind() -> nn.Sequential:
    names = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")
    layers = [getattr(library, name)(0.5) for library in (nn, fastnorm) for name in names]
    return nn.Sequential(*layers, fastnorm.DropPath(0.5))


def flags(model: nn.Module) -> list[bool]:
    return [m.training for m in model.modules()]


def test_every_kind_of_dropout_and_nothing_else() -> None:
    model = nn.Sequential(every_kind(), nn.BatchNorm1d(3), fastnorm.BatchNorm1d(3), nn.Linear(3, 3)).eval()
    with fastnorm.mc_dropout(model) as given:
        assert given is model
        assert all(m.training for m in model[0])
        assert not any(m.training for m in (model, model[0], *model[1:]))
    assert not any(flags(model))


def test_each_layer_gets_back_its_own_flag() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), *(nn.Dropout(0.5) for _ in range(4))).eval()
    model[2].train()
    model[0].train()  # a mixture that one train() or eval() at the end would undo
    before = flags(model)
    with fastnorm.mc_dropout(model):
        assert flags(model) == [False, True, True, True, True, True]
    assert flags(model) == before


def test_after_an_exception() -> None:
    model = every_kind().eval()
    with pytest.raises(KeyError), fastnorm.mc_dropout(model):
        assert model[0].training
        raise KeyError
    assert not any(flags(model))


def test_nested() -> None:
    model = every_kind().eval()
    with fastnorm.mc_dropout(model):
        with fastnorm.mc_dropout(model):
            assert model[0].training
        assert model[0].training
        with fastnorm.mc_dropout(model[0]):  # a model that is itself a dropout layer
            assert model[0].training
    assert not any(flags(model))


def test_shared_layer() -> None:
    drop = fastnorm.Dropout(0.5)
    model = nn.Sequential(drop, nn.Sequential(drop, nn.ReLU()), drop).eval()
    with fastnorm.mc_dropout(model):
        assert drop.training and not model[1].training
    assert not drop.training


def test_also() -> None:
    class DropPath(nn.Module):  # another library's
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if self.training else x

    model = nn.Sequential(DropPath(), nn.LSTM(2, 2, num_layers=2, dropout=0.5)).eval()
    with fastnorm.mc_dropout(model, also=(DropPath,)):
        assert model[0].training and not model[1].training
    with fastnorm.mc_dropout(model, also=(nn.LSTM,)):
        assert model[1].training and not model[0].training
    assert not any(flags(model))


def test_no_dropout() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"^mc_dropout: model must have at least one dropout layer, got Sequential"):
        with fastnorm.mc_dropout(model):
            raise AssertionError("not reached")
    with pytest.raises(ValueError, match="dropout layer"):
        fastnorm.mc_predict(model, torch.ones(3, 2))


def test_statistics_leave_batch_norm_alone() -> None:
    model = nn.Sequential(fastnorm.BatchNorm1d(4), nn.Dropout(0.5)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fastnorm.mc_predict(model, torch.randn(16, 4), samples=3)
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k])


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
def test_mean_and_standard_deviation(dtype: torch.dtype) -> None:
    """Against two passes in float64 over the same outputs, at a mean where E[y^2] - E[y]^2 would have nothing left."""
    outputs: list[Tensor] = []

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = fastnorm.Dropout(0.5)

        def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
            y = self.drop(x) + shift
            outputs.append(y)
            return y

    model = Shifted().eval()
    shift = 2.0**20 if dtype == torch.float64 else 2.0**12 if dtype == torch.float32 else 4.0
    x = torch.rand(5, 7, dtype=dtype, requires_grad=True)
    mean, std = fastnorm.mc_predict(model, x, samples=32, shift=shift)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert mean.dtype == std.dtype == wide and not mean.requires_grad and not std.requires_grad
    stacked = torch.stack(outputs).double()
    assert len(outputs) == 32 and not outputs[0].requires_grad and not model.drop.training
    # each of the 32 steps rounds the mean once, and std takes its differences from it
    allowed = 32 * torch.finfo(wide).eps * shift
    torch.testing.assert_close(mean.double(), stacked.mean(0), rtol=0, atol=allowed)
    torch.testing.assert_close(std.double(), stacked.std(0), rtol=1e-5, atol=allowed)
    assert (std > 0).any()


def test_prediction_is_that_of_the_passes() -> None:
    """The expectation of a linear model under dropout is its output without: five standard errors."""
    model = nn.Sequential(fastnorm.Dropout(0.3), nn.Linear(64, 3)).eval()
    x = torch.randn(2, 64)
    mean, std = fastnorm.mc_predict(model, x, samples=500)
    with torch.no_grad():
        assert ((mean - model(x)).abs() < 5 * std / 500**0.5).all()


def test_seed() -> None:
    model = every_kind()[0:1].eval()
    x = torch.ones(4, 5)
    torch.manual_seed(2)
    first = fastnorm.mc_predict(model, x)
    torch.manual_seed(2)
    again = fastnorm.mc_predict(model, x)
    assert torch.equal(first.mean, again.mean) and torch.equal(first.std, again.std)


def test_an_output_that_is_the_input_is_not_written() -> None:
    model = nn.Sequential(nn.Dropout(0.0)).eval()
    x = torch.ones(3)
    mean, std = fastnorm.mc_predict(model, x, samples=4)
    mean.add_(1)
    assert torch.equal(x, torch.ones(3)) and not std.any()


def test_errors() -> None:
    model = nn.Sequential(nn.Dropout(0.5)).eval()
    for samples in (1, 0, -1):
        with pytest.raises(ValueError, match=f"^mc_predict: samples must be at least 2, got {samples}"):
            fastnorm.mc_predict(model, torch.ones(2), samples=samples)

    class Returns(nn.Module):
        def __init__(self, *outputs: Tensor) -> None:
            super().__init__()
            self.drop, self.outputs = nn.Dropout(0.5), outputs

        def forward(self) -> Tensor | tuple[Tensor, ...]:
            return self.outputs if len(self.outputs) > 1 else self.outputs[0]

    for outputs, got in (([torch.ones(2)] * 2, "tuple"), ([torch.ones(2).argmax()], r"a tensor of type torch\.int64")):
        returns = Returns(*outputs).eval()
        with pytest.raises(TypeError, match=rf"^mc_predict: model must return a floating-point tensor, got {got}$"):
            fastnorm.mc_predict(returns)
        assert not returns.drop.training
