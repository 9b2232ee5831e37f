"""Test temperatures that are found from held-out targets, on data whose distribution is known."""

import math

import numpy as np
import pytest
import torch

import dnnlib
from archives.label_noise import transition_matrix
from training.calibration import fit_temperature, mean_log_likelihood
from training.temperature import Temperature

C = 4


def mixture(n, seed=0):
    """Return exact class logits of points of a Gaussian mixture seen at noise level sigma, sigma, and true classes."""
    g = torch.Generator().manual_seed(seed)
    means = 2 * torch.eye(C, dtype=torch.float64)
    clean = torch.randint(C, [n], generator=g)
    sigma = (torch.randn(n, generator=g, dtype=torch.float64) * 0.9).exp()
    variance = 0.3**2 + sigma.square()
    x = means[clean] + variance.sqrt()[:, None] * torch.randn(n, C, generator=g, dtype=torch.float64)
    logits = -(x[:, None] - means).square().sum(dim=2) / (2 * variance[:, None])
    return logits - logits.mean(dim=1, keepdim=True), sigma, clean


def observe(clean, kind, rate, seed=1):
    T = transition_matrix(kind, rate, C)
    u = np.random.default_rng(seed).random([len(clean), 1])
    return torch.from_numpy(T), torch.from_numpy((T[clean].cumsum(1) > u).argmax(1))


def sharpness(sigma):
    """Return by how much the logits are too large at each noise level."""
    return (0.7 - 0.4 * sigma.log()).exp()


@pytest.mark.parametrize("noise", [None, ("sym", 0.4), ("pair", 0.3)])
def test_sharpened_posterior_is_recovered_at_each_noise_level(noise):
    logits, sigma, clean = mixture(40_000)
    T, observed = observe(clean, *noise) if noise else (None, clean)
    found = fit_temperature(logits * sharpness(sigma)[:, None], sigma, observed, T)
    levels = torch.tensor([0.4, 1.0, 2.0], dtype=torch.float64)
    np.testing.assert_allclose(found(levels), sharpness(levels), rtol=0.15)


def test_exact_posterior_needs_no_temperature():
    logits, sigma, clean = mixture(20_000)
    T, observed = observe(clean, "sym", 0.4)
    found = fit_temperature(logits, sigma, observed, T)
    np.testing.assert_allclose(found(torch.tensor([0.4, 1.0, 2.0])), 1, atol=0.1)


def test_one_logit_with_soft_targets_is_a_network_of_two_classes():
    g = torch.Generator().manual_seed(0)
    truth = 3 * torch.randn(20_000, generator=g, dtype=torch.float64)
    sigma = torch.rand(20_000, generator=g) + 0.1
    targets = torch.sigmoid(truth)
    one = fit_temperature(truth / 2, sigma, targets)
    np.testing.assert_allclose(one(torch.tensor([0.2, 1.0])), 0.5, rtol=0.02)
    pairs = [torch.stack(pair, dim=1) for pair in ((-truth / 4, truth / 4), (1 - targets, targets))]
    assert fit_temperature(pairs[0], sigma, pairs[1]).coefficients == pytest.approx(one.coefficients, abs=1e-3)


def test_doubtful_targets_do_not_make_a_network_less_certain():
    g = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(40_000, generator=g, dtype=torch.float64)
    u = torch.rand(2, 40_000, generator=g, dtype=torch.float64)
    doubt = 0.4 * (torch.arange(40_000) % 2)
    targets = ((u[0] < torch.sigmoid(logits)) ^ (u[1] < doubt)).double()
    sigma = torch.rand(40_000, generator=g) + 0.1
    level = torch.tensor([0.3])
    assert float(fit_temperature(logits, sigma, targets, doubt=doubt)(level)) == pytest.approx(1, rel=0.05)
    assert float(fit_temperature(logits, sigma, targets)(level)) > 2
    assert float(fit_temperature(logits, sigma, targets, doubt=0 * doubt)(level)) > 2
    right, p = targets[0] > 0.5, float(torch.sigmoid(logits[0] / 3))
    expected = np.log(0.7 * (p if right else 1 - p) + 0.3 * (1 - p if right else p))
    one = mean_log_likelihood(logits[:1], targets[:1], temp=3.0, doubt=torch.tensor([0.3]))
    assert one == pytest.approx(expected)
    with pytest.raises(ValueError, match="two classes, these are of 4"):
        mean_log_likelihood(torch.zeros(3, 4), torch.arange(3), doubt=torch.zeros(3))


