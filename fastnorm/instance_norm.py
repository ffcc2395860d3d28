"""Instance normalisation: autograd function, functional and modules, on group normalisation's kernels."""

from __future__ import annotations

import warnings
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function_variadic
from torch.types import Device

from fastnorm.activation import check_activation
from fastnorm.batch_norm import batch_norm
from fastnorm.group_norm import GroupNormFunction, normalize_groups
from fastnorm.norm import NormFunction, Setting, complete_norm, norm_op
from fastnorm.norm_module import RankedNormModule
from fastnorm.op import refuse_bool
from fastnorm.overrides import overridden, recorded_call


class InstanceNormFunction(NormFunction):
    """y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual), see :func:`instance_norm`.

    Setting: running_mean, running_var, momentum, eps, activation. Statistics: two numbers a channel and sample.
    Backward is group normalisation's with a channel a group.
    """

    op = "instance_norm"
    activation_at = 4
    backward_setting = itemgetter(slice(4, 5))
    tracked = 2

    @staticmethod
    def composite(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, setting: Setting
    ) -> Tensor:
        return normalize_groups(input, weight, bias, input.size(1), setting[3])

    @staticmethod
    def torch_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, setting: Setting) -> Tensor:
        running_mean, running_var, momentum, eps, _ = setting
        return F.instance_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)

    @staticmethod
    def fake_statistics(input: Tensor, setting: Setting, keep: bool) -> Tensor:
        return input.new_empty((2, input.size(0), input.size(1)), dtype=torch.float64)

    fake_mask = staticmethod(GroupNormFunction.fake_mask)


complete_norm(
    InstanceNormFunction, "Tensor? running_mean, Tensor? running_var, float momentum, float eps, str? activation"
)
_instance_norm = norm_op("instance_norm", InstanceNormFunction)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Instance normalisation (Ulyanov, Vedaldi & Lempitsky 2016, arXiv:1607.08022), with a residual and an activation.

        y = activation((x - mean) * rstd * weight + bias + residual),   rstd = 1 / sqrt(var + eps)

    With ``use_input_stats``, mean and var (biased) are those of each sample and channel over the positions, and the
    running statistics, where given, take in the samples' average, the variance unbiased:
    ``running = (1 - momentum) * running + momentum * new``. Otherwise mean and var are the running statistics.

    Args:
        input: (N, C, *), float64, float32, bfloat16 or float16. Contiguous and channels_last tensors of any number of
            dimensions are read as they lie, other strides take one copy. The output has the input's layout.
        running_mean, running_var: (C), of the input's type or, for bfloat16 and float16, float32; both may be None with
            ``use_input_stats``.
        weight, bias: (C), of the input's type or, for bfloat16 and float16, float32; each may be None.
        use_input_stats: use the input's statistics, and update the running ones.
        momentum: weight of the new value, in [0, 1].
        eps: added to the variance, in units of input squared.
        residual: added before the activation; input's shape and type.
        activation: None, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"`` or ``"gelu"`` (the erf form).

    Raises:
        ValueError: one position with ``use_input_stats``; an unknown activation.
        RuntimeError: a shape, type or device that does not fit; running statistics that require grad; none without
            ``use_input_stats``. Nothing has been written then.
        TypeError: a use_input_stats that is no bool.

    Example:
        >>> x = torch.randn(8, 4, 5, 5)
        >>> y = fastnorm.functional.instance_norm(x)
        >>> torch.allclose(y.mean((2, 3)), torch.zeros(8, 4), atol=1e-6)
        True
    """
    overrides = has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual)
    if overrides and not is_dynamo_compiling():
        return overridden(instance_norm, locals())
    if use_input_stats is not True and use_input_stats is not False:
        refuse_bool("instance_norm", "use_input_stats", use_input_stats)
    if not use_input_stats:
        return _with_running_statistics(input, running_mean, running_var, weight, bias, eps, residual, activation)
    setting = (running_mean, running_var, momentum, eps, activation)
    return _instance_norm(input, weight, bias, residual, setting)


def _with_running_statistics(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """The statistics are the same for every sample: batch normalisation."""
    if running_mean is None or running_var is None:
        raise RuntimeError("instance_norm: running_mean and running_var must be given if use_input_stats=False")
    try:
        return batch_norm(
            input, running_mean, running_var, weight, bias, False, 0.0, eps, residual=residual, activation=activation
        )
    except (RuntimeError, ValueError) as error:
        if not str(error).startswith("batch_norm: "):
            raise
        raise type(error)(str(error).replace("batch_norm", "instance_norm", 1)) from None


class _InstanceNorm(RankedNormModule, nn.modules.instancenorm._InstanceNorm):
    """What the three modules add to torch's."""

    _input_dims: tuple[int, int]  # without and with the batch

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        check_activation(type(self).__name__, activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)  # type: ignore[arg-type]
        if not bias:
            self.register_parameter("bias", None)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        weight, bias = self._parameters_of_forward()
        buffers = self._buffers  # see NormModule
        try:
            mean, var = buffers["running_mean"], buffers["running_var"]
        except KeyError:  # one is no buffer
            mean, var = self.running_mean, self.running_var
        overrides = has_torch_function_variadic(input, mean, var, weight, bias, residual) and not is_dynamo_compiling()
        if overrides and (call := recorded_call(self, input, residual)) is not None:
            return call
        self._check_input_dim(input)
        without_batch = input.dim() == self._input_dims[0]
        channels = input.size(0 if without_batch else 1)
        if channels != self.num_features:
            message = (
                f"{type(self).__name__}: input must have num_features={self.num_features} channels, got {channels} in "
                f"shape {list(input.shape)}"
            )
            if self.affine:
                raise ValueError(message)
            warnings.warn(f"{message}; num_features is not used, for affine=False", stacklevel=2)
        if without_batch:
            if isinstance(residual, Tensor) and residual.shape != input.shape:
                raise RuntimeError(
                    f"{type(self).__name__}: residual must have input's shape {list(input.shape)}, got "
                    f"{list(residual.shape)}"
                )
            input = input.unsqueeze(0)
            residual = residual.unsqueeze(0) if isinstance(residual, Tensor) else residual
        by_input = self.training or not self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        if overrides:
            y = instance_norm(
                input, mean, var, weight, bias, by_input, momentum, self.eps,
                residual=residual, activation=self.activation,
            )  # fmt: skip
        elif by_input:
            y = _instance_norm(input, weight, bias, residual, (mean, var, momentum, self.eps, self.activation))
        else:
            y = _with_running_statistics(input, mean, var, weight, bias, self.eps, residual, self.activation)
        return y.squeeze(0) if without_batch else y


