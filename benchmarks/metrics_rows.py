"""Time the trace term of FID against a general matrix root, and neighbors in blocks against N x N distances."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import scipy.linalg
import torch

from benchmarks.core import Row, compare
from benchmarks.roofline import count
from metrics.fid import trace_of_root
from metrics.prdc import prdc

__all__ = ["prdc_plain", "rows"]

SECONDS = 240


def prdc_plain(real: torch.Tensor, fake: torch.Tensor, k: int = 5) -> dict[str, float]:
    """Return precision, recall, density and coverage from whole distance matrices, as docs/metrics.md defines them."""
    near_real, near_fake = (torch.cdist(x, x).kthvalue(k + 1, dim=1).values for x in (real, fake))
    distances = torch.cdist(real, fake)
    inside = distances < near_real[:, None]
    return dict(
        precision=inside.any(dim=0).double().mean().item(),
        recall=(distances < near_fake[None]).any(dim=1).double().mean().item(),
        density=inside.sum(dim=0).double().mean().item() / k,
        coverage=(distances.min(dim=1).values < near_real).double().mean().item(),
    )


def rows(repeats: int, features: int = 2048, images: int = 8000, width: int = 256) -> Iterator[Row]:
    """Yield a row for FID with `features` features, and one for two sets of `images` images with `width` features."""
    rng = np.random.default_rng(0)
    scales = np.geomspace(1, 1e-2, features)
    s1, s2 = (np.cov(rng.standard_normal((5 * features // 2, features)) * scales, rowvar=False) for _ in range(2))

    def general() -> float:
        return np.trace(scipy.linalg.sqrtm(s1 @ s2)).real

    digits = -math.log10(abs(trace_of_root(s1, s2) / general() - 1) + 1e-16)
    t = compare(dict(ours=lambda: _drop(trace_of_root(s1, s2)), plain=lambda: _drop(general())), repeats, "trace")
    yield Row(
        f"trace of the root, {features} features; plain: scipy.linalg.sqrtm",
        t["ours"],
        t["plain"],
        note=f"the two agree to {digits:.0f} digits",
    )
    real, fake = (torch.from_numpy(rng.standard_normal((images, width), dtype=np.float32)) for _ in range(2))
    work = count(lambda: prdc(real, fake))
    forms = dict(ours=lambda: _drop(prdc(real, fake)), plain=lambda: _drop(prdc_plain(real, fake)))
    t = compare(forms, repeats, "prdc")
    yield Row(
        f"prdc, 2 x {images:,} images, {width} features; plain: N x N",
        t["ours"],
        t["plain"],
        work.flops,
        work.bytes,
        images=2 * images,
    )


def _drop(_value: object) -> None:
    """Return nothing, because `compare` would take a returned number for a time."""
