"""Images -> features: where images come from, what turns them into features, one pass on all processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

import dnnlib
import training.resnet  # noqa: F401  (registers the classifier, so that its snapshots can be built)
from metrics.statistics import RunningStatistics
from torch_utils import distributed, safe_files
from torch_utils.persistence import find_snapshot, load_snapshot
from training.archive_reader import ordered_map, plain_labels
from training.dataset import ImageDataset
from training.noise_levels import LOWEST_SIGMA

__all__ = ["DETECTORS", "ClassifierDetector", "Detector", "Features", "ImageSource", "NpzImages", "PixelDetector",
           "compute_features", "compute_statistics", "describe_shape", "detector", "feature_width", "open_images"]

DETECTORS = "'pixels' or a classifier snapshot of train_classifier.py (file, URL or run directory)"
WORKERS = min(4, os.cpu_count() or 1)  # threads that decode ahead of the detector


class ImageSource(Protocol):
    """What metrics need of a set of images; `training.dataset.ImageDataset` is one."""

    path: str
    image_shape: tuple[int, int, int]       # channels, height, width
    label_dim: int
    labels: np.ndarray | None               # int64 [N]
    clean_labels: np.ndarray | None
    class_names: list[str] | None
    outliers: np.ndarray | None             # bool [N]: put in from another source; None without a record

    def __len__(self) -> int: ...

    def images(self, indices: Any) -> torch.Tensor:
        """uint8 [B,C,H,W] on the CPU."""


class NpzImages:
    """Images of an `.npz`: `arr_0` [N,H,W,C] uint8 and, if present, `arr_1` labels [N]. UserError for anything else."""

    def __init__(self, path: str, max_size: int | None = None, seed: int = 0):
        self.path = path
        arrays = safe_files.read_npz(path, "expected arr_0, images [N,H,W,C] uint8")
        images, labels = arrays.get("arr_0"), arrays.get("arr_1")
        if images is None or images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in (1, 3):
            found = f"holds {', '.join(arrays)}" if images is None else f"arr_0 is {images.dtype} {list(images.shape)}"
            raise dnnlib.UserError(f"{path}: {found}; expected arr_0, images [N,H,W,C] uint8, C = 1 or 3")
        if labels is not None:
            if labels.shape != images.shape[:1]:
                raise dnnlib.UserError(f"{path}: arr_1 is {list(labels.shape)}, expected {len(images)} labels")
            labels = plain_labels(labels.tolist(), f"{path}: arr_1")
        chosen = np.arange(len(images))
        if max_size is not None and max_size < len(images):
            chosen = np.sort(np.random.default_rng(seed).permutation(len(images))[:max_size])
        self._images, self._chosen = images, chosen
        self.image_shape = (images.shape[3], *images.shape[1:3])
        self.labels = labels if labels is None else labels[chosen]
        self.clean_labels = self.class_names = self.outliers = None
        self.label_dim = int(labels.max()) + 1 if labels is not None and len(labels) else 0

    def __len__(self) -> int:
        return len(self._chosen)

    def images(self, indices: Any) -> torch.Tensor:
        """uint8 [B,C,H,W] on the CPU."""
        return torch.from_numpy(self._images[self._chosen[indices]].transpose(0, 3, 1, 2).copy())


def open_images(path: str, num: int | None = None, seed: int = 0, option: str = "--images") -> ImageSource:
    """A folder, ZIP archive or `.npz` as a source of `num` images chosen by `seed` (None: all, at least 2).

    Raises UserError, naming the option, when there are fewer.
    """
    if path.endswith(".npz"):
        source: ImageSource = NpzImages(path, max_size=num, seed=seed)
    else:
        source = ImageDataset(path, max_size=num, seed=seed, square=False)
    if len(source) < (num or 2):
        asked = f"--num asks for {num}" if num else "metrics need at least 2"
        raise dnnlib.UserError(f"{option}: found {len(source)} images in {path}, {asked}")
    return source


class Detector(Protocol):
    """Turns images into features; `detector` makes one from its name."""

    name: str

    def check(self, source: ImageSource) -> None:
        """UserError when it cannot take these images."""

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """uint8 [N,C,H,W] on its device -> (features [N,d] float32, logits [N,C] or None)."""


class PixelDetector:
    """The pixels themselves, scaled to [-1,1] and flattened: tiny images and tests. It has no class probabilities."""

    name = "pixels"

    def check(self, source: ImageSource) -> None:
        """Takes every image."""

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        return images.flatten(1).to(torch.float32) / 127.5 - 1, None


class ClassifierDetector:
    """Penultimate features and logits of a noise-level-conditional classifier of ours at the lowest noise level."""

    def __init__(self, net: torch.nn.Module, name: str, device: torch.device | str):
        self.net, self.name, self.label_dim = net.to(device).eval(), name, net.label_dim

    def check(self, source: ImageSource) -> None:
        """UserError unless the images have the resolution and channels of the classifier."""
        wanted = (self.net.img_channels, self.net.img_resolution, self.net.img_resolution)
        if tuple(source.image_shape) != wanted:
            raise dnnlib.UserError(f"{self.name}: the classifier takes {describe_shape(wanted)} images, "
                                   f"{source.path} has {describe_shape(source.image_shape)}")

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = images.to(torch.float32) / 127.5 - 1
        features = self.net.features(x, torch.full([len(x)], LOWEST_SIGMA, device=x.device))
        return features.to(torch.float32), self.net.head(features).to(torch.float32)


def describe_shape(shape: tuple[int, int, int]) -> str:
    """(1, 8, 8) -> '8x8 grey'."""
    channels, height, width = shape
    return f"{width}x{height} {'grey' if channels == 1 else 'RGB' if channels == 3 else f'{channels}-channel'}"


def detector(name: str, device: torch.device | str, option: str = "--detector") -> Detector:
    """The detector called `name`: 'pixels', or a classifier snapshot. Raises UserError for what is neither."""
    if name == PixelDetector.name:
        return PixelDetector()
    if not (dnnlib.is_url(name) or os.path.exists(name) or any(c in name for c in "*?[")):
        raise dnnlib.UserError(f"{option}: no detector or file {name!r}; choose {DETECTORS}")
    path = find_snapshot(name)
    return ClassifierDetector(load_snapshot(path, kind="classifier")["ema"], str(path), device)


@dataclass(frozen=True)
class Features:
    """What metrics are computed from; on every process the whole of it."""

    features: torch.Tensor              # [N,d] float32 on the CPU
    probs: torch.Tensor | None          # [N,C] class probabilities of the detector, when it has any
    judged: np.ndarray | None           # [N] classes the judge sees, when there was one


def _batches(source: ImageSource, extractor: Detector, batch: int, device: torch.device | str,
             text: str) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """This process's batches: (indices, uint8 images on the device), with a progress bar on rank 0.

    Batches go round the processes, so that each holds the images it would hold on one process: the same numbers.
    """
    extractor.check(source)
    starts = range(0, len(source), batch)[distributed.get_rank()::distributed.get_world_size()]
    mine = [np.arange(start, min(start + batch, len(source))) for start in starts]
    show = None if distributed.get_rank() == 0 else True  # None: on a terminal only
    with tqdm(total=sum(map(len, mine)), desc=text, unit="img", disable=show, leave=False) as bar:
        for indices, images in zip(mine, ordered_map(source.images, mine, WORKERS), strict=True):
            yield indices, images.to(device)
            bar.update(len(indices))


def _finite(features: torch.Tensor, extractor: Detector, source: ImageSource) -> torch.Tensor:
    if not features.isfinite().all():
        raise dnnlib.UserError(f"{extractor.name}: gives features that are not finite for images of {source.path}")
    return features


def compute_features(source: ImageSource, extractor: Detector, batch: int, device: torch.device | str,
                     judge: ClassifierDetector | None = None, text: str = "features") -> Features:
    """One pass over the images: features, class probabilities and the judge's classes, in the order of the source.

    Every process computes its share and receives the whole. Raises UserError for images that cannot be used.
    """
    def work() -> dict[str, np.ndarray]:
        if judge is not None:
            judge.check(source)
        parts: dict[str, list[np.ndarray]] = {}
        for indices, images in _batches(source, extractor, batch, device, text):
            features, logits = extractor(images)
            found = dict(index=indices, features=_finite(features, extractor, source).cpu().numpy())
            if logits is not None:
                found["probs"] = logits.softmax(dim=1).cpu().numpy()
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
    return Features(torch.from_numpy(whole["features"]), None if probs is None else torch.from_numpy(probs),
                    whole.get("judged"))


def feature_width(source: ImageSource, extractor: Detector, device: torch.device | str) -> int:
    """Number of features that the detector gives for images of this source; looks at the first one."""
    extractor.check(source)
    return extractor(source.images(np.arange(1)).to(device))[0].shape[1]


def compute_statistics(source: ImageSource, extractor: Detector, batch: int, device: torch.device | str,
                       text: str = "features") -> tuple[int, np.ndarray, np.ndarray]:
    """(N, mean [d], unbiased covariance [d,d]) of the features of all images, in one pass that keeps no features.

    Raises UserError for images that cannot be used.
    """
    def work() -> RunningStatistics:
        statistics = RunningStatistics(feature_width(source, extractor, device), device)
        for _indices, images in _batches(source, extractor, batch, device, text):
            statistics.add(_finite(extractor(images)[0], extractor, source))
        return statistics

    return distributed.together(work).reduce()
