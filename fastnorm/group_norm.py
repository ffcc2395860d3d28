"""Group normalisation: autograd function, functional and module."""

from __future__ import annotations

from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function_variadic
from torch.types import Device

from fastnorm import compile
from fastnorm.activation import check_activation
from fastnorm.norm import NormFunction, Setting, complete_norm, norm_op, scale_and_shift
from fastnorm.norm_module import ChannelNormModule
from fastnorm.overrides import overridden


class GroupNormFunction(NormFunction):
    """y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual), see :func:`group_norm`.

    Setting: num_groups, eps, activation. Statistics: two numbers a group and sample.
    """

    op = "group_norm"
    activation_at = 2
    backward_setting = itemgetter(0, 2)

    @staticmethod
    def composite(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, setting: Setting
    ) -> Tensor:
        num_groups, eps, _ = setting
        return normalize_groups(input, weight, bias, num_groups, eps)

    @staticmethod
    def torch_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, setting: Setting) -> Tensor:
        num_groups, eps, _ = setting
        return F.group_norm(input, num_groups, weight, bias, eps)

    @staticmethod
    def fake_statistics(input: Tensor, setting: Setting, keep: bool) -> Tensor:
        return input.new_empty((2, input.size(0), setting[0]), dtype=torch.float64)

    @staticmethod
    def fake_mask(input: Tensor, setting: Setting) -> Tensor | None:
        """Of the size of group_mask_rows in csrc/group_norm.h."""
        if input.numel() == 0:
            return None
        N, C, S = input.size(0), input.size(1), compile.spatial_size(input)
        if input.is_cuda:
            size = compile.cuda_mask_bytes(input)
        elif compile.is_channels_last(input):
            fold = compile.folded(C, S)
            size = N * ((S + fold - 1) // fold) * ((fold * C + 7) // 8)
        else:
            size = N * ((C * S + 7) // 8) if S < 16 else N * C * ((S + 7) // 8)
        return compile.empty_mask(input, size)

    @staticmethod
    def folded_setting(setting: Setting, batch_size: int) -> Setting:
        num_groups, *rest = setting
        return num_groups * batch_size, *rest


def normalize_groups(input: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float) -> Tensor:
    """Group normalisation in elementary ops."""
    x = input if input.dtype == torch.float64 else input.float()
    slices = x.reshape(x.shape[0], num_groups, -1)
    centred = slices - slices.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return scale_and_shift((centred * rstd).view(x.shape), weight, bias).to(input.dtype)


complete_norm(GroupNormFunction, "SymInt num_groups, float eps, str? activation")
_group_norm = norm_op("group_norm", GroupNormFunction, autocast_as=("group_norm",))


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Group normalisation (Wu & He 2018, arXiv:1803.08494), with a residual and an activation in the same kernel.

        y = activation((x - mean) * rstd * weight + bias + residual),   rstd = 1 / sqrt(var + eps)

    mean and var (biased) are those of each sample and group: C / num_groups neighbouring channels, all positions.

    Args:
        input: (N, C, *), float64, float32, bfloat16 or float16. Contiguous and channels_last tensors of any number of
            dimensions are read as they lie, other strides take one copy. The output has the input's layout.
        num_groups: divides C.
        weight, bias: (C), of the input's type or, for bfloat16 and float16, float32; each may be None.
        eps: added to the variance, in units of input squared.
        residual: added before the activation; input's shape and type.
        activation: None, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"`` or ``"gelu"`` (the erf form).

    Raises:
        ValueError: one sample of one value per group; an unknown activation.
        RuntimeError: num_groups does not divide C; a shape, type or device that does not fit.

    Example:
        >>> x = torch.randn(8, 4, 5, 5).contiguous(memory_format=torch.channels_last)
        >>> y = fastnorm.functional.group_norm(x, 2, activation="silu")
        >>> y.shape, y.is_contiguous(memory_format=torch.channels_last)
        (torch.Size([8, 4, 5, 5]), True)
    """
    if has_torch_function_variadic(input, weight, bias, residual) and not is_dynamo_compiling():
        return overridden(group_norm, locals())
    return _group_norm(input, weight, bias, residual, (num_groups, eps, activation))


class GroupNorm(ChannelNormModule, nn.GroupNorm):
    """torch.nn.GroupNorm on fastnorm's kernels: the same arguments, parameters, state_dict and numbers.

        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    with mean and var (biased) of each group of channels of each sample; see :func:`fastnorm.functional.group_norm`,
    which has the source.

    Args:
        num_groups, num_channels, eps, affine, device, dtype: as torch.nn.GroupNorm has them.
        bias: False leaves out the bias of an affine layer.
        activation: fused into the kernel: None, "relu", "leaky_relu", "silu" or "gelu".

    Shape:
        input, and ``residual`` where one is given to forward: (N, num_channels, *); output the same.

    Raises:
        ValueError: num_groups does not divide num_channels; an unknown activation.

    Example:
        >>> norm = fastnorm.GroupNorm(4, 16, activation="relu")
        >>> norm(torch.randn(8, 16, 4, 4)).shape
        torch.Size([8, 16, 4, 4])
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        check_activation("GroupNorm", activation)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        weight, bias = self._parameters_of_forward()
        if has_torch_function_variadic(input, weight, bias, residual) and not is_dynamo_compiling():
            return self._overridden(group_norm, input, residual, self.num_groups, weight, bias, self.eps)
        return _group_norm(input, weight, bias, residual, (self.num_groups, self.eps, self.activation))
