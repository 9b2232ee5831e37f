"""Metrics from features: published numbers, closed forms, and properties that hold for every block size and order."""

import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.class_wise import class_wise
from metrics.fid import fid_from_features, frechet_distance, mean_and_covariance, trace_of_root
from metrics.inception_score import inception_score
from metrics.kid import kid_from_features
from metrics.label_accuracy import SvmJudge, label_accuracy
from metrics.mifid import memorization_distance, mifid
from metrics.prdc import prdc
from metrics.reference import RunningStatistics
from tests.support.paths import FIXTURES


@pytest.fixture(scope="module")
def fixture():
    with np.load(FIXTURES / "metrics.npz") as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(str(arrays["expected"]))


def gaussian(rng, n, d, scale=1.0, shift=0.0):
    return rng.standard_normal((n, d)) * scale + shift


# ---------------------------------------------------------------------------------------------------------------------
# Published numbers.


@pytest.mark.parametrize("as_input", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_fixture(fixture, as_input):
    arrays, expected = fixture
    real, fake, probs = (as_input(arrays[name]) for name in ("real", "fake", "fake_probs"))
    labels = arrays["real_labels"], arrays["fake_labels"]
    found = dict(
        fid=fid_from_features(real, fake),
        kid_unbiased_poly3=kid_from_features(real, fake),
        is_all=inception_score(probs),
        is_split100=inception_score(probs, split=100),
    )
    found["cw_fid"] = class_wise(lambda x, y: dict(fid=fid_from_features(x, y)), real, fake, *labels, 2).mean["fid"]
    for name, value in found.items():
        assert isinstance(value, float)
        assert value == pytest.approx(expected[name], rel=1e-6), name
    ratios = {f"{name}_k{k}": value for k in (3, 5) for name, value in prdc(real, fake, k).items()}
    cw = class_wise(lambda x, y: prdc(x, y, 3), real, fake, *labels, 4)
    assert not cw.missing
    ratios |= {f"cw_{name}_k3": value for name, value in cw.mean.items()}
    for name, value in ratios.items():
        assert value == pytest.approx(expected[name], rel=1e-12), name
    assert found.keys() | ratios.keys() == expected.keys()


# ---------------------------------------------------------------------------------------------------------------------
# Frechet distance.


def test_frechet_closed_forms():
    rng = np.random.default_rng(0)
    d = 7
    q = scipy.linalg.qr(rng.standard_normal((d, d)))[0]
    v1, v2 = rng.uniform(0.1, 5, d), rng.uniform(0.1, 5, d)
    mu1, mu2 = rng.standard_normal(d), rng.standard_normal(d)
    # For covariances that commute, it is the sum of squared differences between standard deviations.
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((np.sqrt(v1) - np.sqrt(v2)) ** 2)
    assert frechet_distance(mu1, q * v1 @ q.T, mu2, q * v2 @ q.T) == pytest.approx(expected, rel=1e-9)
    # The same with three dimensions in which one or both have no variance.
    v1[:2] = v2[1:3] = 0
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((np.sqrt(v1) - np.sqrt(v2)) ** 2)
    assert frechet_distance(mu1, q * v1 @ q.T, mu2, q * v2 @ q.T) == pytest.approx(expected, rel=1e-9)
    # Invertible, but the product of the eigenvalues is smaller than rounding errors.
    v1, v2 = np.geomspace(1, 1e-14, d), np.geomspace(3, 1e-14, d)
    assert trace_of_root(q * v1 @ q.T, q * v2 @ q.T) == pytest.approx(np.sqrt(v1 * v2).sum(), rel=1e-9)
    assert frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(4 + 1, rel=1e-12)


def test_frechet_is_never_negative():
    """Between equal sets only rounding remains, which has either sign."""
    for seed in range(20):
        x = gaussian(np.random.default_rng(seed), 20 + 3 * seed, 30, scale=10.0, shift=5.0)
        for value in (fid_from_features(x, x), frechet_distance(*mean_and_covariance(x), *mean_and_covariance(x))):
            assert 0 <= value < 1e-6 and math.copysign(1, value) == 1
        assert (fid_from_features(x, x, np.ones([2, len(x)], dtype=np.uint16)) >= 0).all()


def test_trace_of_root_is_that_of_the_matrix_root():
    rng = np.random.default_rng(1)
    _, cov1 = mean_and_covariance(gaussian(rng, 300, 40))
    _, cov2 = mean_and_covariance(gaussian(rng, 300, 40) @ rng.standard_normal((40, 40)))
    expected = np.trace(scipy.linalg.sqrtm(cov1 @ cov2)).real
    assert trace_of_root(cov1, cov2) == pytest.approx(expected, rel=1e-9)
    # A tiny eigenvalue takes the other branch of the code. The value must not jump.
    cov1[0] = cov1[:, 0] = 0
    singular = trace_of_root(cov1, cov2)
    cov1[0, 0] = 1e-14
    assert trace_of_root(cov1, cov2) == pytest.approx(singular, rel=1e-6)


@pytest.mark.parametrize("n", [2, 10, 24, 25, 26, 100])
def test_fid_of_few_images(n):
    """With fewer images than features, as many, or more, FID is finite, symmetric, and the same as from mu and S."""
    rng = np.random.default_rng(n)
    x, y = gaussian(rng, n, 24), gaussian(rng, 40, 24, shift=0.3)
    x[:, 3] = y[:, 3] = -1.0  # a pixel that is always black
    value = fid_from_features(x, y)
    assert math.isfinite(value) and value > 0
    assert fid_from_features(y, x) == pytest.approx(value, rel=1e-10)
    by_moments = frechet_distance(*mean_and_covariance(x), *mean_and_covariance(y))
    assert by_moments == pytest.approx(value, rel=1e-9)
    assert abs(fid_from_features(x, x)) < 1e-10
    assert abs(frechet_distance(*mean_and_covariance(x), *mean_and_covariance(x))) < 1e-10


@pytest.mark.parametrize("n", [30, 300])
def test_fid_grows_with_a_pixel_shift(n):
    """The covariances are singular twice over: fewer images than pixels, and a black border."""
    rng = np.random.default_rng(3)
    images = np.pad(rng.random((n, 5, 5)), ((0, 0), (2, 2), (2, 2)))
    x, *shifted = (np.roll(images, s, axis=2).reshape(n, -1) for s in (0, 0, 1, 2))
    values = [fid_from_features(x, y) for y in shifted]
    assert abs(values[0]) < 1e-10 < values[1] < values[2]
    assert [fid_from_features(y, x) for y in shifted] == pytest.approx(values, rel=1e-9, abs=1e-10)
    moments = [mean_and_covariance(y) for y in (x, *shifted)]
    assert [frechet_distance(*moments[0], *m) for m in moments[1:]] == pytest.approx(values, rel=1e-7, abs=1e-6)


def test_running_statistics_are_those_of_the_whole():
    x = torch.from_numpy(gaussian(np.random.default_rng(4), 1500, 6, shift=1e6))  # far from the origin
    statistics = RunningStatistics(6)
    for part in x.split(217):
        statistics.add(part)
    count, mu, cov = statistics.reduce()
    assert count == 1500
    np.testing.assert_allclose(mu, x.mean(dim=0), rtol=1e-14)
    np.testing.assert_allclose(cov, np.cov(x.numpy(), rowvar=False), atol=1e-9)
    with pytest.raises(ValueError, match="at least 2"):
        RunningStatistics(3).reduce()


# ---------------------------------------------------------------------------------------------------------------------
# Neighbors.


def prdc_by_definition(real, fake, k):
    """Compute all distances at once, from differences."""

    def distances(a, b):
        return ((a[:, None].astype(np.float64) - b[None].astype(np.float64)) ** 2).sum(axis=2)

    r = np.sort(distances(real, real), axis=1)[:, k]
    f = np.sort(distances(fake, fake), axis=1)[:, k]
    d = distances(real, fake)
    held = d < r[:, None]
    return dict(
        precision=(d <= r[:, None]).any(axis=0).mean(),
        recall=(d <= f[None]).any(axis=1).mean(),
        density=held.sum() / (k * len(fake)),
        coverage=(d.min(axis=1) < r).mean(),
    )


@pytest.mark.parametrize("block", [1, 7, 64, 1000, None])
@pytest.mark.parametrize("kind", ["real numbers", "few values", "far from the origin", "tight clusters", "equal sets"])
def test_blocked_neighbors_follow_the_definition(kind, block):
    """Ties, copies and large means are right too, where |x|^2 + |y|^2 - 2 x.y alone would give the wrong answer."""
    rng = np.random.default_rng(5)
    real, fake = gaussian(rng, 90, 6).astype("f4"), gaussian(rng, 70, 6, 0.8).astype("f4")
    if kind == "few values":
        real, fake = rng.integers(0, 2, (90, 6)) / 10, rng.integers(0, 2, (70, 6)) / 10
    if kind == "far from the origin":
        real, fake = real.astype("f8") + 1e7, fake.astype("f8") + 1e7
    if kind == "tight clusters":
        centers = gaussian(rng, 3, 6)
        real, fake = (centers[np.arange(len(x)) % 3] + 1e-9 * x for x in (real, fake))
    if kind == "equal sets":
        fake = real
    for k in (1, 3):
        assert prdc(real, fake, k, block=block) == pytest.approx(prdc_by_definition(real, fake, k), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.booleans())
def test_order_changes_nothing(seed, block, ties):
    rng = np.random.default_rng(seed)
    real, fake = gaussian(rng, rng.integers(4, 40), 3), gaussian(rng, rng.integers(4, 40), 3)
    if ties:
        real, fake = real.round() / 3, fake.round() / 3
    p, q = rng.permutation(real), rng.permutation(fake)
    assert prdc(p, q, 3, block=block) == prdc(real, fake, 3)
    assert kid_from_features(p, q, block=block) == pytest.approx(kid_from_features(real, fake), rel=1e-9, abs=1e-12)
    assert fid_from_features(p, q) == pytest.approx(fid_from_features(real, fake), rel=1e-9, abs=1e-9)


def test_neighbors_of_equal_and_of_distant_sets():
    x = gaussian(np.random.default_rng(6), 50, 4)
    # A ball contains its own point and k - 1 neighbors. The k-th is on its surface, which does not count.
    assert prdc(x, x, 5) == dict(precision=1.0, recall=1.0, density=1.0, coverage=1.0)
    assert prdc(x, x + 100, 5) == dict(precision=0.0, recall=0.0, density=0.0, coverage=0.0)


def test_surfaces_count_for_precision_and_recall_alone():
    """Copies of one image have balls of radius 0, which hold nothing but have a surface."""
    x = np.full([7, 3], 0.1)
    assert prdc(x, x, 3) == dict(precision=1.0, recall=1.0, density=0.0, coverage=0.0)
    # Balls of radius 1 around 0 and 1; 2 lies on a surface, 3 outside. Fake balls reach from 2 to 3, so to 1 and not 0.
    real, fake = np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]])
    assert prdc(real, fake, 1) == dict(precision=0.5, recall=0.5, density=0.0, coverage=0.0)
    resampled = prdc(real, fake, 1, np.array([[2, 0], [0, 2]]))
    assert resampled["precision"].tolist() == [1, 0] and resampled["recall"].tolist() == [0.5, 0]


