"""Names of classes, and classes without images: labels that begin at 1, have gaps, or come from a database."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

import dnnlib
from archives.listing import some

__all__ = [
    "check_class_numbers",
    "check_name_count",
    "check_number",
    "describe_empty",
    "name_class",
    "name_look_alikes",
]

SHOWN = 10  # classes in a message


def name_class(number: int, names: Sequence[str] | None) -> str:
    """Return what messages call a class: its name, or its number where it has none."""
    return str(number) if names is None else names[number]


def check_class_numbers(theirs: Sequence[str] | None, path: str, ours: Sequence[str] | None, where: str) -> None:
    """Raise UserError if the network of `path` and the data or network `where` number a class differently.

    `theirs` and `ours` are their class names. None: they have none, and the numbers are all there is. Names that occur
    twice say nothing.
    """
    once = [{name for name, count in Counter(names or ()).items() if count == 1} for names in (theirs, ours)]
    known = once[0] & once[1]
    numbers = {name: number for number, name in enumerate(ours or ()) if name in known}
    for number, name in enumerate(theirs or ()):
        if numbers.get(name, number) != number:
            raise dnnlib.UserError(
                f"class {name!r} is number {number} of {path}, but number {numbers[name]} of {where}; their classes "
                "must have the same order"
            )


def check_name_count(names: Sequence[str] | None, count: int, path: str) -> None:
    """Raise UserError unless each of `count` entries of the label vectors of an archive has one name, or none has."""
    if names is not None and len(names) != count:
        raise dnnlib.UserError(
            f'{path}: "class_names" has {len(names)} names, but labels are vectors of length {count}'
        )


def name_look_alikes(names: Sequence[str]) -> list[str]:
    """Return a line about each group of class names that differ in case, blanks or spelling of letters only."""
    same: dict[str, list[str]] = {}
    for name in names:
        same.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    alike = [group for group in same.values() if len(group) > 1]
    return [f"{some(map(repr, group))} are different classes, although they look alike" for group in alike]


def describe_empty(counts: np.ndarray, names: Sequence[str] | None) -> str | None:
    """Say which of the classes have no images, given the images per class, int64 [C]; None if all have some."""
    empty = np.flatnonzero(counts == 0).tolist()
    if not empty or len(empty) == len(counts):
        return None
    which = some([name_class(c, names) for c in empty], shown=SHOWN)
    return f"{len(empty):,} of {len(counts):,} classes have no images: {which}"


def check_number(classes: int, images: int, names: Sequence[str] | None, where: str) -> None:
    """Raise UserError for more classes than images, unless the classes have names: then somebody wants them."""
    if names is None and classes > images:
        raise dnnlib.UserError(
            f"{where}: labels go up to {classes - 1:,}, so there would be {classes:,} classes for {images:,} images: "
            "renumber the labels with dataset_tool.py --compact_labels"
        )
