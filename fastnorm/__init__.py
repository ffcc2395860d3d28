"""Fused normalisation and dropout kernels for PyTorch: the same modules and numbers, faster, less kept for backward."""

from fastnorm import autograd, functional, parametrizations
from fastnorm.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastnorm.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from fastnorm.build import build_info
from fastnorm.compile import enable_under_compile
from fastnorm.convert import ConversionReport, conversion_report, convert, revert
from fastnorm.dropout import AlphaDropout, Dropout, Dropout1d, Dropout2d, Dropout3d, DropPath, FeatureAlphaDropout
from fastnorm.explain import explain_launch
from fastnorm.fallback import FallbackWarning, set_fallback
from fastnorm.fold import fold_batch_norm
from fastnorm.fuse import fuse
from fastnorm.group_norm import GroupNorm
from fastnorm.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from fastnorm.layer_norm import LayerNorm
from fastnorm.local_response_norm import LocalResponseNorm
from fastnorm.mc_dropout import MCPrediction, mc_dropout, mc_predict
from fastnorm.recomputation import recompute
from fastnorm.rms_norm import RMSNorm
from fastnorm.sync_batch_norm import SyncBatchNorm
from fastnorm.version import __version__

__all__ = [
    "AlphaDropout",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "ConversionReport",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FallbackWarning",
    "FeatureAlphaDropout",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LocalResponseNorm",
    "MCPrediction",
    "RMSNorm",
    "SyncBatchNorm",
    "__version__",
    "autograd",
    "build_info",
    "conversion_report",
    "convert",
    "enable_under_compile",
    "explain_launch",
    "fold_batch_norm",
    "functional",
    "fuse",
    "mc_dropout",
    "mc_predict",
    "parametrizations",
    "recompute",
    "revert",
    "set_fallback",
]
