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


@pytest.mark.skipif(BEST != "AVX512", reason="this processor has no AVX512")
def test_avx512_by_name_in_small_calls() -> None:
    """Which take AVX2 on some processors, see small_calls_take_avx2() in csrc/isa.h: here the ops that have them."""
    run_tests(f"({NUMERICAL}) and (Batch or Drop or weight_norm)", ATEN_CPU_CAPABILITY="avx512")


@pytest.mark.parametrize("capability", (BEST.lower(), *LESSER))
def test_outputs_past_the_caches(capability: str) -> None:
    """As large ones are written, all of them: whole cache lines, of planes and rows that begin within one, too."""
    run_tests("against_float64 or mask or in_place", ATEN_CPU_CAPABILITY=capability, FASTNORM_STREAM_THRESHOLD="0")


# The last byte of weight and of bias is that of a page, and the page after it may not be read. Rows that are not whole
# packs begin anywhere within a cache line.
GUARDED = """
import ctypes, mmap, torch, fastnorm.functional as fn
libc, page = ctypes.CDLL(None), mmap.PAGESIZE
torch.set_num_threads(2)  # three rows are then too few to be split otherwise than by chunks

def guarded(t):
    size = (t.nbytes + page - 1) // page * page
    memory = mmap.mmap(-1, size + page)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(begin + size), ctypes.c_size_t(page), 0) == 0
    return torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=size - t.nbytes).copy_(t)

for N in (4097, 4099, 4103, 8195, 8199):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for parameters in {torch.float64 if dtype == torch.float64 else torch.float32, dtype}:
            x, weight, bias = torch.randn(3, N).to(dtype), *(guarded(torch.randn(N).to(parameters)) for _ in range(2))
            y = fn.layer_norm(x, (N,), weight, bias)
            assert torch.equal(y, fn.layer_norm(x, (N,), weight.clone(), bias.clone()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect by ctypes")
@pytest.mark.parametrize("capability", (BEST.lower(), *LESSER))
def test_nothing_is_read_past_the_parameters(capability: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "FASTNORM_STREAM_THRESHOLD": "0"}
    done = subprocess.run([sys.executable, "-X", "faulthandler", "-c", GUARDED], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


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


def test_outputs_that_fill_the_last_level_cache_are_large() -> None:
    """Of the cache that a core has access to: glibc 2.36 tells a whole socket's on some. Where all cores of a socket
    have access to all of it, it counts as 12.25 MiB."""
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if not cache.exists() or "FASTNORM_STREAM_THRESHOLD" in os.environ:
        pytest.skip("the system does not tell how large the last-level cache is")
    kibibytes = int(cache.read_text().strip().removesuffix("K"))
    if kibibytes > 96 << 10:
        kibibytes = 49 << 8
    info = fastnorm.build_info()
    eighths = 4 if info["instruction_set"] == "AVX512" else 3
    assert info["stream_threshold"] == kibibytes * 1024 // 8 * eighths


def test_self_check_runs() -> None:
    out = subprocess.run([sys.executable, "-m", "fastnorm"], capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    for op in ("BatchNorm2d", "BatchRenorm2d", "Dropout", "weight_norm", "spectral_norm"):
        assert f"\n{op} " in out.stdout


def test_self_check_whose_reader_leaves() -> None:
    with subprocess.Popen([sys.executable, "-m", "fastnorm"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as check:
        assert check.stdout is not None and check.stderr is not None
        check.stdout.close()
        assert check.stderr.read() == b"" and check.wait() == 1


def test_self_check_takes_no_arguments() -> None:
    for argument, code in (("--help", 0), ("--quick", 2)):
        out = subprocess.run([sys.executable, "-m", "fastnorm", argument], capture_output=True, text=True)
        assert out.returncode == code and "usage: python -m fastnorm" in out.stdout + out.stderr
