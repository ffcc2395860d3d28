"""The networks that whole-model tools are tested with, on torch.nn's layers, and how their results are compared."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

README = Path(__file__).parent.parent / "README.md"


class ResidualBlock(nn.Module):
    """The basic block of ResNet-18 (He et al. 2015), written as torchvision writes it: one ReLU module used twice."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet-18's plan, narrow, for 32x32 images."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 24, 32), classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages, channels = [], widths[0]
        for i, width in enumerate(widths):
            stages.append(
                nn.Sequential(ResidualBlock(channels, width, 1 if i == 0 else 2), ResidualBlock(width, width, 1))
            )
            channels = width
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class TransformerBlock(nn.Module):
    """Pre-norm block (Dosovitskiy et al. 2020); its attention unpacks a shape, which torch.fx cannot trace."""

    def __init__(self, dim: int, heads: int, p: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(p)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(p), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim)
        x = x + self.drop(self.proj(attended))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer, with batch normalisation in its stem (Xiao et al. 2021)."""

    def __init__(self, dim: int = 32, depth: int = 3, heads: int = 4, classes: int = 10, p: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, dim // 2, 3, 2, 1, bias=False),
            nn.BatchNorm2d(dim // 2),
            nn.ReLU(),
            nn.Conv2d(dim // 2, dim, 4, 4),
        )
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, dim))
        self.drop = nn.Dropout(p)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, p) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.stem(x).flatten(2).transpose(1, 2) + self.position)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def images(n: int = 16) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def randomize(model: nn.Module) -> None:
    """Affine parameters and running statistics that are no ones and zeros."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        for name in ("weight", "bias"):
            if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm) and getattr(module, name) is not None:
                getattr(module, name).data.normal_(float(name == "weight"), 0.3, generator=generator)
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0.0, 0.5, generator=generator)
            module.running_var.uniform_(0.3, 3.0, generator=generator)


def difference(got: Tensor, wanted: Tensor) -> float:
    """Of two tensors, relative: ||got - wanted|| / ||wanted||, in float64."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))


def outputs_and_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of a weighted sum of it to the input and each parameter."""
    x = x.clone().requires_grad_()
    y = model(x)
    model.zero_grad()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (y * weights.to(y.dtype)).sum().backward()  # weights at random: under a smooth ramp sums of gradients nearly cancel
    assert x.grad is not None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **gradients}


def readme_code(heading: str) -> str:
    """The Python code of one section of the README."""
    section = README.read_text().split(f"\n### {heading}\n")[1].split("\n## ")[0].split("\n### ")[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
