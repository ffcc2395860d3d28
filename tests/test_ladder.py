"""The CIFAR-10 ladder (examples/ladder): readers on good and bad files, every rung, the command line. No network."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import urllib.error
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ladder import cli, data, models, report, rungs, synthetic, train
from ladder.augment import RandomErasing

SMALL = rungs.Recipe(epochs=1, widths=(8, 16), convs_per_stage=1, dense=32, batch_size=32, dropout_after_pooling=True)


@pytest.fixture(scope="module")
def images() -> data.Dataset:
    return data.make_synthetic(64, seed=0, val_images=50)


@pytest.fixture
def small_presets(monkeypatch: pytest.MonkeyPatch, small_synthetic: None) -> None:
    """The command line on a network and a data set that take moments."""
    monkeypatch.setattr(rungs, "PRESETS", {name: rungs.Preset(64, SMALL) for name in rungs.PRESETS})
    monkeypatch.setattr(cli, "PRESETS", rungs.PRESETS)


@pytest.fixture
def small_synthetic(monkeypatch: pytest.MonkeyPatch) -> None:
    made = data.make_synthetic
    monkeypatch.setattr(data, "make_synthetic", lambda count, seed: made(count, seed, val_images=50))


def no_network(*args: object, **kwargs: object) -> object:
    raise urllib.error.URLError("no route to host")


# Files as published


def records(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8), rng.integers(0, 10, count, dtype=np.uint8)


def write_binary(folder: Path, count: int = 6) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(data.VERSIONS[0].files):
        pixels, labels = records(count, i)
        np.concatenate([labels[:, None], pixels], axis=1).tofile(folder / name)
    return folder


def python2_pickle(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    """The pickle that Python 2 and the NumPy of 2009 wrote: protocol 2, byte strings as (SHORT_)BINSTRING."""

    def string(content: bytes) -> bytes:
        if len(content) < 256:
            return b"U" + bytes([len(content)]) + content
        return b"T" + struct.pack("<i", len(content)) + content

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n(" + string(b"u1") + integer(0) + integer(1) + b"tR"
    dtype += b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + integer(0) + b"\x85" + string(b"b") + b"tR"
    array += b"(" + integer(1) + integer(len(pixels)) + integer(3072) + b"\x86" + dtype + b"\x89"
    array += string(pixels.tobytes()) + b"tb"
    listed = b"](" + b"".join(integer(int(label)) for label in labels) + b"e"
    label_name = string(b"batch_label") + string(b"training batch 1 of 5")
    names = string(b"filenames") + b"](" + b"".join(string(b"%d.png" % i) for i in range(len(labels))) + b"e"
    return b"\x80\x02}(" + label_name + string(b"labels") + listed + string(b"data") + array + names + b"u."


def write_python(folder: Path, count: int = 6) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(data.VERSIONS[1].files):
        (folder / name).write_bytes(python2_pickle(*records(count, i)))
    return folder


def assert_is_published(found: data.Dataset | None, count: int = 6) -> None:
    assert found is not None
    assert found.name == "cifar10"
    assert found.train_images.shape == (5 * count, 3, 32, 32)
    assert found.train_images.dtype == torch.uint8
    for i in range(5):
        pixels, labels = records(count, i)
        part = slice(i * count, (i + 1) * count)
        assert np.array_equal(found.train_images[part].numpy().reshape(count, -1), pixels)
        assert np.array_equal(found.train_labels[part].numpy(), labels)
    pixels, labels = records(count, 5)
    assert np.array_equal(found.val_images.numpy().reshape(count, -1), pixels)
    assert np.array_equal(found.val_labels.numpy(), labels)


@pytest.mark.parametrize("write", [write_binary, write_python])
@pytest.mark.parametrize("nested", [True, False])
def test_reads_the_folder_or_its_parent(tmp_path: Path, write, nested: bool) -> None:
    version = data.VERSIONS[0 if write is write_binary else 1]
    write(tmp_path / version.folder if nested else tmp_path)
    assert_is_published(data.find_cifar10(tmp_path))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("fortran", [False, True])
def test_reads_pickles_of_today(tmp_path: Path, protocol: int, fortran: bool) -> None:
    pixels, labels = records(4, 0)
    stored = np.asfortranarray(pixels) if fortran else pixels
    batch = {b"data": stored, b"labels": labels.tolist(), "batch_label": b"training batch 1 of 5"}
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(batch, protocol=protocol))
    got_pixels, got_labels = data.read_python(path)
    assert np.array_equal(got_pixels.reshape(4, -1), pixels)
    assert np.array_equal(got_labels, labels)


def test_finds_nothing_in_an_empty_folder(tmp_path: Path) -> None:
    assert data.find_cifar10(tmp_path) is None
    with pytest.raises(data.DataError, match=r"no CIFAR-10 there: wanted data_batch_1\.bin"):
        data.load("auto", tmp_path, train_images=4, seed=0, open_url=no_network)


BAD_BINARIES = {
    "truncated": (lambda good: good[:-1], "truncated"),
    "empty": (lambda good: b"", "truncated, or not a CIFAR-10 batch.* got 0 bytes"),
    "foreign": (lambda good: b"%PDF-1.7" * 1000, "not a CIFAR-10 batch"),
    "label": (lambda good: good[:3073] + b"\x0a" + good[3074:], "labels must be 0 to 9, record 1 has another"),
    "too many records": (lambda good: bytes(10_001 * 3073), "wanted 1 to 10000 records"),
    "missing": (None, "missing"),
}


@pytest.mark.parametrize("kind", BAD_BINARIES)
@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin"])
def test_bad_binary_file_is_named(tmp_path: Path, kind: str, name: str) -> None:
    path = write_binary(tmp_path) / name
    spoil, message = BAD_BINARIES[kind]
    if spoil is None:
        path.unlink()
    else:
        path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(data.DataError, match=f"{name}: .*{message}") as caught:
        data.find_cifar10(tmp_path)
    assert "\n" not in str(caught.value)


class _Malicious:
    """Writes a file when unpickled by an unpickler that lets it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def bad_pickles(marker: Path) -> dict[str, tuple[bytes, str]]:
    pixels, labels = records(4, 0)
    good = {"data": pixels, "labels": labels.tolist()}

    def dumped(**changes: object) -> bytes:
        return pickle.dumps({**good, **changes}, protocol=2)

    return {
        "truncated": (python2_pickle(pixels, labels)[:5000], "truncated"),
        "foreign": (b"\x89PNG\r\n\x1a\n" + bytes(5000), "not a CIFAR-10 batch"),
        "empty": (b"", "truncated"),
        "malicious": (dumped(evil=_Malicious(marker)), r"asks for \w+\.mkdir, which is not admitted"),
        "getattr": (b"\x80\x02cbuiltins\ngetattr\n.", r"asks for (builtins|__builtin__)\.getattr"),
        "dotted": (b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.", r"asks for numpy\.ndarray\.dumps"),
        "not a dict": (pickle.dumps([1, 2]), "'data' must be uint8"),
        "no labels": (pickle.dumps({"data": pixels}, protocol=2), "'labels' must be a list"),
        "label": (dumped(labels=[0, 1, 2, 10]), "labels must be 0 to 9, record 3"),
        "negative label": (dumped(labels=[0, -1, 2, 3]), "labels must be 0 to 9, record 1"),
        "label kind": (dumped(labels=[0, 1, 2, "3"]), "'labels' must be a list of integers"),
        "too few labels": (dumped(labels=[0, 1, 2]), "got 4 and 3"),
        "shape": (dumped(data=pixels[:, :-1]), r"got an array of shape \[4, 3071\]"),
        "dtype": (dumped(data=pixels.astype(np.float32)), "arrays must be uint8"),
        "objects": (dumped(data=np.array([_Malicious(marker)], object)), "not admitted|must be uint8"),
    }


@pytest.mark.parametrize("kind", list(bad_pickles(Path("unused"))))
def test_bad_pickle_is_named_and_runs_nothing(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "created by the pickle"
    folder = write_python(tmp_path / "cifar-10-batches-py")
    content, message = bad_pickles(marker)[kind]
    (folder / "data_batch_2").write_bytes(content)
    with pytest.raises(data.DataError, match=f"data_batch_2: .*({message})") as caught:
        data.find_cifar10(tmp_path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


# Archives and download


def make_archive(path: Path, version: data.Version, write, *, extra: tuple[str, ...] = ()) -> Path:
    folder = write(path.parent / "source" / version.folder)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, arcname=version.folder)
        for name in extra:
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"evil"))
    return path


