"""What fails on the way: hooks that raise, interrupts, memory that is not there, processes that die. A clear error,
and parameters, gradients and running statistics as they were."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import fastnorm
import fastnorm.functional as fn

X = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0))
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: fastnorm.BatchNorm2d(6, activation="relu"),
    "BatchRenorm2d": lambda: fastnorm.BatchRenorm2d(6),
    "InstanceNorm2d": lambda: fastnorm.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "GroupNorm": lambda: fastnorm.GroupNorm(2, 6, activation="gelu"),
    "LayerNorm": lambda: fastnorm.LayerNorm(5),
    "RMSNorm": lambda: fastnorm.RMSNorm(5),
    "LocalResponseNorm": lambda: fastnorm.LocalResponseNorm(3),
    "Dropout": lambda: fastnorm.Dropout(0.5),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in layer.state_dict().items()}


def assert_state(layer: nn.Module, wanted: dict[str, Tensor]) -> None:
    for name, t in layer.state_dict().items():
        assert torch.equal(t, wanted[name]), name


def step(layer: nn.Module) -> list[Tensor]:
    """The output and the gradients of a training step from a given seed."""
    torch.manual_seed(0)
    x = X.clone().requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    return [y.detach(), *gradients]


class Planned(Exception):
    pass


def refuse(*_: object) -> None:
    raise Planned


@every_layer
def test_exception_before_forward(name: str) -> None:
    layer = LAYERS[name]()
    before = state(layer)
    handle = layer.register_forward_pre_hook(refuse)
    with pytest.raises(Planned):
        layer(X)
    handle.remove()
    assert_state(layer, before)
    for got, wanted in zip(step(layer), step(LAYERS[name]()), strict=True):
        assert torch.equal(got, wanted)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also in a process that was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@every_layer
@pytest.mark.parametrize("fault", (refuse, lambda *_: signal.raise_signal(signal.SIGINT)), ids=("hook", "interrupt"))
def test_exception_in_backward(name: str, fault: Callable[..., None]) -> None:
    """After the layer's own backward, or before it: no gradient is half written, and the next step is as any other."""
    expected = Planned if fault is refuse else KeyboardInterrupt
    for before_layer in (True, False):
        layer, untouched = LAYERS[name](), LAYERS[name]()
        x = X.clone().requires_grad_()
        z = x * 1.0
        y = layer(z)
        statistics = state(layer)
        (y if before_layer else z).register_hook(fault)
        with pytest.raises(expected):
            y.sum().backward()
            time.sleep(0)  # where a pending interrupt is raised at the latest
        assert x.grad is None
        assert_state(layer, statistics)
        untouched(X)
        layer.zero_grad()
        for got, wanted in zip(step(layer), step(untouched), strict=True):
            assert torch.equal(got, wanted)
        assert_state(layer, state(untouched))


# ---- memory


def huge(*sizes: int) -> Tensor:
    """One number in memory; an output of this size is beyond every address space."""
    return torch.zeros(()).expand(sizes)


HUGE: dict[str, Callable[[], Tensor]] = {
    "batch_norm": lambda: fn.batch_norm(
        huge(2**20, 4, 2**30), torch.zeros(4), torch.ones(4), training=True, num_batches_tracked=torch.tensor(0)
    ),
    "instance_norm": lambda: fn.instance_norm(huge(2**20, 4, 2**30)),
    "group_norm": lambda: fn.group_norm(huge(2**20, 4, 2**30), 2),
    "layer_norm": lambda: fn.layer_norm(huge(2**20, 2**32), [2**32]),
    "rms_norm": lambda: fn.rms_norm(huge(2**20, 2**32), [2**32]),
    "local_response_norm": lambda: fn.local_response_norm(huge(2**20, 4, 2**30), 3),
    "dropout": lambda: fn.dropout(huge(2**52), 0.5),
    "alpha_dropout": lambda: fn.alpha_dropout(huge(2**52), 0.5, True),
    "drop_path": lambda: fn.drop_path(huge(2**20, 2**32), 0.5, True),
    "more bytes than a number holds": lambda: fn.group_norm(huge(2**31, 2, 2**30), 2),
}


