"""Labels from the posterior: drawn in the right shares, and in closed form what a denoiser learns from them."""

import numpy as np
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss

from archives.label_noise import transition_matrix
from archives.posterior import TopPosterior, compress
from dnnlib import UserError
from tests.support.objectives import CPU, Data, FixedClassifier, make_config, ready
from torch_utils.training_stats import Stats
from training.objectives.dsm import DSM
from training.objectives.posterior_labels import PosteriorLabels, draw_classes
from training.objectives.tdsm import TDSM, posterior_weights

# Multiples of 1/16, so that float16 holds them and sixteen uniform numbers draw each class exactly in its share.
POSTERIOR = np.array([
    [4, 8, 2, 1, 1],
    [0, 0, 16, 0, 0],
    [1, 3, 4, 4, 4],
    [7, 0, 0, 9, 0],
]) / 16  # fmt: skip
OBSERVED = np.array([0, 1, 2, 3])
PRIOR = np.array([2, 2, 2, 1, 1]) / 8


def labels_of(mode, k=8, **kwargs):
    return PosteriorLabels(compress(POSTERIOR, OBSERVED, k, PRIOR), mode, CPU, **kwargs)


def shares(labels, items):
    """How often each class is drawn for each of `items`, over sixteen evenly spread uniform numbers."""
    uniform = (torch.arange(16) + 0.5) / 16
    drawn = torch.stack([labels.classes(items, u.expand(len(items))) for u in uniform])
    return torch.nn.functional.one_hot(drawn, 5).double().mean(dim=0).numpy()


def test_labels_are_drawn_in_their_shares():
    items = torch.tensor([3, 0, 0, 2, 1])
    np.testing.assert_array_equal(shares(labels_of("sample"), items), POSTERIOR[items])
    np.testing.assert_allclose(labels_of("sample").expand(items), POSTERIOR[items], rtol=1e-12)


def test_the_rest_follows_the_prior():
    found = labels_of("sample", k=1)  # keeps classes 0 and 1 of image 0; the rest of 4/16 is shared 2 : 1 : 1
    np.testing.assert_array_equal(shares(found, torch.tensor([0])), [np.array([4, 8, 2, 1, 1]) / 16])
    excluded = PosteriorLabels(compress(POSTERIOR, OBSERVED, 1, np.array([1, 1, 0, 0, 0])), "sample", CPU)
    np.testing.assert_allclose(excluded.expand(torch.tensor([0]))[0], np.array([4, 8, 4 / 3, 4 / 3, 4 / 3]) / 16)


def test_draws_at_the_ends():
    """A class without probability is never drawn, also not by the largest number below 1, whatever a row sums to."""
    p = torch.tensor([[0, 0.3, 0.7, 0], [0, 0, 1e-30, 0], [0.1, 0.1, 0.1, 0]])
    assert draw_classes(p, torch.zeros(3)).tolist() == [1, 2, 0]
    assert draw_classes(p, torch.full([3], 1 - 2**-24)).tolist() == [2, 2, 2]


def test_rules():
    items = torch.arange(4)
    assert labels_of("relabel").classes(items, torch.zeros(4)).tolist() == [1, 2, 2, 3]
    assert labels_of("relabel").train_indices is None
    drop = labels_of("drop")
    assert drop.train_indices.tolist() == [2, 3]  # image 2: three classes are equally probable, among them its label
    assert drop.classes(items, torch.zeros(4))[drop.train_indices].tolist() == [2, 3]
    for limit, without in ((0.2, []), (0.5, [2]), (0.53, [0, 2]), (0.57, [0, 2, 3])):
        draws = dict(items=items, label=torch.zeros(4))
        labels, dropped = labels_of("null", limit=limit).onehot(draws, 5, Stats(CPU))
        assert dropped.nonzero()[:, 0].tolist() == without
        assert labels.argmax(dim=1).tolist() == [1, 2, 2, 3]
    draws["dropped"] = torch.tensor([False, True, False, False])
    assert labels_of("null", limit=0.53).onehot(draws, 5, Stats(CPU))[1].tolist() == [True, True, True, False]
    assert labels_of("relabel").onehot(draws, 5, Stats(CPU))[1] is draws["dropped"]


def test_rules_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match="no class has a probability of 1 or more"):
        PosteriorLabels(compress(POSTERIOR[[0]], OBSERVED[[0]]), "null", CPU, limit=1.0)
    with pytest.raises(UserError, match="no image is left"):
        PosteriorLabels(compress(POSTERIOR[:2], OBSERVED[:2]), "drop", CPU)


