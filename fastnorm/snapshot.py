"""What a forward can change outside of itself, so that it may be run with proxies, only to be looked at."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from types import CellType, FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastnorm.state import (
    all_names,
    cell_contents,
    global_names,
    is_users,
    is_users_class,
    modules_used,
    reachable,
    slots,
)


class _Place(NamedTuple):
    """Values that have names, and how they are read, set and removed."""

    read: Callable[[], dict[str, Any]]
    put: Callable[[str, Any], None]
    remove: Callable[[str], None]


class _Generator(NamedTuple):
    """A generator of random numbers."""

    read: Callable[[], Any]
    rewind: Callable[[Any], object]


_GLOBAL_GENERATORS = (
    _Generator(torch.get_rng_state, torch.set_rng_state),
    _Generator(random.getstate, random.setstate),
    _Generator(np.random.get_state, np.random.set_state),
)


class Snapshot:
    """What can be reached from a module, see :func:`fastnorm.state.reachable`: its attributes, what is in containers,
    objects, classes, closures, arrays and the globals that its functions set, and where random generators are.

    Of tensors which memory they are; of what is in that see :class:`NoWrites`. What iterators and open files will give
    cannot be told without taking it.

    Attributes:
        advances: something of that kind that was found, None if nothing.
    """

    def __init__(self, module: nn.Module) -> None:
        found, held = reachable(module)
        self.advances = next((v for v in found if hasattr(type(v), "__next__") and not is_users_class(type(v))), None)
        self._containers = [(container, _plain(container)) for value in found for container in _containers(value)]
        for m in (*module.modules(), *held):
            if not isinstance(m, torch.jit.ScriptModule):  # of which no forward in Python sets any
                self._containers += [(d, dict(d)) for d in (m._parameters, m._buffers, m._modules)]
        self._places = [(place, place.read()) for value in found for place in _places(value)]
        self._arrays = [(v, v.copy()) for v in found if isinstance(v, np.ndarray) and v.flags.writeable]
        tensors = [v for v in found if type(v) in (torch.Tensor, nn.Parameter) and v.layout == torch.strided]
        with no_dispatch():  # as in _rewind
            self._tensors = [(v, v.detach()) for v in tensors]
        generators = [*_GLOBAL_GENERATORS, *(g for value in found if (g := _generator(value)) is not None)]
        self._generators = [(generator, generator.read()) for generator in generators]

    def restore(self) -> str | None:
        """Sets all of it back; what had changed, if anything."""
        drawn = [_rewind(generator, before) for generator, before in self._generators]
        changed = [_refill(container, before) for container, before in self._containers]
        changed += [_put_back(place, before) for place, before in self._places]
        changed += [_rewrite(array, before) for array, before in self._arrays]
        changed += [_set_data(tensor, before) for tensor, before in self._tensors]
        if any(changed):
            return "forward sets attributes or changes what they hold"
        return "forward draws random numbers" if any(drawn) else None


_MUTABLE = (list, dict, set, deque)


def _containers(value: Any) -> list[Any]:
    """A container as it is, of another object the dictionary of its attributes."""
    attributes = None if isinstance(value, (torch.Tensor, ModuleType, type)) else getattr(value, "__dict__", None)
    return [*([value] if isinstance(value, _MUTABLE) else []), *([attributes] if type(attributes) is dict else [])]


def _plain(container: Any) -> Any:
    """A copy, of whatever subclass the container is."""
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def _refill(container: Any, before: Any) -> bool:
    changed = _identities(container) != _identities(before)
    if changed:
        container.clear()
        (container.update if isinstance(container, (dict, set)) else container.extend)(before)
    return changed


def _identities(container: Any) -> Any:
    """Of what is in it; asked whether they are equal, proxies and tensors do not say yes or no."""
    if isinstance(container, dict):
        return [*map(id, container), *map(id, container.values())]
    return set(map(id, container)) if isinstance(container, set) else list(map(id, container))


def _places(value: Any) -> list[_Place]:
    def by_attributes(owner: Any, read: Callable[[], dict[str, Any]]) -> _Place:
        return _Place(read, lambda name, v: setattr(owner, name, v), lambda name: delattr(owner, name))

    if isinstance(value, CellType):
        return [by_attributes(value, lambda: dict(zip(("cell_contents",), cell_contents(value), strict=False)))]
    if isinstance(value, type):
        read = lambda: {name: v for name, v in vars(value).items() if not name.startswith("__")}  # noqa: E731
        return [by_attributes(value, read)] if is_users_class(value) else []
    if not isinstance(value, FunctionType):
        return [by_attributes(value, lambda: slots(value))] if slots(value) else []
    if not is_users(value.__code__):
        return []
    code, scope = value.__code__, value.__globals__
    named = [(scope, global_names(code, "STORE_GLOBAL DELETE_GLOBAL"))]
    named += [(vars(module), all_names(code)) for module in modules_used(code, scope)]
    return [_of_names(dictionary, names) for dictionary, names in named if names]


def _of_names(scope: dict[str, Any], names: frozenset[str]) -> _Place:
    return _Place(lambda: {name: scope[name] for name in names if name in scope}, scope.__setitem__, scope.__delitem__)


def _put_back(place: _Place, before: dict[str, Any]) -> bool:
    now = place.read()
    for name in now.keys() - before.keys():
        place.remove(name)
    changed = [name for name in before if name not in now or now[name] is not before[name]]
    for name in changed:
        place.put(name, before[name])
    return bool(changed) or len(now) > len(before)


def _rewrite(array: np.ndarray, before: np.ndarray) -> bool:
    changed = array.tobytes() != before.tobytes()  # of objects, which they are
    if changed:
        array[...] = before
    return changed


def _set_data(tensor: torch.Tensor, before: torch.Tensor) -> bool:
    changed = _memory(tensor) != _memory(before)
    if changed:
        with no_dispatch():
            tensor.data = before
    return changed


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()


def _generator(value: Any) -> _Generator | None:
    if isinstance(value, (torch.Generator, np.random.RandomState)):
        return _Generator(value.get_state, value.set_state)
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return _Generator(value.getstate, value.setstate)
    bits = getattr(value, "bit_generator", value) if isinstance(value, np.random.Generator) else value
    if isinstance(bits, np.random.BitGenerator):
        return _Generator(lambda: bits.state, lambda state: setattr(bits, "state", state))
    return None


def _rewind(generator: _Generator, before: Any) -> bool:
    with no_dispatch():  # of FakeTensorMode, which takes no tensors but its own
        moved = not _same(generator.read(), before)
        if moved:
            generator.rewind(before)
    return moved


def _same(a: Any, b: Any) -> bool:
    """Of states, which are numbers and arrays in tuples and dictionaries."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and len(a) < 100:  # Python's own generator has 625 numbers
        return all(map(_same, a, b))
    return bool(a == b)


