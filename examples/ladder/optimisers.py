"""Optimisers, and the penalty on the weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

OPTIMISERS = ("adam", "sgd")


def make_optimiser(name: str, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Adam with its usual moments, or SGD with Nesterov's momentum of 0.9; one fused kernel a step."""
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, fused=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True, fused=True)
    raise ValueError(f"optimiser must be one of {', '.join(OPTIMISERS)}, got {name!r}")


def kernels_of(model: nn.Module) -> list[nn.Parameter]:
    """The weights of convolutions and Dense layers: what has two dimensions or more. Not biases, not norms' scales."""
    return [parameter for parameter in model.parameters() if parameter.dim() > 1]


@torch.no_grad()
def add_penalty_gradient(kernels: list[nn.Parameter], l1: float, l2: float) -> None:
    """Adds the gradient of l1 * sum |w| + l2 * sum w^2 to each kernel's gradient: l1 * sign(w) + 2 * l2 * w.

    The same as adding the penalty to the loss, without its graph.
    """
    gradients = [kernel.grad for kernel in kernels if kernel.grad is not None]
    weights = [kernel.detach() for kernel in kernels if kernel.grad is not None]
    if l2:
        torch._foreach_add_(gradients, weights, alpha=2.0 * l2)
    if l1:
        torch._foreach_add_(gradients, torch._foreach_sign(weights), alpha=l1)
