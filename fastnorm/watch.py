"""What runs while torch.fx traces a forward, and whether it asks anything to which a proxy has no true answer."""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
from types import CodeType, FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import fx, nn

from fastnorm.state import is_users


class _Question(NamedTuple):
    """``is``, the name of a function, or a statement, that a function has; what it is about: a variable or, with
    ``attribute``, self.a.b of a variable self; None if that may be anything."""

    asks: str
    variable: str | None
    attribute: bool = False


# Of what a proxy answers wrongly, and cannot notice; by == and isinstance it can.
_FUNCTIONS = ("type", "hasattr", "getattr", "callable", "id")
_MODES = (
    torch.is_grad_enabled,
    torch.is_inference_mode_enabled,
    torch.is_autocast_enabled,
    torch.is_autocast_cpu_enabled,
    torch.get_autocast_dtype,
    torch.get_default_dtype,
)
_STATEMENTS = {  # those that begin with an instruction
    "SETUP_FINALLY": "try",  # before Python 3.11
    "MATCH_SEQUENCE": "match",
    "MATCH_MAPPING": "match",
    "MATCH_CLASS": "match",
}
_LIBRARY_ASKS = torch.is_tensor.__code__, contextlib.suppress.__enter__.__code__


class Watch:
    """Used as a context, in which the functions of Python that run are noted.

    A function is doubtful if it goes another way for an argument that is None, not a tensor or of some type, catches
    errors (which a proxy does not raise), or asks for a mode such as torch.no_grad. Not so ``self.layer is None`` of a
    module, nor what is no proxy.

    Args:
        module, function: of which the arguments may be None all the same; see :func:`asked_whether_none`.

    Attributes:
        codes: of what has run.
        doubt: what has been asked, None if nothing.
    """

    def __init__(self, module: nn.Module, function: CodeType | None) -> None:
        self.codes: set[CodeType] = set()
        self.doubt: str | None = None
        self._start = module, function

    def __enter__(self) -> Watch:
        self._before = sys.getprofile()
        sys.setprofile(self._event)
        return self

    def __exit__(self, *exception: object) -> None:
        # What a profiler in C has told of itself is itself, and no function: cProfile's, before Python 3.12.
        before: Any = self._before
        sys.setprofile(before if callable(before) else None)
        if not callable(before) and hasattr(before, "enable"):
            before.enable()

    def _event(self, frame: FrameType, event: str, function: Any) -> None:
        code = frame.f_code
        if event == "call":
            if is_users(code):
                self.codes.add(code)
                asked = (q.asks for q in _questions(code) if code.co_name != "__getattr__" and self._is_open(q, frame))
                self.doubt = self.doubt or next(asked, None)
            elif any(code is asks for asks in _LIBRARY_ASKS):
                self.doubt = self.doubt or code.co_name
        elif event == "c_call" and any(function is mode for mode in _MODES) and is_users(code):
            self.doubt = self.doubt or function.__name__

    def _is_open(self, question: _Question, frame: FrameType) -> bool:
        """Whether the answer may be another one when forward is called."""
        name, values = question.variable, frame.f_locals
        if name not in values:
            return True
        kind = type(values[name])  # isinstance asks a proxy for its class
        if question.attribute:
            return not issubclass(kind, nn.Module)
        if question.asks != "is None" or not issubclass(kind, fx.Proxy):
            return issubclass(kind, fx.Proxy)
        module, code = self._start
        is_argument = frame.f_code is code and values.get(code.co_varnames[0]) is module
        return not is_argument and _may_be_none(values[name])


def asked_whether_none(code: CodeType) -> set[str | None]:
    """The arguments of which a function asks this."""
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return {q.variable for q in _questions(code) if q.asks == "is None" and not q.attribute} & {*arguments}


def _may_be_none(proxy: fx.Proxy) -> bool:
    """Not what a layer of torch returns, nor what one of torch's functions or a method makes of a tensor."""
    tracer: Any = proxy.tracer
    root, node = tracer.root, proxy.node
    while node.op == "call_method":
        node = cast(fx.Node, node.args[0])
    if node.op == "call_module":
        layer = root.get_submodule(node.target)
        while isinstance(layer, nn.Sequential) and len(layer):
            layer = layer[-1]
        return not type(layer).__module__.startswith(("torch.nn.", "fastnorm.")) or isinstance(layer, nn.Sequential)
    name, module = getattr(node.target, "__name__", ""), getattr(node.target, "__module__", None) or ""
    made = module.startswith(("torch", "fastnorm", "_operator")) or getattr(torch, name, None) is node.target
    return node.op != "get_attr" and (node.op != "call_function" or not made or name == "getitem")


class _Value(NamedTuple):
    """What an instruction puts on the stack: a constant or global (sure), a variable, an attribute of one, or else."""

    sure: bool = False
    variable: str | None = None
    attribute: bool = False


_NONE = _Value(sure=True, variable="None")


@functools.lru_cache(4096)
def _questions(code: CodeType) -> tuple[_Question, ...]:
    """Those in a function, but not in functions inside it; ``self.a is None`` is among them, ``torch.a is b`` not."""
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("EXTENDED_ARG", "CACHE", "NOP")]
    operations = [i.opname for i in instructions]
    loops = any("BACKWARD" in o or o in ("FOR_ITER", "JUMP_ABSOLUTE") for o in operations)
    changed = {name for i in instructions if loops for name in _names(i, *_STORES)}
    found: list[_Question] = []
    values = [_Value(), _Value()]  # what was loaded last
    function, operand = "", 0  # one of _FUNCTIONS, and where in values its argument is

    def ask(asks: str, value: _Value) -> None:
        if not value.sure:
            found.append(_Question(asks, value.variable, value.attribute))

    for i, operation in zip(instructions, operations, strict=True):
        if i.is_jump_target:
            values.append(_Value())
        if operation in ("LOAD_ATTR", "LOAD_METHOD"):
            is_method = operation == "LOAD_METHOD" or "NULL" in i.argrepr
            values[-1] = _Value() if is_method else values[-1]._replace(attribute=True)
            continue
        if "_NONE" in operation:  # a jump, from Python 3.11 on
            ask("is None", values[-1])
        elif operation == "IS_OP":
            for value in values[-2:]:
                ask("is None" if _NONE in values[-2:] else "is", value)
        elif operation in _STATEMENTS:
            ask(_STATEMENTS[operation], _Value())
        if function and len(values) > operand:
            ask(function, _Value() if "JUMP" in operation or operation == "TO_BOOL" else values[operand])
            function = ""
        is_sure = "CONST" in operation or operation in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_SMALL_INT")
        loaded = _names(i, "LOAD_FAST", "LOAD_DEREF")
        values += [_Value(variable=None if name in changed else name) for name in loaded]
        if not loaded:
            values.append(_NONE if operation == "LOAD_CONST" and i.argval is None else _Value(is_sure))
        if operation == "LOAD_GLOBAL" and i.argval in _FUNCTIONS:
            function, operand = i.argval, len(values)
        changed.update(_names(i, *_STORES))
    if operations.count("PUSH_EXC_INFO") > operations.count("WITH_EXCEPT_START"):  # from Python 3.11 on
        ask("try", _Value())
    return tuple(found)


_STORES = ("STORE_FAST", "STORE_DEREF", "DELETE_FAST", "LOAD_FAST_AND_CLEAR")


def _names(instruction: dis.Instruction, *operations: str) -> tuple[str, ...]:
    """The variables of an instruction, if it is one of these; from Python 3.13 on there may be two."""
    if not instruction.opname.startswith(operations):
        return ()
    return instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
