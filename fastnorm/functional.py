"""The ops as functions, with torch.nn.functional's positional signatures and a few keywords more."""

from fastnorm.batch_norm import batch_norm
from fastnorm.dropout import dropout, dropout1d, dropout2d, dropout3d
from fastnorm.group_norm import group_norm
from fastnorm.instance_norm import instance_norm

__all__ = ["batch_norm", "dropout", "dropout1d", "dropout2d", "dropout3d", "group_norm", "instance_norm"]
