"""Check labels, number their classes, and bring them into the order of an archive's images."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

import dnnlib
from archives.json_lists import LongList, in_pieces
from archives.listing import SHOWN, count_of, quoted, some

__all__ = [
    "NUMBER",
    "describe_truth",
    "match_labels",
    "match_origins",
    "number_classes",
    "plain_labels",
    "text_classes",
]

NUMBER = re.compile(r"(-?(?:0|[1-9]\d{0,17}))(?:\.0{1,9})?")  # spreadsheets write 3.0 for 3


def describe_truth(corruption: dict[str, Any]) -> str:
    """Say in words what the clean labels of an archive are, by its record."""
    known, noise = corruption.get("clean_labels"), corruption.get("noise_type")
    if known is None and noise == "imported":  # by a version before 0.2, which took the old labels for clean ones
        return "labels that imported ones replaced; nobody declared them clean"
    if known in ("declared", "published"):
        return f"clean labels, as {known}"
    if known == "on record":
        return "clean labels on record"
    return "clean labels, from before the noise" if known or noise else "clean labels on record"


def plain_labels(values: Any, where: str) -> np.ndarray:
    """Check a list of labels and return it as int64 [N], or as float32 [N, D] when each label is a vector.

    UserError names the first label that is negative or not an integer, and says when vectors differ in length.
    """
    kinds = set(map(type, values))
    if kinds & {list, tuple}:
        if not kinds <= {list, tuple} or len(set(map(len, values))) > 1:
            raise dnnlib.UserError(f"{where}: labels are ragged (all must be integers, or all vectors of one length)")
        try:
            array = np.array(values, dtype=np.float32)
        except (TypeError, ValueError):
            array = np.zeros(0)
        if array.ndim != 2 or not array.size or not np.isfinite(array).all():
            raise dnnlib.UserError(f"{where}: label vectors must hold finite numbers")
        return array
    if kinds != {int}:  # bool is a type of its own, so true and false are refused too
        bad = [v for v in values if type(v) is not int and not (type(v) is float and v.is_integer())]
        if bad:
            raise dnnlib.UserError(f"{where}: label {json.dumps(bad[0], default=str)} is not an integer")
    low, high = min(values, default=0), max(values, default=0)
    if low < 0 or high >= 1 << 31:
        raise dnnlib.UserError(f"{where}: label {low if low < 0 else high} is {'negative' if low < 0 else 'too large'}")
    return np.array(values, dtype=np.int64)


def number_classes(
    texts: Collection[str], class_names: Sequence[str] | None, where: str
) -> tuple[dict[str, int], list[str] | None]:
    """Return the class number of each text, and the names of the classes.

    A text is the name of a class, or else its number where no name is a number. Without `class_names`, texts that are
    not all numbers are the names, in alphabetical order. UserError: a text is no class.
    """
    known = {name: c for c, name in enumerate(class_names or [])}
    texts = set(texts)
    if len(known) < len(class_names or []) and (twice := [n for n in texts & known.keys() if class_names.count(n) > 1]):
        raise dnnlib.UserError(f"{where}: several classes are called {some(quoted(twice), len(twice))}; use numbers")
    if class_names is not None and texts <= known.keys():
        return known, list(class_names)
    numbers = {text: int(match[1]) for text in texts if (match := NUMBER.fullmatch(text))}
    if len(numbers) == len(texts) and not any(map(NUMBER.fullmatch, known)):
        return numbers, None if class_names is None else list(class_names)
    if class_names is None:
        names = sorted(texts)
        return {name: c for c, name in enumerate(names)}, names
    absent = sorted(texts - known.keys())
    raise dnnlib.UserError(
        f"{where}: {len(absent)} of {len(texts)} different labels are none of the {len(known)} classes: "
        f"{some(quoted(absent), len(absent))}; the classes are {some(quoted(class_names), len(class_names))}"
    )


def text_classes(lists: Iterable[Any], where: str) -> list[str] | None:
    """Return the names of the classes of lists of labels as in `match_labels`, None where labels are no names."""
    texts: set[str] = set()
    for pairs in lists:
        first = pairs.first() if isinstance(pairs, LongList) else None
        if _is_pair(first) and type(first[1]) is not str:
            continue  # numbers: no piece needs to be parsed twice
        for piece in _pieces(pairs) or ():
            if not piece or not _is_pair(piece[0]) or type(piece[0][1]) is not str:
                break
            texts.update(pair[1] for pair in piece if _is_pair(pair) and type(pair[1]) is str)
    return number_classes(texts, None, where)[1] if texts else None


def match_labels(
    pairs: Any,
    names: Sequence[str],
    where: str,
    class_names: Sequence[str] | None = None,
    notes: list[str] | None = None,
) -> np.ndarray:
    """Return labels given as [[name, label], ...] in the order of `names`: int64 [N] or float32 [N, D].

    pairs        a list, a `LongList`, or a mapping {name: label}; labels may be names of classes (`number_classes`)
    class_names  of the classes, where labels are names
    notes        receives a line about names that no image has; such entries do not count

    UserError: an entry is not a pair or occurs twice, or an image has no label.
    """
    pieces = _pieces(pairs)
    rows, values, count, found = [], [], 0, 0
    table: dict[str, int] | None = None
    extra: list[str] = []
    for piece in [None] if pieces is None else pieces:
        if piece is None or not _are_pairs(piece):
            raise dnnlib.UserError(f"{where}: must be a list of [file name, label] pairs, or null")
        given = [pair[0] for pair in piece]
        if "\\" in "".join(given):
            given = [name.replace("\\", "/") for name in given]
        if table is None and given == list(names[count : count + len(given)]):
            rows.append(np.arange(count, count + len(given)))  # in order, as all tools write them: no table needed
        else:
            table = table or {name: i for i, name in enumerate(names)}
            absent = [name for name in given if name not in table]
            if absent:
                piece = [pair for pair, name in zip(piece, given, strict=True) if name in table]
                given = [name for name in given if name in table]
                found, extra = found + len(absent), [*extra, *absent[: SHOWN - len(extra)]]
            rows.append(np.array([table[name] for name in given], dtype=np.int64))
        count += len(given)
        values.append(_values([pair[1] for pair in piece], where))
        if count > len(names):  # some occur twice; a file of many repetitions need not be read to its end
            break
    order = np.concatenate(rows)
    times = np.bincount(order, minlength=len(names))
    labeled = int(np.count_nonzero(times))
    if labeled < len(names) and count <= len(names):
        lacking = np.flatnonzero(times == 0)
        first = some(quoted(names[int(i)] for i in lacking), len(lacking))
        others = f"; without an image are {some(quoted(extra), found)}" if found else ""
        raise dnnlib.UserError(f"{where}: has {labeled} labels for {len(names)} images, none for {first}{others}")
    if labeled < count:
        raise dnnlib.UserError(
            f"{where}: {count_of(count - labeled, 'entry')} too many, of files that are listed twice"
        )
    if found and notes is not None:
        notes.append(f"{where}: has {count_of(found, 'name')} without an image: {some(quoted(extra), found)}")
    joined = _join(values, class_names, where)
    labels = np.empty([len(names), *joined.shape[1:]], joined.dtype)
    labels[order] = joined
    return labels


def match_origins(pairs: Any, names: Sequence[str], where: str) -> list[str]:
    """Return original paths given as [[name, path], ...] in the order of `names`; an image without one keeps its name.

    UserError: an entry is no pair of texts.
    """
    origins, table, count = list(names), None, 0
    for piece in _pieces(pairs) or [[None]]:
        if not all(_is_pair(pair) and isinstance(pair[1], str) for pair in piece):
            raise dnnlib.UserError(f"{where}: must be a list of [file name, original path] pairs")
        given, stop = [pair[0] for pair in piece], count + len(piece)
        if table is None and given == origins[count:stop]:
            origins[count:stop] = [pair[1] for pair in piece]
        else:
            table = table or {name: i for i, name in enumerate(names)}
            for name, path in piece:
                if name in table:
                    origins[table[name]] = path
        count = stop
    text = "".join(origins)
    return origins if text.isascii() and "\0" not in text else list(map(_writable, origins))


def _writable(name: str) -> str:
    """Return a name as a text file can hold it: without null characters and halves of characters."""
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        name = name.encode("utf-8", "replace").decode()
    return name.replace("\0", "?")


def _pieces(pairs: Any) -> Iterable[list[Any]] | None:
    return iter([list(map(list, pairs.items()))]) if isinstance(pairs, dict) else in_pieces(pairs)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _are_pairs(values: list[Any]) -> bool:
    """Return whether all are what `_is_pair` accepts, at a third of its time."""
    if not set(map(type, values)) <= {list} or not set(map(len, values)) <= {2}:
        return False
    return set(map(type, map(itemgetter(0), values))) <= {str}


def _values(values: list[Any], where: str) -> np.ndarray:
    """Return labels as numbers or vectors, or as an array of texts."""
    if set(map(type, values)) == {str}:
        return np.array(values, dtype=object)
    return plain_labels(values, where)


def _join(values: list[np.ndarray], class_names: Sequence[str] | None, where: str) -> np.ndarray:
    values = [part for part in values if len(part)]
    texts = next((part for part in values if part.dtype == object), None)
    if texts is not None and any(part.dtype != object for part in values):
        plain_labels(texts.tolist(), where)  # raises UserError
    if len({(part.shape[1:], part.dtype.kind) for part in values}) > 1:
        raise dnnlib.UserError(f"{where}: labels are ragged (all must be integers, or all vectors of one length)")
    labels = np.concatenate(values)
    if labels.dtype != object:
        return labels
    texts = labels.tolist()
    numbers, _ = number_classes(set(texts), class_names, where)
    return plain_labels(list(map(numbers.__getitem__, texts)), where)
