"""Test that every objective trains on a GPU: nothing stays on the CPU, and the host does not wait (fake CUDA)."""

import numpy as np
import pytest

from archives.dataset import BatchStream, ImageDataset
from archives.label_noise import transition_matrix
from tests.support.fake_cuda import CUDA, FakeCuda
from tests.support.objectives import make_config
from tests.support.waits import DOUBLE, WAITS
from torch_utils.training_stats import Stats
from training.augment import default_augment
from training.networks_resnet import Classifier
from training.objectives.classifier import ClassifierObjective
from training.objectives.discriminator import DiscriminatorObjective
from training.objectives.dsm import DSM
from training.objectives.rduot import DDGAN, RDUOT
from training.objectives.tdsm import TDSM

CLASSES, BATCH = 4, 8
T = transition_matrix("sym", 0.4, CLASSES)
RESNET = dict(depth="small", model_channels=8, channel_mult=[1, 2, 2])
UNET = dict(model_type="SongUNet", model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
GAN = dict(model_channels=8, z_emb_dim=8, nz=6, n_mlp=1, channel_mult=[1, 2], num_blocks=1)


@pytest.fixture
def cuda():
    with FakeCuda(WAITS, DOUBLE) as fake:
        yield fake


def unet_config(**changes):
    fields = dict(network=dict(arch="ddpmpp", precond="edm", kwargs=UNET), batch_size=BATCH) | changes
    return make_config(**fields)


def dsm(dataset, **changes):
    return DSM(unet_config(**changes), dataset, CUDA)


def tdsm(dataset, posterior="clean", **changes):
    classifier = Classifier(8, 3, CLASSES, **RESNET).eval()
    config = unet_config(method="tdsm", tdsm=dict(tau=0.01, temp=1.0, pairs=changes.pop("pairs", None)), **changes)
    return TDSM(config, dataset, CUDA, classifier=classifier, transition=T, posterior=posterior)


def resnet_config(method, **changes):
    return make_config(
        method=method, network=dict(arch="ddpmpp", precond="edm", kwargs=RESNET), batch_size=BATCH, **changes
    )


def classifier(dataset, transition=T, learn=False, **changes):
    return ClassifierObjective(
        resnet_config("classifier", **changes), dataset, CUDA, transition=transition, learn=learn
    )


def discriminator(dataset, partners=None, transition=T, **changes):
    config = resnet_config("discriminator", discriminator=dict(), **changes)
    known = dict(right=np.arange(len(dataset)) % 4 > 0, noise_rates=np.full(CLASSES, 0.25))
    return DiscriminatorObjective(config, dataset, CUDA, transition=transition, partners=partners, **known)


def rduot(dataset, cls=RDUOT, cost="pixels", **changes):
    settings = dict(num_timesteps=4, beta_min=0.1, beta_max=20.0, phi1="softplus", phi2="softplus", cost=cost)
    settings |= dict(tau=0.01, r1_gamma=0.5, lazy_reg=2, schedule_nimg=None)
    config = make_config(
        method=cls.method,
        batch_size=BATCH,
        noise_levels=None,
        network=dict(arch=cls.method, precond=None, kwargs=GAN, potential_kwargs=dict(model_channels=4)),
        optimizer=dict(name="adam", lr=dict(net=1e-3, potential=2e-3), betas=[0.5, 0.9]),
        rduot=settings,
        **changes,
    )
    return cls(config, dataset, CUDA)


AUGMENT = default_augment(0.5).settings()
OBJECTIVES = {
    "dsm": dsm,
    "dsm, augmented, in parts": lambda d: dsm(d, augment=AUGMENT, batch_gpu=4),
    "dsm, bf16": lambda d: dsm(d, precision="bf16"),
    "dsm, fp16": lambda d: dsm(d, precision="fp16", loss_scaling=100),
    "dsm, vp": lambda d: dsm(
        d, network=dict(arch="ddpmpp", precond="vp", kwargs=UNET), noise_levels=dict(precond="vp")
    ),
    "dsm, ve": lambda d: dsm(
        d, network=dict(arch="ddpmpp", precond="ve", kwargs=UNET), noise_levels=dict(precond="ve")
    ),
    "tdsm": tdsm,
    "tdsm, noisy posterior, augmented, in parts": lambda d: tdsm(d, "noisy", augment=AUGMENT, batch_gpu=4),
    "tdsm, 1 pair, bf16": lambda d: tdsm(d, pairs=1, precision="bf16"),
    "classifier, known T, augmented": lambda d: classifier(d, augment=AUGMENT, batch_gpu=4),
    "classifier, learned T": lambda d: classifier(d, None, True),
    "classifier, no T, fp16": lambda d: classifier(d, None, precision="fp16"),
    "discriminator": lambda d: discriminator(d, transition=None),
    "discriminator, similar partners, in parts": lambda d: discriminator(
        d, np.arange(len(d))[:, None] // 2 * 2 + [0, 1], augment=AUGMENT, batch_gpu=4
    ),
    "rduot, bf16": lambda d: rduot(d, precision="bf16"),
    "rduot, features": lambda d: rduot(d, cost="features"),
    "ddgan, standardized, in parts": lambda d: rduot(d, DDGAN, cost="standardized", batch_gpu=4),
    "rduot, robust": lambda d: rduot(d, cost="robust"),
}


# What the others cover in parts runs in make test-long.
REPEATED = ("dsm", "dsm, bf16", "dsm, vp", "dsm, ve", "tdsm", "classifier, no T, fp16", "discriminator", "rduot, bf16")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in REPEATED)) for name in OBJECTIVES]
)
def test_objective_steps_on_the_gpu(cuda, path, name, monkeypatch):
    monkeypatch.setattr("training.objectives.classifier.VALIDATION_DRAWS", 4)
    with cuda.setting_up():
        dataset = ImageDataset(path, use_labels=True)
        objective = OBJECTIVES[name](dataset)
        objective.setup()
        stream = BatchStream(dataset, BATCH, device=CUDA)
        stats = Stats(CUDA)
        images, labels = next(stream)
    objective.step(images, labels, 2 * BATCH, stats, stream.items)  # RDUOT's R1 applies in every other step.
    for trained in objective.trained.values():
        assert all(cuda.has(x) for x in (*trained.net.state_dict().values(), *trained.ema.state_dict().values()))
    with cuda.setting_up():  # what ticks do
        assert stats.reduce()["Health/bad_losses"]["mean"] == 0
        objective.validate()
        objective.notes()
        if name in ("dsm, fp16", "rduot, bf16"):
            objective.probe(0)


@pytest.mark.parametrize("memory_limit", [1 << 30, 0])
def test_batches_come_to_the_gpu(cuda, path, memory_limit):
    with cuda.setting_up():
        stream = BatchStream(ImageDataset(path, use_labels=True), BATCH, device=CUDA, memory_limit=memory_limit)
    for images, labels in (next(stream), next(stream)):  # of one epoch, whose order is there already
        assert cuda.has(images) and cuda.has(labels)
    stream.close()
