"""What a forward and backward pass keep and take of memory."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import fastnorm

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler has much to say


def saved_bytes(
    forward: Callable[[], Any], parameters: Iterable[Tensor], context: fastnorm.recompute | None = None
) -> int:
    """Bytes that a forward pass keeps for backward, parameters left out.

    Each storage counts once, however many tensors of it are kept, and whole: it stays as long as one of them does.
    Inputs count: in a network nothing but the layer that keeps them makes them stay. ``context`` is what the forward
    pass is to run in; of an output that it computes again, the residual counts if that is kept.
    """
    kept: dict[int, tuple[Tensor, int]] = {}
    left_out = {p.untyped_storage().data_ptr() for p in parameters}

    def add(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.nbytes() > 0 and storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = (t, storage.nbytes())  # t is held, so that no other storage gets its address
        return t

    hooks: torch.autograd.graph.saved_tensors_hooks
    if context is None:
        hooks = torch.autograd.graph.saved_tensors_hooks(add, lambda t: t)
    else:  # so fastnorm is there: scripts say where it lies after they have imported this file
        from fastnorm.recomputation import held

        packed = context.pack_hook

        def pack(t: Tensor) -> Any:
            result = packed(t)
            if (own := held(result)) is not None:
                add(own)
            return result

        hooks = context
        hooks.pack_hook = pack
    with hooks:
        y = forward()
    del y
    return sum(nbytes for _, nbytes in kept.values())


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """The most that a call had allocated at any time, beyond what was there before it.

    By torch's allocator: the scratch memory of fastnorm's CPU kernels is its own, and not counted. On planes of 7x7 it
    is a sixth of a tensor, for long rows an eighth, else a twentieth at most.
    """
    if device == "cuda":
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()  # of what was allocated before it began, the profiler would not tell that it is freed
        with torch.profiler.record_function("measured"):
            run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    start = next(e["ts"] for e in events if e.get("name") == "measured")
    allocated = before = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        allocated += event["args"]["Bytes"]
        if event["ts"] < start:
            before = peak = allocated
        peak = max(peak, allocated)
    return peak - before
