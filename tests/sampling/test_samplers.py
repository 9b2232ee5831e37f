"""Samplers, per-seed randomness and guidance against fixtures and closed forms."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dnnlib
from sampling.guidance import AffineGuidance, ClassifierFreeGuidance
from sampling.samplers import ablation_sampler, heun_sampler
from sampling.schedules import DISCRETIZATIONS, SCALINGS, SCHEDULES
from sampling.seeds import StackedRandomGenerator
from tests.support.paths import FIXTURES

SEEDS = np.load(FIXTURES / "sampler_seeds.npz")


class Denoiser:
    """What samplers and guidance ask of a denoiser; records the noise levels it is called with."""

    img_resolution, img_channels, label_dim, sigma_min, sigma_max = 3, 2, 3, 0, math.inf

    def __init__(self, formula):
        self.formula, self.sigmas = formula, []

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def __call__(self, x, sigma, class_labels=None):
        self.sigmas.append(float(sigma))
        return self.formula(x, sigma, class_labels)


def toy(x, sigma, labels):
    """The fixtures' denoiser (docs/methods/edm.md, Sampler fixtures)."""
    return x / (1 + sigma**2) + 0.3 * x.sin() * sigma / (1 + sigma) + 0.1 * labels.argmax(1).to(x).reshape(-1, 1, 1, 1)


def gaussian(x, sigma, labels, sd=0.5):
    """The exact denoiser of data ~ N(0, sd^2)."""
    return x * sd**2 / (sd**2 + sigma**2)


def start():
    rnd = StackedRandomGenerator("cpu", SEEDS["seeds"])
    latents = rnd.randn([4, 2, 3, 3])
    return rnd, latents, rnd.randint(3, size=[4])


def cases(name):
    return list(json.loads(str(np.load(FIXTURES / f"{name}.npz")["config"])).items())


# Seeds.


def test_seeds_reproduce_the_published_streams_exactly():
    rnd, latents, classes = start()
    assert np.array_equal(latents, SEEDS["latents"]) and latents.dtype == torch.float32
    assert np.array_equal(classes, SEEDS["labels"])
    assert np.array_equal(rnd.randn_like(latents.double()), SEEDS["next_randn_float64"])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=5), st.data())
def test_a_seeds_stream_does_not_depend_on_its_neighbors(seeds, data):
    part = data.draw(st.lists(st.sampled_from(range(len(seeds))), min_size=1))
    together = StackedRandomGenerator("cpu", seeds)
    alone = StackedRandomGenerator("cpu", [seeds[i] % 2**32 for i in part])
    for _ in range(2):
        assert torch.equal(together.randn([len(seeds), 3])[part], alone.randn([len(part), 3]))
        assert torch.equal(together.randint(9, size=[len(seeds)])[part], alone.randint(9, size=[len(part)]))


def test_a_size_other_than_the_number_of_seeds_is_refused():
    with pytest.raises(ValueError, match="2 seeds"):
        StackedRandomGenerator("cpu", [1, 2]).randn([3, 4])


# Samplers.


