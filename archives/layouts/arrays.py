"""Images and labels as arrays in one file: `.npz`, or a pickle (`.pk`, `.pkl`), as SBDC's authors keep theirs."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

import dnnlib
from archives.label_file import read_classes, read_flags
from archives.source import Choice, Source
from torch_utils import safe_files, safe_pickle

__all__ = ["find_arrays", "open_arrays"]

PICKLES = (".pk", ".pkl", ".pickle")
# What the entries of a dictionary or .npz may be called. `arr_0` is what NumPy calls the first that has no name.
NAMES = {
    "images": ("arr_0", "images", "image", "data", "samples", "x", "X"),
    "labels": ("arr_1", "labels", "label", "targets", "y", "Y", "noisy_labels", "noisy_label"),
    "clean labels": ("clean_labels", "clean_label"),
    "flags": ("arr_2", "is_clean", "flags"),
}
EXPECTED = (
    "expected images uint8 [N,H,W,C], [N,C,H,W], [N,H,W] or [N,pixels], called arr_0 or images, and perhaps labels "
    "(arr_1), flags (arr_2; 1: the label is right) and clean_labels"
)


def find_arrays(path: str) -> list[str]:
    """Return where arrays are: in this file, or nowhere."""
    return [path] if os.path.isfile(path) and path.lower().endswith((".npz", *PICKLES)) else []


def open_arrays(path: str, choice: Choice) -> Source:
    """Open the images in a file of arrays, with the labels, clean labels and flags that it has.

    A pickle holds a dictionary, a tuple (images, labels, flags) of which only the first must be there, or a list of
    pairs of image and label. UserError: the file is damaged or hostile, holds no images, or its parts do not fit.
    """
    choice.check(path)
    data = dnnlib.read_bytes(path)
    if path.lower().endswith(PICKLES):
        found = safe_pickle.load(data, path, safe_pickle.ARRAYS | safe_pickle.TENSORS, encoding="latin1")
        if not isinstance(found, dict):
            found = _numbered(found)
    else:
        found = safe_files.load_npz(data, path, f"; {EXPECTED}")
    parts, used = {}, set()
    for part, names in NAMES.items():
        name = next((name for name in (*names, *(n.encode() for n in names)) if name in found), None)
        if name is not None:
            used.add(name)
            parts[part] = _array(found[name], f"{path}: {_text(name)}")
    where = {part: f"{path}: {part}" for part in NAMES}
    if "images" not in parts:
        raise dnnlib.UserError(f"{path}: holds {', '.join(map(_text, found)) or 'nothing'}; {EXPECTED}")
    images = _images(parts["images"], where["images"])
    labels, clean = (
        read_classes(parts[part], where[part]) if part in parts else None for part in ("labels", "clean labels")
    )
    flags = read_flags(parts["flags"], where["flags"]) if "flags" in parts else None
    for part, values in (("labels", labels), ("clean labels", clean), ("flags", flags)):
        if values is not None and len(values) != len(images):
            raise dnnlib.UserError(f"{where[part]}: there are {len(values)}, but {len(images)} images")
    source = Source(path, len(images), images.__getitem__, labels, clean, verified=flags)
    if clean is not None:
        source.corruption["clean_labels"] = "published"
    if labels is None and (clean is not None or flags is not None):
        raise dnnlib.UserError(f"{path}: has clean labels or flags, but no labels; {EXPECTED}")
    if left := sorted(_text(name) for name in found if name not in used):
        source.notes.append(f"{path}: not used: {', '.join(left)}")
    return source


def _text(name: Any) -> str:
    return name.decode("latin1") if isinstance(name, bytes) else str(name)


def _numbered(value: Any) -> dict[str, Any]:
    """Return what a pickle holds without names as a dictionary with NumPy's names."""
    if isinstance(value, (list, tuple)) and value and all(_is_pair(item) for item in value):
        value = [_stack([item[0] for item in value]), [item[1] for item in value]]
    if isinstance(value, tuple) or (isinstance(value, list) and len(value) in (2, 3) and _ndim(value[0]) >= 2):
        return {f"arr_{i}": item for i, item in enumerate(value)}
    return {"arr_0": value}


def _is_pair(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and len(item) == 2 and _ndim(item[0]) in (2, 3) and _ndim(item[1]) == 0


def _ndim(value: Any) -> int:
    return getattr(value, "ndim", 0)


def _stack(images: Sequence[Any]) -> Any:
    return np.stack(images) if len({image.shape for image in images}) == 1 else images


def _array(value: Any, where: str) -> np.ndarray:
    """Return an array, a tensor or a list of numbers or of arrays of one shape as an array."""
    try:
        array = value.numpy() if hasattr(value, "numpy") else np.asarray(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        array = np.zeros(0, dtype=object)
    if array.dtype.kind not in "biuf" or not array.ndim or not array.size:
        raise dnnlib.UserError(f"{where}: not an array of numbers; {EXPECTED}")
    return array


def _images(array: np.ndarray, where: str) -> np.ndarray:
    """Return images of any of the accepted shapes as uint8 [N, H, W, C]."""
    found = f"{where} are {array.dtype} {list(array.shape)}"
    if array.dtype != np.uint8:
        raise dnnlib.UserError(f"{found}; {EXPECTED}")
    if array.ndim == 2:  # flat, with the channels first, as in CIFAR's batches
        for channels in (3, 1):
            side = math.isqrt(array.shape[1] // channels)
            if side and channels * side * side == array.shape[1]:
                return np.ascontiguousarray(array.reshape(-1, channels, side, side).transpose(0, 2, 3, 1))
    if array.ndim == 3:
        return array[..., None]
    if array.ndim == 4:
        first, last = array.shape[1] in (1, 3), array.shape[3] in (1, 3)
        if first and last:
            raise dnnlib.UserError(f"{found}, which are the channels?")
        if first or last:
            return np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if first else array
    raise dnnlib.UserError(f"{found}; {EXPECTED}")
