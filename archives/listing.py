"""List what a folder or a ZIP holds, and tell images, `dataset.json` and all else apart by their names."""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import dnnlib
from archives.decode import EXTENSIONS
from archives.zip_directory import plain_names

__all__ = ["METADATA", "SHOWN", "Listing", "as_text", "count_of", "endings", "examine", "list_folder", "note_unread",
           "quoted", "some"]  # fmt: skip

METADATA = "dataset.json"
LIST = METADATA.encode()
ENDINGS = tuple(extension.encode() for extension in EXTENSIONS)
# Names with a dot in front, and the folders of operating systems and file servers, some of which hold thumbnails.
HIDDEN = re.compile(rb"(?:^|/)(?:\.|(?:__MACOSX|@eaDir|\$RECYCLE\.BIN|System Volume Information)(?:/|$))")
HIDDEN_SIGNS = (b"/.", b"/__MACOSX", b"/@eaDir", b"/$RECYCLE.BIN", b"/System Volume")  # to look for in a long text
# Nobody expects an image in a file of these names, so nothing is said about them.
OTHER_FILES = frozenset(
    b".txt .md .rst .csv .tsv .json .jsonl .parquet .xml .yaml .yml .toml .html .htm .log .ini .db .lnk .url .py "
    b".ipynb .npy .npz .mat .pkl .pt .pth .index .pdf .sha256 .md5".split()
)
SHOWN = 3  # examples in a message


@dataclass
class Listing:
    """Which of an archive's files are used."""

    root: bytes = b""  # the folder of `dataset.json`, with '/' at its end; empty: the archive itself
    metadata: int | None = None  # row of `dataset.json` among the files; None without one
    images: list[int] = field(default_factory=list)  # rows of the images, below `root`
    others: list[bytes] = field(default_factory=list)  # names of all other files below `root` that are not hidden
    notes: list[str] = field(default_factory=list)  # what is left out


def some(names: Iterable[str], count: int | None = None, shown: int = SHOWN) -> str:
    """Return the first of `count` names with commas between them, and how many more there are: "a, b, c and 7 more".

    Without `count` there are as many as `names` yields.
    """
    if count is None:
        names = list(names)
        count = len(names)
    first = list(itertools.islice(names, shown))
    return ", ".join(first) + (f" and {count - len(first):,} more" if count > len(first) else "")


def quoted(names: Iterable[Any]) -> Iterator[str]:
    """Yield names that may hold anything, in quotation marks."""
    return (f"'{name}'" for name in names)


# ---------------------------------------------------------------------------------------------------------------------
# Folders.


def list_folder(path: str) -> tuple[list[bytes], list[bytes], dict[bytes, str]]:
    """Return the files below a folder, sorted, the folders below it, and {name: what it is called on the disk}.

    Names are relative, with '/' between folders. A backslash in a name on the disk is such a separator, too; the
    dictionary is empty unless there are some. Hidden files and folders are left out. Links inside the folder are
    followed.

    UserError: a folder cannot be read, a link leads out of the folder or to nothing, or an image is no regular file.
    """
    root = os.path.realpath(path)
    files, folders, waiting = [], [], [("", False)]
    while waiting:
        prefix, linked = waiting.pop()
        try:
            with os.scandir(os.path.join(path, prefix)) as entries:
                for entry in entries:
                    name = prefix + entry.name
                    if HIDDEN.search(os.fsencode(entry.name)):
                        continue
                    if entry.is_dir():
                        if entry.is_symlink():
                            _check_folder_link(entry.path, root, linked, f"{path}: {name}")
                        folders.append(name)
                        waiting.append((f"{name}/", linked or entry.is_symlink()))
                        continue
                    if not entry.is_file(follow_symlinks=False):
                        _check_file(entry.path, root, f"{path}: {name}")
                    files.append(name)
        except OSError as err:
            raise dnnlib.UserError(f"{err.filename or path}: cannot be read ({err.strerror or err})") from None
    files.sort()
    names, plain = [os.fsencode(name) for name in files], {}
    if any("\\" in name for name in files):  # unpacked from a ZIP that has such names
        plain = dict(zip(plain_names(names, path), files, strict=True))
        if len(plain) < len(files):
            raise dnnlib.UserError(f"{path}: two files have the same name but for backslashes in the place of slashes")
        names = sorted(plain)
    return names, [os.fsencode(name) for name in folders], plain


def _check_folder_link(path: str, root: str, linked: bool, where: str) -> None:
    """Raise UserError for a link to a folder that is not followed, because it leads out or could lead in circles."""
    target = os.path.realpath(path)
    if os.path.commonpath([root, target]) != root:
        raise dnnlib.UserError(f"{where}: is a link to a folder outside the folder; replace it by a copy")
    here = os.path.realpath(os.path.dirname(path))
    if linked or os.path.commonpath([target, here]) == target:
        what = "inside a linked folder" if linked else "to a folder that holds it"
        raise dnnlib.UserError(f"{where}: is a link {what}, which is not followed; remove it")


