"""Bootstrap: metrics with counts are those of the sets that the counts describe; intervals have the right width."""

import numpy as np
import pytest
import torch

from metrics.bootstrap import interval, resample
from metrics.features import Features
from metrics.fid import fid_from_features
from metrics.kid import kid_from_features
from metrics.prdc import prdc
from metrics.settings import EvaluationSettings
from metrics.table import evaluate_features
from reports.comparison import with_interval


def sets(n=60, m=50, d=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)), 0.9 * rng.standard_normal((m, d)) + 0.1


def settings(**fields):
    return EvaluationSettings("data.zip", "pixels", **fields)


def repeated(fake, counts):
    return [fake[np.repeat(np.arange(len(fake)), row)] for row in counts]


@pytest.mark.parametrize("d", [6, 40, 70], ids=["more images than features", "draws with fewer", "fewer"])
def test_fid_replicates(d):
    real, fake = sets(d=d)
    counts = resample(3, len(fake))
    expected = [fid_from_features(real, x) for x in repeated(fake, counts)]
    found = fid_from_features(torch.from_numpy(real), torch.from_numpy(fake), counts)
    assert found.shape == (3,) and found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("block", [7, None])
def test_kid_and_neighbor_replicates(block):
    real, fake = sets()
    counts = resample(3, len(fake))
    expected = [kid_from_features(real, x) for x in repeated(fake, counts)]
    assert kid_from_features(real, fake, counts, block=block) == pytest.approx(expected, rel=1e-9)
    found = prdc(real, fake, 3, counts, block=block)
    for i, x in enumerate(repeated(fake, counts)):
        of_set = prdc(real, x, 3)
        for name in ("precision", "density", "coverage"):  # The balls of recall are those of the images without copies.
            assert found[name][i] == pytest.approx(of_set[name], rel=1e-12)
    assert np.all(found["recall"] <= prdc(real, fake, 3)["recall"]) and np.std(found["recall"]) > 0
    once = prdc(real, fake, 3, np.ones_like(counts[:1]))
    assert {name: values[0] for name, values in once.items()} == prdc(real, fake, 3)


def test_without_counts_the_values_are_floats():
    real, fake = sets()
    assert all(type(v) is float for v in (fid_from_features(real, fake), kid_from_features(real, fake)))
    assert all(type(v) is float for v in prdc(real, fake).values())


def test_draws_keep_the_classes():
    labels = np.array([0] * 30 + [3] * 10 + [1])
    counts = resample(400, len(labels), labels, seed=1)
    for c, n in ((0, 30), (1, 1), (3, 10)):
        assert (counts[:, labels == c].sum(axis=1) == n).all()
    assert counts[:, :30].mean() == 1 and counts[:, :30].var() == pytest.approx(29 / 30, rel=0.1)
    assert np.array_equal(resample(5, 20, seed=2), resample(5, 20, seed=2))
    assert not np.array_equal(resample(5, 20, seed=2), resample(5, 20, seed=3))


def test_interval_is_centered_on_the_value():
    low, high = interval(5.0, 7 + np.linspace(-1, 1, 201))
    assert (low, high) == (pytest.approx(4.05), pytest.approx(5.95))


def test_interval_is_as_wide_as_the_spread_between_sets():
    rng = np.random.default_rng(2)
    real = rng.standard_normal((2000, 4))

    def make():
        return rng.standard_normal((200, 4)) + 0.3

    spread = np.std([fid_from_features(real, make()) for _ in range(60)])
    x, y = (Features(torch.from_numpy(features), None, None) for features in (real, make()))
    result = evaluate_features(x, y, None, None, settings(bootstrap=300))
    low, high = result["intervals"]["fid"]
    assert low < result["metrics"]["fid"] < high and high - low == pytest.approx(2 * 1.96 * spread, rel=0.35)
    assert result["intervals"].keys() == {"fid", "kid", "precision_k5", "recall_k5", "density_k5", "coverage_k5"}


@pytest.mark.slow
def test_intervals_of_the_table():
    """Label accuracy has the binomial interval within classes. Class-wise means come from the same draws."""
    rng = np.random.default_rng(3)
    labels = np.arange(400) % 2
    features = [torch.from_numpy(rng.standard_normal((400, 3)) + 2 * labels[:, None]) for _ in range(2)]
    judged = np.where(rng.random(400) < 0.3 + 0.4 * labels, 1 - labels, labels)
    x, y = Features(features[0], None, labels), Features(features[1], None, judged)
    result = evaluate_features(x, y, labels, labels, settings(bootstrap=1000, seed=5, judge="none"))
    assert result["bootstrap"]["draws"] == 1000
    variance = sum(200 * p * (1 - p) for p in (np.mean(judged[labels == c] == c) for c in (0, 1))) / 400**2
    low, high = result["intervals"]["label_accuracy"]
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.1)
    for name, value in result["metrics"].items():
        if value is not None:
            assert result["intervals"][name][0] <= value <= result["intervals"][name][1], name
    counts = resample(1000, 400, labels, seed=5)
    of_classes = [fid_from_features(*(f[labels == c] for f in features), counts[:, labels == c]) for c in (0, 1)]
    assert result["intervals"]["cw_fid"] == pytest.approx(
        interval(result["metrics"]["cw_fid"], np.mean(of_classes, axis=0)), rel=1e-9
    )
    assert evaluate_features(x, y, labels, labels, settings(judge="none"))["intervals"] == {}


def test_report_shows_intervals():
    table = dict(metrics=dict(fid=1.25, cw_fid=2.0, label_accuracy=None), intervals=dict(fid=[1.0, 1.45]))
    assert [with_interval(table, name) for name in table["metrics"]] == ["1.250 ± 0.225", "2.000", "n/a"]
