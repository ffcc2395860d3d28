"""The CIFAR-10 ladder's images: readers on good and bad files, archives, download, the synthetic set. No network."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from ladder import data, synthetic
from ladder_small import no_network, records, use_small_synthetic, write_binary


@pytest.fixture
def small_synthetic(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_synthetic(monkeypatch)


# Files as published


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


@pytest.mark.usefixtures("small_synthetic")
def test_a_user_without_a_home_gets_synthetic_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")  # as Path.home does, for one in a container

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    said: list[str] = []
    assert data.load("auto", None, train_images=4, seed=0, open_url=no_network, warn=said.append).name == "synthetic"
    assert "no home folder" in said[0]
    with pytest.raises(data.DataError, match="no home folder to keep it in"):
        data.load("cifar10", None, train_images=4, seed=0, open_url=no_network)


def test_wrong_checksum_is_an_error_and_leaves_nothing(cache: Path, published: bytes) -> None:
    with pytest.raises(data.DataError, match="wrong checksum"):
        data.load("auto", None, train_images=4, seed=0, open_url=lambda *a, **k: _Response(published[::-1]))
    assert not list(cache.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_lies_where_an_archive_is_unpacked_is_named(cache: Path, published: bytes, kind: str) -> None:
    """Before the download; what lies there stays."""
    folder = cache / data.VERSIONS[0].folder
    stray = folder / "readme.html" if kind == "folder" else folder
    stray.parent.mkdir(parents=True)
    stray.write_text("mine")

    def open_url(*_: object, **__: object) -> object:
        raise AssertionError("asked for")

    message = "cifar-10-batches-bin: .* where an archive is to be unpacked: move it away"
    with pytest.raises(data.DataError, match=message):
        data.load("auto", None, train_images=4, seed=0, open_url=open_url)
    (cache / data.VERSIONS[0].archive).write_bytes(published)
    with pytest.raises(data.DataError, match=message):
        data.load("auto", cache, train_images=4, seed=0, open_url=open_url)
    assert stray.read_text() == "mine"


def test_a_batch_that_lies_alone_is_named(tmp_path: Path) -> None:
    (tmp_path / "test_batch").touch()
    with pytest.raises(data.DataError, match="data_batch_1: missing, though test_batch lies there"):
        data.find_cifar10(tmp_path)


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
