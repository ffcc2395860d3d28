"""Fused normalisation and dropout kernels for PyTorch: the same modules and numbers, faster, less kept for backward."""

from fastnorm import autograd, functional
from fastnorm.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastnorm.build import build_info
from fastnorm.dropout import Dropout, Dropout1d, Dropout2d, Dropout3d
from fastnorm.fallback import FallbackWarning, set_fallback
from fastnorm.group_norm import GroupNorm
from fastnorm.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from fastnorm.version import __version__

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FallbackWarning",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "__version__",
    "autograd",
    "build_info",
    "functional",
    "set_fallback",
]
