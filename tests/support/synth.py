"""Small synthetic data sets in the layouts of the published ones, and a function that runs dataset_tool.py."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
from click.testing import CliRunner

import dataset_tool

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def png(image: np.ndarray, mode: str | None = None) -> bytes:
    """Return a PNG of uint8 [H, W] or [H, W, C], converted to a Pillow mode if one is given."""
    picture = PIL.Image.fromarray(image)
    buffer = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(buffer, "png")
    return buffer.getvalue()


def pictures(n: int, size: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Return random images, uint8 [n, size, size, channels]."""
    return np.random.default_rng(seed).integers(0, 256, [n, size, size, channels], dtype=np.uint8)


def make_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def make_archive(path: Path, images: np.ndarray, labels: object = None, **extra) -> Path:
    """Write a ZIP as EDM's tool does. `labels` has one entry per image, or is None. `extra` goes to dataset.json."""
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(images))]
    members = {name: png(image.squeeze()) for name, image in zip(names, images, strict=True)}
    pairs = None if labels is None else [[name, label] for name, label in zip(names, labels, strict=True)]
    members["dataset.json"] = json.dumps({"labels": pairs, **extra}).encode()
    return make_zip(path, members)


def _pickle(value: object) -> bytes:
    # The original files use protocol 2 and NumPy's old module name.
    return pickle.dumps(value, protocol=2).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def _tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_cifar10(path: Path, per_batch: int = 20, seed: int = 0) -> tuple[Path, np.ndarray, np.ndarray]:
    """Write CIFAR-10 with five training batches and a test batch. Return (path, training images, labels)."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, [6, per_batch, 3072], dtype=np.uint8)
    labels = np.arange(6 * per_batch).reshape(6, per_batch) % 10
    members = {"cifar-10-batches-py/batches.meta": _pickle({b"label_names": [s.encode() for s in CIFAR10_NAMES]})}
    for i in (4, 1, 5, 2, 3, 6):  # out of order, as in the original
        name = "test_batch" if i == 6 else f"data_batch_{i}"
        members[f"cifar-10-batches-py/{name}"] = _pickle({b"data": data[i - 1], b"labels": labels[i - 1].tolist()})
    images = data[:5].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _tar(path, members), images, labels[:5].reshape(-1)


def make_cifar100(path: Path, n: int = 200, seed: int = 0) -> tuple[Path, np.ndarray, np.ndarray]:
    """Write CIFAR-100. Return (path, training images, fine labels)."""
    data = np.random.default_rng(seed).integers(0, 256, [n, 3072], dtype=np.uint8)
    fine = np.arange(n) % 100
    members = {
        "cifar-100-python/meta": _pickle({b"fine_label_names": [f"fine{i}".encode() for i in range(100)],
                                          b"coarse_label_names": [f"coarse{i}".encode() for i in range(20)]}),
        "cifar-100-python/test": _pickle({b"data": data[:50], b"fine_labels": fine[:50].tolist()}),
        "cifar-100-python/train": _pickle({b"data": data, b"fine_labels": fine.tolist(),
                                           b"coarse_labels": (fine % 20).tolist()}),
    }  # fmt: skip
    return _tar(path, members), data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), fine


def make_mnist(folder: Path, n: int = 30, seed: int = 0) -> tuple[Path, np.ndarray, np.ndarray]:
    """Write the four files of MNIST, with a test part a third as large. Return (folder, training images, labels)."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(seed).integers(0, 256, [n, 28, 28], dtype=np.uint8)
    labels = (np.arange(n) % 10).astype(np.uint8)
    for part, count in (("train", n), ("t10k", n // 3)):
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        idx_images = gzip.compress(header + images[:count].tobytes())
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx_images)
        idx_labels = gzip.compress(struct.pack(">II", 0x801, count) + labels[:count].tobytes())
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx_labels)
    return folder, images, labels.astype(np.int64)


def make_lsun(folder: Path, images: list[np.ndarray]) -> Path:
    """Write an LMDB of JPEG files under keys like hashes. Needs the package lmdb."""
    import lmdb  # optional dependency

    env = lmdb.open(str(folder), map_size=1 << 26)
    with env.begin(write=True) as transaction:
        for i, image in enumerate(images):
            buffer = io.BytesIO()
            PIL.Image.fromarray(image).save(buffer, "jpeg", quality=95)
            transaction.put(f"{i:040x}".encode(), buffer.getvalue())
    env.close()
    return folder


def run_dataset_tool(*args: object) -> tuple[int, str, str]:
    """Run dataset_tool.py. Return exit code, stdout and stderr; raise any exception, as it is a bug."""
    result = CliRunner().invoke(dataset_tool.main, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr
