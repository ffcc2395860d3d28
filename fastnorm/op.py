"""How an op is carried: by its kernel, by an op of the dispatcher where a compiler looks on, or by torch's own op."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _dispatch_has_kernel_for_dispatch_key,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from fastnorm.compile import traced_by_mode, uncovered_input, uses_ops
from fastnorm.fallback import call_torch

_HALF = (torch.bfloat16, torch.float16)


def carry(
    name: str,
    *,
    eager: Callable[..., Tensor],
    transformed: Callable[..., Tensor] | None = None,
    traced: Callable[..., Tensor],
    torch_op: Callable[..., Tensor],
    autocast_as: tuple[str, ...] = (),
) -> Callable[..., Tensor]:
    """An op as one function, which chooses among four that take the same arguments, the input first.

    Args:
        name: what warnings and errors call the op.
        eager: the kernel, through an autograd function where a gradient is due; NotImplementedError where there is none
            for these arguments.
        transformed: the kernel, through autograd functions with rules for forward mode and torch.func, inside of these;
            None where torch's own op is as good.
        traced: the op that :func:`fastnorm.compile.register` made, where a compiler looks on.
        torch_op: torch's own, for what has no kernel, with a FallbackWarning; for torch.jit.trace; and for a compiler
            that is to see it, see :func:`fastnorm.enable_under_compile`.
        autocast_as: ops of ATen that torch's own is made of. On devices where autocast gives any of them float32, it
            gives this one float32, too.
    """
    widened = {device: _has_autocast_rule(device, autocast_as) for device in ("cpu", "cuda")}

    def op(*args: Any) -> Tensor:
        is_traced = is_dynamo_compiling()
        if autocast_as and (is_traced or _is_any_autocast_enabled()):
            device = args[0].device.type
            if widened.get(device) and torch.is_autocast_enabled(device):
                args = tuple(a.float() if isinstance(a, Tensor) and a.dtype in _HALF else a for a in args)
        is_traced = is_traced or (_len_torch_dispatch_stack() > 0 and traced_by_mode())
        inside = forward_ad._current_level >= 0 or _are_functorch_transforms_active()
        reason: str | None
        if inside and (is_traced or transformed is None):
            reason = "no kernel for forward-mode automatic differentiation and torch.func"
            reason += " inside of torch.compile" if is_traced else ""
        elif is_traced:
            if uses_ops(args[0]):
                return traced(*args)
            reason = uncovered_input(args[0])
            if reason is None:
                return torch_op(*args)
        elif _get_tracing_state() is not None:  # torch.jit.trace records torch's own ops alone
            return torch_op(*args)
        else:
            try:
                return _untraced(transformed, *args) if inside else eager(*args)
            except NotImplementedError as uncovered:
                reason = str(uncovered).partition(": ")[2]
            except (AttributeError, TypeError) as error:
                check_tensor(name, args[0])
                if "(): incompatible function arguments" not in str(error):
                    raise
                raise TypeError(_unfitting(name, args)) from None
        return call_torch(name, reason, torch_op, *args)

    return op


_KINDS: dict[str, tuple[type, ...]] = {
    "Tensor": (Tensor,), "Generator": (torch.Generator,),
    "bool": (bool,), "int": (int,), "float": (float, int), "str": (str,),
}  # fmt: skip


def _unfitting(name: str, args: tuple[Any, ...]) -> str:
    """What a kernel, which names none, has against its arguments: in the words of the op's schema."""
    values = [one for arg in args for one in (arg if isinstance(arg, tuple) else (arg,))]
    of_another = {"rms_norm": "layer_norm", "batch_renorm": "batch_norm"}
    schemas = torch._C._jit_get_schemas_for_operator(f"fastnorm::{of_another.get(name, name)}")
    for argument, value in zip(schemas[0].arguments if schemas else (), values, strict=False):
        what, kind = argument.name, str(argument.type)
        if what == "state":  # that the op is given where a generator draws it
            what, kind = "generator", "Optional[Generator]"
        optional = kind.startswith("Optional[")
        kind = kind.removeprefix("Optional[").removesuffix("]") if optional else kind
        is_number_by_name = isinstance(value, bool) and kind in ("int", "float")
        if (isinstance(value, _KINDS.get(kind, object)) and not is_number_by_name) or (optional and value is None):
            continue
        wanted = f"{'an' if kind == 'int' else 'a'} {kind}{' or None' if optional else ''}"
        return f"{name}: {what} must be {wanted}, got {type(value).__name__}"
    return f"{name}: incompatible function arguments: {', '.join(type(value).__name__ for value in values)}"


def check_tensor(op: str, input: Any) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: input must be a Tensor, got {type(input).__name__}")


def refuse_bool(op: str, argument: str, value: Any) -> None:
    """Of what is neither True nor False, as torch's own ops do: 1 and numpy.bool are no bool of theirs."""
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    raise TypeError(f"{op}: {argument} must be a bool, got {name}")


def _untraced(function: Any, *args: Any) -> Tensor:
    """A call into which Dynamo does not look: where a graph broke inside of torch.func's transforms, which then run
    eagerly, it would compile the rules of autograd functions, and cannot."""
    if "torch._dynamo" in sys.modules:  # which takes two seconds to import
        function = _disabled(function)
    return function(*args)


@functools.cache
def _disabled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compiler.disable(function)


def _has_autocast_rule(device: str, ops: tuple[str, ...]) -> bool:
    return any(_dispatch_has_kernel_for_dispatch_key(f"aten::{op}", f"Autocast{device.upper()}") for op in ops)


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply for the calls that :func:`carry` gives to ``eager``; autograd calls their backward without detour.

    Left out is what torch.autograd.Function.apply does for torch.func before it calls its base class, 1.5 us of the 9
    that a Python function around a native call costs; and the method of a node that finds out which of two functions
    its backward is, 0.6 us of 19. backward must be a static method, as for torch's compiled autograd.
    """
    function._backward_cls.apply = function.backward
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]
