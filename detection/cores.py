"""Finding wrong labels (sbdc.md, section 1): the confidence-regularised sample sieve, and confident learning.

Both train the noise-level-conditional ResNet at its lowest sigma, on the images as they are, and end with a posterior
over the clean classes of each image.
CORES: Cheng et al., "Learning with Instance-Dependent Label Noise: A Sample Sieve Approach", ICLR 2021.
Confident learning: Northcutt et al., "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 2021.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import dnnlib
from archives.dataset import BatchStream, ImageDataset, to_float
from archives.label_file import LabelFile, class_noise_rates
from archives.reader import ordered_map
from torch_utils import distributed, misc
from training.augment import draw_shifts, shift_images
from training.label_weights import clean_posterior
from training.networks_resnet import Classifier, resnet_kwargs
from training.noise_levels import LOWEST_SIGMA
from training.trained_network import TrainedNetwork, linear_rampup

__all__ = [
    "Settings",
    "confident",
    "cores",
    "describe",
    "from_classifier",
    "keep",
    "quality",
    "regularised_loss",
    "schedule",
]

WARM_UP, BETA_FROM, BETA_TO, EPOCHS = 10, 10, 40, 60  # epochs; runs shorter than EPOCHS shrink all of them alike
BETA = 2.0
FLOOR = math.log(1e-8)  # of log-probabilities: -beta E CE has no lower bound otherwise
DROPOUT, SHIFT = 0.3, 0.125  # shift: share of the image size
FOLDS, FOLD_EPOCHS = 5, 20
TABLE = 20  # classes up to which tables are printed in full


@dataclass
class Settings:
    """How a detector's classifier is trained. `epochs` None: 60 for the sieve, 20 a fold for confident learning."""

    arch: str = "ddpmpp"
    epochs: int | None = None
    batch: int = 256  # over all processes
    lr: float = 2e-3
    seed: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# The sieve's three formulas.


def cross_entropies(log_probs: torch.Tensor) -> torch.Tensor:
    """CE(f(x), c) for every class c, [N,C], at most -ln 1e-8."""
    return -log_probs.clamp_min(FLOOR)


def regularised_loss(log_probs: torch.Tensor, observed: torch.Tensor, rho: torch.Tensor, beta: float) -> torch.Tensor:
    """CE(f(x), o) - beta E_{c~rho} CE(f(x), c), [N] (CORES, eq. 3). `log_probs` [N,C], `observed` [N], `rho` [C]."""
    ce = cross_entropies(log_probs)
    return ce.gather(1, observed[:, None])[:, 0] - beta * (ce @ rho)


