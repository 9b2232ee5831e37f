"""Denoising score matching (edm.md, Objectives): the baseline that takes every label at its word."""

from __future__ import annotations

import torch

from torch_utils.training_stats import Stats
from training.objective import Objective
from training.presets import precond_class
from training.trained_network import TrainedNetwork

__all__ = ["DSM"]


class DSM(Objective):
    """E lambda(sigma) ||D(y+n; sigma, c) - y||^2, n ~ N(0, sigma^2 I) (Karras et al. 2022, Eq. 2)."""

    method = "dsm"

    def build(self) -> dict[str, TrainedNetwork]:
        c = self.config["network"]
        net = precond_class(c["precond"])(
            img_resolution=self.dataset.resolution,
            img_channels=self.dataset.num_channels,
            label_dim=self.dataset.label_dim,
            augment_dim=self.augment.label_dim if self.augment else 0,
            use_fp16=self.config["precision"] == "fp16",
            **c["kwargs"],
        )
        return {"net": self.trained_network(net)}

    def loss(self, images: torch.Tensor, labels: torch.Tensor, draws: dict, stats: Stats) -> torch.Tensor:
        y, augment_labels = self.prepare(images, draws)
        sigma = draws["sigma"].reshape(-1, 1, 1, 1)
        denoised = self.combine(y + sigma * draws["noise"], sigma, labels, augment_labels, stats)
        return self.noise_levels.weight(sigma) * (denoised - y).square()

    def combine(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor,
        augment_labels: torch.Tensor | None,
        stats: Stats,
    ) -> torch.Tensor:
        """The denoised image [n,C,H,W] that is compared with the clean one; TDSM's difference to DSM is all here."""
        return self.trained["net"].forward(x, sigma, labels, augment_labels=augment_labels)