def _check_file(path: str, root: str, where: str) -> None:
    """Raise UserError for what is used but no file (a device never ends, a pipe waits) and for links out of the folder.

    `path` is no regular file itself.
    """
    name = os.path.basename(path)
    used = name.startswith(("dataset.", "metadata.")) or name.lower().endswith(tuple(EXTENSIONS))
    try:
        linked = stat.S_ISLNK(os.lstat(path).st_mode)
        if used and linked and os.path.commonpath([root, os.path.realpath(path)]) != root:
            raise dnnlib.UserError(f"{where}: is a link to a file outside the folder; replace it by a copy")
        if linked and not used and not os.path.exists(path) and _ending(os.fsencode(name)) not in OTHER_FILES:
            raise dnnlib.UserError(f"{where}: is a link to nothing; mend or remove it")  # perhaps a class folder
        if used and not stat.S_ISREG(os.stat(path).st_mode):
            raise dnnlib.UserError(f"{where}: is not a regular file")
    except (OSError, ValueError) as err:
        raise dnnlib.UserError(f"{where}: cannot be read ({getattr(err, 'strerror', None) or err})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Names.


def examine(files: list[bytes], path: str, kind: str) -> Listing:
    """Return which of the sorted `files` of the archive `path` are used; `kind` is 'ZIP' or 'folder'.

    The archive may hold one folder with everything in it, as when a whole folder was zipped: its root is where
    `dataset.json` lies. UserError: there are no images, `dataset.json` lies in several folders, or it lies in a folder
    that has fewer images than there are outside.
    """
    pictures = np.fromiter((name.lower().endswith(ENDINGS) for name in files), bool, len(files))
    images, rest = np.flatnonzero(pictures).tolist(), np.flatnonzero(~pictures).tolist()
    lists = [row for row in rest if _base(files[row]) == LIST]
    text = b"/".join([b"", *files])
    hidden: set[int] = set()
    if any(sign in text for sign in HIDDEN_SIGNS):
        hidden = {row for row, name in enumerate(files) if HIDDEN.search(name)}
        images, lists = ([row for row in rows if row not in hidden] for rows in (images, lists))
    found = Listing(images=images)
    if lists:
        found.metadata = min(lists, key=lambda row: files[row].count(b"/"))
        found.root = files[found.metadata][: -len(METADATA)]
        if not all(files[row].startswith(found.root) for row in lists):
            raise dnnlib.UserError(
                f"{path}: {METADATA} lies in several folders "
                f"({some(as_text(files[row][: -len(METADATA)]) for row in lists)}): "
                f"{'' if kind == 'folder' else 'unpack the ZIP and '}name one of them"
            )
        if found.root:
            _move_root(found, files, path)
    used = {*hidden, *lists}
    found.others = [files[row] for row in rest if row not in used and files[row].startswith(found.root)]
    if not found.images:
        what = f"; it holds {endings(found.others)}" if found.others else ""
        raise dnnlib.UserError(f"{path}: {kind} without images (.png, .jpg, ...){what}")
    return found


def note_unread(others: list[bytes], path: str) -> list[str]:
    """Return a line about those of an archive's other files that may be meant as images, if there are any."""
    unread = [name for name in others if _ending(name) not in OTHER_FILES]
    if not unread:
        return []
    return [
        f"{path}: not read, since their names are not those of images: {endings(unread)}, such as {as_text(unread[0])}"
    ]


def endings(names: list[bytes]) -> str:
    """Return how many files there are of each kind: '12 .heic, 1 without an extension'."""
    counts = Counter(as_text(_ending(name)) or "without an extension" for name in names)
    return some(f"{count:,} {ending}" for ending, count in counts.most_common())


def _move_root(found: Listing, files: list[bytes], path: str) -> None:
    """Keep only the images below the root. UserError: more images lie outside."""
    inside = [row for row in found.images if files[row].startswith(found.root)]
    outside = len(found.images) - len(inside)
    if outside and outside >= len(inside):
        raise dnnlib.UserError(
            f"{path}: {METADATA} lies in {as_text(found.root)}, which holds {len(inside):,} of the "
            f"{len(found.images):,} images: move it to the folder whose images it describes"
        )
    if outside:
        first = next(as_text(files[row]) for row in found.images if not files[row].startswith(found.root))
        found.notes.append(
            f"{path}: {METADATA} lies in {as_text(found.root)}, so {count_of(outside, 'image')} outside that folder "
            f"{'is' if outside == 1 else 'are'} left out, such as {first}"
        )
    found.images = inside


def count_of(number: int, what: str) -> str:
    """Return '1 image' or '2 images'."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _base(name: bytes) -> bytes:
    return name.rpartition(b"/")[2]


def _ending(name: bytes) -> bytes:
    return os.path.splitext(_base(name).lower())[1]


def as_text(name: bytes) -> str:
    """Return a name as text; bytes that are not UTF-8 survive the way back by `os.fsencode`."""
    return name.decode("utf-8", "surrogateescape")
