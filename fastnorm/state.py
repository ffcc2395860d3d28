"""What the code of a model can get at beside its layers: fold.py and fuse.py leave alone what is held there as well."""

from __future__ import annotations

import dis
import functools
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch
from torch import nn

_CONTAINERS = (list, dict, set, frozenset, tuple, deque)
_OF_EVERY_MODULE = vars(nn.Module()).keys()
_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)  # there is nothing in them
_LEVELS = 8  # of what is in what
_MANY = 1000  # containers of more are data
_OTHERS = {"torch", "fastnorm", "numpy", *sys.stdlib_module_names}
_FOLDERS = os.path.dirname(torch.__file__), os.path.dirname(__file__), os.path.dirname(np.__file__)
_LIBRARY = os.path.dirname(os.__file__)


def is_users(code: CodeType) -> bool:
    """Whether code is neither torch's, fastnorm's, numpy's nor Python's own."""
    return _is_users_file(code.co_filename)


@functools.lru_cache(4096)
def _is_users_file(file: str) -> bool:
    own = file.startswith(_LIBRARY) and "-packages" not in file
    return not own and not file.startswith((*_FOLDERS, "<frozen "))


def is_users_class(kind: type) -> bool:
    return _is_users_module(kind.__module__)


def _is_users_module(name: str) -> bool:
    return name.partition(".")[0] not in _OTHERS


def reachable(model: nn.Module) -> tuple[list[Any], set[nn.Module]]:
    """Whatever attributes, and the methods of the classes by their globals and closures, lead to from the modules of a
    model; and those modules among it: replaced in the model, these would stay where they are as well."""
    roots = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    inside = set(model.modules())
    found: dict[int, Any] = {}
    held: set[nn.Module] = set()
    level: Iterable[Any] = roots
    for depth in range(_LEVELS):
        after: list[Any] = []
        for value in level:
            kind = type(value)
            if depth and issubclass(kind, nn.Module):
                held.add(value)
                after += [] if value in inside else value.modules()
            if kind not in _VALUES and id(value) not in found:
                found[id(value)] = value
                after += _parts(value)
        level = after
    return list(found.values()), held


def _parts(value: Any) -> Iterator[Any]:
    kind = type(value)
    if issubclass(kind, nn.Module):
        yield from (v for key, v in vars(value).items() if key not in _OF_EVERY_MODULE)
        yield kind
    elif issubclass(kind, _CONTAINERS):
        if len(value) <= _MANY:
            yield from value.values() if issubclass(kind, dict) else value
    elif issubclass(kind, type):
        if is_users_class(value):
            yield from (*vars(value).values(), *value.__bases__)
    elif issubclass(kind, FunctionType):
        if is_users(value.__code__):
            yield from (value.__defaults__, value.__kwdefaults__, getattr(value, "__wrapped__", None))
            yield from value.__closure__ or ()
            yield from _globals(value.__code__, value.__globals__)
    elif issubclass(kind, CellType):
        yield from cell_contents(value)
    elif issubclass(kind, (MethodType, BuiltinFunctionType)):
        yield from (value.__self__, getattr(value, "__func__", None))
    elif issubclass(kind, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif issubclass(kind, (staticmethod, classmethod)):
        yield value.__func__
    elif issubclass(kind, property):
        yield value.fget
    elif issubclass(kind, functools.cached_property):
        yield value.func
    elif is_users_class(kind) or issubclass(kind, SimpleNamespace):
        yield from (*getattr(value, "__dict__", {}).values(), *slots(value).values(), kind)


def cell_contents(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # it is empty
        return []


def slots(value: Any) -> dict[str, Any]:
    kinds = (kind for kind in type(value).__mro__ if is_users_class(kind))
    slots = (slot for kind in kinds for slot in vars(kind).values() if isinstance(slot, MemberDescriptorType))
    return {slot.__name__: getattr(value, slot.__name__) for slot in slots if hasattr(value, slot.__name__)}


def _globals(code: CodeType, scope: dict[str, Any]) -> Iterator[Any]:
    """The values of the global names in a function; of modules, of those names that it takes out."""
    yield from (value for name in global_names(code) if not isinstance(value := scope.get(name), ModuleType))
    for module in modules_used(code, scope):
        yield from (vars(module)[key] for key in all_names(code) if key in vars(module))


def modules_used(code: CodeType, scope: dict[str, Any]) -> list[ModuleType]:
    """Those of the user's that a function has a global name for."""
    values = map(scope.get, global_names(code))
    return [value for value in values if isinstance(value, ModuleType) and _is_users_module(value.__name__)]


@functools.lru_cache(4096)
def global_names(code: CodeType, operations: str = "LOAD_GLOBAL LOAD_NAME") -> frozenset[str]:
    names = {i.argval for i in dis.get_instructions(code) if i.opname in operations.split()}
    return frozenset(names.union(*(global_names(c, operations) for c in code.co_consts if isinstance(c, CodeType))))


@functools.lru_cache(4096)
def all_names(code: CodeType) -> frozenset[str]:
    """The global names and attributes in a function, and in those inside it."""
    return frozenset(code.co_names).union(*(all_names(c) for c in code.co_consts if isinstance(c, CodeType)))
