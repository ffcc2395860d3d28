"""The CUDA emulator itself (cuda_on_cpu/): it runs what is right, and reports each kind of fault."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest
import torch
from cuda_on_cpu import driver, mutate, toys
from cuda_on_cpu.driver import ORDERS, KernelError

# Reported in every mode.
FAULTS = {
    "divergent_barrier": "divergent __syncthreads",
    "return_before_barrier": "ended while others wait for __syncthreads",
    "barrier_in_a_warp": "ended while others wait for __syncthreads|after others have ended",
    "deadlock": r"deadlock: 32 threads wait for __syncthreads at \S+; 32 threads wait for cluster_sync at",
    "mask_without_the_lane": "not in its own mask",
    "mask_with_an_ended_lane": "which has ended|deadlock",
    "source_outside_of_the_mask": "which is not in the mask",
    "reaches_too_early": "may not have started",
    "too_much_shared_memory": "too_much_shared_memory: invalid argument",
    "no_room_for_static_shared_memory": "no_room_for_static_shared_memory: invalid argument",
    "too_much_static_shared_memory": "static shared arrays of 2080 bytes, more than 2048",
    "cluster_does_not_divide": "invalid configuration argument",
    "cluster_too_large": "invalid configuration argument",
    "too_many_threads": "invalid configuration argument",
    "not_whole_warps": "invalid configuration argument",
}

# Seen by the trace alone, whatever the order.
TRACED = {
    "race": "races with a (read|write), shared memory",
    "same_value_race": "two threads write one place, shared memory",
    "race_of_warps_without_syncwarp": "races with a (read|write), shared memory",
    "race_between_blocks": "two threads write one place, y",
    "ticket_without_fence": "races with a write, y",
    "unwritten_shared": "reads what nothing has written, shared memory",
    "out_of_bounds": "reads outside, x",
    "misaligned_vector": "16 bytes at a misaligned address, x",
}

SANITIZED = {
    "out_of_bounds": "use-after-poison",
    "shared_out_of_bounds": "heap-buffer-overflow",
    "misaligned_vector": "misaligned address",
    "reaches_too_late": "heap-use-after-free",
}


@pytest.mark.parametrize("mode", ("random", "trace"))
def test_a_correct_kernel(mode: str) -> None:
    for order, seed in product(ORDERS, range(3)):
        with driver.settings(mode=mode, order=order, seed=seed):
            x, y, report = toys.run("correct")
        sums = x.view(2, 512).sum(1)  # eight blocks, four a cluster
        assert torch.equal(y[:-1].view(2, 512), sums[:, None].expand(2, 512))
        assert y[-1] == (sums * 512).sum()
        (launch,) = report.launches
        assert launch == driver.Launch((8, 1, 1), 64, 4, 4096)


@pytest.mark.parametrize("mode", ("random", "trace"))
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str, order: str, mode: str) -> None:
    with driver.settings(mode=mode, order=order, seed=1), pytest.raises(KernelError, match=FAULTS[name]):
        toys.run(name)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", TRACED)
def test_fault_that_the_trace_sees(name: str, order: str) -> None:
    with driver.settings(mode="trace", order=order, seed=1), pytest.raises(KernelError, match=TRACED[name]) as error:
        toys.run(name)
    assert "faults.cu:" in str(error.value)


@pytest.mark.parametrize("name", SANITIZED)
def test_fault_that_the_sanitizers_see(name: str) -> None:
    command = [sys.executable, "-m", "cuda_on_cpu.toys", "asan", name]
    done = subprocess.run(
        command, cwd=driver.HERE.parent, env=driver.asan_environment(), capture_output=True, text=True
    )
    assert done.returncode != 0 and SANITIZED[name] in done.stderr and "faults.cu:" in done.stderr


def test_sanitizers_have_nothing_against_a_correct_kernel() -> None:
    command = [sys.executable, "-m", "cuda_on_cpu.toys", "asan", "correct"]
    subprocess.run(command, cwd=driver.HERE.parent, env=driver.asan_environment(), check=True)


def test_cost() -> None:
    with driver.settings(mode="trace"):
        vector, scalar = (toys.run(name)[2] for name in ("copies", "scalar_copies"))
        conflicts = toys.run("bank_conflicts")[2]
    ideal = 4 * toys.COUNT // 32  # sectors
    for cost in (vector.reads["x"], vector.writes["y"]):
        assert cost == driver.Cost(4 * toys.COUNT, ideal, requests=toys.COUNT // 128, ideal_sectors=ideal)
    for cost in (scalar.reads["x"], scalar.writes["y"]):  # four times the requests, each touching all sectors
        assert cost == driver.Cost(4 * toys.COUNT, 4 * ideal, requests=toys.COUNT // 32, ideal_sectors=ideal)
    assert conflicts.shared_turns == 32 * conflicts.ideal_shared_turns


@pytest.mark.parametrize("mutation", mutate.SAMPLE, ids=str)
def test_a_planted_bug_is_caught(mutation: mutate.Mutation) -> None:
    """A few of those that make mutate plants."""
    outcome = mutate.try_mutation(mutation)
    assert outcome.caught, outcome.problem


def test_every_mutation_has_its_place() -> None:
    for mutation in mutate.MUTATIONS:
        text = (mutate.SOURCES / "cuda" / mutation.file).read_text()
        assert text.count(mutation.old) > mutation.nth, str(mutation)
