"""What the tests of the CIFAR-10 ladder share: a recipe and images that take moments, and no network."""

from __future__ import annotations

import functools
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from ladder import cli, data, rungs
from ladder.recipe import Recipe

SMALL = Recipe(
    epochs=1,
    sizes=((8, 16), (8, 24), (16, 24)),
    resnet_width=4,
    convs_per_stage=2,
    dense=32,
    batch_size=32,
    dropout_after_pooling=True,
)


@functools.cache
def small_images() -> data.Dataset:
    return data.make_synthetic(64, seed=0, val_images=50)


def use_small_synthetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line makes few synthetic images for validation."""
    made = data.make_synthetic
    monkeypatch.setattr(data, "make_synthetic", lambda count, seed: made(count, seed, val_images=50))


def use_small_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line trains on a network and a data set that take moments."""
    use_small_synthetic(monkeypatch)
    monkeypatch.setattr(cli, "PRESETS", {name: rungs.Preset(64, SMALL) for name in rungs.PRESETS})


def no_network(*args: object, **kwargs: object) -> object:
    raise urllib.error.URLError("no route to host")


def records(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8), rng.integers(0, 10, count, dtype=np.uint8)


def write_binary(folder: Path, count: int = 6) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(data.VERSIONS[0].files):
        pixels, labels = records(count, i)
        np.concatenate([labels[:, None], pixels], axis=1).tofile(folder / name)
    return folder
