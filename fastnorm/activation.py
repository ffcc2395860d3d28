"""The activations a norm can fuse: y = activation(norm(x) + residual)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._C import _get_tracing_state
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

# torch's own op for each name, with the parameters that the kernels have.
TORCH_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
}


def check_activation(op: str, activation: str | None) -> None:
    """Raises ValueError for a name that is none of the activations."""
    if activation is not None and (not isinstance(activation, str) or activation not in TORCH_ACTIVATIONS):
        names = ", ".join(map(repr, TORCH_ACTIVATIONS))
        raise ValueError(f"{op}: activation must be None or one of {names}, got {activation!r}")


def add_and_activate(z: torch.Tensor, residual: torch.Tensor | None, activation: str | None) -> torch.Tensor:
    """The same tail in torch's ops, for what kernels do not cover."""
    if residual is not None:
        z = z + residual
    return z if activation is None else TORCH_ACTIVATIONS[activation](z)


def norm_with_residual(norm: nn.Module, input: torch.Tensor, residual: Any) -> torch.Tensor:
    """activation(norm(input) + residual), in one kernel where it takes the residual; what a fused forward calls.

    A residual of another shape or type, which torch would broadcast or promote, is added in torch.
    """
    if has_torch_function_variadic(input, residual) and not is_dynamo_compiling():  # see overrides.py
        return handle_torch_function(norm_with_residual, (input, residual), norm, input, residual)
    if isinstance(residual, torch.Tensor) and (
        _get_tracing_state() is not None  # torch.jit.trace records torch's own ops alone, and warns of comparisons
        or (residual.shape == input.shape and residual.dtype == input.dtype)
    ):
        return norm(input, residual=residual)
    plain = nn.Module.__new__(type(norm))
    plain.__dict__.update(vars(norm), activation=None)  # of the same tensors: running statistics go on
    return add_and_activate(plain(input), residual, norm.activation)
