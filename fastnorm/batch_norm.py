"""Batch normalisation: autograd function, functional and modules."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function_variadic
from torch.types import Device

from fastnorm import _C, compile
from fastnorm.activation import check_activation
from fastnorm.norm import (
    NormFunction,
    Setting,
    along_channels,
    complete_norm,
    norm_op,
    scale_and_shift,
)
from fastnorm.norm_module import RankedNormModule
from fastnorm.op import refuse_bool
from fastnorm.overrides import overridden


class BatchNormFunction(NormFunction):
    """y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual), see :func:`batch_norm`.

    Setting: running_mean, running_var, num_batches_tracked, training, momentum, eps, activation, skip_nonfinite_stats,
    renorm (r_max and d_max of :func:`batch_renorm`, or None). Statistics: two numbers a channel, r and d besides.
    """

    op = "batch_norm"
    activation_at = 6
    backward_setting = itemgetter(3, 6)
    tracked = 3

    @staticmethod
    def updates(setting: Setting) -> bool:
        return setting[3]

    @staticmethod
    def is_repeatable(setting: Setting) -> bool:
        return setting[8] is None  # r and d of batch_renorm would have to be merged into weight and bias

    @classmethod
    def again(
        cls,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        statistics: Tensor,
        setting: Setting,
    ) -> Tensor:
        return _C.batch_norm_normalize(input, weight, bias, residual, statistics, setting[6], False)[0]

    @staticmethod
    def composite(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, setting: Setting
    ) -> Tensor:
        """torch's own op would not do: its double backward takes the statistics for constants."""
        _, _, _, training, _, eps, *_ = setting
        x = input if input.dtype == torch.float64 else input.float()
        if training:
            dims = [d for d in range(input.dim()) if d != 1]
            centred = x - x.mean(dims, keepdim=True)
            rstd = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
        else:
            mean, rstd = (along_channels(s.to(x.dtype), x) for s in statistics)
            centred = x - mean
        z = centred * rstd
        if len(statistics) == 4:
            r, d = (s.to(x.dtype) for s in statistics[2:])
            z = scale_and_shift(z, r, d)
        return scale_and_shift(z, weight, bias).to(input.dtype)

    @staticmethod
    def torch_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, setting: Setting) -> Tensor:
        *tracked, training, momentum, eps, _, skip_nonfinite_stats, renorm = setting
        running_mean, running_var, _ = tracked
        if training and renorm is not None:
            weight, bias = _renormalized(input, weight, bias, running_mean, running_var, eps, *renorm)
        on_trial = training and skip_nonfinite_stats
        # torch's backward keeps the running statistics it was given: they must not be written after it
        mean, var, batches = compile.clones(tracked) if on_trial else tracked
        if training and batches is not None:
            batches.add_(1)
            if momentum is None:
                momentum = 1.0 / float(batches)
        z = F.batch_norm(input, mean, var, weight, bias, training, momentum or 0.0, eps)
        if on_trial and mean is not None and var is not None:
            finite = mean.isfinite().all() & var.isfinite().all()
            for t, new in zip(tracked, (mean, var, batches), strict=True):
                if t is not None and new is not None:
                    t.copy_(torch.where(finite, new, t))
        return z

    @staticmethod
    def uncovered_when_traced(input: Tensor, weight: Tensor | None, setting: Setting) -> str | None:
        tracked = setting[2]
        if tracked is None or tracked.dtype == torch.int64:
            return None
        return f"no kernel for num_batches_tracked of type {tracked.dtype}, wanted torch.int64"

    @staticmethod
    def fake_statistics(input: Tensor, setting: Setting, keep: bool) -> Tensor:
        training, (r_max, d_max) = setting[3], setting[8] or (1.0, 0.0)
        corrects = training and (r_max > 1 or d_max > 0)
        return input.new_empty((4 if corrects else 2, input.size(1)), dtype=torch.float64)

    @staticmethod
    def fake_mask(input: Tensor, setting: Setting) -> Tensor | None:
        """Of the size of mask_rows in csrc/batch_norm.h."""
        if input.numel() == 0:
            return None
        N, C, S = input.size(0), input.size(1), compile.spatial_size(input)
        last = compile.is_channels_last(input)
        if input.is_cuda:
            size = compile.cuda_mask_bytes(input)
        elif not last and S >= 16:
            size = N * C * ((S + 7) // 8)
        else:
            rows, width = (N * S, C) if last else (N, C * S)
            fold = compile.folded(width, rows)
            size = (rows + fold - 1) // fold * ((fold * width + 7) // 8)
        return compile.empty_mask(input, size)


def _renormalized(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    r_max: float,
    d_max: float,
) -> tuple[Tensor, Tensor]:
    """The weight * r and bias + weight * d that make batch normalisation batch renormalisation."""
    if running_mean is None or running_var is None:
        raise RuntimeError("batch_renorm: running_mean and running_var must be given, for r and d come from them")
    with torch.no_grad():
        x = input if input.dtype == torch.float64 else input.float()
        var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
        sigma = (running_var.to(x.dtype) + eps).sqrt()
        r = ((var + eps).sqrt() / sigma).clamp(1 / r_max, r_max)
        d = ((mean - running_mean) / sigma).clamp(-d_max, d_max)
    like = input if weight is None else weight
    r, d = r.to(like.dtype), d.to(like.dtype)
    scale, shift = (r, d) if weight is None else (weight * r, weight * d)
    return scale, shift if bias is None else bias + shift


complete_norm(
    BatchNormFunction,
    "Tensor? running_mean, Tensor? running_var, Tensor? num_batches_tracked, bool training, float? momentum, "
    "float eps, str? activation, bool skip_nonfinite_stats, float[]? renorm",
)
_batch_norm = norm_op("batch_norm", BatchNormFunction)


def check_eps(op: str, training: bool, eps: float) -> None:
    """What torch asks of eps in batch normalisation alone, of the other normalisations' nothing."""
    if not isinstance(eps, numbers.Real):
        return  # the kernel names what is no number
    if eps < 0.0 or (training and eps == 0.0):
        raise ValueError(f"{op}: eps must be {'positive in training' if training else 'at least 0'}, got {eps}")


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    skip_nonfinite_stats: bool = False,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Batch normalisation (Ioffe & Szegedy 2015, arXiv:1502.03167), residual and activation in the same kernel.

        y = activation((x - mean) * rstd * weight + bias + residual),   rstd = 1 / sqrt(var + eps)

    In training, mean and var (biased) are those of each channel over the batch and the spatial positions, and the
    running statistics take them in, the variance unbiased: ``running = (1 - momentum) * running + momentum * new``.
    Otherwise mean and var are the running statistics.

    Args:
        input: (N, C, *), float64, float32, bfloat16 or float16. Contiguous and channels_last tensors are read as they
            lie, other strides take one copy. The output has the input's layout.
        running_mean, running_var: (C), of the input's type or, for bfloat16 and float16, float32; may be None in
            training.
        weight, bias: (C), of the input's type or, for bfloat16 and float16, float32; each may be None.
        training: use the batch's statistics, and update the running ones.
        momentum: weight of the new value, in [0, 1]; None for the cumulative average, which needs
            ``num_batches_tracked``.
        eps: added to the variance, in units of input squared.
        residual: added before the activation; input's shape and type.
        activation: None, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"`` or ``"gelu"`` (the erf form).
        skip_nonfinite_stats: a batch whose mean or variance is inf or NaN in any channel, in the type of the running
            ones, as after an overflow under automatic mixed precision, leaves these and num_batches_tracked alone.
        num_batches_tracked: one int64, counted up in training.

    Raises:
        ValueError: one value per channel in training; eps < 0, or eps = 0 in training; an unknown activation.
        RuntimeError: a shape, type or device that does not fit, running statistics that require grad; nothing has been
            written then.
        TypeError: a training that is no bool.

    Example:
        >>> x = torch.randn(8, 4, 5, 5)
        >>> y = fastnorm.functional.batch_norm(x, None, None, training=True, activation="relu")
        >>> y.shape
        torch.Size([8, 4, 5, 5])
    """
    overrides = has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual)
    if overrides and not is_dynamo_compiling():
        return overridden(batch_norm, locals())
    if training is not True and training is not False:
        refuse_bool("batch_norm", "training", training)
    if type(eps) is not float or eps <= 0.0:
        check_eps("batch_norm", training, eps)
    setting = (
        running_mean, running_var, num_batches_tracked,
        training, momentum, eps, activation, skip_nonfinite_stats, None,
    )  # fmt: skip
    return _batch_norm(input, weight, bias, residual, setting)


class _BatchNorm(RankedNormModule, nn.modules.batchnorm._BatchNorm):
    """What the three modules add to torch's."""

    _op = staticmethod(_batch_norm)
    _functional: Callable[..., Tensor] = staticmethod(batch_norm)
    _renorm: tuple[float, float] | None = None

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
        bias: bool = True,
        activation: str | None = None,
        skip_nonfinite_stats: bool = False,
    ) -> None:
        check_activation(type(self).__name__, activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.activation = activation
        self.skip_nonfinite_stats = skip_nonfinite_stats

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        training = self.training
        running_mean = running_var = num_batches_tracked = None
        if self.track_running_stats or not training:
            buffers = self._buffers  # see NormModule
            try:
                running_mean, running_var = buffers["running_mean"], buffers["running_var"]
                num_batches_tracked = buffers["num_batches_tracked"] if training else None
            except KeyError:  # one is no buffer
                running_mean, running_var = self.running_mean, self.running_var
                num_batches_tracked = self.num_batches_tracked if training else None
        weight, bias = self._parameters_of_forward()
        by_batch = training or (running_mean is None and running_var is None)
        momentum = self.momentum
        if momentum is None and num_batches_tracked is None:
            momentum = 0.0  # as in torch.nn: what is not counted has no average
        overrides = has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual)
        if overrides and not is_dynamo_compiling():
            if not isinstance(input, fx.Proxy):  # of which no number is known
                self._check_input_dim(input)
            return self._overridden(
                self._functional, input, residual, running_mean, running_var, weight, bias,
                by_batch, momentum, self.eps, *(self._renorm or ()),
                num_batches_tracked=num_batches_tracked, skip_nonfinite_stats=self.skip_nonfinite_stats,
            )  # fmt: skip
        self._check_input_dim(input)
        eps = self.eps
        if type(eps) is not float or eps <= 0.0:
            check_eps(self._functional.__name__, by_batch, eps)
        setting = (
            running_mean, running_var, num_batches_tracked,
            by_batch, momentum, eps, self.activation, self.skip_nonfinite_stats, self._renorm,
        )  # fmt: skip
        return self._op(input, weight, bias, residual, setting)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", skip_nonfinite_stats=True" if self.skip_nonfinite_stats else "")