@pytest.mark.parametrize("version, write", [(data.VERSIONS[0], write_binary), (data.VERSIONS[1], write_python)])
def test_reads_an_archive(tmp_path: Path, version: data.Version, write) -> None:
    make_archive(tmp_path / version.archive, version, write, extra=(f"{version.folder}/readme.html",))
    assert_is_published(data.find_cifar10(tmp_path))
    assert sorted(p.name for p in (tmp_path / version.folder).iterdir()) == sorted(version.files)
    (tmp_path / version.archive).unlink()
    assert_is_published(data.find_cifar10(tmp_path))


@pytest.mark.parametrize("name", ["../evil", "cifar-10-batches-bin/../../evil", "/tmp/evil"])
def test_refuses_an_archive_that_leads_out(tmp_path: Path, name: str) -> None:
    inner = tmp_path / "data"
    inner.mkdir()
    version = data.VERSIONS[0]
    make_archive(inner / version.archive, version, write_binary, extra=(name,))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(data.DataError, match="leads out of the folder"):
        data.find_cifar10(inner)
    assert sorted(tmp_path.rglob("*")) == before


def test_link_in_an_archive_is_not_followed(tmp_path: Path) -> None:
    version = data.VERSIONS[0]
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(3073))
    folder = write_binary(tmp_path / "source" / version.folder)
    (folder / "test_batch.bin").unlink()
    (folder / "test_batch.bin").symlink_to(secret)
    with tarfile.open(tmp_path / version.archive, "w:gz") as tar:
        tar.add(folder, arcname=version.folder)
    with pytest.raises(data.DataError, match=r"has no member test_batch\.bin"):
        data.find_cifar10(tmp_path)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("truncated", "truncated, or not a .tar.gz archive"),
        ("foreign", "truncated, or not a .tar.gz archive"),
        ("corrupt", "truncated, or not a .tar.gz archive"),
        ("bomb", "'cifar-10-batches-bin/data_batch_1.bin' is too large: 1099511627776 bytes"),
    ],
)
def test_bad_archive_is_named(tmp_path: Path, kind: str, message: str) -> None:
    version = data.VERSIONS[0]
    path = make_archive(tmp_path / version.archive, version, write_binary)
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "foreign":
        path.write_bytes(b"<html>not found</html>")
    elif kind == "corrupt":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes(200) + content[middle + 200 :])
    else:
        header = tarfile.TarInfo(f"{version.folder}/data_batch_1.bin")
        header.size = 1 << 40
        path.write_bytes(gzip.compress(header.tobuf()))
    with pytest.raises(data.DataError, match=rf"{version.archive}: .*{message}") as caught:
        data.find_cifar10(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / version.folder).exists()
    assert not list(tmp_path.glob(".cifar*"))


