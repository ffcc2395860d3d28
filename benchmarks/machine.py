"""What measurements say of where they are from: the machine, without the names of hosts, and the commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import harness
import torch

import fastnorm


def machine_info(device: str) -> dict[str, Any]:
    """The processor, or the GPU, and versions."""
    info = {key: value for key, value in fastnorm.build_info().items() if isinstance(value, str | int | bool)}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "cache_mib": harness.clock(device).cache_bytes / 2**20,
        "huge_pages": huge_pages(),
        "keeps_freed_memory": device == "cpu" and harness.keeps_freed_memory(),
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "fastnorm": info,
    }


def processor() -> str:
    """Its name, from Linux, or what Python knows of it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def huge_pages() -> str:
    """When Linux gives huge pages: always, madvise or never."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as line:
            return line.read().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return "unknown"


def commit_info() -> dict[str, Any]:
    """Of this file's repository, wherever it is called from; dirty: it has changes that are not committed."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {
            "id": git("rev-parse", "HEAD"),
            "time": git("show", "-s", "--format=%cI"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return {"id": "unversioned", "time": None, "dirty": False}
