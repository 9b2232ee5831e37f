"""Transition matrices of labels, T[i, j] = P(observed = j | clean = i), whose rows sum to 1; and noise drawn from them.

`dataset_tool.py` draws wrong labels from T, and the losses correct for noise with the same T (docs/methods/tdsm.md).
Source: Na et al., "Label-Noise Robust Diffusion Models", ICLR 2024. Noise that depends on the image: Xia et al.,
"Part-dependent Label Noise", NeurIPS 2020.
"""

from __future__ import annotations

import os

import numpy as np

import dnnlib
from torch_utils import safe_files

__all__ = [
    "FAMILIES",
    "NOISE_TYPES",
    "asym_targets",
    "check_matrix",
    "check_observed",
    "check_targets",
    "corrupt_labels",
    "impossible_label",
    "instance_noise",
    "inverse_transition",
    "load_matrix",
    "row_stochastic",
    "seen_rows",
    "transition_matrix",
    "used_classes",
]

NOISE_TYPES = ("sym", "asym", "pair", "matrix")  # the types that have a T; instance noise depends on the image
MAX_CONDITION = 1e6  # the largest condition number of a T that may be inverted
PIECE = 1 << 24  # pixels that instance noise turns into floats at a time

# CIFAR-100: the five fine classes in each of the 20 superclasses, as published by the authors of the data set.
CIFAR100_SUPERCLASSES = (
    (4, 30, 55, 72, 95), (1, 32, 67, 73, 91), (54, 62, 70, 82, 92), (9, 10, 16, 28, 61), (0, 51, 53, 57, 83),
    (22, 39, 40, 86, 87), (5, 20, 25, 84, 94), (6, 7, 14, 18, 24), (3, 42, 43, 88, 97), (12, 17, 37, 68, 76),
    (23, 33, 49, 60, 71), (15, 19, 21, 31, 38), (34, 63, 64, 66, 75), (26, 45, 77, 79, 99), (2, 11, 35, 46, 98),
    (27, 29, 44, 78, 93), (36, 50, 65, 74, 80), (47, 52, 56, 59, 96), (8, 13, 48, 58, 90), (41, 69, 81, 85, 89),
)  # fmt: skip

_DIGIT_FLIPS = {2: 7, 3: 8, 5: 6, 6: 5}
FAMILIES = {  # family -> number of classes, {class: the class it is mistaken for}
    "mnist": (10, _DIGIT_FLIPS),
    "digits": (10, _DIGIT_FLIPS),
    "fashion-mnist": (10, {0: 6, 2: 4, 5: 7}),
    "cifar10": (10, {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}),
    "cifar100": (100, {i: row[(k + 1) % 5] for row in CIFAR100_SUPERCLASSES for k, i in enumerate(row)}),
}


# ---------------------------------------------------------------------------------------------------------------------
# The matrices.


def transition_matrix(
    noise_type: str,
    rate: float | None,
    num_classes: int,
    family: str | None = None,
    matrix: np.ndarray | None = None,
    counts: np.ndarray | None = None,
) -> np.ndarray:
    """Return T of a noise type at a rate, float64 [C, C].

    Only the type `asym` needs `family`. Only the type `matrix` needs `matrix`, and it has no rate. `counts` [C] are the
    images per class: no label turns into that of a class without images (None: all have some). A matrix stays as it is.
    UserError: the rate is outside [0, 1], fewer than 2 classes have images, the family is unknown, or the matrix is not
    C x C and row-stochastic.
    """
    if noise_type == "matrix":
        if matrix is None:
            raise dnnlib.UserError("noise type 'matrix' needs a matrix")
        return check_matrix(matrix, num_classes)
    if noise_type not in NOISE_TYPES:
        raise dnnlib.UserError(f"unknown noise type '{noise_type}': expected one of {', '.join(NOISE_TYPES)}")
    used = used_classes(np.ones(num_classes) if counts is None else counts)
    rate = check_rate(rate)
    if noise_type == "sym":
        T = np.eye(num_classes)
        T[np.ix_(used, used)] = rate / (len(used) - 1)
        T[used, used] = 1 - rate
        return T
    source = np.arange(num_classes)
    if noise_type == "pair":
        target = source.copy()
        target[used] = np.roll(used, -1)
    else:
        target = asym_targets(family, num_classes)
        target = np.where(np.isin(target, used), target, source)
    T = np.eye(num_classes)
    moved = source[target != source]
    T[moved, moved] = 1 - rate
    T[moved, target[moved]] = rate
    return T


def used_classes(counts: np.ndarray) -> np.ndarray:
    """Return the classes that have images, int64. UserError: there are fewer than two."""
    used = np.flatnonzero(counts)
    if len(used) < 2:
        raise dnnlib.UserError(f"label noise needs at least 2 classes with images, found {len(used)}")
    return used


