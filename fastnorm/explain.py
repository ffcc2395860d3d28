"""How a call would be launched on a CUDA device: what the launchers decide, told without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from fastnorm import _C

_SLICES = ("batch_norm", "group_norm", "instance_norm")
_ROWS = ("layer_norm", "rms_norm")


@dataclass(frozen=True)
class Device:
    """What a launch is cut for.

    Attributes:
        name: for the reader.
        compute_capability: (major, minor); clusters and bulk copies come with 9.
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
        path: "resident": a slice (what is reduced and normalised together) stays on chip between its statistics and its
            output, and each element is read once; "split": slices are reduced by one launch and read again by another;
            "registers": rows stay in registers, each element is read once; "long rows": rows are read again.
        blocks, threads: of the launch that writes the output: blocks, and threads of each.
        cluster: blocks that share a slice or row through distributed shared memory; 1: none do.
        shared_memory: dynamic, bytes a block.
        window: elements that a thread reads at once; 16 bytes, or 1 where size or alignment allow no more.
        stages: buffers a block; 2: bulk copies fill one with the next slice while the other is written.
        parts: split: blocks that reduce a slice; rows: blocks that share them out in backward, else 0.
        tensors_moved: of the input's size, read or written in device memory, residuals left out.
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
    stages: int
    parts: int
    tensors_moved: int

    def __str__(self) -> str:
        cluster = f", clusters of {self.cluster}" if self.cluster > 1 else ""
        shared = f", {self.shared_memory / 1024:.1f} KiB of shared memory" if self.shared_memory else ""
        stages = f", {self.stages} stages" if self.stages > 1 else ""
        return (
            f"{self.op} {self.direction} on {self.device}: {self.path}, {self.blocks} blocks of {self.threads} threads"
            f"{cluster}{shared}{stages}, {self.window} elements an access, {self.tensors_moved} tensors moved"
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
    device: Device | torch.device | str | int | None = None,
) -> Launch:
    """Tells how the CUDA launchers would cut a call in training: by the code that they run, with or without a GPU.

    Args:
        op: "batch_norm", "group_norm", "instance_norm", "layer_norm" or "rms_norm". Other ops have one way only.
        shape: of the input; (N, C, *) for the first three. Aligned to 16 bytes, as torch allocates.
        dtype: float64, float32, bfloat16 or float16.
        direction: "forward" or "backward", which wants dx, dweight and dbias.
        channels_last: how the input lies in memory.
        num_groups: of group_norm.
        normalized_dims: of layer_norm and rms_norm: how many of the last dimensions are one row.
        device: a CUDA device of this machine, or a :class:`fastnorm.explain.Device`. If None the current CUDA device,
            or where there is none an H100.

    Returns:
        A :class:`fastnorm.explain.Launch`, which prints as a sentence. A launch may use smaller clusters than it says
        where a device, for reasons it does not tell in advance, holds none of more than 8 blocks.

    Raises:
        ValueError: an op, direction or type that is none of these, or a shape that the op does not take.
        RuntimeError: a device that torch does not have here.

    Example:
        >>> from fastnorm.explain import H100
        >>> print(fastnorm.explain_launch("layer_norm", (8192, 1024), device=H100))  # doctest: +NORMALIZE_WHITESPACE
        layer_norm forward on H100 SXM: registers, 8192 blocks of 64 threads, 4 elements an access, 2 tensors moved
        >>> fastnorm.explain_launch("batch_norm", (32, 64, 56, 56), device=H100).path
        'resident'
    """
    if op not in _SLICES + _ROWS:
        raise ValueError(f"explain_launch: op must be one of {', '.join(_SLICES + _ROWS)}, got {op!r}")
    if direction not in ("forward", "backward"):
        raise ValueError(f"explain_launch: direction must be 'forward' or 'backward', got {direction!r}")
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"explain_launch: dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    if not isinstance(device, Device):
        device = H100 if device is None and not torch.cuda.is_available() else Device.of(device)
    backward = direction == "backward"
    limits = device.multiprocessors, device.shared_memory, device.compute_capability[0]
    if op in _SLICES:
        decided = _slices(op, shape, dtype, backward, channels_last, num_groups, limits)
        path = "resident" if decided["resident"] else "split"
    else:
        if not 1 <= normalized_dims <= len(shape) or prod(shape) == 0:
            raise ValueError(f"explain_launch: {op} of {normalized_dims} dimensions cannot take shape {list(shape)}")
        N = prod(shape[-normalized_dims:])
        decided = _C.plan_rows(prod(shape) // N, N, dtype.itemsize, backward, limits[0], limits[2])
        path = "registers" if decided["packs"] else "long rows"
    # Long rows are read again too, by forward from the L2 cache.
    once = path in ("resident", "registers") or (path == "long rows" and not backward)
    return Launch(
        op=op,
        direction=direction,
        device=device.name,
        path=path,
        blocks=decided["blocks"],
        threads=decided["threads"],
        cluster=decided["cluster"],
        shared_memory=decided.get("shared", 0),
        window=decided["window"],
        stages=decided.get("stages", 1),
        parts=decided["parts"],
        tensors_moved=(3 if once else 5) if backward else (2 if once else 3),
    )


def _slices(
    op: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    backward: bool,
    channels_last: bool,
    num_groups: int,
    limits: tuple[int, int, int],
) -> dict[str, int]:
    if len(shape) < 2 or prod(shape) == 0:
        raise ValueError(f"explain_launch: {op} cannot take shape {list(shape)}: wanted (N, C, *), not empty")
    N, C, *rest = shape
    if op == "group_norm" and (num_groups < 1 or C % num_groups):
        raise ValueError(f"explain_launch: {C} channels cannot be split into num_groups={num_groups}")
    D = C // num_groups if op == "group_norm" else 1  # channels that share statistics
    per_sample = op != "batch_norm"
    return _C.plan_slices(N, C, prod(rest), channels_last, D, per_sample, dtype.itemsize, backward, *limits)