class _Response(io.BytesIO):
    """What urlopen returns. `length` is what the server announced; `breaks` cuts the connection with an error."""

    def __init__(self, content: bytes, length: int | None = None, breaks: bool = False) -> None:
        super().__init__(content)
        self.headers = {"Content-Length": str(len(content) if length is None else length)}
        self.breaks = breaks

    def read(self, size: int | None = -1) -> bytes:
        piece = super().read(size)
        if self.breaks and not piece:
            raise ConnectionResetError("connection reset by peer")
        return piece


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastnorm"


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    content = make_archive(tmp_path / "published.tar.gz", data.VERSIONS[0], write_binary).read_bytes()
    monkeypatch.setattr(data, "MD5", hashlib.md5(content, usedforsecurity=False).hexdigest())
    return content


def test_downloads_once_into_the_cache(cache: Path, published: bytes) -> None:
    asked = []

    def open_url(url: str, timeout: float) -> _Response:
        asked.append((url, timeout))
        return _Response(published)

    first = data.load("auto", None, train_images=30, seed=0, open_url=open_url)
    second = data.load("cifar10", None, train_images=30, seed=0, open_url=open_url)
    assert asked == [(data.URL, data.TIMEOUT_SECONDS)]
    assert first.name == "cifar10"
    assert torch.equal(first.train_images, second.train_images)
    assert sorted(p.name for p in cache.iterdir()) == ["cifar-10-batches-bin", "cifar-10-binary.tar.gz"]


