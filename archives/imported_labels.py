"""Read labels from files of other programs: an archive's `.json`, `.npy`, `.npz`, `.pt` (TDSM's files, CIFAR-N)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

import dnnlib
from archives.json_lists import in_pieces, load_lists
from archives.labels import match_labels, plain_labels
from torch_utils import safe_files

__all__ = ["load_labels"]

_READERS = {
    ".json": load_lists,
    ".npy": safe_files.load_npy,
    ".npz": safe_files.load_npz,
    ".pt": safe_files.load_pt,
}


def load_labels(path: str, names: list[Sequence[str]], count: int, key: str | None = None) -> np.ndarray:
    """Return the labels of `count` images from a file: int64 [N], or float32 [N, D] from a `.json` of vectors.

    names  lists of image names, one of which a `.json` must use
    key    which entry of a `.json` (default "labels"), `.npz` or `.pt` dictionary; required when there are several

    UserError: the file is unreadable or hostile, has no such entry, has another number of labels than there are images
    (the message gives both numbers), or holds something else than labels.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _READERS:
        raise dnnlib.UserError(f"{path}: expected a .json, .npy, .npz or .pt file")
    found = _READERS[suffix](dnnlib.read_bytes(path), path)
    if suffix == ".json":
        if not isinstance(found, dict):
            raise dnnlib.UserError(f'{path}: must hold {{"labels": [[file name, label], ...]}}')
        key = key or "labels"
    values = _choose(found, key, path)
    where = f"{path}: '{key}'" if key else path
    if suffix == ".json":
        if in_pieces(values) is None:
            raise dnnlib.UserError(f"{where}: must be a list of [file name, label] pairs")
        _check_length(sum(map(len, in_pieces(values))), count, where)
        pair = next(in_pieces(values))[0]
        first = pair[0] if isinstance(pair, list) and pair else None
        used = next((known for known in names if first in known), names[0])
        return match_labels(values, used, where)
    array = values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
    if array.ndim != 1:
        raise dnnlib.UserError(f"{where}: must be 1-D, found {array.ndim} dimensions")
    _check_length(len(array), count, where)
    return plain_labels(array.tolist(), where)


def _choose(found: Any, key: str | None, path: str) -> Any:
    """Return the entry of a file that `key` names, or the only one that it has."""
    if not isinstance(found, dict):
        if key is not None:
            raise dnnlib.UserError(f"{path}: holds one array without a name, so it has no entry '{key}'")
        return found
    if key is None and len(found) == 1:
        return next(iter(found.values()))
    if key is None or key not in found:
        problem = (
            f"has no entry '{key}'" if key else "has several entries, choose one: dataset_tool.py --label_key=NAME"
        )
        raise dnnlib.UserError(f"{path}: {problem} (there are: {', '.join(map(str, found)) or 'none'})")
    return found[key]


def _check_length(found: int, expected: int, where: str) -> None:
    if found != expected:
        raise dnnlib.UserError(f"{where}: has {found} labels, but the source has {expected} images")
