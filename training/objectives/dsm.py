"""Denoising score matching: the baseline, which takes every label at its word (docs/methods/edm.md, Objectives).

E lambda(sigma) ||D(y + n; sigma, c) - y||^2,    n ~ N(0, sigma^2 I)      (Karras et al. 2022, Eq. 2)
"""

from __future__ import annotations

import torch

from torch_utils.training_stats import Stats
from training.objective import Objective
from training.presets import precond_class
from training.trained_network import TrainedNetwork

__all__ = ["DSM"]


class DSM(Objective):
    """Denoising score matching on the labels as they are."""

    method = "dsm"

    def loss(self, images: torch.Tensor, labels: torch.Tensor, draws: dict, stats: Stats) -> torch.Tensor:
        """Compute lambda(sigma) (D(y + n; sigma, c) - y)^2, [n,C,H,W]."""
        y, augment_labels = self.prepare(images, draws)
        sigma = draws["sigma"].reshape(-1, 1, 1, 1)
        x = y + sigma * draws["noise"]
        denoised = self.trained["net"].forward(x, sigma, labels, augment_labels=augment_labels)
        return self.noise_levels.weight(sigma) * (denoised - y).square()

    def build(self) -> dict[str, TrainedNetwork]:
        """Create the denoiser."""
        network = self.config.network
        net = precond_class(network.precond)(
            img_resolution=self.dataset.resolution,
            img_channels=self.dataset.num_channels,
            label_dim=self.dataset.label_dim,
            augment_dim=self.augment.label_dim if self.augment else 0,
            use_fp16=self.config.precision == "fp16",
            **network.kwargs,
        )
        return {"net": self.trained_network(net)}
