"""Decisions: what a person decided about single images on the review page, as CSV (docs/formats.md, "Decisions").

    file,label,decision,new_label
    "00000/img00000007.png","Dress","relabel","Bag"

The CSV names classes so that a person can read it and spreadsheets can open it: see `class_keys` and `tables.guarded`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

import dnnlib
from archives.label_file import LabelFile
from archives.tables import SEPARATOR, is_table, read_table, unguarded

__all__ = ["Decisions", "addresses", "apply_to_labels", "class_keys", "holds_decisions", "load_decisions"]

COLUMNS = ("file", "label", "decision", "new_label")
KINDS = ("keep", "relabel", "drop")


@dataclass
class Decisions:
    """What was decided about some of the images of an archive, each at most once. All arrays hold rows, int64."""

    keep: np.ndarray  # the label is right
    relabel: np.ndarray  # the label is wrong, `new_labels` has the right one
    new_labels: np.ndarray  # one per row in `relabel`
    drop: np.ndarray  # the image does not belong in the set


def addresses(names: Sequence[str], origins: Sequence[str] | None) -> list[str]:
    """Return what a CSV calls images: their original paths where these are known and differ, else their names [N].

    Names in an archive are numbers: an archive without some images of another one gives the same names to others.
    """
    return list(origins) if origins is not None and len(set(origins)) == len(names) else list(names)


def class_keys(class_names: Sequence[str] | None, classes: int) -> list[str]:
    """Return how a CSV writes each class: by its name if all names differ and are printable, else by its number."""
    if class_names is not None and len({name for name in class_names if name and name.isprintable()}) == classes:
        return list(class_names)
    return [str(c) for c in range(classes)]


def holds_decisions(path: str) -> bool:
    """Return whether a file is a table with a column `decision`, and not one of labels."""
    if not is_table(path):
        return False
    if not path.lower().endswith((".csv", ".tsv")):
        return "decision" in [field.lower() for field in read_table(dnnlib.read_bytes(path), path).fields]
    text = dnnlib.read_bytes(path)[:1000].removeprefix(b"\xef\xbb\xbf").decode("latin1")
    stated = SEPARATOR.match(text)
    head = (text[stated.end() :] if stated else text).split("\n")[0].lower()
    delimiters = re.escape(stated[1]) if stated else r"[,;|\t]"
    return "decision" in [cell.strip('" \r') for cell in re.split(delimiters, head)]


def load_decisions(
    path: str, names: Sequence[str], labels: np.ndarray, class_names: Sequence[str] | None, classes: int
) -> Decisions:
    """Read decisions about the images of an archive with `labels` int64 [N].

    `names` are the `addresses` of the images. Classes are read by name, and by number where no name is a number.
    UserError: the file is no such CSV, or some of its lines name unknown files, labels that are not the archive's,
    unknown classes or decisions, or a file twice. The message says how many lines do and shows the first.
    """
    lines, place = _read(path)
    keys = class_keys(class_names, classes)
    by_key = {key: c for c, key in enumerate(keys)}
    if not any(key.isdecimal() for key in keys):  # else 1 could be what a spreadsheet made of the name 001
        by_key |= {str(c): c for c in range(classes)}
    by_name = _saved_names(names) | {name: row for row, name in enumerate(names)}
    rows = [by_name.get(unguarded(line["file"])) for line in lines]
    stated = [by_key.get(unguarded(line["label"])) for line in lines]
    kinds = [line["decision"].strip().lower() for line in lines]
    new = [by_key.get(unguarded(line["new_label"])) for line in lines]

    def refuse(bad: list[int], problem: str, field: str, hint: str = "") -> None:
        if bad:
            line = lines[bad[0]]
            of = f" of '{line['file']}'" if field != "file" else ""
            raise dnnlib.UserError(
                f"{path}: {len(bad)} of {len(lines)} lines {problem}, first {place(bad[0])}: "
                f"{field} '{line[field]}'{of}{hint}"
            )

    each = range(len(lines))
    shown = ", ".join(keys[:10]) + (", ..." if classes > 10 else "")
    hint = f"; images are called as '{names[0]}' is, and those that were dropped before are gone"
    refuse(
        [i for i in each if rows[i] is None], f"name a file that is not among the {len(labels)} images", "file", hint
    )
    refuse([i for i in each if kinds[i] not in KINDS], "hold no decision", "decision", f", expected {', '.join(KINDS)}")
    refuse(
        [i for i in each if stated[i] != labels[rows[i]]],
        "have a label that is not the archive's",
        "label",
        ": the decisions belong to another archive, or to other labels",
    )
    refuse(
        [i for i in each if kinds[i] == "relabel" and new[i] is None],
        "have an unknown class as new label",
        "new_label",
        f", expected one of: {shown}",
    )
    refuse(
        [i for i in each if kinds[i] != "relabel" and lines[i]["new_label"]],
        "have a new label, but the decision is not 'relabel'",
        "new_label",
    )
    seen: set[int] = set()
    refuse([i for i in each if rows[i] in seen or seen.add(rows[i])], "name a file that was named before", "file")

    kinds = ["keep" if k == "relabel" and new[i] == stated[i] else k for i, k in enumerate(kinds)]

    def chosen(kind: str, values: list[int]) -> np.ndarray:
        return np.array([value for value, k in zip(values, kinds, strict=True) if k == kind], dtype=np.int64)

    return Decisions(chosen("keep", rows), chosen("relabel", rows), chosen("relabel", new), chosen("drop", rows))


def _saved_names(names: Sequence[str]) -> dict[str, int]:
    """Return the rows of images whose names are no UTF-8, by what browsers write for them, where it is one image."""
    saved = {row: text for row, name in enumerate(names) if (text := re.sub("[\ud800-\udfff]", "\ufffd", name)) != name}
    times = Counter(saved.values())
    return {text: row for row, text in saved.items() if times[text] == 1}


def apply_to_labels(found: LabelFile, decisions: Decisions) -> LabelFile:
    """Return a label file that believes the decisions: their labels are right or wrong with certainty.

    An image to drop becomes an outlier with a wrong label and no right one, others are none. The posterior is certain
    of kept and new labels. The noise rates and their interval move by what changed in the scores or, if these are no
    probabilities, in the flags.
    """
    keep, relabel, drop = decisions.keep, decisions.relabel, decisions.drop
    is_clean, score, suggested = found.is_clean.copy(), found.score.copy(), found.suggested.copy()
    is_clean[keep], score[keep], suggested[keep] = True, 1, found.labels[keep]
    is_clean[relabel], score[relabel], suggested[relabel] = False, 0, decisions.new_labels
    is_clean[drop], score[drop], suggested[drop] = False, 0, found.labels[drop]
    before, after = (found.is_clean, is_clean) if found.suggested_score is None else (found.score, score)
    changed = before.astype(np.float64) - after
    rate = float(np.clip(found.noise_rate + changed.mean(), 0, 1))
    classes = len(found.per_class_noise_rate)
    moved = np.bincount(found.labels, changed, classes) / np.maximum(np.bincount(found.labels, minlength=classes), 1)
    result = replace(
        found,
        is_clean=is_clean,
        score=score,
        suggested=suggested,
        noise_rate=rate,
        per_class_noise_rate=np.clip(found.per_class_noise_rate + moved, 0, 1).astype(np.float32),
    )
    if found.noise_interval is not None:
        moved = np.clip(np.array(found.noise_interval) + rate - found.noise_rate, 0, 1)
        result.noise_interval = (float(moved[0]), float(moved[1]))
    if found.suggested_score is not None:
        result.suggested_score = found.suggested_score.copy()
        result.suggested_score[np.concatenate([keep, relabel])] = 1
        result.suggested_score[drop] = 0
    if found.posterior is not None:
        classes = np.concatenate([found.labels[keep], decisions.new_labels])
        result.posterior = found.posterior.decided(np.concatenate([keep, relabel]), classes)
    if found.is_outlier is not None or len(drop):
        result.is_outlier = np.zeros(len(score), dtype=bool) if found.is_outlier is None else found.is_outlier.copy()
        result.is_outlier[np.concatenate([keep, relabel])] = False
        result.is_outlier[drop] = True
    return result


def _read(path: str) -> tuple[list[dict[str, str]], Callable[[int], str]]:
    """Return the lines of a CSV with our columns, and a function that says where a line is in the file."""
    expected = f"expected a CSV with the columns {', '.join(COLUMNS)}, as the review page saves it"
    table = read_table(dnnlib.read_bytes(path), path)
    table.fields = [field.lower() for field in table.fields]
    if not set(COLUMNS) <= set(table.fields):
        found = f"has the columns {table.fields}"[:200] if table.fields else "is empty"
        raise dnnlib.UserError(f"{path}: {found}, {expected}")
    columns = [table.column(field) for field in COLUMNS]
    if not columns[0]:
        raise dnnlib.UserError(f"{path}: holds no decisions")
    # Not all tables are text: JSON and Parquet know numbers and empty cells.
    texts = [["" if cell is None else str(cell) for cell in column] for column in columns]
    return [dict(zip(COLUMNS, cells, strict=True)) for cells in zip(*texts, strict=True)], table.line
