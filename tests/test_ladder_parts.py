"""The parts of the CIFAR-10 ladder: augmentation, mixing, sampling, schedules, penalties, averaging, networks."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ladder import augment, averaging, data, evaluate, mixing, models, norms, optimisers, rungs, sampling, schedules
from ladder.augment import RandomErasing
from ladder_small import SMALL, small_images


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 64) -> torch.Tensor:
    """Normalised images, channels last."""
    return evaluate.normalise(small_images().train_images[:count])


# Augmentation

AUGMENTATIONS = sorted(
    {step for rung in rungs.RUNGS for step in rungs.recipe_of(rung, SMALL).augment}, key=lambda step: repr(step)
)


@pytest.mark.parametrize("step", AUGMENTATIONS, ids=lambda step: type(step).__name__)
def test_augmentation_keeps_the_form_and_draws_by_image(step: augment.Augmentation) -> None:
    images = pictures(1).expand(32, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    kept = images.clone()
    changed = step(images, generator())
    assert (changed.shape, changed.dtype) == (images.shape, images.dtype)
    assert changed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, kept)
    assert len({image.numpy().tobytes() for image in changed}) > 1  # the same image, and not the same result
    assert torch.equal(changed, step(images, generator()))
    assert not torch.equal(changed, step(images, generator(1)))


def test_random_erasing_statistics() -> None:
    count = 20_000
    images = torch.ones(count, 2, 32, 32).contiguous(memory_format=torch.channels_last)
    erased = RandomErasing(p=0.75, scale=(0.01, 0.3))(images, torch.Generator().manual_seed(0))
    assert erased.is_contiguous(memory_format=torch.channels_last)
    assert images.min() == 1
    assert torch.equal(erased[:, 0], erased[:, 1])
    hole = erased[:, 0] == 0
    area = hole.sum((1, 2))
    touched = area > 0
    # Four standard deviations of a share of 20,000 draws.
    assert touched.float().mean().item() == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / count) ** 0.5)
    side = area[touched].double().sqrt()
    assert torch.equal(side, side.round())
    height, width = (hole.any(axis).sum(1)[touched] for axis in (2, 1))
    assert torch.equal(height, width)
    assert torch.equal(height * width, area[touched])
    assert (side.min().item(), side.max().item()) == (3, 18)  # round(sqrt(0.01 * 1024)), round(sqrt(0.3 * 1024))
    # Area is uniform, so its mean is 0.155 * 1024; rounding the side moves that by far less than 1 %.
    assert area[touched].float().mean().item() == pytest.approx(0.155 * 1024, rel=0.02)
    # Squares reach every corner, and the middle is hit most.
    share = hole.float().mean(0)
    assert min(share[0, 0], share[0, -1], share[-1, 0], share[-1, -1]) > 0
    assert share[16, 16] > 2 * share[0, 0]
    # Fresh draws for every image, the same draws from the same generator state.
    assert not torch.equal(hole[0], hole[1])
    again = RandomErasing(p=0.75, scale=(0.01, 0.3))(images, torch.Generator().manual_seed(0))
    assert torch.equal(erased, again)


def test_random_erasing_with_p_0_leaves_the_images_alone() -> None:
    images = torch.randn(16, 3, 32, 32)
    assert torch.equal(RandomErasing(p=0.0)(images, torch.Generator()), images)


def test_cutout_covers_its_square_and_hangs_over_the_edge() -> None:
    cut = augment.Cutout(16)(torch.ones(4_000, 1, 32, 32), generator())
    area = (cut == 0).sum((1, 2, 3))
    assert area.max() == 16 * 16
    assert area.min() < 100
    # The middle pixel is hit when the centre is within 8 pixels on both axes: a quarter of the draws.
    assert (cut[:, 0, 16, 16] == 0).float().mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 4_000) ** 0.5)


def test_gaussian_noise_is_on_half_the_images() -> None:
    noise = augment.GaussianNoise(std=0.01, p=0.5)(torch.zeros(2_000, 3, 8, 8), generator())
    touched = noise.flatten(1).any(1)
    assert touched.float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 2_000**0.5)
    assert noise[touched].std().item() == pytest.approx(0.01, rel=0.02)


def test_flip_mirrors_half_the_images_left_to_right() -> None:
    images = pictures(1).expand(2_000, -1, -1, -1)
    flipped = augment.HorizontalFlip()(images, generator())
    mirrored = (flipped == images.flip(3)).all(3).all(2).all(1)
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 2_000**0.5)
    assert torch.equal(flipped[~mirrored], images[~mirrored])


def test_random_crop_shifts_by_whole_pixels() -> None:
    image = pictures(1)
    shifted = augment.RandomCrop(2)(image.expand(500, -1, -1, -1), generator())
    padded = F.pad(image, (2, 2, 2, 2))[0]
    wanted = {padded[:, i : i + 32, j : j + 32].numpy().tobytes(): (i, j) for i in range(5) for j in range(5)}
    got = {wanted[one.contiguous().numpy().tobytes()] for one in shifted}  # KeyError: it is none of the 25 shifts
    assert len(got) == 25


def test_rotation_turns_about_the_middle() -> None:
    # A blob to the right of the middle, at a distance of 10 pixels.
    y, x = torch.meshgrid(torch.arange(32.0) - 15.5, torch.arange(32.0) - 15.5, indexing="ij")
    blob = torch.exp(-((x - 10) ** 2 + y**2) / 8).view(1, 1, 32, 32).expand(500, -1, -1, -1)
    turned = augment.Rotation(30.0)(blob, generator())[:, 0]
    mass = turned.sum((1, 2))
    centre_x, centre_y = (turned * x).sum((1, 2)) / mass, (turned * y).sum((1, 2)) / mass
    # Bilinear sampling moves the centre by a small part of a pixel.
    torch.testing.assert_close(torch.hypot(centre_x, centre_y), torch.full((500,), 10.0), rtol=0, atol=0.1)
    angle = torch.rad2deg(torch.atan2(centre_y, centre_x))
    assert angle.min() < -27 and angle.max() > 27 and angle.abs().max() < 30.5
    straight = augment.Rotation(0.0)(blob, generator())
    torch.testing.assert_close(straight, blob.contiguous(), rtol=0, atol=1e-5)  # bilinear weights in float32


def test_crop_and_resize_shows_a_part_of_the_image() -> None:
    # Each pixel holds its own coordinate, so what a crop shows can be read off its ends.
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    images = torch.stack([y, x])[None].expand(2_000, -1, -1, -1)
    crops = augment.CropAndResize(scale=(0.25, 1.0), ratio=(0.75, 4 / 3))(images, generator())
    # Columns 4 and 27 are clear of the edges, where half a pixel of the outside is mixed in.
    height = (crops[:, 0, 27, 16] - crops[:, 0, 4, 16]) / (y[27, 0] - y[4, 0])
    width = (crops[:, 1, 16, 27] - crops[:, 1, 16, 4]) / (x[0, 27] - x[0, 4])
    area = height * width
    assert 0.25 - 0.01 < area.min() < 0.28 and area.max() < 1.01
    assert area.mean().item() == pytest.approx(0.625, rel=0.05)
    unclipped = area < 0.7
    ratio = (width / height)[unclipped]
    assert 0.74 < ratio.min() < 0.77 and 1.29 < ratio.max() < 1.35
    assert (width / height).log().mean().abs() < 0.02
    whole = augment.CropAndResize(scale=(1.0, 1.0))(images[:1], generator())
    torch.testing.assert_close(whole, images[:1].contiguous(), rtol=0, atol=1e-5)


def test_colour_jitter_without_strength_changes_nothing_and_keeps_edges() -> None:
    images = pictures(16)
    same = augment.ColourJitter(0.0, 0.0, 0.0)(images, generator())
    torch.testing.assert_close(same, images)
    brighter = augment.ColourJitter(0.5, 0.0, 0.0)(images, generator()) - images
    flat = brighter.flatten(1)
    torch.testing.assert_close(flat, flat[:, :1].expand_as(flat))
    paler = augment.ColourJitter(0.0, 0.0, 0.5)(images, generator())
    torch.testing.assert_close(paler.mean(1), images.mean(1))


# Mixing


@pytest.mark.parametrize("mix", [mixing.MixUp(), mixing.CutMix()], ids=["mixup", "cutmix"])
def test_targets_are_the_shares_of_the_images(mix: mixing.Mixing) -> None:
    # Image i is the constant i in the shape of a one-hot code: the mixed image tells what it is made of.
    labels = torch.arange(10)
    images = torch.eye(10).view(10, 10, 1, 1).expand(-1, -1, 16, 16)
    shares = []
    for seed in range(50):
        mixed, targets = mix(images, labels, generator(seed))
        torch.testing.assert_close(mixed.mean((2, 3)), targets, rtol=0, atol=1e-5)
        shares.append(targets.diagonal().min().item())
    shares.sort()
    assert shares[0] < 0.2 and shares[-1] > 0.9
    if isinstance(mix, mixing.CutMix):
        assert set(mixed.unique().tolist()) <= {0.0, 1.0}


# Sampling


def test_long_tail_keeps_a_geometric_share() -> None:
    labels = torch.arange(1_000) % 10
    kept = sampling.long_tail(labels, 0.1, 10)
    counts = torch.bincount(labels[kept])
    assert counts.tolist() == [round(100 * 0.1 ** (c / 9)) for c in range(10)]
    assert torch.equal(kept, kept.sort().values)


def test_best_weights_are_of_one_set_of_classes() -> None:
    for rung in rungs.RUNGS:
        recipe = rungs.recipe_of(rung, SMALL)
        compares = recipe.patience is not None or any(stage.from_best for stage in recipe.stages)
        assert not compares or len({stage.classes for stage in recipe.stages}) == 1, rung.name


def test_resampling_balances_the_classes() -> None:
    labels = torch.tensor([0] * 7 + [1] * 3 + [2])
    plain = sampling.epoch_indices(labels, None, generator())
    assert sorted(plain.tolist()) == list(range(11))
    over = sampling.epoch_indices(labels, "over", generator())
    assert torch.bincount(labels[over]).tolist() == [7, 7, 7]
    assert set(torch.bincount(over)[7:10].tolist()) == {2, 3}
    under = sampling.epoch_indices(labels, "under", generator())
    assert torch.bincount(labels[under]).tolist() == [1, 1, 1]
    assert len({sampling.epoch_indices(labels, "under", generator(seed))[0].item() for seed in range(30)}) > 3
    with pytest.raises(ValueError, match="resample must be None or one of over, under, got 'both'"):
        sampling.epoch_indices(labels, "both", generator())


def test_class_weights_make_up_for_frequency() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3)
    weights = sampling.inverse_frequency(labels, 3)
    assert weights.tolist() == [0.5, 1.0, 0.0]
    assert weights[labels].sum() == pytest.approx(6 * 0.5 + 3 * 1.0)


# Schedules


@pytest.mark.parametrize(
    "schedule, wanted",
    [
        (schedules.constant, [1.0, 1.0, 1.0, 1.0, 1.0]),
        (schedules.Exponential(0.96), [1.0, 1.0, 0.96**2, 0.96**5, 0.96**9]),
        (schedules.Step(0.1, (0.5, 0.75)), [1.0, 1.0, 1.0, 0.1, 0.01]),
        (schedules.Cosine(), [1.0, *(0.5 + 0.5 * math.cos(math.pi * t / 10) for t in (0.5, 2.5, 5.0, 9.5))]),
        (schedules.Linear(), [1.0, 0.95, 0.75, 0.5, 0.05]),
        (schedules.WarmUp(schedules.Linear(), 0.2), [0.0, 0.25, 1 - 0.5 / 8, 1 - 3 / 8, 1 - 7.5 / 8]),
    ],
    ids=["constant", "exponential", "step", "cosine", "linear", "warm-up"],
)
def test_schedule(schedule: schedules.Schedule, wanted: list[float]) -> None:
    got = [schedule(epoch, 10.0) for epoch in (0.0, 0.5, 2.5, 5.0, 9.5)]
    assert got == pytest.approx(wanted)


# Penalties


def test_penalty_gradient_is_the_gradient_of_the_penalty() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(5, 2))
    kernels = optimisers.kernels_of(model)
    assert [kernel.dim() for kernel in kernels] == [4, 2]
    l1, l2 = 0.03, 0.2
    penalty = sum(l1 * kernel.abs().sum() + l2 * kernel.square().sum() for kernel in kernels)
    wanted = torch.autograd.grad(penalty, kernels)
    for kernel in kernels:
        kernel.grad = torch.ones_like(kernel)
    optimisers.add_penalty_gradient(kernels, l1, l2)
    for kernel, gradient in zip(kernels, wanted, strict=True):
        torch.testing.assert_close(kernel.grad, 1 + gradient)


# Averaging


class Bright(torch.nn.Module):
    """Logits that depend on the left half of the image alone, so that mirror images differ."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[:, 0, :, :16].mean((1, 2)), torch.zeros(len(x))], 1)


