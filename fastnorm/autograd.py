"""The torch.autograd.Function classes over the native functions of ``fastnorm._C``.

rms_norm goes by LayerNormFunction, batch_renorm by BatchNormFunction; weight_norm's node is in C++ alone
(``csrc/autograd.cpp``).
"""

from fastnorm.batch_norm import BatchNormFunction
from fastnorm.dropout import AlphaDropoutFunction, DropoutFunction
from fastnorm.group_norm import GroupNormFunction
from fastnorm.instance_norm import InstanceNormFunction
from fastnorm.layer_norm import LayerNormFunction
from fastnorm.local_response_norm import LocalResponseNormFunction
from fastnorm.parametrizations import SpectralNormFunction

__all__ = [
    "AlphaDropoutFunction",
    "BatchNormFunction",
    "DropoutFunction",
    "GroupNormFunction",
    "InstanceNormFunction",
    "LayerNormFunction",
    "LocalResponseNormFunction",
    "SpectralNormFunction",
]
