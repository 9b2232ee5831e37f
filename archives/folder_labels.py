"""Labels from folders: images in several subfolders belong to one class per subfolder, named like it.

The classes are the first folders that the images do not share: `photos/cat/...` and `photos/dog/...` are the classes
cat and dog. What may be a mistake is said in a note, or refused when somebody asks for the labels.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from archives.classes import name_look_alikes
from archives.listing import as_text, count_of, endings, some

__all__ = ["FolderLabels", "find_parts", "label_by_folder", "note_numbers"]

Path = tuple[bytes, ...]  # a folder, as the names of the folders from the root to it

# Folders that number images instead of naming classes: those of this project, EDM and StyleGAN, and those of
# generate.py --subdirs and FFHQ, which hold a thousand images each.
SHARD = re.compile(rb"\d{5,}")
SHARD_FILE = re.compile(rb"(?:\d{5,6}/img\d{8}|(\d{2,})000/\1\d{3})\.\w+")
MANY = 20  # classes in a message
# Folders that are parts of a data set.
PART = re.compile(
    r"(?:(train(?:ing)?)|(val(?:id(?:ation)?)?|dev)|(test(?:ing)?|eval))(?:[ _-]?(?:set|data|images?|split|\d+))*",
    re.IGNORECASE,
)


@dataclass
class FolderLabels:
    """What the folders of N images say."""

    kept: np.ndarray | None = None  # int64, the rows of images in class folders; None: all N
    labels: np.ndarray | None = None  # int64 [len(kept)]; None: the folders are no classes
    class_names: list[str] | None = None
    problem: str | None = None  # why the folders cannot be the classes, although they look like it
    notes: list[str] = field(default_factory=list)
    named: set[bytes] = field(default_factory=set)  # the other files that these notes are about


def label_by_folder(
    names: list[bytes], folders: list[bytes], others: list[bytes], path: str, kind: str
) -> FolderLabels:
    """Return what the folders say about the images `names`, which are sorted, of the archive `path`.

    `folders` and `others` are the archive's folders and its other files; `kind` is 'folder' or 'ZIP'.
    """
    homes = [name.rpartition(b"/")[0] for name in names]
    counts = Counter(homes)
    used = sorted((_split(home), home) for home in counts)
    beside, used = _set_beside(used)
    root = _common(used[0][0], used[-1][0])
    found = FolderLabels()
    if len(used) > 1 and all(SHARD.fullmatch(place[len(root)]) for place, _ in used):
        start = sum(len(part) + 1 for part in root)
        if all(SHARD_FILE.fullmatch(name, start) for name in names if name.count(b"/") > len(root)):
            return found
    outside = sum(counts[home] for _, home in beside)
    classes = sorted({as_text(place[len(root)]) for place, _ in used}) if len(used) > 1 else []
    _name_empty_folders(found, folders, others, root, classes, path)
    if not classes:
        return found
    if outside >= len(names) - outside:
        found.notes.append(
            f"{path}: {count_of(outside, 'image')} beside the folders {some(classes)}, so these are no classes"
        )
        return found
    if outside:
        left_out = {home for _, home in beside}
        found.kept = np.array([row for row, home in enumerate(homes) if home not in left_out], dtype=np.int64)
        examples = [as_text(name) for name, home in zip(names, homes, strict=True) if home in left_out]
        found.notes.append(
            f"{path}: {count_of(outside, 'image')} beside the class folders {some(classes)} "
            f"{'is' if outside == 1 else 'are'} left out: {some(examples)}"
        )
    number = {name: i for i, name in enumerate(classes)}
    label = {home: number[as_text(place[len(root)])] for place, home in used}
    found.labels = np.array([label[home] for home in homes if home in label], dtype=np.int64)
    found.class_names = classes
    found.problem = find_parts(classes, root, path, kind)
    if found.problem is None:
        _name_doubtful_classes(found, [place[len(root) :] for place, _ in used], path)
    return found


def _split(folder: bytes) -> Path:
    return tuple(folder.split(b"/")) if folder else ()


def _common(first: Path, second: Path) -> Path:
    """Return the folder that holds both."""
    length = min(len(first), len(second))
    return first[: next((i for i in range(length) if first[i] != second[i]), length)]


def _set_beside(used: list[tuple[Path, bytes]]) -> tuple[list[tuple[Path, bytes]], list[tuple[Path, bytes]]]:
    """Split sorted folders of images into those that hold all that follow, and the rest, which has at least one."""
    start = 0
    while start < len(used) - 1:
        below = _common(used[start + 1][0], used[-1][0])  # sorted, so all between share it
        if below[: len(used[start][0])] != used[start][0]:
            break
        start += 1
    return used[:start], used[start:]


def find_parts(classes: list[str], root: Path, path: str, kind: str) -> str | None:
    """Return why classes are parts of a data set; None if they are not: at least two of training, validation, test."""
    matches = [(name, match.lastindex) for name in classes if (match := PART.fullmatch(name))]
    if len({part for _, part in matches}) < 2:
        return None
    parts = [name for name, _ in matches]
    first = "/".join([path.rstrip("/"), *map(as_text, root), min(matches, key=lambda match: match[1])[0]])
    advice = f"name one of them, such as {first}" if kind == "folder" else "unpack the ZIP and name one of them"
    return f"{path}: the folders {some(parts)} are parts of a data set, not classes: {advice}"


def _name_empty_folders(
    found: FolderLabels, folders: list[bytes], others: list[bytes], root: Path, classes: list[str], path: str
) -> None:
    """Note the folders without images beside the classes, and beside the folders that hold all of them."""
    inside: dict[Path, list[bytes]] = {}
    places = [(_split(folder), []) for folder in folders] + [(_split(name)[:-1], [name]) for name in others]
    known = set(classes)
    for place, files in places:
        shared = len(_common(place, root))
        if len(place) > shared and (shared < len(root) or as_text(place[shared]) not in known):
            inside.setdefault(place[: shared + 1], []).extend(files)
    if inside:
        found.named.update(name for files in inside.values() for name in files)
        shown = [f"{as_text(place[-1])} ({endings(files) or 'empty'})" for place, files in sorted(inside.items())]
        found.notes.append(f"{path}: no image that can be read in {some(shown, shown=MANY)}")


def _name_doubtful_classes(found: FolderLabels, places: list[Path], path: str) -> None:
    """Note what may be a mistake about the classes: their folders from the class on are `places`."""
    found.notes += [f"{path}: {text}" for text in name_look_alikes(found.class_names or [])]
    found.notes += note_numbers(found.class_names or [], path)
    below = sorted({as_text(place[1]) for place in places if len(place) > 1})
    if len(below) > 1 and all(len(place) > 1 for place in places):
        found.notes.append(
            f"{path}: the classes are the folders {some(found.class_names or [])}, not those below them ({some(below)})"
        )


def note_numbers(class_names: list[str], path: str) -> list[str]:
    """Return a note if the folders of all classes are called by numbers, but not by those of the classes."""
    numbers = [name for name in class_names if name.isdecimal() and len(name) < 19]
    moved = [(name, label) for label, name in enumerate(numbers) if int(name) != label]
    if not moved or len(numbers) < len(class_names):
        return []
    return [
        f"{path}: classes are numbered in the alphabetical order of their folders: {moved[0][0]} has the label "
        f"{moved[0][1]}, and so on"
    ]
