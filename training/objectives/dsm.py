"""Denoising score matching: the baseline, which takes every label at its word (docs/methods/edm.md, Objectives).

E lambda(sigma) ||D(y + n; sigma, c) - y||^2,    n ~ N(0, sigma^2 I)      (Karras et al. 2022, Eq. 2)

Label dropout replaces some labels c by none, a row of zeros. On these images D(.; none) learns the unconditional
denoiser, which classifier-free guidance needs. `PosteriorLabels` may replace the labels of the data set.
"""

from __future__ import annotations

import torch

from archives.dataset import ImageDataset
from torch_utils.training_stats import Stats
from training.config import RunConfig
from training.objective import Objective
from training.objectives.posterior_labels import PosteriorLabels
from training.outlier_rule import OutlierRule, common_items
from training.presets import precond_class
from training.trained_network import TrainedNetwork

__all__ = ["DSM", "without"]


class DSM(Objective):
    """Denoising score matching on the labels as they are, or on `posterior_labels`."""

    method = "dsm"

    def loss(self, images: torch.Tensor, labels: torch.Tensor, draws: dict, stats: Stats) -> torch.Tensor:
        """Compute lambda(sigma) (D(y + n; sigma, c) - y)^2, [n,C,H,W]."""
        y, augment_labels = self.prepare(images, draws)
        sigma = draws["sigma"].reshape(-1, 1, 1, 1)
        x = y + sigma * draws["noise"]
        labels = without(*self.choose_labels(labels, draws, stats))
        denoised = self.trained["net"].forward(x, sigma, labels, augment_labels=augment_labels)
        return self.weight(sigma, draws, stats) * (denoised - y).square()

    def weight(self, sigma: torch.Tensor, draws: dict, stats: Stats) -> torch.Tensor:
        """Return lambda(sigma) [n,1,1,1], 0 for outliers at noise levels where they do not teach."""
        weight = self.noise_levels.weight(sigma)
        return weight if self.outliers is None else weight * self.outliers.weight(sigma, draws["items"], stats)

    def choose_labels(
        self, labels: torch.Tensor, draws: dict, stats: Stats
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the labels to learn [n,C], given those of the data set, and which to leave out, bool [n] or None."""
        if self.posterior_labels is None:
            return labels, draws.get("dropped")
        return self.posterior_labels.onehot(draws, labels.shape[1], stats)

    def __init__(
        self,
        config: RunConfig,
        dataset: ImageDataset,
        device: torch.device,
        *,
        posterior_labels: PosteriorLabels | None = None,
        outliers: OutlierRule | None = None,
    ):
        """Take labels that replace those of the data set (None: its own), and a rule for outliers (None: keep them).

        UserError: together they leave no image.
        """
        super().__init__(config, dataset, device)
        self.posterior_labels, self.outliers = posterior_labels, outliers
        self.train_indices = common_items(*(x.train_indices for x in (posterior_labels, outliers) if x is not None))

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
        if self.posterior_labels is not None:
            draws["label"] = torch.rand(len(images), generator=generator, device=self.device)
        return draws

    def notes(self) -> list[str]:
        """Say what becomes of the labels and of the outliers."""
        return [line for known in (self.posterior_labels, self.outliers) if known is not None for line in known.notes()]


def without(labels: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
    """Return the labels [n,C] with zeros in the rows that `dropped` (bool [n]; None: no row) marks."""
    return labels if dropped is None else labels * ~dropped[:, None]
