"""What happens to work that no kernel covers: torch's own op does it, and says so once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Final, Literal

import torch
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from fastnorm.compile import traced_by_mode, uncovered_input, uses_ops

# The "reason" of a call that a compiler looks on: see traced_call.
TRACED: Final = "traced"

Mode = Literal["warn", "error", "silent"]


class FallbackWarning(UserWarning):
    """A call went to torch's own op: correct, but neither faster nor smaller. Given once for each op and reason."""


_mode: Mode = "warn"
_warned: set[tuple[str, str]] = set()


def set_fallback(mode: Mode) -> None:
    """Chooses what a call does that no kernel covers (another device, complex numbers, forward-mode AD, torch.func).

    Args:
        mode: ``"warn"`` (the default) calls torch's op and gives one :class:`FallbackWarning` for each op and reason,
            ``"silent"`` just calls it, ``"error"`` raises NotImplementedError.

    Raises:
        ValueError: another mode.

    Example:
        >>> fastnorm.set_fallback("error")
        >>> fastnorm.set_fallback("warn")
    """
    global _mode
    if mode not in ("warn", "error", "silent"):
        raise ValueError(f"set_fallback: mode must be 'warn', 'error' or 'silent', got {mode!r}")
    _mode = mode
    _warned.clear()


def uncovered_transform(op: str) -> str | None:
    """The transform around this call that kernels cannot see through, in words; TRACED for a compiler's; or None."""
    if forward_ad._current_level >= 0:
        return f"{op}: no kernel for forward-mode automatic differentiation"
    if _are_functorch_transforms_active():
        return f"{op}: no kernel inside a torch.func transform"
    if is_dynamo_compiling() or (_len_torch_dispatch_stack() and traced_by_mode()):
        return TRACED
    return None


def traced_call(
    op: str, registered: Callable[..., torch.Tensor], torch_op: Callable[..., torch.Tensor], *args: Any
) -> torch.Tensor:
    """A call that a compiler looks on, of which args[0] is the input: registered(*args), or torch_op(*args) where
    :func:`fastnorm.enable_under_compile` or the input ask for torch's own op."""
    if uses_ops(args[0]):
        return registered(*args)
    reason = uncovered_input(args[0])
    return torch_op(*args) if reason is None else call_torch(f"{op}: {reason}", torch_op, *args)


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply for calls that :func:`uncovered_transform` has cleared.

    Left out is what torch.autograd.Function.apply does for torch.func before it calls its base class: 1.5 us of the 9
    that a Python function around a native call costs.
    """
    return super(torch.autograd.Function, function).apply


def call_torch(reason: str, torch_op: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """Calls torch_op in place of a kernel as :func:`set_fallback` says; the reason starts with the op's name."""
    if _mode == "error":
        raise NotImplementedError(reason)
    op, _, why = reason.partition(": ")
    if _mode == "warn" and (op, why) not in _warned:
        _warned.add((op, why))
        warnings.warn(f"{reason}; using torch's own op", FallbackWarning, stacklevel=4)
    return torch_op(*args, **kwargs)
