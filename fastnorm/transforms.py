"""Forward-mode automatic differentiation and torch.func: what the ops' rules for them are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_legacy_batchedtensor
from torch._functorch.pyfunctorch import (
    TransformType,
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
)
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

# Whether a gradient or tangent stands for many, as is_grads_batched= and vectorize= of torch.autograd have it. Neither
# kernels nor autograd functions know such tensors; torch calls an op of the dispatcher for each of the many.
is_batch_of_gradients = is_legacy_batchedtensor


def is_for_kernels(dy: Tensor) -> bool:
    """Whether a backward is that of plain tensors, which is not differentiated again."""
    return not (
        is_dynamo_compiling()
        or is_grad_enabled()
        or forward_ad._current_level >= 0
        or _are_functorch_transforms_active()
        or is_batch_of_gradients(dy)
    )


def is_for_ops(dy: Tensor) -> bool:
    """Whether another backward is one of ops of the dispatcher: of a batch of gradients, or compiled autograd's. Else
    it is one of functions that have derivatives themselves."""
    return is_dynamo_compiling() or is_batch_of_gradients(dy)


def inside_vmap() -> bool:
    return any(interpreter.key() == TransformType.Vmap for interpreter in retrieve_all_functorch_interpreters())


def refuse_nested_forward_mode() -> None:
    """For a jvp rule of torch's ops: of these torch sees no outer forward mode, and would take derivatives for zero."""
    levels = [interpreter.key() for interpreter in retrieve_all_functorch_interpreters()]
    if levels.count(TransformType.Jvp) > 1:
        raise NotImplementedError("fastnorm: no kernel for forward mode inside of forward mode at this order")


# A context in which new tensors are plain ones, as kernels want them.
outside_transforms = temporarily_clear_interpreter_stack


def pull_back(function: Callable[..., Tensor], primals: Sequence[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    """J^T cotangent of a function of torch's ops, for each primal."""
    return torch.func.vjp(function, *primals)[1](cotangent)


def push_forward(function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """J tangents, as the transpose of J^T: forward mode cannot be nested in torch.autograd.forward_ad."""
    y, pull = torch.func.vjp(function, *primals)  # type: ignore[misc]  # its hint has the form with has_aux
    return torch.func.vjp(pull, torch.zeros_like(y))[1](tuple(tangents))[0]


def loop_over_batch(
    function: type[torch.autograd.Function], info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Any, Any]:
    """A vmap rule: one call for each element of the batch."""
    slices = (
        [a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(args, in_dims, strict=True)]
        for i in range(info.batch_size)
    )
    results = [function.apply(*arguments) for arguments in slices]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(None if column[0] is None else torch.stack(column) for column in zip(*results, strict=True))
    return stacked, tuple(None if t is None else 0 for t in stacked)


def fold_samples(batch_size: int, in_dims: Sequence[int | None], *tensors: Tensor) -> list[Tensor]:
    """(B, N, *) as (B * N, *), for ops that work on each sample by itself."""
    return [first(t, dim, batch_size).flatten(0, 1) for t, dim in zip(tensors, in_dims, strict=False)]


def first(t: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """The batch's dimension first, of a tensor that has one or is the same for all."""
    return t.expand(batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
