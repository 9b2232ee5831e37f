"""Look at a set beyond its labels: foreign images, duplicates, and classes that the detector cannot tell apart."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from archives.dataset import ImageDataset
from archives.label_file import LabelFile
from detection.duplicates import count_groups, find_duplicates
from detection.outliers import find_outliers

__all__ = ["Pair", "confusable_pairs", "look_for_foreign"]

ENOUGH = 50  # images; with fewer, nothing says which of them are usual
RATE = 2400  # images per second, measured on one core
LEAST = 0.1  # share of a class's images above which another class counts as confusable with it


def look_for_foreign(
    dataset: ImageDataset, found: LabelFile, seed: int = 0, features: np.ndarray | None = None
) -> list[str]:
    """Add foreign images and duplicates to a label file that does not know them; return a line about each.

    `features` [N,d]: further features of the images, which help to tell foreign ones.
    """
    start, lines, n = time.monotonic(), [], len(found.labels)
    if n > 5 * RATE:
        print(f"Looking for foreign images and duplicates, about {n / RATE:.0f} s", flush=True)
    note = "" if n >= ENOUGH else f"; not looked for among fewer than {ENOUGH}"
    if found.is_outlier is not None:
        note = "" if features is None else "; a label file knows them, so the features were not needed"
    elif n >= ENOUGH:
        outliers = find_outliers(dataset, features, seed=seed)
        found.outlier_score, found.is_outlier = outliers.score, outliers.is_outlier
        if outliers.is_outlier.any():
            note = f"; of those, about {outliers.expected_false:.1f} are usual ones"
    if found.duplicate_of is None:
        found.duplicate_of = find_duplicates(dataset).duplicate_of
    foreign = "unknown" if found.is_outlier is None else f"{found.is_outlier.sum():,}"
    groups, contradictions = count_groups(found.labels, found.duplicate_of)
    lines.append(f"Foreign:     {foreign} of {n:,} images{note}")
    lines.append(
        f"Duplicates:  {groups:,} group{'s' * (groups != 1)} of equal or nearly equal images, {contradictions:,} "
        f"of them with different labels (foreign images and duplicates took {time.monotonic() - start:.1f} s)"
    )
    return lines


class Pair(NamedTuple):
    """Two classes that the detector cannot tell apart."""

    first: int
    second: int
    share: float  # of the images of one of them, what the detector takes for the other on average; the larger direction


def confusable_pairs(found: LabelFile) -> list[Pair]:
    """Return the pairs of classes that resemble each other for the detector, the most alike first.

    The mean posterior of the images of the first class gives the second class more than `LEAST`, or the other way
    round. Labels count as evidence of which class an image has, so wrong labels do not make classes alike. A label file
    that does not know these means has no such pairs.
    """
    if found.looks_like is None:
        return []
    share = np.maximum(found.looks_like, found.looks_like.T)
    a, b = np.nonzero(np.triu(share > LEAST, k=1))
    order = np.argsort(-share[a, b], kind="stable")
    return [Pair(int(i), int(j), float(share[i, j])) for i, j in zip(a[order], b[order], strict=True)]
