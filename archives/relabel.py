"""Give a source other labels before an archive is made of it: from a file, by a label file, by a person's decisions."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import dnnlib
from archives.archive_set import open_archives
from archives.build import count_classes
from archives.classes import name_class, name_look_alikes
from archives.decisions import addresses, holds_decisions, load_decisions
from archives.decode import DamagedFile
from archives.imported_labels import Imported, load_labels
from archives.label_file import LabelFile
from archives.layouts.cifar_n import published_clean_labels
from archives.listing import count_of, quoted, some
from archives.source import Source
from archives.writer import check_destination, image_names

__all__ = [
    "CONFIDENCE",
    "FIXES",
    "SOURCE",
    "Cleaned",
    "check_cleaned",
    "clean_source",
    "compact_labels",
    "declare_clean",
    "replace_labels",
    "select_images",
]

SOURCE = "source"  # in place of a file: the labels that the source has itself
CONFIDENCE = 0.9  # probability of a suggested label from which on it replaces the old one
FIXES = ("relabel", "drop", "keep")  # what `clean_source` does with wrong labels
CLEAN = ("clean_labels", "clean_label", "true_label")  # what files call clean labels


def replace_labels(
    source: Source, path: str, key: str | None = None, skip_unlabeled: bool = False, skip_damaged: bool = False
) -> np.ndarray | None:
    """Give a source the labels of a file (see `load_labels`). Its old labels become its `previous_labels`.

    Nobody said that the old labels are right, so they are not taken for clean ones, but a file of CIFAR-N says it. With
    `skip_unlabeled`, images may have no label in the file: return which have one, bool [N], if some have none. With
    `skip_damaged`, images that will be left out as damaged need none. A CSV with a column `decision` holds decisions
    about single images instead (see `decide`), and takes neither a `key` nor `skip_unlabeled`.
    UserError: the file does not fit the source, or a label is none of its classes.
    """
    if holds_decisions(path):
        if key is not None:
            raise dnnlib.UserError(f"{path}: has no entry '{key}', it holds decisions")
        if skip_unlabeled:
            raise dnnlib.UserError(
                f"{path}: holds decisions, and images without one keep their labels: call dataset_tool.py without "
                "--skip_unlabeled"
            )
        decide(source, path)
        return None
    clean = published_clean_labels(source, path)
    names = name_lists(source)
    found = load_labels(
        path, names, source.length, key, source.class_names,
        may_lack=(lambda _row: True) if skip_unlabeled else _may_lack(source, skip_damaged),
        rename=True, ordered=source.names is None,
    )  # fmt: skip
    old, known = source.labels, source.class_names
    if known is None and old is not None and found.class_names is not None:
        classes = f"numbers from {old.min()} to {old.max()}" if old.ndim == 1 else "vectors"
    else:
        classes = "" if known in (None, found.class_names) else some(quoted(known), len(known))
    renamed = bool(classes)  # then old and new numbers do not mean the same classes
    if renamed and source.clean_labels is not None:
        raise dnnlib.UserError(
            f"{path}: none of its labels is a class of {source.path}, to which the clean labels on record belong; its "
            f"classes are {classes}"
        )
    _check_classes(path, found, source.class_names)
    source.notes += found.notes
    if found.class_names != source.class_names:
        source.notes += [f"{path}: {text}" for text in name_look_alikes(found.class_names or [])]
    if renamed:
        source.notes.append(
            f"{path}: none of its labels is a class of {source.path}, so the old classes are given up: {classes}"
        )
        old = None
    elif old is not None and old.shape == found.labels.shape:
        differ = int(np.sum((old != found.labels).reshape(len(old), -1).any(axis=1) & ~found.missing))
        kept = (
            "are kept as previous_labels. They do not count as clean labels; "
            f"--clean_labels={SOURCE} would declare them clean"
        )
        source.notes.append(
            f"{differ:,} of {source.length:,} labels differ from those that {source.path} had, which "
            + (kept if clean is None else f"are the clean labels, as {path} says, too")
        )
    source.labels, source.class_names, source.previous_labels = found.labels, found.class_names, old
    if source.clean_labels is not None and source.corruption.get("noise_type") != "imported":
        noisy = source.corruption.get("noise_type") is not None
        source.corruption.setdefault("clean_labels", "before noise" if noisy else "on record")  # that does not change
    kept = ("clean_labels",) if renamed else ("clean_labels", "family")  # a family is one of certain classes
    source.corruption = {k: v for k, v in source.corruption.items() if k in kept or k.startswith("outlier_")}
    if old is not None or source.clean_labels is not None:
        source.corruption["noise_type"] = "imported"
    source.verified = None  # people said this of the old labels
    if clean is not None:
        source.previous_labels = None
        source.clean_labels, source.corruption["clean_labels"] = clean, "published"
    if skip_unlabeled and found.missing.any():
        lacking = np.flatnonzero(found.missing)
        shown = some(quoted(names[0][int(i)] for i in lacking), len(lacking))
        source.notes.append(f"{path}: {count_of(len(lacking), 'image')} without a label left out: {shown}")
        return ~found.missing
    return None


def declare_clean(
    source: Source,
    path: str,
    key: str | None,
    replaced: bool,
    skip_damaged: bool = False,
    labeled: np.ndarray | None = None,
) -> None:
    """Take the labels of a file for the clean labels of a source: those that its images should have.

    `path` may be SOURCE: the labels that the source had itself, before `replace_labels` if they were `replaced`. With
    `skip_damaged`, images that will be left out as damaged need no label, nor do those that are not `labeled`, bool
    [N]: `replace_labels` has returned which are.
    UserError: the file does not fit the source, or there are no such labels.
    """
    if path == SOURCE:
        clean = source.previous_labels if replaced else source.labels
        if clean is None:
            raise dnnlib.UserError(f"{source.path} had no labels of these classes that could be the clean ones")
        if source.clean_labels is not None and not np.array_equal(clean, source.clean_labels):
            raise dnnlib.UserError(f"{source.path} has clean labels on record already, and its labels differ from them")
    else:
        found = load_labels(
            path, name_lists(source), source.length, key, source.class_names,
            may_lack=_may_lack(source, skip_damaged, labeled), usual=CLEAN, extend=True, ordered=source.names is None,
        )  # fmt: skip
        if source.labels is None:
            raise dnnlib.UserError("the source has no labels that these could be compared with")
        if found.class_names is not None and source.class_names is None:
            raise dnnlib.UserError(f"{path}: holds names of classes, but the labels are numbers without names")
        if found.labels.shape != source.labels.shape:
            raise dnnlib.UserError(f"{path}: holds vectors or numbers unlike the labels of the source")
        _check_classes(path, found, source.class_names)
        source.notes += found.notes
        new = (found.class_names or [])[len(source.class_names or []) :]
        if new:
            source.notes.append(f"{path}: no label is {some(quoted(new), len(new))}, these classes are added")
        clean, source.class_names = found.labels, found.class_names
        clean[found.missing] = source.labels[found.missing]  # of images that nobody will see
    source.clean_labels = clean
    source.corruption["clean_labels"] = "declared"


def compact_labels(source: Source, max_images: int | None = None) -> None:
    """Renumber the labels of the first `max_images` of a source so that every class from 0 on has images.

    What a class was called, or its old number, becomes its name. UserError: the source has no labels with one class per
    image.
    """
    if source.labels is None or source.labels.ndim != 1:
        raise dnnlib.UserError(f"{source.path} has no labels with one class per image")
    if max_images is not None and max_images < source.length:
        source.take(np.arange(max_images))
    clean = source.clean_labels if source.clean_labels is not None and source.clean_labels.ndim == 1 else None
    old = np.unique(source.labels if clean is None else np.concatenate([source.labels, clean]))
    names, previous = source.class_names, source.previous_labels
    if old[-1] == len(old) - 1 and len(names or old) == len(old):
        return
    source.class_names = [name_class(c, names) for c in old.tolist()]
    source.labels = np.searchsorted(old, source.labels)
    source.clean_labels = clean if clean is None else np.searchsorted(old, clean)
    known = previous is not None and previous.ndim == 1 and np.isin(previous, old).all()
    source.previous_labels = np.searchsorted(old, previous) if known else None
    if previous is not None and not known:
        source.notes.append(f"{source.path}: its previous labels have classes that are left out, so they are not kept")
    if source.corruption.get("T") is not None:
        source.corruption["T"] = None  # its rows and columns are the old numbers


def name_lists(source: Source) -> list[Sequence[str]]:
    """Return lists of what a file may call the images of a source: the original paths, its own names.

    Original paths come first: an archive without some images of another one gives the same names to others. Images
    without names have those that an archive of them would have.
    """
    if source.names is None:
        return [image_names(0, source.length)]
    return [names for names in (source.origins, source.names) if names is not None]


def _may_lack(source: Source, skip_damaged: bool, labeled: np.ndarray | None = None) -> Callable[[int], bool] | None:
    """Return whether an image of the source may have no label in a file.

    With `skip_damaged`, a damaged one may, and one that is not `labeled` in any case.
    """

    def may_lack(row: int) -> bool:
        if labeled is not None and not labeled[row]:
            return True
        try:
            if skip_damaged:
                source.image(row)
        except dnnlib.UserError as error:
            return isinstance(error, DamagedFile)
        return False

    return may_lack if skip_damaged or labeled is not None else None


def _check_classes(path: str, found: Imported, class_names: Sequence[str] | None) -> None:
    known, labels = found.class_names, found.labels
    if known is not None and labels.ndim == 1 and labels.max(initial=0) >= len(known):
        raise dnnlib.UserError(f"{path}: label {labels.max()} is too large, the source has {len(known)} classes")


@dataclass
class Cleaned:
    """What became of the labels of a source, and what share of them is right by what the label file believes."""

    relabeled: int
    left_out: int  # images
    before: float
    after: float  # of the images that are left


def clean_source(
    source: Source,
    file: LabelFile,
    classes: int,
    fix: str,
    drop_outliers: bool = False,
    *,
    confidence: float = CONFIDENCE,
    unsure: str = "drop",
    decided: Sequence[int] = (),
) -> Cleaned:
    """Correct the labels of a source.

    fix            'relabel' replaces wrong labels by the suggested ones, where the file suggests another, 'drop' leaves
                   these images out, 'keep' does neither
    drop_outliers  leave out the images that the file believes foreign, too
    confidence     probability of the suggested label below which nothing is relabeled; a file without such
                   probabilities is believed
    unsure         'drop' or 'keep': what happens to the images with wrong labels that are not relabeled
    decided        rows to which a person gave the suggested label: they get it, whatever `fix` is

    The old record of the noise no longer describes the labels, so it moves to `corruption["cleaned"]["before"]`.
    UserError: no image would be left, or the file does not say which images are foreign.
    """
    sure = ~file.is_clean & (file.suggested != file.labels) & (fix == "relabel")
    if file.suggested_score is not None:
        sure &= file.suggested_score >= confidence
    sure[np.asarray(decided, dtype=np.int64)] = True  # () would be all of them
    dropped = ~file.is_clean & ~sure & (fix == "drop" or (fix == "relabel" and unsure == "drop"))
    what: dict[str, Any] = dict(fix=fix, images=int(np.sum(~file.is_clean)))
    if fix == "relabel":
        what.update(relabeled=int(sure.sum()), confidence=confidence)
    elif len(decided):
        what.update(relabeled=len(decided))
    if drop_outliers:
        if file.is_outlier is None:
            raise dnnlib.UserError("the label file does not say which images are foreign")
        dropped, what["outliers"] = dropped | file.is_outlier, int(file.is_outlier.sum())
    record_cleaning(source, classes, **what)
    source.labels = np.where(sure, file.suggested, file.labels)
    known = file.suggested_score is not None  # else the scores may be no probabilities
    believed = file.score if known else file.is_clean
    right = np.where(sure, file.suggested_score if known else 1.0, believed)[~dropped]
    if dropped.any():
        select_images(source, ~dropped, "images are foreign or their labels are believed wrong" if drop_outliers
                      else "labels are believed wrong")  # fmt: skip
    return Cleaned(int(sure[~dropped].sum()), int(dropped.sum()), float(believed.mean()), float(right.mean()))


def decide(source: Source, path: str) -> None:
    """Correct labels and leave out images as a CSV says (`load_decisions`).

    UserError: the source has no class numbers, the CSV does not fit it, or no image would be left.
    """
    if source.labels is None or source.labels.ndim != 1:
        raise dnnlib.UserError(
            f"{path}: cannot be used with {source.path}, which has no labels with one class per image"
        )
    classes = count_classes(source)
    names = addresses(source.names or image_names(0, source.length), source.origins)
    found = load_decisions(path, names, source.labels, source.class_names, classes)
    counts = dict(kept=len(found.keep), relabeled=len(found.relabel), dropped=len(found.drop))
    record_cleaning(source, classes, fix="decisions", **counts)
    source.labels = source.labels.copy()
    source.labels[found.relabel] = found.new_labels
    if source.verified is not None:  # a person has now found these right
        source.verified = source.verified.copy()
        source.verified[np.concatenate([found.keep, found.relabel])] = True
    left = np.ones(source.length, dtype=bool)
    left[found.drop] = False
    select_images(source, left, "images are to be dropped")


def check_cleaned(path: str, archives: Sequence[str]) -> None:
    """Raise UserError when a cleaned archive of `archives` cannot be written to `path`, or would replace another one.

    It replaces archives that `clean_source` has made, so the same command can be given again.
    """
    if os.path.realpath(path) in map(os.path.realpath, archives):
        raise dnnlib.UserError(f"{path}: is the set itself; choose another name")
    check_destination(path, overwrite=True)
    if os.path.exists(path) and (os.path.isfile(path) or dnnlib.list_contents(path)):
        try:
            fix = (open_archives(path).corruption().get("cleaned") or {}).get("fix")
        except dnnlib.UserError:
            fix = None
        if fix not in FIXES:
            raise dnnlib.UserError(
                f"{path}: exists, and is not an archive that was cleaned before; choose another name"
            )


def record_cleaning(source: Source, classes: int, **what: Any) -> None:
    """Record `what` was done to the labels; the record of their noise no longer describes them."""
    kept = {k: v for k, v in source.corruption.items() if k in ("family", "clean_labels")}
    before = {k: v for k, v in source.corruption.items() if k not in kept}
    source.corruption = dict(family=None) | kept | dict(cleaned=dict(**what, before=before))
    if source.class_names is None:  # the corrected labels may not show how many classes there are
        source.class_names = [str(i) for i in range(classes)]


def select_images(source: Source, chosen: np.ndarray, problem: str) -> None:
    """Leave out all images but the `chosen`, bool [N]. UserError: none is left, because of the `problem` of all."""
    rows = np.flatnonzero(chosen)
    if not len(rows):
        raise dnnlib.UserError(f"{source.path}: all {source.length} {problem}, so no image would be left")
    source.take(rows)
