"""Where generated images go: a folder or a ZIP with `dataset.json`, itself a labelled data set (formats.md).

All or nothing: a run that fails or is interrupted takes back what it wrote. All processes write into one folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tqdm
from PIL import Image

import dnnlib
from archives.reader import EXTENSIONS, METADATA, ArchiveReader
from sampling.grid import save_grid
from torch_utils import distributed

__all__ = ["check_free", "image_name", "is_zip", "progress", "save_images", "save_sheet"]

Batches = Iterable[tuple[list[int], np.ndarray, np.ndarray | None]]


def is_zip(path: str) -> bool:
    """Whether images go into an archive of this name rather than a folder."""
    return path.lower().endswith(".zip")


def image_name(seed: int, subdirs: bool = False) -> str:
    """'000123.png', with `subdirs` '000000/000123.png': a folder per 1000 seeds."""
    return f"{seed - seed % 1000:06d}/{seed:06d}.png" if subdirs else f"{seed:06d}.png"


def check_free(path: str) -> None:
    """UserError when writing to `path` would replace something, or mix with images that are there already."""
    if is_zip(path):
        if os.path.lexists(path):
            raise dnnlib.UserError(f"--outdir={path}: exists already; choose another name or delete it first")
        return
    if os.path.lexists(path) and not os.path.isdir(path):
        raise dnnlib.UserError(f"--outdir={path}: is a file; give a folder, or a name that ends in .zip")
    for folder, _, files in os.walk(path):
        for name in files:
            if name == METADATA or os.path.splitext(name)[1].lower() in EXTENSIONS:
                found = os.path.relpath(os.path.join(folder, name), path)
                raise dnnlib.UserError(
                    f"--outdir={path}: holds {found}, with which the images would mix; choose an empty folder"
                )


def save_images(batches: Batches, path: str, subdirs: bool = False, class_names: Sequence[str] | None = None) -> None:
    """Write the batches of `generate_images` as PNGs with `dataset.json` into `path`, a folder or X.zip. Collective.

    Every process passes its own batches (`share_of`); the file lists them in the order of ranks. Worker threads encode
    while the network makes the next batch. OSError: the disk refuses; whatever the batches raise.
    """
    output = _Archive(path) if is_zip(path) else _Folder(path)
    try:
        entries = distributed.together(lambda: output.fill(batches, subdirs))
        entries = [entry for part in distributed.all_gather_object(entries) for entry in part]
        labels = entries if entries and entries[0][1] is not None else None
        metadata = {"labels": labels} | ({} if class_names is None else {"class_names": list(class_names)})
        distributed.together(lambda: output.finish(json.dumps(metadata)) if distributed.get_rank() == 0 else None)
    except BaseException:
        output.abort()
        raise
    output.close()


def save_sheet(file: str, path: str, seeds: Sequence[int], subdirs: bool = False) -> None:
    """Write the images of `seeds` that `save_images` put into `path` as one sheet, the PNG `file` (rank 0 only)."""
    if distributed.get_rank() == 0:
        os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
        with contextlib.closing(ArchiveReader(path)) as reader:
            save_grid([reader.image(image_name(seed, subdirs)) for seed in seeds], file)


def progress(batches: Batches, total: int) -> Batches:
    """The same batches, with a progress bar over `total` images on a terminal; rank 0 speaks for all."""
    world_size = distributed.get_world_size()
    with tqdm.tqdm(total=total, unit="image", disable=None if distributed.get_rank() == 0 else True) as bar:
        for batch in batches:
            yield batch
            bar.update(min(len(batch[0]) * world_size, total - bar.n))


class _Output:
    """Moves batches through the encoder threads; where the files end up is the subclasses' business."""

    def __init__(self, path: str):
        self.path = os.path.normpath(path)

    def fill(self, batches: Batches, subdirs: bool) -> list[list]:
        """Write all batches; returns [name, class or None] of each image."""
        self.open()
        entries, stored = [], None
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, ThreadPoolExecutor(1) as writer:
            for seeds, images, classes in batches:
                if stored is not None:
                    stored.result()  # the batch before, done while the network made this one: two at most in memory
                names = [image_name(seed, subdirs) for seed in seeds]
                entries += [
                    [n, c]
                    for n, c in zip(names, [None] * len(names) if classes is None else classes.tolist(), strict=True)
                ]
                stored = writer.submit(self.store, pool.map(self.encode, names, images))
            if stored is not None:
                stored.result()
        return entries


