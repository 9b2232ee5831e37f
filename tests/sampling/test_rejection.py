"""Rejection in closed form: what it samples, what an image depends on, what happens when nothing is accepted."""

import functools

import numpy as np
import pytest
import torch

import dnnlib
from sampling import rejection
from sampling.generation import generate_images
from sampling.guidance import ClassifierFreeGuidance, Evidence, GatedGuidance
from sampling.rejection import LabelJudge, Rejection
from sampling.samplers import heun_sampler
from sampling.seeds import StackedRandomGenerator
from tests.support.denoisers import Recorder, denoise, linear
from tests.support.gaussians import LABELS, MEANS, PRIORS, STD, WORLDS, Gaussians
from tests.support.objectives import CPU

RATES, SHARES = torch.tensor([0.1, 0.4, 0.3]), torch.tensor([0.5, 0.5, 0.4])
FEW = functools.partial(heun_sampler, num_steps=5)


def rejecting(discriminator, net=None, **kwargs):
    evidence = Evidence(kwargs.pop("rates", RATES), SHARES)
    return Rejection(net or Recorder(denoise), Recorder(discriminator), evidence=evidence, sigma=0.1, **kwargs)


def nonlinear(x, sigma, labels):
    return 4 * torch.tanh(linear(x, sigma, labels))


def sample(net, seeds=range(7), **kwargs):
    return np.concatenate([x for _, x, _ in generate_images(net, seeds, device=CPU, sampler=FEW, **kwargs)])


def exactly(net, latents, labels, randn_like):
    """Sample Gaussian classes without a solver: latents choose the class that made the image."""
    shares = net.weights.T[labels.argmax(dim=1)]
    edges = (shares / shares.sum(dim=1, keepdim=True)).cumsum(dim=1)
    made_by = (torch.special.ndtr(latents[:, :1, 0, 0].double()) > edges).sum(dim=1)
    return MEANS[made_by][:, :, None, None] + STD * randn_like(latents)


class Classifier(Gaussians):
    """The logits, times 2, of the exact classifier of clean images at a noise level."""

    def __init__(self):
        pass

    def __call__(self, x, sigma):
        return 2 * (self.log_p(x, sigma[:, None]) + torch.tensor(PRIORS).log())


@pytest.mark.parametrize("by", ["discriminator", "classifier"])
@pytest.mark.parametrize("name", WORLDS)
def test_accepted_samples_are_those_of_the_clean_classes(name, by):
    """Whatever made the labels wrong: the mean of a class moves with every wrong image in it."""
    noisy, _, optimal, eta, share = WORLDS[name]
    if by == "classifier":
        optimal, share = LabelJudge(Classifier(), noisy.weights / noisy.weights.sum(dim=1, keepdim=True), 2.0), 1 - eta
    each = 1500
    labels = LABELS.repeat_interleave(each, dim=0)
    rnd = StackedRandomGenerator(CPU, range(len(labels)))
    latents = rnd.randn([len(labels), 2, 1, 1])
    net = Rejection(noisy, optimal, evidence=Evidence(eta, share), sigma=0.2)
    plain = exactly(noisy, latents, labels, torch.randn_like)
    found = net.sample(exactly, latents, labels, rnd, len(labels))
    error = 4 * STD / each**0.5
    assert ((found.reshape(3, each, 2).mean(dim=1) - MEANS).abs() < error).all()
    assert ((plain.reshape(3, each, 2).mean(dim=1) - MEANS).abs() > error).any()
    assert net.drawn / len(labels) == pytest.approx(float((1 / (1 - eta)).mean()), rel=0.05) and net.given_up == 0


def test_images_do_not_depend_on_the_batch():
    whole = sample(rejecting(nonlinear), batch=7)
    for how in (dict(batch=2), dict(batch=3, same_shape=True)):
        assert np.array_equal(whole, sample(rejecting(nonlinear), **how))
    assert (whole != sample(Recorder(denoise), batch=7)).any()


def test_a_compiled_network_sees_one_shape():
    net = Recorder(denoise)
    sample(guided := rejecting(nonlinear, net), batch=3, same_shape=True)
    assert {len(x) for x, *_ in net.calls} == {3} and guided.drawn > 7


def test_the_discriminator_sees_images_with_noise():
    net = rejecting(nonlinear)
    sample(net)
    x, sigma, labels = net.discriminator.calls[0]
    assert sigma.tolist() == [pytest.approx(0.1)] and labels.sum(dim=1).tolist() == [1] * 7


def test_where_no_label_is_wrong_nothing_is_rejected():
    net = rejecting(nonlinear, rates=torch.zeros(3))
    assert np.array_equal(sample(net), sample(Recorder(denoise))) and net.drawn == 7


def test_without_an_accepted_draw_the_most_probable_one_counts(monkeypatch):
    monkeypatch.setattr(rejection, "TRIES", 6)
    right = []

    def never(x, sigma, labels):
        right.append(-25 + x.mean((1, 2, 3)).to(torch.float32))
        return right[-1]

    net = rejecting(never)
    seen, draw = [], FEW

    def watched(*args, **kwargs):
        seen.append(draw(*args, **kwargs))
        return seen[-1]

    ((_, images, _),) = generate_images(net, [5], device=CPU, sampler=watched)
    assert net.drawn == 6 and net.given_up == 1
    best = seen[int(torch.cat(right).argmax())]
    assert np.abs(images[0, :, :, 0] - (best[0, 0] * 127.5 + 128).clamp(0, 255).numpy()).max() <= 1


def test_what_it_stands_in_and_what_stands_in_it():
    plain = Recorder(denoise)
    gated = GatedGuidance(plain, (plain, plain))
    assert np.array_equal(sample(rejecting(nonlinear, gated)), sample(rejecting(nonlinear)))
    with pytest.raises(TypeError, match="outermost"):
        ClassifierFreeGuidance(rejecting(nonlinear), 2)
    other = Recorder(linear)
    other.label_dim = 4
    with pytest.raises(dnnlib.UserError, match="4 classes; the network makes 2x2 .* 3 classes"):
        Rejection(plain, other, evidence=Evidence(RATES, SHARES), sigma=0.1)


def test_it_is_a_denoiser_itself():
    x, sigma, labels = torch.randn([2, 1, 2, 2]), torch.tensor(1.0), torch.eye(3)[:2]
    assert torch.equal(rejecting(nonlinear)(x, sigma, labels), denoise(x, sigma, labels))
