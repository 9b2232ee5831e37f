"""Rejection: an image whose label a discriminator takes for wrong is drawn anew (docs/methods/sbdc.md, section 4)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from sampling.guidance import Denoiser, Evidence, Guidance, fitting
from sampling.seeds import StackedRandomGenerator
from torch_utils.distributed import print0
from torch_utils.precision import full_float32, widest

__all__ = ["TRIES", "LabelJudge", "Rejection", "warn_of_given_up"]

TRIES = 100  # draws of an image, of which the most probable one counts in the end


class Rejection(Guidance):
    """Samples of p(x | y) from a model of p(x | observed y): each is accepted with the probability that y is right.

    p(x | y) = p(x | observed y) P(y right | x, observed y) / (1 - eta_y). So this is exact for the exact probability,
    whatever made the labels wrong, and an image takes 1 / (1 - eta_y) draws on average. The denoiser stays as it is.

    net            a denoiser, guided or not
    discriminator  f(x, sigma, y), the logit of "y is right": SBDC's, or a `LabelJudge`
    evidence       what turns f into a probability
    sigma          noise level at which images are judged
    stopwatch      runs while images are judged

    UserError: f has another resolution, channels or classes.
    """

    outermost = True  # it hears of whole images

    def __init__(
        self,
        net: Denoiser,
        discriminator: Callable[..., torch.Tensor],
        *,
        evidence: Evidence,
        sigma: float,
        stopwatch: AbstractContextManager | None = None,
    ):
        self._state_facts(net)  # which may be gated: samplers are given `net` itself
        self.discriminator, self.evidence, self.sigma = fitting(discriminator, net), evidence, sigma
        self.stopwatch = stopwatch or nullcontext()
        self.drawn = self.given_up = 0  # images so far

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the denoiser returns."""
        return self.net(x, sigma, class_labels)

    @torch.no_grad()
    def sample(
        self,
        sampler: Callable[..., torch.Tensor],
        latents: torch.Tensor,
        class_labels: torch.Tensor,
        rnd: StackedRandomGenerator,
        wanted: int,
        same_shape: bool = False,
    ) -> torch.Tensor:
        """Return the first accepted image of each of the first `wanted` seeds, or the most probable one of `TRIES`.

        Other arguments as those of a sampler; `rnd` goes on drawing for each seed. `same_shape`: the network sees
        batches of the size of `latents` only.
        """
        labels, size, left = class_labels, len(latents), torch.arange(wanted, device=latents.device)
        result = best = None
        for _ in range(TRIES):
            images = sampler(self.net, latents, labels, randn_like=rnd.randn_like)
            right = self.probability(images, labels, rnd)
            accepted = rnd.rand([len(labels)]) < right
            images, right, accepted = (values[: len(left)] for values in (images, right, accepted))
            if result is None:
                result, best = images.clone(), right.clone()
            better = accepted | (right > best[left])
            result[left[better]], best[left[better]] = images[better], right[better]
            self.drawn += len(left)
            rest = (~accepted).nonzero().flatten().tolist()
            left = left[rest]
            if not rest:
                break
            fill = size - len(rest) if same_shape else 0
            rnd = rnd.take(rest, fill)
            labels = labels[rest + rest[-1:] * fill]
            latents = rnd.randn([len(labels), *latents.shape[1:]])
        self.given_up += len(left)
        return result

    def probability(self, images: torch.Tensor, labels: torch.Tensor, rnd: StackedRandomGenerator) -> torch.Tensor:
        """Return P(y right | image) [n] float32. `rnd` supplies the noise that the discriminator expects."""
        with self.stopwatch, full_float32(images.device):
            x = images.float()
            sigma = torch.full([1], self.sigma, device=x.device)
            logits = self.discriminator(x + self.sigma * rnd.randn_like(x), sigma, labels)
            return self.evidence.right(logits, sigma, labels)


class LabelJudge:
    """The logit of "y is right" for images without noise, by a classifier p and Bayes' rule (`detection.bayes`).

    f(x, y) = ln T[y,y] p_y(x) - ln sum_{c != y} T[c,y] p_c(x)

    net    returns the logits of p
    T      transition [C,C]: T[c,y] = P(observed = y | clean = c)
    temp   divides the logits
    """

    def __init__(self, net: torch.nn.Module, T: torch.Tensor, temp: float = 1.0):
        self.img_resolution, self.img_channels, self.label_dim = net.img_resolution, net.img_channels, net.label_dim
        self.net, self.log_T, self.temp = net, T.log(), temp

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """Return f [N]. `sigma` is the noise level that a time-dependent classifier hears of."""
        own = class_labels.bool()
        joint = torch.log_softmax(self.net(x, sigma.expand(len(x))).to(widest(x.device)) / self.temp, dim=1)
        joint = joint + self.log_T.to(joint)[:, class_labels.argmax(dim=1)].T
        return joint[own] - joint.masked_fill(own, -torch.inf).logsumexp(dim=1)


def warn_of_given_up(images: int) -> None:
    """Warn of images that were taken although none of their draws was accepted; print nothing for 0 of them."""
    if images:
        print0(
            f"WARNING: {images} images were not accepted in {TRIES} draws; the most probable one of each was taken. "
            "The network or the discriminator may know nothing of their classes"
        )
