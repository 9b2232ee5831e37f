"""Turn images into features, in one pass that all processes share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

import dnnlib
from archives.workers import ordered_map
from dnnlib.threads import usable_cores
from metrics.detectors import ClassifierDetector, Detector
from metrics.images import ImageSource
from metrics.reference import RunningStatistics
from torch_utils import distributed

__all__ = ["Features", "compute_features", "compute_statistics", "feature_width"]

WORKERS = min(4, usable_cores())  # threads that decode the next images while the detector runs


@dataclass(frozen=True)
class Features:
    """What the metrics are computed from. Every process has the features of all images."""

    features: torch.Tensor  # [N,d] float32 on the CPU
    probs: torch.Tensor | None  # [N,C] class probabilities by the detector; None: it gives none
    judged: np.ndarray | None  # [N] classes by the judge; None: there was no judge


def _batches(
    source: ImageSource, extractor: Detector, batch: int, device: torch.device | str, text: str
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Yield the batches of this process as (indices, uint8 images on the device). Rank 0 shows a progress bar.

    The processes take turns with the batches. So each batch holds the same images as on a single process, which keeps
    the numbers the same.
    """
    extractor.check(source)
    starts = range(0, len(source), batch)[distributed.get_rank() :: distributed.get_world_size()]
    mine = [np.arange(start, min(start + batch, len(source))) for start in starts]
    with distributed.progress_bar(total=sum(map(len, mine)), desc=text, unit="img") as bar:
        for indices, images in zip(mine, ordered_map(source.images, mine, WORKERS), strict=True):
            yield indices, images.to(device)
            bar.update(len(indices))


def _finite(features: torch.Tensor, extractor: Detector, source: ImageSource) -> torch.Tensor:
    if not features.isfinite().all():
        raise dnnlib.UserError(f"{extractor.name}: gives features that are not finite for images of {source.path}")
    return features


def compute_features(
    source: ImageSource,
    extractor: Detector,
    batch: int,
    device: torch.device | str,
    judge: ClassifierDetector | None = None,
    text: str = "features",
) -> Features:
    """Return features, class probabilities and the judge's classes of all images, in the order of the source.

    Every process computes its share and receives the whole. `text` names the images in the progress bar. Raise
    UserError for images that cannot be used.
    """

    def work() -> dict[str, np.ndarray]:
        if judge is not None:
            judge.check(source)
        parts: dict[str, list[np.ndarray]] = {}
        for indices, images in _batches(source, extractor, batch, device, text):
            features, probs = extractor(images)
            found = dict(index=indices, features=_finite(features, extractor, source).cpu().numpy())
            if probs is not None:
                found["probs"] = probs.cpu().numpy()
            if judge is not None:
                found["judged"] = judge(images)[1].argmax(dim=1).cpu().numpy()
            for key, value in found.items():
                parts.setdefault(key, []).append(value)
        return {key: np.concatenate(values) for key, values in parts.items()}

    shares = [share for share in distributed.all_gather_object(distributed.together(work)) if share]
    order = np.argsort(np.concatenate([share.pop("index") for share in shares]))
    whole = {}
    for key in list(shares[0]):
        whole[key] = np.concatenate([share.pop(key) for share in shares])[order]
    probs = whole.get("probs")
    return Features(
        torch.from_numpy(whole["features"]), None if probs is None else torch.from_numpy(probs), whole.get("judged")
    )


def feature_width(source: ImageSource, extractor: Detector, device: torch.device | str) -> int:
    """Return the number of features that the detector gives for an image of this source. Only the first is read."""
    extractor.check(source)
    return extractor(source.images(np.arange(1)).to(device), probs=False)[0].shape[1]


def compute_statistics(
    source: ImageSource, extractor: Detector, batch: int, device: torch.device | str, text: str = "features"
) -> tuple[int, np.ndarray, np.ndarray]:
    """Return N, the mean [d] and the unbiased covariance [d,d] of the features of all N images.

    The features themselves are not kept. Raise UserError for images that cannot be used.
    """

    def work() -> RunningStatistics:
        statistics = RunningStatistics(feature_width(source, extractor, device), device)
        for _indices, images in _batches(source, extractor, batch, device, text):
            statistics.add(_finite(extractor(images, probs=False)[0], extractor, source))
        return statistics

    return distributed.together(work).reduce()
