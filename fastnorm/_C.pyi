"""The native module, as type checkers see it: its functions are declared in csrc/ops.h."""

from collections.abc import Callable
from typing import Any

torch_version: str
compiler: str
cuda_version: str
cuda_binaries: list[int]
cuda_ptx: list[int]
cuda_ops: str

def __getattr__(name: str) -> Callable[..., Any]: ...
