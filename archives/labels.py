"""Check labels, and bring them into the order of an archive's images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

import dnnlib
from archives.json_lists import in_pieces

__all__ = ["match_labels", "plain_labels"]


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


def match_labels(pairs: Any, names: Sequence[str], where: str) -> np.ndarray:
    """Return labels given as [[name, label], ...] in the order of `names`: int64 [N] or float32 [N, D].

    `pairs` is a list or a `LongList`. UserError: an entry is not a pair, names an unknown file or occurs twice, or an
    image has no label.
    """
    pieces = in_pieces(pairs)
    rows, values, count = [], [], 0
    table: dict[str, int] | None = None
    for piece in [None] if pieces is None else pieces:
        if piece is None or not all(
            isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in piece
        ):
            raise dnnlib.UserError(f"{where}: must be a list of [file name, label] pairs, or null")
        given = [pair[0].replace("\\", "/") for pair in piece]
        if table is None and given == list(names[count : count + len(given)]):
            rows.append(np.arange(count, count + len(given)))  # in order, as all tools write them: no table needed
        else:
            table = table or {name: i for i, name in enumerate(names)}
            absent = next((name for name in given if name not in table), None)
            if absent is not None:
                raise dnnlib.UserError(f"{where}: names '{absent}', which is not among the {len(names)} images")
            rows.append(np.array([table[name] for name in given], dtype=np.int64))
        count += len(given)
        values.append(plain_labels([pair[1] for pair in piece], where))
        if count > len(names):  # some occur twice; a file of many repetitions need not be read to its end
            break
    order = np.concatenate(rows)
    found = np.bincount(order, minlength=len(names))
    labeled = int(np.count_nonzero(found))
    if labeled < len(names) and count <= len(names):
        first = names[int(found.argmin())]
        raise dnnlib.UserError(f"{where}: has {labeled} labels for {len(names)} images, none for '{first}'")
    if labeled < count:
        raise dnnlib.UserError(f"{where}: {count - labeled} files are listed twice")
    if len({part.shape[1:] for part in values}) > 1:
        raise dnnlib.UserError(f"{where}: labels are ragged (all must be integers, or all vectors of one length)")
    labels = np.empty([len(names), *values[0].shape[1:]], values[0].dtype)
    labels[order] = np.concatenate(values)
    return labels