@pytest.mark.parametrize("name", HUGE)
def test_an_allocation_beyond_memory(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"can't allocate memory|not enough memory|overflow"):
        HUGE[name]()


def test_statistics_after_an_allocation_beyond_memory() -> None:
    mean, var, count = torch.zeros(4), torch.ones(4), torch.tensor(0)
    with pytest.raises(RuntimeError, match="memory"):
        fn.batch_norm(huge(2**20, 4, 2**30), mean, var, training=True, num_batches_tracked=count)
    with pytest.raises(RuntimeError, match="memory"):
        fn.instance_norm(huge(2**20, 4, 2**30), mean, var)
    assert not mean.any() and torch.equal(var, torch.ones(4)) and count == 0


def _short_of_memory() -> None:
    """Run in a process of its own: each op with more and more memory, until it gets through.

    An op has a fork to itself: where malloc could not map a block it may have put it on the heap, and what is free
    there is no longer asked for.
    """
    torch.set_num_threads(1)
    x = torch.randn(128, 32, 64, 64)  # 64 MiB, which malloc asks the system for and gives back
    for name in ("BatchNorm2d", "BatchRenorm2d", "InstanceNorm2d", "GroupNorm", "LocalResponseNorm", "Dropout"):
        child = os.fork()
        if child == 0:
            try:
                _with_more_and_more_memory(name, x)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, name
    print("through")


def _with_more_and_more_memory(name: str, x: Tensor) -> None:
    layer = LAYERS[name]()
    if hasattr(layer, "num_features"):
        layer = type(layer)(32)
    elif name == "GroupNorm":
        layer = fastnorm.GroupNorm(4, 32, activation="gelu")
    strided = x.transpose(2, 3)  # takes a copy
    before, failures = state(layer), 0
    for headroom in range(0, 800, 16):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + headroom * 2**20, resource.RLIM_INFINITY))
        try:
            leaf = strided.detach().requires_grad_()
            y = layer(leaf)
            before = state(layer)
            torch.autograd.grad(y, [leaf], strided)
            break
        except (RuntimeError, MemoryError) as error:
            assert isinstance(error, MemoryError) or "memory" in str(error) or "bad_alloc" in str(error), error
            failures += 1
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert_state(layer, before)
    else:
        raise AssertionError(f"{name} never got through")
    assert failures > 2, f"{name} failed {failures} times"


def test_short_of_memory() -> None:
    """The allocations of an op fail one after another: each time an error, and nothing written."""
    command = [sys.executable, "-c", "import test_faults; test_faults._short_of_memory()"]
    environment = os.environ | {"PYTHONPATH": str(Path(fastnorm.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, env=environment)
    assert done.stdout == "through\n", done.stdout + done.stderr


# ---- processes


def _lose_a_process(rank: int, folder: str, when: str) -> None:
    """Rank 1 leaves, before forward or before backward, by dying or by never coming back; rank 0 must not wait for it
    longer than the group's timeout."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    fault, phase = when.split()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.new_group(timeout=timedelta(seconds=10 if fault == "hangs" else 600))
    layer = fastnorm.SyncBatchNorm(6, process_group=group)
    x = X.clone().requires_grad_()
    y = layer(x) if phase == "backward" else None
    gone = Path(folder, "gone")
    if rank == 1:
        gone.touch()
        while fault == "hangs" and not Path(folder, "seen").exists():
            time.sleep(0.1)
        os._exit(0)
    while not gone.exists():
        time.sleep(0.1)
    before = state(layer)
    with pytest.raises(RuntimeError):
        layer(x) if y is None else y.sum().backward()
    Path(folder, "seen").touch()
    assert_state(layer, before)
    assert x.grad is None and layer.weight.grad is None
    layer.eval()(X)
    os._exit(0)  # without the rank that is gone, a group is not to be destroyed


@pytest.mark.parametrize("when", ("dies forward", "dies backward", "hangs forward"))
def test_a_process_of_a_group_is_lost(when: str, tmp_path: Path) -> None:
    mp.spawn(_lose_a_process, (str(tmp_path), when), nprocs=2)
    assert (tmp_path / "seen").exists()
