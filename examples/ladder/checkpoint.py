"""Checkpoints: one file a rung, written whole or not at all, read without running code from it."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


class CheckpointError(Exception):
    """What is wrong with a checkpoint, in one line that names the file."""


def of_rung(folder: Path, name: str) -> Path:
    """Where a rung's checkpoint lies."""
    return folder / f"{name}.pt"


def discard(folder: Path, names: Iterable[str]) -> None:
    """Removes the checkpoints of rungs, whole ones and parts, and nothing else that `folder` may hold."""
    for name in names:
        path = of_rung(folder, name)
        for one in (path, _partial(path)):
            one.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_suffix(".part")


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors, numbers, strings, lists and dicts of them.

    Raises:
        CheckpointError: they cannot be written; what was there before is there still.
    """
    content = io.BytesIO()  # of a disk that is full torch.save itself says no more than "unexpected pos"
    torch.save(state, content)
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content.getbuffer())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """What `save` wrote, its tensors on `device`.

    Raises:
        CheckpointError: the file is truncated or something else.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a broken pickle can raise nearly anything, and in words that help nobody
        raise CheckpointError(f"{path}: truncated, or not a checkpoint") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a checkpoint: holds a {type(state).__name__}")
    return state
