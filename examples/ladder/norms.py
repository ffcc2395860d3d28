"""What may stand between a convolution and its ReLU, by name.

Built from torch.nn's layers where it has them: models.build_model then hands the network to fastnorm.convert and
fastnorm.fuse. What torch.nn lacks is fastnorm's from the start.
"""

from __future__ import annotations

from torch import Tensor, nn

# With a bias of their own, which makes the convolution's superfluous.
WITH_BIAS = ("batch", "instance", "group", "layer", "renorm")
WITHOUT_BIAS = ("lrn_inter", "lrn_intra", "weight", "spectral")
NORMS = (*WITH_BIAS, *WITHOUT_BIAS)
FASTNORM_ONLY = ("renorm", "lrn_intra")

GROUP_CHANNELS = 8


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of each pixel, as in ConvNeXt (Liu et al. 2022, arXiv:2201.03545).

    Channels_last images are read as they lie.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def make_norm(kind: str | None, channels: int) -> nn.Module:
    """The layer of that name over (N, channels, H, W); nothing for None and for what acts on the weights."""
    if kind in (None, "weight", "spectral"):
        return nn.Identity()
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    if kind == "group":
        return nn.GroupNorm(max(1, channels // GROUP_CHANNELS), channels)
    if kind == "layer":
        return ChannelLayerNorm(channels)
    if kind == "lrn_inter":
        return nn.LocalResponseNorm(5)
    if kind in FASTNORM_ONLY:
        import fastnorm

        if kind == "renorm":
            return fastnorm.BatchRenorm2d(channels)
        return fastnorm.LocalResponseNorm(3, region="intra")
    raise ValueError(f"norm must be None or one of {', '.join(NORMS)}, got {kind!r}")


def parametrise(model: nn.Module, kind: str | None, backend: str) -> None:
    """Weight or spectral normalisation of every convolution, in place; nothing for another kind."""
    if kind not in ("weight", "spectral"):
        return
    if backend == "fastnorm":
        from fastnorm import parametrizations
    else:
        from torch.nn.utils import parametrizations
    apply = parametrizations.weight_norm if kind == "weight" else parametrizations.spectral_norm
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            apply(module)