def test_neighbors_need_more_than_k_images():
    x = np.zeros((5, 2))
    with pytest.raises(ValueError, match="more than 5"):
        prdc(x, x, 5)
    with pytest.raises(ValueError, match="2 and 3"):
        prdc(x, np.zeros((6, 3)), 2)


# ---------------------------------------------------------------------------------------------------------------------
# Kernel distance and inception score.


@pytest.mark.parametrize("block", [1, 7, None])
def test_blocked_kernel_distance_follows_the_definition(block):
    rng = np.random.default_rng(7)
    x, y = gaussian(rng, 30, 5), gaussian(rng, 20, 5, shift=0.2)

    def kernel(a, b):
        return (a @ b.T / 5 + 1) ** 3

    within = sum((kernel(a, a).sum() - np.trace(kernel(a, a))) / (len(a) * (len(a) - 1)) for a in (x, y))
    expected = within - 2 * kernel(x, y).mean()
    assert kid_from_features(x, y, block=block) == pytest.approx(expected, rel=1e-11)
    with pytest.raises(ValueError, match="at least 2"):
        kid_from_features(x[:1], y)


def test_inception_score_closed_forms():
    one_hot = np.tile(np.eye(4), (6, 1))
    assert inception_score(one_hot) == pytest.approx(4, rel=1e-12)  # certain and balanced, so the number of classes
    assert inception_score(np.full((9, 4), 0.25)) == pytest.approx(1, rel=1e-12)
    # The second split has 4 images of one class: (4 + 1) / 2.
    assert inception_score(np.concatenate([one_hot, one_hot[[0] * 4]]), split=24) == pytest.approx(2.5, rel=1e-12)


