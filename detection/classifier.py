"""Ask a trained classifier which class each image has, and find wrong labels by its answer."""

from __future__ import annotations

import math

import numpy as np
import torch

import dnnlib
from archives.dataset import ImageDataset, to_float
from archives.label_file import LabelFile
from archives.label_noise import inverse_transition
from archives.workers import ordered_map
from detection.quality import confusion, whole_label_file
from torch_utils import distributed
from training.noise_levels import LOWEST_SIGMA
from training.objectives.tdsm import clean_posterior

__all__ = ["check_labels", "clean_sigma", "cross_entropies", "detect", "log_posterior"]

FLOOR = math.log(1e-8)  # of log-probabilities: without it, the loss of CORES has no lower bound
READ = 512  # images in a batch


def check_labels(dataset: ImageDataset) -> None:
    """Raise UserError unless each image has a class label and there are at least two classes."""
    if dataset.labels is None or dataset.label_dim < 2:
        raise dnnlib.UserError(f"{dataset.path}: has no class labels, one per image, of at least 2 classes")


def cross_entropies(log_probs: torch.Tensor) -> torch.Tensor:
    """Return CE(f(x), c) = -ln f(x)_c for every class c, at most -ln 1e-8. Both shapes are [N,C]."""
    return -log_probs.clamp_min(FLOOR)


def clean_sigma(x: torch.Tensor) -> torch.Tensor:
    """Return the noise level [N] at which a time-dependent classifier sees images without noise: the lowest one."""
    return torch.full([len(x)], LOWEST_SIGMA, device=x.device)


@torch.no_grad()
def log_posterior(
    net: torch.nn.Module, dataset: ImageDataset, device: torch.device, items: np.ndarray | None = None
) -> torch.Tensor:
    """Return the log-probabilities [n,C] that `net`, in eval mode, gives this process's share of the images `items`.

    Without `items`, it is the share of all images. With many images and classes, the table of all is too large for
    every process; `distributed.rows_to_rank0` puts it together.
    """
    items = np.arange(len(dataset)) if items is None else items
    own = np.asarray(items)[distributed.share(len(items))]
    table = torch.empty([len(own), dataset.label_dim], device=device)
    parts = np.split(own, range(READ, len(own), READ))
    for rows, images in zip(table.split(READ), ordered_map(dataset.images, parts, workers=2), strict=True):
        x = to_float(images.to(device))
        rows.copy_(torch.log_softmax(net(x, clean_sigma(x)), dim=1))
    return table


def detect(net: torch.nn.Module, posterior: str, dataset: ImageDataset, device: torch.device) -> LabelFile:
    """Return the label file that follows from the posterior of the classifier `net`.

    `posterior` says what the classifier estimates: the probability of the 'clean' class or of the 'noisy' label. A
    noisy posterior q becomes the clean posterior p by solving T^T p = q. The transition T is counted: of the images
    with the same most probable class, the share that is observed as each label. Collective. Raises UserError when T has
    no usable inverse.
    """
    table = log_posterior(net.to(device), dataset, device).cpu()
    if posterior == "noisy":
        classes = np.concatenate(distributed.all_gather_object(table.argmax(dim=1).numpy()))
        transition = confusion(classes, dataset)
        inverse = inverse_transition(transition)
        for rows in table.split(READ):  # in place: there is no room for a second table
            rows.copy_(clean_posterior(rows, transition, inverse))
    else:
        table.exp_()
    return whole_label_file(dataset, table)
