"""Find images that are equal or nearly equal, whatever their labels (docs/data.md, "Foreign images and duplicates")."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from archives.dataset import ImageDataset
from training.image_features import block_means

__all__ = ["NEAR", "Duplicates", "count_groups", "find_duplicates"]

NEAR = 0.08  # largest difference of near duplicates, relative to the contrast of the images
BLOCKS = 16  # images are compared by the means of this many blocks along each side
FLAT = 0.05  # contrast (standard deviation of values from 0 to 1) below which images count as equally flat
AXES = 10  # principal axes of the search; images that differ little differ little along these
NEIGHBORS = 8  # neighbors of an image that are compared with it; chains of neighbors connect larger groups
SAMPLE = 5000  # images that the axes come from
CHUNK = 2**22  # pixel values that are looked at at a time


@dataclass
class Duplicates:
    """Groups of images that are equal or nearly equal."""

    duplicate_of: np.ndarray  # int64 [N], the first image of the group; an image without duplicates names itself
    difference: np.ndarray  # float32 [N], from that image, relative to the contrast: 0 for equal ones
    exact: np.ndarray  # bool [N], whether all pixels equal those of an earlier image


def find_duplicates(dataset: ImageDataset, near: float = NEAR) -> Duplicates:
    """Return which images of a data set equal another one, or nearly. Mirrored copies have groups of their own.

    Images are near duplicates if the root mean square difference of their block means is at most `near` times their
    contrast. Copies of other quality or size are so; two similar drawings or clothes are not.
    """
    n = dataset.num_raw
    hashes: dict[bytes, int] = {}  # of 16 bytes, so that no image stays in memory
    same = np.empty(n, dtype=np.int64)  # the first image with the same pixels
    signatures = []
    step = max(CHUNK // math.prod(dataset.image_shape), 1)
    for start in range(0, n, step):
        images = dataset.images(np.arange(start, min(start + step, n))).numpy()
        first = [hashes.setdefault(_digest(image), start + i) for i, image in enumerate(images)]
        same[start : start + len(first)] = first
        signatures.append(_signatures(images[np.array(first) == start + np.arange(len(first))]))
    distinct = np.flatnonzero(same == np.arange(n))
    signature = np.concatenate(signatures)
    group = _groups(signature, near)
    row = np.empty(n, dtype=np.int64)  # the distinct image of each image
    row[distinct] = np.arange(len(distinct))
    row = row[same]
    difference = _difference(signature[row], signature[group[row]])
    copies = np.arange(len(dataset) // n) * n
    return Duplicates(
        (distinct[group[row]] + copies[:, None]).reshape(-1),
        np.tile(difference, len(copies)),
        np.tile(same != np.arange(n), len(copies)),
    )


def count_groups(labels: np.ndarray, duplicate_of: np.ndarray) -> tuple[int, int]:
    """Return how many groups have more than one image, and in how many of them the labels int64 [N] differ."""
    differs = labels != labels[duplicate_of]
    return int((np.bincount(duplicate_of) > 1).sum()), len(np.unique(duplicate_of[differs]))


def _digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()


def _signatures(images: np.ndarray) -> np.ndarray:
    """Return what uint8 images [N,C,H,W] are compared by, float32 [N,d]: block means in units of the contrast."""
    x = images.astype(np.float32) / 255
    means = block_means(torch.from_numpy(x), min(BLOCKS, *x.shape[2:])).flatten(1).numpy()
    return means / np.maximum(means.std(axis=1, keepdims=True), FLAT)


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the root mean square difference [N] of signatures [N,d]."""
    return np.sqrt(np.square(a - b).mean(axis=1))


def _groups(signature: np.ndarray, near: float) -> np.ndarray:
    """Return the first row of the group of each signature, int64 [n].

    Projections shrink distances, so a search along a few axes misses hardly any pair: only those with `NEIGHBORS`
    nearer images along these axes. The full signatures then decide.
    """
    n, d = signature.shape
    step = max(CHUNK // d, 1)
    center = signature.mean(axis=0)
    sample = signature[:: -(-n // SAMPLE)] - center
    _, axes = np.linalg.eigh(sample.T @ sample)
    points = (signature - center) @ axes[:, ::-1][:, :AXES]
    k = min(NEIGHBORS + 1, n)
    _, found = cKDTree(points).query(points, k=np.arange(1, k + 1), distance_upper_bound=near * np.sqrt(d) * 1.0001)
    rows, places = np.nonzero(found < n)
    pairs = np.sort(np.stack([rows, found[rows, places]]), axis=0)  # one of the two may not have the other in its list
    rows, others = np.unique(pairs[:, pairs[0] < pairs[1]], axis=1)
    alike = np.concatenate(
        [
            _difference(signature[rows[i : i + step]], signature[others[i : i + step]]) <= near
            for i in range(0, max(len(rows), 1), step)
        ]
    )
    edges = coo_matrix((np.ones(alike.sum()), (rows[alike], others[alike])), shape=(n, n))
    _, member = connected_components(edges, directed=False)
    _, first = np.unique(member, return_index=True)
    return first[member]
