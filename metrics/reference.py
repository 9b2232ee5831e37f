"""Mean and covariance of features that arrive in batches, on one process or many: what FID needs."""

from __future__ import annotations

import os

import numpy as np
import torch

import dnnlib
from torch_utils import distributed, safe_files

__all__ = ["RunningStatistics", "load_reference", "save_reference"]

MIN_ROWS = 512  # rows merged at a time: the update of the [d,d] matrix costs more than the batch when d is large


class RunningStatistics:
    """Running mean [d] and covariance [d,d] in float64, numerically stable for means far from the origin.

    Batches and processes are merged by Chan, Golub and LeVeque 1983, eq. 2.1: S = S_a + S_b + n_a n_b / n dd^T,
    d = mu_b - mu_a.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        device = torch.device(device)
        self._device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self._count = 0
        self._mean = torch.zeros(width, dtype=torch.float64, device=self._device)
        self._scatter = torch.zeros(width, width, dtype=torch.float64, device=self._device)
        self._waiting: list[torch.Tensor] = []

    def add(self, features: torch.Tensor) -> None:
        """Take in features [n,d]."""
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
        """(N, mean [d], unbiased covariance [d,d]) of what all processes took in; every process must call it.

        Raises ValueError for N below 2.
        """
        self._merge()
        count = int(distributed.all_reduce_sum(torch.tensor(self._count, device=self._device)))
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {count}")
        mean = distributed.all_reduce_sum(self._mean * self._count) / count
        shift = self._mean - mean
        scatter = distributed.all_reduce_sum(self._scatter.addr(shift, shift, alpha=self._count))
        return count, mean.cpu().numpy(), (scatter / (count - 1)).cpu().numpy()


def save_reference(path: str, mu: np.ndarray, sigma: np.ndarray, precision: str = "fp32") -> None:
    """Write a reference `.npz`, making its folder: EDM's format, and `precision` where it is not float32."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with dnnlib.atomic_open(path) as file:
        np.savez(file, mu=mu, sigma=sigma, **({} if precision == "fp32" else dict(precision=precision)))


def load_reference(path: str, precision: str = "fp32") -> tuple[np.ndarray, np.ndarray]:
    """mu [d] and sigma [d,d] of a reference `.npz` (ours or EDM's).

    UserError when it is none, or its features were computed in another precision.
    """
    expected = "expected a reference of 'fid.py ref': mu [d] and sigma [d,d]"
    arrays = safe_files.read_npz(path, expected)
    if not {"mu", "sigma"} <= arrays.keys():
        raise dnnlib.UserError(f"{path}: holds {', '.join(arrays) or 'nothing'}; {expected}")
    mu, sigma = arrays["mu"], arrays["sigma"]
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise dnnlib.UserError(f"{path}: mu is {list(mu.shape)} and sigma {list(sigma.shape)}; {expected}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise dnnlib.UserError(f"{path}: mu or sigma is not finite; {expected}")
    made_in = str(arrays.get("precision", "fp32"))
    if made_in != precision:
        raise dnnlib.UserError(
            f"--precision={precision}: the features of {path} were computed in {made_in}; their "
            "figures do not compare, so use the same"
        )
    return mu, sigma
