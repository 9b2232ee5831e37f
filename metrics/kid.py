"""Kernel distance: unbiased squared mean discrepancy (Binkowski et al. 2018, "Demystifying MMD GANs", eq. 4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from metrics.prdc import as_features, block_rows

__all__ = ["kid_from_features", "kid_replicates"]


def _kernel_sums(
    x: torch.Tensor, y: torch.Tensor, x_counts: torch.Tensor, y_counts: torch.Tensor, rows: int
) -> torch.Tensor:
    """Sums [B] of (x.y/d + 1)^3 over all pairs, x and y taken counts [B,N] and [B,M] times, in float64 blocks."""
    total = torch.zeros(len(y_counts), dtype=torch.float64, device=y.device)
    y = y.to(torch.float64)
    for start in range(0, len(x), rows):
        block = torch.mm(x[start : start + rows].to(torch.float64), y.T)
        block.mul_(1 / x.shape[1]).add_(1).pow_(3)
        total += (torch.mm(block, y_counts.T) * x_counts[:, start : start + rows].T).sum(dim=0)
    return total


def _own(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Kernel [N] of each point with itself."""
    return torch.cat(
        [
            (x[i : i + rows].to(torch.float64).square().sum(dim=1) / x.shape[1] + 1).pow_(3)
            for i in range(0, len(x), rows)
        ]
    )


def _kid(real: Any, fake: Any, counts: Any | None, block: int | None) -> np.ndarray:
    real, fake = as_features(real), as_features(fake)
    n, m = len(real), len(fake)
    if min(n, m) < 2:
        raise ValueError(f"a kernel distance needs at least 2 images a side, not {n} and {m}")
    once = torch.ones([1, n], dtype=torch.float64, device=real.device)
    taken = torch.as_tensor(np.ones([1, m]) if counts is None else counts.astype(np.float64), device=real.device)
    result = -2 / (n * m) * _kernel_sums(real, fake, once, taken, block or block_rows(m, real.device))
    for x, weights in ((real, once), (fake, taken)):
        rows = block or block_rows(len(x), x.device)
        pairs = _kernel_sums(x, x, weights, weights, rows) - torch.mv(weights, _own(x, rows))
        result = result + pairs / (len(x) * (len(x) - 1))
    return result.cpu().numpy()


def kid_from_features(real: Any, fake: Any, block: int | None = None) -> float:
    """Unbiased MMD^2 of features [N,d] and [M,d] with the kernel (x.y/d + 1)^3; full sets, not times 1000.

    Raises ValueError for fewer than 2 images on a side. Memory beyond the features: a float64 copy of one side and a
    few blocks of `block` rows.
    """
    return float(_kid(real, fake, None, block)[0])


def kid_replicates(real: Any, fake: Any, counts: np.ndarray, block: int | None = None) -> np.ndarray:
    """The same [B] for B sets that hold each row of `fake` counts [B,M] times."""
    return _kid(real, fake, counts, block)
