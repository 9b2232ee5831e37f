"""SiMix: which images are similar, so that the discriminator trains on mixtures of them (docs/methods/sbdc.md)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from tqdm import tqdm

import dnnlib
from archives.dataset import ImageDataset, to_float
from training.noise_levels import LOWEST_SIGMA

__all__ = ["EMBEDDINGS", "nearest_partners"]

EMBEDDINGS = ("classifier", "clip", "pixels")
CLIP = ("ViT-B-32", "laion2b_s34b_b79k")  # architecture and weights, by open_clip's names
BATCH = 256


def nearest_partners(
    dataset: ImageDataset, embed: str, classifier: torch.nn.Module | None, device: torch.device, k: int = 2
) -> np.ndarray:
    """Return the `k` nearest neighbors of each item among the data set's images, int64 [N,k].

    A mirrored copy gets mirrored neighbors. `embed`: 'classifier' (penultimate features of `classifier` at the lowest
    sigma), 'clip' or 'pixels'. UserError: fewer than k + 1 images, or a package that is not installed.
    """
    if dataset.num_raw <= k:
        raise dnnlib.UserError(f"{dataset.path} has {dataset.num_raw} images; similar ones need at least {k + 1}")
    function = {
        "classifier": lambda: _classifier_embedding(classifier),
        "clip": lambda: _clip_embedding(device),
        "pixels": lambda: _pixel_embedding,
    }[embed]()
    parts = []
    with torch.no_grad():
        for part in tqdm(torch.arange(dataset.num_raw).split(BATCH), desc="SiMix embedding", leave=False, disable=None):
            images = to_float(dataset.images_on(device, part))
            parts.append(function(images).to(torch.float32).cpu())
    features = torch.cat(parts).numpy()
    # One more than needed: the nearest neighbor is the image itself, or a copy of it.
    found = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(features).kneighbors(return_distance=False)
    own = found == np.arange(len(found))[:, None]
    own[~own.any(axis=1), -1] = True  # many copies can hide the image itself: drop the farthest
    raw = found[~own].reshape(-1, k).astype(np.int64)
    return np.concatenate([raw + copy * dataset.num_raw for copy in range(len(dataset) // dataset.num_raw)])


def _classifier_embedding(classifier: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda images: classifier.features(images, torch.tensor(LOWEST_SIGMA, device=images.device))


def _pixel_embedding(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)


def _clip_embedding(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    try:
        import open_clip  # optional dependency
    except ImportError:
        raise dnnlib.UserError("CLIP features need the package open_clip: pip install open_clip_torch") from None
    model = open_clip.create_model(CLIP[0], pretrained=CLIP[1], device=device).eval()
    size = model.visual.image_size
    mean = torch.tensor(model.visual.image_mean, device=device).reshape(-1, 1, 1)
    std = torch.tensor(model.visual.image_std, device=device).reshape(-1, 1, 1)

    def embed(images: torch.Tensor) -> torch.Tensor:
        images = images.expand(-1, 3, -1, -1) / 2 + 0.5
        images = torch.nn.functional.interpolate(images, size, mode="bicubic", antialias=True)
        return model.encode_image((images - mean) / std, normalize=True)

    return embed