def test_flips_and_crops_average_probabilities() -> None:
    images = pictures(8)
    mirrored = averaging.FlipsAndCrops(0)(Bright(), images).exp()
    wanted = (Bright()(images).softmax(1) + Bright()(images.flip(3)).softmax(1)) / 2
    torch.testing.assert_close(mirrored, wanted)
    ten = averaging.FlipsAndCrops(2)(Bright(), images).exp()
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    views = [padded[:, :, i : i + 32, j : j + 32] for i, j in ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2))]
    wanted = torch.stack([Bright()(v).softmax(1) for view in views for v in (view, view.flip(3))]).mean(0)
    torch.testing.assert_close(ten, wanted)
    torch.testing.assert_close(ten.sum(1), torch.ones(8))


def test_monte_carlo_averages_over_masks() -> None:
    recipe = rungs.recipe_of(rungs.find("dropout"), SMALL)
    model = models.build_model(recipe, "fastnorm", seed=0).eval()
    images = pictures(8)
    torch.manual_seed(0)
    mean = averaging.MonteCarlo(3)(model, images).exp()
    torch.testing.assert_close(mean.sum(1), torch.ones(8))
    assert not torch.allclose(mean, model(images).softmax(1), atol=1e-4)
    assert not any(module.training for module in model.modules())


