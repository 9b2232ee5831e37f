"""The names of an archive's images as one text, instead of a string per image."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

import dnnlib

__all__ = ["Names"]

STEP = 1 << 14  # names that are decoded at a time


class Names(Sequence[str]):
    """Sorted names of N files; reading one decodes it.

    text    uint8, the names in UTF-8, each followed by a zero byte
    starts  int64 [N + 1], where each begins, and the end of the last
    """

    def __init__(self, text: np.ndarray, starts: np.ndarray):
        self.text, self.starts = text, starts

    @classmethod
    def of(cls, names: Iterable[bytes]) -> Names:
        """Return names given in UTF-8, which must be sorted."""
        names = list(names)
        starts = np.zeros(len(names) + 1, dtype=np.int64)
        np.cumsum([len(name) + 1 for name in names], out=starts[1:])
        return cls(np.frombuffer(b"\0".join([*names, b""]), np.uint8), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            rows = range(len(self))[index]
            return self._decode(rows.start, rows.stop) if rows.step == 1 else [self[i] for i in rows]
        row = range(len(self))[index]  # negative indices, IndexError
        return self._decode(row, row + 1)[0]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), STEP):
            yield from self[start : start + STEP]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.find(name) is not None

    def find(self, name: str) -> int | None:
        """Return the row of a name, None if there is no such name."""
        row = bisect_left(self, name)
        return row if row < len(self) and self[row] == name else None

    def _decode(self, start: int, stop: int) -> list[str]:
        if stop <= start:
            return []
        a, b = int(self.starts[start]), int(self.starts[stop])
        found = self.text[a : b - 1].tobytes().decode("utf-8", "surrogateescape").split("\0")
        if len(found) != stop - start:  # only an index that somebody forged
            raise dnnlib.UserError("the index of the archive is damaged, delete it")
        return found
