"""Find wrong labels with a classifier that a loss between cross entropy and absolute error makes robust.

    L(x, o) = (1 - f_o(x)^q) / q

f(x): the classifier's posterior over the C classes; o: the observed label. For q near 0 this is the cross entropy, for
q = 1 the absolute error, which pays little attention to labels that the classifier contradicts. Such labels are mostly
wrong ones, so the classifier learns the clean classes.

Source: Zhang & Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels", NeurIPS
2018, eq. 6. How long training takes is ours.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from archives.dataset import ImageDataset
from archives.label_file import LabelFile
from detection.quality import whole_label_file
from detection.trainer import Progress, Settings, Trainer, TrainingState
from torch_utils import distributed
from training.calibration import mean_log_likelihood
from training.transition_estimate import estimate_transition

__all__ = ["HELD_OUT", "PATIENCE", "PROGRESS", "detect", "held_out_likelihood", "robust_loss"]

Q = 0.7  # the paper's
HELD_OUT = 0.1  # share of the images that only decide how long the others train
ROUND = 15_000  # images that are seen between two decisions, and at least one epoch
EPOCHS, IMAGES = 12, 300_000  # how long training takes at most: the longer of the two
PATIENCE = 3  # rounds without progress, after which training stops
REACH = 1  # pixels: the posterior is the mean over so small shifts, as training has shown them, too
PROGRESS = 1e-3  # nats per held-out label


def robust_loss(log_probs: torch.Tensor, observed: torch.Tensor, q: float = Q) -> torch.Tensor:
    """Return (1 - f_o^q) / q of each image, [N], from log-probabilities ln f [N,C] and observed labels int64 [N]."""
    return -torch.expm1(q * log_probs.gather(1, observed[:, None])[:, 0]) / q


def detect(dataset: ImageDataset, device: torch.device, settings: Settings) -> tuple[LabelFile, torch.nn.Module]:
    """Train a classifier with the robust loss; return the label file that follows by Bayes' rule, and the classifier.

    Without `settings.epochs`, a tenth of the images is held out, and training stops when their labels get no more
    likely through T for `PATIENCE` rounds. The weights of the best round are kept.
    """
    trainer, n = Trainer(dataset, device, settings), len(dataset)
    per_round, epochs, held_out = 1, settings.epochs, np.empty(0, dtype=np.int64)
    if epochs is None:
        seen = max(n, settings.batch)  # by an epoch, which has one step at least
        per_round, epochs = math.ceil(ROUND / seen), max(EPOCHS, math.ceil(IMAGES / seen))
        held_out = np.random.default_rng([settings.seed, 2]).permutation(n)[: math.ceil(HELD_OUT * n)]
    items = np.setdiff1d(np.arange(n), held_out)
    state, epoch, best, weights, since = TrainingState("gce", dataset, settings), 0, -math.inf, None, 0
    if found := state.load():
        epoch, best, weights, since = (found[name] for name in ("epoch", "best", "weights", "since"))
        trainer.load_state_dict(found["trainer"])
    progress = Progress("gce", epochs, epoch)
    while epoch < epochs and since < PATIENCE:
        for _ in range(min(per_round, epochs - epoch)):
            trainer.epoch(epoch, items, robust_loss, progress.advance)
            epoch += 1
            progress.end_epoch(len(items), "" if weights is None else f"held-out labels {best:.3f} nats")
        if len(held_out):
            value, since = likelihood(trainer, dataset.labels, held_out), since + 1
            if value > best + PROGRESS:
                best, since = value, 0
                weights = {name: tensor.clone() for name, tensor in trainer.ema.state_dict().items()}
        if state.due():
            state.save(dict(epoch=epoch, best=best, weights=weights, since=since, trainer=trainer.state_dict()))
    progress.close()
    if weights is not None:
        trainer.ema.load_state_dict(weights)
    log_probs = trainer.posterior(reach=REACH)
    trainer.close()
    return whole_label_file(dataset, log_probs), trainer.ema


def likelihood(trainer: Trainer, labels: np.ndarray, held_out: np.ndarray) -> float:
    """Return the mean of ln P(o | x) over held-out images, in nats, with the T of their anchor points. Collective."""
    table = distributed.rows_to_rank0(trainer.posterior(held_out), len(held_out))
    return distributed.from_rank0(lambda: held_out_likelihood(table, labels[held_out]))


def held_out_likelihood(log_probs: torch.Tensor, observed: np.ndarray) -> float:
    """Return the mean of ln P(o | x), in nats, of observed labels [n] by a log-posterior [n,C] and its anchors' T."""
    T = torch.from_numpy(estimate_transition(log_probs.numpy(), observed))
    return float(mean_log_likelihood(log_probs, torch.from_numpy(observed), T))
