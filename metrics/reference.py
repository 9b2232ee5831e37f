"""References of `fid.py ref`: mean and covariance of features, which is all that FID needs.

The features arrive in batches, on one process or several.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch

import dnnlib
from metrics.fid import frechet_distance
from torch_utils import distributed, safe_files

__all__ = ["Reference", "RunningStatistics", "load_reference", "save_reference"]

MIN_ROWS = 512  # rows merged at a time, because each update of the [d,d] matrix is expensive


class RunningStatistics:
    """Running mean [d] and covariance [d,d] in float64, accurate even for means far from the origin.

    Batches and processes are merged by eq. 2.1 of Chan, Golub and LeVeque 1983, "Algorithms for computing the sample
    variance": S = S_a + S_b + n_a n_b / n d d^T, where d = mu_b - mu_a and S is the scatter matrix.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        device = torch.device(device)
        self._device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self._count = 0
        self._mean = torch.zeros(width, dtype=torch.float64, device=self._device)
        self._scatter = torch.zeros(width, width, dtype=torch.float64, device=self._device)
        self._waiting: list[torch.Tensor] = []

    def add(self, features: torch.Tensor) -> None:
        """Add features [n,d]."""
        self._waiting.append(features.to(self._device))
        if sum(map(len, self._waiting)) >= MIN_ROWS:
            self._merge()

    def _merge(self) -> None:
        if not self._waiting:
            return
        x = torch.cat(self._waiting).to(torch.float64)
        self._waiting.clear()
        n, total = len(x), self._count + len(x)
        mean = x.mean(dim=0)
        x -= mean
        shift = mean - self._mean
        self._scatter.addmm_(x.T, x).addr_(shift, shift, alpha=self._count * n / total)
        self._mean += shift * (n / total)
        self._count = total

    def reduce(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Return N, the mean [d] and the unbiased covariance [d,d] of the features that all processes added.

        Every process must call this method. Raise ValueError for N below 2.
        """
        self._merge()
        count = int(distributed.all_reduce_sum(torch.tensor(self._count, device=self._device)))
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {count}")
        mean = distributed.all_reduce_sum(self._mean * self._count) / count
        shift = self._mean - mean
        scatter = distributed.all_reduce_sum(self._scatter.addr(shift, shift, alpha=self._count))
        return count, mean.cpu().numpy(), (scatter / (count - 1)).cpu().numpy()


@dataclass(frozen=True)
class Reference:
    """Mean and covariance of the features of real images, to compute FIDs against."""

    path: str
    mu: np.ndarray  # mean [d]
    sigma: np.ndarray  # covariance [d,d]
    precision: str  # of the detector: fp32 or bf16
    mu_s: np.ndarray | None = None  # mean [s] and
    sigma_s: np.ndarray | None = None  # covariance [s,s] of spatial features; None: it has none

    def check_precision(self, precision: str) -> None:
        """Raise UserError if the features were computed in another precision."""
        if self.precision != precision:
            raise dnnlib.UserError(
                f"the features of {self.path} were computed in {self.precision}; features of different precision do "
                "not compare"
            )

    def check_width(self, width: int) -> None:
        """Raise UserError if the number of features is not `width`."""
        if width != len(self.mu):
            raise dnnlib.UserError(
                f"{self.path} has {len(self.mu)} features, but the detector gives {width}; make the reference with the "
                "same detector from images of the same size"
            )

    def sfid(self, mu_s: np.ndarray | None = None, sigma_s: np.ndarray | None = None) -> float | None:
        """Return the sFID for a mean [s] and a covariance [s,s] of spatial features; None if one side has none.

        Raise UserError if their numbers differ.
        """
        if mu_s is None or self.mu_s is None:
            return None
        if len(mu_s) != len(self.mu_s):
            raise dnnlib.UserError(
                f"{self.path} has {len(self.mu_s)} spatial features, but the detector gives {len(mu_s)}; make the "
                "reference with the same detector"
            )
        return frechet_distance(self.mu_s, self.sigma_s, mu_s, sigma_s)


def save_reference(
    path: str,
    mu: np.ndarray,
    sigma: np.ndarray,
    precision: str = "fp32",
    mu_s: np.ndarray | None = None,
    sigma_s: np.ndarray | None = None,
) -> None:
    """Write a reference `.npz` in EDM's format. Make its folder.

    Spatial features are added under the names that ADM's references have, and `precision` if it is not fp32.
    """
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    more = {} if mu_s is None else dict(mu_s=mu_s, sigma_s=sigma_s)
    with dnnlib.atomic_open(path) as file:
        np.savez(file, mu=mu, sigma=sigma, **more, **({} if precision == "fp32" else dict(precision=precision)))


def load_reference(path: str) -> Reference:
    """Return the reference in an `.npz`, ours, EDM's or ADM's. Raise UserError if the file holds something else."""
    expected = "expected a reference of 'fid.py ref': mu [d] and sigma [d,d]"
    arrays = safe_files.read_npz(path, expected)
    if not {"mu", "sigma"} <= arrays.keys():
        raise dnnlib.UserError(f"{path}: holds {', '.join(arrays) or 'nothing'}; {expected}")
    found = []
    for names in (("mu", "sigma"), ("mu_s", "sigma_s")):
        mu, sigma = map(arrays.get, names)
        if mu is None or sigma is None:  # spatial features, of which both must be there
            found += [None, None]
            continue
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            shapes = f"{names[0]} is {list(mu.shape)} and {names[1]} {list(sigma.shape)}"
            raise dnnlib.UserError(f"{path}: {shapes}; {expected}")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise dnnlib.UserError(f"{path}: {' or '.join(names)} is not finite; {expected}")
        found += [mu, sigma]
    return Reference(path, *found[:2], str(arrays.get("precision", "fp32")), *found[2:])
