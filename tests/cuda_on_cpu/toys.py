"""Runs the kernels of faults.cu, for test_cuda_emulator.py. One of them: python -m cuda_on_cpu.toys MODE NAME"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import torch
from torch import Tensor

from cuda_on_cpu import driver

COUNT = 1024  # of the floats at x


@cache
def _library(mode: str) -> ctypes.CDLL:
    library = driver.load(driver.build(driver.HERE / "faults.cu", mode))
    library.entry_error.restype = ctypes.c_char_p
    return library


def run(name: str) -> tuple[Tensor, Tensor, driver.Report]:
    """x, y and what was seen; under the driver's settings."""
    contents = {"x": torch.arange(COUNT, dtype=torch.float32), "ticket": torch.zeros(1, dtype=torch.int32)}
    with driver.Session(_library(driver.current.mode)) as session:
        for pointer, t in contents.items():
            session.add(pointer, t.nbytes, 4, pointer == "ticket", t.view(torch.uint8))
        session.add("y", 4 * (COUNT + 1), 4, True, None)
        at = {pointer: ctypes.c_void_p(buffer.address) for pointer, buffer in session.buffers.items()}
        session.check(session.library.run_toy(name.encode(), at["x"], at["y"], COUNT, at["ticket"]))
        report = session.report(name, 0)
    return contents["x"], session.buffers["y"].bytes.view(torch.float32), report


if __name__ == "__main__":
    mode, name = sys.argv[1:]
    with driver.settings(mode=mode):
        run(name)
