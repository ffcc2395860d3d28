"""torch.compile and torch.export: the native functions as ops of the dispatcher, which a compiler sees into a graph.

Eager calls go through the autograd functions, which cost less; where a compiler looks on, the functionals call the ops
registered here. They are torch.ops.fastnorm.<name>: functional, so what they would update they return, and the
functional writes it back, as torch's own batch normalisation does when it is traced. For a registered autograd formula
must not mutate anything.

They have derivatives of every order. Not so what torch makes of them: AOTAutograd differentiates a compiled graph once,
and torch.func takes no op whose derivative torch.library.register_autograd gave; it takes the functionals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_dispatch_mode, _get_dispatch_stack_at, _len_torch_dispatch_stack, _TorchDispatchModeKey
from torch._prims_common import suggest_memory_format

from fastnorm import _C

_TRACING_MODES = (_TorchDispatchModeKey.FAKE, _TorchDispatchModeKey.PROXY, _TorchDispatchModeKey.FUNCTIONAL)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda") if _C.cuda_ops else ("cpu",)

_library = torch.library.Library("fastnorm", "DEF")
_ops_enabled = True


def enable_under_compile(enabled: bool) -> None:
    """Chooses what torch.compile and torch.export see of fastnorm's modules and functionals.

    Args:
        enabled: True (the default): fastnorm's ops, each one call of a kernel. False: torch's own ops, which a compiler
            takes apart and fuses itself with what is around them. Eager calls stay on the kernels either way, and so do
            graphs that were compiled before; ``torch.compiler.reset()`` forgets those.

    Example:
        >>> fastnorm.enable_under_compile(False)
        >>> fastnorm.enable_under_compile(True)
    """
    global _ops_enabled
    _ops_enabled = bool(enabled)


def traced_by_mode() -> bool:
    """Whether FakeTensors, make_fx or functionalisation see this call: the parts of a compiler, when used by hand; or
    a mode that has ``sees_ops``."""
    modes = map(_get_dispatch_stack_at, range(_len_torch_dispatch_stack()))
    return any(_get_dispatch_mode(key) is not None for key in _TRACING_MODES) or any(
        getattr(mode, "sees_ops", False) for mode in modes
    )


def uses_ops(input: Tensor) -> bool:
    """Whether a traced call with this input becomes one of the ops, and not torch's own."""
    return _ops_enabled and uncovered_input(input) is None


def uncovered_input(input: Tensor) -> str | None:
    """Why no kernel takes the input, of which a trace has no more than the description; None if one does."""
    if input.layout != torch.strided:
        return f"no kernel for input of layout {input.layout}, wanted torch.strided"
    if input.device.type not in _DEVICES:
        return f"no kernel for input on {input.device}, wanted {' or '.join(_DEVICES)}"
    if input.dtype not in _DTYPES:
        return f"no kernel for input of type {input.dtype}, wanted float64, float32, bfloat16 or float16"
    return None


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    tags: tuple[torch.Tag, ...] = (),
) -> Callable[..., Any]:
    """Registers an op with the dispatcher, and returns it.

    Args:
        schema: name, arguments and results, as torch.library.define takes them.
        kernel: computes the results; they share no memory with the arguments.
        fake: makes results of the same shapes, strides and types of arguments that have no data.
        backward, setup_context: the derivative, as torch.library.register_autograd takes them; without, there is none,
            and to ask for it is an error.
        tags: what a compiler is told of the op besides.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    op = f"fastnorm::{name}"
    torch.library.register_fake(op, fake, lib=_library)
    torch.library.register_autograd(op, backward or _refuse, setup_context=setup_context, lib=_library)
    return getattr(torch.ops.fastnorm, name).default


def _refuse(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "fastnorm: this op can be differentiated once when traced; use eager mode for higher orders"
    )


def refuse_scripting(module: torch.nn.Module) -> None:
    """What torch.jit.script calls first: it could compile neither the kernels nor what chooses among them."""
    raise NotImplementedError(
        f"{type(module).__name__}: torch.jit.script cannot compile fastnorm's modules; use torch.compile, torch.export "
        "or torch.jit.trace, or make them torch.nn's by fastnorm.revert"
    )


def defined(results: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """What a native function returned, with empty tensors for what it did not make: a schema has no optional result."""
    return tuple(like.new_empty(0) if t is None else t for t in results)


def clones(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What a kernel may update in place of an op's arguments: dense copies."""
    return [None if t is None else t.clone(memory_format=torch.contiguous_format) for t in tensors]


def write_back(tensors: Sequence[Tensor | None], new: Sequence[Tensor]) -> None:
    """Makes of what an op returned the update that an eager call would have been."""
    for t, value in zip(tensors, new, strict=True):
        if t is not None:
            t.copy_(value)


def is_differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# ---- the layout of results, as csrc/tensors.cpp decides it


def is_channels_last(t: Tensor) -> bool:
    """Whether kernels read a tensor (N, C, *) as (N, *, C): it is dense as that, and not as it is, or a part of such a
    tensor."""
    if t.dim() < 3 or t.is_contiguous():
        return False
    if suggest_memory_format(t) != torch.contiguous_format:
        return True
    expected = 1
    for d in (1, *range(t.dim() - 1, 1, -1), 0):
        if t.size(d) != 1 and t.stride(d) != expected:
            return False
        expected = expected * t.size(d)
    return True


def empty_contiguous(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def empty_in_layout(t: Tensor) -> Tensor:
    """A result of t's shape, in the layout that a kernel reads t in."""
    if not is_channels_last(t):
        return empty_contiguous(t)
    strides, step = [0] * t.dim(), 1
    for d in (1, *range(t.dim() - 1, 1, -1), 0):
        strides[d] = step
        step = step * t.size(d)
    return t.new_empty_strided(t.shape, strides)


def empty_mask(t: Tensor, size: int) -> Tensor:
    """Of so many bytes, for a norm of t (N, C, *); new_mask of csrc/tensors.h."""
    return t.new_empty((size, 1) if is_channels_last(t) else (size,), dtype=torch.uint8)


def spatial_size(t: Tensor) -> int:
    size = 1
    for n in t.shape[2:]:
        size = size * n
    return size


def folded(width: int, rows: int) -> int:
    """How many rows the kernels take as one, where rows are too narrow for a vector."""
    fold = 1
    while fold * width < 64 and fold < rows:
        fold *= 2
    return fold


def cuda_mask_bytes(t: Tensor) -> int:
    """Of the activation's mask of a tensor (N, C, *), as csrc/mask.h lays it out on a GPU."""
    N, C, S = t.size(0), t.size(1), spatial_size(t)
    if not is_channels_last(t) and S > 1:
        return (N * C * (S + 8) + 7) // 8
    return N * S * ((C + 7) // 8)