@pytest.mark.usefixtures("small_synthetic")
@pytest.mark.parametrize("kind", ["reset", "short", "refused"])
def test_no_download_means_a_banner_or_an_error(cache: Path, published: bytes, kind: str) -> None:
    def open_url(url: str, timeout: float) -> _Response:
        if kind == "refused":
            no_network()
        return _Response(published[:5000], length=len(published), breaks=kind == "reset")

    said: list[str] = []
    found = data.load("auto", None, train_images=4, seed=0, open_url=open_url, warn=said.append)
    assert found.name == "synthetic"
    assert "NOT CIFAR-10's" in said[0]
    with pytest.raises(data.DataError, match=r"cannot be fetched .* --data"):
        data.load("cifar10", None, train_images=4, seed=0, open_url=open_url)
    assert not cache.exists() or not list(cache.iterdir())


def test_wrong_checksum_is_an_error_and_leaves_nothing(cache: Path, published: bytes) -> None:
    with pytest.raises(data.DataError, match="wrong checksum"):
        data.load("auto", None, train_images=4, seed=0, open_url=lambda *a, **k: _Response(published[::-1]))
    assert not list(cache.iterdir())


# Synthetic images, subset


def test_synthetic_images_depend_on_the_seed_alone() -> None:
    first, second, other = (data.make_synthetic(120, seed, val_images=20) for seed in (0, 0, 1))
    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(first.val_labels, second.val_labels)
    assert not torch.equal(first.train_images, other.train_images)
    same_size = data.make_synthetic(20, 0, val_images=20)
    assert not torch.equal(same_size.train_images, same_size.val_images)
    assert first.train_images.dtype == torch.uint8
    assert sorted(set(first.train_labels.tolist())) == list(range(len(synthetic.SHAPES))) == list(range(10))


def test_subset_is_drawn_by_seed_and_keeps_images_with_their_labels() -> None:
    count = 40
    labels = torch.arange(count)
    pixels = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    whole = data.Dataset("cifar10", "made", pixels, labels, pixels, labels)
    first, again, other = whole.subset(10, 0), whole.subset(10, 0), whole.subset(10, 1)
    assert torch.equal(first.train_labels, again.train_labels)
    assert not torch.equal(first.train_labels, other.train_labels)
    assert torch.equal(first.train_images[:, 0, 0, 0].long(), first.train_labels)
    assert len(first.train_labels) == len(set(first.train_labels.tolist())) == 10
    assert len(first.val_labels) == count
    assert len(whole.subset(1000, 0).train_labels) == count


# Augmentation


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


def test_normalise() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    got = train.normalise(images)
    assert got.is_contiguous(memory_format=torch.channels_last)
    for channel in range(3):
        wanted = (images[:, channel].double() / 255 - data.MEAN[channel]) / data.STD[channel]
        torch.testing.assert_close(got[:, channel].double(), wanted, rtol=1e-5, atol=1e-5)  # a few float32 roundings


# Rungs and models


