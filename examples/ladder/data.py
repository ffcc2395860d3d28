"""The images: CIFAR-10 in either published version, its download, and a synthetic stand-in.

CIFAR-10 is Krizhevsky's "Learning Multiple Layers of Features from Tiny Images" (2009): 50,000 training and 10,000
test images of 32x32 pixels in ten classes. The test images serve as the validation set, as in the course notes.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import io
import os
import pickle
import shutil
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from . import synthetic

# Per channel, of CIFAR-10's training pixels scaled to [0, 1].
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

CLASSES = 10
PIXEL_BYTES = 3 * 32 * 32
RECORD_BYTES = 1 + PIXEL_BYTES  # one label byte, then 1024 red, 1024 green and 1024 blue bytes, row-major
RECORDS_PER_FILE = 10_000
# A pickle holds the pixels and, for each image, a label and a file name of some 30 bytes.
PICKLE_MAX_BYTES = 2 * RECORDS_PER_FILE * RECORD_BYTES

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d13530"
TIMEOUT_SECONDS = 10.0  # to connect, and between two pieces of the answer

UrlOpener = Callable[..., Any]


class DataError(Exception):
    """What is wrong with the data, in one line that names the file."""


@dataclass(frozen=True)
class Dataset:
    """Images are uint8 (N, 3, 32, 32), labels int64 (N,) in 0..9.

    Attributes:
        name: "cifar10" or "synthetic".
        source: where it came from, for the reader of a log.
    """

    name: str
    source: str
    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor

    def to(self, device: torch.device) -> Dataset:
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def checksum(self) -> str:
        """Of all images and labels: runs with the same one saw the same data."""
        digest = hashlib.sha256()
        for tensor in (self.train_images, self.train_labels, self.val_images, self.val_labels):
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def subset(self, train_images: int, seed: int) -> Dataset:
        """The same validation set and at most `train_images` training images, drawn once by seed."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.train_labels), generator=generator)[:train_images]
        return replace(self, train_images=self.train_images[chosen], train_labels=self.train_labels[chosen])


# The published versions


@dataclass(frozen=True)
class Version:
    """One of the forms that CIFAR-10 is published in."""

    folder: str
    archive: str
    train_files: tuple[str, ...]
    test_file: str
    read: Callable[[Path], tuple[NDArray[np.uint8], NDArray[np.uint8]]]
    max_bytes: int

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train_files, self.test_file)


def read_binary(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels (N, 3, 32, 32) and labels (N,) of one file of the binary version.

    A file may hold fewer than 10,000 records (a sample of the data set), but only whole ones.
    """
    size = _size_of(path)
    if size == 0 or size % RECORD_BYTES or size > RECORDS_PER_FILE * RECORD_BYTES:
        raise DataError(
            f"{path}: truncated, or not a CIFAR-10 batch: wanted 1 to {RECORDS_PER_FILE} records of {RECORD_BYTES} "
            f"bytes, got {size} bytes"
        )
    records = np.fromfile(path, np.uint8).reshape(-1, RECORD_BYTES)
    return _checked(path, records[:, 1:], records[:, 0])


def read_python(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels (N, 3, 32, 32) and labels (N,) of one file of the python version, a pickle.

    Unpickling runs no code but this module's: see `_BatchUnpickler`.
    """
    size = _size_of(path)
    if size > PICKLE_MAX_BYTES:
        raise DataError(f"{path}: not a CIFAR-10 batch: wanted at most {PICKLE_MAX_BYTES} bytes, got {size}")
    try:
        batch = _BatchUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except OSError:
        raise
    except Exception as error:  # a broken pickle can raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: truncated, or not a CIFAR-10 batch: {reason}") from error
    entries = {_text(key): value for key, value in batch.items()} if isinstance(batch, dict) else {}
    data, labels = entries.get("data"), entries.get("labels")
    pixels = data.values if isinstance(data, _PickledArray) else None
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != PIXEL_BYTES:
        got = type(data).__name__ if pixels is None else f"an array of shape {list(pixels.shape)}"
        raise DataError(f"{path}: not a CIFAR-10 batch: 'data' must be uint8 [N, {PIXEL_BYTES}], got {got}")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{path}: not a CIFAR-10 batch: 'labels' must be a list of integers")
    if len(labels) != len(pixels) or not 1 <= len(pixels) <= RECORDS_PER_FILE:
        raise DataError(
            f"{path}: wanted 1 to {RECORDS_PER_FILE} images and as many labels, got {len(pixels)} and {len(labels)}"
        )
    # Clipped to a byte before the range check, so that -1 or 2**70 is out of range there too.
    clipped = [label if 0 <= label < CLASSES else 255 for label in labels]
    return _checked(path, pixels, np.array(clipped, np.uint8))


def _checked(path: Path, pixels: NDArray[np.uint8], labels: NDArray[np.uint8]) -> tuple[Any, Any]:
    wrong = np.flatnonzero(labels >= CLASSES)
    if len(wrong):
        raise DataError(
            f"{path}: not a CIFAR-10 batch: labels must be 0 to {CLASSES - 1}, record {wrong[0]} has another"
        )
    return pixels.reshape(-1, 3, 32, 32), labels


def _size_of(path: Path) -> int:
    if not path.is_file():
        raise DataError(f"{path}: missing" if not path.exists() else f"{path}: not a file")
    return path.stat().st_size


def _text(key: Any) -> Any:
    return key.decode("latin-1") if isinstance(key, bytes) else key


class _PickledDtype:
    """Stands in for numpy.dtype while unpickling: uint8 or nothing."""

    def __init__(self, name: Any, *_: Any) -> None:
        if _text(name) not in ("u1", "|u1", "uint8"):
            raise pickle.UnpicklingError(f"arrays must be uint8, got {name!r:.40}")

    def __setstate__(self, state: Any) -> None:
        """Byte order and field layout: without meaning for single bytes."""


class _PickledArray:
    """Stands in for numpy.ndarray while unpickling; `values` is the array."""

    values: NDArray[np.uint8] | None = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], _PickledDtype, bool, bytes]) -> None:
        _, shape, dtype, fortran, content = state
        self._fill(content, dtype, shape, "F" if fortran else "C")

    def _fill(self, content: Any, dtype: Any, shape: Any, order: Any) -> None:
        if not isinstance(dtype, _PickledDtype):
            raise pickle.UnpicklingError("arrays must be uint8")
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order=order)


