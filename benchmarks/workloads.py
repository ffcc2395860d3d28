"""What is measured: an op at one shape, as a module of fastnorm's and what a user of torch writes in its place.

Nothing here imports fastnorm before a module is made, for ``gpu_check.py`` builds it first.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PASSES = ("forward", "backward", "both")
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last")

Shape = tuple[int, ...]

# Shapes of activations, by the network that they come from.
RESNET50 = {  # He et al. 2015, batch 32: the four stages within a block, and the first one's output
    "ResNet-50 stage 1": (32, 64, 56, 56),
    "ResNet-50 stage 2": (32, 128, 28, 28),
    "ResNet-50 stage 3": (32, 256, 14, 14),
    "ResNet-50 stage 4": (32, 512, 7, 7),
    "ResNet-50 stage 1 output": (32, 256, 56, 56),
}
CIFAR = {"CIFAR VGG 32": (256, 32, 32, 32), "CIFAR VGG 128": (256, 128, 8, 8)}
VIT = {"ViT-B batch 64": (64, 197, 768), "ViT-B batch 8": (8, 197, 768)}
UNET = {  # Stable Diffusion's (Rombach et al. 2021), batch 4, 32 groups
    "UNet 64x64": (4, 320, 64, 64),
    "UNet 32x32": (4, 640, 32, 32),
    "UNet 16x16": (4, 1280, 16, 16),
}
STYLE = {"style transfer": (8, 128, 64, 64)}  # Johnson et al. 2016
UNET3D = {  # nnU-Net (Isensee et al. 2018), batch 2
    "3-D UNet level 1": (2, 32, 64, 64, 64),
    "3-D UNet level 2": (2, 64, 32, 32, 32),
    "3-D UNet level 3": (2, 128, 16, 16, 16),
}
ALEXNET = {"AlexNet conv1": (32, 96, 55, 55), "AlexNet conv2": (32, 256, 27, 27)}
TINY = {"tiny": (2, 4, 4, 4)}


@dataclass(frozen=True)
class Workload:
    """One op at one shape: a module a library, all given the same input, and a residual if there is one."""

    op: str
    ours: Callable[[], nn.Module]
    theirs: Callable[[], nn.Module]
    shape: Shape
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    network: str = ""  # that the shape comes from
    residual: bool = False
    # Tensors of the input's size that any program must read or write, forward and backward: where what is reduced
    # together fits in the cache, and where it does not (None: the same).
    moved: tuple[int, int] = (2, 3)
    moved_beyond_cache: tuple[int, int] | None = None
    slice_elements: int = 0  # of the input that are reduced together, with what lies between them
    peers: tuple[str, ...] = ()  # other libraries' modules, see gpu_check.py
    quick: bool = False  # measured with --quick, too
    compiles: bool = False  # torch.compile of theirs is measured, too

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.op}-{shape}-{str(self.dtype)[6:]}-{self.layout}".replace(" ", "_")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def tensor_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def tiny(self) -> bool:
        """Too small for anything but the calls' own overhead to count."""
        return self.numel <= 1 << 16

    def minimum_bytes(self, passes: str, cache_bytes: int) -> int:
        """Bytes that any program moves between the processor and its memory: inputs read, outputs written."""
        fits = self.slice_elements * self.dtype.itemsize <= cache_bytes
        forward, backward = self.moved if fits else self.moved_beyond_cache or self.moved
        return {"forward": forward, "backward": backward, "both": forward + backward}[passes] * self.tensor_bytes

    def tensor(self, device: str, generator: torch.Generator) -> Tensor:
        """Normally distributed, of this shape, type and layout."""
        t = torch.randn(self.shape, generator=generator).to(device, self.dtype)
        return t if self.layout == "contiguous" else t.movedim(1, -1).contiguous().movedim(-1, 1)


def grid(
    op: str,
    make: Callable[[Shape], tuple[Callable[[], nn.Module], Callable[[], nn.Module]]],
    shapes: dict[str, Shape],
    *,
    layouts: Iterable[str] = LAYOUTS,
    dtypes: Iterable[torch.dtype] = DTYPES,
    quick: Iterable[str] = (),
    compiles: Iterable[str] = (),
    slice_elements: Callable[[Shape, str], int] = lambda shape, layout: 0,
    **settings: Any,
) -> list[Workload]:
    """The op at every shape, layout and type.

    Args:
        make: gives fastnorm's module and torch's for a shape.
        shapes: by network.
        quick, compiles: networks whose shapes are in --quick, and are measured under torch.compile; of those the
            float32 rows and, without torch.compile, the contiguous bfloat16 ones.
        slice_elements: of a shape in a layout.
        settings: the same for all, see :class:`Workload`.
    """
    quick, compiles = set(quick), set(compiles)
    return [
        Workload(
            op,
            *make(shape),
            shape,
            layout,
            dtype,
            network,
            quick=network in quick
            and (dtype == torch.float32 or layout == "contiguous")
            and (layout == "contiguous" or network != "tiny"),
            compiles=network in compiles and dtype == torch.float32 and layout == "contiguous",
            slice_elements=slice_elements(shape, layout),
            **settings,
        )
        for network, shape in shapes.items()
        for layout in layouts
        for dtype in dtypes
    ]


def channel_elements(shape: Shape, layout: str) -> int:
    """What batch normalisation reduces together; in channels_last a channel's elements lie all over the tensor."""
    return math.prod(shape) // (shape[1] if layout == "contiguous" else 1)


def group_elements(groups: int | None) -> Callable[[Shape, str], int]:
    """What group normalisation reduces together, or instance normalisation (None), in one image."""
    return lambda shape, layout: math.prod(shape[1:]) // ((groups or shape[1]) if layout == "contiguous" else 1)


def row_elements(shape: Shape, layout: str) -> int:
    return shape[-1]


# ---- modules


def fastnorm() -> Any:
    return importlib.import_module("fastnorm")


def alike(name: str, *args: Any, **kwargs: Any) -> tuple[Callable[[], nn.Module], Callable[[], nn.Module]]:
    """The class of that name in fastnorm and in torch.nn, given the same arguments."""
    return (
        lambda: getattr(fastnorm(), name)(*args, **kwargs),
        lambda: getattr(nn, name)(*args, **kwargs),
    )


class AddAct(nn.Module):
    """What a user of torch writes where fastnorm fuses: act(norm(x) + residual), in place as torchvision's ResNet."""

    def __init__(self, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = self.norm(x)
        if residual is not None:
            z += residual
        return self.activation(z)


# SiLU's backward needs its input, so that in place it would take a copy.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


def fused(
    name: str, activation: str, *args: Any, **kwargs: Any
) -> tuple[Callable[[], nn.Module], Callable[[], nn.Module]]:
    """A normalisation with an activation in fastnorm, and one after the other in torch."""
    return (
        lambda: getattr(fastnorm(), name)(*args, activation=activation, **kwargs),
        lambda: AddAct(getattr(nn, name)(*args, **kwargs), ACTIVATIONS[activation]()),
    )


class WithinChannel(nn.Module):
    """What a user of torch writes for local response normalisation with a window of 5 x 5 in the plane."""

    def forward(self, x: Tensor) -> Tensor:
        mean = nn.functional.avg_pool2d(x.square(), 5, stride=1, padding=2)
        return x / (1.0 + 1e-4 * mean) ** 0.75


class DropPath(nn.Module):
    """Stochastic depth as timm has it."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        keep = x.new_empty([x.size(0)] + [1] * (x.dim() - 1)).bernoulli_(1 - self.p)
        return x * keep.div_(1 - self.p)
