"""CIFAR-10 and CIFAR-100: a tar of pickled batches, [n, 3072] uint8 in channel, row, column order."""

from __future__ import annotations

import contextlib
import os
import re
import tarfile
from typing import Any

import numpy as np

import dnnlib
from archives.labels import plain_labels
from archives.layouts.packed import DAMAGED, Unpacked
from archives.source import Source
from torch_utils import safe_pickle

__all__ = ["is_tar", "open_cifar"]

BATCH_NAME = re.compile(r"(?:(data_batch_\d+|train)|(test_batch|test)|(batches\.meta|meta))")


def is_tar(path: str) -> bool:
    """Return whether a file is a tar, compressed or not."""
    try:
        with contextlib.closing(Unpacked(path)) as file, tarfile.open(fileobj=file, mode="r:"):
            return True
    except DAMAGED:
        return False


def open_cifar(path: str, test: bool) -> Source:
    """Open the training or the test part of a CIFAR archive. UserError: it is damaged, or is none."""
    batches, class_names, family = {}, None, None
    try:
        with contextlib.closing(Unpacked(path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
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
    return Source.in_memory(path, images, labels, family, class_names if named else None)


def _cifar_arrays(batch: dict[str, Any], where: str) -> tuple[np.ndarray, np.ndarray]:
    data, labels = batch.get("data"), batch.get("fine_labels", batch.get("labels"))
    ok = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072
    if not ok or not isinstance(labels, list) or not len(labels) == len(data) > 0 or set(map(type, labels)) != {int}:
        raise dnnlib.UserError(f"{where}: not a CIFAR batch (uint8 data [n, 3072] and n labels)")
    images = np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, plain_labels(labels, where)
