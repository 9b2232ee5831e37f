"""Train a classifier for a detector: the time-dependent ResNet, at its lowest noise level only."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

import dnnlib
from archives.dataset import BatchStream, ImageDataset, to_float
from detection.classifier import clean_sigma, log_posterior
from torch_utils import checkpoint, distributed, misc
from training.augment import draw_shifts, shift_images
from training.networks_conv import ConvClassifier, conv_kwargs
from training.networks_resnet import DEPTHS, Classifier, resnet_kwargs
from training.trained_network import TrainedNetwork, linear_rampup

__all__ = ["CONV", "Progress", "Settings", "Trainer", "TrainingState"]

CONV = "conv"  # the name of the small convolutional network
DROPOUT = 0.3
SHIFT = 0.125  # largest random shift, as a share of the image size
# From log-probabilities [n,C] and observed labels [n] to the loss of each image [n].
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Settings:
    """How a detector trains its classifier."""

    arch: str = "ddpmpp"  # the ResNet that goes with this U-Net, or of this depth (of DEPTHS), or CONV
    epochs: int | None = None  # None: the method's own length
    batch: int = 256  # images per step, over all processes
    lr: float = 2e-3  # peak learning rate
    seed: int = 0
    state: str | None = None  # file that keeps the training until it is done; None: nothing is kept


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
        shape, n = (dataset.resolution, dataset.num_channels, dataset.label_dim), len(dataset)
        if settings.arch == CONV:
            net = ConvClassifier(*shape, dropout=DROPOUT, **conv_kwargs(dataset.num_channels))
        else:
            encoder = settings.arch if settings.arch in DEPTHS else None
            try:
                net = Classifier(*shape, dropout=DROPOUT, **resnet_kwargs(settings.arch, *shape, encoder=encoder))
            except ValueError as e:
                raise dnnlib.UserError(f"{dataset.name}: {e}; the architecture {CONV} takes any size") from None
        self.trained = TrainedNetwork(
            net,
            device,
            lr=settings.lr,
            lr_factor=linear_rampup(n / 2),
            ema_halflife=4 * n,
            channels_last=settings.arch == CONV,
        )

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

    def posterior(self, items: np.ndarray | None = None, reach: int = 0) -> torch.Tensor:
        """Return the EMA's log-probabilities [n,C] for this process's share of the images `items` (None: of all).

        `reach`: shifts to average over, see `log_posterior`.
        """
        return log_posterior(self.ema, self.dataset, self.device, items, reach)

    def state_dict(self) -> dict[str, Any]:
        """Return the training so far, for a `TrainingState`."""
        return dict(nimg=self.nimg, trained=self.trained.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.nimg = state["nimg"]
        self.trained.load_state_dict(state["trained"])

    def close(self) -> None:
        """Release what several processes share. `ema` stays."""
        self.trained.close()


class TrainingState:
    """What a detector has learned so far, kept in the file `settings.state`, so that it continues after a kill.

    The file counts for the same method, settings and contents of the data only.
    """

    def __init__(self, method: str, dataset: ImageDataset, settings: Settings):
        self.path, self.saved, self.took = settings.state, 0.0, 0.0
        options = {name: value for name, value in asdict(settings).items() if name != "state"}
        self.run = self.path and distributed.from_rank0(
            lambda: dict(method=method, settings=options, contents=dataset.contents())
        )

    def load(self) -> dict[str, Any] | None:
        """Return what `save` was given, on every process, but the `table` on rank 0 only; None to begin. Collective."""

        def read() -> dict[str, Any] | None:
            nonlocal table
            try:
                state = checkpoint.load_state(self.path)
            except dnnlib.UserError as e:
                print(f"{e.message}; training begins anew")
                return None
            if state.get("run") != self.run:
                print(f"{self.path} belongs to other options or data; training begins anew")
                return None
            table = state.pop("table")
            print(f"Training continues from {self.path}")
            return state["values"]

        table = None
        found = self.path and distributed.from_rank0(lambda: read() if os.path.exists(self.path) else None)
        return dict(found, table=table) if found else None

    def due(self) -> bool:
        """Return whether to save now, so that saving takes at most a twentieth of the time. Collective."""
        return bool(self.path) and distributed.broadcast_object(time.time() - self.saved > 20 * self.took)

    def save(self, values: dict[str, Any], table: torch.Tensor | None = None) -> None:
        """Keep plain `values` and tensors, and a large `table` that rank 0 has. Collective."""

        def write() -> None:
            start = time.time()
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
            try:
                checkpoint.save_state(self.path, dict(run=self.run, values=values, table=table))
            except OSError as e:  # the training itself needs no disk
                print(f"Warning: {self.path}: {e.strerror or e}; a killed run could not continue", flush=True)
            self.saved = time.time()
            self.took = self.saved - start

        distributed.on_rank0(write)


class Progress:
    """A progress bar with the time left, on terminals, and a printed line after every tenth of the epochs."""

    def __init__(self, name: str, epochs: int, done: int = 0):
        self.start, self.epochs, self.first, self.done = time.time(), epochs, done, done
        self.images, self.line = 0, max(epochs // 10, 1)
        layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed} left {remaining}"
        self.bar = distributed.progress_bar(total=1000 * epochs, initial=1000 * done, desc=name, bar_format=layout)

    def advance(self, share: float) -> None:
        """Move the bar to where `share` of the current epoch is done."""
        self.bar.update(int(1000 * (self.done + share)) - self.bar.n)

    def end_epoch(self, images: int, text: str = "") -> None:
        """Count an epoch of so many images; at every tenth of the run, print speed, times and `text`."""
        self.done += 1
        self.images += images
        if self.done % self.line == 0 or self.done == self.epochs:
            elapsed = time.time() - self.start
            left = elapsed * (self.epochs - self.done) / (self.done - self.first)
            self.bar.clear()
            distributed.print0(
                f"epoch {self.done}/{self.epochs}  {self.images / max(elapsed, 1e-3):,.0f} images/s  "
                f"time {dnnlib.format_time(elapsed)}  left {dnnlib.format_time(left)}  {text}".rstrip(),
                flush=True,
            )
        if self.done == self.epochs:
            self.close()

    def close(self) -> None:
        """Remove the bar; training may end early."""
        self.bar.close()