_MODULE_DOC = """torch.nn.{name} on fastnorm's kernels: the same arguments, parameters, buffers, state_dict and numbers.

        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    with mean and var (biased) of each channel of each sample, or the running statistics; see
    :func:`fastnorm.functional.instance_norm`, which has the source.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as torch.nn.{name} has them.
        bias: False leaves out the bias of an affine layer.
        activation: fused into the kernel: None, "relu", "leaky_relu", "silu" or "gelu".

    Shape:
        input, and ``residual`` where one is given to forward: {shape}; output the same.

    Raises:
        ValueError: another number of dimensions; with affine=True (a warning without) another number of channels; one
            position in training; an unknown activation.

    Example:
        >>> norm = fastnorm.{name}(16, affine=True, activation="relu")
        >>> norm(torch.randn({example})).shape
        torch.Size([{example}])
    """


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    __doc__ = _MODULE_DOC.format(name="InstanceNorm1d", shape="(N, C, L) or (C, L)", example="8, 16, 4")
    _input_dims = (2, 3)
    _input_shape = "(N, C, L) or (C, L)"


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    __doc__ = _MODULE_DOC.format(name="InstanceNorm2d", shape="(N, C, H, W) or (C, H, W)", example="8, 16, 4, 4")
    _input_dims = (3, 4)
    _input_shape = "(N, C, H, W) or (C, H, W)"


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    __doc__ = _MODULE_DOC.format(
        name="InstanceNorm3d", shape="(N, C, D, H, W) or (C, D, H, W)", example="8, 16, 2, 4, 4"
    )
    _input_dims = (4, 5)
    _input_shape = "(N, C, D, H, W) or (C, D, H, W)"
