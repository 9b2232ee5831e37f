"""TDSM with one drawn class in place of the sum: the expected gradient, exactly, and what it costs."""

import numpy as np
import pytest
import torch

from archives.label_noise import transition_matrix
from archives.posterior import compress
from dnnlib import UserError
from tests.support.objectives import CPU, Data, FixedClassifier, make_config, ready
from torch_utils.training_stats import Stats
from training.objectives.posterior_labels import PosteriorLabels
from training.objectives.tdsm import TDSM

N, CLASSES = 7, 4


class Denoiser(torch.nn.Module):
    """A small nonlinear D(x; sigma, c) in float64 whose classes share weights. It counts the images that it sees."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.first = torch.nn.Parameter(torch.randn(16, 64 + CLASSES, generator=g).double() * 0.3)
        self.second = torch.nn.Parameter(torch.randn(64, 16, generator=g).double())
        self.seen = []

    def forward(self, x, sigma, labels, augment_labels=None):
        self.seen.append(len(x))
        hidden = torch.cat([x.flatten(1).double(), labels.double()], dim=1) @ self.first.T
        return (hidden.tanh() @ self.second.T).reshape(x.shape)


class Toy(TDSM):
    """TDSM with this denoiser and with weights w that are given."""

    def build(self):
        return {"net": self.trained_network(Denoiser())}

    def prepare(self, images, draws):
        return images, None

    def weights(self, x, sigma, observed, augment_labels):
        return self.w


def toy(others, w):
    settings = dict(classifier=FixedClassifier(), transition=transition_matrix("sym", 0.4, CLASSES), posterior="clean")
    config = make_config(batch_size=N, tdsm=dict(tau=0.0, temp=1.0, others=others))
    objective = ready(Toy, config, Data(n=N, classes=CLASSES), CPU, **settings)
    objective.w = w
    return objective


@pytest.fixture
def batch():
    """Images, labels and draws of a step, and weights of all classes; image 3 loses its label."""
    g = torch.Generator().manual_seed(1)
    w = torch.softmax(torch.randn(N, CLASSES, generator=g, dtype=torch.float64), dim=1)
    y, noise = torch.randn(2, N, 1, 8, 8, generator=g, dtype=torch.float64)
    draws = dict(noise=noise, sigma=torch.rand(N, generator=g).double() + 0.5, dropped=torch.arange(N) == 3)
    return y, Data(n=N, classes=CLASSES).onehot(torch.arange(N)), draws, w


def gradient(objective, batch, shares=1.0, **further):
    y, labels, draws, _ = batch
    loss = objective.loss(y, labels, draws | further, Stats(CPU)).flatten(1).sum(dim=1)
    return torch.autograd.grad((loss * shares).sum(), list(objective.trained["net"].net.parameters()))


def test_the_expected_gradient_is_that_of_the_full_sum(batch):
    w = batch[3]
    full = gradient(toy("all", w), batch)
    expected = [torch.zeros_like(part) for part in full]
    single = []
    for c in range(CLASSES):  # every image draws class c, which counts as often as it would be drawn
        drawn = gradient(toy("sample", w), batch, w[:, c], other=(w.cumsum(dim=1) - w / 2)[:, c])
        expected = [a + b for a, b in zip(expected, drawn, strict=True)]
        single.append(drawn[0] / w[:, c].mean())
    for a, b in zip(full, expected, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12 * float(a.abs().max()))
    assert all((g - full[0]).abs().max() > 0.01 * full[0].abs().max() for g in single)  # each draw alone differs


def test_an_image_needs_a_pass_only_where_another_class_is_drawn(batch):
    y, labels, draws, w = batch
    observed, uniform = labels.argmax(dim=1), torch.linspace(0, 0.99, N, dtype=torch.float64)
    objective = toy("sample", w)
    stats = Stats(CPU)
    objective.loss(y, labels, draws | dict(other=uniform), stats)
    other = (w.cumsum(dim=1) > uniform[:, None]).int().argmax(dim=1) != observed
    other[3] = False  # it has no label
    assert 0 < other.sum() < N - 1
    assert objective.trained["net"].net.seen == [N, int(other.sum())]
    kept = ~draws["dropped"]
    assert stats.reduce()["TDSM/pairs_per_image"]["mean"] == pytest.approx(float(other[kept].double().mean()))
    certain = toy("sample", labels.double())
    gradient(certain, batch, other=uniform)
    assert certain.trained["net"].net.seen == [N]


def test_no_class_is_cut_off_and_steps_repeat_their_draws():
    """With tau 1 the sum has the observed class alone. A draw knows no tau, and does not depend on micro-batches."""
    settings = dict(classifier=FixedClassifier(), transition=transition_matrix("sym", 0.4, 4), posterior="clean")

    def step(**changes):
        config = make_config(**({"tdsm": dict(tau=1.0, temp=1.0, pairs=1, others="sample")} | changes))
        config.network.kwargs["dropout"] = 0.0
        objective, data, grads = ready(TDSM, config, Data(), CPU, **settings), Data(), []
        g = torch.Generator().manual_seed(0)
        net = objective.trained["net"]
        with torch.no_grad():  # away from the initial weights, where all classes look alike
            for p in net.net.parameters():
                p.add_(torch.randn(p.shape, generator=g) * 0.05)
        net.update = lambda *_: grads.extend(p.grad.clone() for p in net.net.parameters())
        stats = Stats(CPU)
        objective.step(data.pixels, data.onehot(torch.arange(32)), 64, stats, torch.arange(32))
        return {k: v["mean"] for k, v in stats.reduce().items()}, grads

    whole, grads = step()
    assert 0.2 < whole["TDSM/pairs_per_image"] < 0.8 and whole["TDSM/cut_weight"] == pytest.approx(0, abs=1e-6)
    parts, part_grads = step(batch_gpu=5)
    assert parts["TDSM/pairs_per_image"] == pytest.approx(whole["TDSM/pairs_per_image"])
    for a, b in zip(grads, part_grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * float(a.abs().max() + 1))
    assert step(tdsm=dict(tau=1.0, temp=1.0, others="all"))[0]["TDSM/pairs_per_image"] == 0


def test_posterior_labels_leave_less_noise_to_correct():
    """The weights follow the labels that an image gets, and the noise that these leave."""
    data = Data()
    p = np.eye(4)[(data.labels + 1) % 4] * 0.8 + np.full(4, 0.05)  # nearly certain that all labels are wrong
    known = PosteriorLabels(compress(p, data.labels), "relabel", CPU)
    settings = dict(classifier=FixedClassifier(), posterior="clean", posterior_labels=known)
    objective = ready(TDSM, make_config(), data, CPU, transition=transition_matrix("sym", 0.4, 4), **settings)
    T = np.full([4, 4], 0.05) + 0.8 * np.eye(4)
    counts = np.bincount((data.labels + 1) % 4, minlength=4)
    left = T * counts / (T @ counts)[:, None]
    np.testing.assert_allclose(objective.info()["transition"], left, atol=1e-3)  # float16 holds the posterior
    assert f"{1 - np.diagonal(left).mean():.1%}" in objective.notes()[1]
    seen = []
    objective.combine = lambda x, sigma, labels, *_: seen.append(labels) or x
    draws = objective.draw_step(data.pixels, 0) | dict(items=torch.arange(32))
    objective.loss(data.pixels, data.onehot(torch.arange(32)), draws, Stats(CPU))
    assert torch.equal(seen[0].argmax(dim=1), torch.from_numpy((data.labels + 1) % 4))
    with pytest.raises(UserError, match="label [1-3] occurs"):  # T belongs to the observed labels, not to these
        ready(TDSM, make_config(), data, CPU, transition=np.eye(4)[[0, 0, 0, 0]], **settings)


class Table(torch.nn.Module):
    """D(x; sigma, c) = row c: all that can be said where x says nothing."""

    def __init__(self):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.zeros(CLASSES, 64, dtype=torch.float64))

    def forward(self, x, sigma, labels, augment_labels=None):
        return (labels.double() @ self.rows).reshape(x.shape)


class TableToy(Toy):
    def build(self):
        return {"net": self.trained_network(Table())}


@pytest.mark.parametrize("eta", [0.2, 0.4, 0.6])
def test_where_images_say_nothing_it_learns_slower_and_from_noisier_answers(eta):
    """Symmetric noise: T_oo r times the step of clean labels, and 1 / r times their error (docs/methods/tdsm.md)."""
    T = torch.as_tensor(transition_matrix("sym", eta, CLASSES), dtype=torch.float64)  # rows: P(clean | observed), too
    rate = 1 - eta * CLASSES / (CLASSES - 1)
    means, wrong = torch.randn(2, CLASSES, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means, wrong = means - means.mean(dim=0), wrong - wrong.mean(dim=0)  # what tells the classes apart
    observed = torch.arange(CLASSES)
    settings = dict(classifier=FixedClassifier(), transition=T.numpy(), posterior="clean")
    config = make_config(batch_size=CLASSES, tdsm=dict(tau=0.0, temp=1.0, others="all"))
    objective = ready(TableToy, config, Data(n=CLASSES, classes=CLASSES), CPU, **settings)
    draws = dict(noise=torch.zeros(CLASSES, 1, 8, 8).double(), sigma=torch.full([CLASSES], 80.0).double())
    onehot = torch.nn.functional.one_hot(observed, CLASSES).float()

    def slope(weights, images):  # of the table; the gradient is linear in the images, so their means do
        objective.w = weights
        loss = objective.loss(images.reshape(CLASSES, 1, 8, 8), onehot, draws, Stats(CPU))
        return torch.autograd.grad(loss.sum(), list(objective.trained["net"].net.parameters()))[0]

    clean = slope(torch.eye(CLASSES).double(), means)
    torch.testing.assert_close(slope(T, T @ means), (1 - eta) * rate * clean)
    with torch.no_grad():
        objective.trained["net"].net.rows += means + wrong
    at_rest = slope(T, T @ means + rate * wrong)  # so means that are off by rate * wrong put the table off by `wrong`
    assert at_rest.abs().max() < 1e-9 * clean.abs().max() < slope(T, T @ means).abs().max()
