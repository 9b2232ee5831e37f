"""Frechet distance of two sets of features seen as Gaussians (Heusel et al. 2017, "GANs trained by a two time-scale
update rule", eq. 6), in float64 and NumPy only.

    FID = |mu_1 - mu_2|^2 + tr(S_1 + S_2) - 2 tr (S_1 S_2)^{1/2}

The last trace is the nuclear norm of A B^T for any roots S_1 = A^T A, S_2 = B^T B. That needs no matrix square root and
holds for singular covariances too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["as_float64", "fid_from_features", "frechet_distance", "mean_and_covariance", "trace_of_root"]

# Square roots of eigenvalues this far below the largest are mostly rounding error: eps / sqrt(1e-12) = 2e-10.
MIN_EIGENVALUE_RATIO = 1e-12
BLOCK = 4096  # rows converted to float64 at a time


def as_float64(x: Any) -> np.ndarray:
    """NumPy array or torch tensor (any device, any float dtype) as a float64 NumPy array."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = (x.float() if x.is_floating_point() and x.element_size() < 4 else x).numpy()
    return np.asarray(x, dtype=np.float64)


def mean_and_covariance(features: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and unbiased covariance [d,d] of features [N,d], in float64, a block of rows at a time.

    Raises ValueError for fewer than 2 rows.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 images, not {len(features)}")
    starts = range(0, len(features), BLOCK)
    mu = sum(as_float64(features[i:i + BLOCK]).sum(axis=0) for i in starts) / len(features)
    cov = np.zeros([len(mu), len(mu)])
    for i in starts:
        centered = as_float64(features[i:i + BLOCK]) - mu
        cov += centered.T @ centered
    return mu, cov / (len(features) - 1)


def _root(cov: np.ndarray) -> np.ndarray:
    """A [d,d] with A^T A = cov, from a symmetric eigendecomposition; eigenvalues that are rounding error count as 0."""
    values, vectors = np.linalg.eigh(cov)
    noise = max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return np.sqrt(np.where(values > noise, values, 0.0))[:, None] * vectors.T


def _nuclear_norm(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.svd(a @ b.T, compute_uv=False).sum())


def trace_of_root(cov1: Any, cov2: Any) -> float:
    """tr (S_1 S_2)^{1/2} of two covariances [d,d], finite and symmetric in its arguments for singular ones too.

    Both positive definite: with S_1 = L L^T, the sum of the square roots of the eigenvalues of L^T S_2 L.
    Otherwise: the nuclear norm of the product of symmetric roots.
    """
    cov1, cov2 = as_float64(cov1), as_float64(cov2)
    try:
        lower = np.linalg.cholesky(cov1)
        np.linalg.cholesky(cov2)
        values = np.linalg.eigvalsh(lower.T @ cov2 @ lower)
        if values[0] > MIN_EIGENVALUE_RATIO * values[-1]:
            return float(np.sqrt(values).sum())
    except np.linalg.LinAlgError:
        pass
    return _nuclear_norm(_root(cov1), _root(cov2))


def frechet_distance(mu1: Any, cov1: Any, mu2: Any, cov2: Any) -> float:
    """Frechet distance of two Gaussians: means [d], covariances [d,d]. Symmetric; ValueError for unequal widths."""
    mu1, mu2, cov1, cov2 = map(as_float64, (mu1, mu2, cov1, cov2))
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape:
        raise ValueError(f"feature widths differ: {len(mu1)} and {len(mu2)}")
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * trace_of_root(cov1, cov2))


def fid_from_features(real: Any, fake: Any) -> float:
    """Frechet distance of features [N,d] and [M,d], N and M at least 2 (else ValueError). Symmetric.

    With no more images than dimensions the covariance is singular, and the centered features over sqrt(N - 1) are its
    exact root: no [d,d] matrix is made for that side.
    """
    if min(len(real), len(fake)) > np.shape(real)[1]:
        return frechet_distance(*mean_and_covariance(real), *mean_and_covariance(fake))
    means, roots = zip(*(_mean_and_root(x) for x in (real, fake)), strict=True)
    traces = [np.sum(root ** 2) for root in roots]
    return float(np.sum((means[0] - means[1]) ** 2) + sum(traces) - 2 * _nuclear_norm(*roots))


def _mean_and_root(features: Any) -> tuple[np.ndarray, np.ndarray]:
    if len(features) > np.shape(features)[1]:
        mu, cov = mean_and_covariance(features)
        return mu, _root(cov)
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 images, not {len(features)}")
    x = as_float64(features)
    mu = x.mean(axis=0)
    return mu, (x - mu) / np.sqrt(len(x) - 1)
