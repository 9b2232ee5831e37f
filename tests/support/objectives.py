"""Objectives on data and classifiers made up for tests."""

from __future__ import annotations

import numpy as np
import torch

from training.config import (
    CEPConfig,
    ClassifierConfig,
    DatasetConfig,
    DiscriminatorConfig,
    NetworkConfig,
    OptimizerConfig,
    RDUOTConfig,
    RunConfig,
    TDSMConfig,
)

CPU = torch.device("cpu")


class Data:
    """The part of ImageDataset that objectives read."""

    def __init__(self, n=32, resolution=8, channels=1, classes=4, seed=0):
        rng = np.random.RandomState(seed)
        self.resolution, self.num_channels, self.label_dim = resolution, channels, classes
        self.labels = rng.randint(classes, size=n)
        self.pixels = torch.from_numpy(rng.randint(256, size=[n, channels, resolution, resolution]).astype(np.uint8))
        self.class_names, self.name, self.corruption = None, "toy", {}
        self.shown_classes = [str(c) for c in range(classes)]

    def __len__(self):
        return len(self.labels)

    @property
    def num_raw(self):
        return len(self.labels)

    def images(self, indices):
        return self.pixels[indices]

    def images_on(self, device, items):
        return self.images(items).to(device)

    def onehot(self, indices):
        return torch.nn.functional.one_hot(torch.from_numpy(self.labels)[indices], self.label_dim).float()

    def kwargs(self):
        return {}


def make_config(**changes):
    """A small DSM run; `changes` replace fields, dicts stand for sections."""
    kwargs = dict(
        model_type="SongUNet", model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[], dropout=0.1
    )
    fields = dict(
        method="dsm",
        dataset=dict(path="toy"),
        network=dict(arch="ddpmpp", precond="edm", kwargs=kwargs),
        noise_levels=dict(precond="edm"),
        augment=None,
        optimizer=dict(name="adam", lr=1e-3),
        batch_size=32,
        total_nimg=1000,
        seed=5,
        tdsm=dict(tau=0.01, temp=1.0),
        classifier=dict(val=0.25, shift=0.125),
    )
    sections = dict(
        dataset=DatasetConfig,
        network=NetworkConfig,
        optimizer=OptimizerConfig,
        cep=CEPConfig,
        classifier=ClassifierConfig,
        tdsm=TDSMConfig,
        discriminator=DiscriminatorConfig,
        rduot=RDUOTConfig,
    )
    fields |= changes
    return RunConfig(**{k: sections[k](**v) if k in sections and v is not None else v for k, v in fields.items()})


def ready(cls, *args, **kwargs):
    """An objective with its networks."""
    objective = cls(*args, **kwargs)
    objective.setup()
    return objective


class FixedClassifier(torch.nn.Module):
    """P(y | x) that depends on the pixels a little; augment labels are not used."""

    augment_dim, img_resolution, img_channels, label_dim = 0, 8, 1, 4

    def forward(self, x, sigma, augment_labels=None):
        return torch.stack([x.mean(dim=[1, 2, 3]) * k for k in (1.0, -1.0, 2.0, 0.5)], dim=1)
