"""Foreign images and duplicates: what is found, what is not, and how the threshold follows from the set."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from detection import duplicates
from detection.duplicates import count_groups, find_duplicates
from detection.outliers import FALSE_ALARMS, Space, _flag, find_outliers, foreign_scores
from training.robust_core import find_core


class Images:
    """A data set in memory, of images uint8 [N,C,H,W]; `copies` = 2 adds copies as a mirrored set has them."""

    def __init__(self, images, labels=None, copies=1):
        self._images, self.num_raw, self._copies = images, len(images), copies
        self.image_shape = images.shape[1:]
        self.labels = None if labels is None else np.tile(labels, copies)

    def __len__(self):
        return self.num_raw * self._copies

    def images(self, items):
        return torch.from_numpy(self._images[np.asarray(items) % self.num_raw])


def digits(size=8):
    """Return gray images [1797,1,size,size] of digits, and their labels, 30% of them wrong."""
    data, rng = load_digits(), np.random.default_rng(0)
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, None]
    wrong = rng.random(len(images)) < 0.3
    labels = np.where(wrong, rng.integers(0, 10, len(images)), data.target)
    return images.repeat(size // 8, axis=2).repeat(size // 8, axis=3), labels


def with_foreign(images, share=0.05):
    """Return images with smooth gray patterns, all much alike, in place of some, and which ones these are."""
    rng = np.random.default_rng(1)
    foreign = np.zeros(len(images), dtype=bool)
    foreign[rng.permutation(len(images))[: round(share * len(images))]] = True
    ramp = np.linspace(0, 1, images.shape[2])
    slopes, height = rng.normal(0, 15, [2, foreign.sum(), 1, 1]), rng.normal(128, 15, [foreign.sum(), 1, 1])
    pattern = height + slopes[0] * ramp + slopes[1] * ramp[:, None]
    images = images.copy()
    images[foreign, 0] = np.clip(pattern, 0, 255).astype(np.uint8)
    return images, foreign


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("labeled", [True, False])
def test_foreign_images_are_found_at_any_size_with_and_without_labels(size, labeled):
    images, labels = digits(size)
    images, foreign = with_foreign(images)
    found = find_outliers(Images(images, labels if labeled else None))
    assert roc_auc_score(foreign, found.score) > 0.99
    assert foreign[found.is_outlier].mean() > (0.9 if labeled else 0.8) and found.is_outlier[foreign].mean() > 0.9
    np.testing.assert_array_equal(found.is_outlier, found.score >= found.threshold)
    assert found.expected_false <= 0.1 * found.is_outlier.sum() + 1e-9


@pytest.mark.parametrize("labeled", [True, False])
def test_a_set_without_foreign_images_has_hardly_any(labeled):
    images, labels = digits()
    found = find_outliers(Images(images, labels if labeled else None))
    assert found.is_outlier.mean() <= (0.003 if labeled else FALSE_ALARMS)


def test_labels_tell_foreign_images_that_hide_inside_the_set():
    """The foreign images lie between two classes, nearer to the core than its members lie to each other."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [900, 900, 120])
    level = np.array([60, 180, 120])[labels]
    images = np.clip(rng.normal(level[:, None, None, None], 20, [1920, 1, 8, 8]), 0, 255).astype(np.uint8)
    foreign = labels == 2
    labels[foreign] = rng.integers(0, 2, 120)
    assert roc_auc_score(foreign, find_outliers(Images(images, labels)).score) > 0.99
    flagged = find_outliers(Images(images, rng.permutation(labels))).is_outlier  # they tell nothing: distances count
    assert flagged[foreign].mean() > 0.99 and flagged[~foreign].mean() <= 0.03


