"""The torch.autograd.Function classes, one for each op, over the native functions of ``fastnorm._C``."""

from fastnorm.batch_norm import BatchNormFunction
from fastnorm.dropout import DropoutFunction
from fastnorm.parametrizations import SpectralNormFunction

__all__ = ["BatchNormFunction", "DropoutFunction", "SpectralNormFunction"]