class NoWrites(TorchDispatchMode):
    """A context in which no tensor can be written but those made inside: TypeError, before it is."""

    sees_ops = True  # fastnorm's as ops of the dispatcher, see fastnorm.compile.traced_by_mode

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int | None, torch.UntypedStorage] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it imports torch.compile's packages, for seconds, and no compiled code comes here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = func._schema.arguments
        values = {a.name: args[i] if i < len(args) else kwargs.get(a.name) for i, a in enumerate(arguments)}
        written = [values[a.name] for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        if values.get("training"):  # of native_batch_norm and cudnn_batch_norm, whose schemas do not tell
            written += [values.get("running_mean"), values.get("running_var")]
        if any(key not in self._made for key in _storages(written)):
            raise TypeError("forward writes into a tensor that was there before")
        result = func(*args, **kwargs)
        given = {} if func is torch.ops.aten.lift_fresh.default else _storages((args, kwargs))
        self._made |= {key: storage for key, storage in _storages(result).items() if key not in given}
        return result


def _storages(values: Any) -> dict[int | None, torch.UntypedStorage]:
    """Of all tensors in values; None for those that have no storage of one piece, such as sparse ones."""
    found: dict[int | None, Any] = {}
    for tensor in tree_leaves(values):
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage() if tensor.layout == torch.strided else None
            found[storage._cdata if storage is not None else None] = storage
    return found
