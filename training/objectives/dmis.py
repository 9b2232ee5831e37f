"""DMIS in a form of ours: the denoiser is its own classifier (docs/methods/posterior.md, "Two baselines").

After Wu et al., "Learning Robust Diffusion Models from Imprecise Supervision" (arXiv 2510.03016), which infers the
class of an image by a diffusion classifier while the model trains. The formulas are derived here, not copied. The
likelihood of an image x_0 and its observed label o, over clean labels y,

    p(x_0, o) = sum_y T[y,o] pi_y p(x_0 | y),

is maximized by expectation-maximization. Expectation: the posterior of y by the denoiser D itself and Bayes' rule,

    -ln p(x_0 | y) = const + integral over ln sigma of E || D(x_0 + sigma n; sigma, y) - x_0 ||^2 / sigma^2
    q_y  is proportional to  T[y,o] p(x_0 | y)

(Kong et al., "Information-Theoretic Diffusion", ICLR 2023). Maximization: a step of denoising score matching on a label
drawn from q, and a gradient step of T, which nobody needs to know,

    lambda(sigma) || D(x_t; sigma, y) - x_0 ||^2 - ln sum_y T[y,o] p(y | x_0),    y ~ q.

Ours are: T as the model of the label noise, one drawn label in place of a sum over classes, equal class shares pi, and
the levels of the integral: a few, evenly spread over a band of ln sigma and shifted at random, with the same noise n
for all classes.
"""

from __future__ import annotations

import math
from typing import Any

import torch

import dnnlib
from archives.dataset import ImageDataset
from archives.label_noise import transition_matrix
from torch_utils import distributed
from torch_utils.training_stats import Stats
from training.config import RunConfig
from training.learned_transition import LearnedTransition
from training.objectives.dsm import DSM, without
from training.objectives.pair_passes import pass_size
from training.objectives.posterior_labels import draw_classes
from training.objectives.tdsm import posterior_weights
from training.outlier_rule import OutlierRule
from training.trained_network import TrainedNetwork

__all__ = ["DMIS"]

BAND = (0.1, 10.0)  # noise levels at which classes differ: below, every class sees the image; above, none does
LEVELS = 2  # of the integral, in each use of an image
START = 0.5175  # share of wrong labels with which T starts, where there are ten classes or more


class DMIS(DSM):
    """Denoising score matching on labels drawn from the denoiser's own posterior."""

    method = "dmis"

    def loss(self, images: torch.Tensor, labels: torch.Tensor, draws: dict, stats: Stats) -> torch.Tensor:
        """Compute the loss of each image, [n]."""
        y, augment_labels = self.prepare(images, draws)
        observed, dropped = labels.argmax(dim=1), draws.get("dropped")
        log_p = torch.log_softmax(self.log_likelihoods(y, augment_labels, draws), dim=1)
        T = self.trained["transition"].forward()
        q = posterior_weights(log_p, T.detach(), observed, check=False)  # no entry of T is 0
        drawn = draw_classes(q, draws["label"])

        sigma = draws["sigma"].reshape(-1, 1, 1, 1)
        onehot = without(torch.nn.functional.one_hot(drawn, labels.shape[1]).to(labels), dropped)
        denoised = self.trained["net"].forward(y + sigma * draws["noise"], sigma, onehot, augment_labels=augment_labels)
        error = self.weight(sigma, draws, stats) * (denoised - y).square()
        stats.add("DMIS/changed", (drawn != observed).float())
        stats.add("DMIS/noise", 1 - T.detach().diagonal())
        return error.flatten(1).sum(dim=1) - (log_p + T.T[observed].log()).logsumexp(dim=1)

    @torch.no_grad()
    def log_likelihoods(self, y: torch.Tensor, augment_labels: torch.Tensor | None, draws: dict) -> torch.Tensor:
        """Return ln p(x_0 | class) up to a constant of each image, for images `y` [n,C,H,W]: [n,classes]."""
        n, classes, net = len(y), self.dataset.label_dim, self.trained["net"].ema  # without dropout, and steady
        low, high = map(math.log, BAND)
        step = (high - low) / LEVELS
        sigma = (low + (torch.arange(LEVELS, device=y.device) + draws["level"]) * step).exp()  # [n,LEVELS]
        found = []
        # One flat list of (image, class, level): a loop over passes, not over classes.
        for part in torch.arange(n * classes * LEVELS, device=y.device).split(self.pass_size):
            image, label, level = part // (classes * LEVELS), part // LEVELS % classes, part % LEVELS
            s = sigma[image, level].reshape(-1, 1, 1, 1)
            augmented = None if augment_labels is None else augment_labels[image]
            onehot = torch.nn.functional.one_hot(label, classes).to(torch.float32)
            x = y[image] + s * draws["level_noise"][image, level]
            error = (net(x, s, onehot, augment_labels=augmented) - y[image]) / s
            found.append(error.square().flatten(1).sum(dim=1))
        return -step * torch.cat(found).reshape(n, classes, LEVELS).sum(dim=2)

    def __init__(
        self, config: RunConfig, dataset: ImageDataset, device: torch.device, *, outliers: OutlierRule | None = None
    ):
        super().__init__(config, dataset, device, outliers=outliers)
        if dataset.labels is None:
            raise dnnlib.UserError(f"{dataset.name}: this method needs one class per image, as its label")
        share = config.batch_size // distributed.get_world_size()
        self.pass_size = pass_size(min(config.batch_gpu or share, share), dataset.resolution**2, device.type)

    def build(self) -> dict[str, TrainedNetwork]:
        """Create the denoiser and T.

        At first all classes denoise alike, so T alone decides how often an image keeps its label.
        """
        classes = self.dataset.label_dim
        T = LearnedTransition(classes)
        if classes > 10:  # the usual start would be 92% wrong labels with 100 classes
            T.start_at(torch.from_numpy(transition_matrix("sym", START, classes)).float())
        # T has only C x C numbers: nothing to compile, to share or to average.
        return super().build() | dict(transition=self.trained_network(T, compile=False, shard=False, ema_halflife=0))

    def draw(self, images: torch.Tensor, generator: torch.Generator) -> dict:
        """Draw what DSM draws, which label is taken, and the levels and the noise of the diffusion classifier."""
        n, where = len(images), dict(generator=generator, device=self.device)
        return super().draw(images, generator) | dict(
            label=torch.rand(n, **where),
            level=torch.rand([n, 1], **where),
            level_noise=torch.randn([n, LEVELS, *images.shape[1:]], **where),
        )

    def info(self) -> dict[str, Any]:
        """Record the T that the run has learned."""
        return dict(transition=self.trained["transition"].net().tolist())
