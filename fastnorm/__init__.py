"""Fused normalisation and dropout kernels for PyTorch: the same modules and numbers, faster, less kept for backward."""

from fastnorm import autograd, functional, parametrizations
from fastnorm.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastnorm.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from fastnorm.build import build_info
from fastnorm.dropout import Dropout, Dropout1d, Dropout2d, Dropout3d
from fastnorm.fallback import FallbackWarning, set_fallback
from fastnorm.version import __version__

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FallbackWarning",
    "__version__",
    "autograd",
    "build_info",
    "functional",
    "parametrizations",
    "set_fallback",
]