def check_targets(T: np.ndarray, counts: np.ndarray) -> None:
    """Raise UserError if T turns labels of the data into that of a class without images; `counts` [C] per class."""
    found = np.argwhere((T > 0) & (counts[:, None] > 0) & (counts == 0))
    if len(found):
        clean, observed = found[0]
        raise dnnlib.UserError(
            f"the transition matrix turns label {clean} into {observed} (row {clean}, column {observed}), but no image "
            f"has label {observed}"
        )


def asym_targets(family: str | None, num_classes: int) -> np.ndarray:
    """Return the class that each class is mistaken for under `asym`, int64 [C]; some classes keep their own number.

    UserError: the family defines no such classes, or has another number of classes than the labels.
    """
    if family not in FAMILIES:
        found = f"the family '{family}'" if family else "an archive that records no family"
        raise dnnlib.UserError(
            f"noise type 'asym' is not defined for {found} (known: {', '.join(FAMILIES)}): "
            "use noise type 'matrix' with your own matrix"
        )
    expected, flips = FAMILIES[family]
    if num_classes != expected:
        raise dnnlib.UserError(
            f"noise type 'asym': the family '{family}' has {expected} classes, the labels have {num_classes}: "
            "use noise type 'matrix' with your own matrix"
        )
    return np.array([flips.get(i, i) for i in range(num_classes)], dtype=np.int64)


def check_rate(rate: float | None) -> float:
    """Return the rate as a float. UserError unless it is a number in [0, 1]."""
    if rate is None or not 0 <= rate <= 1:
        raise dnnlib.UserError(f"noise rate must be a number in [0, 1], found {rate}")
    return float(rate)


def check_matrix(matrix: np.ndarray, num_classes: int | None = None, name: str = "transition matrix") -> np.ndarray:
    """Return a matrix as float64 [C, C] whose rows sum to exactly 1. UserError unless square and row-stochastic."""
    try:
        T = np.asarray(matrix, dtype=np.float64)
    except (TypeError, ValueError):
        raise dnnlib.UserError(f"{name}: not a table of numbers with rows of equal length") from None
    if T.ndim != 2 or T.shape[0] != T.shape[1] or not len(T):
        shape = "x".join(map(str, T.shape)) or "a single number"
        raise dnnlib.UserError(f"{name}: must be square (classes x classes), found {shape}")
    if num_classes is not None and len(T) != num_classes:
        raise dnnlib.UserError(f"{name}: is {len(T)}x{len(T)}, but there are {num_classes} classes")
    bad = np.flatnonzero(~np.isfinite(T).all(axis=1) | (T < 0).any(axis=1))
    if len(bad):
        raise dnnlib.UserError(f"{name}: row {bad[0]} has an entry that is negative or not finite")
    sums = T.sum(axis=1)
    bad = np.flatnonzero(np.abs(sums - 1) > 1e-4)  # accepts values that were typed with five digits
    if len(bad):
        raise dnnlib.UserError(f"{name}: not row-stochastic, row {bad[0]} sums to {sums[bad[0]]:.6g}, expected 1")
    return T / sums[:, None]


def row_stochastic(counts: np.ndarray) -> np.ndarray:
    """Return the rows divided by their sums, float64 [C,C]; an empty row becomes the identity's."""
    sums = counts.sum(axis=1, keepdims=True)
    return np.where(sums > 0, counts / np.where(sums > 0, sums, 1), np.eye(len(counts)))


