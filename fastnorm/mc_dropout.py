"""Monte Carlo dropout: predictions with their spread, from a network whose dropout stays on at test time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def mc_dropout(model: Model, *, also: tuple[type[nn.Module], ...] = ()) -> Iterator[Model]:
    """Keeps dropout on inside a ``with`` block, whatever the model's mode (Gal & Ghahramani 2016, arXiv:1506.02142).

    Every dropout layer of the model goes to training mode: torch.nn's and fastnorm's Dropout, Dropout1d/2d/3d,
    AlphaDropout, FeatureAlphaDropout, and DropPath. Everything else, batch normalisation above all, stays as it is. At
    the end, also after an exception, each of these layers gets back the flag that it had. Blocks may be nested.

    Dropout inside of another layer (torch.nn.LSTM, torch.nn.MultiheadAttention) follows that layer's own mode and stays
    as it is; ``also`` can name such types, or dropout layers of other libraries.

    Args:
        model: usually in eval mode.
        also: further types of layers to switch.

    Yields:
        The model.

    Raises:
        ValueError: the model has no dropout layer.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), fastnorm.Dropout(0.5)).eval()
        >>> with fastnorm.mc_dropout(model):
        ...     model[0].training, model[1].training
        (False, True)
        >>> model[1].training
        False
    """
    kinds = (nn.modules.dropout._DropoutNd, *also)  # the base of torch.nn's dropout layers and of fastnorm's
    layers = [(layer, layer.training) for layer in model.modules() if isinstance(layer, kinds)]
    if not layers:
        raise ValueError(
            f"mc_dropout: model must have at least one dropout layer, got {type(model).__name__} with none"
        )
    try:
        for layer, _ in layers:
            layer.training = True  # and not its children's: train() would descend
        yield model
    finally:
        for layer, training in layers:
            layer.training = training


class MCPrediction(NamedTuple):
    """Mean and unbiased standard deviation of a model's output over the passes of :func:`mc_predict`."""

    mean: Tensor
    std: Tensor


def mc_predict(
    model: nn.Module, *args: Any, samples: int = 20, also: tuple[type[nn.Module], ...] = (), **kwargs: Any
) -> MCPrediction:
    """Runs a model several times with dropout on: the mean is its prediction, the standard deviation its uncertainty.

        mean = sum_t y_t / T,   std = sqrt(sum_t (y_t - mean)^2 / (T - 1)),   y_t = model(*args, **kwargs), t = 1 .. T

    Both are accumulated pass by pass by Welford's method, in float32, or float64 for a model that returns float64, and
    keep that type. No gradients. (Gal & Ghahramani 2016, arXiv:1506.02142.)

    Args:
        model: returns one tensor. Its other layers run in the mode they are in: call ``model.eval()`` before, or batch
            normalisation will take in the batch at every pass.
        args, kwargs: what the model takes.
        samples: number of passes T, at least 2.
        also: see :func:`mc_dropout`.

    Raises:
        ValueError: fewer than two samples, or a model without dropout layers.
        TypeError: the model returns something else than a floating-point tensor.

    Example:
        >>> model = torch.nn.Sequential(fastnorm.Dropout(0.5), torch.nn.Linear(8, 2)).eval()
        >>> mean, std = fastnorm.mc_predict(model, torch.ones(4, 8), samples=10)
        >>> mean.shape, bool((std > 0).all())
        (torch.Size([4, 2]), True)
    """
    if samples < 2:
        raise ValueError(f"mc_predict: samples must be at least 2, got {samples}")
    mean = squares = torch.empty(0)
    with torch.no_grad(), mc_dropout(model, also=also):
        for count in range(1, samples + 1):
            y = model(*args, **kwargs)
            if not isinstance(y, Tensor) or not y.is_floating_point():
                got = f"a tensor of type {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
                raise TypeError(f"mc_predict: model must return a floating-point tensor, got {got}")
            y = y.to(torch.promote_types(y.dtype, torch.float32))
            if count == 1:
                mean, squares = y.clone(), torch.zeros_like(y)
                continue
            difference = y - mean
            mean.add_(difference, alpha=1.0 / count)
            squares.addcmul_(difference, y - mean)
        return MCPrediction(mean, squares.div_(samples - 1).sqrt_())
