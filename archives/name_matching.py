"""Find out which image each file name of a list means, where the list calls images a little differently."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

import dnnlib
from archives.decode import EXTENSIONS
from archives.listing import count_of, quoted, some

__all__ = ["match_names"]

DEEPEST = 8  # parts of a path that are compared at most


def match_names(given: list[str], known: list[Sequence[str]], where: str) -> tuple[np.ndarray, list[str]]:
    """Return the row of the image that each given name means, int64 [len(given)], -1 for none, and notes.

    `known` holds lists of names of the same images; the one that has most of the given names counts. Where none has
    any, images are compared by the last parts of their paths (`flat/images/a.jpg`, `images/a.jpg`, `a.jpg`), as many as
    possible, and then without the ending. What is left is compared regardless of case and of blanks at the ends. How
    accented letters are written never matters. UserError: no name means an image, or a name may mean several.
    """
    if "\\" in "\0".join(given):
        given = [name.replace("\\", "/") for name in given]
    for names in known:
        if len(names) == len(given) and given == list(names):
            return np.arange(len(given)), []
    given, known = _composed(given), list(map(_composed, known))
    tables = [{name: row for row, name in enumerate(names)} for names in known]
    best = max(range(len(known)), key=lambda k: sum(map(tables[k].__contains__, given)))
    rows = np.array([tables[best].get(name, -1) for name in given], dtype=np.int64)
    if (rows >= 0).any():
        return rows, _match_rest(rows, given, known[best], where)
    for lowered in (False, True):
        for names in known:
            texts = [list(map(_plain, part)) if lowered else part for part in (given, names)]
            for shorten, words in _shorter(*texts):
                rows = _rows(*texts, shorten, where)
                if rows is None:
                    continue
                words += " and regardless of case" if lowered else ""
                notes = [f"{where}: file names are compared {words}, such as '{shorten(given[0])}'"]
                if not lowered:
                    notes += _match_rest(rows, list(map(shorten, given)), list(map(shorten, names)), where)
                return rows, notes
    raise dnnlib.UserError(
        f"{where}: none of its {len(given):,} file names is among the {len(known[0]):,} images: it names "
        f"{some(quoted(given), len(given))}; the images are {some(quoted(known[0]), len(known[0]))}"
    )


def _composed(names: Sequence[str]) -> Sequence[str]:
    """Return names with accented letters as one character each: macOS writes two. Names that differ stay different."""
    if "".join(names).isascii():
        return names
    composed = [unicodedata.normalize("NFC", name) for name in names]
    return composed if len(set(composed)) == len(set(names)) else names


def _plain(name: str) -> str:
    return name.strip().casefold()


def _match_rest(rows: np.ndarray, given: Sequence[str], names: Sequence[str], where: str) -> list[str]:
    """Enter the rows of further images whose names differ in case or blanks only, where that is clear. Return notes."""
    rest = np.flatnonzero(rows < 0).tolist()
    if not rest:
        return []
    free = np.setdiff1d(np.arange(len(names)), rows).tolist()
    wanted, there = (Counter(_plain(texts[i]) for i in which) for texts, which in ((given, rest), (names, free)))
    table = {key: row for row in free if there[key := _plain(names[row])] == 1}
    found = [(i, table[key]) for i in rest if wanted[key := _plain(given[i])] == 1 and key in table]
    for i, row in found:
        rows[i] = row
    return [f"{where}: {count_of(len(found), 'name')} found regardless of case and blanks, such as '{given[i]}'"
            for i, _ in found[:1]]  # fmt: skip


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
                    f"{where}: '{shorten(both[0])}' may be several images or lines, {some(quoted(both), len(both))}; "
                    "write the names with their folders"
                )
    return np.array([table.get(name, -1) for name in wanted], dtype=np.int64)