def seen_rows(mass: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Return `row_stochastic` of what the images of each class add up to, [C,C], where there is anything to see.

    A class that no label int64 [N] of `observed` names, or that has less than half an image, gets the identity's row:
    its few crumbs of probability are rounding and doubt about other classes' images.
    """
    named = np.bincount(observed, minlength=len(mass)) > 0
    return row_stochastic(np.where((named & (mass.sum(axis=1) >= 0.5))[:, None], mass, 0))


def load_matrix(path: str, num_classes: int | None = None) -> np.ndarray:
    """Load T, float64 [C, C], from a `.npy`, a `.json` (a list of rows) or a label file (`.npz`, its `transition`).

    UserError names the file when it is unreadable or its matrix is not row-stochastic.
    """
    if path.lower().endswith(".npz"):
        arrays = safe_files.read_npz(path, "expected a label file of detect_noise.py")
        if "transition" not in arrays:
            raise dnnlib.UserError(f"{path}: holds no 'transition' (there are: {', '.join(arrays) or 'none'})")
        return check_matrix(arrays["transition"], num_classes, name=path)
    reader = {".json": safe_files.load_json, ".npy": safe_files.load_npy}.get(os.path.splitext(path)[1].lower())
    if reader is None:
        raise dnnlib.UserError(f"{path}: a matrix must be a .npy or .json file, or the .npz of detect_noise.py")
    matrix = reader(dnnlib.read_bytes(path), path)
    return check_matrix(matrix, num_classes, name=path)


# ---------------------------------------------------------------------------------------------------------------------
# Wrong labels from clean ones.


def corrupt_labels(labels: np.ndarray, T: np.ndarray, seed: int) -> np.ndarray:
    """Draw an observed label from row T[y] for each clean label y, int64 [N] -> int64 [N].

    Label k depends on (seed, k, y, T) only. UserError: a label is outside the matrix.
    """
    labels, num_classes = np.asarray(labels, dtype=np.int64), len(T)
    _check_labels(labels, num_classes)
    return _draw_columns(T, labels, np.random.default_rng(seed).random(len(labels)))


def instance_noise(images: np.ndarray, labels: np.ndarray, rate: float, num_classes: int, seed: int) -> np.ndarray:
    """Draw labels with noise that depends on the image, uint8 [N, ...] and int64 [N] -> int64 [N].

    Image k gets a wrong label with probability q_k ~ N(rate, 0.1^2), truncated to [0, 1]. The wrong class c != y is
    drawn from softmax_c((x W_y)_c), where x are the pixels in [0, 1] and W_y [pixels, C] are standard normal numbers,
    one matrix for each true class y. Classes without images are not drawn. Source: Xia et al. 2020, Algorithm 2.
    UserError: a label is outside the classes, or fewer than 2 classes have images.
    """
    rate = check_rate(rate)
    labels = np.asarray(labels, dtype=np.int64)
    _check_labels(labels, num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    used_classes(counts)
    rng = np.random.default_rng(seed)
    flip = _truncated_normal(rng, rate, 0.1, len(labels))
    uniform = rng.random(len(labels))
    pixels = np.asarray(images).reshape(len(labels), -1)
    observed = np.empty_like(labels)
    piece = max(min(4096, PIECE // max(pixels.shape[1], 1)), 1)
    order = np.argsort(labels, kind="stable")  # class by class, so that only one W_y is in memory
    groups = np.split(order, np.cumsum(counts)[:-1])
    for y, group in enumerate(groups):
        projection = np.random.default_rng([seed, y]).standard_normal([pixels.shape[1], num_classes], dtype=np.float32)
        for part in np.split(group, range(piece, len(group), piece)):
            x = pixels[part].astype(np.float32)
            x /= 255
            logits = (x @ projection).astype(np.float64)
            logits[:, y] = logits[:, counts == 0] = -np.inf
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            p *= (flip[part] / p.sum(axis=1))[:, None]
            p[:, y] = 1 - flip[part]
            observed[part] = _draw_columns(p, np.arange(len(part)), uniform[part])
    return observed


def _check_labels(labels: np.ndarray, num_classes: int) -> None:
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise dnnlib.UserError(
            f"labels must be in 0..{num_classes - 1}, found {labels.min()}..{labels.max()}: "
            "the transition matrix and the labels disagree on the number of classes"
        )


def _draw_columns(P: np.ndarray, rows: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Return one column of P [R, C] per row number and uniform number in [0, 1), from each row's cumulative sum."""
    cumulative = np.cumsum(P, axis=1)
    cumulative /= cumulative[:, -1:]  # is exactly 1 at the last nonzero entry, so zeros after it are never drawn
    shifted = (cumulative + np.arange(len(P))[:, None]).ravel()  # row i covers [i, i + 1): one search for all rows
    x = np.minimum(rows + uniform, np.nextafter(rows + 1.0, 0))
    return (np.searchsorted(shifted, x, side="right") - rows * P.shape[1]).astype(np.int64)


def _truncated_normal(rng: np.random.Generator, mean: float, std: float, n: int) -> np.ndarray:
    """Return n draws of N(mean, std^2) within [0, 1]. With `mean` in [0, 1] at least 49% of the draws pass."""
    values = rng.normal(mean, std, n)
    while len(bad := np.flatnonzero((values < 0) | (values > 1))):
        values[bad] = rng.normal(mean, std, len(bad))
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Before training with a T.


def check_observed(T: np.ndarray, labels: np.ndarray) -> None:
    """Raise UserError if some label of the data cannot occur under T (an all-zero column). Call it before training."""
    columns = np.asarray(T).sum(axis=0)
    for label in np.unique(np.asarray(labels)):
        if columns[label] == 0:
            raise impossible_label(int(label))


def impossible_label(label: int) -> dnnlib.UserError:
    """Return the error for a label that no class turns into."""
    return dnnlib.UserError(
        f"label {label} occurs in the data, but column {label} of the transition matrix is all zero: "
        "no class turns into it. Use the matrix that made these labels"
    )


def inverse_transition(T: np.ndarray) -> np.ndarray:
    """Return T^-1 in float64. UserError above a condition number of 1e6: the inverse would mostly amplify noise."""
    T = np.asarray(T, dtype=np.float64)
    condition = float(np.linalg.cond(T))
    if not condition <= MAX_CONDITION:
        raise dnnlib.UserError(
            f"the transition matrix cannot be inverted (condition number {condition:.3g}, limit {MAX_CONDITION:.0e}): "
            "train the classifier with the known noise (train_classifier.py --noise_type=...) instead"
        )
    return np.linalg.inv(T)
