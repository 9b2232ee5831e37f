"""The time-dependent classifier of TDSM (docs/methods/tdsm.md): cross-entropy on noisy labels.

    -ln (T^T p)_o    with p = softmax h(x_t, sigma)

x_t: image at noise level sigma; o: its observed label; T[y, o] = P(observed = o | clean = y). With T, stated or
learned, p becomes the clean posterior P(clean | x_t). Without T the loss is -ln p_o, and p becomes the noisy posterior
P(o | x_t). A learned T adds the volume penalty lambda ln det T (VolMinNet: Li et al., ICML 2021).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import dnnlib
from archives.dataset import ImageDataset, to_float
from archives.label_noise import check_observed
from torch_utils import distributed, misc
from torch_utils.precision import widest
from torch_utils.training_stats import Stats
from training.augment import draw_shifts, shift_images
from training.config import RunConfig
from training.networks_resnet import Classifier
from training.objective import Objective
from training.trained_network import TrainedNetwork

__all__ = ["ClassifierObjective", "LearnedTransition", "check_classifier"]

VOLUME_WEIGHT = 1e-4  # lambda
VALIDATION_DRAWS = 4096  # a validation value is the mean over at least so many noisy images
# Learning rate of the learned T: share of the run -> factor; then T stays fixed (published: 1.5, 3, 7.5 of 10 Mimg).
TRANSITION_SCHEDULE = ((0.15, 1.0), (0.30, 0.1), (0.75, 0.01))


class LearnedTransition(torch.nn.Module):
    """T [C,C]: 1 on the diagonal, sigmoid(theta) elsewhere, then rows divided by their sums; theta starts at -2."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.full([num_classes, num_classes], -2.0))

    def forward(self) -> torch.Tensor:
        """Return T."""
        eye = torch.eye(len(self.theta), device=self.theta.device)
        t = eye + (1 - eye) * torch.sigmoid(self.theta)
        return t / t.sum(dim=1, keepdim=True)


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
        log_q = self.noisy_log_probs(torch.log_softmax(logits.to(torch.float32), dim=1), transition)
        stats.add("Classifier/accuracy_on_noisy_labels", (log_q.argmax(dim=1) == labels.argmax(dim=1)).float())
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
    ):
        super().__init__(config, dataset, device)
        self.learn = learn
        if transition is not None and dataset.labels is not None:
            check_observed(transition, dataset.labels)
        self.fixed = None if transition is None else torch.as_tensor(transition, dtype=torch.float32).to(device)
        # Which images are held out follows from the seed alone; their mirror images are held out with them.
        raw = dataset.num_raw
        order = torch.from_numpy(np.random.RandomState(config.seed % 2**32).permutation(raw))
        held_out = round(config.classifier.val * raw)
        self.val_indices, rest = order[:held_out], order[held_out:]
        self.train_indices = torch.cat([rest + copy * raw for copy in range(len(dataset) // raw)])
        self.snapshot_on_best = held_out > 0

    def build(self) -> dict[str, TrainedNetwork]:
        """Create the classifier, and T when it is learned."""
        net = self.resnet(Classifier)
        trained = {"net": self.trained_network(net)}
        if self.learn:
            total = self.config.total_nimg
            trained["transition"] = self.trained_network(
                LearnedTransition(self.dataset.label_dim),
                compile=False,
                shard=False,  # only C x C numbers
                ema_halflife=0,
                lr_factor=lambda nimg: next((f for share, f in TRANSITION_SCHEDULE if nimg < share * total), 0.0),
            )
        return trained

    def draw(self, images: torch.Tensor, generator: torch.Generator) -> dict:
        """Draw what every objective draws, and random shifts."""
        draws = super().draw(images, generator)
        shift = draw_shifts(len(images), self.config.classifier.shift, images.shape[-1], generator, self.device)
        if shift is not None:
            draws["shift"] = shift
        return draws

    @torch.no_grad()
    def validate(self) -> float | None:
        """Return the mean loss of the EMA on the held-out noisy labels, always at the same noise."""
        n = len(self.val_indices)
        if n == 0:
            return None
        generator = misc.step_generator(self.config.seed, 0, 0, self.device, stream=4)
        transition = self.trained["transition"].net() if self.learn else self.fixed
        indices = self.val_indices.repeat(-(-VALIDATION_DRAWS // n))
        # Images at a time: without gradients, each takes about a tenth of the memory.
        size = self.config.batch_gpu or 8 * self.config.batch_size // distributed.get_world_size()
        total = torch.zeros([], dtype=torch.float64, device=self.device)
        for part in indices.split(max(self.config.batch_size, 256)):
            y = to_float(self.dataset.images(part).to(self.device))
            labels = self.dataset.onehot(part).to(self.device)
            sigma = self.noise_levels.sample(len(part), generator, self.device)
            x = y + sigma.reshape(-1, 1, 1, 1) * torch.randn(y.shape, generator=generator, device=self.device)
            logits = torch.cat([*map(self.trained["net"].ema, x.split(size), sigma.split(size))])
            total -= (self.noisy_log_probs(torch.log_softmax(logits, dim=1), transition) * labels).sum()
        return float(total) / len(indices)

    def info(self) -> dict[str, Any]:
        """Record T and which posterior the softmax is."""
        transition = self.trained["transition"].net() if self.learn else self.fixed
        return dict(
            posterior="noisy" if transition is None else "clean",
            transition=None if transition is None else transition.tolist(),
        )


def check_classifier(classifier: torch.nn.Module, dataset: ImageDataset, path: str) -> None:
    """Raise UserError unless the classifier of the snapshot `path` fits the data's resolution, channels and classes."""
    theirs = (classifier.img_resolution, classifier.img_channels, classifier.label_dim)
    ours = (dataset.resolution, dataset.num_channels, dataset.label_dim)
    for name, a, b in zip(("resolution", "number of channels", "number of classes"), theirs, ours, strict=True):
        if a != b:
            raise dnnlib.UserError(
                f"the {name} of {path} is {a}, of {dataset.name} {b}; train the classifier on this data set"
            )