def keep(log_probs: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
    """Which images the sieve keeps, bool [N]: CE(f(x), o) <= mean_c CE(f(x), c)."""
    ce = cross_entropies(log_probs)
    return ce.gather(1, observed[:, None])[:, 0] <= ce.mean(dim=1)


def schedule(epoch: int, epochs: int) -> tuple[float, bool]:
    """(beta, whether to sieve) of epoch 0 .. epochs - 1: beta is 0 for 10 epochs, rises to 2 over 30, stays; sieving
    starts after 10. A run of fewer than 60 epochs goes through the same phases, each shorter in proportion."""
    e = epoch * max(EPOCHS / epochs, 1)
    return BETA * min(max((e - BETA_FROM) / (BETA_TO - BETA_FROM), 0), 1), e >= WARM_UP


# ---------------------------------------------------------------------------------------------------------------------
# The classifier.


class Trainer:
    """A classifier in training on images at the lowest sigma, shifted at random; `posterior` asks its EMA.

    The global batch's shifts come from (seed, images seen); so does its order: the number of processes changes dropout
    and rounding only.
    """

    def __init__(self, dataset: ImageDataset, device: torch.device, settings: Settings, stream: int = 0):
        self.dataset, self.device, self.batch = dataset, device, settings.batch
        self.seed = misc.step_seed(settings.seed, 0, stream)
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.labels = torch.from_numpy(dataset.labels).to(device)
        self.nimg = 0
        torch.manual_seed(misc.step_seed(self.seed, 0, 0, stream=1))
        kwargs = resnet_kwargs(settings.arch, dataset.resolution, dataset.num_channels, dataset.label_dim)
        net = Classifier(dataset.resolution, dataset.num_channels, dataset.label_dim, dropout=DROPOUT, **kwargs)
        n = len(dataset)
        self.trained = TrainedNetwork(net, device, lr=settings.lr, lr_factor=linear_rampup(n / 2), ema_halflife=4 * n)

    def epoch(self, number: int, items: np.ndarray, rho: torch.Tensor, beta: float, advance: Callable) -> None:
        """One pass over the images `items`, in an order of its own; `advance(share)` after each step."""
        share = self.batch // self.world
        stream = BatchStream(
            self.dataset,
            share,
            self.rank,
            self.world,
            seed=misc.step_seed(self.seed, 0, number, 4),
            device=self.device,
            indices=items,
        )
        steps = max(round(len(items) / self.batch), 1)
        for step in range(steps):
            images, onehot = next(stream)
            torch.manual_seed(misc.step_seed(self.seed, self.rank, self.nimg, stream=2))  # dropout's
            generator = misc.step_generator(self.seed, 0, self.nimg, self.device, stream=3)
            x = to_float(images)
            shifts = draw_shifts(self.batch, SHIFT, x.shape[-1], generator, self.device)
            if shifts is not None:
                x = shift_images(x, shifts[self.rank * share : (self.rank + 1) * share])
            with self.trained.accumulate(last=True):
                log_probs = torch.log_softmax(self.trained.forward(x, sigma_of(x)), dim=1)
                regularised_loss(log_probs, onehot.argmax(dim=1), rho, beta).mean().backward()
            self.trained.update(self.nimg, self.batch)
            self.nimg += self.batch
            advance((step + 1) / steps)
        stream.close()

    def posterior(self, items: np.ndarray | None = None) -> torch.Tensor:
        """Log-probabilities of the EMA for the images `items` (None: all), [n,C]."""
        return posterior(self.trained.ema, self.dataset, self.device, items)


def sigma_of(x: torch.Tensor) -> torch.Tensor:
    return torch.full([len(x)], LOWEST_SIGMA, device=x.device)


@torch.no_grad()
def posterior(
    net: torch.nn.Module, dataset: ImageDataset, device: torch.device, items: np.ndarray | None = None
) -> torch.Tensor:
    """Log-probabilities [n,C] of a classifier in eval mode for images at the lowest sigma; shared among processes."""
    items = np.arange(len(dataset)) if items is None else items
    own = np.array_split(np.arange(len(items)), distributed.get_world_size())[distributed.get_rank()]
    table = torch.zeros([len(items), dataset.label_dim], device=device)
    parts = np.split(own, range(512, len(own), 512))
    for part, images in zip(parts, ordered_map(lambda p: dataset.images(items[p]), parts, workers=2), strict=True):
        x = to_float(images.to(device))
        table[torch.from_numpy(part).to(device)] = torch.log_softmax(net(x, sigma_of(x)), dim=1)
    return distributed.all_reduce_sum(table)


class Progress:
    """A bar with the time left, on terminals, and a line a tenth of the way."""

    def __init__(self, name: str, epochs: int):
        self.start, self.epochs, self.done, self.line = time.time(), epochs, 0.0, max(epochs // 10, 1)
        hidden = None if distributed.get_rank() == 0 else True
        self.bar = tqdm(
            total=1000 * epochs,
            desc=name,
            disable=hidden,
            leave=False,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} left {remaining}",
        )

    def advance(self, share: float) -> None:
        """`share` of the current epoch is done."""
        self.bar.update(int(1000 * (int(self.done) + share)) - self.bar.n)

    def end_epoch(self, text: str) -> None:
        self.done += 1
        if int(self.done) % self.line == 0 or self.done == self.epochs:
            elapsed = time.time() - self.start
            left = elapsed * (self.epochs - self.done) / self.done
            self.bar.clear()
            distributed.print0(
                f"epoch {int(self.done)}/{self.epochs}  {text}  time {dnnlib.format_time(elapsed)}  "
                f"left {dnnlib.format_time(left)}",
                flush=True,
            )
        if self.done == self.epochs:
            self.bar.close()


# ---------------------------------------------------------------------------------------------------------------------
# The methods.


def check(dataset: ImageDataset) -> None:
    """UserError unless there is one class an image, of at least two."""
    if dataset.labels is None or dataset.label_dim < 2:
        raise dnnlib.UserError(f"--data: {dataset.path}: has no labels of one class an image, at least 2 classes")


def cores(dataset: ImageDataset, device: torch.device, settings: Settings) -> tuple[LabelFile, torch.nn.Module]:
    """Confidence-regularised sample sieve; returns what it found, and the classifier.

    Trains on the images that `keep` keeps, decided once an epoch by the weights' moving average. The result is the mean
    posterior of the epochs with beta >= 1: a label is believed right when no class is more probable. That implies the
    sieve's own rule, which alone lets a class that is second to one pass (all confusions of asymmetric noise).
    """
    check(dataset)
    epochs = settings.epochs or EPOCHS
    trainer, n = Trainer(dataset, device, settings), len(dataset)
    kept, mean, averaged = torch.ones(n, dtype=torch.bool, device=device), 0, 0
    progress = Progress("cores", epochs)
    for epoch in range(epochs):
        beta, sieving = schedule(epoch, epochs)
        if sieving:
            kept = keep(log_probs, trainer.labels)  # noqa: F821  (of the epoch before; the first one is not sieved)
        rho = torch.bincount(trainer.labels[kept], minlength=dataset.label_dim) / kept.sum()
        trainer.epoch(epoch, kept.nonzero()[:, 0].cpu().numpy(), rho, beta, progress.advance)
        log_probs = trainer.posterior()
        if beta >= BETA / 2 or epoch == epochs - 1:
            mean, averaged = mean + log_probs.exp(), averaged + 1
        progress.end_epoch(f"beta {beta:.2f}  kept {kept.float().mean():.1%}")
    trainer.trained.close()
    return label_file(dataset, (mean / averaged).cpu().numpy()), trainer.trained.ema


def from_classifier(net: torch.nn.Module, info: dict, dataset: ImageDataset, device: torch.device) -> LabelFile:
    """The same decision by a trained classifier. `info`: of its snapshot, whose `posterior` is 'clean' or 'noisy'.

    A noisy posterior q(o|x) is turned into the clean one by T^T p = q, with T the share of images of each most probable
    class that are observed as each label. UserError when that T cannot be inverted.
    """
    check(dataset)
    log_probs = posterior(net.to(device), dataset, device).cpu()
    if info.get("posterior", "noisy") == "noisy":
        probs = clean_posterior(log_probs, confusion(log_probs.argmax(dim=1).numpy(), dataset))
    else:
        probs = log_probs.exp()
    return label_file(dataset, probs.numpy())


def confident(dataset: ImageDataset, device: torch.device, settings: Settings) -> LabelFile:
    """Confident learning by cleanlab on out-of-fold probabilities of classifiers trained on the labels as they are.

    `is_clean` and `transition` are cleanlab's (filter by noise rate; latent estimates). `score` is the clean posterior
    of the label, recovered with that transition (the noisy one where it cannot be inverted); a wrong label's suggestion
    is the best other class by it.
    """
    try:
        from cleanlab.count import compute_confident_joint, estimate_latent  # optional dependency
        from cleanlab.filter import find_label_issues
    except ImportError:
        raise dnnlib.UserError("--method=confident needs the package cleanlab: pip install cleanlab") from None
    check(dataset)
    epochs = settings.epochs or FOLD_EPOCHS
    order = np.random.default_rng(settings.seed).permutation(len(dataset))
    folds = np.array_split(order, min(FOLDS, len(dataset)))
    out_of_fold = torch.zeros([len(dataset), dataset.label_dim], device=device)
    progress = Progress("confident", epochs * len(folds))
    for i, held_out in enumerate(folds):
        trainer, rest = Trainer(dataset, device, settings, stream=i), np.setdiff1d(order, held_out)
        rho = torch.zeros(dataset.label_dim, device=device)
        for epoch in range(epochs):
            trainer.epoch(epoch, rest, rho, 0.0, progress.advance)
            progress.end_epoch(f"fold {i + 1}/{len(folds)}")
        out_of_fold[torch.from_numpy(held_out).to(device)] = trainer.posterior(held_out)
        trainer.trained.close()
    probs = out_of_fold.exp().cpu().double().numpy()
    joint = compute_confident_joint(dataset.labels, probs)
    _, given, _ = estimate_latent(joint, dataset.labels)  # P(observed = row | clean = column)
    is_clean = ~find_label_issues(dataset.labels, probs, confident_joint=joint, n_jobs=1)
    transition = row_stochastic(np.nan_to_num(given.T))  # NaN: a class that no image seems to have
    try:
        probs = clean_posterior(torch.from_numpy(probs).log(), transition).numpy()
    except dnnlib.UserError as e:
        distributed.print0(f"Warning: the scores are those of the noisy posterior: {e.message}")
    return label_file(dataset, probs, is_clean, transition)


# ---------------------------------------------------------------------------------------------------------------------
# What was found.


def confusion(classes: np.ndarray, dataset: ImageDataset) -> np.ndarray:
    """Share of the images of each class that are observed as each label, float64 [C,C].

    With `classes` believed to be the clean ones this estimates T.
    """
    c = dataset.label_dim
    return row_stochastic(np.bincount(classes * c + dataset.labels, minlength=c * c).reshape(c, c))


def row_stochastic(counts: np.ndarray) -> np.ndarray:
    """Rows divided by their sums, float64 [C,C]; an empty row (a class without images) becomes the identity's."""
    sums = counts.sum(axis=1, keepdims=True)
    return np.where(sums > 0, counts / np.where(sums > 0, sums, 1), np.eye(len(counts)))


def label_file(
    dataset: ImageDataset,
    posterior: np.ndarray,
    is_clean: np.ndarray | None = None,
    transition: np.ndarray | None = None,
) -> LabelFile:
    """The label file that follows from a clean posterior [N,C].

    `is_clean` defaults to 'no class is more probable than the observed one', `transition` to the `confusion` of the
    suggested and the observed labels: an estimate that is too near the identity when wrong labels were missed.
    """
    observed, rows = dataset.labels, np.arange(len(dataset))
    score = posterior[rows, observed]
    if is_clean is None:
        is_clean = score >= posterior.max(axis=1)
    others = posterior.copy()
    others[rows, observed] = -1
    suggested = np.where(is_clean, observed, others.argmax(axis=1))
    if transition is None:
        transition = confusion(suggested, dataset)
    return LabelFile(
        dataset.file_names,
        observed,
        is_clean,
        np.clip(score, 0, 1).astype(np.float32),
        suggested,
        float(np.mean(~is_clean)),
        class_noise_rates(observed, is_clean, dataset.label_dim),
        transition,
    )


def quality(is_clean: np.ndarray, labels: np.ndarray, clean_labels: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 of the detection against the truth, positive = wrong label; 0 where there are none."""
    found, wrong = ~is_clean, labels != clean_labels
    hits = float((found & wrong).sum())
    return dict(
        precision=hits / max(found.sum(), 1),
        recall=hits / max(wrong.sum(), 1),
        f1=2 * hits / max(found.sum() + wrong.sum(), 1),
    )


def describe(dataset: ImageDataset, found: LabelFile) -> str:
    """Noise rates, the estimated transition and, where the clean labels are known, the quality of the detection."""
    names = dataset.class_names or [str(i) for i in range(dataset.label_dim)]
    labels, truth, rates = dataset.labels, dataset.clean_labels, found.per_class_noise_rate

    right = np.ones(len(labels), dtype=bool) if truth is None else labels == truth

    def in_truth(rate: float) -> str:
        return "" if truth is None else f" (in truth {rate:.1%})"

    lines = [
        f"Noise rate:  {found.noise_rate:.1%} of {len(labels):,} labels are believed wrong" + in_truth(np.mean(~right))
    ]
    if truth is not None:
        q = quality(found.is_clean, labels, truth)
        lines.append(
            f"Detection:   precision {q['precision']:.4f}, recall {q['recall']:.4f}, F1 {q['f1']:.4f} "
            "(positive: wrong label)"
        )
    counts, true_rates = np.bincount(labels, minlength=len(names)), class_noise_rates(labels, right, len(names))
    chosen = range(len(names)) if len(names) <= TABLE else np.argsort(-rates, kind="stable")[:TABLE]
    lines.append("Labelled as:" if len(names) <= TABLE else f"Labelled as (the {TABLE} with the most wrong labels):")
    lines += [
        f"  {names[c]:<16.16} {counts[c]:>8,} images, {rates[c]:6.1%} wrong" + in_truth(true_rates[c]) for c in chosen
    ]
    if len(names) <= TABLE:
        lines += [
            "Estimated transition, %: rows what images probably show, columns what they are labelled as",
            " " * 18 + " ".join(f"{name:>5.5}" for name in names),
        ]
        lines += [
            f"  {name:<16.16}" + " ".join(f"{100 * p:5.1f}" for p in row)
            for name, row in zip(names, found.transition, strict=True)
        ]
    return "\n".join(lines)
