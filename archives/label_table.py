"""Label files as tables, in the columns of the package cleanlab (docs/formats.md, "Label table")."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

import dnnlib
from archives.decisions import class_keys
from archives.label_file import (
    LabelFile,
    check_labels,
    class_noise_rates,
    load_label_file,
    load_outlier_flags,
    match_rows,
)
from archives.tables import guarded, is_table, read_table, unguarded

if TYPE_CHECKING:  # needs PyTorch, which dataset_tool.py avoids because it loads slowly
    from archives.dataset import ImageDataset

__all__ = ["check_replaced", "load_labels_or_table", "load_outliers", "save_label_table"]

COLUMNS = ("is_label_issue", "label_score", "given_label", "predicted_label")
OUTLIER = "is_outlier_issue"
ARCHIVE_NAME = "archive_name"
EXPECTED = f"expected a table with the columns {', '.join(COLUMNS)} of cleanlab, and perhaps {OUTLIER} and file"
FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def check_replaced(path: str | os.PathLike[str]) -> None:
    """Raise UserError if a file is there that `save_label_table` has not written, such as somebody's own labels."""
    if not os.path.lexists(path):
        return
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            header = f.readline(4096)
    except OSError as e:
        raise dnnlib.UserError(f"{path}: cannot be read ({e.strerror})") from None
    if COLUMNS[0] not in header:
        raise dnnlib.UserError(f"{path}: exists, and is no table of an earlier detection; choose another name")


def save_label_table(path: str | os.PathLike[str], file: LabelFile, class_names: list[str] | None) -> None:
    """Write a label file as CSV, complete or not at all. Classes are written by name where their names differ.

    The first columns are for people: the original path of the image (else its name in the archive), its label, the
    suggested one, the probability that the label is wrong. Those of cleanlab follow. `is_outlier_issue` is left out
    where outliers are unknown, the name in the archive where it is the only name.
    """
    keys = [guarded(key) for key in class_keys(class_names, len(file.per_class_noise_rate))]
    labels, suggested = ([keys[c] for c in classes.tolist()] for classes in (file.labels, file.suggested))
    columns = {
        "file": list(map(guarded, file.names if file.source_names is None else file.source_names)),
        "label": labels,
        "suggested_label": suggested,
        "probability_wrong": [f"{1 - score:.9g}" for score in file.score.astype(np.float64).tolist()],
        "is_label_issue": [str(not clean) for clean in file.is_clean.tolist()],
        "label_score": [f"{score:.9g}" for score in file.score.tolist()],
        "given_label": labels,
        "predicted_label": suggested,
    }
    if file.is_outlier is not None:
        columns[OUTLIER] = [str(flag) for flag in file.is_outlier.tolist()]
    if file.source_names is not None:
        columns[ARCHIVE_NAME] = list(map(guarded, file.names))
    dnnlib.write_csv(path, list(columns), zip(*columns.values(), strict=True))


def load_labels_or_table(path: str | os.PathLike[str], dataset: ImageDataset) -> LabelFile:
    """Load a label file (see `load_label_file`), or a table in cleanlab's columns, for the items of `dataset`.

    A table with a column `archive_name` or `file` is matched by name and may know more images, one without by position.
    Classes are read by name, and by number where no class has that name; further columns do not matter. The noise rates
    are counted, since cleanlab's scores are no probabilities.

    UserError: as `load_label_file`; the file is no such table, or a cell holds something else than its column should.
    """
    if not is_table(path):
        return load_label_file(path, dataset)
    if dataset.labels is None:
        raise dnnlib.UserError(
            f"{path}: cannot be used with {dataset.path}, which has no labels with one class per image"
        )
    table = _Lines(path, COLUMNS, dataset)
    labels, suggested = (_classes(table, field, dataset) for field in ("given_label", "predicted_label"))
    check_labels(labels, dataset, str(path))
    is_clean = ~_flags(table, "is_label_issue")
    return LabelFile(
        dataset.file_names,
        labels,
        is_clean,
        _scores(table),
        suggested,
        float(np.mean(~is_clean)),
        class_noise_rates(labels, is_clean, dataset.label_dim),
        is_outlier=_flags(table, OUTLIER) if table.has(OUTLIER) else None,
    )


def load_outliers(path: str | os.PathLike[str], dataset: ImageDataset) -> np.ndarray:
    """Return which items of `dataset` are foreign by a label file or a table with outliers, bool [N].

    The set needs no labels. UserError: the file says nothing about outliers, or it does not fit the set.
    """
    if not is_table(path):
        return load_outlier_flags(path, dataset)
    return _flags(_Lines(path, (OUTLIER,), dataset), OUTLIER)


class _Lines:
    """The lines of a table for the items of a data set. `rows` says which line belongs to each item."""

    def __init__(self, path: str | os.PathLike[str], needed: tuple[str, ...], dataset: ImageDataset) -> None:
        self._table = table = read_table(dnnlib.read_bytes(path), str(path))
        table.fields = [{"label_quality": "label_score"}.get(field, field) for field in table.fields]  # older cleanlab
        missing = [field for field in needed if not self.has(field)]
        if missing:
            raise dnnlib.UserError(f"{path}: lacks {', '.join(missing)}; {EXPECTED}")
        names = [
            [unguarded(str(name)) for name in table.column(field)]
            for field in (ARCHIVE_NAME, "file")
            if self.has(field)
        ]
        if names:
            self.rows = match_rows(str(path), names[0], dataset, *names[1:])
            return
        count = len(table.column(needed[0]))
        if count != dataset.num_raw:
            raise dnnlib.UserError(f"{path}: has {count} lines, but {dataset.path} has {dataset.num_raw} images")
        self.rows = np.tile(np.arange(count), len(dataset) // dataset.num_raw)

    def has(self, field: str) -> bool:
        """Return whether there is such a column."""
        return field in self._table.fields

    def column(self, field: str) -> list[str]:
        """Return the texts of a column, one per item."""
        values = list(map(str, self._table.column(field)))
        return [values[row] for row in self.rows.tolist()]

    def refuse(self, item: int, field: str, expected: str) -> dnnlib.UserError:
        """Return the error that the cell of an item is not what was expected."""
        name, place = self._table.name, self._table.line(int(self.rows[item]))
        return dnnlib.UserError(f"{name}: {place}: {field} is '{self.column(field)[item]}', expected {expected}")


def _flags(table: _Lines, field: str) -> np.ndarray:
    values = [FLAGS.get(cell.strip().lower()) for cell in table.column(field)]
    if None in values:
        raise table.refuse(values.index(None), field, "True or False")
    return np.array(values, dtype=bool)


def _scores(table: _Lines) -> np.ndarray:
    values = np.empty(len(table.rows), dtype=np.float32)
    for item, cell in enumerate(table.column("label_score")):
        try:
            values[item] = float(cell)
        except ValueError:
            values[item] = np.nan
        if not 0 <= values[item] <= 1:
            raise table.refuse(item, "label_score", "a number from 0 to 1")
    return values


def _classes(table: _Lines, field: str, dataset: ImageDataset) -> np.ndarray:
    keys = class_keys(dataset.class_names, dataset.label_dim)
    known = {str(c): c for c in range(len(keys))} | {key: c for c, key in enumerate(keys)}
    values = [known.get(unguarded(cell)) for cell in table.column(field)]
    if None in values:
        raise table.refuse(values.index(None), field, f"a class of {dataset.path} by name or number")
    return np.array(values, dtype=np.int64)
