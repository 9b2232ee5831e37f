"""Outliers that are left out, or learned where noise hides them: probabilities in closed form, and the loss."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from archives.posterior import compress
from dnnlib import UserError
from tests.support.objectives import CPU, Data, make_config, ready
from torch_utils.training_stats import Stats
from training.objectives.dsm import DSM
from training.objectives.posterior_labels import PosteriorLabels
from training.outlier_rule import LEVELS, OutlierRule, clean_probability, common_items, least_levels


def levels_of_gray(n=200, far=0.5, wide=0.1, share=0.2):
    """A data set of flat 8x8 images: clean ones around gray level 0, outliers around `far`, in [-1,1]."""
    data, rng = Data(n=n), np.random.default_rng(0)
    outliers = np.arange(n) < share * n
    level = np.where(outliers, far, 0) + wide * rng.standard_normal(n)
    data.pixels = torch.from_numpy(np.rint(127.5 + 127.5 * level)).clamp(0, 255).byte()[:, None, None, None]
    data.pixels, data.path, data.outliers = data.pixels.expand(-1, 1, 8, 8).contiguous(), "toy.zip", outliers
    return data


@pytest.mark.parametrize("sigma", [0.3, 1.0, 10.0])
def test_the_probability_of_two_normal_densities(sigma):
    """Clean N(0,1), outliers N(3,1): the noisy ones are normal too, so the classifier and its mean have a formula."""
    spread = torch.from_numpy(norm.ppf((np.arange(2000) + 0.5) / 2000))[:, None]
    y, noise = torch.tensor([[3.0], [1.0]]), torch.from_numpy(norm.ppf((np.arange(100) + 0.5) / 100))
    got = clean_probability(y, noise[:, None, None].expand(-1, 2, 1), torch.tensor([sigma]), spread, spread + 3)
    wide = np.hypot(1, sigma)
    for row, value in enumerate((3.0, 1.0)):
        x = value + sigma * noise.numpy()
        clean, foreign = norm.pdf(x, 0, wide), norm.pdf(x, 3, wide)
        assert float(got[row, 0]) == pytest.approx(float((clean / (clean + foreign)).mean()), abs=0.01)


def test_the_probability_agrees_with_a_loop_without_the_image_itself():
    rng = np.random.default_rng(0)
    clean, foreign, noise = rng.normal(size=[7, 5]), rng.normal(size=[4, 5]) + 0.5, rng.normal(size=[2, 4, 5])
    sigma = np.array([0.7, 2.0])
    want = np.zeros([4, 2])
    for i in range(4):
        for k, s in enumerate(sigma):
            for n in noise[:, i]:
                x = foreign[i] + s * n
                p, q = (norm.pdf(x, y, s).prod(axis=1).mean() for y in (clean, np.delete(foreign, i, axis=0)))
                want[i, k] += p / (p + q) / 2
    args = (torch.from_numpy(a) for a in (foreign, noise, sigma, clean, foreign))
    np.testing.assert_allclose(clean_probability(*args), want, rtol=1e-6)
    alone = torch.from_numpy(foreign[:1])
    only = clean_probability(alone, torch.from_numpy(noise[:, :1]), *map(torch.from_numpy, (sigma, clean)), alone)
    assert (only == 0).all()  # nothing to compare it with


def test_the_farther_outliers_are_the_later_they_teach():
    found = [least_levels(data, data.outliers, CPU) for far in (0.3, 0.6) for data in [levels_of_gray(far=far)]]
    near, distant = (float(levels.median()) for levels in found)
    # 64 pixels tell a difference `far` apart from noise while 8 far / sigma is above about 1.
    assert 0.3 * 8 < near < 8 * 0.3 * 8 and 1.5 * near < distant < 3 * near
    alike = levels_of_gray(far=0.0)
    assert float(least_levels(alike, alike.outliers, CPU).median()) == LEVELS[0]  # nobody can tell them


def loss_of(rule, data, sigma):
    objective = ready(DSM, make_config(), data, CPU, outliers=rule)
    items = torch.arange(len(data))
    draws = dict(sigma=sigma, noise=torch.ones(len(data), 1, 8, 8), items=items)
    stats = Stats(CPU)
    return objective.loss(data.pixels, data.onehot(items), draws, stats).detach(), stats.reduce()


def test_an_outlier_teaches_from_its_noise_level_on():
    data = levels_of_gray(n=20)
    rule = OutlierRule(data, data.outliers, "ambient", CPU)
    assert rule.train_indices is None and (rule.least > 0).tolist() == data.outliers.tolist()
    rule.least[:4] = torch.tensor([0.5, 1.0, 2.0, torch.inf])
    sigma = torch.ones(20)
    found, log = loss_of(rule, data, sigma)
    plain, _ = loss_of(None, data, sigma)
    torch.testing.assert_close(found[[0, 1, *range(4, 20)]], plain[[0, 1, *range(4, 20)]])
    assert (found[[2, 3]] == 0).all() and plain[2].abs().max() > 0
    assert log["Outliers/used"]["mean"] == 0.5 and log["Outliers/used"]["num"] == 4
    assert "4 of 20 images. They teach from noise level" in rule.notes()[0] and "1 of them never" in rule.notes()[0]


def test_outliers_are_left_out_beside_labels_that_are():
    data = levels_of_gray(n=5, share=0.4)
    rule = OutlierRule(data, data.outliers, "drop", CPU)
    assert rule.train_indices.tolist() == [2, 3, 4] and "2 of 5 images, which are left out" in rule.notes()[0]
    assert "Outliers/used" not in loss_of(rule, data, torch.ones(5))[1]
    p = np.eye(4)[[0, 0, 0, 1, 1]]
    labels = PosteriorLabels(compress(p, np.array([0, 0, 0, 0, 1])), "drop", CPU)
    assert common_items(labels.train_indices, rule.train_indices, None).tolist() == [2, 4]
    assert common_items(None, None) is None
    with pytest.raises(UserError, match="no image is left"):
        common_items(torch.tensor([0, 1]), rule.train_indices)
    with pytest.raises(UserError, match="every image is an outlier"):
        OutlierRule(data, np.ones(5, dtype=bool), "drop", CPU)
