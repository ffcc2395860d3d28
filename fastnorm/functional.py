"""The ops as functions, with torch.nn.functional's positional signatures and a few keywords more."""

from fastnorm.batch_norm import batch_norm
from fastnorm.batch_renorm import batch_renorm
from fastnorm.dropout import dropout, dropout1d, dropout2d, dropout3d

__all__ = ["batch_norm", "batch_renorm", "dropout", "dropout1d", "dropout2d", "dropout3d"]
