"""Read labels from files of other programs: tables, `.json`, `.npy`, `.npz`, `.pt` (TDSM's files, CIFAR-N)."""

from __future__ import annotations

import itertools
import os
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import dnnlib
from archives.classes import name_look_alikes
from archives.json_lists import in_pieces, load_lists
from archives.labels import NUMBER, match_origins, number_classes, plain_labels
from archives.listing import count_of, quoted, some
from archives.name_matching import match_names
from archives.tables import TABLES, Table, file_and_label, is_table, read_table, table_of, unguarded
from torch_utils import safe_files

__all__ = ["Imported", "labels_by_name", "load_labels"]

_READERS = {
    ".json": load_lists,
    ".npy": safe_files.load_npy,
    ".npz": safe_files.load_npz,
    ".pt": safe_files.load_pt,
}
JSON = '{"labels": [[file name, label], ...]}, {file name: label, ...} or [{"file_name": ..., "label": ...}, ...]'


@dataclass
class Imported:
    """Labels of N images from a file."""

    labels: np.ndarray  # int64 [N], or float32 [N, D] from a file of vectors; any of them where there is none
    class_names: list[str] | None  # of the classes; None where labels are numbers and no names were given
    missing: np.ndarray  # bool [N], images without a label
    notes: list[str] = field(default_factory=list)  # what a person should know


def load_labels(
    path: str,
    names: list[Sequence[str]],
    count: int,
    key: str | None = None,
    class_names: Sequence[str] | None = None,
    may_lack: Callable[[int], bool] | None = None,
    rename: bool = False,
    extend: bool = False,
    usual: Sequence[str] = (),
    ordered: bool = False,
) -> Imported:
    """Return the labels of `count` images from a file.

    names        lists of image names, for files that name images (see `match_names`); others have the images' order
    key          which entry of a `.json` (default "labels"), `.npz` or `.pt` dictionary, or which column of a table;
                 required when there are several
    class_names  of the images' classes, for files that name classes (see `number_classes`)
    may_lack     whether an image, by its row, may have no label; None: all need one
    rename       take the file's classes instead of `class_names` if they have none in common
    extend       add the file's classes to `class_names`
    usual        what `key` may be if it is not given and the file has such an entry or column
    ordered      whether a table without file names has the order of the images

    UserError: the file is unreadable or hostile, has no such entry, has another number of labels than there are images
    (the message gives both numbers), names no image or an image twice, lacks images, or holds something else than
    labels.
    """
    given, values, where, notes = _read(path, key, usual)
    if given is not None:
        found = labels_by_name(given, values, names, where, class_names, may_lack, rename, extend)
        found.notes = notes + found.notes
        return found
    if is_table(path):
        if not ordered:
            raise dnnlib.UserError(f"{where}: names no files: it needs a column such as file_name")
        notes.append(f"{where}: names no files, so its lines are taken in the order of the images")
    if len(values) != count:
        raise dnnlib.UserError(f"{where}: has {len(values)} labels, but the source has {count} images")
    labels, classes = _number(values, class_names, where, rename, extend)
    return Imported(labels, classes, np.zeros(count, dtype=bool), notes)


def labels_by_name(
    given: list[Any], values: list[Any], names: list[Sequence[str]], where: str,
    class_names: Sequence[str] | None = None, may_lack: Callable[[int], bool] | None = None, rename: bool = False,
    extend: bool = False,
) -> Imported:  # fmt: skip
    """Return the labels `values` of the images that are called `given`, in the images' order (see `load_labels`).

    An empty label is none.
    """
    labeled = [not _is_empty(value) for value in values]
    if not any(labeled):
        raise dnnlib.UserError(f"{where}: {'all labels are empty' if values else 'holds no labels'}")
    if not all(labeled):
        given, values = (list(itertools.compress(column, labeled)) for column in (given, values))
    values, missing, notes = _arrange(given, values, names, where)
    lacking = np.flatnonzero(missing).tolist()
    if lacking and not (may_lack is not None and all(map(may_lack, lacking))):
        raise dnnlib.UserError(
            f"{where}: has no label for {len(lacking):,} of the {len(missing):,} images: "
            f"{some(quoted(names[0][i] for i in lacking), len(lacking))}; leave them out with dataset_tool.py "
            "--labels=FILE --skip_unlabeled"
        )
    labels, classes = _number(values, class_names, where, rename, extend)
    whole = np.empty([len(missing), *labels.shape[1:]], labels.dtype)
    whole[missing] = labels[0]  # a class that has images
    whole[~missing] = labels
    return Imported(whole, classes, missing, notes)


