"""The torch.autograd.Function classes, one for each op, over the native functions of ``fastnorm._C``."""

from fastnorm.batch_norm import BatchNormFunction
from fastnorm.dropout import AlphaDropoutFunction, DropoutFunction
from fastnorm.layer_norm import LayerNormFunction
from fastnorm.local_response_norm import LocalResponseNormFunction
from fastnorm.parametrizations import SpectralNormFunction

__all__ = [
    "AlphaDropoutFunction",
    "BatchNormFunction",
    "DropoutFunction",
    "LayerNormFunction",
    "LocalResponseNormFunction",
    "SpectralNormFunction",
]
