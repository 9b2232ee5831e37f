"""Where generated images go: a folder or a ZIP with `dataset.json`, itself a labeled data set (docs/formats.md).

All or nothing: a run that fails or is interrupted takes back what it wrote. All processes write into one folder, and so
may several calls with seeds of their own.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import os
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

import dnnlib
from archives.decode import EXTENSIONS, decode_image
from archives.reader import METADATA, ArchiveReader
from archives.writer import ArchiveWriter, is_zip
from dnnlib.threads import usable_cores
from sampling.grid import save_class_grid
from torch_utils import distributed
from torch_utils.safe_files import load_json

__all__ = ["PARTIAL", "check_free", "decode_sample", "image_name", "progress", "read_list", "save_images", "save_sheet"]

PARTIAL = ".partial"  # behind the name of a ZIP: the folder that holds its images until all are made

Batches = Iterable[tuple[list[int], np.ndarray, np.ndarray | None]]


def image_name(seed: int, subdirs: bool = False) -> str:
    """Return '000123.png', or '000000/000123.png' with `subdirs`, which makes one folder for every 1000 seeds."""
    return f"{seed - seed % 1000:06d}/{seed:06d}.png" if subdirs else f"{seed:06d}.png"


def check_free(path: str, advice: str = "") -> None:
    """Raise UserError when writing to `path` would replace something, or mix with images that are there already.

    `advice` ends the message.
    """
    if is_zip(path):
        for taken in (path, f"{path}{PARTIAL}"):
            if os.path.lexists(taken):
                raise dnnlib.UserError(f"{taken}: exists already; choose another name or delete it first{advice}")
        return
    if os.path.lexists(path) and not os.path.isdir(path):
        raise dnnlib.UserError(f"{path}: is a file; give a folder, or a name that ends in .zip")
    for folder, _, files in os.walk(path):
        for name in files:
            if dnnlib.util.LITTER.fullmatch(name):
                continue
            if name == METADATA or os.path.splitext(name)[1].lower() in EXTENSIONS:
                found = os.path.relpath(os.path.join(folder, name), path)
                message = f"{path}: holds {found}, and the new images would mix with it; choose an empty folder{advice}"
                raise dnnlib.UserError(message)


def save_images(
    batches: Batches,
    path: str,
    subdirs: bool = False,
    class_names: Sequence[str] | None = None,
    order: Callable[[list[list]], list[list]] | None = None,
    check_others: Callable[[Collection[str]], None] | None = None,
    listed: Collection[str] = (),
) -> None:
    """Write the batches of `generate_images` as PNGs with `dataset.json` into `path`, a folder or X.zip. Collective.

    Every process passes its own batches (`distributed.share`); `dataset.json` lists the images in the order of ranks.
    Into a ZIP rank 0 writes; the others write a part each beside it, which rank 0 appends. `order` is for a folder that
    holds images already: it makes the list of all, [name, class or None], from that of the new ones, and the new ones
    stay when this fails. `listed`: the names that its `dataset.json` had before; those which `order` leaves out go, if
    they are still damaged.

    Another call may write into the same folder meanwhile. The call that ends last lists the images of both; before that
    `check_others` receives the names of its own images on rank 0, and looks at the others.

    UserError: another call has written one of the new images, or a ZIP of this name, or images with other classes.
    OSError: the disk refuses; also whatever the batches raise.
    """
    path, rank = os.path.normpath(path), distributed.get_rank()
    parts = [_part(path, other) for other in range(1, distributed.get_world_size())] if is_zip(path) else []
    part = parts[rank - 1] if parts and rank > 0 else None
    distributed.on_rank0(lambda: _remove_parts(path))
    archive = ArchiveWriter(part or path, in_place=True, keep=order is not None)
    distributed.barrier()  # now every process knows whether the folder was there before

    with contextlib.ExitStack() as end, contextlib.ExitStack() as writing:

        def write() -> list[list]:
            writing.enter_context(archive)
            entries = _write(batches, archive, subdirs, None if order is not None or is_zip(path) else path)
            if part is not None:
                end.callback(pathlib.Path(part).unlink, missing_ok=True)
                writing.close()  # now rank 0 can read it
            return entries

        def finish() -> None:
            for other in parts:
                archive.append(other)
            labels = entries if entries and entries[0][1] is not None else None
            about = dict(labels=labels) | ({} if class_names is None else dict(class_names=list(class_names)))
            if is_zip(path):
                if order is None:
                    _check_untaken(path)
                archive.add_metadata(about)
                writing.close()
                return
            with dnnlib.locked(os.path.join(path, METADATA)):
                if os.path.exists(os.path.join(path, METADATA)):
                    _join_list(path, about, {name for name, _ in entries}, check_others, listed)
                else:
                    archive.add_metadata(about)
            writing.close()

        entries = distributed.all_gather_object(distributed.together(write))
        entries = [entry for own in entries for entry in own]
        entries = entries if order is None else order(entries)
        distributed.on_rank0(finish)


def _part(path: str, rank: int) -> str:
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.part{rank}.zip")


def _remove_parts(path: str) -> None:
    """Delete the parts of a call that was killed."""
    folder, name = os.path.split(path)
    for part in pathlib.Path(folder).glob(f".{glob.escape(name)}.part*.zip"):
        part.unlink()


def _write(batches: Batches, archive: ArchiveWriter, subdirs: bool, empty: str | None) -> list[list]:
    """Write all batches; return [name, class or None] of each image. Threads work while the network makes more.

    `empty` is a folder that held no image, None where there may be some.
    """

    def store(names: list[str], pngs: Iterable[bytes]) -> None:
        for name, png in zip(names, pngs, strict=True):
            if empty is not None:
                _check_untaken(os.path.join(empty, name))
            archive.add(name, png)

    entries, stored = [], None
    with ThreadPoolExecutor(min(8, usable_cores())) as encoders, ThreadPoolExecutor(1) as writer:
        for seeds, images, classes in batches:
            if stored is not None:
                stored.result()  # So at most two batches are in memory: this one and the one before.
            names = [image_name(seed, subdirs) for seed in seeds]
            labels = [None] * len(names) if classes is None else classes.tolist()
            entries += [list(entry) for entry in zip(names, labels, strict=True)]
            stored = writer.submit(store, names, encoders.map(_png, images))
        if stored is not None:
            stored.result()
    return entries


def _check_untaken(path: str) -> None:
    if os.path.lexists(path):
        raise dnnlib.UserError(f"{path}: another call has written it meanwhile; give each its own seeds or output")


def decode_sample(folder: str, name: str) -> np.ndarray | None:
    """Return an image, uint8 [H,W,C]; None if it is damaged, as a killed process leaves it."""
    with contextlib.suppress(dnnlib.UserError):
        path = os.path.join(folder, name)
        return decode_image(dnnlib.read_bytes(path), path)
    return None


def read_list(folder: str) -> tuple[dict[str, int] | None, list[str] | None]:
    """Return the labels by name that the `dataset.json` of a folder lists, None without labels, and its class names.

    UserError: it is none of a call that made images.
    """
    path = os.path.join(folder, METADATA)
    found = load_json(dnnlib.read_bytes(path), path)
    try:
        return None if found["labels"] is None else dict(found["labels"]), found.get("class_names")
    except (AttributeError, LookupError, TypeError, ValueError):
        raise dnnlib.UserError(f"{path}: lists no labels of images; choose another folder") from None


def _join_list(
    path: str,
    about: dict[str, Any],
    own: Collection[str],
    check_others: Callable[[Collection[str]], None] | None,
    listed: Collection[str],
) -> None:
    """Write the `dataset.json` of a folder that has one, and keep what another call has listed there meanwhile.

    UserError: the two disagree. What the folder has stays then: it belongs to the other call.
    """
    labels, class_names = read_list(path)
    ours = about["labels"] and dict(about["labels"])
    others = [name for name in labels or {} if name not in own and os.path.exists(f"{path}/{name}")]
    kept = [[name, labels[name]] for name in others if name not in listed or decode_sample(path, name) is not None]
    alike = (labels is None) == (ours is None) and class_names in (None, about.get("class_names"))
    if (kept and not alike) or any((labels or {}).get(name, c) != c for name, c in (ours or {}).items()):
        raise dnnlib.UserError(f"{path}: another call has written images with other classes; choose another folder")
    if check_others is not None and (kept or ours is None):
        check_others(own)
    if kept:
        about = about | dict(labels=about["labels"] + kept)
    with dnnlib.atomic_open(os.path.join(path, METADATA)) as file:
        file.write(json.dumps(about, separators=(",", ":")).encode())


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[-1] == 1 else image).save(buffer, format="png")
    return buffer.getvalue()


def save_sheet(file: str, path: str, seeds: Sequence[int], subdirs: bool = False) -> None:
    """Write the images of `seeds` that `save_images` put into `path` as one sheet by class, the PNG `file`."""
    os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
    with contextlib.closing(ArchiveReader(path)) as reader:
        rows, labels = [reader.names.find(image_name(seed, subdirs)) for seed in seeds], reader.labels()
        classes = None if labels is None else labels[rows]
        save_class_grid([reader.image(row) for row in rows], file, classes, reader.class_names())


def progress(batches: Batches, total: int) -> Iterator[tuple[list[int], np.ndarray, np.ndarray | None]]:
    """Yield the same batches, with a progress bar over `total` images; rank 0 shows it for all processes."""
    world_size = distributed.get_world_size()
    with distributed.progress_bar(total=total, unit="image", leave=True) as bar:
        for batch in batches:
            yield batch
            bar.update(min(len(batch[0]) * world_size, total - bar.n))
