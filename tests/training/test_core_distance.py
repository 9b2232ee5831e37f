"""The core of a set and the distance from it: against scikit-learn, against loops, and in closed form."""

import numpy as np
import pytest
import torch
from sklearn.covariance import MinCovDet

from training.connected_core import connected_core, far_groups, nearest, neighbor_graph, outer_groups, reached, thinned
from training.core_distance import CoreDistance
from training.image_features import image_features
from training.robust_core import find_core


def cloud(n, mean, seed, d=6, wide=1.0):
    return mean + wide * np.random.default_rng(seed).normal(size=[n, d])


@pytest.mark.parametrize("far, wide", [(8, 1.0), (3, 0.1), (0, 12.0)])
def test_the_core_is_that_of_scikit_learn(far, wide):
    """Outliers far away, all alike, or scattered: the determinant is as small as that of scikit-learn's FAST-MCD."""
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=[6, 6]))[0]
    x = np.concatenate([cloud(400, 0, 0) * [1, 1, 2, 3, 3, 4], cloud(100, far, 1, wide=wide)]) @ turn
    ours, theirs = find_core(x, share=0.75), MinCovDet(support_fraction=0.75, random_state=0).fit(x)
    members = [ours.members, theirs.raw_support_]
    a, b = (np.linalg.slogdet(np.cov(x[m].T, bias=True))[1] for m in members)
    assert a <= b + 0.02
    if far == 8:  # scikit-learn ends in a minimum that takes outliers in
        assert a < b - 1 and not ours.members[400:].any()
    else:
        assert np.mean(members[0] != members[1]) <= 0.03
        np.testing.assert_allclose(ours.mean, theirs.raw_location_, atol=0.2)


def test_nearest_agrees_with_a_loop():
    x = cloud(1100, 0, 0, d=3)  # more than are compared at a time
    for anchors, own in ((x, np.arange(1100)), (x[::2], np.arange(0, 1100, 2)), (x[:15] + 0.1, None)):
        rows, distances = nearest(x, anchors, 4, own)
        for i in [0, 1, 2, 1023, 1024, 1098]:
            d = np.linalg.norm(anchors - x[i], axis=1)
            d[[] if own is None else own == i] = np.inf
            assert rows[i].tolist() == d.argsort()[:4].tolist()
            np.testing.assert_allclose(distances[i], np.sort(d)[:4], rtol=1e-3)
    assert nearest(x, x[:3], 4)[0].shape == (1100, 3) and nearest(x, x[:3], 4, np.arange(3))[0].shape == (1100, 2)


def test_the_walk_ends_in_the_solution_of_its_equation():
    rng = np.random.default_rng(0)
    rows, core = np.array([rng.permutation(30)[:3] for _ in range(30)]), rng.random(30) < 0.3
    P = np.zeros([30, 30])
    P[np.arange(30)[:, None], rows] = 1 / 3
    r = np.linalg.solve(np.eye(30) - 0.95 * P.T, 0.05 * core / core.sum())
    np.testing.assert_allclose(reached(rows, core), 30 * r, atol=0.01)
    assert reached(rows, core).mean() == pytest.approx(1)


def test_dense_places_are_thinned_out():
    x = np.concatenate([cloud(300, 0, 0), cloud(300, 9, 1, wide=0.05)])
    rows, distances = nearest(x, x, 20, np.arange(len(x)))
    kept = thinned(rows, distances, 0)
    assert kept[300:].mean() < 0.2 < 0.8 < kept[:300].mean()


@pytest.mark.parametrize("far, count, found", [(9, 200, True), (1.5, 200, False), (9, 400, False)])
def test_a_far_group_is_small_and_far(far, count, found):
    x = np.concatenate([cloud(800, 0, 0), cloud(count, far, 1, wide=0.5)])
    rows, _ = nearest(x, x, 10, np.arange(len(x)))
    apart = far_groups(x, neighbor_graph(rows))
    assert apart[800:].mean() == found and not apart[:800].any()


