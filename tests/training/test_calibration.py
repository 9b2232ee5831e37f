"""Test temperatures and transitions that are found from noisy labels, on data whose posterior is known."""

import numpy as np
import pytest
import torch

from archives.label_noise import transition_matrix
from training.calibration import Profile, estimate_transition, fit_temperature, log_likelihoods

N, C = 20_000, 5


def known(seed, kind="sym", rate=0.4, n=N, spread=3.0):
    """Return logits of the true posterior, T, and the labels observed of classes drawn from that posterior."""
    g = np.random.default_rng(seed)
    T = transition_matrix(kind, rate, C)
    logits = g.normal(size=[n, C]) * spread
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    clean = (p.cumsum(1) > g.random([n, 1])).argmax(1)
    observed = (T[clean].cumsum(1) > g.random([n, 1])).argmax(1)
    return torch.from_numpy(logits), torch.from_numpy(T), torch.from_numpy(observed)


def test_likelihood_is_that_of_the_observed_label():
    logits, T, o = known(0, n=7)
    expected = [np.log((torch.softmax(x / 2, 0) @ T[:, k]).item()) for x, k in zip(logits, o, strict=True)]
    np.testing.assert_allclose(log_likelihoods(logits, T, o, temp=2.0), expected)


@pytest.mark.parametrize("wrong_by", [0.25, 1.0, 3.0])
def test_temperature_undoes_a_wrong_scale(wrong_by):
    logits, T, o = known(1)
    assert fit_temperature(logits / wrong_by, o, T) == pytest.approx(1 / wrong_by, rel=0.05)


@pytest.mark.parametrize("kind", ["sym", "pair"])
def test_transition_of_a_known_posterior(kind):
    logits, T, o = known(2, kind)
    found = estimate_transition(torch.softmax(logits, 1), o)
    assert found.sum(dim=1).numpy() == pytest.approx(1)
    assert (found - T).abs().max() < 0.03


def test_transition_makes_the_labels_most_likely():
    logits, T, o = known(3, n=2000)
    p = torch.softmax(logits, 1)
    found = estimate_transition(p, o)
    assert log_likelihoods(logits, found, o).mean() > log_likelihoods(logits, T, o).mean()


def test_a_class_without_images_gets_the_common_rate():
    logits, T, o = known(4)
    logits[:, 0] = -1e3
    found = estimate_transition(torch.softmax(logits, 1), o)
    assert torch.isfinite(found).all()
    # Nothing is known of its row but the rate of the rest.
    assert float(found[0, 0]) == pytest.approx(float(found.diagonal()[1:].mean()), abs=0.1)


def test_both_at_once_from_overconfident_logits():
    logits, T, o = known(5, spread=6.0)
    held_out = torch.arange(N) % 4 == 0
    found = Profile(logits * 2, o, held_out)
    assert found.temp == pytest.approx(2, rel=0.1)
    assert (found.transition - T).abs().max() < 0.03


def test_limits_of_the_rate_are_those_of_the_temperature():
    logits, T, o = known(6, spread=6.0, n=4000)
    found = Profile(logits, o)
    low, high = found.rate_limits()
    assert -0.05 < low < -0.002 and 0.002 < high < 0.05
    assert found.rate(np.log(found.temp)) + low < 0.4 < found.rate(np.log(found.temp)) + high
    # With four times the images they are half as far.
    wide = found.rate_limits()
    narrow = Profile(*(x for x in known(6, spread=6.0, n=16_000)[::2])).rate_limits()
    assert np.subtract(*narrow) == pytest.approx(np.subtract(*wide) / 2, rel=0.4)