def test_rungs_climb() -> None:
    names = [rung.name for rung in rungs.LADDER]
    assert names[:4] == ["baseline", "noise", "batchnorm", "dropout"]
    recipes = [rungs.recipe_of(rung, SMALL) for rung in rungs.LADDER]
    assert recipes[0] == SMALL
    for before, after, rung in zip(recipes, recipes[1:], rungs.LADDER[1:], strict=False):
        assert after == replace(before, **rung.changes) != before


@pytest.mark.parametrize(
    "wanted, names",
    [
        ("all", [rung.name for rung in rungs.LADDER]),
        ("dropout, 0", ["baseline", "dropout"]),
        ("1,noise,NOISE", ["noise"]),
    ],
)
def test_select(wanted: str, names: list[str]) -> None:
    assert [rung.name for rung in rungs.select(wanted)] == names


@pytest.mark.parametrize("wanted", ["bathnorm", "", "noise,", "99", "-1"])
def test_unknown_rung_lists_the_known_ones(wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([f"--rungs={wanted}"])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "known: 0 baseline, 1 noise, 2 batchnorm, 3 dropout" in message


@pytest.mark.parametrize("rung", rungs.LADDER, ids=lambda rung: rung.name)
def test_both_backends_are_the_same_model(rung: rungs.Rung, images: data.Dataset) -> None:
    recipe = rungs.recipe_of(rung, SMALL)
    ours, torchs = (models.build_model(recipe, backend, seed=3) for backend in models.BACKENDS)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    for key, value in ours.state_dict().items():
        assert torch.equal(value, torchs.state_dict()[key]), key
    has_norm = any("norm" in key for key in ours.state_dict())
    assert has_norm == (recipe.norm is not None)
    assert ("stages.0.0.conv.bias" in ours.state_dict()) != has_norm
    x = train.normalise(images.train_images)
    for model in (ours, torchs):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # the two draw different masks
    # Two float32 implementations of a network of five layers.
    for _ in range(2):
        torch.testing.assert_close(ours.train()(x), torchs.train()(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x), rtol=1e-4, atol=1e-4)


def test_fastnorm_backend_uses_fastnorm() -> None:
    import fastnorm

    model = models.build_model(rungs.recipe_of(rungs.LADDER[3], SMALL), "fastnorm", seed=0)
    kinds = {type(module) for module in model.modules()}
    assert {fastnorm.BatchNorm2d, fastnorm.Dropout} <= kinds
    assert not {torch.nn.BatchNorm2d, torch.nn.Dropout, torch.nn.ReLU} & kinds
    with pytest.raises(ValueError, match="backend must be one of fastnorm, torch, got 'numpy'"):
        models.build_model(SMALL, "numpy", seed=0)


@pytest.mark.parametrize("after_pooling, rates", [(True, [0.25, 0.25, 0.5]), (False, [0.5])])
def test_where_dropout_acts(after_pooling: bool, rates: list[float]) -> None:
    recipe = rungs.recipe_of(rungs.select("dropout")[0], replace(SMALL, dropout_after_pooling=after_pooling))
    model = models.build_model(recipe, "fastnorm", seed=0)
    assert [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)] == rates
    assert not any(isinstance(m, torch.nn.Dropout) for m in models.build_model(SMALL, "fastnorm", seed=0).modules())


def test_he_initialisation() -> None:
    model = models.build_model(replace(SMALL, widths=(64, 128), dense=512), "torch", seed=0)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            fan_in = module.weight[0].numel()
            count = module.weight.numel()
            # The sample variance of n normal numbers has a relative standard deviation of sqrt(2 / n).
            assert module.weight.var().item() == pytest.approx(2 / fan_in, rel=5 * (2 / count) ** 0.5)
            assert not module.bias.any()


# Training


@pytest.mark.parametrize("backend", models.BACKENDS)
@pytest.mark.parametrize("rung", rungs.LADDER, ids=lambda rung: rung.name)
def test_every_rung_trains_two_steps(rung: rungs.Rung, backend: str, images: data.Dataset) -> None:
    recipe = rungs.recipe_of(rung, SMALL)
    steps = []
    outcomes = [
        train.train_rung(recipe, images, backend=backend, seed=seed, on_step=lambda: steps.append(1))
        for seed in (0, 0, 1)
    ]
    assert len(steps) == 3 * 2
    first, again, other = outcomes
    assert first.history == again.history  # bit for bit
    assert first.history != other.history
    assert 0 <= first.val_accuracy <= 1
    assert np.isfinite(first.history.train_loss + first.history.val_loss).all()


