"""Arguments and modes that have their own say in a call, by __torch_function__: torch.fx's proxies, users' subclasses
of Tensor, TorchFunctionMode.

Functionals and modules ask ``has_torch_function_...`` of torch.overrides first, as torch's do: it takes 0.03 us. Dynamo
does what these would want by itself, at the op of the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.overrides import handle_torch_function

from fastnorm.trace import does_more


def overridden(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What comes of a functional's call where an argument or a mode has a __torch_function__.

    Handed over are, as torch's functions do it, arguments that have a default by name, and the others by position. What
    torch's function does not take is left out where it says nothing.

    Args:
        function: the functional, as users call it.
        arguments: its locals() when it has begun.
    """
    shared, own = function.__code__.co_varnames[: function.__code__.co_argcount], function.__kwdefaults__ or {}
    required = len(shared) - len(function.__defaults__ or ())
    named = {name: arguments[name] for name in shared[required:]}
    named |= {name: arguments[name] for name, default in own.items() if arguments[name] is not default}
    given = (arguments[name] for name in shared[:required])
    return handle_torch_function(function, arguments.values(), *given, **named)


def recorded_call(module: nn.Module, *args: Any) -> Any:
    """The node for a call of this module in the graph that torch.fx makes, None if a forward has to be followed.

    By itself torch.fx makes nodes of torch.nn's modules alone. Forward is followed where it is not all that the node
    would do (an override that calls it, hooks, which have run by now), and in a module that is traced for itself.
    """
    tracer = args[0].tracer if isinstance(args[0], fx.Proxy) else None
    if not isinstance(tracer, fx.Tracer) or module is tracer.root or does_more(module):
        return None
    if not type(module).__module__.startswith("fastnorm."):
        return None
    while args[-1] is None:
        args = args[:-1]
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, {})