def _reconstruct(*_: Any) -> _PickledArray:
    return _PickledArray()


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _PickledArray:
    array = _PickledArray()
    array._fill(content, dtype, shape, order)
    return array


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r:.40} is not admitted")
    return text.encode("latin-1")


class _BatchUnpickler(pickle.Unpickler):
    """Admits uint8 arrays, bytes, str, numbers, lists, tuples and dicts; every other global is refused.

    The globals that it does admit resolve to stand-ins in this module, so nothing outside it is ever called.
    """

    _GLOBALS: ClassVar[dict[str, Any]] = {
        "numpy.ndarray": _PickledArray,
        "numpy.dtype": _PickledDtype,
        "numpy.core.multiarray._reconstruct": _reconstruct,  # NumPy 1 and Python 2, as the published files have it
        "numpy._core.multiarray._reconstruct": _reconstruct,  # NumPy 2
        "numpy.core.numeric._frombuffer": _from_buffer,  # the same two, pickle protocol 5
        "numpy._core.numeric._frombuffer": _from_buffer,
        "_codecs.encode": _encode,  # how Python 3 writes bytes in protocol 2
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._GLOBALS[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, which is not admitted") from None


VERSIONS = (
    Version(
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test_batch.bin",
        read_binary,
        RECORDS_PER_FILE * RECORD_BYTES,
    ),
    Version(
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        read_python,
        PICKLE_MAX_BYTES,
    ),
)


def read_folder(folder: Path, version: Version) -> Dataset:
    """All batches of one version. Raises DataError, naming the file, where one is missing or not what it should be."""
    missing = [name for name in version.files if not (folder / name).exists()]
    others = [name for name in version.files if name not in missing]
    if missing and others:  # it may be the other that does not belong here
        raise DataError(f"{folder / missing[0]}: missing, though {others[0]} lies there")
    pixels, labels = zip(*(version.read(folder / name) for name in version.files), strict=True)
    return Dataset(
        "cifar10",
        str(folder),
        torch.from_numpy(np.concatenate(pixels[:-1])),
        torch.from_numpy(np.concatenate(labels[:-1]).astype(np.int64)),
        torch.from_numpy(np.array(pixels[-1])),
        torch.from_numpy(labels[-1].astype(np.int64)),
    )


def find_cifar10(directory: Path) -> Dataset | None:
    """CIFAR-10 from `directory`: the batch files themselves, their folder in it, or a published archive in it.

    An archive is unpacked beside itself on the first use. None where `directory` holds none of these.
    """
    for version in VERSIONS:
        for folder in (directory / version.folder, directory):
            if any((folder / name).exists() for name in version.files):
                return read_folder(folder, version)
    for version in VERSIONS:
        archive = directory / version.archive
        if archive.exists():
            unpack(archive, version, directory / version.folder)
            return read_folder(directory / version.folder, version)
    return None


def unpack(archive: Path, version: Version, folder: Path) -> None:
    """Takes the batch files of `version` out of a .tar.gz into `folder`, which appears whole or not at all.

    Only regular files with the batch files' names are written, and under those names alone: no path from the archive
    is followed. An archive with a member that leads out of its folder is refused.
    """
    _require_room(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        staged = Path(scratch) / folder.name
        staged.mkdir()
        try:
            with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    parts = member.name.split("/")
                    if ".." in parts or member.name.startswith("/"):
                        raise DataError(f"{archive}: refused: member {member.name!r} leads out of the folder")
                    if not member.isfile() or parts[-1] not in version.files:
                        continue
                    if member.size > version.max_bytes:
                        raise DataError(f"{archive}: member {member.name!r} is too large: {member.size} bytes")
                    source = tar.extractfile(member)
                    assert source is not None  # a regular file has content
                    with source, (staged / parts[-1]).open("wb") as target:
                        shutil.copyfileobj(source, target)
                while stream.read(1 << 20):  # gzip's checksum is compared at the end, where tarfile does not look
                    pass
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{archive}: truncated, or not a .tar.gz archive: {error}") from error
        missing = [name for name in version.files if not (staged / name).exists()]
        if missing:
            raise DataError(f"{archive}: has no member {missing[0]}")
        staged.rename(folder)


def _require_room(folder: Path) -> None:
    """For an archive to be unpacked; what a user has put there stays."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        what = "holds other files and none of CIFAR-10's batches" if folder.is_dir() else "a file"
        raise DataError(f"{folder}: {what}, where an archive is to be unpacked: move it away")


# Download


def cache_folder() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME/fastnorm, or ~/.cache/fastnorm.

    Raises:
        FileNotFoundError: this user has no home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastnorm"
    except RuntimeError as error:
        raise FileNotFoundError("no home folder to keep it in") from error


def download(url: str, target: Path, md5: str, open_url: UrlOpener = urllib.request.urlopen) -> None:
    """Fetches `url` into `target`, which appears only once it is complete and its checksum right.

    Raises:
        OSError: the network or the disk does not answer (urllib's errors are among these), or stopped in the middle.
        http.client.HTTPException: the server's answer makes no sense.
        DataError: what came is not what was published.
    """
    with open_url(url, timeout=TIMEOUT_SECONDS) as response:
        target.parent.mkdir(parents=True, exist_ok=True)
        total = int(response.headers.get("Content-Length") or 0) or None
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
        partial = Path(name)
        try:
            digest = hashlib.md5(usedforsecurity=False)
            with (
                open(handle, "wb") as file,
                tqdm(total=total, unit="B", unit_scale=True, desc=target.name, disable=None) as bar,
            ):
                while piece := response.read(1 << 16):
                    file.write(piece)
                    digest.update(piece)
                    bar.update(len(piece))
                received = file.tell()
            if total is not None and received < total:
                raise OSError(f"the connection broke after {received} of {total} bytes")
            if digest.hexdigest() != md5:
                raise DataError(f"{url}: wrong checksum: md5 must be {md5}, got {digest.hexdigest()}")
            partial.replace(target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                partial.unlink()


# The whole


def load(
    dataset: str,
    directory: Path | None,
    *,
    train_images: int,
    seed: int,
    open_url: UrlOpener = urllib.request.urlopen,
    warn: Callable[[str], None] = print,
) -> Dataset:
    """The data set for a run.

    Args:
        dataset: "cifar10"; "synthetic"; or "auto", which is CIFAR-10 where it can be had and else synthetic.
        directory: where CIFAR-10 lies; None for the cache folder, and a download into it if need be.
        train_images: how many training images to keep, or to make.
        seed: draws the training images kept, and the synthetic ones.
        warn: is given the banner that the images are synthetic.
    Raises:
        DataError: CIFAR-10 is there but broken, was asked for and cannot be had, or `directory` does not hold it.
    """
    if dataset != "synthetic":
        if directory is not None:
            found = find_cifar10(directory)
            if found is None:
                wanted = " or ".join(f"{v.train_files[0]} (in {v.folder}), {v.archive}" for v in VERSIONS)
                raise DataError(f"--data {directory}: no CIFAR-10 there: wanted {wanted}")
            return found.subset(train_images, seed)
        try:
            cache = cache_folder()
            found = find_cifar10(cache)
            if found is None:
                _require_room(cache / VERSIONS[0].folder)
                download(URL, cache / VERSIONS[0].archive, MD5, open_url)
                found = find_cifar10(cache)
                assert found is not None  # the archive is there now
            return found.subset(train_images, seed)
        except (OSError, http.client.HTTPException) as error:
            reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
            if dataset == "cifar10":
                raise DataError(f"{URL}: cannot be fetched ({reason}); give a folder with --data") from error
            warn(_banner(f"CIFAR-10 cannot be fetched ({reason})."))
    else:
        warn(_banner("Asked for with --dataset synthetic."))
    return make_synthetic(train_images, seed)


def make_synthetic(train_images: int, seed: int, val_images: int = 5_000) -> Dataset:
    """The synthetic stand-in; see synthetic.py."""
    train = synthetic.make_images(train_images, torch.Generator().manual_seed(2 * seed))
    val = synthetic.make_images(val_images, torch.Generator().manual_seed(2 * seed + 1))
    return Dataset("synthetic", f"generated, seed {seed}", *train, *val)


def _banner(reason: str) -> str:
    lines = [
        "SYNTHETIC IMAGES: the figures below are NOT CIFAR-10's.",
        reason,
        "Give a folder that holds CIFAR-10 with --data DIR.",
    ]
    return "\n".join(["!" * 78, *(f"!! {line}" for line in lines), "!" * 78])
