"""A synthetic ten-class image set, for where CIFAR-10 cannot be had.

Each image shows one of ten shapes, somewhere, tilted and scaled, in a random colour on a random, uneven
background, in noise and partly behind a plain bar. The class is the shape alone, so a network has
to learn outlines; the noise keeps it short of 100 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 32
CHUNK = 2_000  # images made at once: bounds the memory


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _disc(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.8


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.7, 0.7)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    side = 0.5 * math.sqrt(3.0)
    return torch.maximum(-y, torch.maximum(side * x + 0.5 * y, -side * x + 0.5 * y)) - 0.48


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.7).abs() - 0.22


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 0.95, 0.28), _box(x, y, 0.28, 0.95))


def _bar(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 1.0, 0.35)


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y) - 0.9, 0.65 - torch.hypot(x - 0.45, y))


def _corner(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y + 0.6, 0.85, 0.25), _box(x + 0.6, y, 0.25, 0.85))


def _tee(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y + 0.6, 0.85, 0.25), _box(x, y, 0.25, 0.85))


def _frame(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.6, 0.6).abs() - 0.2


# Signed distances, roughly: negative inside. The shape's own coordinates run from about -1 to 1.
SHAPES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    _disc, _square, _triangle, _ring, _cross, _bar, _crescent, _corner, _tee, _frame,
)  # fmt: skip


def make_images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` images, uint8 (count, 3, 32, 32), and their labels, int64 (count,), the classes in random order."""
    parts = [_make_chunk(min(CHUNK, count - start), generator) for start in range(0, count, CHUNK)]
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def _make_chunk(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    labels = torch.randint(len(SHAPES), (count,), generator=generator)
    grid = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    radius, angle = uniform(0.5, 0.8, 1, 1), uniform(-0.3, 0.3, 1, 1)
    x = grid.view(1, 1, SIZE) - uniform(-0.2, 0.2, 1, 1)
    y = grid.view(1, SIZE, 1) - uniform(-0.2, 0.2, 1, 1)
    u = (angle.cos() * x + angle.sin() * y) / radius
    v = (angle.cos() * y - angle.sin() * x) / radius
    distance = torch.empty(count, SIZE, SIZE)
    for label, shape in enumerate(SHAPES):
        chosen = labels == label
        distance[chosen] = shape(u[chosen], v[chosen])
    # Edges one pixel wide, as a lens would give them.
    inside = torch.sigmoid(-distance * radius * SIZE)[:, None]

    def uneven(contrast: float) -> Tensor:
        coarse = torch.randn(count, 3, 4, 4, generator=generator) * contrast
        return F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic", align_corners=False)

    background = uniform(0.2, 0.8, 3, 1, 1)
    direction = torch.randn(count, 3, 1, 1, generator=generator)
    colour = background + uniform(0.3, 0.7, 1, 1, 1) * direction / direction.norm(dim=1, keepdim=True)
    image = torch.lerp(background + uneven(0.1), colour + uneven(0.06), inside)
    # A bar in front, of the image's full width or height.
    start, thickness = uniform(-1.0, 0.8, 1, 1), uniform(0.0, 0.4, 1, 1)
    across = torch.where(uniform(0, 1, 1, 1) < 0.5, grid.view(1, 1, SIZE), grid.view(1, SIZE, 1)) - start
    hidden = ((across >= 0) & (across < thickness))[:, None]
    image = torch.where(hidden, uniform(0.0, 1.0, 3, 1, 1), image)
    image = image + uniform(0.03, 0.15, 1, 1, 1) * torch.randn(image.shape, generator=generator)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), labels
