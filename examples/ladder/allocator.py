"""The C library's allocator, on CPUs: torch asks it for every tensor."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Keeps what tensors free for the next ones; returns whether the allocator, which must be glibc's, has agreed.

    By default it hands large blocks back to the system, which has to clear them for the next step: a fifth of the time
    of a training step here. Those of 32 MiB and more it would map one by one, and give back one by one, whatever the
    threshold. What environment variables (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_MAX_``) do for other programs.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
