"""Precision, recall, density and coverage (PRDC) from nearest neighbors, in bounded memory.

Kynkaanniemi et al. 2019, "Improved precision and recall metric"; Naeem et al. 2020, "Reliable fidelity and diversity
metrics", eqs. 1-5.

Precision and recall count a point on the surface of a ball as inside (Kynkaanniemi et al., eq. 1). Density and coverage
do not, as in the published package `prdc`.

The distances are computed in blocks of rows, as |x|^2 + |y|^2 - 2 x.y in float64 with the mean removed. This form has
rounding errors, and real data has ties: copies of an image, identical sets. So every comparison that a rounding error
could change is repeated with the exact sum of squared differences. The counts are then exact, and depend neither on the
block size nor on the order of the images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from metrics.memo import Memo
from torch_utils.misc import block_rows

__all__ = ["as_features", "prdc"]

PAIR_CHUNK = 4096  # pairs compared at a time
SPARE = 2  # candidates beyond the k-th neighbor, so that few rows need a second search


def as_features(x: Any) -> torch.Tensor:
    """Return a NumPy array or tensor [N,d] as a tensor on a device that has float64, without a copy if possible."""
    if not torch.is_tensor(x):
        x = torch.from_numpy(np.require(x, requirements=["C", "W"]))
    return x.cpu() if x.device.type == "mps" else x


class _Points:
    """A set of features: `given` as they are, `centered` in float64, and the squared `norms` of the centered ones."""

    def __init__(self, given: torch.Tensor, center: torch.Tensor):
        self.given = given
        self.centered = given.to(torch.float64, copy=True).sub_(center)
        self.norms = torch.linalg.vector_norm(self.centered, dim=1).square_()

    def squared_distances(self, start: int, stop: int, other: _Points) -> torch.Tensor:
        """Return squared distances [stop-start,M] of these points start..stop to all `other` ones, with rounding."""
        block = torch.addmm(other.norms, self.centered[start:stop], other.centered.T, alpha=-2)
        return block.add_(self.norms[start:stop, None])

    def pair_distances(self, i: torch.Tensor, other: _Points, j: torch.Tensor) -> torch.Tensor:
        """Return squared distances [P] of these points i to the other points j, from exact differences.

        The distance of a pair does not depend on the other pairs in the call.
        """
        out = torch.empty(len(i), dtype=torch.float64, device=i.device)
        # Every chunk has the same shape, since the order of summation may depend on it. Wide rows make small chunks,
        # which bounds the memory.
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
    # Twice the bound on the rounding error of |x|^2 + |y|^2 - 2 x.y (Higham 2002, section 3.1), for safety.
    return (norms + other_norms.max()) * (4 * (width + 4) * torch.finfo(torch.float64).eps)


def _radii(points: _Points, k: int, rows: int) -> torch.Tensor:
    """Return the squared distance [N] of each point to its k-th nearest neighbor.

    This is the (k+1)-th smallest distance, because each point is also at distance 0 from itself.
    """
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
        # If rounding may have kept a nearer point out of the candidates, every point that may be as near becomes one.
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a boolean block: is the distance below the radius? Then rows and columns where the two are equal.

    `radii` and `tolerance` broadcast to the block: [rows,1] or [1,columns].
    """
    inside = block < radii - tolerance
    i, j = (block <= radii + tolerance).logical_xor_(inside).nonzero(as_tuple=True)
    exact, radius = real.pair_distances(start + i, fake, j), radii.expand_as(block)[i, j]
    inside[i, j] = exact < radius
    return inside, i[exact == radius], j[exact == radius]


def prdc(
    real: Any,
    fake: Any,
    k: int = 5,
    counts: np.ndarray | None = None,
    *,
    block: int | None = None,
    memo: Memo | None = None,
) -> dict[str, Any]:
    """Return precision, recall, density and coverage of features `fake` [M,d] against `real` [N,d], as floats.

    Each point has a ball that reaches to its k-th nearest neighbor in its own set.

    precision  share of fakes that are inside any real ball, or on its surface
    recall     share of reals that are inside any fake ball, or on its surface
    density    number of real balls around a fake, over k; the mean over all fakes. A surface does not count
    coverage   share of reals whose own ball has a fake inside. A surface does not count

    With `counts` [B,M], return values [B] of B resampled sets; set b holds row m of `fake` `counts[b,m]` times. The
    radii stay those of the whole set `fake`, since k copies of a point would shrink its ball to nothing.

    `block` is the number of rows of distances held at a time (by default what suits the device). Beyond the features,
    this takes memory for a float64 copy of them and a few blocks. `memo` keeps the radii of `real`. Raise ValueError if
    a set has at most k points, or if the two have different numbers of features.
    """
    real, fake = as_features(real), as_features(fake)
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"{k} nearest neighbors need more than {k} images on each side, not {len(real)} and {len(fake)}"
        )
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"feature widths differ: {real.shape[1]} and {fake.shape[1]}")
    center = real.to(torch.float64).mean(dim=0)
    real, fake = _Points(real, center), _Points(fake, center)
    (n, width), m, device = real.given.shape, len(fake.given), real.given.device
    memo = memo or Memo()
    real_radii = memo.get(f"radii_k{k}", lambda: _radii(real, k, block or block_rows(n, device)))
    fake_radii = _radii(fake, k, block or block_rows(m, device))
    real_tolerance = _tolerance(real.norms, fake.norms, width)
    fake_tolerance = _tolerance(fake.norms, real.norms, width)

    taken = np.ones([1, m]) if counts is None else counts
    present = torch.as_tensor(taken > 0, device=device).to(torch.float32).T
    covered = torch.zeros(len(taken), dtype=torch.int64, device=device)
    recalled = torch.zeros_like(covered)
    held = torch.zeros(m, dtype=torch.int64, device=device)  # number of real balls around each fake
    touched = torch.zeros(m, dtype=torch.bool, device=device)  # is the fake on the surface of a real ball?
    rows = block or block_rows(m, device)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        distances = real.squared_distances(start, stop, fake)
        in_real, _, columns = _inside(
            distances, real_radii[start:stop, None], real_tolerance[start:stop, None], start, real, fake
        )
        touched[columns] = True
        in_fake, *surface = _inside(distances, fake_radii[None, :], fake_tolerance[None, :], start, real, fake)
        in_fake[tuple(surface)] = True
        held += in_real.sum(dim=0)
        # Is any fake of the set inside? A sum of float32 ones may be rounded, but never to 0.
        covered += (torch.mm(in_real.to(torch.float32), present) > 0).sum(dim=0)
        recalled += (torch.mm(in_fake.to(torch.float32), present) > 0).sum(dim=0)
    precise = (touched | (held > 0)).to(torch.int64)
    held, covered, recalled, precise = (x.cpu().numpy() for x in (held, covered, recalled, precise))
    values = dict(
        precision=taken @ precise / m, recall=recalled / n, density=taken @ held / (k * m), coverage=covered / n
    )
    return {name: float(value[0]) for name, value in values.items()} if counts is None else values