# Images and networks


def test_normalise() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    got = evaluate.normalise(images)
    assert got.is_contiguous(memory_format=torch.channels_last)
    for channel in range(3):
        wanted = (images[:, channel].double() / 255 - data.MEAN[channel]) / data.STD[channel]
        torch.testing.assert_close(got[:, channel].double(), wanted, rtol=1e-5, atol=1e-5)  # a few float32 roundings


def comparable() -> list[rungs.Rung]:
    """Rungs whose networks differ, for which torch.nn has every layer."""
    seen: dict[object, rungs.Rung] = {}
    for rung in rungs.RUNGS:
        recipe = rungs.recipe_of(rung, SMALL)
        if not models.needs_fastnorm(recipe):
            seen.setdefault((recipe.network, recipe.norm, recipe.skip, recipe.capacity, recipe.dropout), rung)
    return list(seen.values())


@pytest.mark.parametrize("rung", comparable(), ids=lambda rung: rung.name)
def test_both_backends_are_the_same_model(rung: rungs.Rung) -> None:
    recipe = replace(rungs.recipe_of(rung, SMALL), dropout=0.0)  # the two draw different masks
    ours, torchs = (models.build_model(recipe, backend, seed=3) for backend in models.BACKENDS)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    for key, value in ours.state_dict().items():
        if key.endswith(("._u", "._v")):  # rounded by other orders of summation in spectral_norm's first iterations
            torch.testing.assert_close(value, torchs.state_dict()[key], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(value, torchs.state_dict()[key]), key
    biases = [module.bias is not None for module in ours.modules() if isinstance(module, torch.nn.Conv2d)]
    assert set(biases) == {recipe.norm not in norms.WITH_BIAS}
    x = pictures()
    # Two float32 implementations of a network of up to nine layers.
    for _ in range(2):
        torch.testing.assert_close(ours.train()(x), torchs.train()(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x), rtol=1e-4, atol=1e-4)


def test_fastnorm_backend_is_fused() -> None:
    import fastnorm

    model = models.build_model(rungs.recipe_of(rungs.find("skip"), SMALL), "fastnorm", seed=0)
    layers = list(model.modules())
    assert not any(type(layer) in (torch.nn.BatchNorm2d, torch.nn.Dropout, torch.nn.ReLU) for layer in layers)
    norm_layers = [layer for layer in layers if isinstance(layer, fastnorm.BatchNorm2d)]
    assert [layer.activation for layer in norm_layers] == ["relu"] * 4
    residual = model.stages[0][1]
    assert isinstance(residual, models.Residual)
    seen = []
    residual.norm.register_forward_hook(lambda m, args, kwargs, y: seen.append(kwargs), with_kwargs=True)
    model(pictures(2))
    assert set(seen[0]) == {"residual"}
    assert any(isinstance(layer, fastnorm.Dropout) for layer in layers)
    with pytest.raises(ValueError, match="backend must be one of fastnorm, torch, got 'numpy'"):
        models.build_model(SMALL, "numpy", seed=0)


@pytest.mark.parametrize("after_pooling, rates", [(True, [0.25, 0.25, 0.5]), (False, [0.5])])
def test_where_dropout_acts(after_pooling: bool, rates: list[float]) -> None:
    recipe = rungs.recipe_of(rungs.find("dropout"), replace(SMALL, dropout_after_pooling=after_pooling))
    model = models.build_model(recipe, "fastnorm", seed=0)
    assert [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)] == rates
    assert not any(isinstance(m, torch.nn.Dropout) for m in models.build_model(SMALL, "fastnorm", seed=0).modules())


