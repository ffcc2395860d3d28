"""The ops as functions, with torch.nn.functional's positional signatures and a few keywords more."""

from fastnorm.batch_norm import batch_norm
from fastnorm.dropout import (
    alpha_dropout,
    drop_path,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    feature_alpha_dropout,
)

__all__ = [
    "alpha_dropout",
    "batch_norm",
    "drop_path",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
]
from fastnorm.dropout import dropout, dropout1d, dropout2d, dropout3d
from fastnorm.layer_norm import layer_norm
from fastnorm.rms_norm import rms_norm

__all__ = ["batch_norm", "dropout", "dropout1d", "dropout2d", "dropout3d", "layer_norm", "rms_norm"]
from fastnorm.dropout import dropout, dropout1d, dropout2d, dropout3d
from fastnorm.local_response_norm import local_response_norm

__all__ = ["batch_norm", "dropout", "dropout1d", "dropout2d", "dropout3d", "local_response_norm"]
