"""What only a CUDA device has: streams, graphs, synchronisation, several devices, and masks that are the CPU's too.

Without a device, or in a build without kernels for it, only what is asked of the build is tested.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import CASES, DEVICES, Case
from test_ops import FLOATS, channels_last, cotangent, differentiate
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastnorm
import fastnorm.functional as fn
from fastnorm import _C

ROOT = Path(__file__).parent.parent
needs_device = pytest.mark.skipif("cuda" not in DEVICES, reason="no CUDA device that this build has kernels for")
every_case = pytest.mark.parametrize("case", CASES, ids=str)
DROPPING = ("dropout", "alpha_dropout", "drop_path")
# The table's dropouts take a generator of the CPU, which a graph may not.
GRAPHED = [case for case in CASES if case.op not in DROPPING]

DROPOUTS: dict[str, Callable[..., Tensor]] = {
    "dropout": fn.dropout,
    "dropout2d": fn.dropout2d,
    "alpha_dropout": fn.alpha_dropout,
    "feature_alpha_dropout": fn.feature_alpha_dropout,
    "drop_path": fn.drop_path,
}
every_dropout = pytest.mark.parametrize("name", DROPOUTS)


# ---- the build


def test_build_info_tells_of_cuda() -> None:
    info = fastnorm.build_info()
    assert bool(info["cuda"]) == bool(info["cuda_architectures"]) == bool(info["cuda_ops"])
    if torch.version.cuda is None:
        assert not info["cuda"]
    else:
        assert not info["cuda"] or str(info["cuda"]).split(".")[0] == torch.version.cuda.split(".")[0]


def test_which_devices_the_build_runs_on() -> None:
    """Machine code serves its major version from its minor version on, PTX everything later."""
    for capability in range(50, 140):
        by_code = any(code // 10 == capability // 10 and code <= capability for code in _C.cuda_binaries)
        by_ptx = any(ptx <= capability for ptx in _C.cuda_ptx)
        assert _C.cuda_build_runs_on(capability) == (by_code or by_ptx)


# A compiler that only says what setup.py asks it: its version, and what it can compile for.
NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
  --list-gpu-arch) printf "compute_80\\ncompute_90\\n" ;;
  --dryrun) echo "#$ TOP={top}" ;;
esac
"""


