"""MiFID: FID, made worse for images that are copies of real ones.

Bai et al. 2021, "On training sample memorization: lessons from benchmarking generative modeling with a large-scale
competition", sec. 3.2. The memorization distance is the mean over generated images of the smallest cosine distance
1 - |cos| to a real one. MiFID is FID over that distance where the distance is below a threshold, else FID.
"""

from __future__ import annotations

from typing import Any

import torch

from metrics.fid import fid_from_features
from metrics.prdc import as_features
from torch_utils.misc import block_rows

__all__ = ["THRESHOLD", "memorization_distance", "mifid"]

THRESHOLD = 0.1  # memorization distance from which on nothing counts as copied


def memorization_distance(real: Any, fake: Any) -> float:
    """Return the mean over features `fake` [M,d] of the smallest cosine distance to one of `real` [N,d], in [0,1].

    The distances are computed in blocks, in float64. A row of zeros is at distance 1 from everything.
    """

    def directions(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(x.to(torch.float64), dim=1)

    real, fake = as_features(real), as_features(fake)
    across, rows = directions(real).T, block_rows(len(real), real.device)
    nearest = [torch.mm(directions(part), across).abs().amax(dim=1) for part in fake.split(rows)]
    return float((1 - torch.cat(nearest)).clamp(min=0).mean())


def mifid(real: Any, fake: Any, fid: float | None = None) -> float:
    """Return MiFID of features `fake` [M,d] against `real` [N,d]. `fid` is their FID if it is known already.

    The distance is bounded below, so that copies alone give a large number and not infinity.
    """
    distance = memorization_distance(real, fake)
    fid = fid_from_features(real, fake) if fid is None else fid
    return fid if distance >= THRESHOLD else fid / max(distance, 1e-14)
