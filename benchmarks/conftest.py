"""Prints the comparison with torch after pytest-benchmark's own table."""

from __future__ import annotations

from typing import Any

import harness
import torch

import fastnorm


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not harness.ROWS:
        return
    info = fastnorm.build_info()
    write = terminalreporter.write_line
    write("")
    write(
        f"torch {info['torch']}, {info['instruction_set']}, {torch.get_num_threads()} threads; "
        "medians of interleaved rounds; share: of a copy's speed, on the bytes that any program must move"
    )
    write(
        f"{'op':24} {'pass':9} {'shape':18} {'dtype':9} {'layout':13} "
        f"{'torch ms':>9} {'fastnorm ms':>11} {'GB/s':>6} {'share':>6} {'speed-up':>8}"
    )
    for r in harness.ROWS:
        write(
            f"{r.op:24} {r.passes:9} {'x'.join(map(str, r.shape)):18} {r.dtype:9} {r.layout:13} {r.torch_s * 1e3:9.3f} "
            f"{r.fastnorm_s * 1e3:11.3f} {r.gigabytes_per_s:6.1f} {r.share_of_copy:6.0%} {r.speed_up:8.2f}"
        )