_MODULE_DOC = """torch.nn.{name} on fastnorm's kernels: the same arguments, parameters, buffers, state_dict and numbers.

        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    with mean and var (biased) of each channel over the batch in training, else the running statistics; see
    :func:`fastnorm.functional.batch_norm`, which has the source.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as torch.nn.{name} has them.
        bias: False leaves out the bias of an affine layer.
        activation: fused into the kernel: None, "relu", "leaky_relu", "silu" or "gelu".
        skip_nonfinite_stats: a batch whose statistics are inf or NaN leaves the running ones alone.

    Shape:
        input, and ``residual`` where one is given to forward: {shape}; output the same.

    Raises:
        ValueError: an unknown activation; in forward another number of dimensions, one value per channel in training.

    Example:
        >>> norm = fastnorm.{name}(16, activation="relu")
        >>> norm(torch.randn({example})).shape
        torch.Size([{example}])
    """


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    __doc__ = _MODULE_DOC.format(name="BatchNorm1d", shape="(N, C) or (N, C, L)", example="8, 16")
    _input_dims = (2, 3)
    _input_shape = "(N, C) or (N, C, L)"


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    __doc__ = _MODULE_DOC.format(name="BatchNorm2d", shape="(N, C, H, W)", example="8, 16, 4, 4")
    _input_dims = (4,)
    _input_shape = "(N, C, H, W)"


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    __doc__ = _MODULE_DOC.format(name="BatchNorm3d", shape="(N, C, D, H, W)", example="8, 16, 2, 4, 4")
    _input_dims = (5,)
    _input_shape = "(N, C, D, H, W)"