def test_likelihood_is_that_of_the_observed_label():
    logits, _, clean = mixture(7)
    T, observed = observe(clean, "sym", 0.4)
    expected = [np.log((torch.softmax(h / 2, 0) @ T[:, o]).item()) for h, o in zip(logits, observed, strict=True)]
    assert mean_log_likelihood(logits, observed, T, temp=2.0) == pytest.approx(np.mean(expected))


def test_few_images_change_little():
    logits, sigma, clean = mixture(4000)
    logits = logits * 3
    much, little = (fit_temperature(logits, sigma, clean, images=n)(torch.tensor(1.0)) for n in (4000, 2))
    assert 1 < little < 2 < much


@pytest.mark.parametrize("images, low, high", [(40_000, 0.9, 1.0), (400, 0.6, 0.9), (1, 0.5, 0.65)])
def test_certainty_needs_no_evidence_but_bows_to_it(images, low, high):
    """Of the most likely temperature, as much is left as the labels of so many images demand, and at least half."""
    logits, sigma, clean = mixture(4000)
    T, observed = observe(clean, "sym", 0.4)
    likely, found = (
        fit_temperature(2 * logits, sigma, observed, T, images=images, certain=certain)(torch.tensor(1.0))
        for certain in (False, True)
    )
    assert low < found / likely < high
    if images == 40_000:
        assert found == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("case", ["one noise level", "certain", "no information", "impossible"])
def test_degenerate_logits_give_a_temperature(case):
    logits, sigma, clean = mixture(50)
    T = torch.eye(C, dtype=torch.float64)
    if case == "one noise level":
        sigma = torch.ones_like(sigma)
    if case == "certain":
        logits = logits.softmax(dim=1).round() * 1e4
    if case == "no information":
        T = torch.full_like(T, 1 / C)
    if case == "impossible":  # no other class turns into the label, and the network excludes it
        logits, clean = torch.where(torch.arange(C) == 0, -1e6, logits), torch.zeros_like(clean)
    temp = fit_temperature(logits, sigma, clean, T)(torch.tensor([1e-6, 1.0, 1e6]))
    assert temp.isfinite().all() and (temp > 0).all()
    if case == "no information":
        assert temp.tolist() == pytest.approx([1, 1, 1])


def test_temperature_stays_constant_outside_its_noise_levels():
    found = Temperature((0.1, -0.2), 0.5, 2.0)
    np.testing.assert_allclose(
        found(torch.tensor([0.0, 0.5, 1.0, 2.0, 80.0])),
        np.exp([0.1 + 0.2 * math.log(2)] * 2 + [0.1] + [0.1 - 0.2 * math.log(2)] * 2),
        rtol=1e-6,
    )


def test_plain_data_and_back():
    found = Temperature((0.1, -0.2, 0.3), 0.01, 9.0)
    assert Temperature.read(found.plain(), "x.pkl") == found
    assert Temperature.read(None, "x.pkl") is None


@pytest.mark.parametrize(
    "value",
    [
        2.0,
        [1.0],
        {},
        dict(coefficients=[], sigma_min=0.1, sigma_max=1.0),
        dict(coefficients=["a"], sigma_min=0.1, sigma_max=1.0),
        dict(coefficients=[math.nan], sigma_min=0.1, sigma_max=1.0),
        dict(coefficients=[0.0, 1e9], sigma_min=0.1, sigma_max=1.0),
        dict(coefficients=[10**400], sigma_min=0.1, sigma_max=1.0),
        dict(coefficients=[0.0], sigma_min=-1.0, sigma_max=1.0),
        dict(coefficients=[0.0], sigma_min=2.0, sigma_max=1.0),
        dict(coefficients=[0.0], sigma_min=1.0, sigma_max=math.inf),
    ],
)
def test_record_that_is_no_temperature_is_refused(value):
    with pytest.raises(dnnlib.UserError, match=r"x\.pkl: the temperature"):
        Temperature.read(value, "x.pkl")
