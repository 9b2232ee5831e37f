"""SBDC's discriminator (docs/methods/sbdc.md, section 2; Nguyen Cong et al., ICCV 2025).

    binary cross-entropy of f(x_t, sigma, o) on "o is the right label of this image"

x_t: image at noise level sigma; o: a label. Training needs pairs of both kinds. Right pairs are the labels that a label
file believes right, and in place of the others the classes that it suggests (`believed`); in the paper, the others are
wrong pairs. Some of the right pairs get another label, which makes them wrong (`Shuffle`). Half of each batch is mixed
up with similar images (SiMix).

Guidance needs the evidence e = f - logit R_o, R_o the share of right pairs with label o: for the best f it is
ln (p_right / p_wrong). Some images are held out to find how far f may be trusted at each noise level: e / temp(sigma)
is the logit under which held-out pairs are most likely, right and wrong ones of each label weighing the same, and pairs
that the label file doubts weighing less.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import dnnlib
from archives.dataset import ImageDataset, to_float
from archives.label_file import LabelFile
from torch_utils import distributed, misc
from torch_utils.distributed import print0
from torch_utils.training_stats import Stats
from training.augment import draw_shifts, shift_images
from training.calibration import fit_temperature, mean_log_likelihood
from training.config import RunConfig
from training.networks_resnet import Discriminator
from training.noise_levels import LOWEST_SIGMA
from training.objective import Objective
from training.temperature import Temperature
from training.trained_network import TrainedNetwork

__all__ = ["DiscriminatorObjective", "Shuffle", "believed", "right_shares"]

MIXUP_ALPHA = 0.2  # lambda ~ Beta(alpha, alpha)
MAX_FLIP = 0.9  # largest share of a class's right pairs that become wrong, so that some stay right
EVEN = 0.5  # share of right pairs to aim for
SIGMA_BANDS = (0.0, 0.1, 0.5, 1.5, 5.0, float("inf"))
CALIBRATED_SIGMAS = (LOWEST_SIGMA, 80.0)  # the noise levels of the samplers; ln sigma is uniform between them
CALIBRATION_DRAWS = 8192  # held-out pairs to aim for, from several noise levels of each image
DRAWS_PER_IMAGE = 32  # at most: more of them say little more


def believed(found: LabelFile, suggested: bool) -> dict[str, np.ndarray | None]:
    """Return `labels` int64 [N], what each image teaches with, `right` bool [N], whether that is so, and its `doubt`.

    The label is the observed one, or the suggested class in place of a wrong one, if `suggested`, if the image is not
    foreign, and if that class is at least as probable as all others together. `doubt` float32 [N]: the probability that
    `right` is mistaken; None for a file that knows no probabilities.
    """
    labels, right = found.labels.copy(), found.is_clean.copy()
    if suggested:
        resolved = ~right & (found.suggested != labels)
        if found.is_outlier is not None:
            resolved &= ~found.is_outlier
        if found.suggested_score is not None:
            resolved &= found.suggested_score >= 0.5
        labels[resolved], right[resolved] = found.suggested[resolved], True
    if found.suggested_score is None:
        return dict(labels=labels, right=right, doubt=None)
    probability = np.where(labels == found.labels, found.score, found.suggested_score)
    return dict(labels=labels, right=right, doubt=np.clip(np.where(right, 1 - probability, probability), 0, 0.5))


class Shuffle:
    """Decide which pairs believed right become wrong, and which label they get: `flip` [C], `rows` [C,C], float64.

    `flip[c]`: the probability that a right pair of class c becomes wrong; `rows[c]`: the distribution of its new label.
    Without T all classes have the same `flip`, and the new label is uniform over the other classes. With T the wrong
    pairs are distributed as T makes them: flip = kappa (1 - T[c,c]) / T[c,c], and the label comes from row c of T
    without c. If the share `replaced` of the wrong labels has become right pairs, these are a larger share of class c,
    and flip = kappa (1 - T[c,c]) / (T[c,c] + replaced (1 - T[c,c])). Right and wrong pairs are equally frequent, unless
    fewer than half of the labels are believed right or, with T, there is so little noise that kappa reaches its limit
    of 1.
    """

    def __init__(
        self,
        labels: np.ndarray,
        is_clean: np.ndarray,
        num_classes: int,
        transition: np.ndarray | None = None,
        replaced: float = 0.0,
    ):
        others = 1 - np.eye(num_classes)
        self.rows = others / max(num_classes - 1, 1)
        surplus = max(is_clean.mean() - EVEN, 0.0)
        if transition is None:
            self.flip = np.full(num_classes, surplus / max(is_clean.mean(), 1e-9))
            return
        stays = np.diagonal(transition)
        odds = (1 - stays) / np.maximum(stays + replaced * (1 - stays), 1e-9)
        share = np.bincount(labels[is_clean], minlength=num_classes) / len(labels)
        # The distributions do not depend on kappa. It balances the pairs, but never takes all pairs of a class.
        kappa = min(surplus / max(share @ odds, 1e-9), 1.0, MAX_FLIP / max(odds.max(), 1e-9))
        self.flip = kappa * odds
        moved = transition * others
        leaves = moved.sum(axis=1) > 0
        self.rows[leaves] = moved[leaves] / moved[leaves].sum(axis=1, keepdims=True)


def right_shares(labels: np.ndarray, is_clean: np.ndarray, shuffle: Shuffle) -> np.ndarray:
    """Return R [C]: the expected share of right pairs among the pairs with label o; 1/2 for a label never seen."""
    num_classes = len(shuffle.flip)
    clean = np.bincount(labels[is_clean], minlength=num_classes).astype(np.float64)
    right = clean * (1 - shuffle.flip)
    wrong = np.bincount(labels[~is_clean], minlength=num_classes) + (clean * shuffle.flip) @ shuffle.rows
    return np.where(right + wrong > 0, right / np.maximum(right + wrong, 1e-9), 0.5)


class DiscriminatorObjective(Objective):
    """Binary cross-entropy of f(x_t, sigma, o) on "this label is right"."""

    method = "discriminator"

    def pairs(self, items: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one-hot labels [n,C] and targets [n] (1: right) after the shuffle by `uniform` [n,2] in [0,1)."""
        taught, right = self.labels[items], self.right[items]
        flipped = right & (uniform[:, 0] < self.flip[taught])
        rows = self.cumulative[taught]
        # Scale to the row's own end: rounding must not let a label through whose probability is zero.
        other = torch.searchsorted(rows, (uniform[:, 1:] * rows[:, -1:]).contiguous(), right=True)[:, 0]
        label = torch.where(flipped, other.clamp(max=rows.shape[1] - 1), taught)
        onehot = torch.nn.functional.one_hot(label, rows.shape[1]).to(torch.float32)
        return onehot, (right & ~flipped).to(torch.float32)

    def partners_of(self, items: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        """Return the item that each of `items` [n] would be mixed up with, int64 [n], by the drawn `choice` [n]."""
        if self.partners is not None:
            return self.partners[items, choice]
        return choice if self.train_items is None else self.train_items[choice]

    def companions(self, items: torch.Tensor, nimg: int) -> torch.Tensor:
        """Return the partners of a batch, -1 for images that are not mixed, int64 [n] on the CPU.

        It repeats the draws of the step after `nimg` images, so that `BatchStream` can read the partners ahead.
        """
        draws = self.draw_step(torch.empty([len(items), *self.dataset.image_shape], device="meta"), nimg)
        partners = self.partners_of(items.to(self.device), draws["partner"]).cpu()
        return torch.where(draws["mixed"], partners, -1)

    def loss(self, images: torch.Tensor, labels: torch.Tensor, draws: dict, stats: Stats) -> torch.Tensor:
        """Compute the cross-entropy of each pair, [n]; labels follow from `draws["items"]`, the images' numbers."""
        items = draws["items"]
        images = images.to(torch.float32)
        labels, targets = self.pairs(items, draws["shuffle"])
        rows = misc.to_device(draws["mixed"].nonzero()[:, 0], self.device)
        if len(rows):
            partner = self.partners_of(items, draws["partner"])[rows]
            other_labels, other_targets = self.pairs(partner, draws["partner_shuffle"][rows])
            read_ahead = draws.get("companions")
            other_images = self.dataset.images_on(self.device, partner) if read_ahead is None else read_ahead[rows]
            other_images = other_images.to(torch.float32)
            share = draws["mixing"][rows]
            images[rows] = images[rows].lerp(other_images, 1 - share.reshape(-1, 1, 1, 1))
            labels[rows] = labels[rows].lerp(other_labels, 1 - share[:, None])
            targets[rows] = targets[rows].lerp(other_targets, 1 - share)
        y, augment_labels = self.prepare(images, draws)
        y = shift_images(y, draws.get("shift"))
        sigma = draws["sigma"]
        x = y + sigma.reshape(-1, 1, 1, 1) * draws["noise"]
        logits = self.trained["net"].forward(x, sigma, labels, augment_labels=augment_labels)

        plain = ~misc.to_device(draws["mixed"], self.device)
        correct = ((logits > 0) == (targets > 0.5)).float()
        stats.add("Discriminator/correction_rate", correct, plain)
        for low, high in zip(SIGMA_BANDS, SIGMA_BANDS[1:], strict=False):
            stats.add(
                f"Discriminator/correction_rate_sigma_{low:g}_{high:g}",
                correct,
                plain & (sigma >= low) & (sigma < high),
            )
        return binary_cross_entropy_with_logits(logits, targets, reduction="none")

    def __init__(
        self,
        config: RunConfig,
        dataset: ImageDataset,
        device: torch.device,
        *,
        right: np.ndarray,
        noise_rates: np.ndarray,
        labels: np.ndarray | None = None,
        doubt: np.ndarray | None = None,
        transition: np.ndarray | None = None,
        partners: np.ndarray | None = None,
        split: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        """Take what a label file says: the `labels` to teach with int64 [N] (None: the observed ones), whether they are
        `right` bool [N] and the `doubt` of that (see `believed`), and the `noise_rates` [C]. `transition`: T [C,C] for
        the shuffle (None: uniform).

        `partners` int64 [N,k]: the images that an image of the second half of a batch may be mixed up with (None: any).
        `split`: the images held out for calibration, and the items to train on (None: all items, no calibration).
        """
        super().__init__(config, dataset, device)
        if dataset.label_dim < 2:
            raise dnnlib.UserError(f"{dataset.name}: has one class, so no label is wrong; a discriminator needs two")
        held_out, self.train_indices = (torch.empty(0, dtype=torch.int64), None) if split is None else split
        self.held_out = held_out[:CALIBRATION_DRAWS]
        self.train_items = None if split is None else self.train_indices.to(device)
        self.temperature: Temperature | None = None
        self.transition = transition
        used = slice(None) if split is None else self.train_indices.numpy()
        labels = dataset.labels if labels is None else labels
        replaced, wrong = np.sum(labels != dataset.labels), np.sum(~right)
        share = replaced / max(replaced + wrong, 1)
        self.shuffle = Shuffle(labels[used], right[used], dataset.label_dim, transition, share)
        self.noise_rates = noise_rates
        self.right_shares = right_shares(labels[used], right[used], self.shuffle)
        self.labels = torch.as_tensor(labels, device=device)
        self.right = torch.as_tensor(right, device=device)
        self.doubt = None if doubt is None else torch.as_tensor(doubt, device=device)
        self.flip = torch.as_tensor(self.shuffle.flip, dtype=torch.float32, device=device)
        self.cumulative = torch.as_tensor(self.shuffle.rows, dtype=torch.float32).cumsum(dim=1).to(device)
        self.partners = None if partners is None else torch.as_tensor(partners, device=device)

    def build(self) -> dict[str, TrainedNetwork]:
        """Create the discriminator."""
        net = self.resnet(Discriminator)
        return {"net": self.trained_network(net)}

    def draw(self, images: torch.Tensor, generator: torch.Generator) -> dict:
        """Draw what every objective draws, the shuffle, partners, shares of mixtures and shifts."""
        n, where = len(images), dict(generator=generator, device=self.device)
        others = len(self.dataset) if self.train_items is None else len(self.train_items)
        choices = others if self.partners is None else self.partners.shape[1]
        # PyTorch's Beta distribution takes no generator.
        mixing = np.random.default_rng(generator.initial_seed()).beta(MIXUP_ALPHA, MIXUP_ALPHA, n).astype(np.float32)
        draws = super().draw(images, generator) | dict(
            shuffle=torch.rand([n, 2], **where),
            partner_shuffle=torch.rand([n, 2], **where),
            partner=torch.randint(choices, [n], **where),
            mixing=misc.to_device(torch.from_numpy(mixing), self.device),
            mixed=torch.arange(n) >= n // 2,  # on the CPU, where reading it waits for nothing
        )
        shift = draw_shifts(n, self.config.discriminator.shift, images.shape[-1], **where)
        if shift is not None:
            draws["shift"] = shift
        return draws

    def validate(self) -> float | None:
        """Fit the temperature to held-out pairs, and return their mean cross-entropy; None without held-out images.

        The pairs and their noise are always the same.
        """
        if not len(self.held_out):
            return None
        evidence, sigma, weights, doubt = self.held_out_evidence()
        self.temperature = fit_temperature(evidence, sigma, weights, images=len(self.held_out), doubt=doubt)
        plain, calibrated = (
            -float(mean_log_likelihood(evidence, weights, temp=temp, doubt=doubt))
            for temp in (1.0, self.temperature(sigma))
        )
        print0(f"Held-out pairs: cross-entropy {calibrated:.4f}, before calibration {plain:.4f}")
        return calibrated

    @torch.no_grad()
    def held_out_evidence(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return 0 and the evidence [M,2] of held-out pairs by the EMA, noise levels [M], weights [M,2] and doubt [M].

        The weights say which of the two a pair speaks for, wrong or right. Each label's right and wrong pairs have the
        same expected weight, and labels that are nearly always right, or wrong, have little.
        """
        repeats = min(-(-CALIBRATION_DRAWS // len(self.held_out)), DRAWS_PER_IMAGE)
        generator = misc.step_generator(self.config.seed, 0, 0, self.device, stream=4)
        draw = dict(generator=generator, device=self.device)
        low, high = np.log(CALIBRATED_SIGMAS)
        share = torch.as_tensor(self.right_shares, dtype=torch.float32, device=self.device)
        prior = share.clamp(1e-6, 1 - 1e-6).logit()
        # Images at a time: without gradients, each takes about a tenth of the memory.
        size = self.config.batch_gpu or 8 * self.config.batch_size // distributed.get_world_size()
        rows = []
        for part in self.held_out.split(max(self.config.batch_size // repeats, 32)):
            y = to_float(self.dataset.images_on(self.device, part)).repeat(repeats, 1, 1, 1)
            part = part.to(self.device).repeat(repeats)
            labels, targets = self.pairs(part, torch.rand([len(part), 2], **draw))
            sigma = (low + (high - low) * torch.rand([len(part)], **draw)).exp()
            x = y + sigma.reshape(-1, 1, 1, 1) * torch.randn(y.shape, **draw)
            inputs = (values.split(size) for values in (x, sigma, labels))
            logits = torch.cat([*map(self.trained["net"].ema, *inputs)])
            label = labels.argmax(dim=1)
            # Dividing by the shares would even right and wrong out, too, but leave all weight to the few wrong pairs of
            # a label that is hardly ever wrong.
            right = share[label]
            weights = 2 * torch.stack([(1 - targets) * right, targets * (1 - right)], dim=1)
            evidence = logits - prior[label]
            doubt = torch.zeros_like(sigma) if self.doubt is None else self.doubt[part]
            rows.append((torch.stack([torch.zeros_like(evidence), evidence], dim=1), sigma, weights, doubt))
        evidence, sigma, weights, doubt = (torch.cat(values) for values in zip(*rows, strict=True))
        return evidence, sigma, weights, None if self.doubt is None else doubt

    def info(self) -> dict[str, Any]:
        """Record what calibrated guidance needs (docs/methods/sbdc.md, section 3)."""
        return dict(
            noise_rates=self.noise_rates.tolist(),
            right_shares=self.right_shares.tolist(),
            temperature=None if self.temperature is None else self.temperature.plain(),
            held_out=len(self.held_out),
            shuffle="uniform" if self.transition is None else "transition",
        )