@pytest.mark.parametrize("backend", models.BACKENDS)
def test_training_learns(backend: str, images: data.Dataset) -> None:
    recipe = replace(rungs.recipe_of(rungs.select("batchnorm")[0], SMALL), epochs=15, lr=3e-3, augment=())
    outcome = train.train_rung(recipe, images, backend=backend, seed=0)
    assert outcome.train_accuracy > 0.9
    assert outcome.history.train_loss[-1] < 0.5 * outcome.history.train_loss[0]


def test_every_step_trains_in_training_mode(images: data.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build(*args: object) -> models.ConvNet:
        built.append(models.build_model(*args))
        return built[0]

    monkeypatch.setattr(train, "build_model", build)
    recipe = replace(rungs.recipe_of(rungs.select("batchnorm")[0], SMALL), epochs=3)
    train.train_rung(recipe, images, backend="torch", seed=0)
    assert built[0].state_dict()["stages.0.0.norm.num_batches_tracked"] == 3 * 2


def test_accuracy_is_measured_in_eval_mode_on_clean_images(images: data.Dataset) -> None:
    class Fixed(torch.nn.Module):
        """Answers with the class that `labels` has next; class 0 in training mode."""

        def __init__(self, labels: torch.Tensor) -> None:
            super().__init__()
            self.left = list(labels.split(train.EVAL_BATCH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            labels = torch.zeros(len(x), dtype=torch.int64) if self.training else self.left.pop(0)
            return 20.0 * torch.nn.functional.one_hot(labels, 10)

    labels = torch.arange(1, 1_301) % 9 + 1
    pixels = images.train_images[:1].expand(1_300, -1, -1, -1)
    assert train.evaluate(Fixed(labels), pixels, labels) == (pytest.approx(0.0, abs=1e-6), 1.0)
    wrong = torch.where(torch.arange(1_300) < 325, 0, labels)
    assert train.evaluate(Fixed(wrong), pixels, labels) == (pytest.approx(5.0, abs=1e-3), 0.75)


# The command line


def run_cli(out: Path, *arguments: str) -> int:
    common = ["--dataset", "synthetic", "--out", str(out), "--device", "cpu", "--backend", "torch"]
    return cli.main([*common, *arguments], open_url=no_network)


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5_000


@pytest.mark.usefixtures("small_presets")
def test_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(tmp_path / "a", "--backend", "fastnorm", "--epochs", "2", "--batch-size", "16", "--seed", "5") == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "a" / "results.json").read_text())
    assert content["dataset"] == "synthetic"
    assert (content["backend"], content["seed"], content["batch_size"], content["epochs"]) == ("fastnorm", 5, 16, 2)
    assert content["preset"] == "quick"
    assert content["threads"] == torch.get_num_threads()
    assert content["interrupted"] is None
    assert set(content["versions"]) == {"python", "torch", "numpy", "fastnorm"}
    assert [rung["name"] for rung in content["rungs"]] == [rung.name for rung in rungs.LADDER]
    for i, rung in enumerate(content["rungs"]):
        assert rung["number"] == i
        assert 0 <= rung["train_accuracy"] <= 1
        assert rung["val_accuracy"] == rung["history"]["val_accuracy"][-1]
        assert rung["seconds"] > 0
        assert {len(values) for values in rung["history"].values()} == {2}
        if i:
            assert rung["change"] == pytest.approx(rung["val_accuracy"] - content["rungs"][i - 1]["val_accuracy"])
        assert f"{rung['val_accuracy']:.1%}" in printed
    assert content["rungs"][0]["change"] is None
    assert "NOT CIFAR-10's" in printed
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"results.json", "curves.png", "ladder.png"}
    assert is_png(tmp_path / "a" / "curves.png")
    assert is_png(tmp_path / "a" / "ladder.png")


