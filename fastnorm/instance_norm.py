"""Instance normalisation: autograd function, functional and modules, on group normalisation's kernels."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnorm import _C, compile
from fastnorm.activation import add_and_activate, check_activation
from fastnorm.batch_norm import batch_norm
from fastnorm.fallback import TRACED, call_torch, traced_call, uncovered_transform
from fastnorm.group_norm import GroupNormFunction, backward_op, fake_groups

# running_mean, running_var, momentum, eps, activation: what no gradient goes to.
_Setting = tuple[Tensor | None, Tensor | None, float, float, str | None]


class InstanceNormFunction(torch.autograd.Function):
    """y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual), see :func:`instance_norm`.

    Kept for backward: x, weight, bias, two numbers a channel and sample; with a residual and relu or leaky_relu one bit
    an element, with a residual and silu or gelu the residual. Backward is group normalisation's with a channel a group.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, setting: _Setting
    ) -> Tensor:
        y, statistics, mask = _C.instance_norm_forward(input, weight, bias, residual, *setting, True)
        _, _, _, eps, activation = setting
        kept_residual = residual if activation in ("silu", "gelu") else None
        ctx.save_for_backward(input, weight, bias, kept_residual, mask, statistics)
        ctx.setting = input.size(1), eps, activation
        return y

    backward = staticmethod(GroupNormFunction.backward)


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
        running_mean, running_var: (C), of the input's type or float32; both may be None with ``use_input_stats``.
        weight, bias: (C), of the input's type or, for bfloat16 and float16, float32; each may be None.
        use_input_stats: use the input's statistics, and update the running ones.
        momentum: weight of the new value, in [0, 1].
        eps: added to the variance, in units of input squared.
        residual: added before the activation; input's shape and type.
        activation: None, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"`` or ``"gelu"`` (the erf form).

    Raises:
        ValueError: one position with ``use_input_stats``; an unknown activation.
        RuntimeError: a shape, type or device that does not fit; no running statistics without ``use_input_stats``.
            Nothing has been written then.

    Example:
        >>> x = torch.randn(8, 4, 5, 5)
        >>> y = fastnorm.functional.instance_norm(x)
        >>> torch.allclose(y.mean((2, 3)), torch.zeros(8, 4), atol=1e-6)
        True
    """
    if not use_input_stats:
        return _with_running_statistics(input, running_mean, running_var, weight, bias, eps, residual, activation)
    setting = (running_mean, running_var, momentum, eps, activation)
    return _instance_norm(input, weight, bias, residual, setting)


def _instance_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, setting: _Setting
) -> Tensor:
    reason = uncovered_transform("instance_norm")
    if reason is None:
        try:
            if torch.is_grad_enabled() and (
                input.requires_grad
                or (weight is not None and weight.requires_grad)
                or (bias is not None and bias.requires_grad)
                or (residual is not None and residual.requires_grad)
            ):
                return InstanceNormFunction.apply(input, weight, bias, residual, setting)
            return _C.instance_norm_forward(input, weight, bias, residual, *setting, False)[0]
        except NotImplementedError as uncovered:
            reason = str(uncovered)
    elif reason is TRACED:
        return traced_call(
            "instance_norm", _traced_instance_norm, _torch_instance_norm, input, weight, bias, residual, *setting
        )
    return call_torch(reason, _torch_instance_norm, input, weight, bias, residual, *setting)


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


def _torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: str | None,
) -> Tensor:
    check_activation("instance_norm", activation)
    z = F.instance_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
    return add_and_activate(z, residual, activation)


# ---- as an op of the dispatcher


def _traced_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *setting: Any,
) -> Tensor:
    check_activation("instance_norm", setting[2])
    keep_mask = compile.is_differentiated(input, weight, bias, residual)
    y, _, _, *new = _forward_op(input, weight, bias, residual, running_mean, running_var, *setting, keep_mask)
    compile.write_back((running_mean, running_var), new)
    return y


def _kernel(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    new = compile.clones((running_mean, running_var))
    return compile.defined((*_C.instance_norm_forward(input, weight, bias, residual, *new, *rest), *new), input)


def _fake(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: str | None,
    keep_mask: bool,
) -> tuple[Tensor, ...]:
    results = fake_groups(input, residual, input.size(1), activation, keep_mask)
    return compile.defined((*results, *compile.clones((running_mean, running_var))), input)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, activation, _ = inputs
    compile.keep_for_backward(ctx, inputs, output, activation)
    ctx.setting = inputs[0].size(1), activation


def _op_gradient(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return *compile.norm_gradients(ctx, dy, backward_op, *ctx.setting), *[None] * 6


_forward_op = compile.register(
    "instance_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? running_mean, "
    "Tensor? running_var, float momentum, float eps, str? activation, bool keep_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
    _op_gradient,
    _setup_context,
)


class _InstanceNorm(nn.modules.instancenorm._InstanceNorm):
    """What the three modules add to torch's."""

    _input_dims: tuple[int, int]  # without and with the batch
    _input_shape: str

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        check_activation(type(self).__name__, activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.activation = activation

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self._input_dims:
            raise ValueError(
                f"{type(self).__name__}: input must have shape {self._input_shape}, got {input.dim()} dimensions with "
                f"shape {list(input.shape)}"
            )

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
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
            input = input.unsqueeze(0)
            residual = None if residual is None else residual.unsqueeze(0)
        # as in BatchNorm: Module.__getattr__ takes time
        buffers, parameters = self._buffers, self._parameters
        weight = parameters["weight"] if "weight" in parameters else self.weight
        bias = parameters["bias"] if "bias" in parameters else self.bias
        mean, var = buffers["running_mean"], buffers["running_var"]
        if self.training or not self.track_running_stats:
            momentum = 0.0 if self.momentum is None else self.momentum
            y = _instance_norm(input, weight, bias, residual, (mean, var, momentum, self.eps, self.activation))
        else:
            y = _with_running_statistics(input, mean, var, weight, bias, self.eps, residual, self.activation)
        return y.squeeze(0) if without_batch else y

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.activation is None else f", activation={self.activation!r}")


_MODULE_DOC = """torch.nn.{name} on fastnorm's kernels: the same arguments, parameters, buffers, state_dict and numbers.

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
