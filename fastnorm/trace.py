"""Which layers follow which in a model, by torch.fx: what fold.py and fuse.py go by."""

from __future__ import annotations

import inspect
import operator
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx, nn

from fastnorm.activation import norm_with_residual

Leaf = Callable[[nn.Module], bool]


class Traced(NamedTuple):
    """A module's forward as a graph; where it could not be traced to its end, the beginning and the reason.

    Attributes:
        complete: the graph is all that forward does: parts do not run without gradients, under autocast, checkpointed,
            and there are no arguments that can be left out, by which it may decide.
    """

    module: nn.Module
    graph: fx.Graph
    failure: str | None
    complete: bool


def in_place(operation: str, a: Any, b: Any) -> Any:
    """a = operator.iadd(a, b) and the like: torch.fx itself takes ``a += b`` for ``a = a + b``, of which others that
    hold the same tensor see nothing."""
    return getattr(operator, operation)(a, b)


class _Proxy(fx.Proxy):
    """torch.fx's, which does not let writes pass unseen, nor a forward that decides by the type of what it gets."""

    @property
    def __class__(self) -> type:
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            raise TypeError("forward asks for the type of a tensor")
        return _Proxy

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise TypeError(f"forward sets {name} of a tensor")
        super().__setattr__(name, value)


def _recorded(operation: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda a, b: a.tracer.create_proxy("call_function", in_place, (operation, a, b), {})


for _name in (
    "add",
    "and",
    "floordiv",
    "lshift",
    "matmul",
    "mod",
    "mul",
    "or",
    "pow",
    "rshift",
    "sub",
    "truediv",
    "xor",
):
    setattr(_Proxy, f"__i{_name}__", _recorded(f"i{_name}"))


class _Tracer(fx.Tracer):
    # As a proxy a buffer cannot be written while forward is only being looked at.
    proxy_buffer_attributes = True

    def __init__(self, leaf: Leaf) -> None:
        super().__init__(autowrap_functions=(norm_with_residual,))
        self._leaf = leaf
        self._mode = _mode()
        self.changes_mode = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.changes_mode |= _mode() != self._mode
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._leaf(m)


def _mode() -> tuple[Any, ...]:
    """What a ``with`` in forward can change, and a graph does not show."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
    )


def trace(module: nn.Module, leaf: Leaf, given: bool = True) -> Traced:
    """Traces a module's forward down to the modules that ``leaf`` says not to enter.

    ``given=False`` leaves out the arguments that can be left out.

    A forward that sets attributes or draws random numbers fails: what it does the next time need not be what it did
    now. Both are undone, as far as attributes of modules and the generators of the CPU go.
    """
    if "forward" in vars(module):
        return Traced(module, fx.Graph(), "forward is set on the instance", False)
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return Traced(module, fx.Graph(), "forward takes any number of arguments", False)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    tracer = _Tracer(leaf)
    tracer.graph = fx.Graph()
    attributes, generators = _attributes(module), _generators()
    failure = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tracer.trace(module, None if given else defaults)
    except Exception as error:  # forward may raise anything when it meets a proxy
        failure = f"{type(error).__name__}: {error}"
    if _restore(attributes):
        failure = failure or "forward sets attributes"
    if _rewind(generators):
        failure = failure or "forward draws random numbers"
    return Traced(module, tracer.graph, failure, failure is None and not tracer.changes_mode and not defaults)


def _generators() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _rewind(generators: tuple[Any, ...]) -> bool:
    """Sets the generators to where they were; True if any had moved."""
    torch_state, python_state, numpy_state = generators
    now_torch, now_python, now_numpy = _generators()
    moved = not (
        torch.equal(now_torch, torch_state)
        and now_python == python_state
        and np.array_equal(now_numpy[1], numpy_state[1])
        and now_numpy[2:] == numpy_state[2:]
    )
    if moved:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
    return moved


def _attributes(module: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The dictionaries that attributes of modules live in, each with a copy."""
    found = []
    for m in module.modules():
        for dictionary in (vars(m), m._parameters, m._buffers, m._modules):
            found.append((dictionary, dict(dictionary)))
    return found


def _restore(attributes: list[tuple[dict[str, Any], dict[str, Any]]]) -> bool:
    """Undoes what has changed since; True if anything had."""
    changed = False
    for dictionary, before in attributes:
        if dictionary.keys() != before.keys() or any(dictionary[key] is not value for key, value in before.items()):
            changed = True
            dictionary.clear()
            dictionary.update(before)
    return changed


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def trace_everything(model: nn.Module, leaf: Leaf) -> list[Traced]:
    """Graphs that together show a model: of the model itself or, where it cannot be traced, of its largest parts that
    can; a Sequential always can. A forward with arguments that can be left out is traced with and without them. Modules
    with hooks, and those that cannot be traced, are entered on their own.

    Args:
        leaf: says which modules have nothing inside to look for.
    """
    opaque: set[nn.Module] = set()
    traced: dict[nn.Module, list[Traced]] = {}

    def is_leaf(m: nn.Module) -> bool:
        return leaf(m) or m in opaque or has_hooks(m) or "forward" in vars(m)

    def attempt(m: nn.Module) -> bool:
        optional = any(p.default is not p.empty for p in inspect.signature(type(m).forward).parameters.values())
        traced[m] = [trace(m, is_leaf, given) for given in ((True, False) if optional else (True,))]
        return _failure(traced[m]) is None

    def prepare(m: nn.Module) -> None:
        if m in traced or leaf(m) or attempt(m):
            return
        found = len(opaque)
        for child in m.children():
            prepare(child)
        if len(opaque) == found or not attempt(m):
            opaque.add(m)

    seen: set[nn.Module] = set()

    def collect(m: nn.Module) -> Iterator[Traced]:
        if m in seen or leaf(m):
            return
        seen.add(m)
        prepare(m)
        failure = _failure(traced[m])
        yield from (t._replace(failure=failure) for t in traced[m])
        inside = [] if failure is None else list(m.children())
        for t in traced[m]:
            inside += [m.get_submodule(node.target) for node in t.graph.nodes if node.op == "call_module"]
        for other in inside:
            yield from collect(other)

    return list(collect(model))


def _failure(variants: list[Traced]) -> str | None:
    return next((t.failure for t in variants if t.failure is not None), None)
