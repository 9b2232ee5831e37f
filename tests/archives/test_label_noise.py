"""Transition matrices, noise drawn from them, and matrices that are refused."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dnnlib
from archives import label_noise as tr
from archives.build import build_archive, plan_noise
from archives.sources import Source
from archives.writer import make_transform
from tests.support.paths import FIXTURES

# CIFAR-100: the superclass of each fine class, written down independently of the table under test.
COARSE = np.array([
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10,
    12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16,
    12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14,
    13,
])  # fmt: skip


@pytest.mark.parametrize("name, noise_type, rate, family", [("sym40", "sym", 0.4, None),
                         ("sym20_tau", "sym", 0.2, None), ("asym40_cifar10", "asym", 0.4, "cifar10")])  # fmt: skip
def test_matrices_of_the_fixture(name, noise_type, rate, family):
    expected = np.load(FIXTURES / "tdsm_weights.npz")[f"{name}/transition"]
    np.testing.assert_allclose(tr.transition_matrix(noise_type, rate, 10, family), expected, atol=1e-12)


@pytest.mark.parametrize("family, flips", [
    ("mnist", {2: 7, 3: 8, 5: 6, 6: 5}), ("digits", {2: 7, 3: 8, 5: 6, 6: 5}),
    ("fashion-mnist", {0: 6, 2: 4, 5: 7}), ("cifar10", {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}),
])  # fmt: skip
def test_asym(family, flips):
    expected = np.eye(10)
    for a, b in flips.items():
        expected[a, a], expected[a, b] = 0.75, 0.25
    np.testing.assert_array_equal(tr.transition_matrix("asym", 0.25, 10, family), expected)


def test_asym_cifar100_is_circular_within_the_superclass():
    target = tr.asym_targets("cifar100", 100)
    assert sorted(target) == list(range(100))
    for coarse in range(20):
        fine = np.flatnonzero(coarse == COARSE)
        assert len(fine) == 5
        np.testing.assert_array_equal(target[fine], np.roll(fine, -1))


def test_pair():
    expected = [[0.7, 0.3, 0], [0, 0.7, 0.3], [0.3, 0, 0.7]]
    np.testing.assert_allclose(tr.transition_matrix("pair", 0.3, 3), expected, atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["sym", "pair", "asym"]), st.floats(0, 1), st.integers(2, 30), st.sampled_from([*tr.FAMILIES]))
def test_rows_are_stochastic(noise_type, rate, classes, family):
    classes = tr.FAMILIES[family][0] if noise_type == "asym" else classes
    T = tr.transition_matrix(noise_type, rate, classes, family)
    assert T.shape == (classes, classes) and (T >= 0).all()
    np.testing.assert_allclose(T.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(np.diag(T)[np.diag(T) < 1], 1 - rate, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.integers(2, 12), st.integers(0, 2**32))
def test_realized_rate(rate, classes, seed):
    labels = np.arange(4000) % classes
    noisy = tr.corrupt_labels(labels, tr.transition_matrix("sym", rate, classes), seed)
    assert abs((noisy != labels).mean() - rate) < 5 * np.sqrt(0.25 / 4000)
    assert noisy.min() >= 0 and noisy.max() < classes


def test_corruption_draws_each_row_of_the_matrix():
    T = tr.check_matrix([[0.5, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.25, 0.75]])
    labels = np.repeat(np.arange(4), 20000)
    noisy = tr.corrupt_labels(labels, T, seed=3)
    counts = np.zeros([4, 4])
    np.add.at(counts, (labels, noisy), 1)
    np.testing.assert_allclose(counts / 20000, T, atol=0.015)
    assert (counts[T == 0] == 0).all()
    np.testing.assert_array_equal(noisy, tr.corrupt_labels(labels, T, seed=3))
    assert (noisy != tr.corrupt_labels(labels, T, seed=4)).any()


def test_zero_probabilities_are_never_drawn_at_the_ends_of_the_unit_interval():
    rows = np.array([0, 0, 1, 1])
    uniform = np.array([0, np.nextafter(1, 0), 0, np.nextafter(1, 0)])
    P = np.array([[0, 0.3, 0.7, 0], [0, 0, 1.0, 0]])
    np.testing.assert_array_equal(tr._draw_columns(P, rows, uniform), [1, 2, 2, 2])
    P = np.array([[0.1] * 10 + [0]] * 2)  # the tenths sum to a little less than 1
    np.testing.assert_array_equal(tr._draw_columns(P, rows, uniform), [0, 9, 0, 9])


def test_instance_noise():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, [6000, 4, 4, 1], dtype=np.uint8)
    images[3000:] = images[0]  # one image many times, so that the distribution of its wrong class shows
    labels = np.concatenate([rng.integers(0, 5, 3000), np.full(3000, 2)])
    noisy = tr.instance_noise(images, labels, 0.4, 5, seed=1)
    wrong = noisy != labels
    assert abs(wrong.mean() - 0.4) < 0.03
    # For this image, as Xia et al. write it: p_c is proportional to exp((x W_y)_c), c != y.
    logits = images[0].reshape(-1) / 255 @ np.random.default_rng([1, 2]).standard_normal([16, 5], dtype=np.float32)
    p = np.exp(np.where(np.arange(5) == 2, -np.inf, logits))
    observed = np.bincount(noisy[3000:][wrong[3000:]], minlength=5) / wrong[3000:].sum()
    np.testing.assert_allclose(observed, p / p.sum(), atol=0.05)
    np.testing.assert_array_equal(noisy, tr.instance_noise(images, labels, 0.4, 5, seed=1))


@pytest.mark.parametrize("T", [tr.transition_matrix("sym", 0.9, 10), np.eye(3)[[0, 0, 1]],
                               [[0.5 + 1e-8, 0.5 - 1e-8], [0.5, 0.5]]])  # fmt: skip
def test_singular_matrix_is_refused(T):
    with pytest.raises(dnnlib.UserError, match="condition number .*train the classifier with the known noise"):
        tr.inverse_transition(T)


def test_impossible_label_is_named():
    T = np.array([[0.5, 0.0, 0.5], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    with pytest.raises(dnnlib.UserError, match="label 1 .*column 1"):
        tr.check_observed(T, np.array([0, 1, 2]))
    tr.check_observed(T, np.array([0, 2]))


@pytest.mark.parametrize("call, message", [
    (lambda: tr.transition_matrix("sym", 1.5, 10), r"rate must be .*\[0, 1\], found 1.5"),
    (lambda: tr.transition_matrix("sym", float("nan"), 10), "found nan"),
    (lambda: tr.transition_matrix("sym", None, 10), "found None"),
    (lambda: tr.transition_matrix("sym", 0.1, 1), "at least 2 classes"),
    (lambda: tr.transition_matrix("odd", 0.1, 10), "unknown noise type 'odd'"),
    (lambda: tr.transition_matrix("asym", 0.1, 10), "asym.*matrix"),
    (lambda: tr.transition_matrix("asym", 0.1, 10, "lsun"), "'lsun'.*matrix"),
    (lambda: tr.transition_matrix("asym", 0.1, 9, "mnist"), "10 classes, the labels have 9"),
    (lambda: tr.transition_matrix("matrix", None, 3), "needs a matrix"),
    (lambda: tr.transition_matrix("matrix", None, 3, matrix=np.eye(4)), "4x4, but there are 3"),
    (lambda: tr.check_matrix(np.ones([2, 3])), "square.*2x3"),
    (lambda: tr.check_matrix([[1, 0], [1]]), "not a table"),
    (lambda: tr.check_matrix([[0.9, 0.2], [0, 1]]), "row 0 sums to 1.1"),
    (lambda: tr.check_matrix([[1, 0], [-0.5, 1.5]]), "row 1 .*negative"),
    (lambda: tr.check_matrix([[1, 0], [float("nan"), 1]]), "row 1 .*not finite"),
    (lambda: tr.corrupt_labels(np.array([0, 3]), np.eye(3), 0), r"0\.\.2, found 0\.\.3"),
    (lambda: tr.instance_noise(np.zeros([1, 4]), np.array([5]), 0.1, 3, 0), r"found 5\.\.5"),
])  # fmt: skip
def test_errors(call, message):
    with pytest.raises(dnnlib.UserError, match=message):
        call()


def test_load_matrix(tmp_path):
    T = np.array([[0.25, 0.75], [0.5, 0.5]])
    np.save(tmp_path / "T.npy", T.astype(np.float32))
    (tmp_path / "T.json").write_text(json.dumps(T.tolist()))
    for name in ("T.npy", "T.json"):
        np.testing.assert_allclose(tr.load_matrix(str(tmp_path / name), 2), T, atol=1e-12)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "bad.json").write_text("[[1, 0], [")
    (tmp_path / "T.txt").write_text("1 0")
    for name in ("objects.npy", "bad.json", "T.txt", "absent.npy"):
        with pytest.raises(dnnlib.UserError, match=name):
            tr.load_matrix(str(tmp_path / name))


def test_instance_noise_keeps_the_pixels_once(tmp_path):
    """Once as they are, beside the parts in work and the float32 pieces of a class: 1.6 times their size, once 2.65."""
    shape, labels = (64, 64, 3), np.arange(1000) % 20
    source = Source("toy", 1000, lambda i: np.full(shape, i % 256, dtype=np.uint8), labels)
    noise = plan_noise(source, "instance", 0.3, None, seed=0)
    tracemalloc.start()
    try:
        build_archive(source, str(tmp_path / "a.zip"), make_transform(None, None), noise=noise, workers=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 1000 * np.prod(shape)
