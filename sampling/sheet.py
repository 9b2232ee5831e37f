"""The picture of samples that a training run writes beside each snapshot."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sampling.ddgan import ddgan_sampler, is_generator
from sampling.generation import generate_images
from sampling.grid import save_class_grid
from sampling.samplers import heun_sampler

__all__ = ["save_samples"]

IMAGES, COLUMNS, ROWS = 80, 40, 8  # at most; one column per class


@torch.no_grad()
def save_samples(net: torch.nn.Module, path: str, class_names: Sequence[str] | None = None) -> None:
    """Write images of a denoiser or generator `net` as one PNG: one column per class under its name, for the first 40.

    Without classes it is one row. The seeds are always the same. `net` is on its device and in eval mode.
    """
    columns = min(net.label_dim, COLUMNS)
    seeds = range(min(ROWS, IMAGES // max(columns, 1)))
    pairs = [(seed, c) for seed in seeds for c in range(columns)] or [(seed, None) for seed in seeds]
    classes = [c for _, c in pairs] if columns else None
    sampler = ddgan_sampler if is_generator(net) else heun_sampler
    device = next(net.parameters()).device
    batches = generate_images(
        net, [seed for seed, _ in pairs], class_idx=classes, device=device, batch=len(pairs), sampler=sampler
    )
    save_class_grid([image for _, images, _ in batches for image in images], path, classes, class_names)
