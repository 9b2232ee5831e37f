"""Open what `dataset_tool.py` reads: every kind of source becomes the same small `Source`."""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import io
import lzma
import os
import re
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import dnnlib
from archives.archive_set import find_archives, open_archives
from archives.decode import decode_image
from archives.labels import plain_labels
from torch_utils import safe_pickle
from torch_utils.safe_files import unpacked_limit

__all__ = ["PHOTO_CROPS", "Source", "open_source"]

BUILT_IN = ("digits", "photos")
PHOTO_CROPS = 2000  # images of `photos` where no number is given
CROP_SIDES = (64, 256)  # pixels of a 640 x 427 photograph: smaller crops are mostly flat, larger ones all look alike
# What damaged .gz and .tar files raise.
DAMAGED = (OSError, EOFError, ValueError, OverflowError, zlib.error, lzma.LZMAError, struct.error, tarfile.TarError)


@dataclass
class Source:
    """N images with their labels, by index."""

    path: str  # what messages call it
    length: int  # N
    image: Callable[[int], np.ndarray]  # 0 .. N - 1 -> uint8 [H, W, C]; called from threads and from forked processes
    labels: np.ndarray | None = None  # int64 [N] or float32 [N, D], as observed
    clean_labels: np.ndarray | None = None  # the labels before noise, where they are known
    class_names: list[str] | None = None
    names: Sequence[str] | None = None  # [N], where the images have names
    outliers: np.ndarray | None = None  # bool [N], which images came from another source; None without a record
    corruption: dict[str, Any] = field(default_factory=dict)  # family of the images; how labels and images were changed

    def name(self, index: int) -> str:
        """Return the name of an image for error messages."""
        return f"{self.path}: {self.names[index] if self.names is not None else f'image {index}'}"


def open_source(path: str, test: bool = False, number: int = PHOTO_CROPS, seed: int = 0) -> Source:
    """Open `digits`, `photos`, a folder, a ZIP, CIFAR-10/100 (.tar.gz), (Fashion-)MNIST (idx files) or an LSUN LMDB.

    Folders and ZIPs can be several, which are one set (`find_archives`). `test` chooses the test part of CIFAR and
    MNIST. `number` and `seed` belong to `photos`, which can have any number of images.
    UserError: the source is missing, unreadable, of an unknown kind, or has no test part.
    """
    several = False
    if path not in BUILT_IN:
        archives = find_archives(path)
        several = len(archives) > 1
        path = path if several else archives[0]
        if not several and not os.path.exists(path):
            raise dnnlib.UserError(f"{path}: no such file or folder (built-in sources: {', '.join(BUILT_IN)})")
        if not several and not os.path.isdir(path):
            dnnlib.open_file(path).close()  # UserError for devices and pipes, before they are read
    if os.path.isfile(path) and IDX_NAME.fullmatch(os.path.basename(path)):
        part = IDX_NAME.fullmatch(os.path.basename(path))[1]
        return _open_mnist(os.path.dirname(path), "t10k" if test else part, path)
    if os.path.isdir(path) and any(IDX_NAME.fullmatch(name) for name in os.listdir(path)):
        return _open_mnist(path, "t10k" if test else "train", path)
    if os.path.isfile(path) and not path.lower().endswith(".zip") and _is_tar(path):
        return _open_cifar(path, test)
    if test:
        raise dnnlib.UserError(f"{path} has no test part (CIFAR and MNIST archives have one)")
    if path == "digits":
        return _open_digits()
    if path == "photos":
        return _open_photos(number, seed)
    if os.path.isdir(path) and os.path.isfile(os.path.join(path, "data.mdb")):
        return _open_lmdb(path)
    if several or os.path.isdir(path) or path.lower().endswith(".zip") or zipfile.is_zipfile(path):
        return _open_images(path)
    raise dnnlib.UserError(
        f"{path}: not a folder, a ZIP, a CIFAR archive (.tar.gz) or an MNIST file (...-images-idx3-ubyte.gz)"
    )


def _in_memory(path: str, images: np.ndarray, labels: np.ndarray, family: str, class_names: list[str] | None) -> Source:
    return Source(
        path=path,
        length=len(images),
        image=images.__getitem__,
        labels=labels,
        class_names=class_names,
        corruption=dict(family=family),
    )


