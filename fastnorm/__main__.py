"""``python -m fastnorm``: what this build is, and a quick check of every op against torch on every device."""

from __future__ import annotations

import argparse
import copy
import os
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations

import fastnorm
from fastnorm.build import devices


class _BatchRenorm(nn.BatchNorm2d):
    """A first step of batch renormalisation in torch's ops, with the limits that fastnorm's has by default."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            sigma = (1 + self.eps) ** 0.5  # of the running variance as it is made
            r, d = ((var + self.eps).sqrt() / sigma).clamp(1 / 3, 3), (mean / sigma).clamp(-5, 5)
        return F.batch_norm(x, None, None, self.weight * r, self.weight * d + self.bias, training=True, eps=self.eps)


# Each op as a pair of modules that must agree, in training and with the same state, on an input of this shape.
PAIRS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "BatchNorm1d": (fastnorm.BatchNorm1d(16), nn.BatchNorm1d(16), (32, 16)),
    "BatchNorm2d": (fastnorm.BatchNorm2d(16), nn.BatchNorm2d(16), (8, 16, 9, 9)),
    "BatchNorm3d": (fastnorm.BatchNorm3d(16), nn.BatchNorm3d(16), (4, 16, 3, 5, 5)),
    "BatchRenorm2d": (fastnorm.BatchRenorm2d(16), _BatchRenorm(16), (8, 16, 9, 9)),
    "LayerNorm": (fastnorm.LayerNorm(100), nn.LayerNorm(100), (32, 100)),
    "RMSNorm": (fastnorm.RMSNorm(100), nn.RMSNorm(100), (32, 100)),
    "GroupNorm": (fastnorm.GroupNorm(4, 16), nn.GroupNorm(4, 16), (8, 16, 9, 9)),
    "InstanceNorm1d": (fastnorm.InstanceNorm1d(16), nn.InstanceNorm1d(16), (8, 16, 81)),
    "InstanceNorm2d": (fastnorm.InstanceNorm2d(16), nn.InstanceNorm2d(16), (8, 16, 9, 9)),
    "InstanceNorm3d": (fastnorm.InstanceNorm3d(16), nn.InstanceNorm3d(16), (4, 16, 3, 5, 5)),
    "LocalResponseNorm": (fastnorm.LocalResponseNorm(5), nn.LocalResponseNorm(5), (8, 16, 9, 9)),
    "weight_norm": (
        fastnorm.parametrizations.weight_norm(nn.Linear(100, 20)),
        torch_parametrizations.weight_norm(nn.Linear(100, 20)),
        (32, 100),
    ),
    "spectral_norm": (
        fastnorm.parametrizations.spectral_norm(nn.Linear(100, 20)),
        torch_parametrizations.spectral_norm(nn.Linear(100, 20)),
        (32, 100),
    ),
}


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], weights)]


def check_norms(device: torch.device) -> dict[str, float]:
    """The largest difference to torch, output and gradients, relative to the largest magnitude."""
    errors = {}
    for name, (ours, theirs, shape) in PAIRS.items():
        ours.load_state_dict(theirs.state_dict())
        x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2 + 1).to(device)
        pairs = zip(*(gradients(copy.deepcopy(module).to(device), x) for module in (ours, theirs)), strict=True)
        errors[name] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    return errors


def check_dropout(device: torch.device) -> dict[str, float]:
    """How far the share of dropped elements is from p, in units of five standard deviations."""
    x, p = torch.ones(64, 64, 16, 16, device=device), 0.3
    errors = {}
    channels, samples = 64 * 64, 64
    draws_of = {
        "Dropout": x.numel(),
        "Dropout2d": channels,
        "AlphaDropout": x.numel(),
        "FeatureAlphaDropout": channels,
        "DropPath": samples,
    }
    for name, draws in draws_of.items():
        y = getattr(fastnorm, name)(p)(x)
        deviation = (p * (1 - p) / draws) ** 0.5
        errors[name] = abs((y < 1).float().mean().item() - p) / (5 * deviation)
    return errors


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m fastnorm", description="What this build is, and a quick check of every op on every device."
    ).parse_args()
    for key, value in fastnorm.build_info().items():
        print(f"{key:20} {value}")
    failed = 0
    for device in devices():
        print(f"\n{device}")
        for check, allowed, meaning in ((check_norms, 1e-5, "of torch"), (check_dropout, 1.0, "of 5 sigma")):
            for name, error in check(device).items():
                bad = not error <= allowed  # NaN is bad, too
                failed += bad
                print(f"{name:20} {'FAILED' if bad else 'ok':6} {error:.1e} {meaning}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # of a reader such as head, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is written at exit
        status = 1
    sys.exit(status)
