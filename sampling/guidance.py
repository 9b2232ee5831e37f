"""Guidance: a denoiser made from denoisers, so that every sampler takes every guidance, and guidances compose.

A guided denoiser is called as a network is, `D(x, sigma, class_labels)`, and states the same facts about itself.
`GatedGuidance` alone knows about noise levels and solver orders, and therefore stands outermost. Only `Rejection`,
which draws whole images, may stand around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

import dnnlib
from torch_utils.precision import full_float32
from training.networks import vp_sigma_inv

__all__ = [
    "AffineGuidance",
    "AsPublished",
    "ClassifierFreeGuidance",
    "Denoiser",
    "DiscriminatorGuidance",
    "Evidence",
    "GatedGuidance",
    "at_step",
    "fitting",
    "gated_discriminator",
]

Denoiser = Callable[..., torch.Tensor]


class Guidance:
    """The facts that a denoiser states about itself, taken from the denoiser `net` that is guided.

    TypeError: `net` or one of the `others` inside it must stand outermost.
    """

    outermost = False  # whether it needs to know more than a denoiser's arguments

    def __init__(self, net: Denoiser, *others: Denoiser):
        for inner in (net, *others):
            if getattr(inner, "outermost", False):
                raise TypeError("gated guidance and rejection must be outermost: guide their denoisers instead")
        self._state_facts(net)

    def _state_facts(self, net: Denoiser) -> None:
        self.net = net
        self.img_resolution, self.img_channels, self.label_dim = net.img_resolution, net.img_channels, net.label_dim
        self.sigma_min, self.sigma_max = net.sigma_min, net.sigma_max

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return the nearest noise levels that the guided denoiser knows."""
        return self.net.round_sigma(sigma)


class AffineGuidance(Guidance):
    """D' = (1 + w) D - w D_2: away from a second, weaker denoiser (autoguidance: Karras et al., NeurIPS 2024, Eq. 3).

    `weight` 0 leaves D alone and never calls D_2. The range of noise levels is what both know. UserError: D_2 has
    another resolution, other channels or other classes.
    """

    def __init__(self, net: Denoiser, net_2: Denoiser, weight: float):
        super().__init__(net, net_2)
        if _format(net_2) != _format(net):
            raise dnnlib.UserError(f"the weaker network makes {_format(net_2)}; the network makes {_format(net)}")
        self.net_2, self.weight = net_2, weight
        self.sigma_min, self.sigma_max = max(net.sigma_min, net_2.sigma_min), min(net.sigma_max, net_2.sigma_max)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        denoised = self.net(x, sigma, class_labels)
        if self.weight == 0:
            return denoised
        # The formula above in a form that gives exactly D where the two agree.
        return denoised + self.weight * (denoised - self.net_2(x, sigma, class_labels))


class ClassifierFreeGuidance(Guidance):
    """D' = D_0 + s (D_y - D_0), D_0 without a label (zeros), for networks trained with label dropout.

    Ho & Salimans, 2022. `scale` 1 is D_y and 0 is D_0, each at the cost of one evaluation; otherwise both are one
    batch of twice the size. UserError: the network has no classes.
    """

    def __init__(self, net: Denoiser, scale: float):
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


