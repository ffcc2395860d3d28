"""Second and higher derivatives: torch differentiates a composite of its own ops that computes what a kernel does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def double_backward(
    forward: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor | None],
    grad_output: torch.Tensor,
    grad_grads: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """Backward of an op's backward.

    Given y = forward(*inputs) and the gradients g_i = (dy/dinput_i)^T grad_output, returns the gradients of
    sum_i <grad_grads[i], g_i> with respect to (grad_output, *inputs); None for what does not require grad. Inside
    ``create_graph=True`` the result is itself differentiable, so derivatives of any order exist.

    Args:
        forward: differentiable torch ops.
        inputs: what forward takes; those that require grad are differentiated.
        grad_output: the cotangent of y.
        grad_grads: the cotangents of each input's gradient, None for zero.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, so that a tensor given for two inputs is differentiated as two.
        def alias(t: torch.Tensor | None) -> torch.Tensor | None:
            if t is None or not t.requires_grad:
                return t
            return t.view_as(t) if create_graph else t.detach().requires_grad_()

        variables = [alias(t) for t in inputs]
        dy = alias(grad_output)
        y = forward(*variables)
        result: list[torch.Tensor | None] = [None] * (1 + len(variables))
        asked = [i for i, t in enumerate(variables) if t is not None and t.requires_grad and grad_grads[i] is not None]
        if not asked:
            return result
        leaves = [t for i in asked if (t := variables[i]) is not None]
        first = torch.autograd.grad(y, leaves, dy, create_graph=True, allow_unused=True)
        pairs = [(g, grad_grads[i]) for i, g in zip(asked, first, strict=True) if g is not None and g.requires_grad]
        targets = [dy, *variables]
        wanted = [i for i, t in enumerate(targets) if t is not None and t.requires_grad]
        if pairs and wanted:
            second = torch.autograd.grad(
                [g for g, _ in pairs],
                [t for i in wanted if (t := targets[i]) is not None],
                [gg for _, gg in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
            for i, g in zip(wanted, second, strict=True):
                result[i] = g
        return result
