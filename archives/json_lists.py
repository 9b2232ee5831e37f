"""Read a `dataset.json` of any size: its long lists are parsed piece by piece, so that they never exist as a whole.

As Python objects, a million labels take 300 MB. As arrays they take eight.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np

import dnnlib
from torch_utils.safe_files import MAX_JSON, json_error, json_levels, load_json, place_in_text

__all__ = ["LongList", "in_pieces", "load_lists"]


class LongList:
    """A list inside a JSON text that is not parsed yet: `data[start : end]` without its brackets.

    `commas` are some of the positions where one item ends and the next begins.
    """

    def __init__(self, data: bytes, start: int, end: int, commas: list[int], name: str):
        self._data, self._name = data, name
        self._borders = [start - 1, *commas, end]

    def first(self) -> Any:
        """Return the first item; None where it is not found within a few thousand bytes."""
        start = self._borders[0] + 1
        text = self._data[start : start + 4096].decode("utf-8", "replace").lstrip()
        with contextlib.suppress(ValueError, RecursionError):
            return json.JSONDecoder().raw_decode(text)[0]
        return None

    def pieces(self) -> Iterator[list[Any]]:
        """Yield the items in order, in lists of about a megabyte of text. UserError: a piece is not valid JSON."""
        data, name = self._data, self._name
        for before, end in zip(self._borders[:-1], self._borders[1:], strict=True):
            text = b"[" + data[before + 1 : end] + b"]"
            piece = load_json(text, name, place=lambda at, before=before: (data, before + at))
            if not piece and len(self._borders) > 2:
                raise json_error(name, data, end, "a comma has nothing behind it")
            yield piece


def in_pieces(value: Any) -> Iterator[list[Any]] | None:
    """Return the pieces of a list of either kind; None for other values."""
    return value.pieces() if isinstance(value, LongList) else iter([value]) if isinstance(value, list) else None


def load_lists(data: bytes, name: str, limit: int = MAX_JSON) -> Any:
    """Return the value of a JSON text like `load_json`, in which long lists in the outermost object are `LongList`s.

    `limit` bytes are allowed for all that is not in such a list. UserError: as for `load_json`.
    """
    found = [where for where in _long_values(data, name) if data[where[0]] == ord("[")]
    token = secrets.token_hex(16)  # the text cannot contain it
    parts, done = [], 0
    for number, (start, end, _) in enumerate(found):
        parts += [data[done:start], f'"{token}{number}"'.encode()]
        done = end + 1

    def place(at: int) -> tuple[bytes, int]:
        for number, (start, end, _) in enumerate(found):
            mark = len(token) + len(str(number)) + 2  # what stands for the list, with its quotes
            if at < start + mark:
                return data, min(at, start)
            at += end + 1 - start - mark
        return data, at

    value = load_json(b"".join([*parts, data[done:]]) if found else data, name, limit, place=place)
    if not found or not isinstance(value, dict):
        return value
    lists = {
        f"{token}{i}": LongList(data, start + 1, end, commas, name) for i, (start, end, commas) in enumerate(found)
    }
    return {key: lists.get(item, item) if isinstance(item, str) else item for key, item in value.items()}


def _long_values(data: bytes, name: str) -> list[tuple[int, int, list[int]]]:
    """Return (first byte, last byte, positions of some commas) of the values in the outermost object that are long.

    Long are those that reach from one chunk of `json_levels` into the next.
    """
    found, opened, commas = [], None, []
    for start, levels, outside in json_levels(data):
        first = 0  # where the value begins that is open at the end of this chunk
        if opened is not None and (ends := levels < 2).any():
            first = int(ends.argmax())
            found.append((opened, start + first, commas))
            opened = None
        if opened is None and levels[-1] >= 2:
            first = len(levels) - int((np.append(levels[::-1], 0) < 2).argmax())
            opened, commas = start + first, []
        if opened is not None:
            text = np.frombuffer(data, np.uint8, len(levels), start)
            places = np.flatnonzero((text == ord(",")) & (levels == 2) & outside)
            if len(places) and places[-1] > first:
                commas.append(start + int(places[-1]))
    if opened is not None:
        raise dnnlib.UserError(f"{name}: not valid JSON, what begins in {place_in_text(data, opened)} does not end")
    return found
