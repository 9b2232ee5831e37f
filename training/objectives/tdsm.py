"""TDSM: transition-aware weighted denoising score matching (docs/methods/tdsm.md; Na et al., ICLR 2024).

    E lambda(sigma) || w_o D(x_t; o) + sum_{c != o, w_c > tau} w_c sg[D(x_t; c)] - y ||^2

    w_c = P(clean = c | x_t, observed = o)  is proportional to  T[c, o] P(clean = c | x_t)

The gradient goes through the first term alone and is linear in the others, so one class c' drawn with probability w_c
may stand for the sum: with all classes (tau = 0), the gradient of

    E lambda(sigma) || w_o D(x_t; o) + sg[D(x_t; c') - w_o D(x_t; o)] - y ||^2

is the same in expectation. Where c' = o, D(x_t; c') needs no pass of its own.

S-DSM, the ablation with class-level weights, takes P(clean = c | observed = o) in place of w_c, the same at all x_t. It
needs no classifier, and is wrong wherever x_t says anything about the class.

An image that loses its label (label dropout) has the loss of plain denoising, || D(x_t; none) - y ||^2.

y: image; x_t = y + n: the image at noise level sigma; o: its observed label; D(x_t; c): the denoiser asked for class c;
T[c, o]: probability that an image of class c is labeled o; sg: no gradient. P(clean | x_t) comes from a classifier.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import dnnlib
from archives.dataset import ImageDataset
from archives.label_noise import check_matrix, check_observed, impossible_label, inverse_transition
from torch_utils import distributed
from torch_utils.precision import widest
from torch_utils.training_stats import Stats
from training.config import RunConfig
from training.objectives.dsm import DSM, without
from training.objectives.pair_passes import pass_size, read_later, sum_over_pairs
from training.objectives.posterior_labels import PosteriorLabels, draw_classes
from training.outlier_rule import OutlierRule
from training.temperature import Temperature
from training.transition_estimate import class_shares

__all__ = ["TDSM", "clean_posterior", "cut_weights", "known_transition", "posterior_weights", "survivors"]


# The weights.


def posterior_weights(
    log_posterior: torch.Tensor, T: torch.Tensor, observed: torch.Tensor, check: bool = True
) -> torch.Tensor:
    """Return w_y = P(clean = y | x_t, observed = o) = softmax_y(ln T[y,o] + ln P(y | x_t)), rows sum to 1, [N,C].

    `log_posterior` [N,C]: clean log-probabilities, or logits. `T` [C,C]. `observed` int64 [N]. This is Bayes' rule;
    nothing is inverted or clamped. UserError names an observed label that no class turns into (its column of T is all
    zero). That check waits for the device: use `check=False` for labels that `check_observed` has seen.
    """
    columns = T.to(log_posterior).T[observed]
    if check:
        impossible = columns.sum(dim=1) == 0
        if impossible.any():
            raise impossible_label(int(observed[impossible][0]))
    return torch.log_softmax(columns.log() + log_posterior, dim=1).exp()


def survivors(weights: torch.Tensor, observed: torch.Tensor, tau: float) -> torch.Tensor:
    """Return which classes stay in the sum, bool [N,C]: those with w_c > tau, and always the observed one."""
    return (weights > tau).scatter(1, observed[:, None], True)


def cut_weights(weights: torch.Tensor, observed: torch.Tensor, tau: float, pairs: int | None = None) -> torch.Tensor:
    """Set the weights [N,C] of the classes that leave the sum to 0, without normalizing the rest again.

    `pairs`: keep at most so many of the other classes that survive tau, those with the largest weights.
    """
    weights = weights * survivors(weights, observed, tau)
    if pairs is None or pairs >= weights.shape[1] - 1:
        return weights
    others = weights.scatter(1, observed[:, None], -1)  # the observed class is never among the largest others
    largest = torch.cat([others.topk(pairs, dim=1).indices, observed[:, None]], dim=1)
    return torch.zeros_like(weights).scatter(1, largest, weights.gather(1, largest))


def clean_posterior(
    noisy_log_probs: torch.Tensor, T: np.ndarray | torch.Tensor, inverse: np.ndarray | torch.Tensor | None = None
) -> torch.Tensor:
    """Return the clean posterior P(y | x_t) [N,C] of a noisy one: T^T p = q, negatives set to 0, normalized again.

    `inverse` (of `inverse_transition`) skips the check of T and its inversion in every step. Entries can be 0: clamp
    them before taking the logarithm, otherwise a label that rules out all other classes gives NaN.
    """
    if inverse is None:
        inverse = inverse_transition(torch.as_tensor(T).detach().cpu().numpy())
    q = noisy_log_probs.to(widest(noisy_log_probs.device)).exp()
    p = (q @ torch.as_tensor(inverse).to(q)).clamp(min=0)
    return (p / p.sum(dim=1, keepdim=True)).to(noisy_log_probs.dtype)


# The loss.


class TDSM(DSM):
    """Denoising score matching with the denoised images of all classes that the label may stand for."""

    method = "tdsm"

    def loss(self, images: torch.Tensor, labels: torch.Tensor, draws: dict, stats: Stats) -> torch.Tensor:
        """Compute lambda(sigma) (w_o D(x; o) + sum_c w_c sg[D(x; c)] - y)^2, [n,C,H,W]."""
        y, augment_labels = self.prepare(images, draws)
        sigma = draws["sigma"].reshape(-1, 1, 1, 1)
        x = y + sigma * draws["noise"]
        labels, dropped = self.choose_labels(labels, draws, stats)
        denoised = self.combine(x, sigma, labels, augment_labels, stats, dropped, draws.get("other"))
        return self.weight(sigma, draws, stats) * (denoised - y).square()

    def combine(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor,
        augment_labels: torch.Tensor | None,
        stats: Stats,
        dropped: torch.Tensor | None = None,
        uniform: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute w_o D(x; o) + sum_c w_c sg[D(x; c)], and D(x; none) where `dropped` (bool [n]) says so, [n,C,H,W].

        With `uniform` [n], numbers in [0,1), compute w_o D(x; o) + sg[D(x; c') - w_o D(x; o)] with c' drawn by them.
        """
        observed = labels.argmax(dim=1)
        w = self.weights(x, sigma, observed, augment_labels)
        kept = None
        if dropped is not None:
            # The whole weight is on the one pass with gradients, which gets no label.
            w, labels, kept = torch.where(dropped[:, None], labels, w), without(labels, dropped), ~dropped
        w_observed = w.gather(1, observed[:, None])
        one = None if uniform is None else torch.nn.functional.one_hot(draw_classes(w, uniform), w.shape[1]).to(w)
        w_others = (w if one is None else one).scatter(1, observed[:, None], 0)
        pairs = (w_others > 0).sum(dim=1)
        count = read_later(pairs.sum())  # the number arrives while the device computes the next line

        net = self.trained["net"]
        own = net.forward(x, sigma, labels, augment_labels=augment_labels)
        denoised = own * w_observed[:, :, None, None]
        with torch.no_grad(), net.gathered():

            def denoise(image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
                onehot = (label[:, None] == torch.arange(w.shape[1], device=label.device)).to(labels.dtype)
                augmented = None if augment_labels is None else augment_labels[image]
                return net.net(x[image], sigma[image], onehot, augment_labels=augmented)

            others = sum_over_pairs(denoise, w_others, count(), self.pass_size, self.fixed_size, like=denoised)
        if one is not None:
            others = torch.where((pairs > 0)[:, None, None, None], others, own.detach()) - denoised.detach()

        stats.add("TDSM/pairs_per_image", pairs, kept)
        stats.add("TDSM/observed_weight", w_observed[:, 0], kept)
        stats.add("TDSM/cut_weight", 1 - w.sum(dim=1), kept)
        stats.add("TDSM/corrected", (w.argmax(dim=1) != observed).float(), kept)
        return denoised + others

    @torch.no_grad()
    def weights(
        self, x: torch.Tensor, sigma: torch.Tensor, observed: torch.Tensor, augment_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Return w [n,C] by Bayes' rule. Classes that leave the sum have weight 0; the observed one never leaves."""
        if self.classifier is None:
            return cut_weights(self.class_weights[observed], observed, self.tau, self.pairs)
        augment_labels = augment_labels if self.classifier.augment_dim else None
        dtype = self.classifier_dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            logits = self.classifier(x, sigma.flatten(), augment_labels=augment_labels)
        temp = self.temp if self.temperature is None else self.temperature(sigma.reshape(-1, 1))
        log_p = torch.log_softmax(logits.to(torch.float32) / temp, dim=1)
        if self.posterior == "noisy":
            log_p = clean_posterior(log_p, self.transition, self.inverse).clamp_min(torch.finfo(log_p.dtype).tiny).log()
        w = posterior_weights(log_p, self.transition, observed, check=False)  # the labels were checked before the run
        return cut_weights(w, observed, self.tau, self.pairs)

    def __init__(
        self,
        config: RunConfig,
        dataset: ImageDataset,
        device: torch.device,
        *,
        classifier: torch.nn.Module | None,
        transition: np.ndarray,
        posterior: str,
        temperature: Temperature | None = None,
        posterior_labels: PosteriorLabels | None = None,
        outliers: OutlierRule | None = None,
    ):
        """Take a time-dependent `classifier` (in eval mode), `transition` T [C,C], and the kind of `posterior` that the
        classifier's softmax is: 'clean' P(y | x_t) or 'noisy' P(o | x_t). Without a classifier: S-DSM.

        With `posterior_labels` in place of the observed labels, the weights correct for the noise that those leave.

        `temperature` is the classifier's own, which the configuration's `temp` may replace by a number.
        """
        super().__init__(config, dataset, device, posterior_labels=posterior_labels, outliers=outliers)
        if dataset.labels is None:
            raise dnnlib.UserError(f"{dataset.name}: its labels are vectors, but TDSM needs one class per image")
        check_observed(transition, dataset.labels)
        remaining = transition if posterior_labels is None else posterior_labels.transition()
        self.transition = torch.as_tensor(remaining, dtype=torch.float32, device=device)
        # A drawn class costs no more than another, so none leaves the sum.
        self.one_draw = config.tdsm.others == "sample"
        self.tau, self.pairs = (0.0, None) if self.one_draw else (config.tdsm.tau, config.tdsm.pairs)
        self.posterior = posterior
        auto = config.tdsm.temp in ("auto", None)
        self.temp = 1.0 if auto else config.tdsm.temp  # where there is no temperature by noise level
        self.temperature = temperature if auto else None
        # Only a classifier of noisy labels needs the inverse of T; a T without one is refused before the first step.
        self.inverse = None
        if posterior == "noisy" and classifier is not None:
            self.inverse = torch.as_tensor(inverse_transition(transition), dtype=widest(device), device=device)

        self.classifier = None if classifier is None else classifier.to(device)
        if classifier is None:
            labels = torch.arange(dataset.label_dim)
            shares = torch.as_tensor(class_shares(transition, dataset.labels)).clamp_min(1e-30).log()
            weights = posterior_weights(shares.expand(len(labels), -1), torch.as_tensor(remaining), labels, check=False)
            self.class_weights = weights.nan_to_num().to(device, torch.float32)  # labels that do not occur have none
        elif config.compile:
            self.classifier.compile()
        # The classifier does not cast itself to float16, as the U-Nets do.
        half = config.precision == "fp16" and device.type == "cuda"
        self.classifier_dtype = torch.float16 if half else self.autocast_dtype

        # All passes without gradients have one size where a new size is expensive (compilation, cuDNN's search for
        # algorithms, fragmented memory); their last pass then has empty places.
        share = config.batch_size // distributed.get_world_size()
        self.pass_size = pass_size(min(config.batch_gpu or share, share), dataset.resolution**2, device.type)
        self.fixed_size = config.compile or device.type != "cpu"

    def notes(self) -> list[str]:
        """Say what becomes of the labels, what noise remains, and what the classifier's logits are divided by."""
        lines = super().notes()
        if self.posterior_labels is not None:
            left = 1 - float(self.transition.diagonal().mean())
            lines.append(f"Label noise that remains: {left:.1%} in the mean class.")
        if self.classifier is None:
            lines.append("Weights by class (S-DSM), the same for all images with one label; no classifier is asked.")
        elif self.temperature is not None:
            lines.append(f"The classifier's temperature: {self.temperature}.")
        elif self.config.tdsm.temp in ("auto", None):
            lines.append("The classifier's snapshot records no temperature; its logits stay as they are.")
        return lines

    def draw(self, images: torch.Tensor, generator: torch.Generator) -> dict:
        """Draw what DSM draws, and what decides the drawn class."""
        draws = super().draw(images, generator)
        if self.one_draw:
            draws["other"] = torch.rand(len(images), generator=generator, device=self.device)
        return draws

    def info(self) -> dict[str, Any]:
        """Record the T that the weights correct for, and the kind of posterior."""
        return dict(transition=self.transition.tolist(), posterior=self.posterior)


# The transition matrix.


def known_transition(
    info: dict[str, Any], stated: np.ndarray | None, dataset: ImageDataset, path: str
) -> tuple[np.ndarray, str]:
    """Return T [C,C] and the kind of posterior from the `info` of a classifier's snapshot and from a `stated` T.

    `stated` None: the user stated none. `path` names the snapshot in errors. UserError: the snapshot's record is no
    transition matrix, or the two contradict each other, or neither knows T.
    """
    recorded, posterior = info.get("transition"), info.get("posterior", "noisy")
    if recorded is not None:
        recorded = check_matrix(recorded, dataset.label_dim, name=f"the transition matrix recorded in {path}")
    if posterior not in ("noisy", "clean"):
        raise dnnlib.UserError(f"{path} records the posterior {posterior!r}, expected 'noisy' or 'clean'")
    if recorded is not None and stated is not None and np.abs(np.subtract(recorded, stated)).max() > 1e-3:
        i, j = np.unravel_index(np.abs(np.subtract(recorded, stated)).argmax(), stated.shape)
        raise dnnlib.UserError(
            f"the stated label noise has T[{i},{j}] = {stated[i, j]:.4g}, but {path} was trained with "
            f"{recorded[i][j]:.4g}; leave the label noise out or train a classifier for it"
        )
    if recorded is None and stated is None:
        c = dataset.corruption
        hint = (
            f" (the archive records the noise {c['noise_type']} at rate {c.get('noise_rate')})"
            if c.get("noise_type")
            else ""
        )
        raise dnnlib.UserError(f"{path} was trained without a transition matrix; state the label noise{hint}")
    return np.asarray(stated if recorded is None else recorded), posterior
