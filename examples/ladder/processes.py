"""Several processes under torchrun: who this one is, its share of the work, sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class FailedElsewhere(Exception):
    """Another process has failed, and says why."""


@dataclass(frozen=True)
class Processes:
    """This process among `world` of them. The first one, rank 0, prints and writes."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: Tensor) -> Tensor:
        """Every `world`-th item; shares differ by one item at most, and may be empty."""
        return items[self.rank :: self.world]

    def add_up(self, *sums: Tensor) -> None:
        """Replaces each tensor by its sum over the processes."""
        if self.world > 1:
            for tensor in sums:
                dist.all_reduce(tensor)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what one process may fail at, with a file for one: all are here at the end, and none goes on alone.

        Raises:
            FailedElsewhere: in the processes that have not failed themselves, where another has.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.world > 1:
            failed = [False] * self.world
            dist.all_gather_object(failed, failure is not None)
            if failure is None and any(failed):
                raise FailedElsewhere
        if failure is not None:
            raise failure

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model for training: with more than one process gradients, and BatchNorm's statistics, are those of all
        their batches together. The model's own BatchNorm layers become fastnorm.SyncBatchNorm, in place.
        """
        if self.world == 1:
            return model
        import fastnorm

        fastnorm.SyncBatchNorm.convert_sync_batchnorm(model)
        device = next(model.parameters()).device
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


ALONE = Processes()


def local_device(wanted: torch.device | None) -> torch.device:
    """`wanted`, or a GPU where there is one, or the CPU.

    A GPU that is not numbered is the first, or under torchrun another for each process of this machine.
    """
    if wanted is None:
        wanted = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.type == "cuda" and wanted.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return wanted


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun started, connected by NCCL on GPUs and gloo on CPUs; or this one alone."""
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
