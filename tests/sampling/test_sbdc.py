"""SBDC in closed form: guidance by the optimal discriminator, what it is called with, how it composes."""

import functools

import numpy as np
import pytest
import torch

import dnnlib
from sampling.generation import generate_images
from sampling.guidance import (
    AffineGuidance,
    ClassifierFreeGuidance,
    DiscriminatorGuidance,
    Evidence,
    GatedGuidance,
    gated_discriminator,
)
from sampling.samplers import ablation_sampler, heun_sampler
from tests.support.denoisers import Recorder, denoise, linear
from tests.support.gaussians import ASYM, LABELS, MEANS, STD, WORLDS, Gaussians, shuffle_for, world
from tests.support.objectives import CPU


@pytest.mark.parametrize("name", WORLDS)
def test_calibrated_guidance_makes_the_clean_score_of_the_noisy_one(name):
    noisy, clean, optimal, eta, share = WORLDS[name]
    guided = DiscriminatorGuidance(noisy, optimal, evidence=Evidence(eta, share))
    generator = torch.Generator().manual_seed(0)
    for sigma in torch.tensor([0.002, 0.05, 0.3, 1, 4, 20, 80], dtype=torch.float64):
        labels, where = LABELS.repeat(40, 1), MEANS.repeat_interleave(40, dim=0)  # also where the label is wrong
        x = where + (STD**2 + sigma**2).sqrt() * torch.randn([120, 2], generator=generator).double()
        x = x[:, :, None, None]
        scores = [(net(x, sigma, labels) - x) / sigma**2 for net in (guided, clean, noisy)]
        assert (scores[0] - scores[1]).abs().max() <= 1e-6
        assert (scores[2] - scores[1]).abs().max() > (0.02 if sigma < 10 else 1e-5)


class Overconfident(Gaussians):
    """A discriminator whose evidence, its logit without logit R, is `factor(sigma)` times that of another."""

    def __init__(self, inner, share, factor):
        self.inner, self.prior, self.factor = inner, torch.as_tensor(share).logit(), factor

    def __call__(self, x, sigma, class_labels):
        prior = self.prior[class_labels.argmax(dim=1)]
        return prior + self.factor(torch.as_tensor(sigma)) * (self.inner(x, sigma, class_labels) - prior)


def factor(sigma):
    return (0.9 - 0.3 * sigma.log()).exp()


@pytest.mark.parametrize("name", WORLDS)
def test_the_right_temperature_undoes_what_multiplied_the_evidence(name):
    noisy, clean, optimal, eta, share = WORLDS[name]
    loud = Overconfident(optimal, share, factor)
    nets = (
        clean,
        DiscriminatorGuidance(noisy, loud, evidence=Evidence(eta, share, factor)),
        DiscriminatorGuidance(noisy, loud, evidence=Evidence(eta, share)),
    )
    generator = torch.Generator().manual_seed(0)
    for sigma in torch.tensor([0.05, 0.3, 1, 4, 8], dtype=torch.float64):
        labels, where = LABELS.repeat(40, 1), MEANS.repeat_interleave(40, dim=0)
        x = where + (STD**2 + sigma**2).sqrt() * torch.randn([120, 2], generator=generator).double()
        right, calibrated, as_it_is = (net(x[:, :, None, None], sigma, labels) / sigma**2 for net in nets)
        assert (calibrated - right).abs().max() <= 1e-6
        assert (as_it_is - right).abs().max() > 0.01


def test_every_image_has_the_temperature_of_its_noise_level():
    evidence = Evidence(torch.full([3], 0.4), torch.tensor([0.2, 0.5, 0.7]), lambda s: 1 + s)
    guided = DiscriminatorGuidance(Recorder(denoise), Recorder(linear), evidence=evidence)
    x, sigma, labels = torch.randn([3, 1, 2, 2]) / 9, torch.tensor([0.5, 2.0, 7.0]), torch.eye(3)
    found = guided.correction(x, sigma, labels)
    for i in range(3):
        torch.testing.assert_close(found[i : i + 1], guided.correction(x[i : i + 1], sigma[i], labels[i : i + 1]))


def test_uniform_shuffle_is_not_exact_for_asymmetric_noise():
    noisy, clean, optimal, eta, share = world(ASYM, shuffle_for(ASYM, None))
    guided = DiscriminatorGuidance(noisy, optimal, evidence=Evidence(eta, share))
    x = torch.randn([300, 2, 1, 1], generator=torch.Generator().manual_seed(0)).double()
    labels, sigma = LABELS.repeat(100, 1), torch.tensor(1.0, dtype=torch.float64)
    assert (guided(x, sigma, labels) - clean(x, sigma, labels)).abs().max() > 0.01


