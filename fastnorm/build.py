"""What this build of fastnorm is and what it uses on this machine."""

from __future__ import annotations

import torch

from fastnorm import _C
from fastnorm.version import __version__


def build_info() -> dict[str, object]:
    """Versions, instruction set in use, CUDA architectures and threads.

    Returns:
        ``fastnorm``, ``torch``, ``torch_built_with`` (the torch version that the extension was compiled against),
        ``compiler``, ``instruction_set`` (of the CPU kernels in this process: AVX512, AVX2, NEON or default),
        ``cuda_architectures`` (compiled in, empty in a CPU-only build) and ``threads``.

    Example:
        >>> fastnorm.build_info()["fastnorm"]
        '0.1.0'
    """
    return {
        "fastnorm": __version__,
        "torch": torch.__version__,
        "torch_built_with": _C.torch_version,
        "compiler": _C.compiler,
        "instruction_set": _C.instruction_set(),
        "cuda_architectures": list(_C.cuda_architectures),
        "threads": torch.get_num_threads(),
    }
