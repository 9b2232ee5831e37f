"""The transition of labels T[y,o] = P(observed = o | clean = y), estimated from images whose class is certain.

Anchor points: of the images that a classifier predicts as y, those with the largest probability of y are believed to be
of class y. Which labels they carry is row y of T. A classifier of noisy labels does, too: P(observed = y | x) is
largest where the class is certainly y, as long as no other class turns into y more often than y stays. (The margin to
the second label would not do: an image that may be of a class that turns into y can have a larger one.)

The classifier must not have trained on the images that it judges here, at least not long: where it has learned their
wrong labels by heart, it is not certain, and the anchors' labels look cleaner than they are.

Source: Liu and Tao, "Classification with Noisy Labels by Importance Reweighting", TPAMI 2016;
Patrini et al., "Making Deep Neural Networks Robust to Label Noise", CVPR 2017.

Rows with few anchors borrow from the others, by two priors: a Beta distribution of the share of right labels, and a
Dirichlet distribution of the wrong ones around even shares. Their strengths are those that make the counts of all rows
most likely, so that symmetric noise is found nearly exactly symmetric, and asymmetric noise is not smoothed away.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import gammaln

from archives.dataset import ImageDataset

__all__ = ["anchors", "class_shares", "describe_transition", "estimate_transition", "noise_rate", "transition_table"]

SHARE = 0.25  # of the images predicted as a class, those that are most certain
TABLE = 20  # tables of up to so many classes are printed
STRENGTHS = np.geomspace(0.3, 3000, 25)  # of the priors, in images per row


def anchors(log_probs: np.ndarray, share: float = SHARE) -> tuple[np.ndarray, np.ndarray]:
    """Return the images whose class is certain, int64 [n], and their predicted classes, int64 [n].

    `log_probs` [N,C]: log-probabilities of clean classes or of noisy labels. Of each predicted class, the share `share`
    with the largest probability is kept, rounded up.
    """
    predicted, first = log_probs.argmax(axis=1), log_probs.max(axis=1)
    # Images that are equally certain are taken in a random order: that of the archive may mean something.
    order = np.lexsort((np.random.default_rng(0).permutation(len(predicted)), -first, predicted))
    counts = np.bincount(predicted, minlength=log_probs.shape[1])
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = order[rank < np.ceil(share * np.repeat(counts, counts))]
    return kept, predicted[kept]


def estimate_transition(log_probs: np.ndarray, observed: np.ndarray, share: float = SHARE) -> np.ndarray:
    """Return T, float64 [C,C], from log-probabilities [N,C] and observed labels int64 [N] of N images.

    A class that is never predicted gets the common rate of wrong labels, evenly spread. All entries are above 0.
    """
    images, classes = anchors(log_probs, share)
    c = log_probs.shape[1]
    if c < 2:
        return np.ones([c, c])
    counts = np.bincount(classes * c + observed[images], minlength=c * c).reshape(c, c).astype(np.float64)
    off = ~np.eye(c, dtype=bool)
    right, wrong = np.diagonal(counts), counts[off].reshape(c, c - 1)
    either = np.stack([right, wrong.sum(axis=1)], axis=1)
    # Half an image of each kind keeps the common rate away from 0 and 1.
    stays = _posterior_mean(either, (either.sum(axis=0) + 0.5) / (either.sum() + 1))[:, 0]
    shares = _posterior_mean(wrong, np.full(c - 1, 1 / (c - 1)))
    T = np.diag(stays)
    T[off] = ((1 - stays)[:, None] * shares).ravel()
    return T


def class_shares(T: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Return pi, float64 [C]: the shares of the clean classes that T [C,C] and the observed labels int64 [N] imply."""
    counts = np.bincount(observed, minlength=len(T)) / max(len(observed), 1)
    pi = np.full(len(T), 1 / len(T))
    for _ in range(1000):  # expectation-maximization: unlike the inverse of T, it gives shares from 0 to 1
        joint = pi[:, None] * T
        joint *= counts / np.maximum(joint.sum(axis=0), 1e-300)
        before, pi = pi, joint.sum(axis=1)
        if np.abs(pi - before).max() < 1e-9:
            break
    return pi


def noise_rate(T: np.ndarray, observed: np.ndarray) -> float:
    """Return the share of wrong labels, 1 - sum_y pi_y T[y,y], for the class shares pi that T and the labels imply."""
    return float(1 - class_shares(T, observed) @ np.diagonal(T))


def describe_transition(T: np.ndarray, dataset: ImageDataset, origin: str) -> str:
    """Return a text with the share of wrong labels that T [C,C] means, T itself, and the truth where it is known.

    `origin` says in a word where T comes from.
    """
    line = f"Label noise, {origin}: {noise_rate(T, dataset.labels):.1%} of the labels are wrong"
    if dataset.clean_labels is not None:
        c = len(T)
        counts = np.bincount(dataset.clean_labels * c + dataset.labels, minlength=c * c).reshape(c, c)
        rows = counts.sum(axis=1, keepdims=True)
        error = np.abs(T - counts / np.maximum(rows, 1))[rows[:, 0] > 0]
        line += (
            f" (in truth {np.mean(dataset.clean_labels != dataset.labels):.1%}; T differs from the truth by "
            f"{error.mean():.3f} on average, {error.max():.3f} at most)"
        )
    names = dataset.shown_classes
    return "\n".join([line, *transition_table(T, names)])


def transition_table(T: np.ndarray, names: Sequence[str]) -> list[str]:
    """Return the lines that show T [C,C] in percent; none for many classes."""
    if len(names) > TABLE:
        return []
    return [
        "T, %: one row per class, one column per label",
        " " * 18 + " ".join(f"{name:>5.5}" for name in names),
        *(f"  {name:<16.16}" + " ".join(f"{100 * p:5.1f}" for p in row) for name, row in zip(names, T, strict=True)),
    ]


def _posterior_mean(counts: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return the expected shares [R,K] given counts [R,K], under the Dirichlet(strength * mean) that fits best."""
    alphas = STRENGTHS[:, None] * mean
    n = counts.sum(axis=1)
    evidence = [
        np.sum(gammaln(s) - gammaln(n + s)) + np.sum(gammaln(counts + alpha) - gammaln(alpha))
        for s, alpha in zip(STRENGTHS, alphas, strict=True)
    ]
    best = int(np.argmax(evidence))
    return (counts + alphas[best]) / (n + STRENGTHS[best])[:, None]
