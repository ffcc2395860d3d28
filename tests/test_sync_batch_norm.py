"""Batch normalisation over several processes, against one process that has the whole batch."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from pathlib import Path

import networks
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastnorm
from fastnorm import sync_batch_norm

# The same statistics by other sums: a few roundings of 1e-16 each.
TOLERANCE = 1e-12


def start(check: Callable[[int, int], None], processes: int, folder: Path) -> None:
    """Runs check(rank, processes) in each of several processes; what fails in one fails here."""
    mp.spawn(_process, (check, processes, str(folder / "store")), nprocs=processes)


def _process(rank: int, check: Callable[[int, int], None], processes: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    fastnorm.set_fallback("error")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    check(rank, processes)
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()  # what else holds gloo's threads
    # A thread of torch's own that asks for the interpreter while it ends aborts the process, on rare occasions.
    os._exit(0)


def parts(processes: int) -> list[int]:
    """Sizes of each process's batch: all different, one of them nothing."""
    return [5, 0] if processes == 2 else [3, 1, 0, 6]


def shares(batch: Tensor, processes: int) -> tuple[Tensor, ...]:
    return batch.split(parts(processes))


def step(layer: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor) -> dict[str, Tensor]:
    """Of one training step the output and every gradient."""
    leaves = [x.clone().requires_grad_(), None if residual is None else residual.clone().requires_grad_()]
    layer.zero_grad()
    y = layer(leaves[0]) if residual is None else layer(leaves[0], residual=leaves[1])
    y.backward(dy)
    results = {"y": y.detach(), "dx": leaves[0].grad}
    return results if residual is None else {**results, "dresidual": leaves[1].grad}


def like_one_process(rank: int, processes: int) -> None:
    n = sum(parts(processes))
    generator = torch.Generator().manual_seed(0)
    for shape, activation, with_residual, arguments in (
        ((n, 6), None, False, {}),
        ((n, 6, 5), "relu", False, {"momentum": None}),
        ((n, 6, 3, 4), "gelu", True, {"bias": False}),
        ((n, 6, 3, 4), "leaky_relu", True, {"affine": False}),
        ((n, 6, 2, 3, 2), "silu", False, {"track_running_stats": False}),
    ):
        x, residual, dy = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(3))
        x = 3 * x + 100
        kind = getattr(fastnorm, f"BatchNorm{max(1, len(shape) - 2)}d")
        whole = kind(6, activation=activation, dtype=torch.float64, **arguments)
        for p in whole.parameters():
            p.data.normal_(1.0, 0.5, generator=generator)
        share = fastnorm.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(whole))
        assert type(share) is fastnorm.SyncBatchNorm
        for _ in range(2):  # the second takes in running statistics that are no longer zeros and ones
            wanted = step(whole, x, residual if with_residual else None, dy)
            own = [shares(t, processes)[rank] for t in (x, residual, dy)]
            got = step(share, own[0], own[1] if with_residual else None, own[2])
            for key, tensor in got.items():
                part = shares(wanted[key], processes)[rank]
                torch.testing.assert_close(tensor, part, rtol=TOLERANCE, atol=TOLERANCE)
        for (name, p), q in zip(whole.named_parameters(), share.parameters(), strict=True):
            dist.all_reduce(q.grad)
            torch.testing.assert_close(q.grad, p.grad, rtol=TOLERANCE, atol=TOLERANCE, msg=name)
        for (name, p), q in zip(whole.named_buffers(), share.buffers(), strict=True):
            torch.testing.assert_close(q, p, rtol=TOLERANCE, atol=TOLERANCE, msg=name)
        whole.eval(), share.eval()
        torch.testing.assert_close(share(own[0]), whole(own[0]), rtol=TOLERANCE, atol=TOLERANCE)


def without_buffers(rank: int, processes: int) -> None:
    """Buffers that are None, and what momentum=None then means: as torch.nn.BatchNorm2d in one process."""
    x = torch.randn(sum(parts(processes)), 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    for momentum in (0.1, None):
        for gone in (["num_batches_tracked"], ["running_mean", "running_var"], None):
            whole = nn.BatchNorm2d(4, momentum=momentum).double()
            for name in gone or list(whole._buffers):
                setattr(whole, name, None)
            share = fastnorm.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(whole))
            for _ in range(2):
                wanted, got = whole(x), share(shares(x, processes)[rank])
            torch.testing.assert_close(got, shares(wanted, processes)[rank], rtol=TOLERANCE, atol=TOLERANCE)
            assert [n for n, _ in share.named_buffers()] == [n for n, _ in whole.named_buffers()]
            for p, q in zip(whole.buffers(), share.buffers(), strict=True):
                torch.testing.assert_close(q, p, rtol=TOLERANCE, atol=TOLERANCE)
    share = fastnorm.SyncBatchNorm(4)
    share.running_mean = None
    with pytest.raises(RuntimeError, match=r"^SyncBatchNorm: running_mean and running_var must be given together"):
        share(x[:2].float())


def other_types(rank: int, processes: int) -> None:
    x = torch.randn(sum(parts(processes)), 4, 6, 6, generator=torch.Generator().manual_seed(3)) * 2 + 1
    own = shares(x, processes)[rank]
    wanted = nn.BatchNorm2d(4)(x)
    y = fastnorm.SyncBatchNorm(4)(own.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(y, shares(wanted, processes)[rank], rtol=1e-5, atol=1e-6)
    y = fastnorm.SyncBatchNorm(4)(own.bfloat16().requires_grad_())  # parameters in float32
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), shares(wanted, processes)[rank], rtol=0.02, atol=0.02)
    y.sum().backward()


