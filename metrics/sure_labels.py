"""What a judge learns from where nobody knows the clean labels: the labels that a label file is surest of."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

import dnnlib
from archives.dataset import ImageDataset
from archives.label_file import LabelFile
from archives.label_table import load_labels_or_table
from metrics.images import open_images

__all__ = ["JudgeLabels", "choose_judge_labels", "sure_labels"]

SURE = 0.9  # score from which on a label is sure


@dataclass(frozen=True)
class JudgeLabels:
    """What a judge learns from, and what it cannot know."""

    labels: np.ndarray | None  # [N] class that each image of the reference shows, -1: unknown; None: its best labels
    outlier_data: str | None  # label file that knows foreign images of the reference; None: none does
    note: str  # for the reader of the judge's numbers


def sure_labels(found: LabelFile) -> np.ndarray:
    """Return the labels that a label file is sure of, int64 [N]; -1 for images whose label is in doubt.

    Sure labels are believed right with a score of at least 0.9, and in any case the better half of a class's labels
    that are believed right: the scores of some label files are no probabilities. Foreign images are in doubt.
    """
    believed = found.is_clean if found.is_outlier is None else found.is_clean & ~found.is_outlier
    sure = believed & (found.score >= SURE)
    for c in np.unique(found.labels[believed]):
        scores = found.score[believed & (found.labels == c)]
        sure |= believed & (found.labels == c) & (found.score >= np.median(scores))
    return np.where(sure, found.labels, -1)


def choose_judge_labels(data: str, label_path: str | None, recorded: str | None, judge: str = "svm") -> JudgeLabels:
    """Return what the `judge` of images of the archive `data` learns from; a snapshot has learned, and is tried on it.

    These are its clean labels, or else the sure labels of the label file `label_path`, or else of the label file
    `recorded` if it is about this archive, or else the archive's labels as they are. UserError: `label_path` cannot be
    read, does not fit the archive, or is sure of fewer than two classes.
    """
    reference = open_images(data)
    learns = judge == "svm"
    did = "The judge learned" if learns else f"The judge, {judge}, is tried on"
    if label_path is None:
        if reference.clean_labels is not None:
            return JudgeLabels(None, None, f"{did} the clean labels of {data}.")
        label_path = recorded if recorded and _fits(recorded, reference) else None
    if label_path is None:
        return JudgeLabels(
            None,
            None,
            f"{did} the labels of {data} as they are. If some are wrong, "
            + ("all accuracies are too low." if learns else "it seems worse than it is."),
        )
    if not isinstance(reference, ImageDataset):
        raise dnnlib.UserError(f"{label_path}: cannot be used with {data}, whose images have no names")
    found = load_labels_or_table(label_path, reference)
    labels = sure_labels(found)
    counts = np.bincount(labels[labels >= 0], minlength=reference.label_dim)
    if (counts > 0).sum() < 2:
        raise dnnlib.UserError(f"{label_path}: believes labels of fewer than 2 classes right; a judge needs 2")
    names = reference.shown_classes
    none = [names[c] for c in np.flatnonzero(counts == 0)]
    note = f"{did} {counts.sum():,} of the {len(labels):,} labels of {data}, those that {label_path} is surest of."
    if reference.clean_labels is None:
        note = f"Nobody knows the clean labels. {note}"
    if learns:
        note += (
            " So label accuracy is agreement with that file. It cannot show what the file got wrong, and the judge "
            "never saw images that the file is unsure of. Compare these rows with each other, not with accuracies by "
            "clean labels. FD needs no labels."
        )
    if none and learns:
        note += f" No label is sure in these classes, so all their images count as wrong: {', '.join(none)}."
    known = found.is_outlier is not None and found.is_outlier.any()
    return JudgeLabels(labels, label_path if known else None, note)


def _fits(path: str, reference: object) -> bool:
    """Return whether a label file exists and is about these images with these labels."""
    if not os.path.isfile(path) or not isinstance(reference, ImageDataset):
        return False
    try:
        load_labels_or_table(path, reference)
    except dnnlib.UserError:
        return False
    return True