@pytest.mark.usefixtures("small_presets")
def test_a_rung_alone_gives_the_numbers_it_gives_in_the_ladder(tmp_path: Path) -> None:
    assert run_cli(tmp_path / "all") == 0
    assert run_cli(tmp_path / "one", "--rungs", "dropout") == 0
    whole = json.loads((tmp_path / "all" / "results.json").read_text())
    alone = json.loads((tmp_path / "one" / "results.json").read_text())
    assert len(alone["rungs"]) == 1
    assert alone["rungs"][0]["history"] == whole["rungs"][3]["history"]
    assert alone["rungs"][0]["change"] is None


@pytest.mark.usefixtures("small_presets")
@pytest.mark.parametrize("finished", [0, 2])
def test_interrupt_keeps_the_finished_rungs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finished: int
) -> None:
    real = train.train_rung
    calls = []

    def interrupted(*args: object, **kwargs: object) -> train.Outcome:
        calls.append(1)
        if len(calls) > finished:

            def on_step() -> None:
                raise KeyboardInterrupt

            kwargs["on_step"] = on_step
        return real(*args, **kwargs)

    monkeypatch.setattr(cli, "train_rung", interrupted)
    assert run_cli(tmp_path) == 130
    content = json.loads((tmp_path / "results.json").read_text())
    assert [rung["name"] for rung in content["rungs"]] == ["baseline", "noise"][:finished]
    assert content["interrupted"] == rungs.LADDER[finished].name
    assert (tmp_path / "curves.png").exists() == (finished > 0)
    assert rungs.LADDER[finished].name in capsys.readouterr().err


@pytest.mark.usefixtures("small_presets")
def test_trains_on_published_files(tmp_path: Path) -> None:
    write_binary(tmp_path / "cifar-10-batches-bin", count=20)
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--rungs", "0", "--backend", "torch"]
    assert cli.main(arguments, open_url=no_network) == 0
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (content["dataset"], content["train_images"], content["val_images"]) == ("cifar10", 64, 20)
    assert str(tmp_path) not in json.dumps(content)


def test_bad_data_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_binary(tmp_path) / "data_batch_4.bin"
    path.write_bytes(path.read_bytes()[:-7])
    assert cli.main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--backend", "torch"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "data_batch_4.bin" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--epochs", "0"], "wanted an integer of at least 1, got '0'"),
        (["--batch-size", "many"], "wanted an integer of at least 1, got 'many'"),
        (["--seed", "-1"], "at least 0, got '-1'"),
        (["--device", "abacus"], "got 'abacus'"),
        (["--backend", "numpy"], "fastnorm"),
        (["--preset", "slow"], "quick"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1


def test_table_and_pictures_for_any_number_of_rungs(tmp_path: Path) -> None:
    history = train.History([2.0, 1.0], [0.3, 0.6], [1.9, 1.2], [0.35, 0.5])
    outcome = train.Outcome(0.5, 0.75, 12.34, 1000, history)
    finished = [report.Finished(i, rungs.Rung(f"rung{i}", "a trick"), outcome) for i in range(6)]
    finished[0] = report.Finished(0, rungs.LADDER[0], outcome)
    finished[1] = report.Finished(1, rungs.LADDER[1], replace(outcome, val_accuracy=0.5525))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rungs, "LADDER", tuple(one.rung for one in finished))
        lines = report.table(finished).splitlines()
        assert lines[2].split()[-4:] == ["75.0%", "50.0%", "78%", "12.3"]
        assert lines[3].split()[-5:] == ["75.0%", "55.2%", "+5.2", "80%", "12.3"]
        run = {"dataset": "cifar10", "preset": "full", "train_images": 50_000, "val_images": 10_000}
        pictures = report.write_pictures(tmp_path, finished, run)
        assert len(pictures) == 2
        assert all(map(is_png, pictures))