@pytest.mark.parametrize(
    "sampler, fixture, case, kwargs",
    [
        *[(heun_sampler, "sampler_edm", *case) for case in cases("sampler_edm")],
        *[(ablation_sampler, "sampler_ablation", *case) for case in cases("sampler_ablation")],
    ],
)
def test_fixtures(sampler, fixture, case, kwargs):
    rnd, latents, classes = start()
    x = sampler(Denoiser(toy), latents, torch.eye(3)[classes], rnd.randn_like, **kwargs)
    assert x.dtype == torch.float64
    np.testing.assert_allclose(x, np.load(FIXTURES / f"{fixture}.npz")[case], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kwargs", [{}, dict(num_steps=1), dict(num_steps=9, S_churn=30, S_min=0.1, S_max=30, rho=5)])
def test_the_general_sampler_with_edms_parts_is_edms_sampler(kwargs):
    outputs = []
    for sampler in (heun_sampler, ablation_sampler):
        rnd, latents, classes = start()
        outputs.append(sampler(Denoiser(toy), latents, torch.eye(3)[classes], rnd.randn_like, **kwargs))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    assert outputs[0].isfinite().all()


@pytest.mark.parametrize(
    "sampler, kwargs, order",
    [
        (heun_sampler, {}, 2),
        (ablation_sampler, dict(solver="heun"), 2),
        (ablation_sampler, dict(solver="heun", alpha=0.7), 2),
        (ablation_sampler, dict(solver="euler"), 1),
        (ablation_sampler, dict(solver="heun", schedule="vp", scaling="vp", discretization="vp"), 2),
        (ablation_sampler, dict(solver="euler", schedule="ve", scaling="vp", discretization="ve"), 1),
    ],
)
def test_order_of_convergence_to_the_exact_solution_on_gaussian_data(sampler, kwargs, order):
    # dx/dsigma = x sigma/(sd^2 + sigma^2), so x is proportional to sqrt(sd^2 + sigma^2); sd = 1/2. The last step, to 0,
    # is an Euler step in every case; its error does not shrink with the number of steps, so both sides end before it.
    low, high, seen = 0.05, 20, []

    def formula(x, sigma, labels):
        seen.append((x, float(sigma)))
        return gaussian(x, sigma, labels)

    def error(n):
        latents = torch.ones([1, 1, 1, 1])
        sampler(Denoiser(formula), latents, num_steps=n, sigma_min=low, sigma_max=high, **kwargs)
        x, sigma = seen[-1]
        assert sigma == pytest.approx(low)
        return abs(float(x) / (high * math.sqrt((0.25 + low**2) / (0.25 + high**2))) - 1)

    assert math.log2(error(128) / error(256)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(
    "sampler, kwargs, evaluations",
    [(heun_sampler, {}, 2 * 7 - 1), (ablation_sampler, {}, 2 * 7 - 1), (ablation_sampler, dict(solver="euler"), 7)],
)
def test_noise_is_drawn_at_every_step_and_the_network_called_as_often_as_stated(sampler, kwargs, evaluations):
    net, draws = Denoiser(gaussian), []

    def randn_like(x):
        draws.append(x.dtype)
        return torch.ones_like(x)

    sampler(net, torch.ones([2, 1, 2, 2]), None, randn_like, num_steps=7, **kwargs)
    assert draws == [torch.float64] * 7
    assert len(net.sigmas) == evaluations


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_churn_no_noise_comes_in_by_rounding(schedule):
    # A t_hat that is t but for the last digit would let in noise of 1e-8 sigma; it is drawn a million times too large.
    x = torch.ones([1, 1, 1, 1])
    quiet = ablation_sampler(Denoiser(gaussian), x, None, torch.zeros_like, num_steps=64, schedule=schedule)
    loud = ablation_sampler(
        Denoiser(gaussian), x, None, lambda x: torch.full_like(x, 1e6), num_steps=64, schedule=schedule
    )
    assert torch.equal(quiet, loud)


@pytest.mark.parametrize("sampler", [heun_sampler, ablation_sampler])
def test_only_noise_levels_that_the_network_knows_are_used_and_the_range_is_clipped(sampler):
    net = Denoiser(gaussian)
    net.sigma_min, net.sigma_max = 0.5, 10
    net.round_sigma = lambda sigma: (torch.as_tensor(sigma) * 4).round() / 4
    sampler(net, torch.ones([1, 1, 2, 2]), num_steps=5, S_churn=40)
    assert {4 * s % 1 for s in net.sigmas} == {0} and min(net.sigmas) == 0.5
    assert max(net.sigmas) > 10  # t_hat of the first step: churn adds noise on top of sigma_max
    with pytest.raises(dnnlib.UserError, match="sigma_min=20.*0.5 to 10"):
        sampler(net, torch.ones([1, 1, 2, 2]), sigma_min=20, sigma_max=80)
    with pytest.raises(dnnlib.UserError, match="sigma_min=5 is not below sigma_max=1"):
        sampler(net, torch.ones([1, 1, 2, 2]), sigma_min=5, sigma_max=1)


@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_every_combination_finds_the_exact_solution(discretization, schedule, scaling):
    x = ablation_sampler(
        Denoiser(gaussian),
        torch.ones([1, 1, 1, 1]),
        num_steps=256,
        discretization=discretization,
        schedule=schedule,
        scaling=scaling,
    )
    assert float(x) == pytest.approx(0.5, rel=0.08)


def test_unknown_parts_and_an_empty_iddpm_range_are_refused():
    with pytest.raises(ValueError, match="solver is 'rk4'; known: euler, heun"):
        ablation_sampler(Denoiser(gaussian), torch.ones([1, 1, 1, 1]), solver="rk4")
    with pytest.raises(dnnlib.UserError, match="iddpm has no noise level"):
        ablation_sampler(
            Denoiser(gaussian), torch.ones([1, 1, 1, 1]), discretization="iddpm", sigma_min=80.9, sigma_max=81
        )


# Guidance.


def labeled(slope):
    return Denoiser(lambda x, sigma, labels: slope * x + sigma * (labels @ torch.arange(1.0, 4)).reshape(-1, 1, 1, 1))


X, SIGMA, LABELS = torch.linspace(-1, 1, 36).reshape(2, 2, 3, 3), torch.tensor(0.7), torch.eye(3)[[0, 2]]


@settings(max_examples=20, deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3))
def test_guidance_is_the_stated_combination_and_composes(w, s):
    net, net_2 = labeled(0.5), labeled(0.2)
    d, d_0, d_2 = net(X, SIGMA, LABELS), net(X, SIGMA, 0 * LABELS), net_2(X, SIGMA, LABELS)
    guided = ClassifierFreeGuidance(net, s)
    torch.testing.assert_close(guided(X, SIGMA, LABELS), d_0 + s * (d - d_0))
    torch.testing.assert_close(AffineGuidance(net, net_2, w)(X, SIGMA, LABELS), (1 + w) * d - w * d_2)
    torch.testing.assert_close(
        AffineGuidance(guided, net_2, w)(X, SIGMA, LABELS),
        (1 + w) * (d_0 + s * (d - d_0)) - w * d_2,
        rtol=1e-4,
        atol=1e-4,
    )
    assert torch.equal(AffineGuidance(net, labeled(0.5), w)(X, SIGMA, LABELS), d)


def test_guidance_of_no_effect_costs_nothing_and_changes_nothing():
    net, net_2 = labeled(0.5), labeled(0.2)
    expected = labeled(0.5)(X, SIGMA, LABELS)
    assert torch.equal(AffineGuidance(net, net_2, 0)(X, SIGMA, LABELS), expected)
    assert torch.equal(ClassifierFreeGuidance(net, 1)(X, SIGMA, LABELS), expected)
    assert (len(net.sigmas), len(net_2.sigmas)) == (2, 0)
    assert torch.equal(ClassifierFreeGuidance(net, 0)(X, SIGMA, LABELS), labeled(0.5)(X, SIGMA, 0 * LABELS))
    assert len(net.sigmas) == 3
    unlabeled = Denoiser(gaussian)
    ClassifierFreeGuidance(unlabeled, 4)(X, SIGMA)
    assert len(unlabeled.sigmas) == 1


def test_a_guided_denoiser_states_what_a_denoiser_states_and_can_be_sampled():
    net, net_2 = labeled(0.5), labeled(0.2)
    net.sigma_max, net_2.sigma_min = 50, 0.01
    net.round_sigma = lambda sigma: torch.as_tensor(sigma) * 1.0
    guided = AffineGuidance(ClassifierFreeGuidance(net, 2), net_2, 1)
    assert (guided.img_resolution, guided.img_channels, guided.label_dim) == (3, 2, 3)
    assert (guided.sigma_min, guided.sigma_max) == (0.01, 50)
    heun_sampler(guided, X, LABELS, num_steps=3)
    assert max(net.sigmas) == pytest.approx(50) and min(net_2.sigmas) == pytest.approx(0.01)


@pytest.mark.parametrize("name, value", [("img_resolution", 8), ("img_channels", 1), ("label_dim", 0)])
def test_networks_that_do_not_fit_are_refused(name, value):
    other = labeled(1)
    setattr(other, name, value)
    with pytest.raises(dnnlib.UserError, match="weaker network makes .* the network makes 3x3 images with 2 channel"):
        AffineGuidance(labeled(1), other, 1)
    other.label_dim = 0
    with pytest.raises(dnnlib.UserError, match="network with labels"):
        ClassifierFreeGuidance(other, 2)
