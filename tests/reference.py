"""What every op computes, in float64, from its formula: plain differentiable arithmetic, none of torch.nn.functional.

These functions share no code with the library. A gradient's reference is autograd through them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def activation(z: Tensor, name: str | None) -> Tensor:
    if name is None:
        return z
    if name == "relu":
        return torch.where(z <= 0, torch.zeros_like(z), z)
    if name == "leaky_relu":
        return torch.where(z <= 0, 0.01 * z, z)
    if name == "silu":
        return z / (1 + torch.exp(-z))
    if name == "gelu":
        return z * (1 + torch.erf(z / math.sqrt(2))) / 2
    raise ValueError(name)


def _per_channel(v: Tensor, like: Tensor) -> Tensor:
    return v.view([1, -1] + [1] * (like.dim() - 2))


def affine(
    xhat: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, act: str | None
) -> Tensor:
    """y = activation(xhat * weight + bias + residual), weight and bias one number a channel."""
    z = xhat if weight is None else xhat * _per_channel(weight, xhat)
    z = z if bias is None else z + _per_channel(bias, xhat)
    return activation(z if residual is None else z + residual, act)


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    statistics: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    act: str | None = None,
) -> Tensor:
    """Batch statistics if `statistics` is None, else the given mean and variance."""
    dims = [d for d in range(x.dim()) if d != 1]
    if statistics is None:
        mean = x.mean(dims, keepdim=True)
        var = ((x - mean) ** 2).mean(dims, keepdim=True)
    else:
        mean, var = (_per_channel(s, x) for s in statistics)
    return affine((x - mean) / torch.sqrt(var + eps), weight, bias, residual, act)


def batch_renorm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    statistics: tuple[Tensor, Tensor],
    r_max: float,
    d_max: float,
    eps: float = 1e-5,
    act: str | None = None,
) -> Tensor:
    """In training; `statistics`: the running mean and variance before this batch."""
    dims = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(dims, keepdim=True)
    sigma = torch.sqrt(((x - mean) ** 2).mean(dims, keepdim=True) + eps)
    running_mean, running_sigma = _per_channel(statistics[0], x), torch.sqrt(_per_channel(statistics[1], x) + eps)
    r = torch.clip(sigma / running_sigma, 1 / r_max, r_max).detach()
    d = torch.clip((mean - running_mean) / running_sigma, -d_max, d_max).detach()
    return affine((x - mean) / sigma * r + d, weight, bias, residual, act)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str | None = None,
) -> Tensor:
    """The statistics of each sample and group of neighbouring channels; instance normalisation with groups = C."""
    slices = x.reshape(x.shape[0], groups, x[:1].numel() // max(1, groups))
    mean = slices.sum(2, keepdim=True) / slices.shape[2]
    var = ((slices - mean) ** 2).sum(2, keepdim=True) / slices.shape[2]
    xhat = ((slices - mean) / torch.sqrt(var + eps)).reshape(x.shape)
    return affine(xhat, weight, bias, residual, act)


def running_statistics(x: Tensor, mean: Tensor, var: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """(mean, var) after a batch x in training: the new value weighs `momentum`, the variance is unbiased."""
    dims = [d for d in range(x.dim()) if d != 1]
    batch_mean = x.mean(dims)
    batch_var = ((x - _per_channel(batch_mean, x)) ** 2).sum(dims) / (x.numel() / x.shape[1] - 1)
    return (1 - momentum) * mean + momentum * batch_mean, (1 - momentum) * var + momentum * batch_var


def row_norm(
    x: Tensor,
    dims: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    subtract_mean: bool = True,
    eps: float = 1e-5,
    act: str | None = None,
) -> Tensor:
    """Layer normalisation over the last `dims` dimensions, or without the mean RMS normalisation."""
    over = list(range(x.dim() - dims, x.dim()))
    d = x - x.mean(over, keepdim=True) if subtract_mean else x
    z = d / torch.sqrt((d**2).mean(over, keepdim=True) + eps)
    z = z if weight is None else z * weight
    z = z if bias is None else z + bias
    return activation(z if residual is None else z + residual, act)


def weight_norm(v: Tensor, g: Tensor, dim: int | None) -> Tensor:
    dims = [d for d in range(v.dim()) if d != dim]
    squares = v**2
    return v * g / torch.sqrt(squares.sum(dims, keepdim=True) if dims else squares)


def as_matrix(weight: Tensor, dim: int) -> Tensor:
    """[h, w]: the rows are dimension `dim`, the columns the others in their order."""
    return torch.stack([row.reshape(-1) for row in weight.unbind(dim)])


def power_method(matrix: Tensor, v: Tensor, iterations: int, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """u and v after at least one iteration."""
    for _ in range(iterations):
        t = (matrix * v).sum(1)
        u = t / max(eps, math.sqrt((t * t).sum()))
        s = (matrix * u[:, None]).sum(0)
        v = s / max(eps, math.sqrt((s * s).sum()))
    return u, v


def spectral_norm(weight: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    """Without the power method: u and v as they are, constants."""
    return weight / (u[:, None] * as_matrix(weight, dim) * v).sum()


def philox4x32(counter: np.ndarray, key: tuple[int, int], rounds: int) -> np.ndarray:
    """Philox4x32 (Salmon et al. 2011, section 3.3) of counters (n, 4) uint32; returns (n, 4) uint32."""
    low = np.uint64(0xFFFFFFFF)
    c = [counter[:, i].astype(np.uint64) for i in range(4)]
    k0, k1 = (np.uint64(k) for k in key)
    for _ in range(rounds):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k0, p1 & low, (p0 >> np.uint64(32)) ^ c[3] ^ k1, p0 & low]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack(c, axis=1).astype(np.uint32)


DROPOUT_ROUNDS = 7


def dropout_keep(count: int, p: float, seed: int, offset: int = 0) -> Tensor:
    """Which of the elements 0 .. count - 1 are kept: 16 bits of Philox each, dropped if below round(p * 2^16)."""
    blocks = np.arange((count + 7) // 8, dtype=np.uint64)
    counter = np.stack(
        [
            blocks & 0xFFFFFFFF,
            blocks >> 32,
            np.full_like(blocks, offset & 0xFFFFFFFF),
            np.full_like(blocks, offset >> 32),
        ],
        axis=1,
    )
    words = philox4x32(counter.astype(np.uint32), (seed & 0xFFFFFFFF, seed >> 32), DROPOUT_ROUNDS)
    halves = np.stack([words & 0xFFFF, words >> 16], axis=2).reshape(-1)[:count]
    return torch.from_numpy(halves >= dropout_threshold(p))


def dropout_threshold(p: float) -> int:
    return 0 if p >= 1 else min(65535, round(p * 65536))


def dropout(x: Tensor, p: float, seed: int, *, channel_dims: int = 0) -> Tensor:
    """x * keep / (1 - p), p as it is drawn; one draw an index of the first `channel_dims` dimensions, or an element."""
    drawn = x.shape[:channel_dims] if channel_dims else x.shape
    keep = dropout_keep(math.prod(drawn), p, seed).view(list(drawn) + [1] * (x.dim() - len(drawn)))
    return x * keep * (0.0 if p >= 1 else 65536 / (65536 - dropout_threshold(p)))


def alpha_dropout(x: Tensor, p: float, seed: int, *, channel_dims: int = 0) -> Tensor:
    """a * (keep ? x : alpha') + b; a and b keep mean 0 and variance 1 for the p that is drawn. Zeros for p = 1."""
    if p >= 1:
        return x * 0.0
    selu_scale, selu_alpha = 1.0507009873554805, 1.6732632423543772  # Klambauer et al. 2017, equation 14
    saturation = -selu_scale * selu_alpha
    drawn = x.shape[:channel_dims] if channel_dims else x.shape
    keep = dropout_keep(math.prod(drawn), p, seed).view(list(drawn) + [1] * (x.dim() - len(drawn)))
    q = dropout_threshold(p) / 65536
    # of keep ? x : alpha', for x of mean 0 and variance 1: mean q alpha', variance (1 - q) + q alpha'^2 - mean^2
    mean = q * saturation
    a = (1 - q + q * saturation**2 - mean**2) ** -0.5
    return a * (torch.where(keep, x, torch.full_like(x, saturation)) - mean)


def local_response_norm(
    x: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    *,
    region: str = "inter",
    convention: str = "torch",
) -> Tensor:
    """Element i's window as a matrix of zeros and ones along each axis: [i, j] is whether j belongs to it."""
    before, after = size // 2, (size - 1) // 2 if convention == "torch" else size // 2

    def members(length: int) -> Tensor:
        i, j = torch.arange(length).view(-1, 1), torch.arange(length)
        return ((j >= i - before) & (j <= i + after)).to(x.dtype)

    squares = x**2
    if region == "inter":
        sums = torch.einsum("cd,nd...->nc...", members(x.shape[1]), squares)
        elements = size
    else:
        sums = members(x.shape[2]) @ squares @ members(x.shape[3]).T
        elements = size**2
    scale = k + (alpha / elements if convention == "torch" else alpha) * sums
    return x * scale ** (-beta)
