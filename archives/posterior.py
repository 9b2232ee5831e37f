"""Posteriors of clean labels, P(y | x_0, o), cut to the most probable classes of each image.

x_0: image; o: its observed label; y: its clean label. A detector computes the posteriors, `compress` cuts them, label
files store them, and training takes labels by them (docs/methods/posterior.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

import dnnlib

__all__ = ["TOP", "TopPosterior", "compress", "from_arrays", "to_arrays"]

TOP = 8  # classes that are kept beside the observed label
ROWS = 1024  # of a table [N,C] that are copied at a time
FIELDS = ("posterior", "posterior_classes", "posterior_prior")  # names in a label file
TOLERANCE = 0.01  # by which the probabilities of an image may miss 1; rounding to float16 takes up to 0.0005


@dataclass
class TopPosterior:
    """P(y | x_0, o) of N images over C classes: the observed label's, that of the k best other classes, and the rest.

    The rest of the mass belongs to all remaining classes, in proportion to the prior. With 1,000 classes and k = 8 an
    image takes 36 bytes in place of 4,000.
    """

    labels: np.ndarray  # [N] int64, the observed labels
    classes: np.ndarray  # [N,k] int16 or int32, the most probable other classes; the observed label is never among them
    probabilities: np.ndarray  # [N,k+2] float16: of the observed label, of each of `classes`, of the rest
    prior: np.ndarray  # [C] float32, the share of each class among all images

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> TopPosterior:
        """Return the posteriors of some images, by their rows."""
        return replace(
            self, labels=self.labels[rows], classes=self.classes[rows], probabilities=self.probabilities[rows]
        )

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the most probable class of each image, int64 [N], and its probability, float32 [N].

        The observed label comes first among equals.
        """
        p = self.probabilities.astype(np.float32)
        p /= p.sum(axis=1, keepdims=True)
        place, rows = p[:, :-1].argmax(axis=1), np.arange(len(p))
        listed = np.concatenate([self.labels[:, None], self.classes], axis=1)
        return listed[rows, place], p[rows, place]

    def decided(self, rows: np.ndarray, classes: np.ndarray) -> TopPosterior:
        """Return posteriors that are certain of the given classes, int64 [n], for the images in `rows`, int64 [n]."""
        listed, p = self.classes.copy(), self.probabilities.copy()
        own = classes == self.labels[rows]
        p[rows] = 0
        p[rows[own], 0] = 1
        if not own.all():
            rows, classes = rows[~own], classes[~own].astype(listed.dtype)[:, None]
            # The new class takes the first place. Where it stood before, the former first one comes.
            listed[rows] = np.where(listed[rows] == classes, listed[rows, :1], listed[rows])
            listed[rows, :1], p[rows, 1] = classes, 1
        return replace(self, classes=listed, probabilities=p)


def compress(posterior: np.ndarray, labels: np.ndarray, k: int = TOP, prior: np.ndarray | None = None) -> TopPosterior:
    """Return the posteriors [N,C] of images with observed `labels` int64 [N], cut to the k best other classes.

    `prior` [C]: how often each class occurs; None: the mean of the posteriors.
    """
    n, c = posterior.shape
    k = min(k, c - 1)
    if prior is None:
        prior = posterior.mean(axis=0, dtype=np.float64)
    classes = np.empty([n, k], dtype=np.int16 if c <= 1 << 15 else np.int32)
    probabilities = np.empty([n, k + 2], dtype=np.float16)
    for start in range(0, n, ROWS):
        part = slice(start, start + ROWS)
        p = posterior[part].astype(np.float32)
        p /= p.sum(axis=1, keepdims=True)
        own = labels[part, None]
        probabilities[part, :1] = np.take_along_axis(p, own, axis=1)
        np.put_along_axis(p, own, -1, axis=1)
        best = np.argpartition(p, min(c - k, c - 1), axis=1)[:, c - k :]
        values = np.take_along_axis(p, best, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        classes[part] = np.take_along_axis(best, order, axis=1)
        probabilities[part, 1:-1] = np.take_along_axis(values, order, axis=1)
        # The rest is added up, not 1 minus the others: a difference would leave rounding errors in place of zeros.
        np.put_along_axis(p, own, 0, axis=1)
        np.put_along_axis(p, best, 0, axis=1)
        probabilities[part, -1] = p.sum(axis=1)
    return TopPosterior(labels, classes, probabilities, (prior / prior.sum()).astype(np.float32))


def to_arrays(posterior: TopPosterior) -> dict[str, np.ndarray]:
    """Return what a label file stores. The observed labels are stored there anyway."""
    return dict(zip(FIELDS, (posterior.probabilities, posterior.classes, posterior.prior), strict=True))


def from_arrays(
    arrays: dict[str, np.ndarray], names: Sequence[str], labels: np.ndarray, num_classes: int, path: str
) -> TopPosterior | None:
    """Return the posteriors in a label file of the images `names` [N] with `labels` int64 [N]; None if it has none.

    UserError: an array is missing or has another shape than the others, a number is out of range, or the classes of an
    image are not different.
    """
    missing = [field for field in FIELDS if field not in arrays]
    if len(missing) == len(FIELDS):
        return None
    if missing:
        raise dnnlib.UserError(f"{path}: lacks {', '.join(missing)}, which belong to its posterior")
    p, classes, prior = (arrays[field] for field in FIELDS)
    if classes.ndim != 2 or len(classes) != len(names) or classes.dtype.kind not in "iu":
        found = f"{classes.dtype} {list(classes.shape)}"
        raise dnnlib.UserError(f"{path}: posterior_classes is {found}, expected whole numbers [{len(names)},k]")
    wanted = [len(names), classes.shape[1] + 2]
    if list(p.shape) != wanted or p.dtype.kind != "f":
        raise dnnlib.UserError(f"{path}: posterior is {p.dtype} {list(p.shape)}, expected numbers {wanted}")
    if prior.shape != (num_classes,) or prior.dtype.kind != "f":
        found = f"{prior.dtype} {list(prior.shape)}"
        raise dnnlib.UserError(f"{path}: posterior_prior is {found}, but there are {num_classes} classes")
    if not (prior >= 0).all() or not abs(prior.sum(dtype=np.float64) - 1) < TOLERANCE:
        raise dnnlib.UserError(f"{path}: posterior_prior must be numbers from 0 to 1 whose sum is 1")
    sums = p.sum(axis=1, dtype=np.float64)
    _refuse((p >= 0).all(axis=1) & (np.abs(sums - 1) < TOLERANCE), f"{path}: posterior", names, "sum to 1")
    where = f"{path}: posterior_classes"
    _refuse(((classes >= 0) & (classes < num_classes)).all(axis=1), where, names, f"be within 0..{num_classes - 1}")
    listed = np.sort(np.concatenate([labels[:, None], classes.astype(np.int64)], axis=1), axis=1)
    _refuse((np.diff(listed, axis=1) > 0).all(axis=1), where, names, "differ from each other and from the label")
    kind = np.int16 if num_classes <= 1 << 15 else np.int32
    return TopPosterior(labels, classes.astype(kind), p.astype(np.float16), prior.astype(np.float32))


def _refuse(fine: np.ndarray, where: str, names: Sequence[str], rule: str) -> None:
    bad = np.flatnonzero(~fine)
    if len(bad):
        raise dnnlib.UserError(f"{where}: the numbers of an image must {rule}, those of '{names[bad[0]]}' do not")
