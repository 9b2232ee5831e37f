"""Text lists of published data sets: which images there are, and to which class each belongs."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import numpy as np

import dnnlib
from archives.decode import Color, decode_image
from archives.source import Choice, Source
from archives.zip_directory import check_name

__all__ = [
    "Listed",
    "find_below",
    "find_file",
    "list_folder",
    "listed_source",
    "read_class_names",
    "read_lines",
    "read_pairs",
]


def list_folder(path: str) -> list[str]:
    """Return the names in a folder, sorted; none for a path that is no folder or cannot be read."""
    try:
        return sorted(os.listdir(path))
    except (OSError, ValueError):
        return []


def find_below(path: str, folders: Sequence[str], files: Sequence[str]) -> list[str]:
    """Return which of the `folders` below `path` ('' for itself) hold one of the `files`."""
    places = [os.path.join(path, folder) if folder else path for folder in folders]
    return [place for place in places if any(os.path.isfile(os.path.join(place, name)) for name in files)]


def find_file(root: str, names: Sequence[str], use: str) -> str:
    """Return the first of these files below `root`. UserError: there is none of them; `use` says what it is for."""
    for name in names:
        if os.path.isfile(os.path.join(root, name)):
            return os.path.join(root, name)
    raise dnnlib.UserError(f"{root}: lacks {' or '.join(names)}, {use}")


def read_lines(path: str) -> list[str]:
    """Return the lines of a text without blank ones. UserError: the file cannot be read, or is not text in UTF-8."""
    try:
        text = dnnlib.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise dnnlib.UserError(f"{path}: not a text in UTF-8, save it as UTF-8") from None
    return [line.strip() for line in text.split("\n") if line and not line.isspace()]


def read_pairs(path: str) -> tuple[list[str], np.ndarray]:
    """Return the names and numbers, int64 [N], of a list with lines 'NAME NUMBER'.

    UserError: a line has another form, a name occurs twice, or there is no line.
    """
    lines = read_lines(path)
    pairs = [line.rsplit(None, 1) for line in lines]
    for pair, line in zip(pairs, lines, strict=True):
        if len(pair) != 2 or not (pair[1].isascii() and pair[1].isdecimal() and len(pair[1]) < 10):
            raise dnnlib.UserError(f"{path}: has the line '{line}', expected a name and a number")
    names = [pair[0] for pair in pairs]
    check_distinct(names, path)
    return names, np.array([int(pair[1]) for pair in pairs], dtype=np.int64)


def check_distinct(names: Sequence[str], path: str) -> None:
    """Raise UserError when a list names no image, or one of them twice."""
    if not names:
        raise dnnlib.UserError(f"{path}: is empty")
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = [name for name in names if name in seen or seen.add(name)]
        raise dnnlib.UserError(f"{path}: lists {len(twice)} images twice, first '{twice[0]}'")


def read_class_names(path: str, labels: np.ndarray) -> list[str] | None:
    """Return the names of the classes, one per line; None without the file. UserError: a label exceeds them."""
    if not os.path.isfile(path):
        return None
    names = read_lines(path)
    if labels.max(initial=-1) >= len(names):
        raise dnnlib.UserError(f"{path}: names {len(names)} classes, but there is a label {labels.max()}")
    return names


class Listed:
    """The images that a list names, below a folder. They are read when they are needed, and never from outside."""

    def __init__(self, root: str, names: Sequence[str], path: str, background: Color | None):
        self._root, self._names, self._background = root, names, background
        self._real = os.path.realpath(root)
        if re.search(r"\n[/\\]|\n[A-Za-z]:|\.\.", "\n".join(["", *names])):
            for name in names:
                check_name(name, f"{path}: {name}")
        if not os.path.isfile(os.path.join(root, names[0])):
            raise dnnlib.UserError(f"{root}: lacks {names[0]}, the first image that {path} lists")

    def image(self, index: int) -> np.ndarray:
        """Return a decoded image, uint8 [H, W, C]. UserError: it is missing, damaged, or a link to the outside."""
        name = self._names[index]
        path = os.path.join(self._root, name)
        with dnnlib.open_file(path) as file:
            if os.path.commonpath([self._real, os.path.realpath(path)]) != self._real:
                raise dnnlib.UserError(f"{path}: is a link to a file outside the folder; replace it by a copy")
            return decode_image(file.read(), path, self._background)


def listed_source(
    root: str, folder: str, names: list[str], labels: np.ndarray, listed: str, family: str, choice: Choice
) -> Source:
    """Return a source of the images `names` [N] in a `folder` below `root`, with their labels, int64 [N].

    `listed` is the file that lists them, for messages.
    """
    images = Listed(os.path.join(root, folder) if folder else root, names, listed, choice.background)
    return Source(root, len(names), images.image, labels, names=names, corruption=dict(family=family))
