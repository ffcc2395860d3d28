"""Batch normalisation over the batches of several processes: autograd function and module."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary
from torch.types import Device

from fastnorm import _C
from fastnorm.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm
from fastnorm.norm import kept_of
from fastnorm.overrides import recorded_call

Model = TypeVar("Model", bound=nn.Module)


class SyncBatchNormFunction(torch.autograd.Function):
    """y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual), mean and var over every process's x.

    mean and 1 / sqrt(var + eps) are ``statistics``, merged from each process's count, mean and sum of squared
    deviations; backward adds up two sums a channel over the processes in between its two kernels. Kept for backward: as
    for BatchNormFunction. Not differentiable twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        statistics: Tensor,
        count: float,
        activation: str | None,
        group: Any,
    ) -> Tensor:
        y, mask = _C.batch_norm_normalize(input, weight, bias, residual, statistics, activation, True)
        ctx.save_for_backward(input, weight, *kept_of(weight, bias, residual, activation), mask, statistics)
        ctx.setting = count, activation, group
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, residual, mask, statistics = ctx.saved_tensors
        count, activation, group = ctx.setting
        wants_input, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
        operands = dy, input, weight, bias, residual, mask, statistics
        own = _C.batch_norm_backward_reduce(*operands, activation)
        dbias, dweight = own
        # Each process has dweight and dbias of its own batch, as of any other layer's parameters.
        sums = own.clone()
        dist.all_reduce(sums, group=group)
        dx, dresidual = _C.batch_norm_backward_elements(
            *operands, sums, count, activation, (wants_input, wants_residual)
        )
        return (
            dx,
            dweight.to(weight.dtype) if wants_weight else None,
            dbias.to(bias.dtype) if wants_bias else None,
            dresidual,
            *[None] * 4,
        )


def _gather(input: Tensor, group: Any) -> tuple[float, Tensor]:
    """Number of values a channel, and their mean and biased variance as (2, C) in float64, over all processes.

    By Chan's formula in the order of ranks, so that each process gets the same bits:
    M2 = sum M2[i] + sum n[i] * (mean[i] - mean)^2
    """
    C = input.size(1)
    n = input.numel() // C
    mean, var = _C.batch_norm_statistics(input)
    local = torch.cat([mean.new_tensor([n]), mean, var * n])
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    sizes = torch.stack(gathered)[:, 0].tolist()  # at once: on a GPU it is here that the host waits
    total = sum(sizes)
    # an empty batch has no mean, and its zero must not be taken for one
    rows = [g for g, size in zip(gathered, sizes, strict=True) if size > 0] or gathered[:1]
    counts, means, M2 = torch.stack(rows).split([1, C, C], dim=1)
    mean = means[0] + ((means - means[0]) * counts).sum(0) / total
    var = (M2.sum(0) + (counts * (means - mean).square()).sum(0)) / total
    return total, torch.stack([mean, var])


class SyncBatchNorm(_BatchNorm):
    """torch.nn.SyncBatchNorm on fastnorm's kernels, on CPUs (gloo) as well as on GPUs: statistics of all processes.

        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    with mean and var (biased) of each channel over the batches of all processes together, merged in float64 by Chan's
    formula (Chan, Golub & LeVeque 1979); see :func:`fastnorm.functional.batch_norm`.

    In eval mode, in one process and without a process group it is batch normalisation. Batches of the processes may
    differ in size, and be empty in some, as long as each process takes part in every forward and backward. As
    DistributedDataParallel lets a torch.nn.SyncBatchNorm through on GPUs only, this is no subclass of it, though the
    state_dict is the same.

    Args:
        num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype: as
            torch.nn.SyncBatchNorm has them.
        bias, activation, skip_nonfinite_stats: as fastnorm.BatchNorm2d has them.

    Shape:
        input, and ``residual`` where one is given to forward: (N, C, *); output the same.

    Raises:
        ValueError: fewer than two dimensions; in training one value per channel in all processes together.

    Example:
        >>> norm = fastnorm.SyncBatchNorm(16, activation="relu")
        >>> norm(torch.randn(8, 16, 4, 4)).shape
        torch.Size([8, 16, 4, 4])
    """

    _input_dims = (2, 3, 4, 5)  # and more
    _input_shape = "(N, C, *)"

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            super()._check_input_dim(input)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        skip_nonfinite_stats: bool = False,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, activation=activation, skip_nonfinite_stats=skip_nonfinite_stats,
        )  # fmt: skip
        self.process_group = process_group

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if has_torch_function_unary(input) and (call := recorded_call(self, input, residual)) is not None:
            return call
        together = self.training and dist.is_available() and dist.is_initialized()
        if not together or dist.get_world_size(self.process_group) == 1:
            return super().forward(input, residual)
        self._check_input_dim(input)
        if input.size(1) != self.num_features:
            raise RuntimeError(
                f"SyncBatchNorm: input must have num_features={self.num_features} channels, got shape "
                f"{list(input.shape)}"
            )
        if self.track_running_stats and (self.running_mean is None) != (self.running_var is None):
            raise RuntimeError(
                "SyncBatchNorm: running_mean and running_var must be given together, got only "
                f"{'running_var' if self.running_mean is None else 'running_mean'}"
            )
        with torch.no_grad():
            count, statistics = _gather(input, self.process_group)
            if count == 1:
                raise ValueError("SyncBatchNorm: training needs more than one value per channel, got one in all")
            if count and self.track_running_stats:
                self._track(count, statistics)
        mean, var = statistics
        kept = torch.stack([mean, (var + self.eps).rsqrt()])
        return SyncBatchNormFunction.apply(
            input, self.weight, self.bias, residual, kept, count, self.activation, self.process_group
        )

    def _track(self, count: float, statistics: Tensor) -> None:
        if self.skip_nonfinite_stats and not statistics.isfinite().all():
            return
        mean, var = statistics
        momentum = self.momentum or 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else momentum
        if self.running_mean is None:
            return
        for running, new in ((self.running_mean, mean), (self.running_var, var * (count / (count - 1)))):
            running.copy_((1 - momentum) * running.double() + momentum * new)

    @classmethod
    def convert_sync_batchnorm(cls, module: Model, process_group: Any = None) -> Model:
        """Makes each batch normalisation of a model, torch.nn's or fastnorm's, a SyncBatchNorm, in place.

        Each layer stays the object it was and changes its class, as with :func:`fastnorm.convert`; exact classes only,
        and no layer of torch.nn's that has an attribute ``activation`` or ``skip_nonfinite_stats`` of its own.

        Args:
            module: a model, also a single layer.
            process_group: which processes; all of them if None.

        Returns:
            The module itself.

        Example:
            >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
            >>> type(fastnorm.SyncBatchNorm.convert_sync_batchnorm(model)[1]).__name__
            'SyncBatchNorm'
        """
        torch_kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        own = ("activation", "skip_nonfinite_stats")
        for layer in module.modules():
            if type(layer) in torch_kinds and not any(hasattr(layer, name) for name in own):
                layer.activation, layer.skip_nonfinite_stats = None, False
            elif type(layer) not in (BatchNorm1d, BatchNorm2d, BatchNorm3d):
                continue
            layer.__class__ = cls
            layer.process_group = process_group
        return module
