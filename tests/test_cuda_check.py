"""That make cuda-check can fail: the compiler's words about a kernel that spills, has a stack frame, or is unknown.

And what can be read in the compiler's output alone, where there is a compiler: how wide the accesses are.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_check import kernels_of, main

CSRC = Path(__file__).resolve().parent.parent / "csrc"
NVCC = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin{os.pathsep}{os.environ['PATH']}")

CLEAN = """\
[1/2] /usr/local/cuda/bin/nvcc -O3 -c /somewhere/csrc/cuda/sums.cu -o sums.o
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8fastnorm4cuda3addEPf' for 'sm_80'
ptxas info    : Function properties for _ZN8fastnorm4cuda3addEPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 144 bytes smem, 368 bytes cmem[0]
ptxas info    : Function properties for __internal_accurate_pow
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
SECOND = CLEAN.replace("sm_80", "sm_90").replace("Used 30", "Used 40")


def test_a_clean_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.txt"
    log.write_text(CLEAN + SECOND)
    assert main(str(log)) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["kernel", "sm_80", "sm_90", "shared", "stack", "spills"]
    assert shown[1].split() == ["sums:", "add", "30", "40", "144", "0", "0"]
    assert shown[-1] == "1 kernels, at most 40 registers, 0 with spills, a stack frame or too much memory"


@pytest.mark.parametrize(
    ("what", "instead", "mark"),
    [
        ("0 bytes spill stores, 0", "8 bytes spill stores, 8", "144 0 16 <-- spills"),
        ("0 bytes stack frame", "80 bytes stack frame", "144 80 0 <-- a stack frame"),
        ("144 bytes smem", "2064 bytes smem", "2064 0 0 <-- too much shared memory"),
    ],
    ids=["spills", "stack", "shared"],
)
def test_a_bad_kernel_fails(
    what: str, instead: str, mark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.txt"
    log.write_text(CLEAN + SECOND.replace(what, instead, 1))
    assert main(str(log)) == 1
    shown = capsys.readouterr().out.splitlines()
    assert " ".join(shown[1].split()) == f"sums: add 30 40 {mark}"
    assert shown[-1] == "1 kernels, at most 40 registers, 1 with spills, a stack frame or too much memory"


def test_a_log_without_kernels_fails(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("ninja: no work to do.\n")
    assert main(str(log)) == 1


def test_a_log_that_ends_early_is_refused() -> None:
    with pytest.raises(ValueError, match="does not say"):
        kernels_of(CLEAN.split("ptxas info    : Used")[0])


# One kernel an access, by the members of Pack that kernels use. The emulator cannot tell how wide nvcc makes them.
ACCESSES = """
#include "pack.cuh"
using namespace fastnorm::cuda;
#define KERNEL(name, T, n, body) extern "C" __global__ void name(const T* x, T* y) { using P = Pack<T, n>; body; }
#define KERNELS(suffix, T, n)                                                             \\
  KERNEL(ordinary_##suffix, T, n, P::load(x).store(y))                                    \\
  KERNEL(streaming_##suffix, T, n, P::load_streaming(x).store_streaming(y))
KERNELS(16_double, double, 2)
KERNELS(16_float, float, 4)
KERNELS(16_bfloat16, __nv_bfloat16, 8)
KERNELS(16_half, __half, 8)
KERNELS(8_bfloat16, __nv_bfloat16, 4)
KERNELS(4_half, __half, 2)
extern "C" __global__ void ordinary_32_numbers(const float* x, float* y) {
  float v[8];
  load_numbers<8>(x, v);
  store_numbers<8>(y, v);
}
"""


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_an_access_is_one_instruction(tmp_path: Path) -> None:
    (tmp_path / "accesses.cu").write_text(ACCESSES)
    command = [NVCC, "-std=c++20", "-arch=sm_90", "-ptx", "-I", str(CSRC / "cuda"), "accesses.cu", "-o", "accesses.ptx"]
    subprocess.run(command, cwd=tmp_path, check=True)
    kernels = re.findall(
        r"\.entry ((?:ordinary|streaming)_\w+)\((.*?)^}",
        (tmp_path / "accesses.ptx").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    assert len(kernels) == 13
    for name, text in kernels:
        kind, size = name.split("_")[:2]
        found = re.findall(r"\b(ld|st)\.global(\.cs)?(?:\.v(\d))?\.[a-z](\d+)\s", text)
        sizes = [int(count or 1) * int(bits) // 8 for _, _, count, bits in found]
        assert sum(sizes) == 2 * int(size), name
        assert set(sizes) == {min(16, int(size))}, name
        assert {hint for _, hint, _, _ in found} == {".cs" if kind == "streaming" else ""}, name
