"""Ask a trained classifier which class each image has, and find wrong labels by its answer."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch

import dnnlib
from archives.classes import check_number
from archives.dataset import ImageDataset, to_float
from archives.label_file import LabelFile
from archives.label_noise import inverse_transition
from archives.workers import ordered_map
from detection.bayes import judge
from detection.quality import label_file, whole_label_file
from torch_utils import distributed
from training.augment import shift_images
from training.noise_levels import LOWEST_SIGMA
from training.objectives.tdsm import clean_posterior
from training.temperature import Temperature
from training.transition_estimate import estimate_transition

__all__ = [
    "check_labels",
    "clean_sigma",
    "cross_entropies",
    "detect",
    "from_noisy",
    "log_posterior",
    "make_snapshot",
]

FLOOR = math.log(1e-8)  # of log-probabilities: without it, the loss of CORES has no lower bound
READ = 512  # images in a batch
SAMPLE = 8192  # images that choose a temperature


def check_labels(dataset: ImageDataset) -> None:
    """Raise UserError unless each image has a class label, of at least two classes, but not more than images."""
    if dataset.labels is None or dataset.label_dim < 2:
        raise dnnlib.UserError(f"{dataset.path}: has no class labels, one per image, of at least 2 classes")
    check_number(dataset.label_dim, dataset.num_raw, dataset.class_names, dataset.path)


def cross_entropies(log_probs: torch.Tensor) -> torch.Tensor:
    """Return CE(f(x), c) = -ln f(x)_c for every class c, at most -ln 1e-8. Both shapes are [N,C]."""
    return -log_probs.clamp_min(FLOOR)


def clean_sigma(x: torch.Tensor) -> torch.Tensor:
    """Return the noise level [N] at which a time-dependent classifier sees images without noise: the lowest one."""
    return torch.full([len(x)], LOWEST_SIGMA, device=x.device)


@torch.no_grad()
def log_posterior(
    net: torch.nn.Module,
    dataset: ImageDataset,
    device: torch.device,
    items: np.ndarray | None = None,
    reach: int = 0,
) -> torch.Tensor:
    """Return the log-probabilities [n,C] that `net`, in eval mode, gives this process's share of the images `items`.

    Without `items`, it is the share of all images. With `reach`, the probabilities are the mean over all shifts of an
    image by up to so many pixels. With many images and classes, the table of all is too large for every process;
    `distributed.rows_to_rank0` puts it together.
    """
    shifts = torch.tensor(list(itertools.product(range(-reach, reach + 1), repeat=2)), device=device)
    items = np.arange(len(dataset)) if items is None else items
    own = np.asarray(items)[distributed.share(len(items))]
    table = torch.empty([len(own), dataset.label_dim], device=device)
    parts = np.split(own, range(READ, len(own), READ))
    for rows, images in zip(table.split(READ), ordered_map(dataset.images, parts, workers=2), strict=True):
        x = to_float(images.to(device))
        views = [shift_images(x, shift.expand(len(x), 2)) for shift in shifts] if reach else [x]
        log_probs = torch.stack([torch.log_softmax(net(view, clean_sigma(view)), dim=1) for view in views])
        rows.copy_(log_probs.logsumexp(dim=0) - math.log(len(views)))
    return table


def detect(net: torch.nn.Module, posterior: str, dataset: ImageDataset, device: torch.device) -> LabelFile:
    """Return the label file that follows from the posterior of the classifier `net`.

    `posterior` says what the classifier estimates: the probability of the 'clean' class or of the 'noisy' label. A
    noisy posterior q becomes the clean posterior p by solving T^T p = q. Collective.
    """
    table = log_posterior(net.to(device), dataset, device)
    if posterior == "clean":
        return whole_label_file(dataset, table)
    log_probs = distributed.rows_to_rank0(table, len(dataset))
    return distributed.from_rank0(lambda: from_noisy(dataset, log_probs))


def from_noisy(dataset: ImageDataset, log_probs: torch.Tensor, T: np.ndarray | None = None) -> LabelFile:
    """Return the label file that follows from a noisy log-posterior [N,C], whose place the clean one takes.

    `T` [C,C]: None for the T of the anchor points. Without a usable inverse of T, the noisy posterior stands for the
    clean one, and a warning says so.
    """
    if T is None:
        T = estimate_transition(log_probs.numpy(), dataset.labels)
    try:
        inverse = inverse_transition(T)
    except dnnlib.UserError as e:
        print(f"Warning: the labels are judged by the noisy posterior: {e.message}")
    else:
        for rows in log_probs.split(READ):  # in place: there is no room for a second table
            rows.copy_(clean_posterior(rows, T, inverse).log())
    return label_file(dataset, judge(log_probs.numpy(), dataset.labels, T))


def make_snapshot(
    net: torch.nn.Module, found: LabelFile, dataset: ImageDataset, device: torch.device
) -> dict[str, Any]:
    """Return the snapshot of a detector's classifier, with all that judging the label of any image needs. Collective.

    Its temperature is the one at which its answers state the rate of wrong labels that T implies, as
    `detection.bayes.judge` chooses it.
    """
    items = np.sort(np.random.default_rng(0).permutation(len(dataset))[:SAMPLE])
    log_probs = distributed.rows_to_rank0(log_posterior(net, dataset, device, items), len(items))
    temp = distributed.from_rank0(lambda: judge(log_probs.numpy(), dataset.labels[items], found.transition).temp)
    info = dict(method="detector", posterior="clean", class_names=dataset.class_names, version=dnnlib.__version__)
    info |= dict(transition=found.transition.tolist(), noise_rates=found.per_class_noise_rate.tolist())
    info |= dict(temperature=Temperature((math.log(temp),), LOWEST_SIGMA, LOWEST_SIGMA).plain())
    return dict(ema=net, loss_fn=None, augment_pipe=None, dataset_kwargs=dataset.kwargs(), info=info)
