"""What happens to work that no kernel covers: torch's own op does it, and says so once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

Mode = Literal["warn", "error", "silent"]


class FallbackWarning(UserWarning):
    """A call went to torch's own op: correct, but neither faster nor smaller. Given once for each op and reason."""


_mode: Mode = "warn"
_warned: set[tuple[str, str]] = set()


def set_fallback(mode: Mode) -> None:
    """Chooses what a call does that no kernel covers (another device, complex numbers, see the README).

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


def call_torch(op: str, reason: str, torch_op: Callable[..., Any], *args: Any) -> Any:
    """Calls torch_op in place of a kernel, as :func:`set_fallback` says."""
    if _mode == "error":
        raise NotImplementedError(f"{op}: {reason}")
    if _mode == "warn":
        _warn(op, reason)
    return torch_op(*args)


def _warn(op: str, reason: str) -> None:
    """Once for each op and reason; of a compiled call when it is compiled."""
    if (op, reason) not in _warned:
        _warned.add((op, reason))
        warnings.warn(f"{op}: {reason}; using torch's own op", FallbackWarning, stacklevel=5)


# Dynamo calls it while it traces, and leaves it out of the graph, which would break at a warning. A break inside of
# torch.func's transforms is more than Dynamo can mend.
_warn._dynamo_marked_constant = True  # type: ignore[attr-defined]
