"""Label dropout: D(x; none) learns the unconditional denoiser, in every objective that trains a denoiser."""

import numpy as np
import pytest
import torch

from archives.label_noise import transition_matrix
from tests.support.objectives import CPU, Data, FixedClassifier, make_config, ready
from torch_utils.training_stats import Stats
from training.objectives.dsm import DSM
from training.objectives.tdsm import TDSM

NOISE = transition_matrix("sym", 0.4, 4)
DROPPED_BY_VERSION_0_1 = [0, 2, 3, 11, 16, 23, 24, 28]  # of 32 images in the step after 64, with seed 5 and P = 0.3


def make(cls, p=0.0, **changes):
    """The same network, away from its initial weights, where all classes look alike."""
    config = make_config(**changes)
    config.network.kwargs |= dict(dropout=0.0, label_dropout=p)
    kwargs = dict(classifier=FixedClassifier(), transition=NOISE, posterior="clean") if cls is TDSM else {}
    objective = ready(cls, config, Data(), CPU, **kwargs)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in objective.trained["net"].net.parameters():
            weight.add_(torch.randn(weight.shape, generator=g) * 0.05)
    return objective


def step(objective):
    """What one step's loss is for each image, the labels that reach the network with gradients, and the gradients."""
    losses, labels, grads = [], [], {}
    trained, loss_of, data = objective.trained["net"], objective.loss, objective.dataset

    def loss(*args):
        losses.append(loss_of(*args))
        return losses[-1]

    def see(_, args):
        if torch.is_grad_enabled():
            labels.append(args[0])

    objective.loss = loss
    trained.net.model.map_label.register_forward_pre_hook(see)
    trained.update = lambda *_: grads.update({k: p.grad.clone() for k, p in trained.net.named_parameters()})
    objective.step(data.pixels, data.onehot(torch.arange(len(data))), 64, Stats(CPU))
    return torch.cat(losses).detach().sum([1, 2, 3]), torch.cat(labels), grads


def test_an_image_without_label_gets_the_plain_loss():
    plain, _, _ = step(make(DSM, p=1))
    kept, _, _ = step(make(TDSM))
    mixed, labels, _ = step(make(TDSM, p=0.5))
    dropped = ~labels.any(dim=1)
    assert 8 < dropped.sum() < 24
    torch.testing.assert_close(mixed, torch.where(dropped, plain, kept))
    assert ((plain - kept).abs() > 1e-4 * plain).all()  # the two losses really differ


def test_images_without_labels_train_as_dsm_does():
    (_, _, dsm), (_, _, tdsm) = step(make(DSM, p=1)), step(make(TDSM, p=1))
    for name, grad in dsm.items():
        torch.testing.assert_close(tdsm[name], grad, rtol=1e-5, atol=1e-5)
    assert max(float(grad.abs().max()) for grad in dsm.values()) > 1


@pytest.mark.parametrize("cls", [DSM, TDSM])
def test_dropped_labels_do_not_depend_on_micro_batches(cls):
    whole, labels, grads = step(make(cls, p=0.5))
    parts, part_labels, part_grads = step(make(cls, p=0.5, batch_gpu=5))
    assert torch.equal(labels, part_labels)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    for name, grad in grads.items():
        torch.testing.assert_close(part_grads[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max() + 1))


def test_dropped_labels_are_those_of_version_0_1():
    _, labels, _ = step(make(DSM, p=0.3))
    assert (~labels.any(dim=1)).nonzero()[:, 0].tolist() == DROPPED_BY_VERSION_0_1


MEANS, PRIOR, SPREAD, SIGMA = torch.tensor([-1.0, 1.0]), torch.tensor([0.7, 0.3]), 0.4, 0.9
FLIPS = np.array([[0.6, 0.4], [0.1, 0.9]])


class ExactDenoiser(torch.nn.Module):
    """D of two Gaussian classes at noise level SIGMA; only D(x; none), given as a + b x, can learn."""

    def __init__(self):
        super().__init__()
        self.none = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x, sigma, labels, augment_labels=None):
        gain = SPREAD**2 / (SPREAD**2 + SIGMA**2)
        exact = gain * x + (1 - gain) * (labels @ MEANS).reshape(x.shape)
        return torch.where(labels.any(dim=1).reshape(x.shape), exact, self.none[0] + self.none[1] * x)


class KnownPosterior(torch.nn.Module):
    """P(y | x_t), as logits."""

    augment_dim = 0

    def forward(self, x, sigma, augment_labels=None):
        return PRIOR.log() - (x.flatten(1) - MEANS).square() / (2 * (SPREAD**2 + SIGMA**2))


def test_the_optimum_of_d_none_is_the_best_denoiser_of_all_images():
    """Where D(x; none) = a + b x minimizes the loss: at the regression of all images on their noisy forms."""

    class Toy(TDSM):
        def build(self):
            return {"net": self.trained_network(ExactDenoiser())}

        def prepare(self, images, draws):
            return images, None

    config, data = make_config(tdsm=dict(tau=0.0, temp=1.0)), Data(n=2, classes=2)
    data.labels = np.arange(2)
    config.network.kwargs["label_dropout"] = 0.25
    toy = ready(Toy, config, data, CPU, classifier=KnownPosterior(), transition=FLIPS, posterior="clean")
    n, g = 50_000, torch.Generator().manual_seed(0)
    clean = torch.multinomial(PRIOR, n, replacement=True, generator=g)
    observed = torch.multinomial(torch.from_numpy(FLIPS)[clean], 1, generator=g)[:, 0]
    y = (MEANS[clean] + SPREAD * torch.randn(n, generator=g)).reshape(-1, 1, 1, 1)
    torch.manual_seed(0)
    draws = toy.draw(y, g) | dict(sigma=torch.full([n], SIGMA))

    def slope(a, b):
        none = torch.tensor([a, b], requires_grad=True)
        toy.trained["net"].net.none = torch.nn.Parameter(none)
        loss = toy.loss(y, torch.nn.functional.one_hot(observed, 2).float(), draws, Stats(CPU)).mean()
        return torch.autograd.grad(loss, toy.trained["net"].net.none)[0]

    # The loss is quadratic in (a, b): its Hessian, column by column, and one Newton step lead to the optimum.
    start = slope(0.0, 0.0)
    hessian = torch.stack([slope(1.0, 0.0) - start, slope(0.0, 1.0) - start], dim=1)
    found = -torch.linalg.solve(hessian, start)
    mean = PRIOR @ MEANS
    variance = SPREAD**2 + PRIOR @ (MEANS - mean) ** 2
    b = variance / (variance + SIGMA**2)
    torch.testing.assert_close(found, torch.stack([(1 - b) * mean, b]), rtol=0, atol=0.01)
