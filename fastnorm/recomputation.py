"""Outputs of normalisations computed again in backward instead of kept for it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
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


class Operands:
    """What computes an output of a normalisation, and what is kept of the statistics that the normalisation itself
    keeps for its backward.

    So it lives as long as the normalisation's node keeps anything, and beyond that as long as a layer keeps the output.
    The node only refers to it, for a node lives as long as its output does.
    """

    def __init__(
        self,
        norm: Any,
        parameters: Sequence[Tensor | None],
        residual: Tensor | None,
        statistics: Tensor,
        setting: tuple[Any, ...],
        depth: int,
    ) -> None:
        self.norm, self.setting = norm, setting
        self.parameters = [None if t is None else packed(t, depth) for t in parameters]
        self.residual = None if residual is None else packed(residual, depth)
        self.statistics = Unchanged(statistics, _version(statistics))


class Output(NamedTuple):
    """An output of a normalisation, as what computes it."""

    operands: Operands
    depth: int  # normalisations to compute for it


def note(
    node: Any,
    norm: Any,
    parameters: Sequence[Tensor | None],
    residual: Tensor | None,
    statistics: Tensor,
    setting: tuple[Any, ...],
) -> None:
    """Makes the output of a normalisation one that can be computed again, if this thread is in the context.

    Args:
        node: of the autograd graph, which is about to save ``statistics``.
        norm: the :class:`fastnorm.norm.NormFunction`.
        parameters: input, weight and bias.
        residual, setting: as its forward has them.
    """
    depth = getattr(_local, "depth", 0)
    top = _top_saved_tensors_default_hooks(True)
    if depth and top is not None and top[1] is unpacked:  # others' hooks may not give a tensor back twice
        operands = Operands(norm, parameters, residual, statistics, setting, depth)
        node.fastnorm_operands = weakref.ref(operands)
        statistics.fastnorm_operands = operands  # type: ignore[attr-defined]  # until packed() takes it


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def packed(t: Tensor, depth: int) -> Unchanged | Output | Operands:
    """What is kept of ``t``."""
    node = t.grad_fn  # of a view, another one
    if node is None and (operands := t.__dict__.pop("fastnorm_operands", None)) is not None:
        return operands
    refer = getattr(node, "fastnorm_operands", None)
    operands = None if refer is None or _version(t) != 0 else refer()  # None if it is not what the node returned
    if operands is None:
        return Unchanged(t, _version(t))
    needed = 1 + (operands.residual.depth if isinstance(operands.residual, Output) else 0)
    return Output(operands, needed) if needed <= depth else Unchanged(t, _version(t))


def held(kept: Unchanged | Output | Operands | None) -> Tensor | None:
    """Of what is kept of a tensor, what takes memory beside what the normalisations keep: the tensor, or the first
    residual that is not computed again, if there is one."""
    while isinstance(kept, Output | Operands):
        kept = kept.operands.residual if isinstance(kept, Output) else kept.statistics
    return None if kept is None else kept.tensor


def unpacked(kept: Unchanged | Output | Operands) -> Tensor:
    """The tensor that :func:`packed` was given."""
    if isinstance(kept, Operands):
        kept = kept.statistics
    if isinstance(kept, Unchanged):
        if _version(kept.tensor) != kept.version:
            raise RuntimeError(
                "recompute: one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: shape {list(kept.tensor.shape)}, version {kept.tensor._version} instead of {kept.version}"
            )
        return kept.tensor
    operands = kept.operands
    packs = (*operands.parameters, operands.residual, operands.statistics)
    tensors = [None if t is None else unpacked(t) for t in packs]
    with torch.no_grad():
        return operands.norm.again(*tensors, operands.setting)
