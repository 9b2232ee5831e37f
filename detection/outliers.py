"""Find foreign images: those that belong to none of the classes (docs/data.md, "Foreign images and duplicates").

Two signs make an image foreign: it lies far from the core of the set, or the images around it have labels as if drawn
at random, which no class has, whatever its share of wrong labels. The second sign finds foreign images that resemble
each other, and so lie close together. It also says which images are the core. Where labels tell nothing or there are
none, the distance is that of RDUOT's robust cost (`training.core_distance`).

Notation: anchors are up to ANCHORS images that stand for the set. z is a sign in deviations of usual images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtr

from archives.dataset import ImageDataset
from training.connected_core import nearest
from training.core_distance import CoreDistance, features_in_chunks, read_features, robust_spread

__all__ = ["FALSE_ALARMS", "Outliers", "find_outliers"]

FALSE_ALARMS = 0.01  # share of a set without foreign images that may at most be flagged
FALSE_SHARE = 0.1  # expected share of usual images among the flagged ones
ANCHORS = 5000
AXES = 32  # principal axes that images are compared along
LIMIT = 8.0  # features count up to so many deviations, so that no single one decides
NEIGHBORS = 30  # anchors around an image whose labels count
NEAREST = 5  # distance to the core: that to this nearest anchor of the core
CORE = 2.0  # anchors with a larger z are not in the core
SPREAD = 0.4  # smallest deviation of the logarithm of what labels tell: less is accident
KNOWN = 5.0  # labels count where they usually tell so many times the deviation of what shuffled ones seem to tell


@dataclass
class Outliers:
    """Which of N images are foreign."""

    score: np.ndarray  # float32 [N], deviations from usual images; larger for images that are more foreign
    is_outlier: np.ndarray  # bool [N]
    threshold: float  # images with at least this score are outliers; inf without outliers
    expected_false: float  # how many usual images at most are expected among the outliers


def find_outliers(
    dataset: ImageDataset,
    features: np.ndarray | None = None,
    false_alarms: float = FALSE_ALARMS,
    seed: int = 0,
) -> Outliers:
    """Return which images of a data set are foreign. Mirrored copies are as foreign as their originals.

    features      further features of the images, [N,d] or [num_raw,d], such as a classifier's before its last layer;
                  where labels tell something, they count as much as those of `image_features` together, else each
                  one counts as much as one of these
    false_alarms  share of a set without foreign images that may at most be flagged
    seed          chooses the anchors

    A normal tail, fitted to the scores from the median to the ninth decile, turns them into p-values, and images are
    flagged by the rule of Benjamini and Hochberg (JRSS B 1995) with a false discovery rate of 10%: a set
    without foreign images has few or none, and the more there are, the lower is the threshold.
    """
    n = dataset.num_raw
    rng = np.random.default_rng(seed)
    anchors = np.sort(rng.permutation(n)[:ANCHORS])
    extra = np.empty([n, 0], np.float32) if features is None else np.asarray(features, dtype=np.float32)[:n]
    score = None if dataset.labels is None else _scores_by_labels(dataset, extra, anchors, rng)
    if score is None:
        score = _scores_by_distance(dataset, extra, anchors)
    p = 2 * ndtr(-score.astype(np.float64))  # the score is the larger one of two signs
    flagged = _flag(p, false_alarms)
    copies = len(dataset) // n
    return Outliers(
        np.tile(score, copies),
        np.tile(flagged, copies),
        float(score[flagged].min()) if flagged.any() else np.inf,
        float(n * p[flagged].max()) if flagged.any() else 0.0,
    )


def _scores_by_labels(
    dataset: ImageDataset, extra: np.ndarray, anchors: np.ndarray, rng: np.random.Generator
) -> np.ndarray | None:
    features = np.concatenate([*features_in_chunks(dataset, anchors)])
    space = Space(features, extra[anchors], dataset.labels[anchors])
    points = np.concatenate([space.project(*rows) for rows in _all_features(dataset, extra)])
    return foreign_scores(points, anchors, dataset.labels, rng)


def _scores_by_distance(dataset: ImageDataset, extra: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    blocks = [read_features(dataset, anchors), *([extra[anchors].astype(np.float64)] if extra.shape[1] else [])]
    scales = [robust_spread(block - np.median(block, axis=0)) for block in blocks]

    def joined(rows: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([block / scale for block, scale in zip(rows, scales, strict=False)], axis=1)

    found = CoreDistance(joined(blocks))
    parts = (torch.from_numpy(joined(rows)).float() for rows in _all_features(dataset, extra))
    distance = torch.cat([found.of_features(rows) for rows in parts]).double().numpy()
    distance[anchors] = found.training  # an image is not its own neighbor
    return _deviations(np.log(np.maximum(distance, 1e-9))).astype(np.float32)


def _all_features(dataset: ImageDataset, extra: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the features of all images and the further ones, a chunk of images at a time."""
    start = 0
    for part in features_in_chunks(dataset, np.arange(dataset.num_raw)):
        yield part, extra[start : start + len(part)]
        start += len(part)


