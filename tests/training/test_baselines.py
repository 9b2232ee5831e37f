"""Two further baselines for wrong labels: perturbed label embeddings (cep), a denoiser that classifies (dmis)."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from dnnlib import UserError
from tests.support.objectives import CPU, Data, make_config, ready
from torch_utils.training_stats import Stats
from training.objectives import dmis
from training.objectives.cep import CEP
from training.objectives.dmis import DMIS
from training.objectives.dsm import DSM


def losses(objective, **further):
    """The loss of each image of the data set in one step, without the step."""
    data = objective.dataset
    draws = objective.draw_step(data.pixels, 64) | further
    torch.manual_seed(0)
    return objective.loss(data.pixels, data.onehot(torch.arange(32)), draws, Stats(CPU)).flatten(1).sum(dim=1)


def away(objective):
    """Move the weights away from the initial ones, where all labels look alike."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in objective.trained["net"].net.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return objective


def cep(gamma):
    return away(ready(CEP, make_config(cep=dict(gamma=gamma)), Data(), CPU))


def test_the_perturbation_of_an_embedding_has_the_length_gamma():
    objective = cep(0.5)
    layer, outputs = objective.trained["net"].net.model.map_label, []
    layer.register_forward_hook(lambda _, args, output: outputs.append(output))
    draws = objective.draw_step(objective.dataset.pixels, 64)
    losses(objective, dropped=torch.arange(32) < 4)
    labels = objective.dataset.onehot(torch.arange(32)) * (torch.arange(32) >= 4)[:, None]
    d = layer.out_features
    plain = layer(labels * 4**0.5)  # what the U-Net multiplies labels by; outside of a loss nothing is perturbed
    moved = (outputs[0] - plain).detach()
    assert not moved[:4].any()  # images without label
    torch.testing.assert_close(moved[4:], 0.5 / d**0.5 * draws["embedding"][4:], rtol=0, atol=1e-6)
    assert float(moved[4:].square().sum(dim=1).mean()) == pytest.approx(0.25, rel=0.2)
    assert not objective.trained["net"].ema.model.map_label._forward_hooks


def test_without_perturbation_it_is_dsm():
    dsm = away(ready(DSM, make_config(), Data(), CPU))
    torch.testing.assert_close(losses(cep(0.0)), losses(dsm), rtol=0, atol=0)
    parts = [losses(cep(gamma)) for gamma in (1.0, 1.0, 2.0)]
    assert torch.equal(parts[0], parts[1]) and not torch.equal(parts[0], parts[2])


def test_embeddings_need_labels():
    data = Data()
    data.label_dim = 0
    with pytest.raises(UserError, match="toy: without labels"):
        ready(CEP, make_config(cep=dict(gamma=1.0)), data, CPU)


class Small(torch.nn.Module):
    """What a U-Net is called with, quick to compile."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.map_label = torch.nn.Linear(4, 64)

    def forward(self, x, sigma, labels, augment_labels=None):
        return x / (1 + sigma) + self.model.map_label(labels).reshape(x.shape)


@pytest.mark.slow
def test_one_compilation_for_all_steps(monkeypatch):
    monkeypatch.setattr(DSM, "build", lambda self: {"net": self.trained_network(Small())})
    plain, compiled, counter = cep(1.0), cep(1.0), CompileCounter()
    torch._dynamo.reset()
    compiled.trained["net"].net.compile(backend=counter)
    for nimg in (0, 32, 64):  # each step has its own perturbation
        z = dict(embedding=plain.draw_step(plain.dataset.pixels, nimg)["embedding"])
        torch.testing.assert_close(losses(compiled, **z), losses(plain, **z))
        assert counter.frame_count == 1


SPREAD, MEANS = 0.6, torch.linspace(-1, 1, 4)


class Gaussians(torch.nn.Module):
    """The best denoiser of classes N(MEANS[y], SPREAD^2 I)."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, sigma, labels, augment_labels=None):
        gain = SPREAD**2 / (SPREAD**2 + sigma**2)
        return gain * x + (1 - gain) * (labels @ MEANS).reshape(-1, 1, 1, 1) + 0 * self.unused


class Toy(DMIS):
    def build(self):
        return super().build() | {"net": self.trained_network(Gaussians())}

    def prepare(self, images, draws):
        return images, None


def test_the_denoiser_classifies_as_the_densities_do(monkeypatch):
    monkeypatch.setattr(dmis, "LEVELS", 400)
    monkeypatch.setattr(dmis, "BAND", (1e-3, 1e3))
    toy = ready(Toy, make_config(), Data(), CPU)
    y = torch.randn(32, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    draws = dict(level=torch.full([32, 1], 0.5), level_noise=torch.zeros(32, 400, 1, 2, 2))
    found = toy.log_likelihoods(y, None, draws)
    want = -(y[:, None] - MEANS.reshape(-1, 1, 1, 1)).square().flatten(2).sum(dim=2) / (2 * SPREAD**2)
    torch.testing.assert_close(found - found[:, :1], want - want[:, :1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("classes", "noise"), [(2, 0.107), (10, 0.518), (100, 0.518), (1000, 0.518)])
def test_the_labels_count_at_first_whatever_the_number_of_classes(classes, noise, monkeypatch):
    data = Data()
    data.label_dim = classes
    T = Toy(make_config(), data, CPU).build()["transition"].net().detach()
    np.testing.assert_allclose(1 - T.diagonal(), noise, atol=1e-3)
    np.testing.assert_allclose(T.sum(dim=1), 1, rtol=1e-5)


def test_the_loss_draws_a_label_from_the_posterior_and_learns_the_noise(monkeypatch):
    toy, data = ready(Toy, make_config(), Data(), CPU), Data()
    p = torch.softmax(torch.randn(32, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    monkeypatch.setattr(toy, "log_likelihoods", lambda *_: p.log() + 3)  # up to a constant
    y, observed = torch.randn(32, 1, 8, 8), torch.from_numpy(data.labels)
    draws, labels = toy.draw_step(y, 0), data.onehot(torch.arange(32))
    loss = toy.loss(y, labels, draws, Stats(CPU))

    T = toy.trained["transition"].net()
    q = p * T.T[observed]
    q = q / q.sum(dim=1, keepdim=True)
    drawn = (q.cumsum(dim=1) > draws["label"][:, None]).int().argmax(dim=1)
    assert (drawn != observed).any() and (drawn == observed).any()
    likely = (p @ T).gather(1, observed[:, None])[:, 0].log()
    sigma = draws["sigma"].reshape(-1, 1, 1, 1)
    onehot = torch.nn.functional.one_hot(drawn, 4).float()
    error = (Gaussians()(y + sigma * draws["noise"], sigma, onehot) - y).square()
    want = (toy.noise_levels.weight(sigma) * error).flatten(1).sum(dim=1) - likely
    torch.testing.assert_close(loss, want)
    theta = toy.trained["transition"].net.theta
    found = torch.autograd.grad(loss.sum(), theta)[0]
    torch.testing.assert_close(
        found, torch.autograd.grad(-likely.sum(), theta)[0]
    )  # the drawn label gives T no gradient
    np.testing.assert_allclose(toy.info()["transition"], T.detach())
