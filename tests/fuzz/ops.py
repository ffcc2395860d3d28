"""Every op's calls by name."""

from __future__ import annotations

from hypothesis import strategies as st

from . import norms, pointwise
from .call import Call

OPS: dict[str, st.SearchStrategy[Call]] = {
    "batch_norm": norms.batch_norm(),
    "batch_renorm": norms.batch_renorm(),
    "group_norm": norms.group_norm(),
    "instance_norm": norms.instance_norm(),
    "layer_norm": norms.layer_norm,
    "rms_norm": norms.rms_norm,
    "local_response_norm": pointwise.local_response_norm(),
    "dropouts": pointwise.dropouts(),
}
