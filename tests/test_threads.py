"""Several Python threads, and DataLoader's forked workers, calling the same modules; kernels release the interpreter's
lock."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import CASES, Case
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastnorm

THREADS, CALLS = 4, 12
# Large enough that each call has threads of its own.
SHAPE = (8, 16, 24, 24)
# One setting of each op.
STRESSED = list({case.op: case for case in CASES}.values())


def differentiate(case: Case, tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = case.fastnorm(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("case", STRESSED, ids=str)
def test_threads_get_what_one_thread_gets(case: Case) -> None:
    """The same tensors in every thread, forward and backward at once: the same bits as alone."""
    tensors = case.inputs(SHAPE, torch.float32)
    dy = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    alone = differentiate(case, tensors, dy)
    start = threading.Barrier(THREADS)

    def work(_: int) -> None:
        start.wait()
        for _ in range(CALLS):
            for got, wanted in zip(differentiate(case, tensors, dy), alone, strict=True):
                assert torch.equal(got, wanted)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))


def test_threads_train_one_batch_norm() -> None:
    """Outputs and gradients do not depend on the running statistics, which take in every batch once or, as torch's,
    lose one to another thread; they never become anything else."""
    norm = fastnorm.BatchNorm2d(16, activation="relu")
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    wanted = fastnorm.BatchNorm2d(16, activation="relu")(x).detach()

    def work(_: int) -> None:
        for _ in range(CALLS):
            leaf = x.clone().requires_grad_()
            y = norm(leaf)
            y.sum().backward(inputs=[leaf])
            assert torch.equal(y.detach(), wanted) and leaf.grad is not None and leaf.grad.isfinite().all()

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))
    assert 1 <= norm.num_batches_tracked <= THREADS * CALLS
    mean = x.mean((0, 2, 3))
    between = (norm.running_mean - torch.zeros(16)) / mean  # from 0 towards the batches' mean
    assert ((between > 0) & (between < 1 + 1e-5)).all()


def test_dropout_in_threads_draws_a_mask_of_its_own_each() -> None:
    """torch's default generator, shared and locked: no two calls get the same seed."""
    torch.manual_seed(0)
    x = torch.ones(4096)
    with ThreadPoolExecutor(THREADS) as pool:
        masks = list(pool.map(lambda _: tuple((fastnorm.functional.dropout(x, 0.5) == 0).tolist()), range(64)))
    assert len(set(masks)) == len(masks)


class Normalised(Dataset):
    """Images that a worker normalises and drops out."""

    def __init__(self) -> None:
        self.layer = nn.Sequential(fastnorm.GroupNorm(2, 4), fastnorm.Dropout(0.25), fastnorm.LocalResponseNorm(3))
        self.images = torch.randn(16, 4, 32, 32, generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        torch.manual_seed(index)
        with torch.no_grad():
            return self.layer(self.images[index : index + 1])[0]


@pytest.mark.parametrize("method", ("fork", "spawn"))
def test_workers_of_a_data_loader(method: str) -> None:
    """Forked after this process has used its threads, which a fork does not inherit."""
    data = Normalised()
    wanted = torch.stack([data[i] for i in range(len(data))])
    fastnorm.BatchNorm2d(64)(torch.randn(32, 64, 20, 20))
    loader = DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context=method, timeout=600)
    assert torch.equal(torch.cat(list(loader)), wanted)
