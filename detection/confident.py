"""Confident learning: find wrong labels with the package cleanlab (docs/methods/sbdc.md, section 1).

Source: Northcutt et al., "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 2021.
"""

from __future__ import annotations

import numpy as np
import torch

import dnnlib
from archives.dataset import ImageDataset
from archives.label_file import LabelFile
from archives.label_noise import row_stochastic
from detection.classifier import cross_entropies, from_noisy
from detection.trainer import Progress, Settings, Trainer, TrainingState
from torch_utils import distributed

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
    state, done = TrainingState("confident", dataset, settings), 0  # epochs, of all classifiers
    if found := state.load():
        done = found["done"]
        if probs is not None:
            probs[:] = found["table"].numpy()
    progress = Progress("confident", epochs * len(folds), done)
    for i, held_out in enumerate(folds):
        if done >= epochs * (i + 1):
            continue
        trainer, rest = Trainer(dataset, device, settings, stream=i), np.setdiff1d(order, held_out)
        if done > epochs * i:
            trainer.load_state_dict(found["trainer"])
        while done < epochs * (i + 1):
            if done > epochs * i and state.due():
                table = None if probs is None else torch.from_numpy(probs)
                state.save(dict(done=done, trainer=trainer.state_dict()), table)
            trainer.epoch(done - epochs * i, rest, cross_entropy, progress.advance)
            progress.end_epoch(len(rest), f"fold {i + 1}/{len(folds)}")
            done += 1
        rows = distributed.rows_to_rank0(trainer.posterior(held_out).exp_(), len(held_out))
        if probs is not None:
            probs[held_out] = rows.numpy()
        trainer.close()
    return probs


def cross_entropy(log_probs: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
    """Return -ln f(x)_o of each image, [N], from log-probabilities [N,C] and observed labels [N]."""
    return cross_entropies(log_probs).gather(1, observed[:, None])[:, 0]


def detect(dataset: ImageDataset, device: torch.device, settings: Settings) -> LabelFile:
    """Return the label file that follows by Bayes' rule from out-of-fold posteriors and cleanlab's estimate of T.

    Raises UserError when cleanlab is not installed.
    """
    try:
        from cleanlab.count import compute_confident_joint, estimate_latent  # optional dependency
    except ImportError:
        raise dnnlib.UserError("confident learning needs the package cleanlab: pip install cleanlab") from None
    probs = out_of_fold_posterior(dataset, device, settings)

    def decide() -> LabelFile:
        joint = compute_confident_joint(dataset.labels, probs)
        _, given, _ = estimate_latent(joint, dataset.labels)  # P(observed = row | clean = column)
        transition = row_stochastic(np.nan_to_num(given.T))  # NaN: a class that no image seems to have
        return from_noisy(dataset, torch.from_numpy(probs).log_(), transition)

    return distributed.from_rank0(decide)