class Space:
    """Where images are compared: features in robust deviations, along the principal axes of the anchors.

    The deviations are those from the class means, even if some labels are wrong: features that tell classes apart weigh
    more than others.
    """

    def __init__(self, features: np.ndarray, extra: np.ndarray, labels: np.ndarray):
        self._blocks = [_robust_scale(block, labels) for block in (features, extra) if block.shape[1]]
        scaled = self._scale(features, extra)
        _, axes = np.linalg.eigh(np.cov(scaled.T).reshape(scaled.shape[1], -1))
        self._axes = axes[:, ::-1][:, :AXES].astype(np.float32)

    def _scale(self, features: np.ndarray, extra: np.ndarray) -> np.ndarray:
        blocks = [block for block in (features, extra) if block.shape[1]]
        scaled = [
            np.clip((block - center) / spread, -LIMIT, LIMIT) / np.sqrt(block.shape[1])
            for block, (center, spread) in zip(blocks, self._blocks, strict=True)
        ]
        return np.concatenate(scaled, axis=1)

    def project(self, features: np.ndarray, extra: np.ndarray) -> np.ndarray:
        """Return the coordinates [N,AXES] of images with these features."""
        return self._scale(features, extra) @ self._axes


def _robust_scale(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the median and the deviation within classes of each feature, [d]; where it hardly varies, a larger one."""
    members = np.zeros([len(x), labels.max() + 1], np.float32)
    members[np.arange(len(x)), labels] = 1
    means = (members.T @ x) / np.maximum(members.sum(axis=0), 1)[:, None]
    return np.median(x, axis=0), robust_spread(x - means[labels])


def foreign_scores(
    points: np.ndarray, anchors: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> np.ndarray | None:
    """Return how foreign each point [N,d] is, float32 [N], in deviations of usual points; None if labels tell nothing.

    `labels` are int [>=N].
    """
    around = points[anchors]
    sign = _random_labels(points, anchors, labels[anchors], rng)
    if sign is None:
        return None
    in_core = sign[anchors] < CORE
    for _ in range(2):  # the second time without anchors that are far from the core themselves
        _, distance = nearest(points, around[in_core], NEAREST, anchors[in_core])
        far = _deviations(np.log(np.maximum(distance[:, -1], 1e-9)))
        in_core &= far[anchors] < CORE
    return np.maximum(sign, far).astype(np.float32)


def _random_labels(
    points: np.ndarray, anchors: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> np.ndarray | None:
    """Return how much less than usual the labels around a point tell, in deviations [N]; None if they tell nothing.

    What labels tell is the Kullback-Leibler divergence of their frequencies among the nearest anchors from those in the
    set, less that of shuffled labels, averaged over nearby anchors.
    """
    k = min(NEIGHBORS, len(anchors) - 1)
    if k < 2:
        return None
    rows, _ = nearest(points, points[anchors], k, anchors)
    told, shuffled = (
        _divergence(given[rows[anchors]], given)[rows[:, : max(k // 2, 1)]].mean(axis=1)
        for given in (labels, rng.permutation(labels))
    )
    told = told - shuffled.mean()
    usual = float(np.median(told))
    if usual <= KNOWN * float(shuffled.std()):
        return None
    return _deviations(-np.log(np.maximum(told / usual, 0.02)), SPREAD)


def _divergence(around: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return sum_c q_c ln(q_c / p_c) [n]: q are the frequencies of the labels `around` [n,k], p those of `labels`."""
    classes, k = int(labels.max()) + 1, around.shape[1]
    rows = np.arange(len(around))[:, None] * classes
    q = np.bincount((rows + around).ravel(), minlength=len(around) * classes).reshape(-1, classes) / k
    p = np.bincount(labels, minlength=classes) / len(labels)
    return (q * np.log(np.maximum(q, 1e-12) / np.maximum(p, 1e-12))).sum(axis=1)


def _deviations(values: np.ndarray, least: float = 1e-3) -> np.ndarray:
    """Return the values less their median, in deviations; from the median to the ninth decile it is 1.28 of them."""
    median, decile = np.quantile(values, [0.5, 0.9])
    return (values - median) / max((decile - median) / 1.2816, least)


def _flag(p: np.ndarray, false_alarms: float) -> np.ndarray:
    """Return bool [N]: which p-values Benjamini and Hochberg reject, none of them above `false_alarms`."""
    ordered = np.sort(p)
    limit = np.minimum(FALSE_SHARE * np.arange(1, len(p) + 1) / len(p), false_alarms)
    below = np.flatnonzero(ordered <= limit)
    return p <= ordered[below[-1]] if len(below) else np.zeros(len(p), dtype=bool)
