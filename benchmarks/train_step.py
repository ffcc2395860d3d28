"""``python benchmarks/train_step.py [--out DIR]``: training steps on torch.nn, converted, fused, and with recompute.

For each network and layout: the time of a step (zero_grad, forward, loss, backward, SGD), on torch.nn, converted,
converted and fused, and that under :class:`fastnorm.recompute`, by turns in one process; the share of torch's step that
normalisation, activation, addition and dropout take; the most memory allocated in a step; and the
bytes kept for backward. On a CPU the allocator keeps freed memory, or else what the system takes to provide it anew
scatters more than what is to be seen. Prints a Markdown table; with ``--out`` it also writes train_step.md and
train_step.json there.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from memory import peak_bytes, saved_bytes
from report import machine_line, markdown_table
from timing import by_turns, clock_of
from torch import nn
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]

import networks  # noqa: E402
from ladder.allocator import keep_freed_memory  # noqa: E402
from machine import commit_info, machine_info  # noqa: E402

import fastnorm  # noqa: E402


def resnet18() -> nn.Module:
    """ResNet-18 for 32x32 images: no pooling behind its first convolution, which has a stride of 1."""
    model = networks.ResNet((64, 128, 256, 512))
    model.maxpool = nn.Identity()
    return model


def vgg() -> nn.Module:
    """Two convolutions of 3x3 with BatchNorm and ReLU and a pool at each of 32, 64 and 128 channels."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (32, 64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 10))


def vit() -> nn.Module:
    return networks.ViT(dim=192, depth=6, heads=3, p=0.1)


@dataclass(frozen=True)
class Training:
    """A network, how many 32x32 images it takes at once, and the layouts it is measured in."""

    name: str
    make: Callable[[], nn.Module]
    batch: int
    layouts: tuple[str, ...] = ("contiguous", "channels_last")


TRAININGS = (
    Training("ResNet-18", resnet18, 64),
    Training("VGG 32-64-128", vgg, 256),
    Training("ViT, 6 blocks of 192", vit, 256, ("contiguous",)),
)

RECOMPUTED = "fused, outputs recomputed"  # under fastnorm.recompute

# torch's names of what fastnorm takes over; mul and div_ are dropout's. An addition is one of forward: in backward
# autograd adds up gradients, and then the optimiser has its own.
OURS = re.compile(
    r"aten::((native_|cudnn_)?(batch_norm|layer_norm|relu_?|threshold|gelu|dropout|bernoulli_?)(_backward)?|mul|div_)"
)
ADDITION = re.compile(r"aten::add_?")
NOT_FORWARD = re.compile(r"autograd::engine|Optimizer\.")  # how torch.profiler's names of these begin


@dataclass(frozen=True)
class Result:
    """One library's step; seconds and bytes."""

    network: str
    batch: int
    layout: str
    device: str
    library: str
    median: float
    quartiles: tuple[float, float]
    rounds: int
    share_in_norms: float | None  # of torch's step, in normalisation, activation, addition and dropout
    peak_bytes: int
    saved_bytes: int


def variants(training: Training) -> dict[str, nn.Module]:
    """The same network with the same weights on torch.nn, converted, converted and fused, and that for RECOMPUTED."""
    torch.manual_seed(0)
    model = training.make().train()
    converted = fastnorm.convert(copy.deepcopy(model))
    fused = fastnorm.fuse(copy.deepcopy(converted))
    return {"torch": model, "converted": converted, "fused": fused, RECOMPUTED: copy.deepcopy(fused)}


def context_of(library: str) -> fastnorm.recompute | None:
    """What its forward pass runs in."""
    return fastnorm.recompute() if library == RECOMPUTED else None


