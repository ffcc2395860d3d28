"""What the CUDA kernels move, counted by the emulator: passes over the tensors, and sectors of 32 bytes a request.

A gate against a pass too many and against accesses that do not coalesce. It knows no caches: parameters, which stay in
them, are not counted, and resident slices are small enough for a block's registers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import CASES
from cuda_on_cpu import driver, native
from cuda_on_cpu.driver import Cost, Report
from test_cuda_on_cpu import as_it_is, require_kernels
from test_ops import channels_last, cotangent, differentiate

PARAMETERS = {"weight", "bias", "g", "u", "v", "state"}
ALLOWED = 1.05  # times what it should be


@dataclass(frozen=True)
class Gate:
    case: str
    shape: tuple[int, ...]
    forward: float  # passes: reads and writes of a tensor as large as x
    backward: float
    last: bool = False  # channels_last
    device: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        return f"{self.case}-{sizes}{'-last' if self.last else ''}{'-split' if self.device == SPLIT else ''}"


MASK = 1 / 32  # a bit an element of 32
# Statistics and elements in passes of their own, as in channels_last.
SPLIT = {"plan": {"resident": 0}}

GATES = (
    *(
        Gate(f"batch_norm-train{suffix}", shape, forward + last, backward + last * (2 + of_mask), last)
        for suffix, forward, backward, of_mask in (("", 2, 3, 0), ("-residual-relu", 3 + MASK, 4 + MASK, MASK))
        for shape, last in (((4, 6, 32, 32), False), ((8, 64, 16, 16), True))
    ),
    Gate("batch_norm-train", (16, 6, 64, 64), 3, 5, device=SPLIT),
    Gate("batch_norm-train", (16, 64, 16, 16), 3, 5, last=True, device=SPLIT),
    Gate("batch_norm-eval", (4, 6, 32, 32), 2, 3),
    *(Gate(f"group_norm-some{suffix}", (4, 16, 32, 32), forward + last, backward + last * (2 + of_mask), last)
      for suffix, forward, backward, of_mask in (("", 2, 3, 0), ("-residual-relu", 3 + MASK, 4 + MASK, MASK))
      for last in (False, True)),
    Gate("group_norm-some", (2, 16, 64, 64), 3, 5, device=SPLIT),
    *(Gate("instance_norm-input", (4, 16, 32, 32), 2 + last, 3 + 2 * last, last) for last in (False, True)),
    # rows enough that dweight, dbias and the blocks' parts of them are small beside them
    *(Gate(name, (1024, 512), 2, 3) for name in ("layer_norm", "rms_norm")),
    Gate("layer_norm-residual-relu", (1024, 512), 3 + MASK, 4 + MASK),
    Gate("layer_norm", (160, 8192), 2, 3, device={"multiprocessors": 2}),  # a cluster a row
    *(Gate("local_response_norm-inter-torch-size5-beta0.75", (4, 32, 16, 32), 2, 3, last) for last in (False, True)),
    *(Gate("local_response_norm-intra-torch-size3-beta0.75", (4, 16, 32, 32), 2, 3, last) for last in (False, True)),
    *(Gate(name, (256, 256), 2, 2) for name in ("dropout-0.5", "alpha_dropout-0.5")),
    *(Gate("dropout2d-0.3", (8, 16, 32, 32), 2, 2, last) for last in (False, True)),
    Gate("weight_norm-0", (64, 32, 8, 8), 2, 3),
)  # fmt: skip


def cost(reports: list[Report], what: str) -> Cost:
    """Of the tensors and the workspace, in one direction of the op."""
    total = Cost()
    for report in reports:
        if report.op.endswith(what) or not report.op.endswith(("forward", "backward")):
            for costs in (report.reads, report.writes):
                total = sum((c for name, c in costs.items() if name not in PARAMETERS), total)
    return total


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_traffic(gate: Gate) -> None:
    case = next(case for case in CASES if case.name == gate.case)
    require_kernels(case.op)
    layout = channels_last if gate.last else as_it_is
    tensors = [layout(t) if t.dim() == len(gate.shape) else t for t in case.inputs(gate.shape, torch.float32)]
    with driver.settings(mode="trace", races=False, **gate.device), native.installed():
        with driver.settings() as forward:
            y = case.fastnorm(*tensors)
        with driver.settings() as both:
            differentiate(case.fastnorm, tensors, layout(cotangent(y)))
    bytes_ = tensors[0].numel() * tensors[0].element_size()
    backward = both[len(forward) :]
    for what, reports, passes in (("forward", forward, gate.forward), ("backward", backward, gate.backward)):
        c = cost(reports, what)
        assert c.sectors * 32 <= ALLOWED * passes * bytes_, f"{what}: {c.sectors * 32 / bytes_:.2f} passes, {c}"
        assert c.sectors <= ALLOWED * c.ideal_sectors, f"{what}: {c}"
