"""What this build of fastnorm is and what it uses on this machine."""

from __future__ import annotations

import torch

from fastnorm import _C
from fastnorm.version import __version__


def devices() -> list[torch.device]:
    """The CPU, and the CUDA devices that this build has kernels for."""
    found = [torch.device("cpu")]
    if not _C.cuda_ops or not torch.cuda.is_available():
        return found
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if _C.cuda_build_runs_on(major * 10 + minor):
            found.append(torch.device("cuda", index))
    return found


def build_info() -> dict[str, object]:
    """Versions, instruction set in use, what was built for CUDA, threads, and what is large to the CPU kernels.

    Returns:
        ``fastnorm``, ``torch``, ``torch_built_with`` (the torch version that the extension was compiled against),
        ``compiler``, ``instruction_set`` (of the CPU kernels in this process: AVX512, AVX2, NEON or default; small
        calls take AVX2 on Intel's processors with AVX512, see docs/performance.md),
        ``cuda`` (version of the toolkit it was compiled with), ``cuda_architectures`` (machine code as sm_90, PTX as
        compute_90), ``cuda_ops`` (the ops with kernels), all three empty in a CPU-only build, ``threads``, and
        ``stream_threshold`` (bytes of an output from which the CPU kernels write past the caches: half the last-level
        cache, three eighths without AVX512, 6.1 or 4.6 MiB where that cache is a whole socket's, or what
        FASTNORM_STREAM_THRESHOLD in the environment says; two thirds of it in LayerNorm's backward and in those that
        read both their inputs twice).

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
        "cuda": _C.cuda_version,
        "cuda_architectures": [f"sm_{n}" for n in _C.cuda_binaries] + [f"compute_{n}" for n in _C.cuda_ptx],
        "cuda_ops": [name for name in _C.cuda_ops.split(",") if name],
        "threads": torch.get_num_threads(),
        "stream_threshold": _C.stream_threshold(),
    }
