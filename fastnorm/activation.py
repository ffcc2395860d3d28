"""The activations a norm can fuse: y = activation(norm(x) + residual)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

# torch's own op for each name, with the parameters that the kernels have.
TORCH_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
}


def check_activation(op: str, activation: str | None) -> None:
    """Raises ValueError for a name that is none of the activations."""
    if activation is not None and activation not in TORCH_ACTIVATIONS:
        names = ", ".join(map(repr, TORCH_ACTIVATIONS))
        raise ValueError(f"{op}: activation must be None or one of {names}, got {activation!r}")


def add_and_activate(z: torch.Tensor, residual: torch.Tensor | None, activation: str | None) -> torch.Tensor:
    """The same tail in torch's ops, for what kernels do not cover."""
    if residual is not None:
        z = z + residual
    return z if activation is None else TORCH_ACTIVATIONS[activation](z)
