"""Which layers follow which in a model, by torch.fx: what fold.py and fuse.py go by."""

from __future__ import annotations

import dis
import functools
import inspect
import operator
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx, nn

from fastnorm.activation import norm_with_residual
from fastnorm.snapshot import NoWrites, Snapshot
from fastnorm.state import all_names
from fastnorm.watch import Watch, asked_whether_none

Leaf = Callable[[nn.Module], bool]

# Their forward is not to be run with a proxy, but the module inside can be entered on its own.
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class Traced(NamedTuple):
    """A module's forward, or another method, as a graph; where it could not be traced to its end, the beginning and the
    reason.

    Attributes:
        complete: the graph is all that forward does: parts do not run without gradients, under autocast, checkpointed,
            nothing is returned in a class of its own, and there are no arguments that can be left out, by which it may
            decide.
        codes: what ran while the graph was made, forward and whatever it called.
    """

    module: nn.Module
    name: str
    graph: fx.Graph
    failure: str | None
    complete: bool
    codes: frozenset[CodeType]


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
        self.shows_all = True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.shows_all &= _mode() == self._mode
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """Of lists and dictionaries of other classes torch.fx makes plain ones, other tuples and dataclasses it builds
        twice; np.float64 it would write down as that."""
        if type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, (super().create_arg(dict(a)),), {})
        kind = type(a)
        is_tuple = kind in (tuple, torch.Size) or (kind.__bases__ == (tuple,) and hasattr(kind, "_fields"))
        is_rebuilt = issubclass(kind, (list, dict, tuple)) or "__dataclass_fields__" in dir(kind)
        self.shows_all &= kind in _PLAIN or is_tuple or not is_rebuilt
        return super().create_arg(float(a) if kind is np.float64 else a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._leaf(m)


_PLAIN = (list, dict, fx.immutable_collections.immutable_list, fx.immutable_collections.immutable_dict)


def _mode() -> tuple[Any, ...]:
    """What a ``with`` in forward can change, and a graph does not show."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
    )


def trace(module: nn.Module, leaf: Leaf, given: bool = True, name: str = "forward") -> Traced:
    """Traces a module's forward, or another method, down to the modules that ``leaf`` says not to enter.

    ``given=False`` leaves out the arguments that can be left out, see :func:`left_out`.

    A forward that writes into tensors which were there before, changes anything else outside of itself or draws random
    numbers fails: what it does the next time need not be what it did now. All is undone, see
    :class:`fastnorm.snapshot.Snapshot`. One that may take something out of an iterator or a file is not run.
    """
    if name in vars(module):
        return _untraced(module, name, f"{name} is set on the instance")
    function = getattr(type(module), name)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in inspect.signature(function).parameters.values()):
        return _untraced(module, name, f"{name} takes any number of arguments")
    defaults = left_out(function)
    tracer = _Tracer(leaf)
    tracer.graph, tracer.traced_func_name = fx.Graph(), name
    snapshot, own = Snapshot(module), vars(module).keys() | ()
    if snapshot.advances is not None:
        return _untraced(module, name, f"{name} may take something out of a {type(snapshot.advances).__name__}")
    failure = None
    watch = Watch(module, getattr(inspect.unwrap(function), "__code__", None))
    try:
        with warnings.catch_warnings(), watch, NoWrites():
            warnings.simplefilter("ignore")
            tracer.trace(module, None if given else defaults)
    except Exception as error:  # forward may raise anything when it meets a proxy
        failure = f"{type(error).__name__}: {error}"
    for key in vars(module).keys() - own:
        if key.startswith("_tensor_constant"):
            del vars(module)[key]  # torch.fx sets these, see attribute()
    changed = snapshot.restore()
    failure = failure or changed
    if watch.doubt is not None:
        failure = failure or f"what forward does may depend on more than modules ({watch.doubt})"
    complete = failure is None and tracer.shows_all and not defaults
    return Traced(module, name, tracer.graph, failure, complete, frozenset(watch.codes))


def left_out(function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that a call of a method may be without, and what they are then: those that have a default, and
    those of which the method asks whether they are None, which a proxy never is."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    asked = asked_whether_none(code) if code else ()
    return {
        p.name: None if p.default is p.empty else p.default
        for p in inspect.signature(function).parameters.values()
        if p.default is not p.empty or p.name in asked
    }


_NOTHING = ("EXTENDED_ARG", "CACHE", "NOP")  # instructions of no meaning here


def _variables(operation: str, value: Any) -> list[str]:
    """The local variables that an instruction loads; from Python 3.13 on there may be two."""
    if "LOAD_FAST" not in operation and operation != "LOAD_DEREF":
        return []
    return list(value) if isinstance(value, tuple) else [value]


def _untraced(module: nn.Module, name: str, reason: str) -> Traced:
    return Traced(module, name, fx.Graph(), reason, False, frozenset())


def attribute(module: nn.Module, path: str) -> Any:
    """What a node takes out; None of a tensor that is no attribute, which torch.fx made one for as long as it traced.

    Such a constant may have been made by forward (torch.arange), or be global: it does not move with the module.
    """
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def writes(node: fx.Node, layer: nn.Module | None, is_layer: Leaf) -> bool:
    """Whether a node, which calls ``layer`` if any, may write into a tensor that was there before."""
    if node.op == "call_module":
        return not is_layer(layer) or bool(getattr(layer, "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "unknown_")
    flagged = any(flag is True for flag in (*node.args, node.kwargs.get("inplace")))  # as in F.relu(x, True)
    return node.target is in_place or name.endswith("_") or flagged or "out" in node.kwargs


def does_more(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward, or something else: hooks, a forward of its own."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return "forward" in vars(module) or any(hooks)


def methods(module: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Names and functions of the methods of a module's class, forward among them, that are not torch's or fastnorm's.

    What was overridden is there too, super() reaches it; properties are, by the function that gets their value.
    """
    replaced: Any = ()
    for kind in type(module).__mro__:
        if kind is object or kind.__module__.startswith(("torch.", "fastnorm.")):
            continue
        for name, value in vars(kind).items():
            if isinstance(value, (property, functools.cached_property)):
                value = getattr(value, "func", None) or getattr(value, "fget", None)
            elif isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            # __init__ has run, and will not run again.
            if name not in replaced and name != "__init__" and isinstance(value, FunctionType):
                yield name, inspect.unwrap(value)
        replaced = vars(kind) if "_fused_source" in vars(kind) else ()  # methods of its base, generated


def layers_used(module: nn.Module, function: Callable[..., Any]) -> set[nn.Module]:
    """The modules that a method of ``module`` calls, or hands on, by its code alone.

    Of self.a.b it is known which one it is. Of x.b, where x is any other value, each module inside that is called b may
    be meant. Who only takes an attribute out, as in self.norm.weight, does not use the layer.
    """
    used: set[nn.Module] = set()
    for of_self, names in _attribute_chains(function.__code__):
        starts = [module]
        if not of_self or names[0] not in module._modules:
            starts, names = list(module.modules()), names[of_self:]
        used.update(found for start in starts if names and (found := _follow(start, names)) is not None)
    inside = list(used)
    containers = (nn.ModuleList, nn.ModuleDict, *((nn.Sequential,) if _takes_apart(function.__code__) else ()))
    for container in inside:
        if isinstance(container, containers):
            inside += container.children()
    return set(inside)


def _takes_apart(code: CodeType) -> bool:
    """Whether something is indexed, sliced or gone through in a loop: it may be a Sequential that is used."""
    if any(_takes_apart(constant) for constant in code.co_consts if isinstance(constant, CodeType)):
        return True
    apart = ("BINARY_SUBSCR", "BINARY_SLICE", "GET_ITER")
    return any(i.opname in apart or i.argrepr == "[]" for i in dis.get_instructions(code))


def _follow(start: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The module that start.a.b.c is or calls."""
    module = start
    for name in names:
        if name not in module._modules or module._modules[name] is None:
            return module if module is not start and name in ("forward", "__call__") else None
        module = module._modules[name]
    return module


@functools.lru_cache(4096)
def _attribute_chains(code: CodeType, self_name: str | None = None) -> tuple[tuple[bool, tuple[str, ...]], ...]:
    """Each a.b.c that a function reads, without its beginning; True where that is the function's first argument.

    Those of global names, such as torch.relu, are left out.
    """
    if self_name is None:
        self_name = (*code.co_varnames, "")[0]
    found = []
    beginning, names = "", []
    for instruction in dis.get_instructions(code):
        operation, value = instruction.opname, instruction.argval
        if operation in ("LOAD_ATTR", "LOAD_METHOD"):
            names.append(value)
        elif operation not in _NOTHING:
            found.append((beginning, tuple(names)))
            is_self = _variables(operation, value)[-1:] == [self_name]
            beginning = "self" if is_self else "global" if "LOAD_GLOBAL" in operation else "other"
            names = []
    chains = {(beginning == "self", names) for beginning, names in found if names and beginning != "global"}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            chains.update(_attribute_chains(constant, self_name))
    return tuple(chains)


def trace_everything(model: nn.Module, leaf: Leaf) -> tuple[list[Traced], set[nn.Module]]:
    """Graphs that together show a model: of the model itself or, where it cannot be traced, of its largest parts that
    can; a Sequential always can. A forward with arguments that can be left out is traced with and without them. Modules
    with hooks, and those that cannot be traced, are entered on their own.

    So are the methods that these forwards call. Others may do anything: they are not run, but what they use is looked
    up, for each module by itself.

    Args:
        leaf: says which modules have nothing inside to look for.

    Returns:
        The graphs; and the leaves that are used by methods and forwards of which there is no graph.
    """
    opaque: set[nn.Module] = set()
    traced: dict[tuple[nn.Module, str], list[Traced]] = {}

    def is_leaf(m: nn.Module) -> bool:
        return leaf(m) or m in opaque or does_more(m) or isinstance(m, PARALLEL)

    def attempt(m: nn.Module, name: str = "forward") -> bool:
        variants = (True, False) if left_out(getattr(type(m), name)) else (True,)
        traced[m, name] = [trace(m, is_leaf, given, name) for given in variants]
        return _failure(traced[m, name]) is None

    def prepare(m: nn.Module) -> None:
        if (m, "forward") in traced or leaf(m) or attempt(m):
            return
        found = len(opaque)
        for child in m.children():
            prepare(child)
        if len(opaque) == found:  # each by itself can be traced, but not with what it gets here
            blocks = {child for child in m.modules() if child is not m and not leaf(child)}
        else:
            blocks = set()
        opaque.update(blocks)
        if not attempt(m):
            opaque.difference_update(blocks)
            opaque.add(m)

    seen: set[nn.Module] = set()

    def collect(m: nn.Module) -> Iterator[Traced]:
        if m in seen or leaf(m):
            return
        seen.add(m)
        prepare(m)
        variants = traced[m, "forward"]
        failure = _failure(variants)
        yield from (t._replace(failure=failure) for t in variants)
        inside = [] if failure is None else list(m.children())
        for t in variants:
            inside += [m.get_submodule(node.target) for node in t.graph.nodes if node.op == "call_module"]
        for other in inside:
            yield from collect(other)

    found = list(collect(model))
    ran = {code for variants in traced.values() for t in variants for code in t.codes}
    used: set[nn.Module] = set()

    def graphs(m: nn.Module, name: str) -> list[Traced]:
        if name != "forward" and (m, name) not in traced and attempt(m, name):
            found.extend(traced[m, name])
        return traced.get((m, name), [])

    for layers in used_unseen((m for m in model.modules() if not leaf(m)), ran, graphs):
        used |= layers
        for layer in layers:
            found += collect(layer)
    return found, used


def used_unseen(
    modules: Iterable[nn.Module], ran: Container[CodeType], graphs: Callable[[nn.Module, str], list[Traced]]
) -> Iterator[set[nn.Module]]:
    """The modules that are used by each forward and method of which there is no graph.

    Methods that no forward has called may do anything: they are not run, what they use is known by their code alone.

    Args:
        ran: what forwards have called.
        graphs: gives those of a module's forward or of another method, none if it cannot.
    """
    for module in modules:
        for name, function in methods(module):
            if function is not inspect.unwrap(getattr(type(module), name)) and _called_by_others(module, name):
                seen = False
            elif name == "forward":  # if it is overridden, only that calls it
                seen = _failure(graphs(module, name)) is None
            else:
                seen = (
                    function.__code__ in ran and _is_run(module, name, ran) and _shows(graphs(module, name), function)
                )
            if not seen:
                yield layers_used(module, function)


def _called_by_others(module: nn.Module, name: str) -> bool:
    """Whether a method of another name may call what a method overrides: super().name(x), or Base.name(self, x)."""
    bases = {kind.__name__ for kind in type(module).__mro__}
    return any(
        other != name and name in (names := all_names(function.__code__)) and (bases | {"super"}) & names
        for other, function in methods(module)
    )


def _is_run(module: nn.Module, name: str, ran: Container[CodeType]) -> bool:
    """Whether the method of this name is one that has been run already, with nothing but a module before its inputs."""
    method = inspect.getattr_static(type(module), name)
    return isinstance(method, FunctionType) and inspect.unwrap(method).__code__ in ran


def _shows(variants: list[Traced], function: Callable[..., Any]) -> bool:
    """Whether all that a method's function does is in the graphs, be it only called by super()."""
    return _failure(variants) is None and any(function.__code__ in t.codes for t in variants)


def _failure(variants: list[Traced]) -> str | None:
    return next((t.failure for t in variants if t.failure is not None), None)
