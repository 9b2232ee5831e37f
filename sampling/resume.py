"""Make only the images that are missing: what earlier calls have made, and whether this call would make the same.

A few images are made again and compared; no record of settings is needed. So it works after any interruption.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

import dnnlib
from archives.decode import EXTENSIONS
from archives.reader import METADATA, ArchiveReader
from archives.workers import ordered_map
from archives.writer import ArchiveWriter, is_zip
from sampling.generation import drawn_classes
from sampling.output import PARTIAL, Batches, decode_sample, image_name, read_list
from sampling.rejection import Rejection
from torch_utils import distributed
from torch_utils.distributed import print0

__all__ = ["Asked", "Earlier", "check_others", "find_earlier"]

# Images that are made again. Those of rejection whose first draw is accepted are those of any other discriminator, too.
SAMPLE, SAMPLE_OF_REJECTION = 8, 64
TOLERANCE = 0.01  # share of their pixels that may differ by more than one gray level: devices round differently
ANOTHER = 0.1  # the share from which on an image is another one


@dataclass
class Earlier:
    """The images of earlier calls."""

    path: str  # the output, a folder or X.zip
    folder: str  # where its images are, and the missing ones go: the output itself, or a folder beside the ZIP
    subdirs: bool  # whether each thousand of seeds has a folder
    seeds: list[int]  # of the undamaged images
    classes: list[int] | None  # of these images; None without classes
    listed: frozenset[str] = frozenset()  # the names that `dataset.json` had
    entries: list[list] = field(default_factory=list)  # [name, class or None] of all images, once all are made

    def list_all(self, seeds: Sequence[int], new: list[list]) -> list[list]:
        """Return the entries of `seeds`, then of other images in the folder, given those of the new images."""
        named = ((self._name(s), c) for s, c in zip(self.seeds, self._classes(), strict=True))
        # Another call may have taken its images back since.
        entries = {name: [name, c] for name, c in named if os.path.exists(os.path.join(self.folder, name))}
        entries |= {name: [name, c] for name, c in new}
        self.entries = [entries[name] for name in dict.fromkeys([*map(self._name, seeds), *entries]) if name in entries]
        return self.entries

    def pack(self) -> None:
        """Turn the folder beside a ZIP into this ZIP."""
        if is_zip(self.path):
            with ArchiveWriter(self.path, overwrite=True) as archive:
                for name in [*(name for name, _ in self.entries), METADATA]:
                    archive.add(name, dnnlib.read_bytes(os.path.join(self.folder, name)))
            shutil.rmtree(self.folder)

    def check(self, remake: Callable[[list[int]], Batches], number: int = SAMPLE) -> None:
        """Raise UserError unless `number` of the images are what `remake` makes of their seeds, and all classes agree.

        Of the largest samples one image may differ: rounding decides on its acceptance.
        """
        known, sample = _listed(self.folder), []
        wrong = [s for s, c in zip(self.seeds, self._classes(), strict=True) if known.get(self._name(s), c) != c]
        if self.seeds and not wrong:
            sample = [self.seeds[i] for i in np.unique(np.linspace(0, len(self.seeds) - 1, number).astype(int))]
            found = {s: decode_sample(self.folder, self._name(s)) for s in sample}
            sample = [s for s in sample if found[s] is not None]  # another call may have taken its images back
        if sample:
            there = np.stack([found[s] for s in sample]).astype(np.int16)
            here = np.concatenate([images for _, images, _ in remake(sample)])
            shares = np.sort(np.mean(np.abs(here - there) > 1, axis=(1, 2, 3)))
            shares = shares[: len(shares) - len(shares) // SAMPLE_OF_REJECTION]
            if shares.mean() > TOLERANCE or shares.max() > ANOTHER:
                wrong = sample
        if wrong:
            raise dnnlib.UserError(
                f"{self.path}: holds {self._name(wrong[0])} of another network, class or setting; give the same "
                "options, or choose another name"
            )

    def _name(self, seed: int) -> str:
        return image_name(seed, self.subdirs)

    def _classes(self) -> Sequence[int | None]:
        return [None] * len(self.seeds) if self.classes is None else self.classes


def _listed(folder: str) -> dict[str, int]:
    """Return the labels by name in the `dataset.json` of a folder, if there is one."""
    return read_list(folder)[0] or {} if os.path.exists(os.path.join(folder, METADATA)) else {}


@dataclass
class Asked:
    """What a call makes."""

    subdirs: bool  # whether each thousand of seeds has a folder
    net: Callable[..., torch.Tensor]  # makes the images
    device: torch.device
    turns: Sequence[int] | None  # the classes that seeds get in turn
    remake: Callable[[list[int]], Batches]  # makes the images of some seeds

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.net.img_resolution, self.net.img_resolution, self.net.img_channels


def find_earlier(path: str, asked: Asked) -> Earlier:
    """Return what earlier calls have written to `path`, a folder or X.zip. Damaged images count as missing. Collective.

    UserError: an image is of no seed, of another shape, or not one that this call makes.
    """

    folder = f"{path}{PARTIAL}" if is_zip(path) else path

    def find() -> Earlier:
        listed = frozenset(_listed(folder))
        seeds = _find_seeds(path, folder, asked)
        if not seeds and os.path.exists(os.path.join(folder, METADATA)):
            message = f"{path}: holds {METADATA}, but no image that this command makes; choose another folder"
            raise dnnlib.UserError(message)
        return _checked(path, folder, asked, seeds, listed)

    def unpack_and_find() -> Earlier:
        if os.path.lexists(folder) and not os.path.isdir(folder):
            raise dnnlib.UserError(f"{folder}: is a file; give a folder, or a name that ends in .zip")
        new = is_zip(path) and not os.path.isdir(folder)
        if is_zip(path) and os.path.lexists(path):
            _unpack(path, folder)
        try:
            return find()
        except dnnlib.UserError:
            if new:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    return distributed.from_rank0(unpack_and_find)


def check_others(path: str, asked: Asked, own: Collection[str]) -> None:
    """Raise UserError unless the images in the folder `path` are such as this call makes, besides those named in `own`.

    For rank 0 alone.
    """
    seeds = _find_seeds(path, path, asked, own)
    if seeds:
        print0(f"{path}: holds images of another call, too; some are made again, to see whether they fit")
        _checked(path, path, asked, seeds)


def _checked(path: str, folder: str, asked: Asked, seeds: list[int], listed: frozenset[str] = frozenset()) -> Earlier:
    turns = asked.turns
    classes = [turns[s % len(turns)] for s in seeds] if turns else drawn_classes(asked.net, seeds, asked.device)
    earlier = Earlier(path, folder, asked.subdirs, seeds, classes, listed)
    earlier.check(asked.remake, SAMPLE_OF_REJECTION if isinstance(asked.net, Rejection) else SAMPLE)
    return earlier


def _find_seeds(path: str, folder: str, asked: Asked, besides: Collection[str] = ()) -> list[int]:
    """Return the seeds of the undamaged images, `besides` some. UserError: one is of no seed, or of another shape."""
    names = sorted(
        {
            os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/")
            for place, _, files in os.walk(folder)
            for name in files
            if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
        }.difference(besides)
    )

    def read(name: str) -> int | None:
        stem = os.path.splitext(os.path.basename(name))[0]
        seed = int(stem) if stem.isdecimal() else -1
        if image_name(seed, asked.subdirs) != name:
            raise dnnlib.UserError(f"{path}: holds {name}, which this command does not make; choose another folder")
        image = decode_sample(folder, name)
        if image is not None and image.shape != asked.shape:
            raise dnnlib.UserError(f"{path}: {name} has the shape {image.shape}, but the network makes {asked.shape}")
        return None if image is None else seed

    return [seed for seed in ordered_map(read, names, workers=4) if seed is not None]


def _unpack(path: str, folder: str) -> None:
    """Copy the images and labels of a ZIP into a folder, unless they are there."""
    with contextlib.closing(ArchiveReader(path)) as reader:
        labels = reader.labels()
        entries = None if labels is None else [list(entry) for entry in zip(reader.names, labels.tolist(), strict=True)]
        for row, name in enumerate(reader.names):
            _add(folder, name, lambda row=row: reader.read(row))
        _add(folder, METADATA, lambda: json.dumps(dict(labels=entries)).encode())


def _add(folder: str, name: str, content: Callable[[], bytes]) -> None:
    target = os.path.join(folder, name)
    if not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb") as file:
            file.write(content())
