"""Batch renormalisation: functional and modules, on batch normalisation's kernels and autograd function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function_variadic
from torch.types import Device

from fastnorm.batch_norm import BatchNormFunction, _BatchNorm, check_eps
from fastnorm.norm import norm_op
from fastnorm.op import refuse_bool
from fastnorm.overrides import overridden

_batch_renorm = norm_op("batch_renorm", BatchNormFunction)
Limit = float | Callable[[int], float]


def batch_renorm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    r_max: float = 3.0,
    d_max: float = 5.0,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    skip_nonfinite_stats: bool = False,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Batch renormalisation (Ioffe 2017, arXiv:1702.03275), residual and activation in the same kernel.

        y = activation(((x - mean) / sigma * r + d) * weight + bias + residual),   sigma = sqrt(var + eps)

        r = clip(sigma / sigma_running, 1 / r_max, r_max)
        d = clip((mean - running_mean) / sigma_running, -d_max, d_max),   sigma_running = sqrt(running_var + eps)

    in training, with mean and var (biased) those of each channel over the batch and the spatial positions, and the
    running statistics as they were before this batch. Backward takes r and d for constants. Where neither is clipped, y
    is what evaluation would give with these running statistics: small or correlated batches no longer normalise an
    example by its neighbours. r_max = 1 and d_max = 0 are batch normalisation, bit for bit.

    The running statistics then take in the batch's as :func:`batch_norm`'s do: ``momentum`` weighs the new value, the
    variance is unbiased, and it is the variance that is averaged (the paper averages sigma), so that a state_dict goes
    from BatchNorm to BatchRenorm and back. Evaluation is batch normalisation's.

    Args:
        input, weight, bias, training, momentum, eps, residual, activation, skip_nonfinite_stats, num_batches_tracked:
            as in :func:`batch_norm`.
        running_mean, running_var: (C), of the input's type or, for bfloat16 and float16, float32; needed in training
            too.
        r_max: at least 1; inf does not clip.
        d_max: at least 0, in units of sigma_running; inf does not clip.

    Raises:
        ValueError: one value per channel in training; r_max < 1 or d_max < 0; eps < 0, or eps = 0 in training; an
            unknown activation.
        RuntimeError: no running statistics, or such that require grad; a shape, type or device that does not fit;
            nothing has been written then.
        TypeError: a training that is no bool.

    Example:
        >>> x = torch.randn(8, 4, 5, 5) * 2 + 1
        >>> mean, var = torch.ones(4), torch.full((4,), 4.0)
        >>> evaluated = fastnorm.functional.batch_renorm(x, mean, var)
        >>> trained = fastnorm.functional.batch_renorm(x, mean, var, training=True)
        >>> torch.allclose(trained, evaluated, atol=1e-5)
        True
    """
    overrides = has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual)
    if overrides and not is_dynamo_compiling():
        return overridden(batch_renorm, locals())
    if training is not True and training is not False:
        refuse_bool("batch_renorm", "training", training)
    if type(eps) is not float or eps <= 0.0:
        check_eps("batch_renorm", training, eps)
    setting = (
        running_mean, running_var, num_batches_tracked,
        training, momentum, eps, activation, skip_nonfinite_stats, (r_max, d_max),
    )  # fmt: skip
    return _batch_renorm(input, weight, bias, residual, setting)


def _is_at_hand(tensor: Tensor) -> bool:
    return tensor.is_cpu