def configure(tmp_path: Path, release: str, by_script: bool = False, **environment: str) -> str:
    """What setup.py says with a toolkit of that release, named by CUDA_HOME or found through a script on the path."""
    home, scripts = tmp_path / "toolkit", tmp_path / "scripts"
    for path in (home / "bin/nvcc", home / "include/cuda_runtime.h", scripts / "nvcc"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(NVCC.format(release=release, top=home / "bin/.."))
        path.chmod(0o755)
    named = ("CUDA_HOME", "CUDA_PATH", "FASTNORM_CUDA", "TORCH_CUDA_ARCH_LIST")
    clean = {k: v for k, v in os.environ.items() if k not in named}
    found = {"PATH": f"{scripts}:{os.environ['PATH']}"} if by_script else {"CUDA_HOME": str(home)}
    command = [sys.executable, "setup.py", "--name"]
    done = subprocess.run(command, cwd=ROOT, env={**clean, **found, **environment}, capture_output=True, text=True)
    return (done.stderr if done.returncode else done.stdout).strip()


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch that was built for CUDA")
def test_setup_says_what_is_wrong_before_it_compiles(tmp_path: Path) -> None:
    right, major = torch.version.cuda, int(torch.version.cuda.split(".")[0])
    wrong = f"{major - 1}.8"
    assert configure(tmp_path, right, by_script=True) == "fastnorm"
    for by_script in (False, True):
        said = configure(tmp_path, wrong, by_script)
        assert f"needs a CUDA {major} toolkit, but {tmp_path / 'toolkit'} is CUDA {major - 1}: set CUDA_HOME" in said
    assert configure(tmp_path, wrong, FASTNORM_CUDA="0") == "fastnorm"
    nothing = {"CUDA_HOME": str(tmp_path)}  # a toolkit that is not there
    assert f"no CUDA toolkit (bin/nvcc, include/cuda_runtime.h) in {tmp_path}" in configure(tmp_path, right, **nothing)
    assert configure(tmp_path, right, FASTNORM_CUDA="0", **nothing) == "fastnorm"
    said = configure(tmp_path, right, TORCH_CUDA_ARCH_LIST="8.0;7.0")
    assert "cannot compile for 7.0, only for [80, 90]" in said
    said = configure(tmp_path, right, TORCH_CUDA_ARCH_LIST="Hopper")
    assert "has entries as 9.0 or 9.0+PTX, got 'Hopper'" in said


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA")
def test_setup_does_not_leave_out_what_is_asked_for(tmp_path: Path) -> None:
    assert configure(tmp_path, "13.0") == "fastnorm"
    assert configure(tmp_path, "13.0", FASTNORM_CUDA="1").endswith("was built without CUDA")


# ---- devices


@needs_device
def test_tensors_on_two_devices() -> None:
    x = torch.randn(4, 3, 5, 5, device="cuda")
    wrong: dict[str, Callable[[], Tensor]] = {
        "batch_norm: weight": lambda: fn.batch_norm(x, None, None, torch.ones(3), training=True),
        "batch_norm: running_mean": lambda: fn.batch_norm(x, torch.zeros(3), torch.ones(3)),
        "batch_norm: num_batches_tracked": lambda: fn.batch_norm(
            x, None, None, training=True, num_batches_tracked=torch.tensor(0)
        ),
        "group_norm: residual": lambda: fn.group_norm(x, 1, residual=x.cpu()),
        "layer_norm: bias": lambda: fn.layer_norm(x, (5,), None, torch.ones(5)),
    }
    for start, call in wrong.items():
        with pytest.raises(RuntimeError, match=rf"^{start} must be on cuda:0 like input, got cpu"):
            call()
    with pytest.raises(RuntimeError, match="weight must be on cpu like input, got cuda:0"):
        fn.batch_norm(x.cpu(), None, None, torch.ones(3, device="cuda"), training=True)


@needs_device
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@every_case
def test_a_device_that_is_not_the_current_one(case: Case) -> None:
    tensors = case.inputs(case.shapes[1], torch.float32, "cuda:1")
    here = differentiate(case.fastnorm, [t.to("cuda:0") for t in tensors], cotangent(tensors[0]).to("cuda:0"))
    there = differentiate(case.fastnorm, tensors, cotangent(tensors[0]))
    assert torch.cuda.current_device() == 0 and there[0].device.index == 1
    for a, b in zip((here[0], *here[1]), (there[0], *there[1]), strict=True):
        assert torch.equal(a.cpu(), b.cpu())


# ---- streams


@needs_device
@every_case
def test_nothing_waits_for_the_device(case: Case) -> None:
    tensors = case.inputs(case.shapes[1], torch.float32, "cuda")
    dy = cotangent(tensors[0])
    differentiate(case.fastnorm, tensors, dy)  # what a case makes once
    torch.cuda.set_sync_debug_mode("error")
    try:
        differentiate(case.fastnorm, tensors, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_device
@every_case
def test_the_current_stream_is_used(case: Case) -> None:
    """The inputs are written late, on the same stream: a kernel on another one would read what was there before."""
    tensors = case.inputs(case.shapes[2], torch.float32, "cuda")
    dy = cotangent(tensors[0])
    wanted = differentiate(case.fastnorm, tensors, dy)
    late = [torch.full_like(t, float("nan")) for t in (*tensors, dy)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # cycles: ten milliseconds
        for t, value in zip(late, (*tensors, dy), strict=True):
            t.copy_(value)
        got = differentiate(case.fastnorm, late[:-1], late[-1])
    stream.synchronize()
    for a, b in zip((got[0], *got[1]), (wanted[0], *wanted[1]), strict=True):
        assert torch.equal(a, b)


# ---- graphs


def captured(function: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """The graph of a call, and where its results lie after each replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # what is made at the first call
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@needs_device
@pytest.mark.parametrize("layout", (lambda t: t, channels_last), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("case", GRAPHED, ids=str)
def test_a_graph_computes_with_new_inputs(case: Case, layout: Callable[[Tensor], Tensor]) -> None:
    for shape in case.shapes[1:4]:
        made = case.inputs(shape, torch.float32, "cuda")
        tensors = [layout(t) if t.dim() == made[0].dim() else t for t in made]
        dy = layout(cotangent(made[0]))
        held = [torch.zeros_like(t) for t in (*tensors, dy)]

        def run(held: list[Tensor] = held) -> list[Tensor]:
            y, gradients = differentiate(case.fastnorm, held[:-1], held[-1])
            return [y, *gradients]

        graph, results = captured(run)
        for scale in (1.0, 0.5):
            new = [t * scale for t in (*tensors, dy)]
            y, gradients = differentiate(case.fastnorm, new[:-1], new[-1])
            for t in results:
                t.fill_(float("nan"))
            for t, value in zip(held, new, strict=True):  # after that: a residual's gradient may be dy itself
                t.copy_(value)
            graph.replay()
            for a, b in zip(results, (y, *gradients), strict=True):
                assert torch.equal(a, b)


@needs_device
def test_a_graph_updates_running_statistics_at_each_replay() -> None:
    norm, twin = (fastnorm.BatchNorm2d(5, momentum=None, device="cuda") for _ in range(2))
    x = torch.randn(4, 5, 6, 7, device="cuda")
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    graph, _ = captured(lambda: [norm(x)])
    norm.load_state_dict(before)
    for step in range(3):
        x.normal_(step)
        graph.replay()
        twin(x)
    for key, value in twin.state_dict().items():
        assert torch.equal(norm.state_dict()[key], value), key
    assert int(norm.num_batches_tracked) == 3


@needs_device
@every_dropout
def test_each_replay_draws_another_mask_and_backward_the_same(name: str) -> None:
    x = (torch.rand(64, 33, 5, 7, device="cuda") + 1).requires_grad_()

    def run() -> list[Tensor]:
        y = DROPOUTS[name](x, 0.5, True)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return [y.detach(), dx]

    graph, (y, dx) = captured(run)
    masks = []
    torch.cuda.manual_seed(11)
    for _ in range(3):
        graph.replay()
        masks.append(y > 0)  # alpha' is negative
        assert torch.equal(dx != 0, masks[-1])
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    torch.cuda.manual_seed(11)
    for mask in masks:
        eager = DROPOUTS[name](x.detach(), 0.5, True)
        assert torch.equal(mask, eager > 0)  # a graph takes from the generator what an eager call takes


@needs_device
def test_a_generator_of_the_cpu_is_refused_in_a_graph() -> None:
    x, generator = torch.ones(100, device="cuda"), torch.Generator().manual_seed(0)
    with pytest.raises(RuntimeError, match="generator must not be on cpu while a CUDA graph is captured"):
        captured(lambda: [fn.dropout(x, generator=generator)])


# ---- the masks of dropout


@needs_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@every_dropout
def test_one_seed_gives_one_mask_on_both_devices(name: str, dtype: torch.dtype) -> None:
    for shape in ((3, 10, 6, 7), (2, 17, 5, 5), (1, 3, 70, 3), (64, 40, 1, 9), (2, 129, 33, 31)):
        for layout in (lambda t: t, channels_last):
            x = layout(torch.ones(shape, dtype=dtype))
            masks = [
                DROPOUTS[name](t, 0.4, True, generator=torch.Generator().manual_seed(3)).cpu() > 0
                for t in (x, x.cuda())
            ]
            assert torch.equal(*masks)


@needs_device
def test_the_random_state_of_the_device_is_respected() -> None:
    x = torch.ones(1000, device="cuda")
    torch.cuda.manual_seed(5)
    first, second = fn.dropout(x), fn.dropout(x)
    assert not torch.equal(first, second)
    torch.cuda.manual_seed(5)
    assert torch.equal(fn.dropout(x), first)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        assert torch.equal(fn.dropout(x), first)
    assert torch.equal(fn.dropout(x), second)
    generator = torch.Generator("cuda").manual_seed(5)
    assert torch.equal(fn.dropout(x, generator=generator), first)
    with pytest.raises(RuntimeError, match="cpu"):
        fn.dropout(x.cpu(), generator=generator)


@needs_device
@pytest.mark.parametrize("use_reentrant", (True, False))
def test_checkpointing_draws_the_same_mask_again(use_reentrant: bool) -> None:
    layer = nn.Sequential(nn.Linear(50, 50), fastnorm.Dropout(0.5), nn.Linear(50, 50)).cuda()
    x = torch.randn(8, 50, device="cuda")
    results = []
    for run in (layer, lambda v: checkpoint(layer, v, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        v = x.clone().requires_grad_()
        run(v).square().sum().backward()
        results.append(v.grad)
    assert torch.equal(*results)


# ---- sizes beyond 32 bits

BEYOND = 2**31


def memory() -> int:
    """Bytes of the device."""
    return torch.cuda.get_device_properties(0).total_memory if "cuda" in DEVICES else 0


@pytest.mark.skipif(memory() < 40 << 30, reason="needs a device of 40 GB")
def test_more_elements_than_32_bits_count() -> None:
    """The end of a tensor of 4 GiB against the same numbers alone, which may be added in another order."""
    rows, length = BEYOND // 4096 + 3, 4096
    x = torch.randn(rows, length, device="cuda", dtype=torch.bfloat16)
    tail = x[-2:].clone()
    torch.testing.assert_close(fn.layer_norm(x, (length,))[-2:], fn.layer_norm(tail, (length,)))
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "group_norm": lambda t: fn.group_norm(t, 4),
        "local_response_norm": lambda t: fn.local_response_norm(t, 5),
        "batch_norm": lambda t: fn.batch_norm(t, t.new_zeros(t.shape[1]), t.new_ones(t.shape[1])),
    }
    for shape in ((64, 8, 8), (16, 16, 16)):
        for layout in (lambda t: t, channels_last):
            images, end = layout(x.view(rows, *shape)), layout(tail.view(2, *shape))
            for function in functions.values():
                torch.testing.assert_close(function(images)[-2:], function(end))
            last = fn.batch_norm(images, None, None, training=True)[:, -1].double()
            assert abs(last.mean().item()) < 1e-3 and abs(last.var().item() - 1) < 1e-2
    dropped = fn.dropout(torch.ones_like(x), 0.5)[-25:] == 0
    assert abs(dropped.float().mean().item() - 0.5) < 0.01  # six standard deviations
