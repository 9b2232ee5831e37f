"""CelebA: `img_align_celeba`, a folder or a ZIP, with attributes, identities and parts in text files beside it."""

from __future__ import annotations

import os

import numpy as np

import dnnlib
from archives.archive_set import open_archives
from archives.layouts.lists import find_file, read_lines
from archives.source import Choice, Source

__all__ = ["find_celeba", "open_celeba"]

IMAGES = ("img_align_celeba", "img_align_celeba.zip")
IDENTITY = "identity"
ATTRIBUTES = ("list_attr_celeba", "Anno")  # the list, and its folder on Google Drive
VALUES = {"1": 1, "-1": 0, "0": 0}
TEST_PART = 2  # in list_eval_partition.txt; 0 is the training part, 1 validation


def find_celeba(path: str) -> list[str]:
    """Return where the images of CelebA are."""
    if os.path.basename(os.path.abspath(path)) in IMAGES:
        return [path]
    # Google Drive has the folders Img, Anno and Eval; torchvision has one folder, celeba.
    for folder in ("", "Img", "celeba"):
        for name in IMAGES:
            if os.path.exists(place := os.path.join(path, folder, name)):
                return [place]
    return []


def open_celeba(path: str, choice: Choice) -> Source:
    """Open CelebA. Its labels are those of one attribute, 0 or 1, or identities; none unless they are chosen.

    With `list_eval_partition.txt` the test part is apart; the other part holds training and validation.
    UserError: the list that was asked for is missing, of another form, or lacks images.
    """
    reader = open_archives(path, choice.background)
    root = os.path.dirname(os.path.abspath(path))
    root = os.path.dirname(root) if os.path.basename(root) == "Img" else root
    attributes = _attributes(root, needed=choice.labels not in (None, IDENTITY))
    choice.check(path, test=True, labels=[*attributes, IDENTITY])
    source = Source(path, len(reader), reader.image, names=reader.names, corruption=dict(family="celeba"))
    files = [name.rsplit("/", 1)[-1] for name in reader.names]
    if choice.labels == IDENTITY:
        source.labels = _match(_find(root, "identity_CelebA", "Anno"), files, 1, None)
    elif choice.labels is not None:
        column = 1 + attributes.index(choice.labels)
        source.labels = _match(_find(root, *ATTRIBUTES), files, column, VALUES)
        source.class_names = [f"not {choice.labels}", choice.labels]
    elif attributes:
        source.notes.append(
            f"{path}: no labels; choose one of {len(attributes)} attributes or '{IDENTITY}', for example with "
            f"dataset_tool.py --label_key={attributes[-1]}"
        )
    parts = _spellings("list_eval_partition", "Eval")
    if choice.test or any(os.path.isfile(os.path.join(root, name)) for name in parts):
        part = _match(find_file(root, parts, "which says what the test part is"), files, 1, None)
        rows = np.flatnonzero((part == TEST_PART) == choice.test)
        if not len(rows):
            raise dnnlib.UserError(f"{path}: holds no image of the {'test' if choice.test else 'training'} part")
        if not choice.test and len(rows) < len(part):
            source.notes.append(f"{path}: the {len(part) - len(rows):,} images of the test part are left out")
        source.take(rows)
    return source


def _spellings(name: str, folder: str) -> list[str]:
    return [f"{name}.txt", f"{folder}/{name}.txt", f"{name}.csv"]  # Kaggle has CSVs


def _find(root: str, name: str, folder: str) -> str:
    return find_file(root, _spellings(name, folder), "which holds these labels")


def _attributes(root: str, needed: bool) -> list[str]:
    """Return the names of the attributes. Without their list there are none, or UserError if they are `needed`."""
    if not needed and not any(os.path.isfile(os.path.join(root, name)) for name in _spellings(*ATTRIBUTES)):
        return []
    path = _find(root, *ATTRIBUTES)
    head = [line.replace(",", " ").split() for line in read_lines(path)[:2]]
    if path.endswith(".csv"):
        return head[0][1:] if head else []
    return head[1] if len(head) > 1 else []


def _match(path: str, files: list[str], column: int, values: dict[str, int] | None) -> np.ndarray:
    """Return the numbers in a column of a list, in the order of `files`, int64 [N]. `values` translates its texts."""
    rows = (line.replace(",", " ").split() for line in read_lines(path))
    table = {row[0]: row[column] for row in rows if len(row) > column}
    missing = [file for file in files if file not in table]
    if missing:
        raise dnnlib.UserError(f"{path}: lacks {len(missing)} of {len(files)} images, first '{missing[0]}'")
    found, expected = [table[file] for file in files], "1 or -1"
    if values is None:
        expected = "a number"
        values = {text: int(text) for text in set(found) if text.isascii() and text.isdecimal() and len(text) < 10}
    bad = next((file for file, text in zip(files, found, strict=True) if text not in values), None)
    if bad is not None:
        raise dnnlib.UserError(f"{path}: says '{table[bad]}' of '{bad}', expected {expected}")
    return np.array([values[text] for text in found], dtype=np.int64)
