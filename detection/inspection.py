"""Look at a set beyond its labels: foreign images, duplicates, and classes that the detector cannot tell apart."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from archives.dataset import ImageDataset
from archives.label_file import LabelFile
from detection.duplicates import count_groups, find_duplicates
from detection.outliers import find_outliers

__all__ = ["Pair", "confusable_pairs", "doubtful_share", "given_up", "look_for_foreign"]

ENOUGH = 50  # images; with fewer, nothing says which of them are usual
RATE = 2400  # images per second, measured on one core
NEARLY_ALL = 0.8  # share of labels believed wrong in a class that the detector has given up
LEAST, TIMES = 0.02, 3.0  # a pair of classes is confusable above this share of labels and so many times the usual share


def look_for_foreign(dataset: ImageDataset, found: LabelFile, seed: int = 0) -> list[str]:
    """Add foreign images and duplicates to a label file that does not know them; return a line about each."""
    start, lines, n = time.monotonic(), [], len(found.labels)
    if n > 5 * RATE:
        print(f"Looking for foreign images and duplicates, about {n / RATE:.0f} s", flush=True)
    note = "" if n >= ENOUGH else f"; not looked for among fewer than {ENOUGH}"
    if found.is_outlier is None and n >= ENOUGH:
        outliers = find_outliers(dataset, seed=seed)
        found.outlier_score, found.is_outlier = outliers.score, outliers.is_outlier
        if outliers.is_outlier.any():
            note = f"; of those, about {outliers.expected_false:.1f} are usual ones"
    if found.duplicate_of is None:
        found.duplicate_of = find_duplicates(dataset).duplicate_of
    foreign = "unknown" if found.is_outlier is None else f"{found.is_outlier.sum():,}"
    groups, contradictions = count_groups(found.labels, found.duplicate_of)
    lines.append(f"Foreign:     {foreign} of {n:,} images{note}")
    lines.append(
        f"Duplicates:  {groups:,} groups of equal or nearly equal images, {contradictions:,} of them with different "
        f"labels (foreign images and duplicates took {time.monotonic() - start:.1f} s)"
    )
    return lines


class Pair(NamedTuple):
    """Two classes that the detector mixes up."""

    first: int
    second: int
    share: float  # of the labels of both: it suggests the other class for them
    doubtful: int  # labels for which it does so as often in one direction as in the other: many of them may be right


def confusable_pairs(found: LabelFile) -> list[Pair]:
    """Return the pairs of classes that the detector mixes up, the largest share first.

    It suggests one for the other in both directions, and more than `TIMES` as often as for the usual pair: wrong labels
    drawn at random spread over all pairs. Noise that swaps two classes looks the same. Of two classes nothing can be
    said, since there is no other pair.
    """
    classes = len(found.per_class_noise_rate)
    count = np.bincount(found.labels, minlength=classes)
    wrong = ~found.is_clean
    cells = found.labels[wrong] * classes + found.suggested[wrong]
    flow = np.bincount(cells, minlength=classes * classes).reshape(classes, classes)
    a, b = np.triu_indices(classes, k=1)
    here = (count[a] > 0) & (count[b] > 0)
    a, b = a[here], b[here]
    if len(a) < 3:
        return []
    total = count[a] + count[b]
    doubtful = 2 * np.minimum(flow[a, b], flow[b, a])
    mutual = doubtful / total
    share = (flow[a, b] + flow[b, a]) / total
    chosen = np.flatnonzero(mutual > max(LEAST, TIMES * float(np.median(mutual))))
    chosen = chosen[np.argsort(-share[chosen], kind="stable")]
    return [Pair(int(a[i]), int(b[i]), float(share[i]), int(doubtful[i])) for i in chosen]


def given_up(found: LabelFile) -> np.ndarray:
    """Return the classes of which the detector believes nearly no label, int64, though it believes most of others.

    A detector that has seen too little of a class takes its images for those of the classes that resemble it.
    """
    rates, count = _class_rates(found)
    here = count > 0
    return np.flatnonzero(here & (rates > NEARLY_ALL) & (rates > 2 * np.median(rates[here])))


def doubtful_share(found: LabelFile) -> float:
    """Return the share of all labels that are believed wrong on weak grounds.

    They lie between two classes that the detector mixes up, or in a class that it has given up, as far as it believes
    less of this class than of the median one.
    """
    lost = given_up(found)
    rates, count = _class_rates(found)
    excess = (rates[lost] - np.median(rates[count > 0])) * count[lost]
    pairs = [p.doubtful for p in confusable_pairs(found) if p.first not in lost and p.second not in lost]
    return float((excess.sum() + sum(pairs)) / len(found.labels))


def _class_rates(found: LabelFile) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of labels believed wrong and the number of labels, both [C]."""
    classes = len(found.per_class_noise_rate)
    count = np.bincount(found.labels, minlength=classes)
    return np.bincount(found.labels[~found.is_clean], minlength=classes) / np.maximum(count, 1), count