def _arrange(
    given: list[Any], values: list[Any], names: list[Sequence[str]], where: str
) -> tuple[list[Any], np.ndarray, list[str]]:
    """Return the values in the order of the images that have one, which images have none, bool [N], and notes."""
    count = len(names[0])
    if kinds := set(map(type, given)) - {str}:
        if kinds - {int}:
            raise dnnlib.UserError(f"{where}: a file name is {next(n for n in given if type(n) not in (str, int))!r}")
        given = list(map(str, given))
    rows, notes = match_names(given, names, where)
    known = rows >= 0
    times = np.bincount(rows[known], minlength=count)
    if (twice := np.flatnonzero(times > 1)).size:
        first: dict[int, Any] = {}
        differ = dict.fromkeys(
            row for row, value in zip(rows.tolist(), values, strict=True)
            if row >= 0 and times[row] > 1 and first.setdefault(row, value) != value
        )  # fmt: skip
        if differ:
            shown = some(quoted(names[0][row] for row in differ), len(differ))
            raise dnnlib.UserError(f"{where}: {count_of(len(differ), 'file')} with several different labels: {shown}")
        shown = some(quoted(names[0][int(i)] for i in twice), len(twice))
        notes = [*notes, f"{where}: {count_of(len(twice), 'file')} listed several times, with one label: {shown}"]
    if not known.all():
        extra = np.flatnonzero(~known)
        shown = some(quoted(given[i] for i in extra), len(extra))
        notes = [*notes, f"{where}: has {count_of(len(extra), 'name')} without an image, of {len(given):,}: {shown}"]
    place = np.full(count, -1)
    place[rows[known]] = np.flatnonzero(known)
    return [values[i] for i in place[place >= 0].tolist()], times == 0, notes


def _is_empty(label: Any) -> bool:
    return label is None or label != label or (type(label) is str and not label.strip())


def _number(
    values: list[Any], class_names: Sequence[str] | None, where: str, rename: bool, extend: bool
) -> tuple[np.ndarray, list[str] | None]:
    """Return labels as int64 [N] or float32 [N, D], and the names of their classes."""
    empty = sum(map(_is_empty, values))
    if empty:
        raise dnnlib.UserError(f"{where}: {empty:,} of {len(values):,} labels are empty")
    kinds = set(map(type, values))
    if str not in kinds:
        return plain_labels(values, where), None if class_names is None else list(class_names)
    if kinds != {str}:
        raise dnnlib.UserError(f"{where}: some labels are texts and some are not, such as {some(quoted(values), 1)}")
    texts = list(map(str.strip, values))
    if class_names is not None and not "".join(class_names).isascii():  # macOS writes accented letters as two
        composed = {unicodedata.normalize("NFC", name): name for name in class_names}
        texts = [composed.get(unicodedata.normalize("NFC", text), text) for text in texts]
    given = set(texts)
    if class_names is not None and not all(map(NUMBER.fullmatch, given)):
        if rename and not given & set(class_names):
            class_names = None
        elif extend:
            new = sorted(given - set(class_names))
            if doubtful := name_look_alikes([*class_names, *new]):
                raise dnnlib.UserError(f"{where}: {doubtful[0]}")
            class_names = [*class_names, *new]
    numbers, found = number_classes(given, class_names, where)
    return plain_labels(list(map(numbers.__getitem__, texts)), where), found