@pytest.mark.parametrize("mode, said", [("sample", ""), ("relabel", "class 1,"), ("drop", "classes 1, 2,")])
def test_classes_that_a_rule_loses_are_named(mode, said):
    p = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.0, 0.1, 0.9], [0.7, 0.0, 0.3]])
    notes = "\n".join(PosteriorLabels(compress(p, np.array([0, 1, 0, 2])), mode, CPU).notes())
    assert said in notes and ("Warning" in notes) == (mode != "sample")


def test_what_remains_of_the_noise():
    np.testing.assert_array_equal(labels_of("sample").transition(), np.eye(5))
    for mode, labels, rows in (("relabel", [1, 2, 2, 3], [0, 1, 2, 3]), ("drop", [2, 3], [2, 3])):
        counts = np.zeros([5, 5])
        np.add.at(counts.T, labels, POSTERIOR[rows])
        images, T = counts.sum(axis=1), labels_of(mode).transition()
        seen = (images >= 0.5) & (np.arange(5) < 4)  # no label names class 4
        np.testing.assert_allclose(T[seen] * images[seen, None], counts[seen], atol=1e-12)
        np.testing.assert_array_equal(T[~seen], np.eye(5)[~seen])
        np.testing.assert_allclose(T.sum(axis=1), 1)
    certain = labels_of("null", limit=0.9).transition()  # image 1 alone: nothing is known of the other classes
    np.testing.assert_array_equal(certain, np.eye(5))


def test_a_class_without_images_is_no_noise():
    """The crumbs of probability that a classifier gives to a fourth class, which no label names."""
    p = np.repeat(np.eye(4)[:3], 200, axis=0) * 0.99 + 0.0025
    labels = PosteriorLabels(compress(p, np.repeat([0, 1, 2], 200), 4, np.array([1, 1, 1, 0]) / 3), "relabel", CPU)
    T = labels.transition()
    np.testing.assert_array_equal(T[3], np.eye(4)[3])
    np.testing.assert_allclose(np.diagonal(T)[:3], 0.9925 / 0.9975, rtol=1e-3)


# What a denoiser learns: ten Gaussian classes N(MEANS[y], SPREAD^2) in one dimension, 40% symmetric noise.

CLASSES, SPREAD = 10, 0.7
MEANS = torch.linspace(-2, 2, CLASSES, dtype=torch.float64)
NOISE = torch.from_numpy(transition_matrix("sym", 0.4, CLASSES))


def log_density(x, variance):
    return -(x[:, None] - MEANS).square() / (2 * variance)


