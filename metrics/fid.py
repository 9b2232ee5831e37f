"""FID: Frechet distance between two sets of features, each described by a Gaussian.

Heusel et al. 2017, "GANs trained by a two time-scale update rule", eq. 6:

    FID = |mu_1 - mu_2|^2 + tr(S_1 + S_2) - 2 tr (S_1 S_2)^{1/2}

The last trace equals the nuclear norm of A B^T for any roots S_1 = A^T A and S_2 = B^T B. This form needs no matrix
square root and also holds for singular covariances. Everything here is float64 and NumPy.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from tqdm import tqdm

from metrics.memo import Memo

__all__ = [
    "as_float64",
    "fid_from_features",
    "frechet_distance",
    "mean_and_covariance",
    "trace_of_root",
]

# Below this ratio to the largest eigenvalue, a square root is mostly rounding error: eps / sqrt(1e-12) = 2e-10.
MIN_EIGENVALUE_RATIO = 1e-12
BLOCK = 4096  # rows converted to float64 at a time


def as_float64(x: Any) -> np.ndarray:
    """Return a NumPy array or a torch tensor (any device, any float dtype) as a float64 NumPy array."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = (x.float() if x.is_floating_point() and x.element_size() < 4 else x).numpy()
    return np.asarray(x, dtype=np.float64)


def mean_and_covariance(features: Any, counts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean [d] and the unbiased covariance [d,d] of features [N,d], in float64.

    `counts` [N] says how often each row occurs; without it each row occurs once. The rows are converted in blocks to
    save memory. Raise ValueError for fewer than 2 rows.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 images, not {len(features)}")
    counts = np.ones(len(features)) if counts is None else np.asarray(counts, dtype=np.float64)
    starts = range(0, len(features), BLOCK)
    mu = sum(counts[i : i + BLOCK] @ as_float64(features[i : i + BLOCK]) for i in starts) / counts.sum()
    cov = np.zeros([len(mu), len(mu)])
    for i in starts:
        centered = (as_float64(features[i : i + BLOCK]) - mu) * np.sqrt(counts[i : i + BLOCK, None])
        cov += centered.T @ centered
    return mu, cov / (counts.sum() - 1)


class _Gaussian:
    """A mean and a covariance. The covariance is given as a matrix, or by a root A with A^T A = covariance.

    The factors of the covariance are computed once, when they are first needed.
    """

    def __init__(self, mean: np.ndarray, cov: np.ndarray | None = None, root: np.ndarray | None = None):
        self.mean, self.cov, self._root = mean, cov, root
        self.trace = float(np.trace(cov) if root is None else np.sum(root**2))

    @functools.cached_property
    def lower(self) -> np.ndarray | None:
        """Return L with L L^T = covariance, or None if the covariance is singular or was given by a root."""
        try:
            return None if self.cov is None else np.linalg.cholesky(self.cov)
        except np.linalg.LinAlgError:
            return None

    @functools.cached_property
    def root(self) -> np.ndarray:
        """Return A with A^T A = covariance. Eigenvalues as small as rounding errors count as 0."""
        if self._root is not None:
            return self._root
        values, vectors = np.linalg.eigh(self.cov)
        noise = max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
        return np.sqrt(np.where(values > noise, values, 0.0))[:, None] * vectors.T

    def trace_of_root(self, other: _Gaussian) -> float:
        if self.lower is not None and other.lower is not None:
            values = np.linalg.eigvalsh(self.lower.T @ other.cov @ self.lower)
            if values[0] > MIN_EIGENVALUE_RATIO * values[-1]:
                return float(np.sqrt(values).sum())
        return float(np.linalg.svd(self.root @ other.root.T, compute_uv=False).sum())

    def distance(self, other: _Gaussian) -> float:
        shift = float(np.sum((self.mean - other.mean) ** 2))
        # The terms cancel for equal sets. What remains is rounding, which may be below 0; a distance never is.
        return max(shift + self.trace + other.trace - 2 * self.trace_of_root(other), 0.0) + 0.0


def trace_of_root(cov1: Any, cov2: Any) -> float:
    """Return tr (S_1 S_2)^{1/2} of two covariances [d,d].

    If both are positive definite, this is the sum of the square roots of the eigenvalues of L^T S_2 L, where
    S_1 = L L^T. Otherwise it is the nuclear norm of the product of symmetric roots. So the value is finite, and
    symmetric in the two arguments, for singular covariances too.
    """
    cov1, cov2 = as_float64(cov1), as_float64(cov2)
    return _Gaussian(np.zeros(len(cov1)), cov1).trace_of_root(_Gaussian(np.zeros(len(cov2)), cov2))


def frechet_distance(mu1: Any, cov1: Any, mu2: Any, cov2: Any) -> float:
    """Return the Frechet distance between two Gaussians with means [d] and covariances [d,d].

    The distance is symmetric and never negative. Raise ValueError if the two have different numbers of features.
    """
    mu1, mu2, cov1, cov2 = map(as_float64, (mu1, mu2, cov1, cov2))
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape:
        raise ValueError(f"feature widths differ: {len(mu1)} and {len(mu2)}")
    return _Gaussian(mu1, cov1).distance(_Gaussian(mu2, cov2))


def fid_from_features(real: Any, fake: Any, counts: np.ndarray | None = None, *, memo: Memo | None = None) -> Any:
    """Return the Frechet distance between features `real` [N,d] and `fake` [M,d], a float. It is symmetric.

    With `counts` [B,M], return the distances [B] of `real` to B resampled sets; set b holds row m of `fake`
    `counts[b,m]` times. The factors of `real` are then computed only once; `memo` keeps them for later calls.

    A side with no more images than features has a singular covariance. Its exact root are the centered features over
    sqrt(N - 1), so no [d,d] matrix is made for that side. Raise ValueError for fewer than 2 images on a side.
    """
    reference = (memo or Memo()).get("gaussian", lambda: _gaussian_of(real))
    if counts is None:
        return reference.distance(_gaussian_of(fake))
    with tqdm(counts, desc="bootstrap", unit="draw", disable=None, leave=False, delay=2) as bar:
        return np.array([reference.distance(_gaussian_of(fake, row)) for row in bar])


def _gaussian_of(features: Any, counts: np.ndarray | None = None) -> _Gaussian:
    if counts is not None:
        drawn = np.flatnonzero(counts)
        features, counts = features[drawn], counts[drawn].astype(np.float64)
    if len(features) > np.shape(features)[1]:
        return _Gaussian(*mean_and_covariance(features, counts))
    x, counts = as_float64(features), np.ones(len(features)) if counts is None else counts
    if counts.sum() < 2:
        raise ValueError(f"a covariance needs at least 2 images, not {len(features)}")
    mean = counts @ x / counts.sum()
    return _Gaussian(mean, root=(x - mean) * np.sqrt(counts[:, None] / (counts.sum() - 1)))
