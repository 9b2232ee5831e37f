"""Labels from a `metadata.csv` among the images, as the image folders of the Hugging Face Hub have it."""

from __future__ import annotations

from collections.abc import Callable

import dnnlib
from archives.folder_labels import FolderLabels, find_parts
from archives.imported_labels import labels_by_name
from archives.listing import as_text, quoted, some
from archives.tables import TABLES, file_and_label, read_table

__all__ = ["label_by_table", "note_tables"]

NAMES = (b"metadata.csv", b"metadata.jsonl", b"metadata.parquet")


def label_by_table(
    names: list[bytes], others: list[bytes], read: Callable[[bytes], bytes], path: str, kind: str
) -> tuple[FolderLabels | None, list[str], set[bytes]]:
    """Return what tables say about the images `names` of the archive `path` (None: nothing), notes, and the tables.

    A table is called `metadata.csv` (or .jsonl, .parquet) and has a column `file_name`, relative to the folder of the
    table, and one of labels. In each folder the first such table is used. `others` are the archive's other files, of
    which `read` returns the bytes; `kind` is 'folder' or 'ZIP'. The notes speak of all tables that are returned.
    """
    chosen: dict[bytes, list[bytes]] = {}
    for wanted in NAMES:
        for name in others:
            folder, _, base = name.rpartition(b"/")
            if base == wanted:
                chosen.setdefault(folder, []).append(name)
    problem = find_parts([as_text(folder) for folder in chosen], (), path, kind)
    if problem is not None:
        return FolderLabels(problem=problem), [], set()
    given, values, used, notes, seen = [], [], {}, [], set()
    for folder, name in [(folder, name) for folder, tables in sorted(chosen.items()) for name in tables]:
        if folder in used:
            continue
        seen.add(name)
        where = f"{path}: {as_text(name)}"
        try:
            table = read_table(read(name), where)
        except dnnlib.UserError as e:
            return FolderLabels(problem=e.message), notes, seen
        try:
            files, labels, more = file_and_label(table, guess=False)
        except dnnlib.UserError as e:
            notes.append(f"{e.message}; so it is not used")
            continue
        if files is None:
            notes.append(f"{where}: has no column file_name, so it is not used")
            continue
        start = as_text(folder) + "/" if folder else ""
        given += [f"{start}{file}" for file in files]
        values += labels
        used[folder] = name
        notes += more
    if not used:
        return None, notes, seen
    where = some(map(as_text, used.values()))
    try:
        found = labels_by_name(given, values, [[as_text(name) for name in names]], f"{path}: {where}")
    except dnnlib.UserError as e:
        return FolderLabels(problem=e.message), notes, seen
    notes += [f"{path}: labels come from {where}", *found.notes]
    return FolderLabels(labels=found.labels, class_names=found.class_names), notes, seen


def note_tables(others: list[bytes], path: str, kind: str) -> list[str]:
    """Return a note about tables beside the images that nobody read, if there are any; `kind` is 'folder' or 'ZIP'."""
    tables = [as_text(name) for name in others if name.lower().endswith(ENDINGS)]
    if not tables:
        return []
    names = f"{some(quoted(tables), len(tables))} {'is' if len(tables) == 1 else 'are'} not read"
    how = f"name it: dataset_tool.py --labels={path}/{tables[0]}" if kind == "folder" else "unpack it and name it"
    return [f"{path}: {names}; if it holds the labels, {how}"]


ENDINGS = tuple(ending.encode() for ending in TABLES)
