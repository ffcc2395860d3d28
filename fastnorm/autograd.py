"""The torch.autograd.Function classes, one for each op, over the native functions of ``fastnorm._C``."""

from fastnorm.batch_norm import BatchNormFunction
from fastnorm.dropout import AlphaDropoutFunction, DropoutFunction

__all__ = ["AlphaDropoutFunction", "BatchNormFunction", "DropoutFunction"]
from fastnorm.dropout import DropoutFunction
from fastnorm.layer_norm import LayerNormFunction

__all__ = ["BatchNormFunction", "DropoutFunction", "LayerNormFunction"]
from fastnorm.dropout import DropoutFunction
from fastnorm.local_response_norm import LocalResponseNormFunction

__all__ = ["BatchNormFunction", "DropoutFunction", "LocalResponseNormFunction"]
