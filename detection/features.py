"""Features of networks that others have trained (CLIP, DINO, SimCLR), and wrong labels found by them.

A linear classifier on features that never saw a label learns wrong labels less easily than a network that trains from
the pixels on. It learns with the robust loss of `detection.gce` and ends in the same rule of Bayes. Features that know
what images show also help to tell foreign images (`detection.outliers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

import dnnlib
from archives.dataset import ImageDataset, to_float
from archives.label_file import LabelFile
from archives.workers import ordered_map
from detection.bayes import judge
from detection.gce import PATIENCE, PROGRESS, held_out_likelihood, robust_loss
from detection.quality import label_file
from detection.trainer import Settings
from metrics.detectors import load_detector
from torch_utils import distributed, misc
from training.objectives.simix import clip_embedding

__all__ = ["FEATURES", "detect", "load_features"]

DINO = "fidelity:dinov2-vit-b-14"
FEATURES = (
    "clip (package open_clip_torch), dino (package torch-fidelity), or what fid.py --detector takes: "
    "fidelity:NAME, a TorchScript file such as an encoder of SimCLR, or a classifier snapshot"
)
BATCH = 256  # images at a time
FOLDS = 5  # classifiers
ROUND = 5_000  # images that are seen between two decisions, and at least one epoch
EPOCHS, IMAGES = 12, 100_000  # how long training takes at most: the longer of the two
LR, DECAY = 3e-3, 1e-2  # of AdamW


def load_features(name: str, dataset: ImageDataset, device: torch.device) -> np.ndarray | None:
    """Return the features of all images, float32 [N,d], on rank 0, by the network called `name`; None elsewhere.

    Collective; every process computes a share. UserError: there is no such network, a package or its weights are
    missing, the images do not suit it, or it returns values that are not finite.
    """
    embed = distributed.together(lambda: _embedding(name, dataset, device), rank0_first=True)

    @torch.no_grad()
    def compute() -> torch.Tensor:
        mine, parts = torch.tensor(distributed.share(len(dataset)), dtype=torch.int64), []
        with distributed.progress_bar(total=len(mine), desc="Features", unit="img") as bar:
            for images in ordered_map(lambda part: dataset.images_on(device, part), mine.split(BATCH), workers=2):
                parts.append(embed(images).to(torch.float32))
                bar.update(len(images))
        found = torch.cat(parts) if parts else torch.empty([0, 1], device=device)
        if not found.isfinite().all():
            raise dnnlib.UserError(f"{name}: its features hold values that are not finite")
        return found

    own = distributed.together(compute)
    table = distributed.rows_to_rank0(own, len(dataset))
    return None if table is None else table.cpu().numpy()


def _embedding(name: str, dataset: ImageDataset, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from images uint8 [n,C,H,W] to features [n,d]."""
    if name == "clip":
        clip = clip_embedding(device)
        return lambda images: clip(to_float(images))
    detector = load_detector(DINO if name == "dino" else name, device)
    detector.check(dataset)
    return lambda images: detector(images, probs=False)[0]


def detect(dataset: ImageDataset, features: np.ndarray | None, device: torch.device, settings: Settings) -> LabelFile:
    """Return the label file that linear classifiers of the features [N,d] lead to. Rank 0 has the features.

    Each of five classifiers judges the fifth of the images that it has not seen: with many features and few images, it
    knows the labels of the others by heart. Without `settings.epochs`, training stops as in `detection.gce`, by the
    labels of that fifth. Collective.
    """
    return distributed.from_rank0(
        lambda: label_file(dataset, judge(log_posterior(dataset, features, device, settings), dataset.labels))
    )


def log_posterior(dataset: ImageDataset, features: np.ndarray, device: torch.device, settings: Settings) -> np.ndarray:
    """Return the log-posterior of the classes, float32 [N,C], by classifiers that have not seen the image."""
    n, rng = len(dataset), np.random.default_rng([settings.seed, 2])
    x = torch.from_numpy((features - features.mean(axis=0)) / np.maximum(features.std(axis=0), 1e-6))
    result = np.empty([n, dataset.label_dim], np.float32)
    folds = np.array_split(rng.permutation(n), min(FOLDS, n))
    with distributed.progress_bar(total=len(folds), desc="Linear classifiers") as bar:
        for fold in folds:
            items = np.setdiff1d(np.arange(n), fold)
            result[fold] = _out_of_fold(x, dataset.labels, dataset.label_dim, items, fold, device, settings, rng)
            bar.update()
    return result


def _out_of_fold(
    x: torch.Tensor,
    labels: np.ndarray,
    classes: int,
    items: np.ndarray,
    fold: np.ndarray,
    device: torch.device,
    settings: Settings,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return the log-posterior [n,classes] of the images `fold` by a classifier that trains on the images `items`."""
    head = torch.nn.Linear(x.shape[1], classes, device=device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR, weight_decay=DECAY)
    targets = torch.from_numpy(labels)
    epochs, per_round = settings.epochs, 1
    if epochs is None:
        epochs, per_round = max(EPOCHS, math.ceil(IMAGES / len(items))), math.ceil(ROUND / len(items))
    best, found, since = -math.inf, None, 0
    for epoch in range(epochs):
        for part in torch.from_numpy(rng.permutation(items)).split(settings.batch):
            log_probs = torch.log_softmax(head(misc.to_device(x[part], device)), dim=1)
            loss = robust_loss(log_probs, misc.to_device(targets[part], device)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if (epoch + 1) % per_round and epoch + 1 < epochs:
            continue
        with torch.no_grad():
            parts = [head(x[part].to(device)).cpu() for part in torch.from_numpy(fold).split(4096)]
        log_probs = torch.log_softmax(torch.cat(parts), dim=1)
        value, since = held_out_likelihood(log_probs, labels[fold]), since + 1
        if found is None or settings.epochs is not None or value > best + PROGRESS:
            best, found, since = value, log_probs, 0
        if since >= PATIENCE:
            break
    return found.numpy()