@pytest.mark.parametrize("name", WORLDS)
def test_sampling_with_calibrated_guidance_is_as_right_as_the_clean_model(name):
    noisy, clean, optimal, eta, share = WORLDS[name]
    labels = LABELS.repeat(200, 1)
    latents = torch.randn([600, 2, 1, 1], generator=torch.Generator().manual_seed(1))
    guided = DiscriminatorGuidance(noisy, optimal, evidence=Evidence(eta, share))

    def accuracy(net):
        samples = heun_sampler(net, latents, labels, num_steps=40)
        found = Gaussians.log_p(samples, torch.tensor(0.0)).argmax(dim=1)
        return samples, float((found == labels.argmax(dim=1)).float().mean())

    (right, best), (corrected, reached) = accuracy(clean), accuracy(guided)
    assert best > 0.99 and abs(reached - best) <= 1 / 600 and accuracy(noisy)[1] < 0.85
    assert (right - corrected).abs().max() < 1e-4  # not only as often: the same samples


SAMPLERS = {
    "heun": heun_sampler,
    "vp scaling": functools.partial(ablation_sampler, discretization="vp", schedule="vp", scaling="vp"),
    "churn": functools.partial(heun_sampler, S_churn=20),
}


def sample(net, sampler, batch=4, seeds=range(4)):
    return np.concatenate(
        [
            x
            for _, x, _ in generate_images(
                net, seeds, device=CPU, batch=batch, sampler=functools.partial(sampler, num_steps=5)
            )
        ]
    )


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_discriminator_sees_what_the_network_sees(sampler):
    net, probe = Recorder(denoise), Recorder(linear)
    sample(DiscriminatorGuidance(net, probe, weight=0.1), sampler)
    assert len(net.calls) == len(probe.calls) == 9
    for ours, theirs in zip(net.calls, probe.calls, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_correction_is_weight_times_variance_times_gradient():
    x = torch.randn([2, 1, 2, 2], dtype=torch.float64)
    labels, sigma = torch.eye(3)[[0, 2]], torch.tensor(3.0, dtype=torch.float64)
    guided = gated_discriminator(Recorder(denoise), Recorder(linear), weights=(0.5, 0.25))
    gradient = torch.arange(1.0, 5).reshape(1, 1, 2, 2) * torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)
    for order, weight in ((1, 0.5), (2, 0.25)):
        found = guided.at_step(order, 3.0)(x, sigma, labels) - denoise(x, sigma, labels)
        torch.testing.assert_close(found, (weight * 9 * gradient).double())


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_constant_discriminator_changes_nothing(sampler, calibrated):
    plain = sample(Recorder(denoise), sampler)
    evidence = Evidence(torch.full([3], 0.4), torch.full([3], 0.5)) if calibrated else None
    for constant in (lambda x, sigma, labels: torch.full([len(x)], 1.7), lambda x, sigma, labels: 0 * x.sum((1, 2, 3))):
        guided = DiscriminatorGuidance(Recorder(denoise), Recorder(constant), evidence=evidence)
        assert np.array_equal(sample(guided, sampler), plain)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_gate(sampler):
    plain, closed = sample(Recorder(denoise), sampler), Recorder(linear)
    guided = gated_discriminator(Recorder(denoise), closed, weights=(1, 1), gate=(1e3, 1e4))
    assert np.array_equal(sample(guided, sampler), plain)
    assert not closed.calls
    net, half = Recorder(denoise), Recorder(linear)
    sample(gated_discriminator(net, half, weights=(0.01, 0.01), gate=(1.5, 50)), sampler)
    seen, asked = ([float(sigma) for _, sigma, _ in r.calls] for r in (net, half))
    assert asked == [s for s in seen if 1.5 <= s <= 50] and 0 < len(asked) < len(seen)


def test_gate_picks_the_denoiser_of_each_image_when_it_is_called_directly():
    plain, first, second = (Recorder(lambda x, sigma, labels, k=k: k * x) for k in (1, 2, 3))
    gated = GatedGuidance(plain, (first, second), gate=(1.5, 50))
    x, sigma = torch.ones([4, 1, 2, 2]), torch.tensor([1.4, 1.5, 50.0, 51.0])
    assert gated(x, sigma, torch.eye(3)[[0, 1, 2, 0]])[:, 0, 0, 0].tolist() == [1, 2, 2, 1]
    for level, factor in ((1.0, 1), (torch.tensor(2.0), 2), (sigma[1:3], 2), (sigma[::3], 1)):
        for recorder in (plain, first):
            recorder.calls.clear()
        assert torch.equal(gated(x[:2], level, torch.eye(3)[:2]), factor * x[:2])
        assert (len(plain.calls), len(first.calls)) == ((1, 0) if factor == 1 else (0, 1))
    assert not second.calls
    for level, inside in ((1.4, False), (1.5, True), (50.0, True), (50.1, False)):
        assert gated.inside(level) is inside
        assert gated.at_step(2, level) is (second if inside else plain)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_weights_of_the_two_orders(sampler):
    def calls(*weights):
        net, probe = Recorder(denoise), Recorder(linear)
        sample(gated_discriminator(net, probe, weights=weights), sampler)
        return [[round(float(sigma), 6) for _, sigma, _ in r.calls] for r in (net, probe)]

    levels, first = calls(1, 0)
    assert first == levels[0::2] and calls(0, 1)[1] == levels[1::2] and calls(0, 0)[1] == []


