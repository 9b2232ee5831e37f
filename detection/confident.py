"""Confident learning: find wrong labels with the package cleanlab (docs/methods/sbdc.md, section 1).

Source: Northcutt et al., "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 2021.
"""

from __future__ import annotations

import numpy as np
import torch

import dnnlib
from archives.dataset import ImageDataset
from archives.label_file import LabelFile
from archives.label_noise import inverse_transition, row_stochastic
from detection.classifier import cross_entropies
from detection.quality import ROWS, from_rank0, label_file
from detection.trainer import Progress, Settings, Trainer
from torch_utils import distributed
from training.objectives.tdsm import clean_posterior

__all__ = ["detect", "out_of_fold_posterior"]

FOLDS, EPOCHS = 5, 20  # the parts that the images are split into; the epochs that each classifier is trained for


def out_of_fold_posterior(dataset: ImageDataset, device: torch.device, settings: Settings) -> np.ndarray | None:
    """Return noisy posteriors, float64 [N,C], each from a classifier that has not seen the image; None beside rank 0.

    One classifier per part of the images is trained, on the labels as they are, on the images of all other parts.
    """
    epochs = settings.epochs or EPOCHS
    order = np.random.default_rng(settings.seed).permutation(len(dataset))
    folds = np.array_split(order, min(FOLDS, len(dataset)))
    probs = np.empty([len(dataset), dataset.label_dim]) if distributed.get_rank() == 0 else None
    progress = Progress("confident", epochs * len(folds))
    for i, held_out in enumerate(folds):
        trainer, rest = Trainer(dataset, device, settings, stream=i), np.setdiff1d(order, held_out)
        for epoch in range(epochs):
            trainer.epoch(epoch, rest, cross_entropy, progress.advance)
            progress.end_epoch(f"fold {i + 1}/{len(folds)}")
        found = distributed.rows_to_rank0(trainer.posterior(held_out).exp_(), len(held_out))
        if probs is not None:
            probs[held_out] = found.numpy()
        trainer.close()
    return probs


def cross_entropy(log_probs: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
    """Return -ln f(x)_o of each image, [N], from log-probabilities [N,C] and observed labels [N]."""
    return cross_entropies(log_probs).gather(1, observed[:, None])[:, 0]


def detect(dataset: ImageDataset, device: torch.device, settings: Settings) -> LabelFile:
    """Return the label file that cleanlab's decisions on out-of-fold posteriors make.

    `is_clean` comes from cleanlab's filter by noise rate, `transition` from its latent estimate. `score` is the label's
    clean posterior, computed with the inverse of that transition; without a usable inverse it is the noisy posterior,
    and a warning says so. The suggestion for a wrong label is the most probable other class. Raises UserError when
    cleanlab is not installed.
    """
    try:
        from cleanlab.count import compute_confident_joint, estimate_latent  # optional dependency
        from cleanlab.filter import find_label_issues
    except ImportError:
        raise dnnlib.UserError("confident learning needs the package cleanlab: pip install cleanlab") from None
    probs = out_of_fold_posterior(dataset, device, settings)

    def decide() -> LabelFile:
        joint = compute_confident_joint(dataset.labels, probs)
        _, given, _ = estimate_latent(joint, dataset.labels)  # P(observed = row | clean = column)
        is_clean = ~find_label_issues(dataset.labels, probs, confident_joint=joint, n_jobs=1)
        transition = row_stochastic(np.nan_to_num(given.T))  # NaN: a class that no image seems to have
        try:
            inverse = inverse_transition(transition)
        except dnnlib.UserError as e:
            print(f"Warning: the scores are those of the noisy posterior: {e.message}")
        else:
            for rows in torch.from_numpy(probs).split(ROWS):  # in place: there is no room for a second table
                rows.copy_(clean_posterior(rows.log(), transition, inverse))
        return label_file(dataset, probs, is_clean, transition)

    return from_rank0(decide)
