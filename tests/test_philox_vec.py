"""The vectors that dropout's bits are drawn in, against Philox in numpy, at any block; ops reach the first ones."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
BEST = torch.backends.cpu.get_cpu_capability()
FLAGS = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c", "-mbmi2"],
}
SETS = {"AVX512": ("AVX512", "AVX2", "DEFAULT"), "AVX2": ("AVX2", "DEFAULT")}.get(BEST, ("DEFAULT",))


@pytest.fixture(scope="module", params=SETS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    made = tmp_path_factory.mktemp("philox_vec") / "keep_bits.so"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-shared", "-fPIC", "-w", *FLAGS[request.param]]
    command += [f"-DCPU_CAPABILITY={request.param}", f"-DCPU_CAPABILITY_{request.param}", f"-I{ROOT / 'csrc'}"]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += [str(ROOT / "tests/philox_vec.cpp"), "-o", str(made)]
    command += [f(path) for path in cpp_extension.library_paths() for f in ("-L{}".format, "-Wl,-rpath,{}".format)]
    done = subprocess.run([*command, "-lc10"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return ctypes.CDLL(str(made))


# The upper half of a block's number changes within a draw, within a group of eight blocks, and between two groups.
@pytest.mark.parametrize("block", (0, 3, 2**32 - 200, 2**32 - 43, 2**32 - 3, 2**32, 5 * 2**32 - 8, 2**63 + 12345))
@pytest.mark.parametrize("seed,offset", ((0, 0), (2**64 - 1, 2**64 - 1), (0x0123456789ABCDEF, 0xFEDCBA9876543210)))
def test_bits_against_numpy(library: ctypes.CDLL, block: int, seed: int, offset: int) -> None:
    for count in (1, 7, 50):
        blocks = [block + i for i in range(8 * count)]
        counter = [[b & 0xFFFFFFFF, b >> 32 & 0xFFFFFFFF, offset & 0xFFFFFFFF, offset >> 32] for b in blocks]
        words = reference.philox4x32(
            np.array(counter, dtype=np.uint32), (seed & 0xFFFFFFFF, seed >> 32), reference.DROPOUT_ROUNDS
        )
        numbers = np.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(-1)
        drawn = (numbers[len(numbers) * i // 16] for i in range(16))  # a number that is the threshold itself is kept
        for threshold in (0, 0x8000, 0xFFFF, *drawn):
            bits = np.zeros(count, dtype=np.uint64)
            library.keep_bits(
                ctypes.c_uint64(seed),
                ctypes.c_uint64(offset),
                ctypes.c_uint32(threshold),
                ctypes.c_uint64(block),
                ctypes.c_int64(count),
                bits.ctypes.data_as(ctypes.c_void_p),
            )
            wanted = np.packbits(numbers >= threshold, bitorder="little").view(np.uint64)
            np.testing.assert_array_equal(bits, wanted)
