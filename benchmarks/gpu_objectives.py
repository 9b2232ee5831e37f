"""Every objective on random images, with all settings that a GPU could get wrong, for `python -m benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from archives.label_noise import transition_matrix
from benchmarks.data import RandomImages
from training.augment import default_augment
from training.config import (
    ClassifierConfig,
    DatasetConfig,
    DiscriminatorConfig,
    NetworkConfig,
    OptimizerConfig,
    RDUOTConfig,
    RunConfig,
    TDSMConfig,
)
from training.networks_resnet import Classifier, resnet_kwargs
from training.objective import Objective
from training.objectives.classifier import ClassifierObjective
from training.objectives.discriminator import DiscriminatorObjective
from training.objectives.dsm import DSM
from training.objectives.rduot import DDGAN, RDUOT
from training.objectives.tdsm import TDSM
from training.presets import network_kwargs

__all__ = ["OBJECTIVES", "Images", "make"]

OBJECTIVES = ("dsm", "tdsm", "classifier", "discriminator", "rduot", "ddgan")
GAN = dict(z_emb_dim=32, nz=16, n_mlp=2, channel_mult=[1, 2], num_blocks=1)


class Images(RandomImages):
    """Random images in memory, with all that objectives read."""

    outliers, corruption, path = None, {}, "random"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_raw(self) -> int:
        """The number of images; there are no mirrored copies."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height, width."""
        return tuple(self.pixels.shape[1:])

    def images(self, items: torch.Tensor) -> torch.Tensor:
        """Return images, uint8 [n,C,H,W] on the CPU."""
        return self.pixels[items]

    def images_on(self, device: torch.device, items: torch.Tensor) -> torch.Tensor:
        """Return images, uint8 [n,C,H,W], from those that `to` keeps on the device."""
        return self.pixels[items.to(self.pixels.device)].to(device)

    def to(self, device: torch.device) -> Images:
        """Keep the images on `device`."""
        self.pixels = self.pixels.to(device)
        return self


def make(
    name: str,
    data: Images,
    device: torch.device,
    *,
    batch: int,
    arch: str = "ddpmpp_tiny",
    width: int | None = 16,
    wrap: Callable[[type[Objective]], type[Objective]] = lambda cls: cls,
    **fields: Any,
) -> Objective:
    """Return an objective of OBJECTIVES, ready to step. `fields` replace those of its configuration.

    `width` None: the network's own. `wrap` may return a subclass of the method. The label noise is of type `pair`, so
    that TDSM adds one other class to each image.
    """
    classes = data.label_dim
    resnet = resnet_kwargs(arch, data.resolution, data.num_channels, classes, width)
    unet = network_kwargs(arch, width) | dict(dropout=0)
    networks = dict(
        dsm=NetworkConfig(arch, "edm", unet),
        tdsm=NetworkConfig(arch, "edm", unet),
        classifier=NetworkConfig(arch, "edm", resnet),
        discriminator=NetworkConfig(arch, "edm", resnet),
    )
    gan = dict(model_channels=width or 64, **GAN)
    config = dict(
        method=name,
        dataset=DatasetConfig("random"),
        network=networks.get(name) or NetworkConfig(name, None, gan, dict(model_channels=width or 64)),
        optimizer=OptimizerConfig("adam", 1e-3 if name in networks else dict(net=1e-3, potential=1e-3), [0.9, 0.999]),
        noise_levels=dict(precond="edm") if name in networks else None,
        augment=default_augment(0.12).settings() if name in networks else None,
        batch_size=batch,
        seed=0,
        tdsm=TDSMConfig(),
        classifier=ClassifierConfig(val=0),
        discriminator=DiscriminatorConfig(),
        rduot=RDUOTConfig(cost="features", tau=0.01),
    )
    config = RunConfig(**(config | fields))
    transition = transition_matrix("pair", 0.4, classes)
    torch.manual_seed(0)
    if name == "tdsm":
        classifier = Classifier(data.resolution, data.num_channels, classes, **resnet).eval().requires_grad_(False)
        own = dict(classifier=classifier, transition=transition, posterior="clean")
    elif name == "classifier":
        own = dict(transition=transition)
    elif name == "discriminator":
        is_clean = np.random.RandomState(2).rand(len(data)) < 0.6
        own = dict(right=is_clean, noise_rates=np.full(classes, 0.4), transition=transition)
    else:
        own = {}
    methods = dict(
        dsm=DSM,
        tdsm=TDSM,
        classifier=ClassifierObjective,
        discriminator=DiscriminatorObjective,
        rduot=RDUOT,
        ddgan=DDGAN,
    )
    objective = wrap(methods[name])(config, data, device, **own)
    objective.setup()
    return objective
