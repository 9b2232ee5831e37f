"""Features of images that mean the same at every resolution: block means, contrast in a few bands, and color."""

from __future__ import annotations

from functools import cache

import numpy as np

__all__ = ["block_means", "image_features"]

BLOCKS = 8  # the image is seen as 8x8 blocks
BANDS = (
    4,
    8,
    16,
)  # details that blocks of an image cut into 4x4, 8x8 and 16x16 parts do not show, down to the next band
DARK = 0.02  # contrast below which images count as equally flat


def block_means(images: np.ndarray, blocks: int) -> np.ndarray:
    """Return the means of `blocks` x `blocks` equal parts, [N,C,blocks,blocks], of images [N,C,H,W] of any size.

    A pixel that lies in two parts counts for both, by area. Images smaller than that repeat their pixels.
    """
    rows, columns = (_averages(size, blocks) for size in images.shape[2:])
    return rows @ (images @ columns.T)


@cache
def _averages(size: int, blocks: int) -> np.ndarray:
    """Return the matrix float32 [blocks,size] whose products with a row of `size` pixels are its block means."""
    edges = np.arange(blocks + 1)[:, None] * (size / blocks)
    inside = np.minimum(edges[1:], np.arange(1, size + 1)) - np.maximum(edges[:-1], np.arange(size))
    return (np.maximum(inside, 0) * (blocks / size)).astype(np.float32)


def image_features(images: np.ndarray) -> np.ndarray:
    """Return features, float32 [N,d], of images uint8 [N,C,H,W].

    These are the 8x8 block means of the brightness; for each band that images of this size have, the logarithm of its
    contrast in 4x4 blocks; and for color images means and strength of two color differences in 2x2 blocks.
    """
    x = images.astype(np.float32) / 255
    gray = x.mean(axis=1, keepdims=True)
    parts = [block_means(gray, BLOCKS)]
    for band in BANDS:
        if gray.shape[2] > band and gray.shape[3] > band:
            fine = block_means(gray, 2 * band) if min(gray.shape[2:]) > 2 * band else gray
            coarse = block_means(fine, band)
            energy = block_means(block_means(fine**2, band) - coarse**2, 4)
            parts.append(np.log(np.sqrt(np.maximum(energy, 0)) + DARK))
    if x.shape[1] == 3:
        color = x[:, [0, 2]] - x[:, [1]]
        parts += [block_means(color, 2), np.log(np.sqrt(block_means(color**2, 2)) + DARK)]
    return np.concatenate([part.reshape(len(x), -1) for part in parts], axis=1)
