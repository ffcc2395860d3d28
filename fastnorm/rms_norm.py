"""RMS normalisation: functional and module, on the kernels and the autograd function of :mod:`fastnorm.layer_norm`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function_variadic
from torch.types import Device

from fastnorm.activation import check_activation
from fastnorm.layer_norm import LayerNormFunction
from fastnorm.norm import norm_op
from fastnorm.norm_module import NormModule
from fastnorm.overrides import overridden

_rms_norm = norm_op("rms_norm", LayerNormFunction, autocast_as=("rms_norm",))
_EPS_FLOAT64 = torch.finfo(torch.float64).eps
_EPS_FLOAT32 = torch.finfo(torch.float32).eps


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """RMS normalisation (Zhang & Sennrich 2019, arXiv:1910.07467), with a residual and an activation fused.

        y = activation(x * rstd * weight + residual),   rstd = 1 / sqrt(mean(x^2) + eps)

    where the mean is over the elements that the last dimensions, ``normalized_shape``, hold together.

    Args:
        input: (*, normalized_shape), float64, float32, bfloat16 or float16; rows that are not contiguous take one
            copy. The output is contiguous.
        normalized_shape: the sizes of the dimensions to normalise over, the input's last.
        weight: normalized_shape, of the input's type or, for bfloat16 and float16, float32; may be None.
        eps: added to the mean of squares, in units of input squared. None: the machine epsilon of the type that the
            arithmetic is done in, as in torch: 2.2e-16 for a float64 input, 1.2e-7 for the others.
        residual: added before the activation; input's shape and type.
        activation: None, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"`` or ``"gelu"`` (the erf form).

    Raises:
        ValueError: an unknown activation.
        RuntimeError: a shape or device that does not fit; a residual of another type.

    Example:
        >>> x = torch.randn(4, 10, 16)
        >>> y = fastnorm.functional.rms_norm(x, (16,), activation="silu")
        >>> y.shape
        torch.Size([4, 10, 16])
    """
    if has_torch_function_variadic(input, weight, residual) and not is_dynamo_compiling():
        return overridden(rms_norm, locals())
    return _rms_norm(input, weight, None, residual, (normalized_shape, _eps_of(input, eps), activation, False))


def _eps_of(input: Tensor, eps: float | None) -> float:
    if eps is None:
        # an input without a type is none, which the op says
        return _EPS_FLOAT64 if getattr(input, "dtype", None) is torch.float64 else _EPS_FLOAT32
    return eps


class RMSNorm(NormModule, nn.RMSNorm):
    """torch.nn.RMSNorm on fastnorm's kernels: the same arguments, parameters, state_dict and numbers.

        y = activation(x / sqrt(mean(x^2) + eps) * weight + residual)

    with the mean over the last dimensions, ``normalized_shape``; see :func:`fastnorm.functional.rms_norm`, which has
    the source.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as torch.nn.RMSNorm has them.
        activation: fused into the kernel: None, "relu", "leaky_relu", "silu" or "gelu".

    Shape:
        x, and ``residual`` where one is given to forward: (*, normalized_shape); output the same.

    Raises:
        ValueError: an unknown activation.

    Example:
        >>> norm = fastnorm.RMSNorm(16)
        >>> norm(torch.randn(8, 5, 16)).shape
        torch.Size([8, 5, 16])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        check_activation("RMSNorm", activation)
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # torch's name for the input, of this alone
        parameters = self._parameters  # see NormModule
        weight = parameters["weight"] if "weight" in parameters else self.weight
        if has_torch_function_variadic(x, weight, residual) and not is_dynamo_compiling():
            return self._overridden(rms_norm, x, residual, self.normalized_shape, weight, self.eps)
        setting = (self.normalized_shape, _eps_of(x, self.eps), self.activation, False)
        return _rms_norm(x, weight, None, residual, setting)
