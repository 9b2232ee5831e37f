"""CEP, condition embedding perturbation (docs/methods/posterior.md, "Two baselines").

    E lambda(sigma) || D(y + n; sigma, e_c + gamma / sqrt(d) z) - y ||^2,    z ~ N(0, I_d)

y: image; n ~ N(0, sigma^2 I); e_c: the embedding of its label c, d numbers; gamma: the length of the perturbation.
Networks that learn from perturbed embeddings trust single labels less. Source: Chen et al., "Slight Corruption in
Pre-training Data Makes Better Diffusion Models", NeurIPS 2024. What may differ: e_c is what these U-Nets add to the
embedding of the noise level, so it has no layer of its own behind it.
"""

from __future__ import annotations

import torch

import dnnlib
from torch_utils.training_stats import Stats
from training.objectives.dsm import DSM
from training.trained_network import TrainedNetwork

__all__ = ["CEP"]


class CEP(DSM):
    """Denoising score matching with noise on the embeddings of the labels."""

    method = "cep"
    perturbation: torch.Tensor | None = None  # [n,d], of the pass that is running

    def loss(self, images: torch.Tensor, labels: torch.Tensor, draws: dict, stats: Stats) -> torch.Tensor:
        """Compute lambda(sigma) (D(y + n; sigma, e_c + gamma / sqrt(d) z) - y)^2, [n,C,H,W]."""
        z = draws["embedding"]
        self.perturbation = self.config.cep.gamma / z.shape[1] ** 0.5 * z
        try:
            return super().loss(images, labels, draws, stats)
        finally:
            self.perturbation = None

    def _perturb(self, _layer: torch.nn.Module, args: tuple, embedding: torch.Tensor) -> torch.Tensor:
        if self.perturbation is None:
            return embedding
        labeled = args[0].any(dim=1, keepdim=True)  # an image without label has no embedding to perturb
        return embedding + self.perturbation.to(embedding.dtype) * labeled

    def build(self) -> dict[str, TrainedNetwork]:
        """Create the denoiser. Its EMA, which snapshots hold, is never perturbed."""
        if not self.dataset.label_dim:
            raise dnnlib.UserError(f"{self.dataset.name}: without labels there is no embedding to perturb")
        trained = super().build()
        self.embedding = trained["net"].net.model.map_label
        self.embedding.register_forward_hook(self._perturb)
        return trained

    def draw(self, images: torch.Tensor, generator: torch.Generator) -> dict:
        """Draw what DSM draws, and z, one row per image."""
        shape = [len(images), self.embedding.out_features]
        return super().draw(images, generator) | dict(
            embedding=torch.randn(shape, generator=generator, device=self.device)
        )
