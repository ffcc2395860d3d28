"""Layer normalisation: autograd function, functional and module. RMS normalisation is the same op without the mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function_variadic
from torch.types import Device

from fastnorm import compile
from fastnorm.activation import check_activation
from fastnorm.norm import NormFunction, Setting, complete_norm, norm_op
from fastnorm.norm_module import NormModule
from fastnorm.overrides import overridden


class LayerNormFunction(NormFunction):
    """y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual), see :func:`layer_norm`; without
    ``subtract_mean`` y = activation(x / sqrt(mean(x^2) + eps) * weight + bias + residual), see :func:`rms_norm`.

    Setting: normalized_shape, eps, activation, subtract_mean. Statistics: three numbers a row (float32, float64 for
    float64; without the mean one).
    """

    op = "layer_norm"
    activation_at = 2
    backward_setting = itemgetter(0, 2, 3)
    empty_like = staticmethod(compile.empty_contiguous)
    folds_into_channels = False

    @staticmethod
    def composite(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, setting: Setting
    ) -> Tensor:
        normalized_shape, eps, _, subtract_mean = setting
        dims = list(range(-len(normalized_shape), 0))
        x = input if input.dtype == torch.float64 else input.float()
        if subtract_mean:
            x = x - x.mean(dims, keepdim=True)
        z = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
        return LayerNormFunction.scale_and_shift(z, weight, bias).to(input.dtype)

    @staticmethod
    def torch_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, setting: Setting) -> Tensor:
        normalized_shape, eps, _, subtract_mean = setting
        if subtract_mean:
            return F.layer_norm(input, normalized_shape, weight, bias, eps)
        return F.rms_norm(input, normalized_shape, weight, eps)

    @staticmethod
    def fake_statistics(input: Tensor, setting: Setting, keep: bool) -> Tensor | None:
        if not keep:
            return None
        normalized_shape, _, _, subtract_mean = setting
        rows = math.prod(input.shape[: input.dim() - len(normalized_shape)])
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        return input.new_empty((3 if subtract_mean else 1, rows), dtype=dtype)

    @staticmethod
    def fake_mask(input: Tensor, setting: Setting) -> Tensor:
        normalized_shape = setting[0]
        rows = math.prod(input.shape[: input.dim() - len(normalized_shape)])
        return input.new_empty((rows, (math.prod(normalized_shape) + 7) // 8), dtype=torch.uint8)

    @staticmethod
    def parameter_shape(input: Tensor, setting: Setting) -> list[int]:
        return list(setting[0])

    @staticmethod
    def scale_and_shift(z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        z = z if weight is None else z * weight
        return z if bias is None else z + bias

    @staticmethod
    def uncovered_when_traced(input: Tensor, weight: Tensor | None, setting: Setting) -> str | None:
        subtract_mean = setting[3]
        if subtract_mean or weight is None or weight.dtype == input.dtype:
            return None
        if weight.dtype == torch.float32 and input.dtype != torch.float64:
            return None
        return f"no kernel for a weight of type {weight.dtype} with an input of type {input.dtype}"


complete_norm(LayerNormFunction, "SymInt[] normalized_shape, float eps, str? activation, bool subtract_mean")
_layer_norm = norm_op("layer_norm", LayerNormFunction, autocast_as=("layer_norm",))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Layer normalisation (Ba, Kiros & Hinton 2016, arXiv:1607.06450), with a residual and an activation fused.

        y = activation((x - mean) * rstd * weight + bias + residual),   rstd = 1 / sqrt(var + eps)

    where mean and var (biased) are those of the elements that the last dimensions, ``normalized_shape``, hold together.

    Args:
        input: (*, normalized_shape), float64, float32, bfloat16 or float16; rows that are not contiguous take one
            copy. The output is contiguous.
        normalized_shape: the sizes of the dimensions to normalise over, the input's last.
        weight, bias: normalized_shape, of the input's type or, for bfloat16 and float16, float32; each may be None.
        eps: added to the variance, in units of input squared.
        residual: added before the activation; input's shape and type.
        activation: None, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"`` or ``"gelu"`` (the erf form).

    Raises:
        ValueError: an unknown activation.
        RuntimeError: a shape, type or device that does not fit.

    Example:
        >>> x = torch.randn(4, 10, 16)
        >>> y = fastnorm.functional.layer_norm(x, (16,), residual=x, activation="gelu")
        >>> y.shape
        torch.Size([4, 10, 16])
    """
    if has_torch_function_variadic(input, weight, bias, residual) and not is_dynamo_compiling():
        return overridden(layer_norm, locals())
    return _layer_norm(input, weight, bias, residual, (normalized_shape, eps, activation, True))


class LayerNorm(NormModule, nn.LayerNorm):
    """torch.nn.LayerNorm on fastnorm's kernels: the same arguments, parameters, state_dict and numbers.

        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    with mean and var (biased) over the last dimensions, ``normalized_shape``; see
    :func:`fastnorm.functional.layer_norm`, which has the source.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as torch.nn.LayerNorm has them.
        activation: fused into the kernel: None, "relu", "leaky_relu", "silu" or "gelu".

    Shape:
        input, and ``residual`` where one is given to forward: (*, normalized_shape); output the same.

    Raises:
        ValueError: an unknown activation.

    Example:
        >>> norm = fastnorm.LayerNorm(16, activation="relu")
        >>> norm(torch.randn(8, 5, 16)).shape
        torch.Size([8, 5, 16])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        check_activation("LayerNorm", activation)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        weight, bias = self._parameters_of_forward()
        if has_torch_function_variadic(input, weight, bias, residual) and not is_dynamo_compiling():
            return self._overridden(layer_norm, input, residual, self.normalized_shape, weight, bias, self.eps)
        return _layer_norm(input, weight, bias, residual, (self.normalized_shape, self.eps, self.activation, True))
