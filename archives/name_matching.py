"""Find out which image each file name of a list means, where the list calls images a little differently."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

import dnnlib
from archives.decode import EXTENSIONS
from archives.labels import examples

__all__ = ["match_names"]

DEEPEST = 8  # parts of a path that are compared at most


def match_names(given: list[str], known: list[Sequence[str]], where: str) -> tuple[np.ndarray, list[str]]:
    """Return the row of the image that each given name means, int64 [len(given)], -1 for none, and notes.

    `known` holds lists of names of the same images; the one that has most of the given names counts. Where none has
    any, images are compared by the last parts of their paths (`flat/images/a.jpg`, `images/a.jpg`, `a.jpg`), as many as
    possible, and then without the ending. UserError: no name means an image, or a name may mean several.
    """
    if "\\" in "\0".join(given):
        given = [name.replace("\\", "/") for name in given]
    for names in known:
        if len(names) == len(given) and given == list(names):
            return np.arange(len(given)), []
    tables = [{name: row for row, name in enumerate(names)} for names in known]
    best = max(tables, key=lambda table: sum(map(table.__contains__, given)))
    rows = np.array([best.get(name, -1) for name in given], dtype=np.int64)
    if (rows >= 0).any():
        return rows, []
    for names in known:
        for shorten, words in _shorter(given, names):
            rows = _rows(given, names, shorten, where)
            if rows is not None:
                return rows, [f"{where}: file names are compared {words}, such as '{shorten(given[0])}'"]
    raise dnnlib.UserError(
        f"{where}: none of its {len(given):,} file names is among the {len(known[0]):,} images: it names "
        f"{examples(given, len(given))}; the images are {examples(known[0], len(known[0]))}"
    )


def _shorter(given: list[str], names: Sequence[str]) -> Iterable[tuple[Callable[[str], str], str]]:
    """Yield ways to shorten names, the longest names first, and what they do in words."""
    deepest = min(DEEPEST, 1 + max(name.count("/") for name in [*given[:1000], *names[:1000]]))
    for parts in range(deepest, 0, -1):
        words = "without folders" if parts == 1 else f"by the last {parts} parts of their paths"
        yield lambda name, parts=parts: "/".join(name.split("/")[-parts:]), words
    if not any(os.path.splitext(name)[1].lower() in EXTENSIONS for name in given[:1000]):
        yield lambda name: os.path.splitext(name.rsplit("/", 1)[-1])[0], "without folders and endings"


def _rows(given: list[str], names: Sequence[str], shorten: Callable[[str], str], where: str) -> np.ndarray | None:
    """Return the rows of images with the same shortened names, None if there are none."""
    short = list(map(shorten, names))
    table = {name: row for row, name in enumerate(short)}
    wanted = list(map(shorten, given))
    if not any(map(table.__contains__, wanted)):
        return None
    for all_names, shorts in ((names, short), (given, wanted)):
        if len(set(shorts)) < len(shorts):
            twice = {name for name, count in Counter(shorts).items() if count > 1} & table.keys() & set(wanted)
            both = [name for name, key in zip(all_names, shorts, strict=True) if key in twice]
            if len(set(both)) > 1:
                raise dnnlib.UserError(
                    f"{where}: '{shorten(both[0])}' may be several images or lines, {examples(both, len(both))}; "
                    "write the names with their folders"
                )
    return np.array([table.get(name, -1) for name in wanted], dtype=np.int64)
