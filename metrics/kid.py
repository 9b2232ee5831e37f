"""KID, the kernel distance: the unbiased squared maximum mean discrepancy (MMD) of two sets of features.

Binkowski et al. 2018, "Demystifying MMD GANs", eq. 4, with the kernel (x.y/d + 1)^3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from metrics.memo import Memo
from metrics.prdc import as_features
from torch_utils.misc import block_rows

__all__ = ["kid_from_features"]


def _kernel_sums(
    x: torch.Tensor, y: torch.Tensor, x_counts: torch.Tensor, y_counts: torch.Tensor, rows: int
) -> torch.Tensor:
    """Return the sums [B] of the kernel over all pairs of rows of `x` [N,d] and `y` [M,d], in float64.

    In sum b, row n of `x` counts `x_counts[b,n]` times and row m of `y` counts `y_counts[b,m]` times. `rows` rows of
    the [N,M] kernel are held at a time.
    """
    total = torch.zeros(len(y_counts), dtype=torch.float64, device=y.device)
    y = y.to(torch.float64)
    for start in range(0, len(x), rows):
        block = torch.mm(x[start : start + rows].to(torch.float64), y.T)
        block.mul_(1 / x.shape[1]).add_(1).pow_(3)
        total += (torch.mm(block, y_counts.T) * x_counts[:, start : start + rows].T).sum(dim=0)
    return total


def _self_kernel(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the kernel [N] of each row with itself."""
    return torch.cat(
        [
            (x[i : i + rows].to(torch.float64).square().sum(dim=1) / x.shape[1] + 1).pow_(3)
            for i in range(0, len(x), rows)
        ]
    )


def kid_from_features(
    real: Any, fake: Any, counts: np.ndarray | None = None, *, block: int | None = None, memo: Memo | None = None
) -> float | np.ndarray:
    """Return the unbiased squared MMD of features `real` [N,d] and `fake` [M,d], a float; not multiplied by 1,000.

    With `counts` [B,M], return the values [B] of B resampled sets; set b holds row m of `fake` `counts[b,m]` times.

    All images enter one sum; there are no subsets. `block` is the number of kernel rows held at a time (by default
    what suits the device). Beyond the features, this takes memory for a float64 copy of one side and a few blocks.
    `memo` keeps the sum over pairs of `real`. Raise ValueError for fewer than 2 images on a side.
    """
    real, fake = as_features(real), as_features(fake)
    n, m = len(real), len(fake)
    if min(n, m) < 2:
        raise ValueError(f"a kernel distance needs at least 2 images on each side, not {n} and {m}")
    once = torch.ones([1, n], dtype=torch.float64, device=real.device)
    taken = torch.as_tensor(np.ones([1, m]) if counts is None else counts.astype(np.float64), device=real.device)
    result = -2 / (n * m) * _kernel_sums(real, fake, once, taken, block or block_rows(m, real.device))

    def mean_of_pairs(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = block or block_rows(len(x), x.device)
        pairs = _kernel_sums(x, x, weights, weights, rows) - torch.mv(weights, _self_kernel(x, rows))
        return pairs / (len(x) * (len(x) - 1))

    result = result + (memo or Memo()).get("kernel", lambda: mean_of_pairs(real, once))
    result = (result + mean_of_pairs(fake, taken)).cpu().numpy()
    return float(result[0]) if counts is None else result
