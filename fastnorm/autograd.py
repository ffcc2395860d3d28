"""The torch.autograd.Function classes, one for each op, over the native functions of ``fastnorm._C``."""

from fastnorm.batch_norm import BatchNormFunction
from fastnorm.dropout import DropoutFunction
from fastnorm.group_norm import GroupNormFunction
from fastnorm.instance_norm import InstanceNormFunction

__all__ = ["BatchNormFunction", "DropoutFunction", "GroupNormFunction", "InstanceNormFunction"]