@pytest.mark.parametrize(
    "count, bridges, central, found",
    [(200, 0.02, 0, True), (200, 0.02, 0.2, False), (200, 0.1, 0, False), (300, 0.02, 0, False)],
)
def test_an_outer_group_is_small_and_never_at_the_center(count, bridges, central, found):
    """Two groups in which everybody has 10 neighbors at random; the share `bridges` of the second one's are usual."""
    rng, n = np.random.default_rng(0), 800 + count
    rows = np.concatenate([rng.integers(800, size=[800, 10]), 800 + rng.integers(count, size=[count, 10])])
    usual = np.flatnonzero(rng.random([count, 10]) < 2 * bridges)  # the others point to it
    rows[800:].reshape(-1)[usual] = rng.integers(800, size=len(usual))
    apart = outer_groups(neighbor_graph(rows), np.where(np.arange(n) < 800, 0.6, central), np.zeros(n, dtype=bool))
    assert apart[800:].mean() == found and not apart[:800].any()


def test_an_outer_group_is_found_among_kinds_that_are_connected_less():
    """A ring of 16 kinds that touch only their neighbors, and a group that all touch: no eigenvector shows it."""
    rng, kinds, size = np.random.default_rng(0), 16, 100
    rows = np.repeat(np.arange(kinds + 1), size)[:, None] * size + rng.integers(size, size=[(kinds + 1) * size, 10])
    ring, group = np.arange(len(rows)) < kinds * size, np.arange(len(rows)) // size
    next_to = (group[:, None] + rng.choice([-1, 1], size=rows.shape)) % kinds
    other = np.where(ring[:, None], next_to, rng.integers(kinds, size=rows.shape))
    strays = rng.random(rows.shape) < np.where(ring, 0.02, 0.1)[:, None]
    rows[strays] = (other * size + rng.integers(size, size=rows.shape))[strays]
    apart = outer_groups(neighbor_graph(rows), np.where(ring, 0.6, 0.05), np.zeros(len(rows), dtype=bool))
    assert (apart == ~ring).all()


@pytest.mark.parametrize("share", [0.02, 0.1, 0.2])
def test_the_core_has_many_kinds_but_not_the_foreign_ones(share):
    """Six kinds in a row that touch each other, one rare; foreign points are as near to the mean as the ends."""
    rng = np.random.default_rng(0)
    kind = np.repeat(np.arange(6), [200, 200, 60, 200, 200, 140])
    clean = rng.normal(size=[1000, 6])
    clean[:, 0] += 3 * kind - 7.5
    foreign = 0.5 * rng.normal(size=[round(1000 * share / (1 - share)), 6]) + [0, 8, 0, 0, 0, 0]
    core = connected_core(np.concatenate([clean, foreign]))
    assert core[1000:].mean() <= 0.01
    assert min(core[:1000][kind == k].mean() for k in range(6)) > 0.5
    assert connected_core(rng.normal(size=[20, 3])).all()


def five_kinds(rng):
    """Return five usual kinds in a row, 180 points each."""
    x = rng.normal(size=[900, 6])
    x[:, 0] += 3 * np.repeat(np.arange(5), 180) - 6
    return x


@pytest.mark.parametrize("seed", [0, 1])
def test_several_foreign_kinds_are_not_in_the_core_though_a_few_bridges_lead_to_them(seed):
    rng = np.random.default_rng(seed)
    usual, foreign = five_kinds(rng), rng.normal(size=[120, 6])
    foreign += np.eye(6)[1] * 5.5 + np.outer(rng.choice([-3, 0, 3], size=120), np.eye(6)[0])
    core = connected_core(np.concatenate([usual, foreign]))
    assert core[900:].mean() <= 0.03 and core[:900].mean() > 0.9


