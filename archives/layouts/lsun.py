"""LSUN: an LMDB of encoded images, without labels."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np

import dnnlib
from archives.decode import decode_image
from archives.layouts.lists import find_below
from archives.source import Choice, Source

__all__ = ["find_lsun", "open_lsun"]


def find_lsun(path: str) -> list[str]:
    """Return where an LMDB is: at this path, or nowhere."""
    return find_below(path, [""], ["data.mdb"])


def open_lsun(path: str, choice: Choice) -> Source:
    """Open the LMDB in a folder. UserError: it cannot be read, or the package lmdb is missing."""
    choice.check(path)
    try:
        import lmdb  # optional dependency
    except ImportError:
        raise dnnlib.UserError(f"{path}: reading an LMDB needs the package lmdb: pip install lmdb") from None
    lock = threading.Lock()

    # A process may have an LMDB open only once, and a forked one takes what its parent has open for its own (lmdb 2.0).
    # So it is open only while something is read, which takes little of the time in which an image is decoded.
    @contextlib.contextmanager
    def reading() -> Iterator[lmdb.Transaction]:
        try:
            with lock, lmdb.open(path, readonly=True, lock=False, readahead=False) as env, env.begin() as transaction:
                yield transaction
        except lmdb.Error as err:
            raise dnnlib.UserError(f"{path}: not a readable LMDB ({err})") from None

    with reading() as transaction:
        keys = list(transaction.cursor().iternext(keys=True, values=False))
    if not keys:
        raise dnnlib.UserError(f"{path}: LMDB without images")

    def image(index: int) -> np.ndarray:
        with reading() as transaction:
            data = transaction.get(keys[index])
        if data is None:
            raise dnnlib.UserError(f"{path}: {names[index]}: is no longer in the LMDB")
        return decode_image(bytes(data), f"{path}: {names[index]}", choice.background)

    names = [key.decode("latin1") for key in keys]
    return Source(path, len(keys), image, names=names, corruption=dict(family="lsun"))