class Affine(torch.nn.Module):
    """D(x; c) = a_c + b_c x, which holds the best denoiser of a Gaussian class."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(2, CLASSES, dtype=torch.float64))

    def forward(self, x, sigma, labels, augment_labels=None):
        a, b = self.weights @ labels.T.to(self.weights)
        return a.reshape(x.shape) + b.reshape(x.shape) * x


class Toy(DSM):
    def build(self):
        return {"net": self.trained_network(Affine())}

    def prepare(self, images, draws):
        return images, None


def population(noise_nodes):
    """Images on a grid, all their observed labels and nodes of the noise, with the exact probability of each.

    The grid's sums are integrals to machine precision, because Gaussians are smooth and vanish at its ends.
    """
    x0 = torch.linspace(-9, 9, 181, dtype=torch.float64)
    p = log_density(x0, SPREAD**2).exp()
    node, weight = map(torch.from_numpy, hermegauss(noise_nodes))
    grid = torch.meshgrid(torch.arange(181), torch.arange(CLASSES), torch.arange(noise_nodes), indexing="ij")
    image, o, j = (x.flatten() for x in grid)
    mass = (p @ NOISE)[image, o] * weight[j]
    return x0[image], o, node[j], mass / mass.sum()


def optimum(loss):
    """Where a loss that is quadratic in all a_c and b_c is least, [C,2]: one Newton step for each class."""

    def slope(a, b):
        weights = torch.tensor([[a], [b]], dtype=torch.float64).repeat(1, CLASSES).requires_grad_()
        return torch.autograd.grad(loss(weights), weights)[0]

    start = slope(0, 0)
    hessian = torch.stack([slope(1, 0) - start, slope(0, 1) - start], dim=-1)  # [a or b, class, a or b]
    return -torch.linalg.solve(hessian.permute(1, 0, 2), start.T)


def learned(posterior, sigma):
    """The a_c and b_c [C,2] that DSM learns from labels drawn from `posterior(x_0, x_t, o)` [n,C]."""
    x0, o, noise, mass = population(noise_nodes=4)
    p = posterior(x0, x0 + sigma * noise, o)
    others = (torch.arange(CLASSES - 1) >= o[:, None]) + torch.arange(CLASSES - 1)
    exact = torch.cat([p.gather(1, o[:, None]), p.gather(1, others), torch.zeros(len(p), 1)], dim=1)  # not rounded
    known = TopPosterior(o.numpy(), others.numpy(), exact.numpy(), np.full(CLASSES, 0.1))
    toy = ready(
        Toy, make_config(), Data(n=2, classes=CLASSES), CPU, posterior_labels=PosteriorLabels(known, "sample", CPU)
    )

    # Each class of each image is drawn by the middle of its interval, and counts as often as it would be drawn.
    item, label = (p > 1e-14).nonzero().T
    uniform = (p.cumsum(dim=1) - p / 2)[item, label]
    weight = mass[item] * p[item, label]
    assert torch.equal(toy.posterior_labels.classes(item, uniform), label)
    y = x0[item].reshape(-1, 1, 1, 1)
    draws = dict(items=item, label=uniform, noise=noise[item].reshape(y.shape), sigma=torch.full_like(y, sigma))

    def loss(weights):
        net = toy.trained["net"]
        net.forward = lambda *args, **_: torch.func.functional_call(net.net, dict(weights=weights), args)
        return (toy.loss(y, torch.zeros(len(y), CLASSES), draws, Stats(CPU)).flatten() * weight).sum()

    return optimum(loss)


@pytest.mark.parametrize("sigma", [0.2, 1.3, 50.0])
def test_the_optimum_is_the_clean_denoiser(sigma):
    found = learned(lambda x0, xt, o: posterior_weights(log_density(x0, SPREAD**2), NOISE, o), sigma)
    gain = SPREAD**2 / (SPREAD**2 + sigma**2)
    want = torch.stack([(1 - gain) * MEANS, torch.full([CLASSES], gain, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-10)


def test_labels_drawn_given_the_noisy_image_lose_contrast():
    """Given x_t and the label that is asked for, such a label says nothing more about x_0."""
    sigma = 50.0
    found = learned(lambda x0, xt, o: posterior_weights(log_density(xt, SPREAD**2 + sigma**2), NOISE, o), sigma)
    contrast = (found[:, 0] @ MEANS) / (MEANS @ MEANS)
    kept = 0.6 - 0.4 / 9  # what the observed labels keep of it; drawing loses as much once more
    assert float(contrast) == pytest.approx(kept**2, abs=0.01) == pytest.approx(0.31, abs=0.01)


# In a run.


def step_labels(objective, nimg=64):
    """The labels that reach the network in one step, float32 [n,C]."""
    seen, data = [], objective.dataset
    objective.trained["net"].net.model.map_label.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    stats = Stats(CPU)
    objective.step(data.pixels, data.onehot(torch.arange(len(data))), nimg, stats, torch.arange(len(data)))
    return torch.cat(seen), {k: v["mean"] for k, v in stats.reduce().items()}


def half_sure(data, mode, **kwargs):
    """Labels of a data set of which each image has its own with 0.5, and the next class with 0.5."""
    p = np.eye(4)[data.labels] / 2 + np.eye(4)[(data.labels + 1) % 4] / 2
    return PosteriorLabels(compress(p, data.labels), mode, CPU, **kwargs)


@pytest.mark.parametrize("cls", [DSM, TDSM])
def test_steps_draw_labels_and_repeat_them(cls):
    data, kwargs = Data(), {}
    if cls is TDSM:
        kwargs = dict(classifier=FixedClassifier(), transition=transition_matrix("sym", 0.4, 4), posterior="clean")

    def objective(**changes):
        return ready(cls, make_config(**changes), data, CPU, posterior_labels=half_sure(data, "sample"), **kwargs)

    labels, stats = step_labels(objective(tdsm=dict(tau=1.0)))
    assert torch.equal(step_labels(objective(tdsm=dict(tau=1.0), batch_gpu=5))[0], labels)
    drawn = labels.argmax(dim=1).numpy()
    same, following = drawn == data.labels, drawn == (data.labels + 1) % 4
    assert (same | following).all() and 8 < same.sum() < 24
    assert stats["Posterior/changed"] == following.mean()
    assert not torch.equal(step_labels(objective(tdsm=dict(tau=1.0)), nimg=96)[0], labels)


def test_images_without_label_learn_the_unconditional_denoiser():
    data = Data()
    unsure = 0.2 + 0.2 * np.eye(4)[(data.labels + 1) % 4]
    p = np.where(np.arange(32)[:, None] % 2, np.eye(4)[data.labels], unsure)
    posterior = compress(p, data.labels)
    objective = ready(
        DSM, make_config(), data, CPU, posterior_labels=PosteriorLabels(posterior, "null", CPU, limit=0.5)
    )
    labels, stats = step_labels(objective)
    assert torch.equal(labels.any(dim=1), torch.arange(32) % 2 == 1)
    assert stats["Posterior/without_label"] == 0.5 and stats["Posterior/changed"] == 0  # a lost label is not changed