class _BatchRenorm(_BatchNorm):
    """What the three modules share."""

    _op = staticmethod(_batch_renorm)
    _functional = staticmethod(batch_renorm)
    # num_batches_tracked, and the version and the value that it has after the forward that was last prepared
    _expected: tuple[Tensor, int, int] | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        r_max: Limit = 3.0,
        d_max: Limit = 5.0,
        bias: bool = True,
        activation: str | None = None,
        skip_nonfinite_stats: bool = False,
    ) -> None:
        name = type(self).__name__
        if not track_running_stats:
            raise ValueError(f"{name}: track_running_stats must be True, for r and d come from the running statistics")
        if not callable(r_max) and not r_max >= 1:
            raise ValueError(f"{name}: r_max must be at least 1, got {r_max}")
        if not callable(d_max) and not d_max >= 0:
            raise ValueError(f"{name}: d_max must be at least 0, got {d_max}")
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, activation=activation, skip_nonfinite_stats=skip_nonfinite_stats,
        )  # fmt: skip
        self.r_max = r_max
        self.d_max = d_max

    def _tracked(self) -> int:
        """num_batches_tracked as a number.

        From a GPU it is read back only if something else than this module's forward has written it, not through .data:
        waiting for the device at each step would cost more than the op.
        """
        tensor = self.num_batches_tracked
        # with skip_nonfinite_stats only the device knows whether the last batch counted
        if _is_at_hand(tensor) or self.skip_nonfinite_stats or tensor.is_inference():
            return int(tensor)
        known, version, value = self._expected or (None, 0, 0)
        if known is not tensor or version != tensor._version:
            value = int(tensor)
        self._expected = tensor, tensor._version + 1, value + 1
        return value

    @property
    def _renorm(self) -> tuple[float, float]:
        """r_max and d_max for the next batch."""
        r_max, d_max = self.r_max, self.d_max
        if not self.training:
            return 1.0, 0.0
        if callable(r_max) or callable(d_max):
            tracked = self._tracked()
            r_max = r_max(tracked) if callable(r_max) else r_max
            d_max = d_max(tracked) if callable(d_max) else d_max
        return r_max, d_max

    def extra_repr(self) -> str:
        limits = (
            f"{name}={getattr(limit, '__name__', limit)}"
            for name, limit in (("r_max", self.r_max), ("d_max", self.d_max))
        )
        return ", ".join([super().extra_repr(), *limits])


_MODULE_DOC = """Batch renormalisation, see :func:`fastnorm.functional.batch_renorm`; state_dict as torch.nn.{norm}'s.

    The paper starts as batch normalisation (r_max = 1, d_max = 0) until the running statistics mean something, and
    then opens both slowly: give functions of the number of batches seen so far.

    Under activation checkpointing, forward runs again in backward, and then sees running statistics that the first time
    has updated: the gradients are those for the r and d of the second time.

    Args:
        num_features, eps, momentum, affine, device, dtype: as torch.nn.{norm} has them.
        track_running_stats: must be True.
        r_max, d_max: a number, or a function that takes the number of batches tracked before this one and returns it.
        bias, activation, skip_nonfinite_stats: as fastnorm.{norm} has them.

    Shape:
        input, and ``residual`` where one is given to forward: {shape}; output the same.

    Raises:
        ValueError: r_max < 1; d_max < 0; track_running_stats=False.

    Example:
        >>> norm = fastnorm.{name}(
        ...     16,
        ...     r_max=lambda batches: min(3.0, max(1.0, batches / 5000)),
        ...     d_max=lambda batches: min(5.0, max(0.0, (batches - 5000) / 4000)),
        ... )
        >>> norm(torch.randn({example})).shape
        torch.Size([{example}])
    """


def _doc(dims: int, shape: str, example: str) -> str:
    return _MODULE_DOC.format(name=f"BatchRenorm{dims}d", norm=f"BatchNorm{dims}d", shape=shape, example=example)


class BatchRenorm1d(_BatchRenorm):
    __doc__ = _doc(1, "(N, C) or (N, C, L)", "8, 16")
    _input_dims = (2, 3)
    _input_shape = "(N, C) or (N, C, L)"


class BatchRenorm2d(_BatchRenorm):
    __doc__ = _doc(2, "(N, C, H, W)", "8, 16, 4, 4")
    _input_dims = (4,)
    _input_shape = "(N, C, H, W)"


class BatchRenorm3d(_BatchRenorm):
    __doc__ = _doc(3, "(N, C, D, H, W)", "8, 16, 2, 4, 4")
    _input_dims = (5,)
    _input_shape = "(N, C, D, H, W)"
