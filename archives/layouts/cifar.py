"""CIFAR-10 and CIFAR-100: pickled batches, [n, 3072] uint8 in channel, row, column order, in a tar or in a folder."""

from __future__ import annotations

import contextlib
import os
import re
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np

import dnnlib
from archives.labels import plain_labels
from archives.layouts.lists import find_below, list_folder
from archives.layouts.packed import DAMAGED, Unpacked
from archives.source import Choice, Source
from torch_utils import safe_pickle

__all__ = ["find_cifar", "open_cifar"]

BATCH_NAME = re.compile(r"(?:(data_batch_\d+|train)|(test_batch|test)|(batches\.meta|meta))")
TRAINING = [f"data_batch_{i}" for i in range(1, 6)]  # of CIFAR-10
STL10 = ("train_X.bin", "test_X.bin", "unlabeled_X.bin")  # files of another data set, also published as a tar
COARSE = "coarse"  # the 20 superclasses of CIFAR-100


def find_cifar(path: str) -> list[str]:
    """Return where CIFAR is: a tar, or folders with its batches."""
    if os.path.isfile(path):
        return [path] if not path.lower().endswith(".zip") and _is_tar(path) else []
    ten = find_below(path, ["", "cifar-10-batches-py"], [*TRAINING, "test_batch"])
    hundred = find_below(path, ["", "cifar-100-python"], ["meta"])
    return ten + [place for place in hundred if find_below(place, [""], ["train", "test"])]


def _is_tar(path: str) -> bool:
    try:
        with contextlib.closing(Unpacked(path)) as file, tarfile.open(fileobj=file, mode="r:"):
            return True
    except DAMAGED:
        return False


def open_cifar(path: str, choice: Choice) -> Source:
    """Open the training or the test part of CIFAR. UserError: it is damaged, lacks a batch, or is something else."""
    batches, meta, family, known = {}, {}, None, False
    for name, where, data in _files(path):
        match = BATCH_NAME.fullmatch(name)
        known = known or match is not None
        if match is None or match[1 if choice.test else 2]:
            continue
        batch = safe_pickle.load_cifar_batch(data(), where)
        if match[3]:
            meta = batch
        else:
            family = "cifar100" if name in ("train", "test") else "cifar10"
            choice.check(path, test=True, labels=["fine", COARSE] if family == "cifar100" else [])
            batches[name] = _arrays(batch, where, choice.labels == COARSE)
    if not batches:
        what = f"holds no CIFAR-10 or CIFAR-100 {'test' if choice.test else 'training'} batches"
        other = "" if known else "; if it holds images, unpack it, and name the folder that it makes"
        raise dnnlib.UserError(f"{path}: {what} (of the version for Python){other}")
    if family == "cifar10" and not choice.test and batches.keys() != set(TRAINING):
        odd = sorted(batches.keys() ^ set(TRAINING))
        raise dnnlib.UserError(f"{path}: lacks or adds {', '.join(odd)}; CIFAR-10 has {len(TRAINING)} training batches")
    images, labels = (
        np.concatenate(arrays) for arrays in zip(*(batches[name] for name in sorted(batches)), strict=True)
    )
    if choice.labels == COARSE:
        names, family = meta.get("coarse_label_names"), None  # the family's asymmetric noise is one of the fine classes
    else:
        names = meta.get("fine_label_names", meta.get("label_names"))
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return Source.in_memory(path, images, labels, family, names if named else None)


def _files(path: str) -> Iterator[tuple[str, str, Any]]:
    """Yield (name, name for messages, function that reads it) of the files in a folder or a tar."""
    if os.path.isdir(path):
        for name in list_folder(path):
            where = os.path.join(path, name)
            if os.path.isfile(where):
                yield name, where, lambda where=where: dnnlib.read_bytes(where)
        return
    with (
        _named_if_damaged(path),
        contextlib.closing(Unpacked(path)) as file,
        tarfile.open(fileobj=file, mode="r:") as tar,
    ):
        for member in tar:  # in the order of the file: moving back in a .gz would unpack it again
            name = os.path.basename(member.name)
            if name in STL10:
                raise dnnlib.UserError(f"{path}: holds STL-10: unpack it, and name the folder that it makes")
            if member.isfile() and not member.issparse():
                yield name, f"{path}: {member.name}", lambda member=member: _read_member(tar, member, path)


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> bytes:
    with _named_if_damaged(path):
        return tar.extractfile(member).read()


@contextlib.contextmanager
def _named_if_damaged(path: str) -> Iterator[None]:
    try:
        yield
    except DAMAGED:
        raise dnnlib.UserError(f"{path}: damaged or incomplete archive") from None


def _arrays(batch: dict[str, Any], where: str, coarse: bool) -> tuple[np.ndarray, np.ndarray]:
    data = batch.get("data")
    labels = batch.get("coarse_labels") if coarse else batch.get("fine_labels", batch.get("labels"))
    ok = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072
    if not ok or not isinstance(labels, list) or not len(labels) == len(data) > 0 or set(map(type, labels)) != {int}:
        raise dnnlib.UserError(f"{where}: not a CIFAR batch (uint8 data [n, 3072] and n labels)")
    images = np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, plain_labels(labels, where)
