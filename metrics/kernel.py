"""Kernel distance: unbiased squared mean discrepancy (Binkowski et al. 2018, "Demystifying MMD GANs", eq. 4)."""

from __future__ import annotations

from typing import Any

import torch

from metrics.neighbours import as_features, block_rows

__all__ = ["kid_from_features"]


def _kernel_sum(x: torch.Tensor, y: torch.Tensor, rows: int) -> float:
    """Sum of (x.y/d + 1)^3 over all pairs, a block of rows of x at a time, in float64."""
    total = 0.0
    y = y.to(torch.float64)
    for start in range(0, len(x), rows):
        block = torch.mm(x[start:start + rows].to(torch.float64), y.T)
        block.mul_(1 / x.shape[1]).add_(1)
        total += float((block * block).mul_(block).sum())
    return total


def kid_from_features(real: Any, fake: Any, block: int | None = None) -> float:
    """Unbiased MMD^2 of features [N,d] and [M,d] with the kernel (x.y/d + 1)^3; full sets, not times 1000.

    Raises ValueError for fewer than 2 images on a side. Memory beyond the features: a float64 copy of one side and a
    few blocks of `block` rows.
    """
    real, fake = as_features(real), as_features(fake)
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"a kernel distance needs at least 2 images a side, not {len(real)} and {len(fake)}")
    within = 0.0
    for x in (real, fake):
        rows = block or block_rows(len(x), x.device)
        own = sum(float((x[i:i + rows].to(torch.float64).square().sum(dim=1) / x.shape[1] + 1).pow_(3).sum())
                  for i in range(0, len(x), rows))
        within += (_kernel_sum(x, x, rows) - own) / (len(x) * (len(x) - 1))
    between = _kernel_sum(real, fake, block or block_rows(len(fake), real.device)) / (len(real) * len(fake))
    return within - 2 * between
