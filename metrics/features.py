"""Turn images into features, in one pass that all processes share."""

from __future__ import annotations

import itertools
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
ROUND = 2048  # images of each process after which rank 0 receives their features


@dataclass(frozen=True)
class Features:
    """What the metrics are computed from: the features of all images. Rank 0 alone has them."""

    features: torch.Tensor  # [N,d] float32 on the CPU
    probs: torch.Tensor | None  # [N,C] class probabilities by the detector; None: it gives none
    judged: np.ndarray | None  # [N] classes by the judge; None: there was no judge
    spatial: torch.Tensor | None = None  # [N,s] spatial features, for sFID; None: the detector gives none


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
    workers = getattr(source, "workers", WORKERS)  # some sets need one thread
    with distributed.progress_bar(total=sum(map(len, mine)), desc=text, unit="img") as bar:
        for indices, images in zip(mine, ordered_map(source.images, mine, workers), strict=True):
            yield indices, images.to(device)
            bar.update(len(indices))


def _finite(features: torch.Tensor, extractor: Detector, source: ImageSource) -> torch.Tensor:
    if not features.isfinite().all():
        raise dnnlib.UserError(f"{extractor.name}: gives features that are not finite for images of {source.path}")
    return features


def _run(
    extractor: Detector, images: torch.Tensor, probs: bool = True, spatial: bool = True
) -> dict[str, torch.Tensor | None]:
    """Return `features`, `probs` and `spatial` features of a batch; None for what is not asked for or not there."""
    detect = (spatial and getattr(extractor, "with_spatial", None)) or extractor
    features, probs, *more = detect(images, probs)
    return dict(features=features, probs=probs, spatial=more[0] if more else None)


def compute_features(
    source: ImageSource,
    extractor: Detector,
    batch: int,
    device: torch.device | str,
    judge: ClassifierDetector | None = None,
    text: str = "features",
) -> Features | None:
    """Return features, class probabilities and the judge's classes of all images, in the order of the source.

    Every process computes a share. Rank 0 receives the whole, the others return None: they send their batches to rank 0
    after each round, so that beside the whole no process holds more than a round. `text` names the images in the
    progress bar. Raise UserError for images that cannot be used.
    """

    def work() -> Iterator[dict[str, torch.Tensor]]:
        if judge is not None:
            judge.check(source)
        for _indices, images in _batches(source, extractor, batch, device, text):
            found = _run(extractor, images)
            _finite(found["features"], extractor, source)
            found["judged"] = None if judge is None else judge(images)[1].argmax(dim=1)
            yield {key: value.cpu().contiguous() for key, value in found.items() if value is not None}

    rank, processes = distributed.get_rank(), distributed.get_world_size()
    starts, per_round = range(0, len(source), batch), processes * max(ROUND // batch, 1)
    mine, whole = work(), {}
    for first in range(0, len(starts), per_round):
        turns = starts[first : first + per_round]
        count = len(turns[rank::processes])
        found = distributed.together(lambda count=count: list(itertools.islice(mine, count)))
        if rank != 0:
            for value in itertools.chain.from_iterable(parts.values() for parts in found):
                distributed.to_rank0(value, rank)
            continue
        for turn, start in enumerate(turns):
            owner = turn % processes
            for key, value in found[turn // processes if owner == 0 else 0].items():
                if key not in whole:
                    whole[key] = value.new_empty([len(source), *value.shape[1:]])
                rows = whole[key][start : start + batch]
                if owner == 0:
                    rows.copy_(value)
                else:
                    distributed.to_rank0(rows, owner)
    if rank != 0:
        return None
    judged = whole["judged"].numpy() if "judged" in whole else None
    return Features(whole["features"], whole.get("probs"), judged, whole.get("spatial"))


def feature_width(source: ImageSource, extractor: Detector, device: torch.device | str) -> int:
    """Return the number of features that the detector gives for an image of this source. Only the first is read."""
    extractor.check(source)
    return extractor(source.images(np.arange(1)).to(device), probs=False)[0].shape[1]


def compute_statistics(
    source: ImageSource,
    extractor: Detector,
    batch: int,
    device: torch.device | str,
    text: str = "features",
    spatial: bool = False,
) -> tuple:
    """Return N, the mean [d] and the unbiased covariance [d,d] of the features of all N images.

    With `spatial`, those of the spatial features follow: [s] and [s,s], or None twice if the detector gives none. The
    features themselves are not kept. Raise UserError for images that cannot be used.
    """

    def work() -> dict[str, RunningStatistics]:
        extractor.check(source)
        # The first image tells the widths: a process may have no batch, but takes part in the sums.
        first = _run(extractor, source.images(np.arange(1)).to(device), probs=False, spatial=spatial)
        statistics = {
            name: RunningStatistics(first[name].shape[1], device)
            for name in ("features", "spatial")
            if first[name] is not None
        }
        for _indices, images in _batches(source, extractor, batch, device, text):
            found = _run(extractor, images, probs=False, spatial=spatial)
            _finite(found["features"], extractor, source)
            for name, running in statistics.items():
                running.add(found[name])
        return statistics

    found = distributed.together(work)
    count, mu, sigma = found["features"].reduce()
    if not spatial:
        return count, mu, sigma
    return count, mu, sigma, *(found["spatial"].reduce()[1:] if "spatial" in found else (None, None))