def test_stochastic_depth_rises_with_depth() -> None:
    import fastnorm

    model = models.build_model(rungs.recipe_of(rungs.find("stochastic_depth"), SMALL), "fastnorm", seed=0)
    rates = [layer.p for layer in model.modules() if isinstance(layer, fastnorm.DropPath)]
    assert rates == pytest.approx([0.1, 0.2])


def test_he_initialisation() -> None:
    model = models.build_model(replace(SMALL, sizes=((64, 128),), dense=512), "torch", seed=0)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            scale = models.HEAD_SCALE if module is model.head else 1.0
            variance = scale**2 * 2 / module.weight[0].numel()
            # The sample variance of n normal numbers has a relative standard deviation of sqrt(2 / n).
            assert module.weight.var().item() == pytest.approx(variance, rel=5 * (2 / module.weight.numel()) ** 0.5)
            assert not module.bias.any()


def test_a_new_head_for_a_network_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator is the host's. A GPU's tensor takes none but its own; the meta device, in its place here, any."""
    drawn = torch.nn.init.kaiming_normal_

    def on_one_device(tensor: torch.Tensor, *, generator: torch.Generator, **settings: str) -> torch.Tensor:
        assert tensor.device == generator.device
        return drawn(tensor, generator=generator, **settings)

    monkeypatch.setattr(torch.nn.init, "kaiming_normal_", on_one_device)
    model = models.build_model(SMALL, "torch", seed=0).to("meta")
    models.reset_head(model, generator())
    assert model.head.weight.is_meta


def test_norms_are_what_they_are_called() -> None:
    made = {kind: norms.make_norm(kind, 32) for kind in norms.NORMS}
    assert (made["group"].num_groups, made["instance"].affine) == (4, True)
    assert made["layer"].layer_norm.normalized_shape == (32,)
    assert (made["lrn_inter"].size, made["lrn_intra"].size, made["lrn_intra"].region) == (5, 3, "intra")
    assert {type(made[kind]) for kind in ("weight", "spectral")} == {torch.nn.Identity}


def test_unknown_norm_is_named() -> None:
    with pytest.raises(ValueError, match=r"norm must be None or one of batch, .* got 'bath'"):
        norms.make_norm("bath", 8)


# Memory

# How much more malloc has from the system (glibc's mallinfo2 in malloc.h: the heaps, and blocks that are mapped) after
# the first tensors, 128 MiB, were freed. Later ones may find holes in the heap that no setting gives back.
COUNT_KEPT = """
import ctypes, sys
import torch
from ladder.allocator import keep_freed_memory

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Information(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]

try:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
except (AttributeError, OSError, TypeError):
    sys.exit("the allocator is not glibc's, or older than 2.33")
mallinfo2.restype = Information
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def mebibytes():
    memory = mallinfo2()
    return (memory.arena + memory.hblkhd) >> 20
before = mebibytes()
tensors = [torch.ones(size << 20) for size in (4, 4, 4, 20)]
if mebibytes() - before < 100:
    sys.exit("the allocator is not glibc's: that knows nothing of these tensors")
del tensors
print(mebibytes() - before)
"""


def test_freed_memory_is_kept() -> None:
    def mebibytes(how: str) -> int:
        examples = Path(__file__).parent.parent / "examples"
        command = [sys.executable, "-c", COUNT_KEPT, how]
        settings = ("MALLOC_", "GLIBC_TUNABLES")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
        done = subprocess.run(command, cwd=examples, env=environment, capture_output=True, text=True, check=False)
        if "not glibc's" in done.stderr:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    kept, by_default = mebibytes("keep"), mebibytes("default")
    assert kept >= 120  # some fits into what malloc had free
    assert by_default < kept - 32
