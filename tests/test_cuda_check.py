"""That make cuda-check can fail: the compiler's words about a kernel that spills, has a stack frame, or is unknown."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_check import kernels_of, main

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
