"""Test the transition found from images whose class is certain, where the truth is known."""

import re

import numpy as np
import pytest

from archives.label_noise import transition_matrix
from training.transition_estimate import anchors, describe_transition, estimate_transition, noise_rate

C = 6


def known(kind, rate, n=3000, seed=0, spread=4.0):
    """Return noisy log-posteriors of images that are not all certain, T, and labels observed of their classes."""
    g = np.random.default_rng(seed)
    T = transition_matrix(kind, rate, C) if rate else np.eye(C)
    logits = g.normal(size=[n, C]) * spread
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    clean = (p.cumsum(1) > g.random([n, 1])).argmax(1)
    observed = (T[clean].cumsum(1) > g.random([n, 1])).argmax(1)
    return np.log(p @ T), T, observed, clean


@pytest.mark.parametrize("kind, rate", [("sym", 0.4), ("sym", 0.2), ("pair", 0.3), ("sym", 0.0)])
def test_transition_of_a_known_rate(kind, rate):
    log_q, T, observed, clean = known(kind, rate)
    found = estimate_transition(log_q, observed)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert (found > 0).all()
    assert np.abs(found - T).max() < 0.1 and np.abs(found - T).mean() < 0.02
    assert noise_rate(found, observed) == pytest.approx(np.mean(observed != clean), abs=0.04)


def test_rows_borrow_from_each_other_where_they_are_alike():
    """Symmetric noise is found nearly symmetric; each row alone would be three times as far off."""
    log_q, T, observed, _ = known("sym", 0.4)
    images, classes = anchors(log_q)
    alone = np.array(
        [np.bincount(observed[images[classes == y]], minlength=C) / np.sum(classes == y) for y in range(C)]
    )
    found = estimate_transition(log_q, observed)
    assert np.abs(found - T).max() < np.abs(alone - T).max() / 2


def test_anchors_are_the_most_certain_quarter():
    log_q = np.log(np.array([[0.9, 0.05, 0.05], [0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.8, 0.19, 0.01], [0.1, 0.2, 0.7]]))
    images, classes = anchors(log_q)
    assert sorted(images.tolist()) == [0, 4] and dict(zip(images, classes, strict=True)) == {0: 0, 4: 2}
    assert set(anchors(log_q, share=0.5)[0].tolist()) == {0, 3, 4}


def test_a_class_that_is_never_predicted_gets_the_common_rate():
    log_q, T, observed, _ = known("sym", 0.4)
    log_q[:, 0] = -50
    found = estimate_transition(log_q, observed)
    assert found[0, 0] == pytest.approx(0.6, abs=0.05)
    assert found[0, 1:] == pytest.approx(np.full(C - 1, 0.08), abs=0.03)


@pytest.mark.parametrize("n, c", [(1, 3), (2, 2), (5, 1), (3, 50)])
def test_a_handful_of_images_gives_a_transition(n, c):
    log_q = np.log(np.random.default_rng(0).dirichlet(np.ones(c), n))
    observed = np.zeros(n, dtype=np.int64)
    found = estimate_transition(log_q, observed)
    assert found.shape == (c, c) and np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert 0 <= noise_rate(found, observed) <= 1


def test_rate_counts_classes_by_how_common_they_are():
    T = np.array([[0.5, 0.5], [0.0, 1.0]])
    clean = np.repeat([0, 1], [900, 100])
    observed = np.where(np.arange(1000) < 450, 0, 1)
    assert noise_rate(T, observed) == pytest.approx(np.mean(clean != observed), abs=1e-3)


class Set:
    shown_classes = [str(c) for c in range(C)]

    def __init__(self, observed, clean):
        self.labels, self.clean_labels = observed, clean


def test_description_gives_the_truth_where_it_is_known():
    _, T, observed, clean = known("sym", 0.4)
    text = describe_transition(T, Set(observed, clean), "estimated")
    assert f"in truth {np.mean(observed != clean):.1%}" in text
    assert re.search(r"\n  0 +60\.0   8\.0", text) and len(text.splitlines()) == C + 3
    assert "truth" not in describe_transition(T, Set(observed, None), "learned")
