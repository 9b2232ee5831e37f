"""A transition of labels that is learned with a network (Li et al., ICML 2021: VolMinNet)."""

from __future__ import annotations

import torch

__all__ = ["LearnedTransition"]


class LearnedTransition(torch.nn.Module):
    """T [C,C]: 1 on the diagonal, sigmoid(theta) elsewhere, then rows divided by their sums.

    theta starts at -2, which is a rate of 52% wrong labels with 10 classes, or at `start_at`.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.full([num_classes, num_classes], -2.0))

    def forward(self) -> torch.Tensor:
        """Return T."""
        eye = torch.eye(len(self.theta), device=self.theta.device)
        t = eye + (1 - eye) * torch.sigmoid(self.theta)
        return t / t.sum(dim=1, keepdim=True)

    @torch.no_grad()
    def start_at(self, T: torch.Tensor) -> None:
        """Set theta to give T [C,C], up to entries that are 0 or larger than the diagonal."""
        ratio = T / T.diagonal()[:, None].clamp_min(1e-6)
        self.theta.copy_(ratio.clamp(1e-4, 0.99).logit())
