"""Precision, recall, density and coverage from nearest neighbours (Kynkaanniemi et al. 2019, "Improved precision and
recall metric"; Naeem et al. 2020, "Reliable fidelity and diversity metrics", eqs. 1-5), in bounded memory.

Distances come a block of rows at a time from |x|^2 + |y|^2 - 2 x.y, in float64 and with the mean removed. That form has
rounding errors, the definitions have strict inequalities, and real data has ties (copies of an image, identical sets).
So every comparison that rounding could decide is decided again by the sum of squared differences. The counts are then
exact: they depend neither on the block size nor on the order of the images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["as_features", "block_rows", "prdc", "prdc_replicates"]

PAIR_CHUNK = 4096  # pairs compared at a time
SPARE = 2  # candidates beyond the k-th neighbour: most rows need no second look


def as_features(x: Any) -> torch.Tensor:
    """NumPy array or tensor [N,d] as a tensor on a device that has float64, without a copy where possible."""
    if not torch.is_tensor(x):
        x = torch.from_numpy(np.require(x, requirements=["C", "W"]))
    return x.cpu() if x.device.type == "mps" else x


def block_rows(width: int, device: torch.device) -> int:
    """Rows of a float64 block of `width` columns: 8 MiB on a CPU (it stays in the cache), 512 MiB on a GPU."""
    return max((2**26 if device.type == "cuda" else 2**20) // max(width, 1), 1)


class _Points:
    """A set of features: as given, centered in float64, and the squared norms of the latter."""

    def __init__(self, given: torch.Tensor, center: torch.Tensor):
        self.given = given
        self.centered = given.to(torch.float64, copy=True).sub_(center)
        self.norms = torch.linalg.vector_norm(self.centered, dim=1).square_()

    def squared_distances(self, start: int, stop: int, other: _Points) -> torch.Tensor:
        """[stop-start,M] squared distances of our points start..stop to all of the other's, with rounding errors."""
        block = torch.addmm(other.norms, self.centered[start:stop], other.centered.T, alpha=-2)
        return block.add_(self.norms[start:stop, None])

    def pair_distances(self, i: torch.Tensor, other: _Points, j: torch.Tensor) -> torch.Tensor:
        """[P] squared distances of our points i to the other's points j, the same whatever else is asked for."""
        out = torch.empty(len(i), dtype=torch.float64, device=i.device)
        # Always whole chunks: the order of summation may depend on the shape. Few wide rows keep memory bounded.
        chunk = max(min(PAIR_CHUNK, 2**22 // self.given.shape[1]), 1)
        for start in range(0, len(i), chunk):
            a, b = i[start : start + chunk], j[start : start + chunk]
            n = len(a)
            if n < chunk:
                a, b = (torch.nn.functional.pad(x, (0, chunk - n)) for x in (a, b))
            difference = self.given[a].to(torch.float64) - other.given[b].to(torch.float64)
            out[start : start + n] = difference.square_().sum(dim=1)[:n]
        return out


def _tolerance(norms: torch.Tensor, other_norms: torch.Tensor, width: int) -> torch.Tensor:
    # Bound of the rounding error of |x|^2 + |y|^2 - 2 x.y (Higham 2002, section 3.1), twice for safety.
    return (norms + other_norms.max()) * (4 * (width + 4) * torch.finfo(torch.float64).eps)


def _radii(points: _Points, k: int, rows: int) -> torch.Tensor:
    """[N] squared distance to the k-th nearest neighbour: the (k+1)-th smallest distance, the point itself included."""
    n = len(points.given)
    count = min(k + 1 + SPARE, n)
    out = torch.empty(n, dtype=torch.float64, device=points.given.device)
    tolerance = _tolerance(points.norms, points.norms, points.given.shape[1])
    for start in range(0, n, rows):
        block = points.squared_distances(start, min(start + rows, n), points)
        own = torch.arange(start, start + len(block), device=block.device)
        nearest = torch.topk(block, count, dim=1, largest=False)
        exact = points.pair_distances(own.repeat_interleave(count), points, nearest.indices.flatten())
        radii = exact.view(-1, count).kthvalue(k + 1, dim=1).values
        # Could rounding have kept a nearer point out of the candidates? Then all that may be as near are candidates.
        bound = radii + tolerance[own]
        unsure = (nearest.values[:, -1] <= bound).nonzero()[:, 0] if count < n else own[:0]
        if len(unsure):
            block, own = block[unsure], own[unsure]
            i, j = (block <= bound[unsure, None]).nonzero(as_tuple=True)
            block.fill_(torch.inf)[i, j] = points.pair_distances(own[i], points, j)
            radii[unsure] = block.kthvalue(k + 1, dim=1).values
        out[start : start + len(radii)] = radii
    return out


def _inside(
    block: torch.Tensor, radii: torch.Tensor, tolerance: torch.Tensor, start: int, real: _Points, fake: _Points
) -> torch.Tensor:
    """Boolean block: distance < radius. `radii` and `tolerance` broadcast to it ([rows,1] or [1,columns])."""
    sure = block < radii - tolerance
    unsure = (block <= radii + tolerance).logical_xor_(sure)
    if unsure.any():
        i, j = unsure.nonzero(as_tuple=True)
        exact = real.pair_distances(start + i, fake, j)
        sure[i, j] = exact < radii.expand_as(block)[i, j]
    return sure


def prdc(real: Any, fake: Any, k: int = 5, block: int | None = None) -> dict[str, float]:
    """Precision, recall, density and coverage of features `fake` [M,d] against `real` [N,d].

    A point's radius is its distance to its k-th nearest neighbour within its own set; every comparison is strict.
    precision: share of fakes inside any real ball; recall: share of reals inside any fake ball; density: mean number of
    real balls that hold a fake, over k; coverage: share of reals whose own ball holds a fake.
    `block`: rows of distances held at a time (default: what suits the device). Memory beyond the features: a float64
    copy of them and a few blocks. Raises ValueError when a set has at most k points or the widths differ.
    """
    return {name: float(values[0]) for name, values in _prdc(real, fake, k, block, None).items()}


def prdc_replicates(
    real: Any, fake: Any, k: int, counts: np.ndarray, block: int | None = None
) -> dict[str, np.ndarray]:
    """The four ratios [B] for B sets that hold each row of `fake` counts [B,M] times; radii stay those of `fake`."""
    return _prdc(real, fake, k, block, counts)


def _prdc(real: Any, fake: Any, k: int, block: int | None, counts: np.ndarray | None) -> dict[str, np.ndarray]:
    real, fake = as_features(real), as_features(fake)
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"{k} nearest neighbours need more than {k} images a side, not {len(real)} and {len(fake)}")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"feature widths differ: {real.shape[1]} and {fake.shape[1]}")
    center = real.to(torch.float64).mean(dim=0)
    real, fake = _Points(real, center), _Points(fake, center)
    (n, width), m, device = real.given.shape, len(fake.given), real.given.device
    real_radii = _radii(real, k, block or block_rows(n, device))
    fake_radii = _radii(fake, k, block or block_rows(m, device))
    real_tolerance = _tolerance(real.norms, fake.norms, width)
    fake_tolerance = _tolerance(fake.norms, real.norms, width)

    counts = np.ones([1, m]) if counts is None else counts
    present = torch.as_tensor(counts > 0, device=device).to(torch.float32).T
    covered = torch.zeros(len(counts), dtype=torch.int64, device=device)
    recalled = torch.zeros_like(covered)
    held = torch.zeros(m, dtype=torch.int64, device=device)  # real balls that hold each fake
    rows = block or block_rows(m, device)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        distances = real.squared_distances(start, stop, fake)
        in_real = _inside(distances, real_radii[start:stop, None], real_tolerance[start:stop, None], start, real, fake)
        in_fake = _inside(distances, fake_radii[None, :], fake_tolerance[None, :], start, real, fake)
        held += in_real.sum(dim=0)
        # Is any fake of the set inside? Sums of float32 ones may round, but not to 0.
        covered += (torch.mm(in_real.to(torch.float32), present) > 0).sum(dim=0)
        recalled += (torch.mm(in_fake.to(torch.float32), present) > 0).sum(dim=0)
    held, covered, recalled = (x.cpu().numpy() for x in (held, covered, recalled))
    precise = (held > 0).astype(np.int64)
    return dict(
        precision=counts @ precise / m, recall=recalled / n, density=counts @ held / (k * m), coverage=covered / n
    )
