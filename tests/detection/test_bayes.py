"""Bayes' rule for labels, on images whose clean posterior is known."""

import numpy as np
import pytest

from archives.label_noise import transition_matrix
from detection.bayes import judge

C = 4


def images(n, rate, seed=0, spread=4.0):
    """Return exact logits [n,C], clean labels, observed labels and T."""
    g = np.random.default_rng(seed)
    T = transition_matrix("sym", rate, C)
    logits = (g.normal(size=[n, C]) * spread).astype(np.float32)
    p = np.exp(logits.astype(float))
    clean = ((p / p.sum(1, keepdims=True)).cumsum(1) > g.random([n, 1])).argmax(1)
    return logits, clean, (T[clean].cumsum(1) > g.random([n, 1])).argmax(1), T


def test_posterior_by_hand():
    T = np.array([[0.9, 0.1], [0.3, 0.7]])
    p = np.array([[0.5, 0.5], [0.2, 0.8], [0.5, 0.5]], dtype=np.float32)
    held_out = np.array([True] * 3)
    found = judge(np.log(p), np.array([0, 0, 1]), held_out, T)
    share = p.astype(float) ** (1 / found.temp) * T.T[[0, 0, 1]]
    np.testing.assert_allclose(found.posterior, share / share.sum(1, keepdims=True), rtol=1e-5)
    assert found.transition is not T and (found.transition == T).all()


@pytest.mark.parametrize("sharpened", [1.0, 3.0])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5])
def test_rate_and_probabilities_are_honest(rate, sharpened):
    logits, clean, observed, T = images(20_000, rate)
    found = judge(logits * np.float32(sharpened), observed)
    low, high = found.noise_interval
    wrong = (clean != observed).mean()
    assert abs(found.noise_rate - wrong) < 0.015 and low - 0.01 < wrong < high + 0.01
    assert abs(found.transition - T).max() < 0.03
    # Of the labels that are wrong with probability about q, about q are wrong.
    q = 1 - found.posterior[np.arange(len(observed)), observed]
    for a in (0.1, 0.3, 0.5, 0.7, 0.9):
        near = abs(q - a) < 0.1
        if near.sum() > 500:
            assert (clean != observed)[near].mean() == pytest.approx(q[near].mean(), abs=0.06)


def test_temperature_comes_from_held_out_images_alone():
    """A classifier that has learned its training labels by heart is as sure of them as it likes."""
    logits, clean, observed, T = images(20_000, 0.4, spread=2.5)
    held_out = np.arange(20_000) % 5 == 0
    learned = logits.copy()
    learned[~held_out, observed[~held_out]] += 3
    assert judge(learned.copy(), observed, held_out, T).temp == pytest.approx(1, rel=0.15)
    assert judge(learned.copy(), observed, None, T).temp < 0.7
