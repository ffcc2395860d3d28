"""The contract structs of csrc/*.h as ctypes structures, read from the headers."""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# The sources; mutate.py has a changed copy.
CSRC = Path(os.environ.get("FASTNORM_CUDA_ON_CPU_CSRC", Path(__file__).resolve().parents[2] / "csrc"))

SCALARS = {
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "uint32_t": ctypes.c_uint32,
    "double": ctypes.c_double,
    "bool": ctypes.c_bool,
    **dict.fromkeys(("Dtype", "Activation", "Layout", "Region"), ctypes.c_int32),
}


@dataclass(frozen=True)
class Pointer:
    name: str
    is_input: bool  # const


@dataclass(frozen=True)
class Contract:
    """A kernel: the header's stem, which is its .cu file's, and what it takes."""

    op: str
    stem: str
    args: str  # the struct's name
    structure: type[ctypes.Structure]
    pointers: tuple[Pointer, ...]


def _without_comments(text: str) -> str:
    return re.sub(r"//.*", "", text)


@cache
def _headers() -> dict[str, str]:
    return {path.stem: _without_comments(path.read_text()) for path in sorted(CSRC.glob("*.h"))}


def _body(struct: str) -> str:
    """What is between the braces, functions left out."""
    for text in _headers().values():
        found = re.search(rf"\bstruct {struct} \{{", text)
        if found:
            break
    else:
        raise KeyError(f"no struct {struct} in csrc/*.h")
    depth, kept = 1, ""
    for character in text[found.end() :]:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return kept
        if depth == 1:
            kept += ";" if character == "}" else character
    raise ValueError(f"struct {struct} does not end")


def _fields(struct: str) -> list[tuple[str, str, bool]]:
    """(name, type, is a pointer)"""
    fields = []
    for statement in _body(struct).split(";"):
        words = statement.split()
        if not words or "(" in statement:
            continue
        match = re.match(r"\s*((?:const\s+)?\w+)(.*)", statement, re.S)
        assert match, statement
        for declarator in match[2].split(","):
            name = re.search(r"\w+", declarator.split("=")[0])
            assert name, statement
            fields.append((name[0], match[1], "*" in declarator))
    return fields


@cache
def _structure(struct: str) -> type[ctypes.Structure]:
    members = []
    for name, of, is_pointer in _fields(struct):
        members.append((name, ctypes.c_void_p if is_pointer else SCALARS.get(of) or _structure(of)))
    return type(struct, (ctypes.Structure,), {"_fields_": members})


@cache
def contracts() -> dict[str, Contract]:
    found = {}
    for stem, text in _headers().items():
        for op, args in re.findall(r"^FASTNORM_DECLARE_(?:CUDA_)?KERNEL\((\w+), (\w+)\)", text, re.M):
            pointers = tuple(
                Pointer(name, of.startswith("const")) for name, of, is_pointer in _fields(args) if is_pointer
            )
            found[op] = Contract(op, stem, args, _structure(args), pointers)
    return found