def step_of(library: str, model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> Callable[[], Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    context = context_of(library) or nullcontext()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with context:
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()

    return step


class OpSeconds(TorchDispatchMode):
    """The time on a CPU that torch spends in its ops, and in those that fastnorm takes over, forward and backward.

    torch.profiler would tell it, too, but under it some take several times as long as without.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ours = self.all = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        result = function(*args, **(kwargs or {}))
        spent = time.perf_counter() - start
        self.all += spent
        name = function.overloadpacket._qualified_op_name
        if OURS.fullmatch(name) or (torch.is_grad_enabled() and ADDITION.fullmatch(name)):
            self.ours += spent
        return result


def share_in_norms(step: Callable[[], Any], device: str) -> float:
    """Of the time that torch's ops take in a step, the part in what fastnorm takes over; both of the same steps."""
    if device == "cpu":
        with OpSeconds() as ops:
            for _ in range(3):
                step()
        return ops.ours / ops.all
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        for _ in range(3):
            step()
    return share_of_kernels(profile.events() or ())


def share_of_kernels(events: Iterable[Any]) -> float:
    """Of the kernels' time in a profile, the part of those that OURS have started, themselves or through other ops.

    A kernel is an event of the profile, too, beside the op that started it.
    """
    roots = [event for event in events if event.device_type == DeviceType.CPU and event.cpu_parent is None]

    def ours(event: Any, is_forward: bool = True) -> float:
        is_forward = is_forward and not NOT_FORWARD.match(event.name)
        if OURS.fullmatch(event.name) or (is_forward and ADDITION.fullmatch(event.name)):
            return event.device_time_total
        return sum(ours(child, is_forward) for child in event.cpu_children)

    return sum(map(ours, roots)) / sum(event.device_time_total for event in roots)


def measure(training: Training, layout: str, device: str, seconds: float) -> list[Result]:
    memory_format = torch.contiguous_format if layout == "contiguous" else torch.channels_last
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(training.batch, 3, 32, 32, generator=generator).to(device, memory_format=memory_format)
    labels = torch.randint(10, (training.batch,), generator=generator).to(device)
    models = {name: m.to(device, memory_format=memory_format) for name, m in variants(training).items()}
    steps = {name: step_of(name, model, x, labels) for name, model in models.items()}
    times = by_turns({name: lambda step=step: step for name, step in steps.items()}, clock_of(device), seconds=seconds)
    share = share_in_norms(steps["torch"], device)
    for model in models.values():
        model.zero_grad()  # memory that is freed under the profiler, but was not allocated under it, has it complain
    return [
        Result(
            training.name,
            training.batch,
            layout,
            device,
            name,
            times[name].median,
            times[name].quartiles,
            len(times[name].rounds),
            share if name == "torch" else None,
            peak_bytes(steps[name], device),
            saved_bytes(lambda model=model: F.cross_entropy(model(x), labels), model.parameters(), context_of(name)),
        )
        for name, model in models.items()
    ]


def markdown(results: list[Result]) -> str:
    """A line a step; "saved" is the part of what torch spends in norm, activation and add that is gone."""
    header = ["network", "layout", "layers", "step ms", "speed-up", "in norm, activation, add, dropout", "saved of it"]
    header += ["peak MiB", "kept MiB", "kept, of torch's"]
    lines = []
    for result in results:
        if result.library == "torch":
            torchs = result
        spread = (result.quartiles[1] - result.quartiles[0]) / 2 / result.median
        ours = result.library != "torch"
        saved = (torchs.median - result.median) / (torchs.median * (torchs.share_in_norms or 0.0))
        lines.append([
            f"{result.network}, batch {result.batch}",
            result.layout,
            result.library,
            f"{result.median * 1e3:.0f} ±{spread:.0%}",
            f"{torchs.median / result.median:.2f}" if ours else "",
            "" if ours else f"{torchs.share_in_norms:.0%}",
            f"{saved:.0%}" if ours else "",
            f"{result.peak_bytes / 2**20:.0f}",
            f"{result.saved_bytes / 2**20:.0f}",
            f"{result.saved_bytes / torchs.saved_bytes:.0%}" if ours else "",
        ])  # fmt: skip
    return "\n".join(markdown_table(header, lines, 3)) + "\n"


def main() -> None:
    names = "; ".join(training.name for training in TRAININGS)
    parser = argparse.ArgumentParser(
        description="Whole training steps by turns: torch.nn, converted, fused, and fused with outputs recomputed."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument("--networks", default="", help="only those whose names contain this, of: " + names)
    parser.add_argument("--batch", type=int, help="images at once, if not each network's usual number")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="for the rounds of each network in each layout (default: 20)"
    )
    parser.add_argument("--out", type=Path, help="folder for train_step.md and train_step.json")
    args = parser.parse_args()
    trainings = [training for training in TRAININGS if args.networks.lower() in training.name.lower()]
    if not trainings:
        parser.error(f"--networks: none of {', '.join(t.name for t in TRAININGS)} contains {args.networks!r}")
    if args.batch is not None and args.batch < 1:
        parser.error(f"--batch: at least 1, got {args.batch}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no GPU")
    if not args.seconds >= 0:  # nor NaN
        parser.error(f"--seconds: at least 0, got {args.seconds}")
    if args.out:
        try:
            args.out.mkdir(parents=True, exist_ok=True)  # before the minutes that it takes
        except OSError as error:
            parser.error(f"--out: {error}")
    if args.device == "cpu":
        keep_freed_memory()
    results: list[Result] = []
    for training in trainings:
        for layout in training.layouts:
            sized = Training(training.name, training.make, args.batch or training.batch)
            results += measure(sized, layout, args.device, args.seconds)
    table = markdown(results)
    print(table, end="")
    if args.out:
        machine, commit = machine_info(args.device), commit_info()
        content = {"machine_info": machine, "commit_info": commit, "results": [asdict(result) for result in results]}
        (args.out / "train_step.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        about = machine_line(machine, [commit])
        (args.out / "train_step.md").write_text(f"{about}\n\n{table}", encoding="utf-8")


if __name__ == "__main__":
    main()