def what_goes_wrong(rank: int, processes: int) -> None:
    """Told in every process, so that none waits for the others."""
    norm = fastnorm.SyncBatchNorm(4)
    with pytest.raises(ValueError, match=r"^SyncBatchNorm: training needs more than one value per channel"):
        norm(torch.randn(1 if rank == 0 else 0, 4))
    assert norm.num_batches_tracked == 0
    for shape, error in (((4,), ValueError), ((2, 5), RuntimeError)):
        with pytest.raises(error, match=r"^SyncBatchNorm: input must have"):
            norm(torch.randn(shape))
    norm = fastnorm.SyncBatchNorm(4, skip_nonfinite_stats=True)
    norm(torch.full((3, 4), float("inf") if rank == 1 else 1.0))
    assert norm.num_batches_tracked == 0 and norm.running_mean.isfinite().all()
    nothing = norm(torch.randn(0, 4, 3, requires_grad=True))
    nothing.sum().backward()
    assert nothing.shape == (0, 4, 3) and norm.num_batches_tracked == 0
    group = dist.new_group([0])
    alone = fastnorm.SyncBatchNorm(4, process_group=group)
    if rank == 0:  # a group of one process waits for nobody
        assert torch.equal(alone(x := torch.randn(5, 4)), fastnorm.BatchNorm1d(4)(x))


def network() -> nn.Module:
    torch.manual_seed(5)
    layers = [nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(1), nn.Linear(6 * 16, 3)]
    return nn.Sequential(*layers, nn.BatchNorm1d(3)).double()


def in_distributed_data_parallel(rank: int, processes: int) -> None:
    """Three steps of a network, against the same in one process: DistributedDataParallel averages the gradients, so the
    loss of each process is its share of the sum times the number of processes."""
    x = torch.randn(12, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    weight = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    own = slice(0, 7) if rank == 0 else slice(7 + 5 * (rank - 1) // (processes - 1), 7 + 5 * rank // (processes - 1))
    whole = network()
    share = fastnorm.fuse(fastnorm.SyncBatchNorm.convert_sync_batchnorm(network()))
    assert share[1].activation == "relu"
    parallel = DistributedDataParallel(share)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (whole, parallel)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (whole(x) * weight).sum().backward()
        (parallel(x[own]) * weight[own]).sum().mul(processes).backward()
        for optimizer in optimizers:
            optimizer.step()
    for (name, tensor), other in zip(whole.state_dict().items(), share.state_dict().values(), strict=True):
        torch.testing.assert_close(other, tensor, rtol=1e-10, atol=1e-10, msg=name)  # three steps of six layers


def a_wrong_mean_would_be_seen(rank: int, processes: int) -> None:
    """With the mean of the processes' statistics, as if the batches had one size and one mean."""

    def mean_of_means(input: Tensor, group: object) -> tuple[float, Tensor]:
        local = torch.stack([input.mean(0), input.var(0, correction=0)]) if len(input) else torch.zeros(2, 6).double()
        dist.all_reduce(local)
        return float(sum(parts(processes))), local / processes

    x = torch.randn(sum(parts(processes)), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = shares(nn.BatchNorm1d(6).double()(x), processes)[rank]
    gather, sync_batch_norm._gather = sync_batch_norm._gather, mean_of_means
    got = fastnorm.SyncBatchNorm(6, dtype=torch.float64)(shares(x, processes)[rank])
    sync_batch_norm._gather = gather
    assert got.shape == wanted.shape and (rank > 0 or (got - wanted).abs().max() > 1e-3)


def everything(rank: int, processes: int) -> None:
    for check in (
        like_one_process,
        a_wrong_mean_would_be_seen,
        without_buffers,
        other_types,
        what_goes_wrong,
        in_distributed_data_parallel,
    ):
        check(rank, processes)


@pytest.mark.parametrize("processes", (2, 4))
def test_processes(processes: int, tmp_path: Path) -> None:
    start(everything, processes, tmp_path)


def test_in_one_process() -> None:
    x = torch.randn(8, 4, 3, 3)
    sync, plain = fastnorm.SyncBatchNorm(4, activation="relu"), fastnorm.BatchNorm2d(4, activation="relu")
    assert torch.equal(sync(x), plain(x)) and torch.equal(sync.eval()(x), plain.eval()(x))
    assert sync.state_dict().keys() == nn.SyncBatchNorm(4).state_dict().keys()
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(norm, nn.Sequential(fastnorm.BatchNorm2d(4, activation="silu")), fastnorm.BatchRenorm2d(4))
    assert fastnorm.SyncBatchNorm.convert_sync_batchnorm(model) is model
    assert type(norm) is type(model[1][0]) is fastnorm.SyncBatchNorm and model[1][0].activation == "silu"
    assert model[0] is norm and type(model[2]) is fastnorm.BatchRenorm2d
    model(x)


def test_readme() -> None:
    exec(networks.readme_code("SyncBatchNorm"), names := {})
    assert type(names["model"][1]) is fastnorm.SyncBatchNorm


def test_any_number_of_dimensions() -> None:
    x = torch.randn(2, 3, 1, 2, 1, 2)
    for norm in (
        nn.SyncBatchNorm(3).eval(),
        fastnorm.SyncBatchNorm(3).eval(),
        fastnorm.convert(nn.SyncBatchNorm(3)).eval(),
    ):
        torch.testing.assert_close(norm(x), x / (1 + 1e-5) ** 0.5)
    torch.testing.assert_close(fastnorm.SyncBatchNorm(3)(x), fastnorm.BatchNorm2d(3)(x.flatten(3)).view_as(x))
    with pytest.raises(ValueError, match=r"input must have shape \(N, C, \*\), got 1 dimensions"):
        fastnorm.SyncBatchNorm(3)(x[0, :, 0, 0, 0, 0])