class _Folder(_Output):
    def __init__(self, path: str):
        super().__init__(path)
        self.written: list[str] = []
        self.created = distributed.broadcast_object(not os.path.isdir(self.path))

    def open(self) -> None:
        os.makedirs(self.path, exist_ok=True)

    def encode(self, name: str, image: np.ndarray) -> None:
        target, data = os.path.join(self.path, name), _png(image)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        self.written.append(target)
        try:
            with open(target, "wb") as file:
                file.write(data)
        except OSError as e:
            raise OSError(e.errno, e.strerror, target) from e  # A full disk does not name the file.

    def store(self, pending: Iterable[None]) -> None:
        for _ in pending:
            pass

    def finish(self, metadata: str) -> None:
        with dnnlib.atomic_open(os.path.join(self.path, METADATA), "w") as file:
            file.write(metadata)

    def abort(self) -> None:
        for target in self.written:
            with contextlib.suppress(OSError):
                os.remove(target)
        folders = {os.path.dirname(target) for target in self.written} - {self.path}
        for folder in [*folders, *([self.path] if self.created else [])]:
            with contextlib.suppress(OSError):  # Not empty: another process has files there, and will remove it.
                os.rmdir(folder)

    def close(self) -> None:
        """Nothing is open."""


class _Archive(_Output):
    """Rank 0 writes the archive, the others a part each beside it, which rank 0 appends."""

    def __init__(self, path: str):
        super().__init__(path)
        self.rank, self.stack, self.zip = distributed.get_rank(), contextlib.ExitStack(), None

    def part(self, rank: int) -> str:
        folder, name = os.path.split(self.path)
        return os.path.join(folder, f".{name}.part{rank}.tmp")

    def open(self) -> None:
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        if self.rank == 0:
            self.file = self.stack.enter_context(dnnlib.atomic_open(self.path))
        else:
            self.file = self.stack.enter_context(open(self.part(self.rank), "wb"))
            self.stack.callback(os.remove, self.part(self.rank))
        self.zip = zipfile.ZipFile(self.file, "w", zipfile.ZIP_STORED)

    def encode(self, name: str, image: np.ndarray) -> tuple[str, bytes]:
        return name, _png(image)

    def store(self, pending: Iterable[tuple[str, bytes]]) -> None:
        for name, data in pending:
            self.add(name, data)

    def add(self, name: str, data: str | bytes) -> None:
        self.zip.writestr(zipfile.ZipInfo(name), data)  # ZipInfo's date is fixed: the same images are the same bytes.

    def fill(self, batches: Batches, subdirs: bool) -> list[list]:
        entries = super().fill(batches, subdirs)
        if self.rank > 0:
            self.zip.close()
            self.file.close()
        return entries

    def finish(self, metadata: str) -> None:
        for rank in range(1, distributed.get_world_size()):
            with zipfile.ZipFile(self.part(rank)) as part:
                for name in part.namelist():
                    self.add(name, part.read(name))
        self.add(METADATA, metadata)
        self.zip.close()
        self.stack.close()

    def abort(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self.zip is not None:
                self.zip.close()  # Else its destructor writes to a closed file.
        self.stack.__exit__(*sys.exc_info())

    def close(self) -> None:
        self.stack.close()


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[-1] == 1 else image).save(buffer, format="png")
    return buffer.getvalue()
