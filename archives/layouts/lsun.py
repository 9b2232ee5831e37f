"""LSUN: an LMDB of encoded images, without labels."""

from __future__ import annotations

import functools
import os
import threading

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
    open_env = functools.partial(lmdb.open, path, readonly=True, lock=False, readahead=False, max_readers=1024)
    try:
        with open_env() as env, env.begin() as transaction:
            keys = list(transaction.cursor().iternext(keys=True, values=False))
    except lmdb.Error as err:
        raise dnnlib.UserError(f"{path}: not a readable LMDB ({err})") from None
    if not keys:
        raise dnnlib.UserError(f"{path}: LMDB without images")
    local = threading.local()  # a transaction belongs to one thread, and an environment to one process

    def image(index: int) -> np.ndarray:
        if getattr(local, "process", None) != os.getpid():
            local.process, local.transaction = os.getpid(), open_env().begin()
        return decode_image(bytes(local.transaction.get(keys[index])), f"{path}: {names[index]}", choice.background)

    names = [key.decode("latin1") for key in keys]
    return Source(path, len(keys), image, names=names, corruption=dict(family="lsun"))