# ----------------------------------------------------------------------------------------------------------------------
# Each kind of file -> file names or None, labels, what messages call it, notes.


def _read(path: str, key: str | None, usual: Sequence[str]) -> tuple[list[Any] | None, list[Any], str, list[str]]:
    if is_table(path):
        return _from_table(read_table(dnnlib.read_bytes(path), path), key, usual)
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _READERS:
        raise dnnlib.UserError(f"{path}: expected a .json, .npy, .npz or .pt file, or a table ({', '.join(TABLES)})")
    found = _READERS[suffix](dnnlib.read_bytes(path), path)
    if suffix == ".json":
        return _from_json(found, key, usual, path)
    key = _usual_key(key, found if isinstance(found, dict) else (), usual)
    values = _choose(found, key, path)
    where = f"{path}: '{key}'" if key else path
    array = values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
    if array.ndim != 1:
        raise dnnlib.UserError(f"{where}: must be 1-D, found {array.ndim} dimensions")
    if isinstance(found, dict) and key not in ("names", "source_names"):
        texts = [found.get(name) for name in ("source_names", "names")]  # of a label file of detect_noise.py
        lists = [x.tolist() for x in texts if getattr(x, "shape", None) == array.shape and x.dtype.kind == "U"]
        if lists:  # original paths, unless some are the same
            return next((x for x in lists if len(set(x)) == len(x)), lists[-1]), array.tolist(), where, []
    return None, array.tolist(), where, []


def _usual_key(key: str | None, there: Collection[str], usual: Sequence[str]) -> str | None:
    return key if key is not None else next((name for name in usual if name in there), None)


def _from_table(
    table: Table, key: str | None, usual: Sequence[str]
) -> tuple[list[Any] | None, list[Any], str, list[str]]:
    key = _usual_key(key, table.fields, usual)
    names, labels, notes = file_and_label(table, key)
    if names is not None and "probability_wrong" in table.fields:  # ours, whose cells are guarded
        names, labels = ([unguarded(x) if type(x) is str else x for x in cells] for cells in (names, labels))
    return names, _texts(labels), table.name if key is None else f"{table.name}: '{key}'", notes


def _texts(labels: Iterable[Any]) -> list[Any]:
    """Return labels with whole numbers as texts, as a CSV has them: they may be names of classes."""
    whole = (type(x) is int or (type(x) is float and x.is_integer()) for x in labels)
    return [str(int(x)) if number else x for x, number in zip(labels, whole, strict=True)]


def _from_json(
    found: Any, key: str | None, usual: Sequence[str], path: str
) -> tuple[list[Any] | None, list[Any], str, list[str]]:
    if isinstance(found, list) and found and type(found[0]) is dict:
        return _from_table(table_of(found, path, lambda row: f"object {row + 1}"), key, usual)
    values, where = found, path
    if isinstance(found, dict):
        key = _usual_key(key, [name for name in found if in_pieces(found[name]) or type(found[name]) is dict], usual)
    if isinstance(found, dict) and (key is not None or "labels" in found):
        key = key or "labels"
        values, where = _choose(found, key, path), f"{path}: '{key}'"
    if isinstance(values, dict):
        return list(values), _texts(values.values()), where, []
    names: list[str] = []
    labels: list[Any] = []
    for piece in in_pieces(values) or [[None]]:
        if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in piece):
            raise dnnlib.UserError(f"{where}: must hold {JSON}")
        names += [pair[0] for pair in piece]
        labels += [pair[1] for pair in piece]
    pairs = found.get("source_names") if isinstance(found, dict) else None  # of our archives
    called = names if pairs is None else match_origins(pairs, names, f'{path}: "source_names"')
    return called if len(set(called)) == len(called) else names, labels, where, []


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
