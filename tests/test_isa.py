"""Every instruction set that this machine has runs the table of cases, each in a process of its own; and as large
tensors are written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastnorm

HERE = Path(__file__).parent
BEST = torch.backends.cpu.get_cpu_capability()
LESSER = {"AVX512": ("avx2", "default"), "AVX2": ("default",)}.get(BEST, ())
# What does not depend on the kernels' instruction set; and Inductor's code, which is for the processor as it is.
LEFT_OUT = (
    "isa", "ladder", "compile", "cuda", "cuda_check", "cuda_emulator", "cuda_on_cpu", "cuda_traffic", "adding_an_op",
    "packaging", "threads",
)  # fmt: skip
NUMERICAL = "against_float64 or far_above or threads or strides or constant or scales or mask or in_place or left_tail"


def run_tests(chosen: str, **environment: str) -> None:
    files = [str(path) for path in sorted(HERE.glob("test_*.py")) if path.stem[len("test_") :] not in LEFT_OUT]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *files]
    done = subprocess.run(command, env={**os.environ, **environment}, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("capability", LESSER)
def test_lesser_instruction_sets(capability: str) -> None:
    run_tests(NUMERICAL, ATEN_CPU_CAPABILITY=capability)


@pytest.mark.parametrize("capability", (BEST.lower(), *LESSER))
def test_outputs_past_the_caches(capability: str) -> None:
    """As large ones are written, all of them: whole cache lines, of planes and rows that begin within one, too."""
    run_tests("against_float64 or mask or in_place", ATEN_CPU_CAPABILITY=capability, FASTNORM_STREAM_THRESHOLD="0")


@pytest.mark.parametrize("capability", (BEST.lower(), *LESSER))
def test_the_kernels_follow_torch(capability: str) -> None:
    if capability not in ("avx512", "avx2", "default"):
        capability = "default"
    script = "import fastnorm; print(fastnorm.build_info()['instruction_set'])"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    out = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    expected = {"avx512": "AVX512", "avx2": "AVX2"}.get(
        capability, "NEON" if os.uname().machine == "aarch64" else "default"
    )
    assert out.stdout.strip() == expected


def test_build_info() -> None:
    info = fastnorm.build_info()
    assert info["torch"] == torch.__version__ and info["threads"] == torch.get_num_threads()
    assert info["torch_built_with"] == torch.__version__.split("+")[0]


def test_outputs_of_half_the_last_level_cache_are_large() -> None:
    """Of the cache that a core has access to: glibc 2.36 tells a whole socket's on some."""
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if not cache.exists() or "FASTNORM_STREAM_THRESHOLD" in os.environ:
        pytest.skip("the system does not tell how large the last-level cache is")
    kibibytes = int(cache.read_text().strip().removesuffix("K"))
    assert fastnorm.build_info()["stream_threshold"] == kibibytes * 1024 // 2


def test_self_check_runs() -> None:
    out = subprocess.run([sys.executable, "-m", "fastnorm"], capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    for op in ("BatchNorm2d", "BatchRenorm2d", "Dropout", "weight_norm", "spectral_norm"):
        assert f"\n{op} " in out.stdout


def test_self_check_takes_no_arguments() -> None:
    for argument, code in (("--help", 0), ("--quick", 2)):
        out = subprocess.run([sys.executable, "-m", "fastnorm", argument], capture_output=True, text=True)
        assert out.returncode == code and "usage: python -m fastnorm" in out.stdout + out.stderr
