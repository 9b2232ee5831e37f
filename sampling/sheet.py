"""The picture of samples that a training run writes beside each snapshot."""

from __future__ import annotations

import torch

from sampling.ddgan import ddgan_sampler, is_generator
from sampling.generation import generate_images
from sampling.grid import save_grid
from sampling.samplers import heun_sampler

__all__ = ["save_samples"]

ROWS, COLUMNS = 10, 8  # classes at most; images per class


@torch.no_grad()
def save_samples(net: torch.nn.Module, path: str) -> None:
    """Write images of a denoiser or generator `net` as one PNG: one row per class, or one row if there are no classes.

    The seeds are always the same. `net` is on its device and in eval mode.
    """
    rows = min(net.label_dim, ROWS) or 1
    classes = [c for c in range(rows) for _ in range(COLUMNS)] if net.label_dim else None
    sampler = ddgan_sampler if is_generator(net) else heun_sampler
    device = next(net.parameters()).device
    seeds = list(range(COLUMNS)) * rows
    batches = generate_images(net, seeds, class_idx=classes, device=device, batch=len(seeds), sampler=sampler)
    save_grid([image for _, images, _ in batches for image in images], path, columns=COLUMNS)
