"""Under torch.use_deterministic_algorithms(True), which also fills fresh memory with NaN: every op works, and gives at
every run the bits that it gives without. On the CPU a sample has the same bits alone and in a batch. Any number of
threads: test_ops.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import CASES, DEVICES, Case
from torch import Tensor

DETERMINED = {case.name: case for case in CASES}
SHAPES = ((3, 5, 2, 3), (8, 32, 20, 21))


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def results(case: Case, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = case.fastnorm(*leaves)
    dy = torch.ones_like(y).cumsum(-1)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("case", DETERMINED.values(), ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits(case: Case, device: str) -> None:
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            tensors = case.inputs(shape, dtype, device)
            wanted = results(case, tensors)
            with deterministic():
                runs = [results(case, tensors) for _ in range(2)]
            for run in runs:
                for got, expected in zip(run, wanted, strict=True):
                    assert torch.equal(got, expected)


# Of ops that mix no samples, and number no elements to draw a mask for them.
ALONE = [case for case in CASES if case.op in ("layer_norm", "rms_norm", "group_norm", "local_response_norm")]
ALONE = [case for case in ALONE if "-but-0" not in case.name]  # which normalises the whole batch as one row
ALONE += [case for case in CASES if case.name.startswith(("batch_norm-eval", "instance_norm-input"))]


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_a_sample_alone_has_the_bits_that_it_has_in_a_batch(case: Case) -> None:
    """Whose size decides how work is shared, how results are written and which instruction set there is for it. On the
    CPU; CUDA's kernels split slices where there are few."""
    for shape in ((64, 32, 10, 10), (401, 5, 3, 3)):
        for dtype in (torch.float32, torch.bfloat16):
            for layout in (torch.contiguous_format, torch.channels_last):
                tensors = case.inputs(shape, dtype)
                of_samples = [t.shape == tensors[0].shape for t in tensors]
                tensors = [t.to(memory_format=layout) if t.dim() == 4 else t for t in tensors]
                y, dx, *_ = results(case, tensors)
                for n in (0, shape[0] // 2, shape[0] - 1):
                    sample = [t[n : n + 1] if own else t for t, own in zip(tensors, of_samples, strict=True)]
                    for whole, alone in zip((y, dx), results(case, sample), strict=False):
                        assert torch.equal(whole[n : n + 1], alone), (shape, dtype, layout, n)


_TRAIN = """
import hashlib, torch, fastnorm
from torch import nn
torch.manual_seed(0)
torch.use_deterministic_algorithms(True)
model = nn.Sequential(
    nn.Conv2d(3, 8, 3), fastnorm.BatchNorm2d(8, activation="relu"), fastnorm.Dropout2d(0.2),
    nn.Conv2d(8, 8, 3), fastnorm.GroupNorm(2, 8, activation="gelu"), fastnorm.LocalResponseNorm(5),
    nn.Flatten(), nn.Linear(8 * 12 * 12, 16), fastnorm.LayerNorm(16), fastnorm.AlphaDropout(0.1), nn.Linear(16, 10),
)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
x, target = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
for _ in range(3):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), target).backward()
    optimizer.step()
digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values()))
print(digest.hexdigest())
"""


def test_training_in_two_processes() -> None:
    """Addresses, and what was in memory before, differ from process to process: the weights do not."""
    command = [sys.executable, "-c", _TRAIN]
    digests = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(digests) == 1 and len(digests.pop()) == 65