def test_a_fifth_of_the_points_all_alike_is_not_the_core():
    rng = np.random.default_rng(1)
    usual, foreign = five_kinds(rng), 0.3 * rng.normal(size=[225, 6]) + np.eye(6)[1] * 4.5
    core = connected_core(np.concatenate([usual, foreign]))
    assert core[900:].mean() <= 0.01 and core[:900].mean() > 0.9


@pytest.mark.parametrize("seed", [0, 2])
def test_each_of_three_kinds_far_apart_is_usual(seed):
    rng = np.random.default_rng(seed)
    x = np.concatenate([50 * rng.normal(size=6) + rng.normal(size=[300, 6]) for _ in range(3)])
    assert CoreDistance(x, seed).core.reshape(3, 300).mean(axis=1).min() > 0.7


def test_copies_are_as_usual_as_one_of_them():
    x = cloud(300, 0, 0)
    once, often = CoreDistance(x), CoreDistance(np.tile(x, [15, 1]))
    assert (often.core.reshape(15, 300) == once.core).all() and once.core.mean() > 0.7


def test_equal_images_and_copies_are_usual():
    assert CoreDistance(np.ones([100, 3])).training.max() <= 1
    x = np.concatenate(2 * [cloud(24, 0, 0, d=10)])  # all core, and each point twice: the others say what is usual
    alone, twice = CoreDistance(x[:24]), CoreDistance(x)
    far = torch.from_numpy(cloud(50, 9, 1, d=10)).float()
    assert float(twice.of_features(far).median() / alone.of_features(far).median()) == pytest.approx(1, abs=0.5)


def test_a_large_group_that_nothing_connects_has_a_center_of_its_own():
    """Two kinds far apart, and foreign points farther yet: the smaller kind is no outlier, since it is a third."""
    x = np.concatenate([cloud(500, 0, 0), cloud(300, 9, 1), cloud(100, -9, 2, wide=0.5)])
    core = connected_core(x)
    assert min(core[:500].mean(), core[500:800].mean()) > 0.8 and core[800:].mean() <= 0.01


def images(n, size, seed=0):
    coarse = torch.rand([n, 1, 8, 8], generator=torch.Generator().manual_seed(seed))
    return 2 * coarse.repeat_interleave(size // 8, 2).repeat_interleave(size // 8, 3) - 1


@pytest.mark.parametrize("size", [8, 32])
def test_the_distance_is_that_to_the_nearest_image_of_the_core(size):
    features = image_features(images(300, size)).double().numpy()
    found = CoreDistance(features)
    center, spread, mean, axes, anchors = (part.double().numpy() for part in found._parts)
    others = image_features(images(20, size, seed=1) * 1.5).double().numpy()
    points = (np.clip((others - center) / spread, -4, 4) - mean) @ axes
    want = np.square(points[:, None] - anchors).sum(axis=2).min(axis=1)
    np.testing.assert_allclose(found.of_features(torch.from_numpy(others).float()), want, rtol=1e-3)
    # In units of what is usual: 99% of the core lie below 1, each image without itself.
    assert np.mean(found.training[found.core] <= 1) == pytest.approx(0.99, abs=0.005)
    own = found.of_features(torch.from_numpy(features).float()).numpy()
    assert own[found.core].max() < 1e-3
    np.testing.assert_allclose(own[~found.core], found.training[~found.core], rtol=1e-3)
    covariance = np.cov(anchors.T, bias=True) / (anchors.var(axis=0).max())
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-3  # along principal axes


def test_the_distance_has_gradients():
    found = CoreDistance(image_features(images(300, 8)).double().numpy())
    x = images(3, 8, seed=1).mul(0.9).requires_grad_()
    d = found(x)
    (gradient,) = torch.autograd.grad(d.sum(), x)
    step = 1e-3 * gradient / gradient.norm()
    slope = (found(x.detach() + step) - found(x.detach() - step)).sum() / 2e-3
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(found(x), d)
