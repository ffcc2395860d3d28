"""The ops as functions, with torch.nn.functional's positional signatures and a few keywords more."""

from fastnorm.batch_norm import batch_norm
from fastnorm.batch_renorm import batch_renorm
from fastnorm.dropout import (
    alpha_dropout,
    drop_path,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    feature_alpha_dropout,
)
from fastnorm.layer_norm import layer_norm
from fastnorm.local_response_norm import local_response_norm
from fastnorm.rms_norm import rms_norm

__all__ = [
    "alpha_dropout",
    "batch_norm",
    "batch_renorm",
    "drop_path",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
    "layer_norm",
    "local_response_norm",
    "rms_norm",
]
