"""CORES: find wrong labels with a confidence-regularized sample sieve (docs/methods/sbdc.md, section 1).

Source: Cheng et al., "Learning with Instance-Dependent Label Noise: A Sample Sieve Approach", ICLR 2021.

Notation: f(x) is the classifier's posterior over the C classes, o the observed label, CE(f(x), c) = -ln f(x)_c, and rho
the share of each label among the images that the sieve keeps.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from archives.dataset import ImageDataset
from archives.label_file import LabelFile
from detection.bayes import judge, judge_seen
from detection.classifier import FLOOR, cross_entropies
from detection.quality import ROWS, whole_label_file
from detection.trainer import Progress, Settings, Trainer, TrainingState
from torch_utils import distributed

__all__ = ["detect", "keep", "regularized_loss", "schedule"]

EPOCHS = 60  # length of a run; a shorter one goes through the same phases, each shorter in proportion
WARM_UP, BETA_FROM, BETA_TO = 10, 10, 40  # epochs: sieving starts; beta starts to rise; beta has risen to BETA
BETA = 2.0  # weight of the confidence regularizer
# So many images are learned by heart. F1 on 1,797 digits: 0.986 if the posterior counts as having seen the labels,
# 0.971 if not (asymmetric noise: 0.963 and 0.909); on 60,000 images of Fashion-MNIST: 0.914 and 0.935.
BY_HEART = 10_000


def regularized_loss(log_probs: torch.Tensor, observed: torch.Tensor, rho: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the loss of each image, CE(f(x), o) - beta E_{c~rho} CE(f(x), c), shape [N] (eq. 3).

    The second term rewards confident predictions. `log_probs` [N,C] are ln f(x), `observed` int64 [N], `rho` [C].
    """
    ce = cross_entropies(log_probs)
    return ce.gather(1, observed[:, None])[:, 0] - beta * (ce @ rho)


def keep(log_probs: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
    """Return which images the sieve keeps, bool [N]: those with CE(f(x), o) <= mean_c CE(f(x), c)."""
    ce = cross_entropies(log_probs)
    return ce.gather(1, observed[:, None])[:, 0] <= ce.mean(dim=1)


def schedule(epoch: int, epochs: int) -> tuple[float, bool]:
    """Return beta, and whether to sieve, in `epoch`, which counts from 0 to `epochs` - 1.

    In a run of 60 epochs beta is 0 for 10 epochs, rises to 2 over the next 30 and stays there; sieving starts after 10.
    """
    e = epoch * max(EPOCHS / epochs, 1)
    return BETA * min(max((e - BETA_FROM) / (BETA_TO - BETA_FROM), 0), 1), e >= WARM_UP


def detect(dataset: ImageDataset, device: torch.device, settings: Settings) -> tuple[LabelFile, torch.nn.Module]:
    """Train a classifier with the sieve; return the label file that follows from its posterior, and the classifier.

    Each epoch trains on the images that `keep` keeps by the posterior of the EMA after the epoch before. The result is
    the mean posterior of all epochs with beta >= 1. Up to `BY_HEART` images it counts their labels already
    (`judge_seen`); with more, these are evidence beside it (`judge`). Both are stricter than `keep`, which also accepts
    a label that is only the second most probable one. Asymmetric noise consists of such labels.
    """
    epochs = settings.epochs or EPOCHS
    trainer, n = Trainer(dataset, device, settings), len(dataset)
    kept, own = torch.ones(n, dtype=torch.bool, device=device), distributed.share(n)
    labels = trainer.labels[own.start : own.stop].split(ROWS)
    log_probs = torch.empty(0)  # of this process's share; only one such table and their mean have room
    mean, averaged = torch.zeros([len(own), dataset.label_dim], device=device), 0
    state, first = TrainingState("cores", dataset, settings), 0
    if found := state.load():
        first, averaged = found["epoch"], found["averaged"]
        trainer.load_state_dict(found["trainer"])
        distributed.rows_from_rank0(found["table"], mean, n)
        log_probs = trainer.posterior()
    progress = Progress("cores", epochs, first)
    for epoch in range(first, epochs):
        beta, sieving = schedule(epoch, epochs)
        if sieving:  # never in the first epoch
            # One process decides about each image, since GPUs may round differently: all train on the same images.
            decided = torch.cat([keep(*rows) for rows in zip(log_probs.split(ROWS), labels, strict=True)])
            kept = torch.cat(distributed.all_gather_object(decided.cpu())).to(device)
        rho = torch.bincount(trainer.labels[kept], minlength=dataset.label_dim) / kept.sum()
        loss = partial(regularized_loss, rho=rho, beta=beta)
        del log_probs
        trainer.epoch(epoch, kept.nonzero()[:, 0].cpu().numpy(), loss, progress.advance)
        log_probs = trainer.posterior()
        if beta >= BETA / 2 or epoch == epochs - 1:
            averaged += 1
            for total, rows in zip(mean.split(ROWS), log_probs.split(ROWS), strict=True):
                total += rows.exp()
        progress.end_epoch(int(kept.sum()), f"beta {beta:.2f}  kept {kept.float().mean():.1%}")
        if state.due():
            values = dict(epoch=epoch + 1, averaged=averaged, trainer=trainer.state_dict())
            state.save(values, distributed.rows_to_rank0(mean, n))
    trainer.close()
    rule = judge_seen if n <= BY_HEART else judge
    return whole_label_file(dataset, mean.div_(averaged).clamp_min_(math.exp(FLOOR)).log_(), rule), trainer.ema
