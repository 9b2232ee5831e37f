"""Label files as CSV, in the columns of the package cleanlab (docs/formats.md, "Label table")."""

from __future__ import annotations

import csv
import io
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

if TYPE_CHECKING:  # needs PyTorch, which dataset_tool.py avoids because it loads slowly
    from archives.dataset import ImageDataset

__all__ = ["load_labels_or_table", "load_outliers", "save_label_table"]

COLUMNS = ("is_label_issue", "label_score", "given_label", "predicted_label")
OUTLIER = "is_outlier_issue"
EXPECTED = f"expected a CSV with the columns {', '.join(COLUMNS)} of cleanlab, and perhaps {OUTLIER} and file"
FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def save_label_table(path: str | os.PathLike[str], file: LabelFile, class_names: list[str] | None) -> None:
    """Write a label file as CSV, complete or not at all. Classes are written by name where their names differ.

    The column `is_outlier_issue` is left out where outliers are unknown.
    """
    keys = class_keys(class_names, len(file.per_class_noise_rate))
    columns = {
        "file": file.names,
        "is_label_issue": [str(not clean) for clean in file.is_clean.tolist()],
        "label_score": [f"{score:.9g}" for score in file.score.tolist()],
        "given_label": [keys[c] for c in file.labels.tolist()],
        "predicted_label": [keys[c] for c in file.suggested.tolist()],
    }
    if file.is_outlier is not None:
        columns[OUTLIER] = [str(flag) for flag in file.is_outlier.tolist()]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    with dnnlib.atomic_open(path) as f:
        f.write(text.getvalue().encode())


def load_labels_or_table(path: str | os.PathLike[str], dataset: ImageDataset) -> LabelFile:
    """Load a label file (see `load_label_file`), or a `.csv` in cleanlab's columns, for the items of `dataset`.

    A CSV with a column `file` is matched by name and may know more images, one without by position. Classes are read by
    name, and by number where no class has that name; further columns do not matter. The noise rates are counted, since
    cleanlab's scores are no probabilities.

    UserError: as `load_label_file`; the file is no such CSV, or a cell holds something else than its column should.
    """
    if not _is_table(path):
        return load_label_file(path, dataset)
    if dataset.labels is None:
        raise dnnlib.UserError(
            f"{path}: cannot be used with {dataset.path}, which has no labels with one class per image"
        )
    lines = _read(path, COLUMNS, dataset)
    labels, suggested = (_classes(path, lines, field, dataset) for field in ("given_label", "predicted_label"))
    check_labels(labels, dataset, str(path))
    is_clean = ~_flags(path, lines, "is_label_issue")
    return LabelFile(
        dataset.file_names,
        labels,
        is_clean,
        _scores(path, lines),
        suggested,
        float(np.mean(~is_clean)),
        class_noise_rates(labels, is_clean, dataset.label_dim),
        is_outlier=_flags(path, lines, OUTLIER) if OUTLIER in lines[0] else None,
    )


def load_outliers(path: str | os.PathLike[str], dataset: ImageDataset) -> np.ndarray:
    """Return which items of `dataset` are foreign by a label file or a CSV with outliers, bool [N].

    The set needs no labels. UserError: the file says nothing about outliers, or it does not fit the set.
    """
    if not _is_table(path):
        return load_outlier_flags(path, dataset)
    return _flags(path, _read(path, (OUTLIER,), dataset), OUTLIER)


def _is_table(path: str | os.PathLike[str]) -> bool:
    return str(path).lower().endswith(".csv")


def _read(path: str | os.PathLike[str], needed: tuple[str, ...], dataset: ImageDataset) -> list[dict[str, str]]:
    """Return the lines of a CSV for the items of the data set, each with its number as `line`."""
    try:
        text = dnnlib.read_bytes(path).decode("utf-8-sig")  # spreadsheets put a mark of byte order in front
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = [{"label_quality": "label_score"}.get(cell, cell) for cell in next(rows, [])]  # an older cleanlab
        missing = [field for field in needed if field not in header]
        if missing:
            raise dnnlib.UserError(f"{path}: lacks {', '.join(missing)}; {EXPECTED}")
        lines = []
        for cells in rows:
            if cells and len(cells) != len(header):
                raise dnnlib.UserError(f"{path}: line {rows.line_num} has {len(cells)} cells, not {len(header)}")
            if cells:
                lines.append({**dict(zip(header, cells, strict=True)), "line": str(rows.line_num)})
    except (UnicodeDecodeError, csv.Error) as e:
        raise dnnlib.UserError(f"{path}: is not a CSV in UTF-8 ({e}); {EXPECTED}") from e
    if "file" in header:
        return [lines[i] for i in match_rows(str(path), [line["file"] for line in lines], dataset)]
    if len(lines) != dataset.num_raw:
        raise dnnlib.UserError(f"{path}: has {len(lines)} lines, but {dataset.path} has {dataset.num_raw} images")
    return lines * (len(dataset) // dataset.num_raw)


def _refuse(path: str | os.PathLike[str], line: dict[str, str], field: str, expected: str) -> dnnlib.UserError:
    return dnnlib.UserError(f"{path}: line {line['line']}: {field} is '{line[field]}', expected {expected}")


def _flags(path: str | os.PathLike[str], lines: list[dict[str, str]], field: str) -> np.ndarray:
    values = [FLAGS.get(line[field].strip().lower()) for line in lines]
    if None in values:
        raise _refuse(path, lines[values.index(None)], field, "True or False")
    return np.array(values, dtype=bool)


def _scores(path: str | os.PathLike[str], lines: list[dict[str, str]]) -> np.ndarray:
    values = np.empty(len(lines), dtype=np.float32)
    for i, line in enumerate(lines):
        try:
            values[i] = float(line["label_score"])
        except ValueError:
            values[i] = np.nan
        if not 0 <= values[i] <= 1:
            raise _refuse(path, line, "label_score", "a number from 0 to 1")
    return values


def _classes(
    path: str | os.PathLike[str], lines: list[dict[str, str]], field: str, dataset: ImageDataset
) -> np.ndarray:
    keys = class_keys(dataset.class_names, dataset.label_dim)
    known = {str(c): c for c in range(len(keys))} | {key: c for c, key in enumerate(keys)}
    values = [known.get(line[field]) for line in lines]
    if None in values:
        raise _refuse(path, lines[values.index(None)], field, f"a class of {dataset.path} by name or number")
    return np.array(values, dtype=np.int64)