def test_composes_with_other_guidance():
    strong, weak = Recorder(lambda *a: denoise(*a) * 1.5), Recorder(denoise)

    def guided(weight):
        inner = DiscriminatorGuidance(strong, Recorder(linear), weight=weight)
        return ClassifierFreeGuidance(AffineGuidance(inner, weak, 2.0), 1)

    net = GatedGuidance(strong, (guided(1), guided(3)))
    x, labels, sigma = torch.ones([1, 1, 2, 2]), torch.eye(3)[[1]], torch.tensor(2.0)
    for order, weight in ((1, 1), (2, 3)):
        corrected = 1.5 * denoise(x, sigma, None) + weight * 4 * 2 * torch.arange(1.0, 5).reshape(1, 1, 2, 2)
        expected = corrected + 2 * (corrected - denoise(x, sigma, None))
        torch.testing.assert_close(net.at_step(order, 2.0)(x, sigma, labels), expected)


def test_a_gate_inside_other_guidance_is_refused():
    net = Recorder(denoise)
    gated = gated_discriminator(net, Recorder(linear), weights=(2, 0))
    for wrap in (
        lambda: ClassifierFreeGuidance(gated, 2),
        lambda: AffineGuidance(gated, net, 1),
        lambda: AffineGuidance(net, gated, 1),
        lambda: DiscriminatorGuidance(gated, Recorder(linear)),
        lambda: GatedGuidance(gated, (net, net)),
        lambda: GatedGuidance(net, (net, gated)),
    ):
        with pytest.raises(TypeError, match="outermost"):
            wrap()


def test_images_do_not_depend_on_the_batch():
    def nonlinear(x, sigma, labels):
        return torch.tanh(linear(x, sigma, labels))

    def net():
        return DiscriminatorGuidance(
            Recorder(denoise),
            Recorder(nonlinear),
            evidence=Evidence(torch.tensor([0.1, 0.4, 0.3]), torch.tensor([0.5, 0.5, 0.4])),
        )

    whole = sample(net(), heun_sampler, seeds=range(7), batch=7)
    assert np.array_equal(whole, sample(net(), heun_sampler, seeds=range(7), batch=2))


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_and_rates_stay_finite(size):
    rates, shares = torch.tensor([0.0, 0.4, 1.0]), torch.tensor([1.0, 0.5, 0.5])
    guided = DiscriminatorGuidance(
        Recorder(denoise), Recorder(lambda x, s, y: size * x.sum((1, 2, 3))), evidence=Evidence(rates, shares)
    )
    x = torch.ones([3, 1, 2, 2])
    change = guided(x, torch.tensor(1.0), torch.eye(3)) - denoise(x, torch.tensor(1.0), None)
    wrong = torch.tensor([0.0, 0.0 if size > 0 else 1.0, 1.0])
    torch.testing.assert_close(change[:, 0, 0, 0], size * wrong)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_where_every_label_is_wrong_the_weight_is_one(share):
    """The posterior probability that the label is wrong is 1, whatever pairs the discriminator has seen."""
    rates, shares = torch.tensor([1.0, 0.0, 0.4]), torch.tensor([share, 1 - share, 0.5])
    guided = DiscriminatorGuidance(Recorder(denoise), Recorder(linear), evidence=Evidence(rates, shares))
    x = torch.ones([3, 1, 2, 2])
    constant = DiscriminatorGuidance(Recorder(denoise), Recorder(linear)).correction(x, torch.tensor(1.0), torch.eye(3))
    found = guided.correction(x, torch.tensor(1.0), torch.eye(3))
    assert torch.equal(found[0], constant[0]) and constant[0].any()
    assert not found[1].any()
    assert 0 < (found[2] / constant[2]).min() <= (found[2] / constant[2]).max() < 1


def test_other_formats_are_refused():
    other = Recorder(linear)
    other.label_dim = 4
    with pytest.raises(dnnlib.UserError, match=r"1 channel\(s\) and 4 classes; the network makes 2x2 .* 3 classes"):
        DiscriminatorGuidance(Recorder(denoise), other)
