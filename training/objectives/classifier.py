"""The time-dependent classifier of TDSM (docs/methods/tdsm.md): cross-entropy on noisy labels.

    -ln (T^T p)_o    with p = softmax h(x_t, sigma)

x_0: image; x_t: the same at noise level sigma; o: its observed label; T[y, o] = P(observed = o | clean = y). With T,
stated or learned, p becomes the clean posterior P(clean | x_t). Without T the loss is -ln p_o, and p becomes the noisy
posterior P(o | x_t). A learned T adds the volume penalty lambda ln det T (VolMinNet: Li et al., ICML 2021).

Where a detector has seen the image itself, the loss is -sum_y P(y | x_0, o) ln p_y. Its expectation is smallest where p
is P(clean | x_t), as that of the loss above, but the targets are far less noisy than the labels.

The held-out noisy labels, or targets, choose the best snapshot, and a temperature for its logits at each noise level,
which the snapshot records (training/calibration.py). TDSM multiplies doubt by T's large diagonal, so the temperature is
the most certain one that these labels do not contradict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import dnnlib
from archives.classes import check_class_numbers
from archives.dataset import ImageDataset, to_float
from archives.label_noise import check_matrix, check_observed
from archives.posterior import TopPosterior
from torch_utils import distributed, misc, persistence
from torch_utils.distributed import print0
from torch_utils.precision import widest
from torch_utils.training_stats import Stats
from training import networks_published  # noqa: F401  It registers TDSM's classifiers.
from training.augment import draw_shifts, shift_images
from training.calibration import fit_temperature, mean_log_likelihood
from training.config import RunConfig
from training.learned_transition import LearnedTransition
from training.networks_conv import ConvClassifier
from training.networks_resnet import Classifier
from training.objective import Objective, split_items
from training.objectives.posterior_labels import PosteriorLabels
from training.temperature import Temperature
from training.trained_network import TrainedNetwork
from training.transition_estimate import describe_transition

__all__ = ["ClassifierObjective", "check_classifier", "check_noise_levels"]

VOLUME_WEIGHT = 1e-4  # lambda
VALIDATION_DRAWS = 4096  # a validation value is the mean over at least so many noisy images
CALIBRATION_DRAWS = 16_384  # a temperature comes from at most so many of them
# Learning rate of a T that starts at -2: share of the run -> factor; then T stays fixed (published: 1.5, 3, 7.5 of 10
# Mimg).
TRANSITION_SCHEDULE = ((0.15, 1.0), (0.30, 0.1), (0.75, 0.01))
# That of a T that starts at an estimate: first the classifier learns what the estimate says, then T moves, at most by
# REACH in each theta however short the run is, and settles.
REACH = 2.0
ESTIMATE_SCHEDULE = ((0.30, 0.0), (0.60, 1.0), (0.75, 0.1))


class ClassifierObjective(Objective):
    """Forward-corrected cross-entropy with a fixed T, a learned T (`learn`), or none (`transition` None)."""

    method = "classifier"

    def noisy_log_probs(self, log_p: torch.Tensor, transition: torch.Tensor | None) -> torch.Tensor:
        """Return ln P(o | x_t) [n,C] for the classifier's ln p: ln (T^T p), or ln p without T."""
        if transition is None:
            return log_p
        # In float64 probabilities down to 1e-308 are exact, and no autocast rounds the product. A label that no class
        # turns into has probability 0; its finite logarithm keeps the other labels' gradients finite.
        dtype = widest(log_p.device)
        q = log_p.to(dtype).exp() @ transition.to(dtype)
        return q.clamp_min(torch.finfo(dtype).tiny).log().to(log_p.dtype)

    def loss(self, images: torch.Tensor, labels: torch.Tensor, draws: dict, stats: Stats) -> torch.Tensor:
        """Compute -ln (T^T p)_o, [n]; with a learned T plus its volume penalty."""
        y, augment_labels = self.prepare(images, draws)
        y = shift_images(y, draws.get("shift"))
        sigma = draws["sigma"]
        x = y + sigma.reshape(-1, 1, 1, 1) * draws["noise"]
        logits = self.trained["net"].forward(x, sigma, augment_labels=augment_labels)
        transition = self.trained["transition"].forward() if self.learn else self.fixed
        log_p = torch.log_softmax(logits.to(torch.float32), dim=1)
        log_q = self.noisy_log_probs(log_p, transition)
        stats.add("Classifier/accuracy_on_noisy_labels", (log_q.argmax(dim=1) == labels.argmax(dim=1)).float())
        if self.targets is not None:
            return -(log_p * self.targets.expand(draws["items"]).to(log_p)).sum(dim=1)
        loss = -(log_q * labels).sum(dim=1)
        if self.learn:
            loss = loss + VOLUME_WEIGHT * transition.slogdet().logabsdet
        return loss

    def __init__(
        self,
        config: RunConfig,
        dataset: ImageDataset,
        device: torch.device,
        *,
        transition: np.ndarray | None,
        learn: bool = False,
        estimate: Callable[[], np.ndarray] | None = None,
        targets: TopPosterior | None = None,
    ):
        """Take T [C,C], or None, or `estimate`, which finds T when a fresh run begins, on all processes at once.

        With `learn`, T starts at the estimate and learns with the classifier. `targets`: the P(y | x_0, o) of all
        images, which it learns in place of the labels.
        """
        super().__init__(config, dataset, device)
        self.learn, self.estimate = learn, estimate
        self.targets = None if targets is None else PosteriorLabels(targets, "sample", device)
        if transition is not None and dataset.labels is not None:
            check_observed(transition, dataset.labels)
        self.fixed: torch.Tensor | None = None
        if transition is not None:
            self.use(transition)
        self.held_out: tuple[torch.Tensor, ...] | None = None  # logits, noise levels and labels of the last validation
        self.held_out_images = 0  # different ones among them
        self.val_indices, self.train_indices = split_items(dataset, config.classifier.val, config.seed)
        self.snapshot_on_best = len(self.val_indices) > 0

    def build(self) -> dict[str, TrainedNetwork]:
        """Create the classifier, and T when it is learned."""
        net = self.resnet(Classifier)
        trained = {"net": self.trained_network(net)}
        if self.learn:
            total, unit, schedule = self.config.total_nimg, 1.0, TRANSITION_SCHEDULE
            if self.estimate is not None:
                schedule = ESTIMATE_SCHEDULE
                steps = (schedule[1][0] - schedule[0][0]) * total / self.config.batch_size
                unit = REACH / max(steps, 1) / self.config.optimizer.lr
            trained["transition"] = self.trained_network(
                LearnedTransition(self.dataset.label_dim),
                compile=False,
                shard=False,  # only C x C numbers
                ema_halflife=0,
                lr_factor=lambda nimg: unit * next((f for share, f in schedule if nimg < share * total), 0.0),
            )
        return trained

    def begin(self) -> None:
        """Find T, if it is to be estimated."""
        if self.estimate is None:
            return
        T = self.estimate()
        check_observed(T, self.dataset.labels)
        print0(describe_transition(T, self.dataset, "estimated"))
        swapped = np.flatnonzero(T.argmax(axis=1) != np.arange(len(T)))
        if len(swapped):
            print0(
                f"Warning: by this estimate, images of {len(swapped)} classes carry another label more often than "
                "their own. It may have had too few images or too little training; state the label noise if you know it"
            )
        if self.learn:
            for net in (self.trained["transition"].net, self.trained["transition"].ema):
                net.start_at(torch.as_tensor(T, dtype=torch.float32))
        else:
            self.use(T)

    def use(self, T: np.ndarray) -> None:
        """Correct for T [C,C] from now on."""
        self.fixed = torch.as_tensor(T, dtype=torch.float32).to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """Return what a training state holds, with the estimate of T."""
        found = self.estimate is not None and not self.learn
        return super().state_dict() | (dict(estimate=self.fixed.cpu()) if found else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        super().load_state_dict(state)
        if self.estimate is not None and not self.learn:
            self.use(check_matrix(state["estimate"].numpy(), self.dataset.label_dim))

    def draw(self, images: torch.Tensor, generator: torch.Generator) -> dict:
        """Draw what every objective draws, and random shifts."""
        draws = super().draw(images, generator)
        shift = draw_shifts(len(images), self.config.classifier.shift, images.shape[-1], generator, self.device)
        if shift is not None:
            draws["shift"] = shift
        return draws

    @torch.no_grad()
    def validate(self) -> float | None:
        """Return the mean loss of the EMA on the held-out noisy labels or targets, always at the same noise."""
        n = len(self.val_indices)
        if n == 0:
            return None
        generator = misc.step_generator(self.config.seed, 0, 0, self.device, stream=4)
        transition = self.trained["transition"].net() if self.learn else self.fixed
        indices = self.val_indices.repeat(-(-VALIDATION_DRAWS // n))
        # Images at a time: without gradients, each takes about a tenth of the memory.
        size = self.config.batch_gpu or 8 * self.config.batch_size // distributed.get_world_size()
        total = torch.zeros([], dtype=torch.float64, device=self.device)
        rows, kept = [], 0
        for part in indices.split(max(self.config.batch_size, 256)):
            y = to_float(self.dataset.images_on(self.device, part))
            labels = self.dataset.onehot(part).to(self.device)
            sigma = self.noise_levels.sample(len(part), generator, self.device)
            x = y + sigma.reshape(-1, 1, 1, 1) * torch.randn(y.shape, generator=generator, device=self.device)
            logits = torch.cat([*map(self.trained["net"].ema, x.split(size), sigma.split(size))])
            log_p = torch.log_softmax(logits, dim=1)
            if self.targets is None:
                log_p, wanted = self.noisy_log_probs(log_p, transition), labels.argmax(dim=1)
            else:
                labels = wanted = self.targets.expand(part.to(self.device)).to(log_p)
            total -= (log_p * labels).sum()
            if kept < CALIBRATION_DRAWS:
                rows.append((logits, sigma, wanted))
                kept += len(part)
        self.held_out = tuple(map(torch.cat, zip(*rows, strict=True)))
        self.held_out_images = min(n, kept)  # the first ones come again only after all others
        return float(total) / len(indices)

    def calibration(self, transition: torch.Tensor | None) -> dict[str, Any]:
        """Return the temperature that the last validation's labels ask for, and their mean loss with it."""
        if self.held_out is None:
            return {}
        logits, sigma, wanted = self.held_out
        T = transition if self.targets is None else None
        found = fit_temperature(logits, sigma, wanted, T, images=self.held_out_images, certain=True)
        loss = -float(mean_log_likelihood(logits, wanted, T, found(sigma)))
        return dict(temperature=found.plain(), calibrated_loss=loss)

    def info(self) -> dict[str, Any]:
        """Record T, which posterior the softmax is, and its temperature at each noise level."""
        transition = self.trained["transition"].net() if self.learn else self.fixed
        return dict(
            posterior="noisy" if transition is None else "clean",
            transition=None if transition is None else transition.tolist(),
            **self.calibration(transition),
        )

    def results(self, snapshot: str) -> list[str]:
        """Say how sure the kept classifier is, and which T it has found."""
        info = persistence.load_snapshot(snapshot)["info"]
        found, lines = Temperature.read(info.get("temperature"), snapshot), []
        if found is not None:
            lines.append(
                f"Temperature: {found}; held-out loss {info['validation_loss']:.4f} without it, "
                f"{info['calibrated_loss']:.4f} with it"
            )
        if self.estimate is not None or self.learn:
            lines.append(
                describe_transition(
                    np.array(info["transition"]), self.dataset, "learned" if self.learn else "estimated"
                )
            )
        return lines


def check_classifier(snapshot: dict[str, Any], dataset: ImageDataset, path: str) -> None:
    """Raise UserError unless the classifier of the snapshot `path` fits the data's resolution, channels and classes."""
    classifier = snapshot["ema"]
    theirs = (classifier.img_resolution, classifier.img_channels, classifier.label_dim)
    ours = (dataset.resolution, dataset.num_channels, dataset.label_dim)
    for name, a, b in zip(("resolution", "number of channels", "number of classes"), theirs, ours, strict=True):
        if a != b:
            raise dnnlib.UserError(
                f"the {name} of {path} is {a}, of {dataset.name} {b}; train the classifier on this data set"
            )
    check_class_numbers(snapshot["info"].get("class_names"), path, dataset.class_names, dataset.name)


def check_noise_levels(snapshot: dict[str, Any], path: str) -> None:
    """Raise UserError for the classifier of a detector, which has only seen images without noise."""
    if isinstance(snapshot["ema"], ConvClassifier) or snapshot["info"].get("method") == "detector":
        raise dnnlib.UserError(
            f"{path} is a detector's classifier and has seen images without noise only; TDSM asks one that "
            "train_classifier.py has trained"
        )
