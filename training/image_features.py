"""Features of images that mean the same at every resolution: block means, contrast in a few bands, texture, color.

The robust transport cost and the search for foreign images compare images by them. They are differentiable.
"""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["block_means", "image_features"]

BLOCKS = 8  # the image is seen as 8x8 blocks
# Details that blocks of an image cut into 4x4, 8x8 and 16x16 parts do not show, down to the next band.
BANDS = (4, 8, 16)
TEXTURES = (8, 16)  # texture is that of the image at these sizes
DARK = 0.02  # contrast below which images count as equally flat
LEVELS, STEPS = 7, 5  # bins of gray levels from 0 to 1, and of differences of neighbors from 0 to STEEP or more
STEEP = 0.8


def block_means(images: torch.Tensor, blocks: int) -> torch.Tensor:
    """Return the means of `blocks` x `blocks` equal parts, [N,C,blocks,blocks], of images [N,C,H,W] of any size.

    A pixel that lies in two parts counts for both, by area. Images smaller than that repeat their pixels.
    """
    rows, columns = (_averages(size, blocks, images.device, images.dtype) for size in images.shape[2:])
    return rows @ images @ columns.T


@cache  # per device: in every step of a training, a copy to a GPU would wait for what the GPU has to do
def _averages(size: int, blocks: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix [blocks,size] whose products with a row of `size` pixels are its block means."""
    edges = torch.arange(blocks + 1, dtype=torch.float64)[:, None] * (size / blocks)
    inside = torch.minimum(edges[1:], torch.arange(1, size + 1)) - torch.maximum(edges[:-1], torch.arange(size))
    return (inside.clamp(min=0) * (blocks / size)).to(device, dtype)


def image_features(images: torch.Tensor) -> torch.Tensor:
    """Return features, float32 [N,d], of images [N,C,H,W] with values from -1 to 1.

    These are the 8x8 block means of the brightness; for each band that images of this size have, the logarithm of its
    contrast in 4x4 blocks; for color images means and strength of two color differences in 2x2 blocks; and the
    `texture` of the brightness.
    """
    x = (images + 1) / 2
    gray = x.mean(dim=1, keepdim=True)
    parts = [block_means(gray, BLOCKS)]
    for band in BANDS:
        if gray.shape[2] > band and gray.shape[3] > band:
            fine = block_means(gray, 2 * band) if min(gray.shape[2:]) > 2 * band else gray
            energy = block_means(fine.square(), band) - block_means(fine, band).square()
            parts.append(_log_contrast(block_means(energy, 4)))
    if x.shape[1] == 3:
        color = x[:, 0::2] - x[:, 1:2]
        parts += [block_means(color, 2), _log_contrast(block_means(color.square(), 2))]
    parts += [texture(block_means(gray, size)) for size in TEXTURES if size <= min(gray.shape[2:])]
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def _log_contrast(energy: torch.Tensor) -> torch.Tensor:
    return (energy.clamp(min=0) + DARK**2).log() / 2


def texture(gray: torch.Tensor) -> torch.Tensor:
    """Return what images [N,1,H,W] with values from 0 to 1 look like wherever it is, [N,33].

    For the eight patterns of a 3x3 cosine transform: the logarithm of their mean strength, and how unevenly it is
    spread. Then the square roots of the shares of gray levels, and of differences between neighbors in both directions.
    """
    padded = torch.nn.functional.pad(gray, (1, 1, 1, 1), mode="replicate")
    response = torch.nn.functional.conv2d(padded, _patterns(gray.device, gray.dtype))
    mean = response.abs().mean(dim=(2, 3)) + DARK / 2
    root = (response.square().mean(dim=(2, 3)) + DARK**2 / 4).sqrt()
    steps = [_shares((gray.diff(dim=dim).abs() / STEEP).clamp(max=1), STEPS) for dim in (3, 2)]
    return torch.cat([mean.log(), (root / mean).log(), _shares(gray, LEVELS), *steps], dim=1)


@cache
def _patterns(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the cosine patterns but the constant one, [8,1,3,3]."""
    waves = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
    waves = waves / waves.norm(dim=1, keepdim=True)
    return torch.einsum("ai,bj->abij", waves, waves).reshape(9, 1, 3, 3)[1:].to(device, dtype)


def _shares(values: torch.Tensor, bins: int) -> torch.Tensor:
    """Return the square roots of the shares of `values` [N,...] in triangular bins around 0, ..., 1, [N,bins]."""
    centers = torch.linspace(0, 1, bins, device=values.device)[:, None]
    distance = (values.flatten(1)[:, None] - centers).abs()
    return ((1 - (bins - 1) * distance).clamp(min=0).mean(dim=2) + 1e-3).sqrt()
