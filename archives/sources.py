"""Open what `dataset_tool.py` reads: every kind of source becomes the same small `Source`."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from typing import Any

import dnnlib
from archives.archive_set import find_archives, open_archives
from archives.decode import Color
from archives.layouts.animal10n import find_animal10n, open_animal10n
from archives.layouts.arrays import find_arrays, open_arrays
from archives.layouts.builtin import BUILT_IN, PHOTO_CROPS, open_digits, open_photos
from archives.layouts.celeba import find_celeba, open_celeba
from archives.layouts.cifar import find_cifar, open_cifar
from archives.layouts.lsun import find_lsun, open_lsun
from archives.layouts.mnist import find_mnist, open_mnist
from archives.layouts.noisy_sets import (
    find_clothing1m,
    find_food101n,
    find_webvision,
    open_clothing1m,
    open_food101n,
    open_webvision,
)
from archives.layouts.stl10 import find_stl10, open_stl10
from archives.reader import METADATA
from archives.source import Choice, Source

__all__ = ["PHOTO_CROPS", "Source", "open_archive", "open_source"]

# How published data sets are recognized and opened. `find` returns the places of such sets at or below a path, often
# none; `open` makes a Source of one.
LAYOUTS = (
    (find_mnist, open_mnist),
    (find_cifar, open_cifar),
    (find_stl10, open_stl10),
    (find_celeba, open_celeba),
    (find_clothing1m, open_clothing1m),
    (find_webvision, open_webvision),
    (find_food101n, open_food101n),
    (find_animal10n, open_animal10n),
    (find_lsun, open_lsun),
    (find_arrays, open_arrays),
)


def open_source(
    path: str, test: bool = False, number: int = PHOTO_CROPS, seed: int = 0, *,
    part: str | None = None, label_kind: str | None = None, background: Color | None = None, need_labels: bool = True,
) -> Source:  # fmt: skip
    """Open `digits`, `photos`, images in folders and ZIPs, or a published data set in its layout (docs/data.md).

    number, seed  belong to `photos`, which can have any number of images
    test, part    choose the test part, or another part, of a set that has several
    label_kind    chooses the labels of a set that has several kinds, such as the attributes of CelebA
    background    what is behind transparent pixels
    need_labels   whether labels of a folder or ZIP that are wrong are an error; else it has none, and a note says why

    Folders and ZIPs can be several, which are one set (`find_archives`). Sizes of images and classes of folders may
    differ (`ArchiveSet`).
    UserError: the source is missing, unreadable, of an unknown kind, lacks one of its files, or lacks what was chosen;
    a built-in one is also a file or folder here.
    """
    choice = Choice(test, part, label_kind, background)
    if path in BUILT_IN:
        if os.path.exists(path):
            kind = "folder" if os.path.isdir(path) else "file"
            raise dnnlib.UserError(
                f"{path}: is a built-in source, and also a {kind} here: write ./{path} for the {kind}; for the "
                f"built-in source, rename the {kind} or work in another folder"
            )
        choice.check(path)
        return open_digits() if path == "digits" else open_photos(number, seed)
    archives = find_archives(path)
    if len(archives) == 1:
        path = archives[0]
        if not os.path.exists(path):
            raise dnnlib.UserError(f"{path}: no such file or folder (built-in sources: {', '.join(BUILT_IN)})")
        if not os.path.isdir(path):
            dnnlib.open_file(path).close()  # UserError for devices and pipes, before they are read
        if not os.path.isfile(os.path.join(path, METADATA)):
            found = [(place, open_layout) for find, open_layout in LAYOUTS for place in find(path)]
            if len(found) > 1:
                raise dnnlib.UserError(f"{path}: holds several data sets, name one: {', '.join(f[0] for f in found)}")
            for place, open_layout in found:
                return open_layout(place, choice)
        if os.path.isfile(path) and not path.lower().endswith(".zip") and not zipfile.is_zipfile(path):
            raise dnnlib.UserError(
                f"{path}: not a folder, a ZIP, a CIFAR archive (.tar.gz), an MNIST file (...-images-idx3-ubyte.gz) or "
                "another published data set (docs/data.md lists them)"
            )
    choice.check(path)
    return open_archive(path, background, need_labels)


def open_archive(path: str, background: Color | None = None, need_labels: bool = True) -> Source:
    """Open a folder or ZIP in the layout of this project, EDM, StyleGAN or TDSM, or with one subfolder per class.

    `need_labels`: see `open_source`.
    """
    reader = open_archives(path, background, alike=False)
    problems: list[str] = []

    def found(find: Callable[..., Any], *args: str) -> Any:
        try:
            return find(*args)
        except dnnlib.UserError as e:
            if need_labels:
                raise
            problems.append(f"{e.message}; so these labels are not used")
            return None

    lists = {key: found(reader.labels, key) for key in ("labels", "clean_labels", "previous_labels")}
    return Source(
        path=path,
        length=len(reader),
        image=reader.image,
        **lists,
        class_names=found(reader.class_names),
        names=reader.names,
        origins=reader.source_names(),
        outliers=reader.outliers(),
        corruption=reader.corruption(),
        notes=[*reader.notes, *dict.fromkeys(problems)],  # last: finding labels adds some
    )
