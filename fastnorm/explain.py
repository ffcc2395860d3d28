"""How a call would be launched on a CUDA device: what the launchers decide, told without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from fastnorm import _C
from fastnorm.local_response_norm import window

_SLICES = ("batch_norm", "group_norm", "instance_norm")
_ROWS = ("layer_norm", "rms_norm")
# How many of the first dimensions one draw is for; 0: one an element.
_DROPOUTS = {
    **dict.fromkeys(("dropout", "alpha_dropout"), 0),
    "drop_path": 1,
    **dict.fromkeys(("dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"), 2),
}
_OPS = (*_SLICES, *_ROWS, "local_response_norm", "weight_norm", *_DROPOUTS)


@dataclass(frozen=True)
class Device:
    """What a launch is cut for.

    Attributes:
        name: for the reader.
        compute_capability: (major, minor); clusters come with 9.
        multiprocessors: of the device.
        shared_memory: bytes, the most that a block may have.
    """

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int

    @classmethod
    def of(cls, device: torch.device | str | int | None = None) -> Device:
        """A CUDA device of this machine, the current one by default."""
        try:
            p = torch.cuda.get_device_properties(device)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise RuntimeError(
                "explain_launch: device must be a CUDA device that torch has here, or a fastnorm.explain.Device such "
                f"as fastnorm.explain.H100, got {device!r}"
            ) from error
        shared_memory = p.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's hints lack it
        return cls(p.name, (p.major, p.minor), p.multi_processor_count, shared_memory)


H100 = Device("H100 SXM", (9, 0), 132, 227 << 10)


@dataclass(frozen=True)
class Launch:
    """How one pass of an op is launched.

    Attributes:
        op, direction, device: what was asked for.
        path: "resident": a block or cluster has a slice (what is reduced and normalised together) alone and reads it
            from device memory once; "split": slices are reduced by one launch and read again by another;
            "registers": rows, or local_response_norm's windows of few elements, stay in registers, each element is read
            once; "long rows": rows are read again; "tiles": of local_response_norm's other windows, in shared memory;
            "tiles in workspace": those of wide windows;
            "elements": each by itself; "read again": weight_norm's slices that do not stay on chip.
        blocks, threads: of the launch that writes the output: blocks, and threads of each.
        cluster: blocks that share a slice or row through distributed shared memory; 1: none do.
        shared_memory: dynamic, bytes a block.
        window: elements that a thread takes at once: 16 bytes, tiles 4 (2 of float64), local_response_norm's lanes in
            registers 4 or 8 bytes, planes of slices 16 or 8 bytes; 1 where the size allows no more.
        parts: split: blocks that reduce a slice; rows: blocks that share them out in backward; of local_response_norm:
            more than 1 cut windows, and so read each other's edges; else 0.
        tensors_moved: of the input's size, read or written in device memory, residuals and edges of tiles left out.
    """

    op: str
    direction: str
    device: str
    path: str
    blocks: int
    threads: int
    cluster: int
    shared_memory: int
    window: int
    parts: int
    tensors_moved: int

    def __str__(self) -> str:
        cluster = f", clusters of {self.cluster}" if self.cluster > 1 else ""
        shared = f", {self.shared_memory / 1024:.1f} KiB of shared memory" if self.shared_memory else ""
        return (
            f"{self.op} {self.direction} on {self.device}: {self.path}, {self.blocks} blocks of {self.threads} threads"
            f"{cluster}{shared}, {self.window} elements an access, {self.tensors_moved} tensors moved"
        )


def explain_launch(
    op: str,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    direction: str = "forward",
    channels_last: bool = False,
    num_groups: int = 1,
    normalized_dims: int = 1,
    dim: int | None = 0,
    size: int = 5,
    region: str = "inter",
    convention: str = "torch",
    device: Device | torch.device | str | int | None = None,
) -> Launch:
    """Tells how the CUDA launchers would cut a call in training: by the code that they run, with or without a GPU.

    Args:
        op: "batch_norm" (batch_renorm is the same), "group_norm", "instance_norm", "layer_norm", "rms_norm",
            "local_response_norm", "weight_norm", "dropout", "alpha_dropout", "drop_path", "dropout1d", "dropout2d",
            "dropout3d" or "feature_alpha_dropout". Nothing is chosen for spectral_norm.
        shape: of the input, (N, C, *) where channels count, or of the weight. Aligned to 16 bytes, as torch allocates.
        dtype: float64, float32, bfloat16 or float16.
        direction: "forward" or "backward", which wants dx, dweight and dbias.
        channels_last: how the input lies in memory.
        num_groups: of group_norm.
        normalized_dims: of layer_norm and rms_norm: how many of the last dimensions are one row.
        dim: of weight_norm.
        size, region, convention: of local_response_norm.
        device: a CUDA device of this machine, or a :class:`fastnorm.explain.Device`. If None the current CUDA device,
            or where there is none an H100.

    Returns:
        A :class:`fastnorm.explain.Launch`, which prints as a sentence. A launch may have fewer or smaller clusters than
        it says: no more are started than run at once, and how many that are CUDA tells only of a kernel on a device.

    Raises:
        ValueError: an op, direction or type that is none of these, or a shape that the op does not take.
        RuntimeError: a device that torch does not have here.

    Example:
        >>> from fastnorm.explain import H100
        >>> print(fastnorm.explain_launch("layer_norm", (8192, 1024), device=H100))  # doctest: +NORMALIZE_WHITESPACE
        layer_norm forward on H100 SXM: registers, 8192 blocks of 64 threads, 4 elements an access, 2 tensors moved
        >>> fastnorm.explain_launch("batch_norm", (32, 64, 56, 56), device=H100).path
        'split'
    """
    if op not in _OPS:
        raise ValueError(f"explain_launch: op must be one of {', '.join(_OPS)}, got {op!r}")
    if direction not in ("forward", "backward"):
        raise ValueError(f"explain_launch: direction must be 'forward' or 'backward', got {direction!r}")
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"explain_launch: dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    if not isinstance(device, Device):
        device = H100 if device is None and not torch.cuda.is_available() else Device.of(device)
    backward = direction == "backward"
    once = True  # whether each element of each input is read once
    if op in _SLICES:
        decided = _slices(op, shape, dtype, backward, channels_last, num_groups, device)
        once = bool(decided["resident"])
        path = "resident" if once else "split"
    elif op in _ROWS:
        decided = _rows(op, shape, dtype, backward, normalized_dims, device)
        # Long rows are read again too, by forward from the L2 cache.
        once = bool(decided["packs"]) or not backward
        path = "registers" if decided["packs"] else "long rows"
    elif op in _DROPOUTS:
        decided = _dropout(op, shape, dtype, channels_last)
        path = "elements"
    elif op == "weight_norm":
        decided = _weights(op, shape, dtype, backward, channels_last, dim, device)
        once = bool(decided["resident"])
        path = "resident" if once else "split" if decided["parts"] > 1 else "read again"
    else:
        decided = _windows(op, shape, dtype, backward, channels_last, size, region, convention, device)
        path = "registers" if decided["in_registers"] else "tiles in workspace" if decided["in_workspace"] else "tiles"
    tensors = 3 if backward and op not in _DROPOUTS else 2
    return Launch(
        op=op,
        direction=direction,
        device=device.name,
        path=path,
        blocks=decided["blocks"],
        threads=decided["threads"],
        cluster=decided.get("cluster", 1),
        shared_memory=decided.get("shared", 0),
        window=decided["window"],
        parts=decided.get("parts", 0),
        tensors_moved=tensors if once else 2 * tensors - 1,
    )


def _channels(op: str, shape: Sequence[int], channels_last: bool, least: int = 2) -> tuple[int, int, int, bool]:
    """N, C, the product of the other sizes, and whether channels_last differs from contiguous."""
    if len(shape) < least or prod(shape) == 0:
        wanted = ", ".join(("N", "C", "L")[:least])
        raise ValueError(f"explain_launch: {op} cannot take shape {list(shape)}: wanted ({wanted}, *), not empty")
    N, C, *rest = shape
    return N, C, prod(rest), channels_last and C > 1 and prod(rest) > 1


def _slices(
    op: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    backward: bool,
    channels_last: bool,
    num_groups: int,
    device: Device,
) -> dict[str, int]:
    N, C, S, last = _channels(op, shape, channels_last)
    if op == "group_norm" and (num_groups < 1 or C % num_groups):
        raise ValueError(f"explain_launch: {C} channels cannot be split into num_groups={num_groups}")
    D = C // num_groups if op == "group_norm" else 1  # channels that share statistics
    limits = device.multiprocessors, device.shared_memory, device.compute_capability[0]
    return _C.plan_slices(N, C, S, last, D, op != "batch_norm", dtype.itemsize, backward, *limits)


def _rows(
    op: str, shape: Sequence[int], dtype: torch.dtype, backward: bool, normalized_dims: int, device: Device
) -> dict[str, int]:
    if not 1 <= normalized_dims <= len(shape) or prod(shape) == 0:
        raise ValueError(f"explain_launch: {op} of {normalized_dims} dimensions cannot take shape {list(shape)}")
    N = prod(shape[-normalized_dims:])
    limits = device.multiprocessors, device.compute_capability[0]
    return _C.plan_rows(prod(shape) // N, N, dtype.itemsize, dtype == torch.bfloat16, backward, *limits)


def _dropout(op: str, shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> dict[str, int]:
    dims = _DROPOUTS[op]
    if dims == 2 or (dims == 0 and len(shape) > 2):
        N, C, S, last = _channels(op, shape, channels_last)
        return _C.plan_dropout(N, C, S, last, dims == 2 and S != 1, dtype.itemsize)
    if len(shape) < dims or prod(shape) == 0:
        raise ValueError(f"explain_launch: {op} cannot take shape {list(shape)}")
    return _C.plan_dropout(1, 1, prod(shape), False, dims == 1, dtype.itemsize)  # samples lie one after the other


def _weights(
    op: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    backward: bool,
    channels_last: bool,
    dim: int | None,
    device: Device,
) -> dict[str, int]:
    if prod(shape) == 0 or (dim is not None and not -len(shape) <= dim < len(shape)):
        raise ValueError(f"explain_launch: {op} along dim={dim} cannot take shape {list(shape)}")
    N, C, S = 1, 1, prod(shape)
    if dim is not None:
        C, last = shape[dim], channels_last and len(shape) > 2
        in_memory = [0, *range(2, len(shape)), 1] if last else list(range(len(shape)))
        S = prod(shape[d] for d in in_memory[in_memory.index(dim % len(shape)) + 1 :])
        N = prod(shape) // (C * S)
    return _C.plan_weights(N, C, S, dtype.itemsize, backward, device.multiprocessors, device.shared_memory)


def _windows(
    op: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    backward: bool,
    channels_last: bool,
    size: int,
    region: str,
    convention: str,
    device: Device,
) -> dict[str, int]:
    if region not in ("inter", "intra") or convention not in ("torch", "paper") or size < 1:
        raise ValueError(f"explain_launch: {op} cannot take size={size}, region={region!r}, convention={convention!r}")
    N, C, S, last = _channels(op, shape, channels_last, 3)
    if region == "intra" and len(shape) != 4:
        raise ValueError(f"explain_launch: {op} cannot take shape {list(shape)}: wanted (N, C, H, W)")
    H = shape[2] if region == "intra" else 1
    before, after = window(size, convention)
    limits = device.multiprocessors, device.shared_memory
    return _C.plan_windows(N, C, H, S // H, last, region == "intra", before, after, dtype.itemsize, backward, *limits)
