"""Test that samplers and guidance run on a GPU: nothing stays on the CPU, and no step waits (fake CUDA)."""

import pytest

from sampling.evaluations import Stopwatch
from sampling.generation import generate_images
from sampling.guidance import AffineGuidance, ClassifierFreeGuidance, GatedGuidance
from sampling.loading import TrainedDiscriminator, guide, prepare
from sampling.samplers import choose_sampler
from tests.support.fake_cuda import CUDA, FakeCuda
from tests.support.generated import random_network
from tests.support.waits import DOUBLE, WAITS
from training.networks_ddgan import DDGANGenerator
from training.networks_resnet import Discriminator

CLASSES, STEPS = 3, 2
GENERAL = dict(solver="heun", discretization="vp", schedule="vp", scaling="vp", S_churn=10)
SAMPLERS = {
    "heun": dict(),
    "heun with churn": dict(S_churn=10, S_noise=1.01),
    "vp": GENERAL,
    "ve": GENERAL | dict(discretization="ve", schedule="ve", scaling="none", alpha=0.5),
    "iddpm, euler": GENERAL | dict(solver="euler", discretization="iddpm", schedule="linear", scaling="none"),
}


def some(names, *repeated):
    """The names; those that the others cover run in make test-long."""
    return [pytest.param(name, marks=[pytest.mark.long] * (name in repeated)) for name in names]


@pytest.fixture
def cuda():
    with FakeCuda(WAITS, DOUBLE) as fake:
        yield fake


def network(seed=0):
    return random_network(seed).to(CUDA)


def discriminator(**changes):
    net = Discriminator(8, 1, CLASSES, depth="small", model_channels=8, channel_mult=[1, 1, 1]).eval().to(CUDA)
    return TrainedDiscriminator(
        "d.pkl", net, **(dict(noise_rates=[0.2] * CLASSES, right_shares=[0.5] * CLASSES) | changes)
    )


def images(net, class_idx=None, **settings):
    sampler = choose_sampler(net, **settings)
    return list(generate_images(net, range(2), device=CUDA, batch=1, class_idx=class_idx, sampler=sampler))


def check(cuda, net, class_idx=None, **settings):
    """Generate two batches; only their arrival may wait."""
    cuda.used.clear()
    found = images(net, class_idx, num_steps=STEPS, **settings)
    assert [len(part[1]) for part in found] == [1, 1]
    assert {place for place in cuda.used if place[0] != "sampling/arrival.py"} == set()


@pytest.mark.parametrize("name", some(SAMPLERS, "heun", "ve", "iddpm, euler"))
def test_samplers(cuda, name):
    with cuda.setting_up():
        net = network()
    check(cuda, net, **SAMPLERS[name])


@pytest.mark.parametrize("precision", some(["fp32", "tf32", "bf16"], "fp32", "tf32"))
def test_precisions(cuda, precision):
    with cuda.setting_up():
        net = prepare(network(), precision)
    check(cuda, net)


GUIDANCES = {
    "classifier-free": lambda net: ClassifierFreeGuidance(net, 2),
    "unconditional": lambda net: ClassifierFreeGuidance(net, 0),
    "autoguidance": lambda net: AffineGuidance(net, network(1), 1.5),
    "gated": lambda net: GatedGuidance(net, [ClassifierFreeGuidance(net, 2)] * 2, (0.1, 10)),
    "discriminator, constant": lambda net: guide(net, discriminator(), CUDA, gate=(0, 10)),
    "discriminator, calibrated": lambda net: guide(net, discriminator(), CUDA, mode="calibrated", gate=(0, 100)),
    "discriminator, stated rate, timed": lambda net: guide(
        net, discriminator(), CUDA, mode="calibrated", gate=(0, 100), noise_rate=0.3, stopwatch=Stopwatch(CUDA)
    ),
    "discriminator over classifier-free": lambda net: guide(
        ClassifierFreeGuidance(net, 2), discriminator(), CUDA, gate=(0, 100)
    ),
}


@pytest.mark.parametrize("name", some(GUIDANCES, "unconditional", "discriminator, stated rate, timed"))
def test_guidance(cuda, name):
    with cuda.setting_up():
        net = GUIDANCES[name](network())
    check(cuda, net)


def test_wanted_classes_travel_once(cuda):
    with cuda.setting_up():
        net = network()
    images(net, class_idx=[0, 1], num_steps=STEPS)
    assert ("sampling/generation.py", "generate_images") in cuda.used


def test_gan_sampler(cuda):
    with cuda.setting_up():
        kwargs = dict(model_channels=8, z_emb_dim=8, nz=6, n_mlp=1, channel_mult=[1, 2], num_blocks=1)
        net = DDGANGenerator(8, 1, CLASSES, num_timesteps=2, beta_min=0.1, beta_max=20.0, **kwargs)
        net = net.eval().requires_grad_(False).to(CUDA)
        images(net)
    cuda.used.clear()
    images(net)  # the constants of the steps are there now
    assert {file for file, _ in cuda.used} == {"sampling/arrival.py"}