def _open_digits() -> Source:
    from sklearn.datasets import load_digits  # imported here because it takes a second

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # 17 gray levels: 0..16
    return _in_memory("digits", images, digits.target.astype(np.int64), "digits", [str(i) for i in range(10)])


def _open_photos(number: int, seed: int) -> Source:
    """Cut random squares out of scikit-learn's two RGB photographs; the class is the photograph.

    The same `seed` gives the same squares at every resolution, and a larger `number` only adds squares.
    """
    from sklearn.datasets import load_sample_images  # imported here because it takes a second

    bundle = load_sample_images()
    draws = np.random.default_rng(seed).random([number, 4])  # one row per image
    classes = (draws[:, 0] * len(bundle.images)).astype(np.int64)
    low, high = CROP_SIDES
    sides = (low + draws[:, 1] * (high + 1 - low)).astype(np.int64)

    def image(index: int) -> np.ndarray:
        photo, side = bundle.images[classes[index]], sides[index]
        top, left = (int(u * (n + 1 - side)) for u, n in zip(draws[index, 2:], photo.shape[:2], strict=True))
        return photo[top : top + side, left : left + side]

    names = [os.path.splitext(os.path.basename(name))[0] for name in bundle.filenames]
    return Source("photos", number, image, classes, class_names=names, corruption=dict(family="photos", seed=seed))


def _open_images(path: str) -> Source:
    """Open a folder or ZIP in the layout of this project, EDM, StyleGAN or TDSM, or with one subfolder per class."""
    reader = open_archives(path)
    return Source(
        path=path,
        length=len(reader),
        image=reader.image,
        labels=reader.labels(),
        clean_labels=reader.labels("clean_labels"),
        class_names=reader.class_names(),
        names=reader.names,
        outliers=reader.outliers(),
        corruption=reader.corruption(),
    )


# ---------------------------------------------------------------------------------------------------------------------
# CIFAR: a tar of pickled batches, [n, 3072] uint8 in channel, row, column order.

BATCH_NAME = re.compile(r"(?:(data_batch_\d+|train)|(test_batch|test)|(batches\.meta|meta))")


class _Unpacked:
    """A file, unpacked if it is compressed, of which `tarfile` can read a limited number of bytes in all.

    The limit holds whatever sizes the headers in the file claim.
    """

    def __init__(self, path: str):
        with open(path, "rb") as file:
            magic = file.read(6)
        packed = {b"\x1f\x8b": gzip, b"BZ": bz2, b"\xfd7": lzma}.get(magic[:2])
        self._file = packed.open(path) if packed else open(path, "rb")
        self._left = unpacked_limit(os.path.getsize(path))
        self.tell, self.close = self._file.tell, self._file.close

    def read(self, size: int) -> bytes:
        if size > self._left:
            raise tarfile.ReadError("unpacks into too much")
        data = self._file.read(size)
        self._left -= len(data)
        return data

    def seek(self, position: int) -> int:
        # Moving forward in a compressed file unpacks what is skipped, so it counts.
        ahead = position - self._file.tell()
        if ahead < 0:
            return self._file.seek(position)
        while ahead > 0 and (data := self.read(min(ahead, 1 << 20))):
            ahead -= len(data)
        return self._file.tell()


def _is_tar(path: str) -> bool:
    try:
        with contextlib.closing(_Unpacked(path)) as file, tarfile.open(fileobj=file, mode="r:"):
            return True
    except DAMAGED:
        return False