def test_labels_tell_what_distances_do_not():
    """A dense foreign group between two classes is nearer to them than their own members are to each other."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [500, 500, 60])
    points = rng.normal(size=[1060, 16]).astype(np.float32)
    foreign = labels == 2
    points[foreign] *= 0.6
    points[:, 0] += np.array([-3, 3, 0])[labels]
    labels[foreign] = rng.integers(0, 2, 60)
    anchors = np.arange(1060)
    assert roc_auc_score(foreign, foreign_scores(points, anchors, labels, rng)) > 0.97
    assert foreign_scores(points, anchors, rng.permutation(labels), rng) is None  # they tell nothing


def test_further_features_count():
    """Nothing in the pixels is foreign: only the features tell."""
    images, labels = digits()
    rng = np.random.default_rng(0)
    foreign = rng.random(len(images)) < 0.05
    features = np.eye(10)[labels] @ rng.normal(size=[10, 16]) + 0.1 * rng.normal(size=[len(images), 16])
    features[foreign] = 3 * rng.normal(size=[foreign.sum(), 16])
    data = Images(images, labels, copies=2)
    found = find_outliers(data, features)
    assert len(found.score) == len(data) and (found.score[: data.num_raw] == found.score[data.num_raw :]).all()
    assert roc_auc_score(np.tile(foreign, 2), found.score) > 0.95
    assert roc_auc_score(np.tile(foreign, 2), find_outliers(data).score) < 0.6


def test_the_threshold_is_that_of_benjamini_and_hochberg():
    """By their rule with 10%: the largest i with p_(i) <= 0.1 i / N."""
    p = np.array([0.9, 0.001, 0.5, 0.03, 0.02, 0.7, 0.8, 0.4, 0.6, 1.0])
    assert np.flatnonzero(_flag(p, 0.5)).tolist() == [1, 3, 4]  # 0.03 <= 0.1 * 3 / 10, while 0.4 > 0.04
    assert np.flatnonzero(_flag(p, 0.025)).tolist() == [1, 4]
    assert not _flag(np.full(10, 0.2), 0.5).any()


def test_a_space_compares_in_deviations_within_classes():
    """Classes lie apart along the first axis only: there the deviation is that of a class, not of the set."""
    rng = np.random.default_rng(0)
    labels = np.arange(2000) % 2
    features = rng.normal(size=[2000, 2]) + 6 * labels[:, None] * [1, 0]
    center, spread = Space(features, features[:, :0], labels)._blocks[0]
    np.testing.assert_allclose(spread, 1, rtol=0.1)
    assert center[0] == pytest.approx(3, abs=0.5)


@pytest.mark.parametrize("far", [3.0, 30.0])
def test_the_core_leaves_out_a_fifth_that_is_all_alike(far):
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=[6, 6]))[0]
    clean = rng.normal(size=[800, 6]) * [1, 1, 1, 2, 2, 3]
    foreign = 0.1 * rng.normal(size=[200, 6]) + 2 * far
    core = find_core(np.concatenate([clean, foreign]) @ turn)
    assert core.members.sum() == 750 and not core.members[800:].any()
    distance = core.distance(np.concatenate([clean, foreign]) @ turn)
    assert distance[800:].min() > 1.5 * np.quantile(distance[:800], 0.99)


def test_a_core_of_equal_points_is_finite():
    core = find_core(np.ones([40, 3]))
    assert np.isfinite(core.distance(np.zeros([2, 3]))).all()


@pytest.mark.parametrize("chunk", [duplicates.CHUNK, 3 * 192])  # all images at once, three at a time
def test_duplicates_exact_and_near_across_labels(chunk, monkeypatch):
    monkeypatch.setattr(duplicates, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    images = np.concatenate([rng.integers(0, 256, [40, 3, 8, 8], dtype=np.uint8)] * 2)
    images[40:] = rng.integers(0, 256, [40, 3, 8, 8])
    images[50] = images[3]
    images[60] = np.clip(images[50].astype(int) + rng.integers(-3, 4, [3, 8, 8]), 0, 255)
    images[61] = np.clip(images[7].astype(int) + rng.integers(-60, 61, [3, 8, 8]), 0, 255)  # not a copy any more
    found = find_duplicates(Images(images, copies=2))
    expected = np.arange(160)
    expected[[50, 60]], expected[[130, 140]] = 3, 83
    np.testing.assert_array_equal(found.duplicate_of, expected)
    assert np.flatnonzero(found.exact).tolist() == [50, 130]
    assert found.difference[50] == 0 < found.difference[60] < 0.08
    labels = np.zeros(160, int)
    labels[60] = 1
    assert count_groups(labels, found.duplicate_of) == (2, 1)  # two groups, one with different labels


@pytest.mark.parametrize("place", [0, 20])
def test_a_near_duplicate_of_many_copies_is_found_wherever_it_stands(place):
    """Its neighbors are the copies, while theirs are each other."""
    rng = np.random.default_rng(0)
    image, change = rng.integers(60, 190, [1, 8, 8]), rng.normal(0, 1, [1, 8, 8])
    images = [np.clip(image + scale * change, 0, 255).astype(np.uint8) for scale in np.linspace(0.5, 1.5, 20)]
    images.insert(place, np.clip(image - change, 0, 255).astype(np.uint8))
    assert (find_duplicates(Images(np.stack(images))).duplicate_of == 0).all()


def test_similar_images_are_no_duplicates():
    """Digits of one class resemble each other, but no two of them are the same drawing. Nor are gray levels."""
    assert (find_duplicates(Images(digits()[0])).duplicate_of == np.arange(1797)).all()
    levels = np.arange(60, 200, 10, dtype=np.uint8)[:, None, None, None].repeat(8, axis=2).repeat(8, axis=3)
    assert (find_duplicates(Images(levels)).duplicate_of == np.arange(14)).all()


def test_many_images_that_are_nearly_equal_take_no_table_of_all_pairs():
    images = np.random.default_rng(0).integers(0, 2, [3000, 1, 8, 8], dtype=np.uint8)
    found = find_duplicates(Images(images))
    assert len(np.unique(found.duplicate_of)) < 30
