"""Train a classifier for a detector: the time-dependent ResNet, at its lowest noise level only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import dnnlib
from archives.dataset import BatchStream, ImageDataset, to_float
from detection.classifier import clean_sigma, log_posterior
from torch_utils import distributed, misc
from training.augment import draw_shifts, shift_images
from training.networks_resnet import Classifier, resnet_kwargs
from training.trained_network import TrainedNetwork, linear_rampup

__all__ = ["Progress", "Settings", "Trainer"]

DROPOUT = 0.3
SHIFT = 0.125  # largest random shift, as a share of the image size
# From log-probabilities [n,C] and observed labels [n] to the loss of each image [n].
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Settings:
    """How a detector trains its classifier."""

    arch: str = "ddpmpp"  # the ResNet that goes with this U-Net
    epochs: int | None = None  # None: 60 for CORES, 20 per classifier for confident learning
    batch: int = 256  # images per step, over all processes
    lr: float = 2e-3  # peak learning rate
    seed: int = 0


class Trainer:
    """A classifier in training, whose `posterior` comes from its EMA.

    The seed and the number of images seen determine the order of the images and their random shifts, for the batch of
    all processes at once. So the number of processes changes only dropout and rounding. `stream` separates the random
    numbers of several trainers with the same seed.
    """

    def __init__(self, dataset: ImageDataset, device: torch.device, settings: Settings, stream: int = 0):
        self.dataset, self.device, self.batch = dataset, device, settings.batch
        self.seed = misc.step_seed(settings.seed, 0, stream)
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.labels = torch.from_numpy(dataset.labels).to(device)
        self.nimg = 0
        torch.manual_seed(misc.step_seed(self.seed, 0, 0, stream=1))  # for the initial weights
        kwargs = resnet_kwargs(settings.arch, dataset.resolution, dataset.num_channels, dataset.label_dim)
        net = Classifier(dataset.resolution, dataset.num_channels, dataset.label_dim, dropout=DROPOUT, **kwargs)
        n = len(dataset)
        self.trained = TrainedNetwork(net, device, lr=settings.lr, lr_factor=linear_rampup(n / 2), ema_halflife=4 * n)

    @property
    def ema(self) -> torch.nn.Module:
        """The moving average of the classifier's weights, as a network."""
        return self.trained.ema

    def epoch(self, number: int, items: np.ndarray, loss: Loss, advance: Callable[[float], None]) -> None:
        """Train once on each of the images `items`, in an order that depends on the epoch's `number`.

        `advance` is called after each step with the share of the epoch that is done.
        """
        share = self.batch // self.world
        own = slice(self.rank * share, (self.rank + 1) * share)
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
            torch.manual_seed(misc.step_seed(self.seed, self.rank, self.nimg, stream=2))  # for dropout
            generator = misc.step_generator(self.seed, 0, self.nimg, self.device, stream=3)
            x = to_float(images)
            shifts = draw_shifts(self.batch, SHIFT, x.shape[-1], generator, self.device)
            if shifts is not None:
                x = shift_images(x, shifts[own])
            with self.trained.accumulate(last=True):
                log_probs = torch.log_softmax(self.trained.forward(x, clean_sigma(x)), dim=1)
                loss(log_probs, onehot.argmax(dim=1)).mean().backward()
            self.trained.update(self.nimg, self.batch)
            self.nimg += self.batch
            advance((step + 1) / steps)
        stream.close()

    def posterior(self, items: np.ndarray | None = None) -> torch.Tensor:
        """Return the EMA's log-probabilities [n,C] for this process's share of the images `items` (None: of all)."""
        return log_posterior(self.ema, self.dataset, self.device, items)

    def close(self) -> None:
        """Release what several processes share. `ema` stays."""
        self.trained.close()


class Progress:
    """A progress bar with the time left, on terminals, and a printed line after every tenth of the epochs."""

    def __init__(self, name: str, epochs: int):
        self.start, self.epochs, self.done, self.line = time.time(), epochs, 0, max(epochs // 10, 1)
        layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed} left {remaining}"
        self.bar = distributed.progress_bar(total=1000 * epochs, desc=name, bar_format=layout)

    def advance(self, share: float) -> None:
        """Move the bar to where `share` of the current epoch is done."""
        self.bar.update(int(1000 * (self.done + share)) - self.bar.n)

    def end_epoch(self, text: str) -> None:
        """Count an epoch; at every tenth of the run, print `text` between the epoch's number and the times."""
        self.done += 1
        if self.done % self.line == 0 or self.done == self.epochs:
            elapsed = time.time() - self.start
            left = elapsed * (self.epochs - self.done) / self.done
            self.bar.clear()
            distributed.print0(
                f"epoch {self.done}/{self.epochs}  {text}  time {dnnlib.format_time(elapsed)}  "
                f"left {dnnlib.format_time(left)}",
                flush=True,
            )
        if self.done == self.epochs:
            self.bar.close()
