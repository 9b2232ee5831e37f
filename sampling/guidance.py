"""Guidance: a denoiser made from denoisers, so that every sampler can use every guidance and guidances compose.

A guided denoiser is called as a network is, `D(x, sigma, class_labels)`, and states the same facts about itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

import dnnlib

__all__ = ["AffineGuidance", "ClassifierFreeGuidance", "DiscriminatorGuidance", "Guidance", "at_step"]


def at_step(net, order: int, sigma: float):
    """The denoiser for a solver's first or second evaluation of a step (`order`), at `sigma`; a network is always the
    same. The solver's number, so that nothing waits for a device to say what it has computed.
    """
    return net.at_step(order, sigma) if isinstance(net, Guidance) else net


class Guidance:
    """What a denoiser says about itself, forwarded from the one that is guided."""

    networks = ("net",)  # the attributes that are denoisers

    def __init__(self, net):
        self.net = net
        self.img_resolution, self.img_channels, self.label_dim = net.img_resolution, net.img_channels, net.label_dim
        self.sigma_min, self.sigma_max = net.sigma_min, net.sigma_max

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        """The nearest noise level that the guided denoiser knows."""
        return self.net.round_sigma(sigma)

    def at_step(self, order: int, sigma: float) -> Callable[..., torch.Tensor]:
        """This guidance of what is guided at that order and noise level."""
        other = copy.copy(self)
        for name in self.networks:
            setattr(other, name, at_step(getattr(self, name), order, sigma))
        return other


class AffineGuidance(Guidance):
    """D' = (1 + w) D - w D_2: away from a second, weaker denoiser (autoguidance: Karras et al., NeurIPS 2024, Eq. 3).

    `weight` 0 leaves D alone and never calls D_2. The sigma range is what both know. UserError: D_2 has another
    resolution, other channels or other classes.
    """

    networks = ("net", "net_2")

    def __init__(self, net, net_2, weight: float):
        super().__init__(net)
        if _format(net_2) != _format(net):
            raise dnnlib.UserError(f"network_2 makes {_format(net_2)}; the network makes {_format(net)}")
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

    Ho & Salimans, 2022. `scale` 1 is D_y and 0 is D_0, each at the cost of one evaluation; otherwise both are one
    batch of twice the size. UserError: no classes.
    """

    def __init__(self, net, scale: float):
        super().__init__(net)
        if not net.label_dim:
            raise dnnlib.UserError("classifier-free guidance needs a network with labels; this one has none")
        self.scale = scale

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        if class_labels is None or self.scale == 1:
            return self.net(x, sigma, class_labels)
        zeros = torch.zeros_like(class_labels)
        if self.scale == 0:
            return self.net(x, sigma, zeros)
        sigma = torch.as_tensor(sigma)
        sigma = sigma.repeat(2) if sigma.numel() > 1 else sigma
        unconditional, conditional = self.net(x.repeat(2, 1, 1, 1), sigma, torch.cat([zeros, class_labels])).chunk(2)
        return unconditional + self.scale * (conditional - unconditional)


class DiscriminatorGuidance(Guidance):
    """D' = D + w sigma^2 grad_x f(x, sigma, y): the score plus w grad f, f the logit of "y is right" (Nguyen Cong
    et al., ICCV 2025; sbdc.md, section 3).

    weights      of the first and second evaluation of a step
    gate         [S_clip_min, S_clip_max]: at other noise levels D is left alone and f is not evaluated
    noise_rates  eta [C], P(label wrong | observed): w is multiplied by the posterior probability that y is wrong for
                 this x, sigmoid(logit eta_y - f + logit R_y), which makes weight 1 exact for the optimal f; None: w is
                 constant, as in the paper
    right_shares R [C], the share of right pairs with each label that f was trained on

    f is called with the very (x, sigma, y) that D gets. UserError: f has another resolution, channels or classes.
    """

    def __init__(
        self,
        net,
        discriminator,
        *,
        weights: Sequence[float] = (1, 1),
        gate: Sequence[float] = (0, math.inf),
        noise_rates: torch.Tensor | None = None,
        right_shares: torch.Tensor | None = None,
        stopwatch: AbstractContextManager | None = None,
    ):
        super().__init__(net)
        if not net.label_dim or _format(discriminator) != _format(net):
            raise dnnlib.UserError(
                f"--discriminator: trained on {_format(discriminator)}; the network makes {_format(net)}"
            )
        self.discriminator, self.weights, self.weight, self.gate = discriminator, tuple(weights), weights[0], gate
        self.log_odds = None
        if noise_rates is not None:
            # logit eta + logit R; a label that is never wrong stays at -inf, whatever R is
            self.log_odds = torch.where(noise_rates > 0, noise_rates.logit() + right_shares.logit(), -math.inf)
        self.stopwatch = stopwatch or nullcontext()

    def at_step(self, order: int, sigma: float) -> Callable[..., torch.Tensor]:
        if self.weights[order - 1] == 0 or not self.gate[0] <= sigma <= self.gate[1]:
            return at_step(self.net, order, sigma)
        other = super().at_step(order, sigma)
        other.weight, other.gate = self.weights[order - 1], None
        return other

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        denoised = self.net(x, sigma, class_labels)
        sigma = torch.as_tensor(sigma, device=x.device)
        factor = self.weight * sigma.square()
        if self.gate is not None:  # not asked for `at_step`: noise levels that differ, or that a device keeps
            inside = (sigma >= self.gate[0]) & (sigma <= self.gate[1])
            if self.weight == 0 or not inside.any():
                return denoised
            factor = inside * factor
        with self.stopwatch:
            return denoised + factor.reshape(-1, 1, 1, 1) * self.correction(x, sigma, class_labels)

    def correction(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """grad_x f, for the calibrated weight times the probability that the label is wrong: [N,C,H,W] as x."""
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            x = x.detach().requires_grad_(True)
            logits = self.discriminator(x, sigma, class_labels)
            # An output that does not depend on x has the gradient zero.
            gradient = torch.autograd.grad(logits.sum(), x, allow_unused=True)[0] if logits.requires_grad else None
        if gradient is None:
            return torch.zeros_like(x, requires_grad=False)
        if self.log_odds is None:
            return gradient
        wrong = torch.sigmoid(self.log_odds.to(logits)[class_labels.argmax(dim=1)] - logits.detach())
        wrong = wrong.reshape(-1, 1, 1, 1)
        # Where the label is right for certain an optimal logit is infinite, and its gradient no number.
        return torch.where(wrong > 0, gradient * wrong, 0)


def _format(net) -> str:
    n, classes = net.img_resolution, net.label_dim or "no"
    return f"{n}x{n} images with {net.img_channels} channel(s) and {classes} classes"
