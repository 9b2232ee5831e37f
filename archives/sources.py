"""Open what `dataset_tool.py` reads: every kind of source becomes the same small `Source`."""

from __future__ import annotations

import os
import zipfile

import dnnlib
from archives.archive_set import find_archives, open_archives
from archives.layouts.builtin import BUILT_IN, PHOTO_CROPS, open_digits, open_photos
from archives.layouts.cifar import is_tar, open_cifar
from archives.layouts.lsun import open_lmdb
from archives.layouts.mnist import IDX_NAME, open_mnist
from archives.source import Source

__all__ = ["PHOTO_CROPS", "Source", "open_source"]


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
        return open_mnist(os.path.dirname(path), "t10k" if test else part, path)
    if os.path.isdir(path) and any(IDX_NAME.fullmatch(name) for name in os.listdir(path)):
        return open_mnist(path, "t10k" if test else "train", path)
    if os.path.isfile(path) and not path.lower().endswith(".zip") and is_tar(path):
        return open_cifar(path, test)
    if test:
        raise dnnlib.UserError(f"{path} has no test part (CIFAR and MNIST archives have one)")
    if path == "digits":
        return open_digits()
    if path == "photos":
        return open_photos(number, seed)
    if os.path.isdir(path) and os.path.isfile(os.path.join(path, "data.mdb")):
        return open_lmdb(path)
    if several or os.path.isdir(path) or path.lower().endswith(".zip") or zipfile.is_zipfile(path):
        return _open_images(path)
    raise dnnlib.UserError(
        f"{path}: not a folder, a ZIP, a CIFAR archive (.tar.gz) or an MNIST file (...-images-idx3-ubyte.gz)"
    )


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
