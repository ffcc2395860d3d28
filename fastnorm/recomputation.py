"""Outputs of normalisations computed again in backward instead of kept for it."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks

_local = threading.local()
_lock = threading.Lock()
contexts = 0  # entered and not left, by any thread: forward passes outside of all pay for no more than a look at this


class recompute(torch.autograd.graph.saved_tensors_hooks):
    """In this context later layers keep not a normalisation's output but how to compute it.

    A convolution after ``y = relu(norm(x))`` keeps ``y`` for its backward, while the normalisation keeps ``x``. Run the
    forward pass in this context and only ``x`` stays: ``y`` is computed again, bit for bit, when backward comes to the
    convolution, which costs one more pass of the normalisation. So it is for linear layers, pooling and every other
    layer that keeps its input. What a residual branch adds is treated likewise.

    Outputs of BatchNorm, LayerNorm, RMSNorm, GroupNorm and InstanceNorm are computed again, of BatchRenorm and
    SyncBatchNorm kept. A forward pass under torch.compile keeps what its partitioner decides to keep, and under other
    ``saved_tensors_hooks`` entered later all is kept. A checkpoint (``torch.utils.checkpoint``) inside of it works.

    Args:
        depth: how many normalisations may be computed to get one output. The output of a residual block needs the one
            before it: of a chain of such outputs 1 keeps every second, 2 every third.

    Raises:
        TypeError, ValueError: a depth that is not a positive int.

    Example:
        >>> norm = fastnorm.BatchNorm2d(8, activation="relu")
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), norm, torch.nn.Conv2d(8, 8, 3))
        >>> with fastnorm.recompute():
        ...     loss = model(torch.randn(2, 3, 16, 16)).square().mean()
        >>> loss.backward()  # here the input of the second convolution is computed again

    Source: the idea of Rota Bulo, Porzi and Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training
    of DNNs" (2018), from the other end: they keep y and invert the activation to get x, here x is kept and y computed.
    """

    def __init__(self, depth: int = 2) -> None:
        if isinstance(depth, bool) or not isinstance(depth, int):
            raise TypeError(f"recompute: depth must be an int, got {type(depth).__name__}")
        if depth < 1:
            raise ValueError(f"recompute: depth must be at least 1, got {depth}")
        super().__init__(lambda t: packed(t, depth), unpacked)
        self.depth = depth

    def __enter__(self) -> None:
        global contexts
        super().__enter__()
        with _lock:
            contexts += 1
        self._outer = getattr(_local, "depth", 0)
        _local.depth = self.depth

    def __exit__(self, *exception: object) -> None:
        global contexts
        _local.depth = self._outer
        with _lock:
            contexts -= 1
        super().__exit__(*exception)


class Unchanged(NamedTuple):
    """A tensor that is kept itself. Of what hooks keep, torch does not see that it was written to."""

    tensor: Tensor
    version: int


class Output(NamedTuple):
    """An output of a normalisation, as what computes it."""

    node: Any  # of the autograd graph, which holds what the normalisation keeps for its own backward
    depth: int  # normalisations to compute for it


def note(node: Any, residual: Tensor | None) -> None:
    """Makes the output of a normalisation one that can be computed again, if this thread is in the context."""
    depth = getattr(_local, "depth", 0)
    top = _top_saved_tensors_default_hooks(True)
    if depth and top is not None and top[1] is unpacked:  # others' hooks may not let the node's tensors be read twice
        node.packed_residual = None if residual is None else packed(residual, depth)
        node.is_recomputable = True


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def packed(t: Tensor, depth: int) -> Unchanged | Output:
    """What is kept of ``t``."""
    node = t.grad_fn  # of a view, another one
    if not getattr(node, "is_recomputable", False) or _version(t) != 0:  # or it is not what the node returned
        return Unchanged(t, _version(t))
    residual = node.packed_residual  # type: ignore[union-attr]
    needed = 1 + (residual.depth if isinstance(residual, Output) else 0)
    return Output(node, needed) if needed <= depth else Unchanged(t, _version(t))


def held(kept: Unchanged | Output | None) -> Tensor | None:
    """Of what is kept of a tensor, what takes memory beside what the normalisations keep: the tensor, or the first
    residual that is not computed again, if there is one."""
    while isinstance(kept, Output):
        kept = kept.node.packed_residual
    return None if kept is None else kept.tensor


def unpacked(kept: Unchanged | Output) -> Tensor:
    """The tensor that :func:`packed` was given."""
    if isinstance(kept, Unchanged):
        if _version(kept.tensor) != kept.version:
            raise RuntimeError(
                "recompute: one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: shape {list(kept.tensor.shape)}, version {kept.tensor._version} instead of {kept.version}"
            )
        return kept.tensor
    node = kept.node
    input, weight, bias, _, _, statistics = node.saved_tensors
    residual = None if node.packed_residual is None else unpacked(node.packed_residual)
    with torch.no_grad():
        return type(node)._forward_cls.again(input, weight, bias, residual, statistics, node.setting)
