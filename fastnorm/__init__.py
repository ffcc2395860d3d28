"""Fused normalisation and dropout kernels for PyTorch: the same modules and numbers, faster, less kept for backward."""

from fastnorm import autograd, functional
from fastnorm.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastnorm.build import build_info
from fastnorm.dropout import AlphaDropout, Dropout, Dropout1d, Dropout2d, Dropout3d, DropPath, FeatureAlphaDropout
from fastnorm.fallback import FallbackWarning, set_fallback
from fastnorm.mc_dropout import MCPrediction, mc_dropout, mc_predict
from fastnorm.layer_norm import LayerNorm
from fastnorm.rms_norm import RMSNorm
from fastnorm.local_response_norm import LocalResponseNorm
from fastnorm.version import __version__

__all__ = [
    "AlphaDropout",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FallbackWarning",
    "FeatureAlphaDropout",
    "MCPrediction",
    "LayerNorm",
    "RMSNorm",
    "LocalResponseNorm",
    "__version__",
    "autograd",
    "build_info",
    "functional",
    "mc_dropout",
    "mc_predict",
    "set_fallback",
]
