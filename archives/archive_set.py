"""Several archives as one set of images: what `--data` may name, and a reader of all of them."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import dnnlib
from archives.classes import name_look_alikes
from archives.decode import Color, DamagedFile, image_shape
from archives.folder_labels import MANY, note_numbers
from archives.listing import some
from archives.reader import ArchiveReader

__all__ = ["SEVERAL", "ArchiveSet", "find_archives", "open_archives"]

SEVERAL = "Several archives, given as a quoted glob or with commas between them, are one set"  # for --help
MAGIC = set("*?[")


def find_archives(data: str) -> list[str]:
    """Return the archives that `data` names: one path, a glob, or several of both with commas between them.

    What exists under its whole name is that file or folder, whatever characters the name has. A glob stands for the
    archives that it matches, sorted by name; a list keeps its order. UserError: nothing matches, a part is empty, or an
    archive is named twice.
    """
    parts, found = data.split(","), []
    while parts:
        # Names may have commas, so the longest run of parts that exists is one name.
        length = next((n for n in range(len(parts), 0, -1) if os.path.exists(",".join(parts[:n]))), 1)
        part, parts = ",".join(parts[:length]), parts[length:]
        if not part and (found or parts):
            raise dnnlib.UserError(f"{data}: a name between the commas is empty")
        if os.path.exists(part) or not MAGIC & set(part):
            found.append(part)
            continue
        matches = [path for path in dnnlib.match_paths(part) if not path.endswith(".index")]
        if not matches:
            raise dnnlib.UserError(f"{part}: no archive matches")
        found += matches
    same = [os.path.realpath(path) for path in found]
    twice = next((path for i, path in enumerate(found) if same[i] in same[:i]), None) if len(found) > 1 else None
    if twice is not None:
        raise dnnlib.UserError(f"{data}: {twice} is named twice")
    return found


def open_archives(data: str, background: Color | None = None, alike: bool = True) -> ArchiveReader | ArchiveSet:
    """Return a reader of what `data` names (see `find_archives`), with this `background` behind transparent pixels.

    `alike`: see `ArchiveSet`.
    """
    paths = find_archives(data)
    return ArchiveReader(paths[0], background) if len(paths) == 1 else ArchiveSet(data, paths, background, alike)


class SetNames(Sequence[str]):
    """The names of the images of several archives: the name of the archive, '/', the name in the archive."""

    def __init__(self, readers: list[ArchiveReader], starts: list[int]):
        folder = os.path.commonpath([os.path.abspath(reader.path) for reader in readers])
        self.archives = [os.path.relpath(reader.path, folder).replace(os.sep, "/") for reader in readers]
        self._names = [(name, reader.names) for name, reader in zip(self.archives, readers, strict=True)]
        self._starts = starts

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: Any) -> Any:
        rows = range(len(self))[index]
        if isinstance(rows, range):
            return [self[row] for row in rows]
        number = bisect_right(self._starts, rows) - 1
        archive, names = self._names[number]
        return f"{archive}/{names[rows - self._starts[number]]}"

    def __iter__(self) -> Iterator[str]:
        for archive, names in self._names:
            yield from (f"{archive}/{name}" for name in names)


class ArchiveSet:
    """The images of several archives, one after the other, as `ArchiveReader` gives those of one.

    Those of a set for training must be `alike`. Others may differ in the size and channels of their images. If none of
    them has a `dataset.json`, they may differ in their classes, too: the set has the classes of all, in alphabetical
    order as those of one folder.

    UserError: an archive cannot be used, or they differ in the size or channels of their images, in class names, or in
    what they know about them: labels, clean labels, outliers.
    """

    def __init__(self, data: str, paths: list[str], background: Color | None = None, alike: bool = True):
        self.path, self.paths = data, paths
        self.readers = [ArchiveReader(path, background) for path in paths]
        self._starts = [0, *np.cumsum([len(reader) for reader in self.readers]).tolist()]
        self.names = SetNames(self.readers, self._starts)
        self._may_join = not alike and not any(reader.has_list for reader in self.readers)
        self._joined: list[str] | None = None  # the classes of all archives, if these have different ones
        if alike:
            self._agree("images of ", lambda reader: _describe(_first_shape(reader, background)))

    def _agree(self, what: str, find: Callable[[ArchiveReader], Any]) -> list[Any]:
        """Return what `find` says of each archive. UserError: two archives differ in that."""
        first, *others = self.readers
        found = [find(first)]
        for reader in others:
            found.append(find(reader))
            if found[-1] != found[0]:
                raise dnnlib.UserError(
                    f"{reader.path} has {what}{found[-1]}, but {first.path} has {what}{found[0]}: archives of one "
                    "set must agree"
                )
        return found

    @property
    def notes(self) -> list[str]:
        """What was left out of the archives or may be a mistake, one line each."""
        notes = [note for reader in self.readers for note in reader.notes]
        if self._joined is None:
            return notes
        own = [note for reader in self.readers for note in note_numbers(reader.class_names() or [], reader.path)]
        known = {note.removeprefix(f"{reader.path}: ") for reader in self.readers for note in reader.notes}
        alike = [text for text in name_look_alikes(self._joined) if text not in known]
        classes = some(self._joined, shown=MANY)
        return [
            *(note for note in notes if note not in own),  # these numbers are not those of the set
            f"{self.path}: the classes differ between the folders; the set has all of them: {classes}",
            *note_numbers(self._joined, self.path),
            *(f"{self.path}: {text}" for text in alike),
        ]

    def close(self) -> None:
        """Close the archives."""
        for reader in self.readers:
            reader.close()

    def __len__(self) -> int:
        return self._starts[-1]

    def _place(self, row: int) -> tuple[ArchiveReader, int]:
        number = bisect_right(self._starts, row) - 1
        return self.readers[number], row - self._starts[number]

    def where(self, row: int) -> object:
        """Return what messages call an image, like `ArchiveReader.where`."""
        reader, row = self._place(row)
        return reader.where(row)

    def shown_name(self, row: int) -> str:
        """Return what messages call an image, like `ArchiveReader.shown_name`."""
        reader, row = self._place(row)
        return f"{reader.path}: {reader.shown_name(row)}"

    def source_names(self) -> list[str] | None:
        """Return the original paths of the images, behind the names of their archives; None if no archive has any."""
        found = [reader.source_names() for reader in self.readers]
        if not any(found):
            return None
        parts = zip(self.names.archives, found, self.readers, strict=True)
        return [f"{archive}/{name}" for archive, own, reader in parts for name in own or reader.names]

    def read(self, row: int) -> bytes:
        """Return the bytes of an image file."""
        reader, row = self._place(row)
        return reader.read(row)

    def file(self, row: int) -> str:
        """Return the path of the file that an image is in."""
        reader, row = self._place(row)
        return reader.file(row)

    def image(self, row: int) -> np.ndarray:
        """Return a decoded image, uint8 [H, W, C] with C = 1 or 3."""
        reader, row = self._place(row)
        return reader.image(row)

    def labels(self, key: str = "labels") -> np.ndarray | None:
        """Return the labels of all rows, like `ArchiveReader.labels`."""
        self.class_names()
        if key == "previous_labels" and any(reader.labels(key) is None for reader in self.readers):
            return None
        return self._join(key.replace("_", " "), lambda reader: self._renumber(reader, reader.labels(key)))

    def _renumber(self, reader: ArchiveReader, labels: np.ndarray | None) -> np.ndarray | None:
        if self._joined is None or labels is None:
            return labels
        number = {name: c for c, name in enumerate(self._joined)}
        return np.array([number[name] for name in reader.class_names()])[labels]

    def outliers(self) -> np.ndarray | None:
        """Return which images came from another source, bool [N]; None without a record."""
        return self._join("a record of outliers", lambda reader: reader.outliers())

    def _join(self, what: str, find: Callable[[ArchiveReader], np.ndarray | None]) -> np.ndarray | None:
        kinds = self._agree("", lambda reader: _kind(find(reader), what))
        return None if kinds[0].startswith("no ") else np.concatenate([find(reader) for reader in self.readers])

    def class_names(self) -> list[str] | None:
        """Return the names of the classes, None without names."""
        if self._may_join and self._joined is None:
            found = [reader.class_names() for reader in self.readers]
            if None not in found and any(names != found[0] for names in found):
                self._joined = sorted(set().union(*found))
        if self._joined is not None:
            return list(self._joined)
        return self._agree("the class names ", lambda reader: reader.class_names())[0]

    def corruption(self) -> dict[str, Any]:
        """Return what all archives record alike about their label noise and outliers, and the mean realized rate."""
        found = [reader.corruption() for reader in self.readers]
        alike = {key: v for key, v in found[0].items() if all(key in c and c[key] == v for c in found)}
        rates = [c.get("realised_rate") for c in found]
        if all(isinstance(rate, (int, float)) for rate in rates):
            alike["realised_rate"] = float(np.average(rates, weights=np.diff(self._starts)))
        return alike


def _first_shape(reader: ArchiveReader, background: Color | None) -> tuple[int, ...]:
    """Return the shape of the first image that is not damaged. DamagedFile: all are damaged."""
    for row in range(len(reader)):
        try:
            return image_shape(reader.read(row), reader.where(row), background)
        except DamagedFile as error:
            found = error
    raise found


def _describe(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]} with {shape[2]} channels"


def _kind(array: np.ndarray | None, what: str) -> str:
    if array is None:
        return f"no {what.removeprefix('a ')}"
    return what if array.ndim == 1 else f"{what} that are vectors of {array.shape[1]}"
