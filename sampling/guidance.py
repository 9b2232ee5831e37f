"""Guidance: a denoiser made from denoisers, so that every sampler can use every guidance and guidances compose.

A guided denoiser is called as a network is, `D(x, sigma, class_labels)`, and states the same facts about itself.
"""

from __future__ import annotations

import torch

import dnnlib

__all__ = ["AffineGuidance", "ClassifierFreeGuidance", "Guidance"]


class Guidance:
    """What a denoiser says about itself, forwarded from the one that is guided."""

    def __init__(self, net):
        self.net = net
        self.img_resolution, self.img_channels, self.label_dim = net.img_resolution, net.img_channels, net.label_dim
        self.sigma_min, self.sigma_max = net.sigma_min, net.sigma_max

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        """The nearest noise level that the guided denoiser knows."""
        return self.net.round_sigma(sigma)


class AffineGuidance(Guidance):
    """D' = (1 + w) D - w D_2: away from a second, weaker denoiser (autoguidance: Karras et al., NeurIPS 2024, Eq. 3).

    `weight` 0 leaves D alone and never calls D_2. The sigma range is what both know. UserError: D_2 has another
    resolution, other channels or other classes.
    """

    def __init__(self, net, net_2, weight: float):
        super().__init__(net)
        found, wanted = _format(net_2), _format(net)
        if found != wanted:
            raise dnnlib.UserError(f"network_2 makes {found}; it must make {wanted}, as the network does")
        self.net_2, self.weight = net_2, weight
        self.sigma_min, self.sigma_max = max(net.sigma_min, net_2.sigma_min), min(net.sigma_max, net_2.sigma_max)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        denoised = self.net(x, sigma, class_labels)
        if self.weight == 0:
            return denoised
        # The same as the formula above, and exactly D where the two agree.
        return denoised + self.weight * (denoised - self.net_2(x, sigma, class_labels))


class ClassifierFreeGuidance(Guidance):
    """D' = D_0 + s (D_y - D_0), D_0 without a label (zeros), for networks trained with label dropout.

    Ho & Salimans, 2022. `scale` 1 is D_y and 0 is D_0, each at the cost of one evaluation. UserError: no classes.
    """

    def __init__(self, net, scale: float):
        super().__init__(net)
        if not net.label_dim:
            raise dnnlib.UserError("classifier-free guidance needs a network with labels; this one has none")
        self.scale = scale

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        if class_labels is None or self.scale == 1:
            return self.net(x, sigma, class_labels)
        unconditional = self.net(x, sigma, torch.zeros_like(class_labels))
        if self.scale == 0:
            return unconditional
        return unconditional + self.scale * (self.net(x, sigma, class_labels) - unconditional)


def _format(net) -> str:
    n, classes = net.img_resolution, net.label_dim or "no"
    return f"{n}x{n} images with {net.img_channels} channel(s) and {classes} classes"
