"""torch's own ops in place of the kernels: the path that work takes for which there is no kernel."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

from torch import Tensor

import fastnorm


def by_torch(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """function(*args) as if it were compiled, for a compiler that is to get torch's ops."""
    fastnorm.enable_under_compile(False)
    try:
        with mock.patch("fastnorm.op.is_dynamo_compiling", lambda: True):
            return function(*args)
    finally:
        fastnorm.enable_under_compile(True)
