"""Settings that every test shares: threads, and warnings that a test must expect to pass."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch

import fastnorm

# Inductor's cache on disk does not tell code apart that was made for a lesser instruction set, by ATEN_CPU_CAPABILITY,
# and such code, compiled for another, writes past its buffers.
_capability = torch.backends.cpu.get_cpu_capability()
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/fastnorm-inductor-{_capability}")

# On a virtual machine with AMX torch's own bfloat16 networks were off by half the size of their outputs: 0.005 without.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


@pytest.fixture(autouse=True)
def _no_fallback_and_two_threads() -> Iterator[None]:
    """A kernel that quietly hands its work to torch fails its test; so that the threads are used, there are two."""
    fastnorm.set_fallback("error")
    torch.set_num_threads(2)
    yield
    fastnorm.set_fallback("warn")
