"""What the training loop asks of a method, and what all methods share."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

import dnnlib
from archives.dataset import ImageDataset, to_float
from torch_utils import distributed, misc
from torch_utils.training_stats import Stats
from training.augment import AugmentPipe
from training.config import RunConfig
from training.loss_scale import LossScale
from training.noise_levels import NoiseLevels
from training.sharding import whole
from training.trained_network import TrainedNetwork, linear_rampup

__all__ = ["Objective", "Phase", "split_items"]

Phase = tuple[str, Callable[..., torch.Tensor], list[str]]


class Objective:
    """A method: its networks and optimizers, and one step of training on a batch.

    A subclass creates its networks in `build` and computes the loss in `loss`; every other method has a default. Call
    `setup` once before the first step.
    """

    method: str = ""  # name in the configuration and in the snapshot's info
    snapshot_on_best = False  # write a snapshot only when the validation value improves
    companions: Callable[[torch.Tensor, int], torch.Tensor] | None = None  # other images to read with each batch

    def __init__(self, config: RunConfig, dataset: ImageDataset, device: torch.device):
        self.config, self.dataset, self.device = config, dataset, device
        self.noise_levels = NoiseLevels(**config.noise_levels) if config.noise_levels else None
        self.augment = AugmentPipe(**config.augment) if config.augment else None
        self.autocast_dtype = {"bf16": torch.bfloat16}.get(config.precision)
        self.loss_scale = LossScale(config.loss_scaling)
        self.train_indices: torch.Tensor | None = None  # the items of the data set to train on; None: all of them
        # Steps in a row with a non-finite loss or gradient, counted on the device: reading the number waits for it.
        self.bad_steps = torch.zeros([], dtype=torch.int64, device=device)
        self.trained: dict[str, TrainedNetwork] = {}

    def setup(self) -> None:
        """Create the networks. UserError when the settings fit neither each other nor the images."""
        torch.manual_seed(misc.step_seed(self.config.seed, 0, 0, stream=1))  # the same initial weights on every rank
        try:
            self.trained = self.build()
        except ValueError as error:
            raise dnnlib.UserError(str(error)) from None

    # Questions that a method answers.

    def build(self) -> dict[str, TrainedNetwork]:
        """Create the networks to train, by name. The network called 'net' goes into snapshots."""
        raise NotImplementedError

    def loss(self, images: torch.Tensor, labels: torch.Tensor, draws: dict, stats: Stats) -> torch.Tensor:
        """Compute the loss of each image: [n] or [n,...], where the sum over all but n is the image's loss.

        `images` uint8 [n,C,H,W], `labels` float32 [n,label_dim], `draws`: this part's rows of what `draw` returned.
        Statistics go into `stats`.
        """
        raise NotImplementedError

    def phases(self, nimg: int) -> list[Phase]:
        """List what a step does in turn: (name of the loss, the loss, names of the networks that it trains)."""
        return [("loss", self.loss, list(self.trained))]

    def validate(self) -> float | None:
        """Return a value on held-out data, lower is better, equal on all ranks; None without held-out data."""
        return None

    def begin(self) -> None:
        """Prepare what only a fresh run needs; the state keeps it. All ranks call it."""

    def notes(self) -> list[str]:
        """Return lines to print before training begins."""
        return []

    def results(self, snapshot: str) -> list[str]:
        """Return lines to print after the training, which has kept the file `snapshot`. Rank 0 calls it."""
        return []

    def finish(self, run_dir: str) -> list[str]:
        """Write what the finished run has found into its directory; return lines to print. Rank 0 calls it."""
        return []

    def loss_settings(self) -> dict[str, Any]:
        """Return what a snapshot records about the loss, as plain data."""
        return self.noise_levels.settings()

    def info(self) -> dict[str, Any]:
        """Return what a snapshot records beside the network, as plain data."""
        return {}

    # What all methods share.

    def resnet(self, cls: type[torch.nn.Module]) -> torch.nn.Module:
        """Build a network of `training.networks_resnet` for this data and the run's settings."""
        if self.config.precision == "fp16":
            self.autocast_dtype = torch.float16  # these networks do not cast their input themselves, as the U-Nets do
            # At scale 1 most of their gradients would vanish. The U-Nets keep EDM's fixed scale.
            self.loss_scale = LossScale(self.config.loss_scaling, self.device)
        network = self.config.network
        return cls(
            img_resolution=self.dataset.resolution,
            img_channels=self.dataset.num_channels,
            label_dim=self.dataset.label_dim,
            precond=network.precond,
            augment_dim=self.augment.label_dim if self.augment else 0,
            **network.kwargs,
        )

    def trained_network(self, net: torch.nn.Module, **overrides: Any) -> TrainedNetwork:
        """Wrap `net` with the run's optimizer, schedule and EMA settings; `overrides` replace them."""
        c = self.config
        kwargs = dict(
            lr=c.optimizer.lr,
            optimizer=c.optimizer.name,
            ema_halflife=c.ema_halflife_nimg,
            lr_factor=linear_rampup(c.lr_rampup_nimg),
            loss_scale=self.loss_scale,
            compile=c.compile,
            channels_last=self.device.type == "cuda" and c.precision != "fp32",
            shard=c.shard,
        )
        return TrainedNetwork(net, self.device, **(kwargs | overrides))

    def draw(self, images: torch.Tensor, generator: torch.Generator) -> dict:
        """Draw all random numbers of a step for the rank's whole batch, one row per image, before it is split."""
        n = len(images)
        draws = dict(
            sigma=self.noise_levels.sample(n, generator, self.device),
            noise=torch.randn(images.shape, generator=generator, device=self.device),
        )
        if self.augment is not None:
            draws["augment"] = self.augment.draw(n, generator, self.device)
        return draws

    def draw_step(self, images: torch.Tensor, nimg: int) -> dict:
        """Draw the random numbers of this rank's step after `nimg` images. Of `images`, only the shape matters."""
        seed = (self.config.seed, distributed.get_rank(), nimg)
        return self.draw(images, misc.step_generator(*seed, self.device, stream=3))

    def prepare(self, images: torch.Tensor, draws: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return uint8 images [n,C,H,W] as floats in [-1,1], augmented, and their augment labels or None."""
        images = to_float(images)
        return (images, None) if self.augment is None else self.augment.apply(images, draws["augment"])

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the autocast region for network passes. Losses are computed in float32 outside the network."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def step(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        nimg: int,
        stats: Stats,
        items: torch.Tensor | None = None,
        companions: torch.Tensor | None = None,
    ) -> None:
        """Take one optimizer step per phase on this rank's batch: uint8 [b,C,H,W], float labels [b,label_dim].

        `nimg`: images seen before this step. `items` int64 [b]: which images of the data set these are, for methods
        that know something about each image. `companions` uint8 [b,C,H,W]: the images that the attribute `companions`
        asked `BatchStream` for, if it has read them.
        """
        seed = (self.config.seed, distributed.get_rank(), nimg)
        torch.manual_seed(misc.step_seed(*seed, stream=2))  # for dropout
        draws = self.draw_step(images, nimg)
        if items is not None:
            draws["items"] = misc.to_device(items, self.device)
        if companions is not None:
            draws["companions"] = companions
        n = len(images)
        size = self.config.batch_gpu or n
        bad = torch.zeros_like(self.bad_steps)
        for name, loss_of, networks in self.phases(nimg):
            active = [self.trained[network] for network in networks]
            frozen = [trained for trained in self.trained.values() if trained not in active]
            for trained in frozen:
                trained.requires_grad_(False)
            for start in range(0, n, size):
                part = slice(start, start + size)
                with contextlib.ExitStack() as stack:
                    for trained in active:
                        stack.enter_context(trained.accumulate(last=start + size >= n))
                    stack.enter_context(self.autocast())
                    loss = loss_of(images[part], labels[part], _slice(draws, part), stats)
                    bad += _add_loss(name, loss.detach(), stats)
                    (loss.sum() * (self.loss_scale.factor / n)).backward()
            bad_grads = torch.zeros_like(bad)
            for trained in active:
                trained.update(nimg, self.config.batch_size)
                bad_grads += trained.take_bad_grads()
            if self.loss_scale.adapts:
                stats.add("Health/loss_scale", self.loss_scale.factor)
                stats.add("Health/skipped_steps", bad_grads > 0)
                bad_grads = self.loss_scale.update(bad_grads)
            stats.add("Health/bad_gradients", bad_grads)
            bad += bad_grads
            for trained in frozen:
                trained.requires_grad_(True)
        self.bad_steps = torch.where(bad > 0, self.bad_steps + 1, 0)

    def probe(self, nimg: int) -> list[int | np.ndarray]:
        """Compute what all processes must agree on: a checksum of the weights, and per phase the losses of some images.

        The images and random numbers are the same on every process. Nothing is trained.
        """
        # As many images as a network sees at a time in training: compiled networks take no other number.
        share = self.config.batch_size // distributed.get_world_size()
        n = min(self.config.batch_gpu or share, share)
        items = torch.arange(n) % len(self.dataset)
        images, labels = self.dataset.images_on(self.device, items), self.dataset.onehot(items).to(self.device)
        seed = (self.config.seed, 0, nimg)
        torch.manual_seed(misc.step_seed(*seed, stream=5))
        draws = self.draw(images, misc.step_generator(*seed, self.device, stream=6))
        draws["items"] = items.to(self.device)
        values: list[int | np.ndarray] = [_checksum(trained.net for trained in self.trained.values())]
        for _, loss_of, _ in self.phases(nimg):
            with contextlib.ExitStack() as stack:
                for trained in self.trained.values():
                    stack.enter_context(trained.accumulate(last=False))
                stack.enter_context(self.autocast())
                loss = loss_of(images, labels, draws, Stats(self.device)).detach()
                values.append(loss.reshape(n, -1).sum(dim=1).double().cpu().numpy())
        return values

    def snapshot(self) -> dict[str, Any]:
        """Return what a snapshot holds, without the run's own `info`; complete on rank 0. All ranks call it."""
        return dict(
            ema=self.trained["net"].export(),
            loss_fn=dict(class_name=self.method, **self.loss_settings()),
            augment_pipe=self.augment.settings() if self.augment else None,
            dataset_kwargs=self.dataset.kwargs(),
            info=dict(method=self.method, class_names=self.dataset.class_names, **self.info()),
        )

    def close(self) -> None:
        """Release what binds this process to the others."""
        for trained in self.trained.values():
            trained.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what a training state holds of the objective; complete on rank 0. All ranks call it."""
        scale = dict(loss_scale=self.loss_scale.state_dict()) if self.loss_scale.adapts else {}
        return {name: trained.state_dict() for name, trained in self.trained.items()} | scale

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        for name, trained in self.trained.items():
            trained.load_state_dict(state[name])
        if self.loss_scale.adapts and "loss_scale" in state:  # version 0.1 had none
            self.loss_scale.load_state_dict(state["loss_scale"])


def split_items(dataset: ImageDataset, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images to hold out, a `share` of all, and the items to train on in random order, both int64.

    Which images these are follows from the seed alone; their mirror images are held out with them.
    """
    raw = dataset.num_raw
    order = torch.from_numpy(np.random.RandomState(seed % 2**32).permutation(raw))
    count = round(share * raw)
    rest = order[count:]
    return order[:count], torch.cat([rest + copy * raw for copy in range(len(dataset) // raw)])


def _checksum(modules: Iterable[torch.nn.Module]) -> int:
    crc = 0
    for module in modules:
        for tensor in module.state_dict().values():
            crc = zlib.crc32(whole(tensor).cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return crc


def _add_loss(name: str, loss: torch.Tensor, stats: Stats) -> torch.Tensor:
    # Non-finite values are counted apart: one of them would hide all others in the mean.
    finite = loss.isfinite()
    bad = finite.logical_not().sum()
    stats.add(f"Loss/{name}", loss, mask=finite)
    stats.add("Health/bad_losses", bad)
    return bad


def _slice(draws: dict, part: slice) -> dict:
    return {k: _slice(v, part) if isinstance(v, dict) else v[part] for k, v in draws.items()}