def test_inception_score_of_images_that_are_sorted_by_class():
    """In order each split has one class, which scores 1. On a permutation the splits are like the whole."""
    by_class = np.repeat(np.eye(4), 250, axis=0)
    assert inception_score(by_class, split=250) == 1
    scores = [inception_score(by_class, split=250, seed=seed) for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2] and min(scores) > 3.9
    assert inception_score(by_class, split=1000, seed=1) == inception_score(by_class, split=1000)


@pytest.mark.parametrize("block", [1, 7, None])
def test_mifid_follows_the_definition(block, monkeypatch):
    rng = np.random.default_rng(9)
    x = gaussian(rng, 30, 5)
    if block:
        monkeypatch.setattr("metrics.mifid.block_rows", lambda *args: block)
    for y, copied in ((gaussian(rng, 20, 5), False), (-2 * x[:20] + 0.01 * gaussian(rng, 20, 5), True)):
        cosine = (y @ x.T) / np.linalg.norm(y, axis=1)[:, None] / np.linalg.norm(x, axis=1)
        distance = (1 - np.abs(cosine)).min(axis=1).mean()
        assert memorization_distance(x, y) == pytest.approx(distance, rel=1e-9)
        assert copied == (distance < 0.1)
        fid = fid_from_features(x, y)
        assert mifid(x, y) == mifid(x, y, fid) == pytest.approx(fid / distance if copied else fid, rel=1e-9)
    assert math.isfinite(mifid(x, x)) and math.isfinite(mifid(x, 0 * x))


