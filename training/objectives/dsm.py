"""Denoising score matching: the baseline, which takes every label at its word (docs/methods/edm.md, Objectives).

E lambda(sigma) ||D(y + n; sigma, c) - y||^2,    n ~ N(0, sigma^2 I)      (Karras et al. 2022, Eq. 2)

Label dropout replaces some labels c by none, a row of zeros. On these images D(.; none) learns the unconditional
denoiser, which classifier-free guidance needs.
"""

from __future__ import annotations

import torch

from torch_utils.training_stats import Stats
from training.objective import Objective
from training.presets import precond_class
from training.trained_network import TrainedNetwork

__all__ = ["DSM", "without"]


class DSM(Objective):
    """Denoising score matching on the labels as they are."""

    method = "dsm"

    def loss(self, images: torch.Tensor, labels: torch.Tensor, draws: dict, stats: Stats) -> torch.Tensor:
        """Compute lambda(sigma) (D(y + n; sigma, c) - y)^2, [n,C,H,W]."""
        y, augment_labels = self.prepare(images, draws)
        sigma = draws["sigma"].reshape(-1, 1, 1, 1)
        x = y + sigma * draws["noise"]
        labels = without(labels, draws.get("dropped"))
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

    def draw(self, images: torch.Tensor, generator: torch.Generator) -> dict:
        """Draw what every objective draws, and with label dropout which images lose their label, bool [n]."""
        draws = super().draw(images, generator)
        probability = self.config.network.kwargs.get("label_dropout", 0)
        if probability and self.dataset.label_dim:
            # The default generator, which every step seeds: runs of version 0.1 continue with the same labels dropped.
            draws["dropped"] = torch.rand(len(images), device=self.device) < probability
        return draws


def without(labels: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
    """Return the labels [n,C] with zeros in the rows that `dropped` (bool [n]; None: no row) marks."""
    return labels if dropped is None else labels * ~dropped[:, None]