class Evidence:
    """The probability that a label is wrong, from a discriminator's logit f (docs/methods/sbdc.md, section 3).

    P(y wrong | x) = sigmoid(logit eta_y - e / temp(sigma)) with the evidence e = f - logit R_y.

    noise_rates   eta [C], P(label wrong | observed label)
    right_shares  R [C], the share of right pairs with each label that f was trained on
    temperature   divides e at each noise level, as held-out pairs say; None: by 1
    """

    def __init__(
        self,
        noise_rates: torch.Tensor,
        right_shares: torch.Tensor,
        temperature: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.noise_odds, self.temperature = noise_rates.logit(), temperature
        # A label that is never wrong, or never right, stays so for any R.
        self.right_odds = torch.where(self.noise_odds.isfinite(), right_shares.logit(), 0)

    def wrong(self, logits: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """Return P(y wrong | x) [N] for logits [N], sigma [1 or N] and one-hot labels [N,C]."""
        return torch.sigmoid(self._odds(logits, sigma, class_labels))

    def right(self, logits: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """Return P(y right | x) [N], in all its digits where it is small."""
        return torch.sigmoid(-self._odds(logits, sigma, class_labels))

    def _odds(self, logits: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        labels, temp = class_labels.argmax(dim=1), self.temp_at(sigma).to(logits)
        noise_odds, right_odds = (odds.to(logits)[labels] for odds in (self.noise_odds, self.right_odds))
        return noise_odds + right_odds / temp - logits / temp

    def temp_at(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return what divides the evidence at noise levels of any shape, [1 or N]."""
        return torch.ones_like(sigma.reshape(-1)) if self.temperature is None else self.temperature(sigma.reshape(-1))


class DiscriminatorGuidance(Guidance):
    """D' = D + w sigma^2 grad_x f(x, sigma, y): the score plus w grad f, where f is the logit of "y is right".

    Nguyen Cong et al., ICCV 2025; docs/methods/sbdc.md, section 3.

    weight        w; 0 leaves D alone and never calls f
    evidence      w is multiplied by the probability that y is wrong for this x, and grad f divided by the temperature,
                  which makes weight 1 exact for the optimal f. None: w is constant, as in the paper
    stopwatch     runs while the correction is computed

    f is called with exactly the (x, sigma, y) that D gets. UserError: f has another resolution, channels or classes.
    """

    def __init__(
        self,
        net: Denoiser,
        discriminator: Callable[..., torch.Tensor],
        *,
        weight: float = 1,
        evidence: Evidence | None = None,
        stopwatch: AbstractContextManager | None = None,
    ):
        super().__init__(net)
        self.discriminator, self.weight, self.evidence = fitting(discriminator, net), weight, evidence
        self.stopwatch = stopwatch or nullcontext()

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        denoised = self.net(x, sigma, class_labels)
        if self.weight == 0:
            return denoised
        sigma = torch.as_tensor(sigma, device=x.device)
        with self.stopwatch:
            factor = (self.weight * sigma.square()).reshape(-1, 1, 1, 1)
            return denoised + factor * self.correction(x, sigma, class_labels)

    def correction(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """Return grad_x f [N,C,H,W]; with evidence, multiplied by the probability that the label is wrong."""
        with torch.enable_grad(), full_float32(x.device):
            x = x.detach().requires_grad_(True)
            logits = self.discriminator(x, sigma, class_labels)
            # An output that does not depend on x has the gradient zero.
            gradient = torch.autograd.grad(logits.sum(), x, allow_unused=True)[0] if logits.requires_grad else None
        if gradient is None:
            return torch.zeros_like(x, requires_grad=False)
        if self.evidence is None:
            return gradient
        wrong = self.evidence.wrong(logits.detach(), sigma, class_labels)
        factor = (wrong / self.evidence.temp_at(sigma).to(logits)).reshape(-1, 1, 1, 1)
        # Where the label is certainly right, an optimal logit is infinite and its gradient is not a number.
        return torch.where(factor > 0, gradient * factor, 0)


class AsPublished:
    """A discriminator f that is asked as SBDC's published sampling does: f(x/sqrt(1 + sigma^2), tau(sigma), y).

    tau is the time at which the variance-preserving process has noise level sigma. Published training gives f the noise
    level itself, so this is for comparison (docs/methods/sbdc.md, section 3).
    """

    def __init__(self, discriminator: Callable[..., torch.Tensor]):
        self.discriminator = discriminator
        self.img_resolution, self.img_channels = discriminator.img_resolution, discriminator.img_channels
        self.label_dim = discriminator.label_dim

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        scale = (1 + sigma.square()).rsqrt().reshape(-1, 1, 1, 1)
        return self.discriminator(scale * x, vp_sigma_inv(sigma), class_labels)


class GatedGuidance(Guidance):
    """Guidance at some noise levels only, and another one for each of the two evaluations of a solver's step.

    net     the denoiser outside the gate
    guided  the denoisers inside it: for the first and for the second evaluation of a step
    gate    lowest and highest noise level that are inside
    """

    outermost = True  # it hears of the solver's orders

    def __init__(self, net: Denoiser, guided: Sequence[Denoiser], gate: Sequence[float] = (0, math.inf)):
        super().__init__(net, *guided)
        self.guided, self.gate = tuple(guided), tuple(gate)

    def inside(self, sigma):
        """Return whether noise levels are inside the gate: bool for a number, a tensor of bool for a tensor."""
        return (sigma >= self.gate[0]) & (sigma <= self.gate[1])

    def at_step(self, order: int, sigma: float) -> Denoiser:
        """Return the denoiser for a step's first or second evaluation (`order` 1 or 2) at noise level `sigma`."""
        return self.guided[order - 1] if self.inside(sigma) else self.net

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the denoised images, each by the denoiser for its own noise level and the first evaluation of a step.

        Samplers call `at_step` instead, as this waits for the device to learn the noise levels.
        """
        inside = self.inside(torch.as_tensor(sigma, device=x.device)).reshape(-1, 1, 1, 1)
        if inside.all():
            return self.guided[0](x, sigma, class_labels)
        plain = self.net(x, sigma, class_labels)
        return torch.where(inside, self.guided[0](x, sigma, class_labels), plain) if inside.any() else plain


def at_step(net: Denoiser, order: int, sigma: float) -> Denoiser:
    """Return the denoiser for a step's first or second evaluation (`order` 1 or 2) at noise level `sigma`.

    `sigma` is a number of the solver, so nothing waits for a device.
    """
    return net.at_step(order, sigma) if isinstance(net, GatedGuidance) else net


def gated_discriminator(
    net: Denoiser,
    discriminator: Callable[..., torch.Tensor],
    *,
    weights: Sequence[float],
    gate: Sequence[float] = (0, math.inf),
    **kwargs,
) -> GatedGuidance:
    """Return `net` guided by a discriminator, with a weight for each evaluation of a step and a gate.

    Other arguments as `DiscriminatorGuidance`.
    """
    guided = [DiscriminatorGuidance(net, discriminator, weight=weight, **kwargs) for weight in weights]
    return GatedGuidance(net, guided, gate)


def fitting(discriminator: Callable[..., torch.Tensor], net: Denoiser) -> Callable[..., torch.Tensor]:
    """Return the discriminator. UserError: it has another resolution, channels or classes than the denoiser."""
    if not net.label_dim or _format(discriminator) != _format(net):
        raise dnnlib.UserError(f"trained on {_format(discriminator)}; the network makes {_format(net)}")
    return discriminator


def _format(net) -> str:
    n, classes = net.img_resolution, net.label_dim or "no"
    return f"{n}x{n} images with {net.img_channels} channel(s) and {classes} classes"