# ---------------------------------------------------------------------------------------------------------------------
# Classes and judge.


def test_class_with_too_few_images_is_listed_not_averaged():
    x = np.arange(12.0)[:, None]
    real_labels = np.array([0] * 4 + [1] * 4 + [2] * 4)
    fake_labels = np.array([0] * 4 + [1] + [4] * 7)
    result = class_wise(lambda a, b: dict(n=float(len(a) + 10 * len(b))), x, x, real_labels, fake_labels, 2, 4)
    assert result.per_class == {0: {"n": 44.0}}
    assert result.mean == {"n": 44.0}
    assert result.missing == [1, 2, 3, 4]
    assert class_wise(lambda a, b: dict(n=1.0), x, x, real_labels, fake_labels, 9).mean == {}


def test_judge():
    rng = np.random.default_rng(8)
    labels = rng.integers(0, 3, 200)
    x = (gaussian(rng, 200, 4, 0.2) + labels[:, None]).astype("f4")
    judge = SvmJudge(x, labels)
    assert judge.accuracy > 0.9 and judge.held_out == 40 and judge.fitted == 200
    wrong = (labels + (np.arange(200) < 50)) % 3
    assert label_accuracy(judge.predict(torch.from_numpy(x)), wrong) == pytest.approx(0.75, abs=0.05)
    assert SvmJudge(x, labels, max_images=100).fitted == 100
    # The SVM is measured on images that it was not fitted on. So with pure noise it is no better than chance.
    assert SvmJudge(gaussian(rng, 200, 50), labels).accuracy < 0.6
    with pytest.raises(ValueError, match="2 classes"):
        SvmJudge(x, np.zeros(200, int))