def _open_cifar(path: str, test: bool) -> Source:
    batches, class_names, family = {}, None, None
    try:
        with contextlib.closing(_Unpacked(path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:  # in the order of the file: moving back in a .gz would unpack it again
                name = os.path.basename(member.name)
                match = BATCH_NAME.fullmatch(name)
                if match is None or not member.isfile() or member.issparse() or match[1 if test else 2]:
                    continue
                batch = safe_pickle.load_cifar_batch(tar.extractfile(member).read(), f"{path}: {member.name}")
                if match[3]:
                    class_names = batch.get("fine_label_names", batch.get("label_names"))
                else:
                    batches[name] = _cifar_arrays(batch, f"{path}: {member.name}")
                    family = "cifar100" if name in ("train", "test") else "cifar10"
    except DAMAGED:
        raise dnnlib.UserError(f"{path}: damaged or incomplete archive") from None
    if not batches:
        raise dnnlib.UserError(f"{path}: holds no CIFAR-10 or CIFAR-100 {'test' if test else 'training'} batches")
    ordered = [batches[name] for name in sorted(batches, key=lambda name: (len(name), name))]
    images, labels = (np.concatenate(arrays) for arrays in zip(*ordered, strict=True))
    named = isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)
    return _in_memory(path, images, labels, family, class_names if named else None)


def _cifar_arrays(batch: dict[str, Any], where: str) -> tuple[np.ndarray, np.ndarray]:
    data, labels = batch.get("data"), batch.get("fine_labels", batch.get("labels"))
    ok = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072
    if not ok or not isinstance(labels, list) or not len(labels) == len(data) > 0 or set(map(type, labels)) != {int}:
        raise dnnlib.UserError(f"{where}: not a CIFAR batch (uint8 data [n, 3072] and n labels)")
    images = np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, plain_labels(labels, where)


# ---------------------------------------------------------------------------------------------------------------------
# MNIST and Fashion-MNIST: idx files, gzipped as published or unpacked.

IDX_NAME = re.compile(r"(train|t10k)-images-idx3-ubyte(?:\.gz)?")
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def _open_mnist(folder: str, part: str, path: str) -> Source:
    images = _read_idx(os.path.join(folder, f"{part}-images-idx3-ubyte"), 3)
    labels = _read_idx(os.path.join(folder, f"{part}-labels-idx1-ubyte"), 1).astype(np.int64)
    if len(images) != len(labels):
        raise dnnlib.UserError(f"{path}: {len(images)} images, but {len(labels)} labels")
    if not images.size:
        raise dnnlib.UserError(f"{path}: holds no images")
    if images.shape[1:] == (28, 28):
        images = np.pad(images, [(0, 0), (2, 2), (2, 2)])  # 32 x 32: the U-Nets halve the side several times
    # Both data sets use the same file names, so only the path tells them apart.
    fashion = "fashion" in path.lower()
    family, names = ("fashion-mnist", FASHION) if fashion else ("mnist", [str(i) for i in range(10)])
    return _in_memory(path, images[..., None], labels, family, names)


def _read_idx(path: str, ndim: int) -> np.ndarray:
    """Read an idx file of unsigned bytes: the magic number 0x800 + ndim, the sizes, the values; big-endian."""
    zipped = os.path.exists(path + ".gz")
    path = path + ".gz" if zipped else path
    data = dnnlib.read_bytes(path)
    try:
        if zipped:
            limit = unpacked_limit(len(data))
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(limit + 1)
            if len(data) > limit:
                raise ValueError
        magic, *shape = struct.unpack(f">{1 + ndim}I", data[: 4 + 4 * ndim])
        if magic != 0x800 + ndim:
            raise ValueError
        return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except DAMAGED:
        raise dnnlib.UserError(f"{path}: damaged, incomplete or not an idx file of {ndim} dimensions") from None


# ---------------------------------------------------------------------------------------------------------------------
# LSUN.


def _open_lmdb(path: str) -> Source:
    try:
        import lmdb  # optional dependency
    except ImportError:
        raise dnnlib.UserError(f"{path}: reading an LMDB needs the package lmdb: pip install lmdb") from None
    open_env = functools.partial(lmdb.open, path, readonly=True, lock=False, readahead=False, max_readers=1024)
    try:
        with open_env() as env, env.begin() as transaction:
            keys = list(transaction.cursor().iternext(keys=True, values=False))
    except lmdb.Error as err:
        raise dnnlib.UserError(f"{path}: not a readable LMDB ({err})") from None
    if not keys:
        raise dnnlib.UserError(f"{path}: LMDB without images")
    local = threading.local()  # a transaction belongs to one thread, and an environment to one process

    def image(index: int) -> np.ndarray:
        if getattr(local, "process", None) != os.getpid():
            local.process, local.transaction = os.getpid(), open_env().begin()
        return decode_image(bytes(local.transaction.get(keys[index])), f"{path}: {names[index]}")

    names = [key.decode("latin1") for key in keys]
    return Source(path, len(keys), image, names=names, corruption=dict(family="lsun"))
