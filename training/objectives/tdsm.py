"""Transition-aware weighted denoising score matching (tdsm.md; Na et al., ICLR 2024)."""

from __future__ import annotations

import numpy as np
import torch

import dnnlib
from torch_utils.training_stats import Stats
from training.dataset import ImageDataset
from training.objectives.dsm import DSM
from training.transition import (
    check_matrix,
    check_observed,
    clean_posterior,
    cut_weights,
    inverse_transition,
    posterior_weights,
)

__all__ = ["TDSM"]


class TDSM(DSM):
    """lambda ||w_o D(x_t; o) + sum_{c != o, w_c > tau} w_c sg[D(x_t; c)] - y||^2, w_c = P(c | x_t, o) (tdsm.md).

    `classifier`: time-dependent classifier (eval mode); `transition`: T [C,C]; `posterior`: what the classifier's
    softmax is, 'clean' P(y|x_t) or 'noisy' P(o|x_t).
    """

    method = "tdsm"

    def __init__(
        self,
        config: dict,
        dataset: ImageDataset,
        device: torch.device,
        *,
        classifier: torch.nn.Module,
        transition: np.ndarray,
        posterior: str,
    ):
        if dataset.labels is None:
            raise dnnlib.UserError(f"{dataset.name}: its labels are vectors, but TDSM needs one class an image")
        check_observed(transition, dataset.labels)
        # The inverse only serves classifiers of noisy labels; whether there is one is checked before the first step.
        self.inverse = torch.as_tensor(inverse_transition(transition)) if posterior == "noisy" else None
        self.transition = torch.as_tensor(transition, dtype=torch.float32, device=device)
        self.posterior, self.tau, self.temp = posterior, config["tdsm"]["tau"], config["tdsm"]["temp"]
        super().__init__(config, dataset, device)
        self.classifier = classifier.to(device)

    @torch.no_grad()
    def weights(
        self, x: torch.Tensor, sigma: torch.Tensor, observed: torch.Tensor, augment_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """w [n,C] = P(y | x_t, o) by Bayes' rule, entries at most tau dropped, the observed label's kept."""
        augment_labels = augment_labels if self.classifier.augment_dim else None
        with self.precision():
            logits = self.classifier(x, sigma.flatten(), augment_labels=augment_labels)
        log_p = torch.log_softmax(logits.to(torch.float32) / self.temp, dim=1)
        if self.posterior == "noisy":
            log_p = clean_posterior(log_p, self.transition, self.inverse).clamp_min(torch.finfo(log_p.dtype).tiny).log()
        return cut_weights(posterior_weights(log_p, self.transition, observed), observed, self.tau)

    def combine(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor,
        augment_labels: torch.Tensor | None,
        stats: Stats,
    ) -> torch.Tensor:
        observed = labels.argmax(dim=1)
        w = self.weights(x, sigma, observed, augment_labels)
        own = w.gather(1, observed[:, None])
        others = w.scatter(1, observed[:, None], 0)
        image, label = others.nonzero(as_tuple=True)  # the surviving (image, class) pairs, one flat list
        stats.add("TDSM/pairs_per_image", (others > 0).sum(dim=1))
        stats.add("TDSM/observed_weight", own)
        stats.add("TDSM/corrected", (w.argmax(dim=1) != observed).float())

        denoised = super().combine(x, sigma, labels, augment_labels, stats) * own[:, :, None, None]
        rest = torch.zeros_like(denoised)
        with torch.no_grad(), self.trained["net"].gathered():   # every process has its own number of pairs
            for i, c in zip(image.split(len(x)), label.split(len(x)), strict=True):
                onehot = torch.nn.functional.one_hot(c, labels.shape[1]).to(labels.dtype)
                part = self.trained["net"].net(
                    x[i], sigma[i], onehot, augment_labels=None if augment_labels is None else augment_labels[i]
                )
                rest.index_add_(0, i, part * others[i, c][:, None, None, None])
        return denoised + rest

    def info(self) -> dict:
        return dict(transition=self.transition.tolist(), posterior=self.posterior)


def check_classifier(classifier: torch.nn.Module, dataset: ImageDataset, path: str) -> None:
    """Raise UserError unless classifier and data agree in resolution, channels and classes."""
    theirs = (classifier.img_resolution, classifier.img_channels, classifier.label_dim)
    ours = (dataset.resolution, dataset.num_channels, dataset.label_dim)
    for name, a, b in zip(("resolution", "number of channels", "number of classes"), theirs, ours, strict=True):
        if a != b:
            raise dnnlib.UserError(
                f"--cls: the {name} of {path} is {a}, of {dataset.name} {b}; train the classifier on this data set"
            )


def known_transition(info: dict, stated: np.ndarray | None, dataset: ImageDataset, path: str) -> tuple[np.ndarray, str]:
    """T [C,C] and the posterior's kind from a classifier snapshot's info and from the options (None: not given).

    Raises UserError when the two contradict each other, or when neither knows T.
    """
    recorded, posterior = info.get("transition"), info.get("posterior", "noisy")
    if recorded is not None:
        recorded = check_matrix(recorded, dataset.label_dim, name=f"--cls: the transition matrix recorded in {path}")
    if posterior not in ("noisy", "clean"):
        raise dnnlib.UserError(f"--cls: {path} records the posterior {posterior!r}, expected 'noisy' or 'clean'")
    if recorded is not None and stated is not None and np.abs(np.subtract(recorded, stated)).max() > 1e-3:
        i, j = np.unravel_index(np.abs(np.subtract(recorded, stated)).argmax(), stated.shape)
        raise dnnlib.UserError(
            f"--noise_type: T[{i},{j}] = {stated[i, j]:.4g} by the options, but {path} was trained with "
            f"{recorded[i][j]:.4g}; leave the options out or train a classifier for them"
        )
    if recorded is None and stated is None:
        c = dataset.corruption
        hint = (
            f" (the archive says --noise_type={c['noise_type']} --noise_rate={c.get('noise_rate')})"
            if c.get("noise_type")
            else ""
        )
        raise dnnlib.UserError(
            f"--noise_type: {path} was trained without a transition matrix; state the label noise{hint}"
        )
    return np.asarray(stated if recorded is None else recorded), posterior
