"""Objectives in closed form: DSM and TDSM on Gaussian classes, the forward-corrected classifier, gradient hygiene."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from archives.label_noise import transition_matrix
from dnnlib import UserError
from tests.support.objectives import CPU, Data, FixedClassifier, make_config, ready
from torch_utils.persistence import load_snapshot, save_snapshot
from torch_utils.training_stats import Stats
from training.augment import shift_images
from training.learned_transition import LearnedTransition
from training.loss_scale import LossScale
from training.objectives.classifier import ClassifierObjective, check_classifier
from training.objectives.dsm import DSM
from training.objectives.tdsm import TDSM, known_transition
from training.trained_network import TrainedNetwork, linear_rampup


def gradients(objective):
    """Loss and gradients of one batch under the run's seed, before the optimizer sees them."""
    seen = {}
    net = objective.trained["net"]
    net.update = lambda *args: seen.update({k: p.grad.clone() for k, p in net.net.named_parameters()})
    stats = Stats(CPU)
    data = objective.dataset
    objective.step(data.pixels, data.onehot(torch.arange(len(data))), 64, stats)
    return stats.reduce()["Loss/loss"]["mean"], seen


@pytest.mark.parametrize("augment", [None, dict(p=0.5, xflip=1e8, scale=1, translate_frac=1)])
def test_tdsm_without_noise_is_dsm(augment):
    config, data = make_config(augment=augment), Data()
    # Zero-initialized output layers would make most gradients zero; the scale of the others is what is compared.
    a, grads_a = gradients(ready(DSM, config, data, CPU))
    b, grads_b = gradients(
        ready(TDSM, config, data, CPU, classifier=FixedClassifier(), transition=np.eye(4), posterior="clean")
    )
    assert a == pytest.approx(b, rel=1e-6)
    assert grads_a.keys() == grads_b.keys() and any(g.abs().max() > 1e-3 for g in grads_a.values())
    for k in grads_a:
        torch.testing.assert_close(grads_a[k], grads_b[k], rtol=1e-6, atol=1e-6 * float(grads_a[k].abs().max() + 1e-3))


def test_tdsm_combination_matches_a_loop_over_classes():
    config, data = make_config(), Data()
    config.network.kwargs["dropout"] = 0.0
    t = transition_matrix("sym", 0.4, 4)
    objective = ready(TDSM, config, data, CPU, classifier=FixedClassifier(), transition=t, posterior="clean")
    with torch.no_grad():  # Away from the initial weights, where all classes look alike.
        for p in objective.trained["net"].net.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
    x, labels = torch.randn(32, 1, 8, 8), data.onehot(torch.arange(32))
    sigma = torch.full([32, 1, 1, 1], 0.7)
    stats = Stats(CPU)
    got = objective.combine(x, sigma, labels, None, stats)
    p = torch.softmax(objective.classifier(x, sigma), dim=1)
    joint = torch.from_numpy(t).float().T[labels.argmax(1)] * p  # T[y, o] P(y | x)
    w = joint / joint.sum(1, keepdim=True)
    want = torch.zeros_like(x)
    kept = 0
    for c in range(4):
        onehot = torch.nn.functional.one_hot(torch.full([32], c), 4).float()
        keep = (labels[:, c] == 1) | (w[:, c] > 0.01)
        kept += int((keep & (labels[:, c] == 0)).sum())
        want += (w[:, c] * keep)[:, None, None, None] * objective.trained["net"].net(x, sigma, onehot)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert stats.reduce()["TDSM/pairs_per_image"]["mean"] * 32 == pytest.approx(kept)
    # Only the observed label's term carries gradients.
    grad = torch.autograd.grad(got.sum(), objective.trained["net"].net.model.map_label.weight)[0]
    own = (w * labels).sum(1)[:, None, None, None] * objective.trained["net"].net(x, sigma, labels)
    torch.testing.assert_close(
        grad, torch.autograd.grad(own.sum(), objective.trained["net"].net.model.map_label.weight)[0]
    )


MEANS, SPREAD, SIGMA = torch.tensor([[-1.0, 0.5], [1.0, -0.5]]), 0.6, 0.8
NOISE = np.array([[0.7, 0.3], [0.2, 0.8]])


class AffineDenoiser(torch.nn.Module):
    """D(x; sigma, y) = A_y x + b_y at one noise level: what the denoiser of a Gaussian class is."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(2, 2, 2))
        self.b = torch.nn.Parameter(torch.zeros(2, 2))

    def forward(self, x, sigma, labels, augment_labels=None):
        c = labels.argmax(dim=1)
        return (torch.einsum("nij,nj->ni", self.a[c], x.flatten(1)) + self.b[c])[:, :, None, None]


class KnownPosterior(torch.nn.Module):
    """P(y | x_t) of two equally likely Gaussians N(mean, SPREAD^2 I) seen at noise level SIGMA."""

    augment_dim = 0

    def forward(self, x, sigma, augment_labels=None):
        return -(x.flatten(1)[:, None] - MEANS).square().sum(2) / (2 * (SPREAD**2 + SIGMA**2))


class OneLevel:
    def sample(self, n, generator, device):
        return torch.full([n], SIGMA)

    def weight(self, sigma):
        return torch.ones_like(sigma)


def train_gaussians(cls, **kwargs):
    class Toy(cls):
        def build(self):
            return {
                "net": self.trained_network(AffineDenoiser(), lr_factor=lambda nimg: 1.0 if nimg < 700_000 else 0.05)
            }

        def prepare(self, images, draws):
            return images, None

    config = make_config(optimizer=dict(name="adam", lr=5e-3), ema_halflife_nimg=100_000, batch_size=1024)
    data = Data(n=2, classes=2)
    data.labels = np.array([0, 1])
    toy = ready(Toy, config, data, CPU, **kwargs)
    toy.noise_levels = OneLevel()
    g = torch.Generator().manual_seed(1)
    stats = Stats(CPU)
    for step in range(1000):
        y = torch.randint(2, [1024], generator=g)
        x0 = MEANS[y] + SPREAD * torch.randn(1024, 2, generator=g)
        o = torch.multinomial(torch.from_numpy(NOISE)[y], 1, generator=g).flatten()
        toy.step(x0[:, :, None, None], torch.nn.functional.one_hot(o, 2).float(), 1024 * step, stats)
    return toy.trained["net"].ema


@pytest.mark.slow
def test_gaussian_classes():
    """TDSM recovers each clean class's denoiser; DSM what is best for the mixture behind each observed label."""
    gain = SPREAD**2 / (SPREAD**2 + SIGMA**2)
    tdsm = train_gaussians(TDSM, classifier=KnownPosterior(), transition=NOISE, posterior="clean")
    torch.testing.assert_close(tdsm.a.data, (gain * torch.eye(2)).expand(2, 2, 2), rtol=0, atol=0.03)
    torch.testing.assert_close(tdsm.b.data, (1 - gain) * MEANS, rtol=0, atol=0.03)

    dsm = train_gaussians(DSM)
    share = torch.from_numpy(NOISE / NOISE.sum(0)).float()  # P(y | o) in column o; equal priors
    for o in range(2):
        mean = share[:, o] @ MEANS
        cov = SPREAD**2 * torch.eye(2) + sum(
            share[y, o] * torch.outer(MEANS[y] - mean, MEANS[y] - mean) for y in range(2)
        )
        a = cov @ torch.linalg.inv(cov + SIGMA**2 * torch.eye(2))  # linear regression of x_0 on x_t
        torch.testing.assert_close(dsm.a.data[o], a, rtol=0, atol=0.03)
        torch.testing.assert_close(dsm.b.data[o], mean - a @ mean, rtol=0, atol=0.03)
        assert (a - gain * torch.eye(2)).abs().max() > 0.1  # The two answers really differ.


def test_noisy_posterior_gives_the_same_weights():
    """A classifier of noisy labels, inverted through T, weighs like the clean one."""
    config, data = make_config(), Data()
    t = transition_matrix("sym", 0.4, 4)

    class Noisy(FixedClassifier):
        def forward(self, x, sigma, augment_labels=None):
            return (torch.softmax(super().forward(x, sigma), dim=1) @ torch.from_numpy(t).float()).log()

    x, sigma, o = torch.randn(32, 1, 8, 8), torch.ones(32, 1, 1, 1), torch.from_numpy(data.labels)
    clean = ready(TDSM, config, data, CPU, classifier=FixedClassifier(), transition=t, posterior="clean")
    noisy = ready(TDSM, config, data, CPU, classifier=Noisy(), transition=t, posterior="noisy")
    torch.testing.assert_close(clean.weights(x, sigma, o, None), noisy.weights(x, sigma, o, None), rtol=1e-4, atol=1e-5)


def test_transition_and_classifier_are_checked():
    data = Data()
    t = transition_matrix("sym", 0.4, 4)
    assert known_transition(dict(transition=t.tolist(), posterior="clean"), None, data, "c.pkl")[1] == "clean"
    assert known_transition(dict(posterior="noisy"), t, data, "c.pkl")[0] is not None
    with pytest.raises(UserError, match=r"0\.8.*c\.pkl.*0\.6"):
        known_transition(dict(transition=t.tolist()), transition_matrix("sym", 0.2, 4), data, "c.pkl")
    data.corruption = dict(noise_type="sym", noise_rate=0.4)
    with pytest.raises(UserError, match="records the noise sym at rate 0.4"):
        known_transition({}, None, data, "c.pkl")
    empty = np.array([[1.0, 0, 0, 0]] * 4)
    with pytest.raises(UserError, match="label [123]"):
        ready(TDSM, make_config(), data, CPU, classifier=FixedClassifier(), transition=empty, posterior="clean")
    with pytest.raises(UserError, match="condition"):
        ready(
            TDSM,
            make_config(),
            data,
            CPU,
            classifier=FixedClassifier(),
            transition=np.full([4, 4], 0.25),
            posterior="noisy",
        )
    for field, word in (("img_resolution", "resolution"), ("img_channels", "channels"), ("label_dim", "classes")):
        classifier = FixedClassifier()
        setattr(classifier, field, 99)
        with pytest.raises(UserError, match=f"{word}.*99"):
            check_classifier(dict(ema=classifier, info={}), data, "c.pkl")
    data.class_names = ["cat", "dog", "cow", "hen"]
    for names in (None, ["cat", "dog", "cow", "hen"], ["a cat", "dog", "cow", "hen"]):
        check_classifier(dict(ema=FixedClassifier(), info=dict(class_names=names)), data, "c.pkl")
    with pytest.raises(UserError, match="class 'dog' is number 0 of c.pkl, but number 1 of toy"):
        swapped = dict(class_names=["dog", "cat", "cow", "hen"])
        check_classifier(dict(ema=FixedClassifier(), info=swapped), data, "c.pkl")


def test_forward_correction_and_learned_transition():
    config, data = make_config(), Data()
    config.network.kwargs = dict(depth="small", model_channels=8, channel_mult=[1, 2, 4], dropout=0.0)
    t = transition_matrix("pair", 0.3, 4)
    objective = ready(ClassifierObjective, config, data, CPU, transition=t)
    log_p = torch.log_softmax(torch.randn(5, 4), dim=1)
    torch.testing.assert_close(
        objective.noisy_log_probs(log_p, objective.fixed).exp(), log_p.exp() @ torch.from_numpy(t).float()
    )
    assert objective.info()["posterior"] == "clean" and np.allclose(objective.info()["transition"], t)
    assert len(objective.val_indices) == 8 and not set(objective.val_indices.tolist()) & set(
        objective.train_indices.tolist()
    )
    assert objective.validate() == objective.validate()

    learned = LearnedTransition(4)()
    torch.testing.assert_close(learned.sum(1), torch.ones(4))
    off = torch.sigmoid(torch.tensor(-2.0))
    torch.testing.assert_close(learned[0, 0] / learned[0, 1], 1 / off)
    objective = ready(ClassifierObjective, config, data, CPU, transition=None, learn=True)
    factor = objective.trained["transition"].lr_factor
    assert [factor(n) for n in (0, 149, 150, 299, 300, 749, 750, 1000)] == [1, 1, 0.1, 0.1, 0.01, 0.01, 0, 0]
    assert ready(ClassifierObjective, config, data, CPU, transition=None).info() == dict(
        posterior="noisy", transition=None
    )


def test_a_label_that_never_occurs_leaves_the_gradients_finite():
    """Its column of T is all zero: no class turns into it."""
    data = Data()
    data.labels = np.arange(len(data)) % 3
    t = np.eye(4)
    t[3] = [0.5, 0.5, 0, 0]
    config = make_config()
    config.network.kwargs = dict(depth="small", model_channels=8, channel_mult=[1, 2, 4], dropout=0.0)
    loss, grads = gradients(ready(ClassifierObjective, config, data, CPU, transition=t))
    assert np.isfinite(loss) and all(g.isfinite().all() for g in grads.values())
    assert any(g.abs().max() > 0 for g in grads.values())
    data.labels[5] = 3
    with pytest.raises(UserError, match="label 3 occurs in the data, but column 3"):
        ClassifierObjective(config, data, CPU, transition=t)


def test_shift_images():
    images = torch.arange(2 * 9.0).reshape(2, 1, 3, 3)
    got = shift_images(images, torch.tensor([[1, 0], [0, -1]]))
    torch.testing.assert_close(got[0, 0], images[0, 0][[0, 0, 1]])  # one pixel down
    torch.testing.assert_close(got[1, 0], images[1, 0][:, [1, 2, 2]])  # one pixel left


def test_batch_gpu_changes_nothing():
    grads = []
    for batch_gpu in (None, 16, 5):
        config = make_config(batch_gpu=batch_gpu)
        config.network.kwargs["dropout"] = 0.0
        grads.append(
            gradients(
                ready(
                    TDSM,
                    config,
                    Data(),
                    CPU,
                    classifier=FixedClassifier(),
                    posterior="clean",
                    transition=transition_matrix("sym", 0.4, 4),
                )
            )[1]
        )
    for other in grads[1:]:
        for k, g in grads[0].items():
            torch.testing.assert_close(other[k], g, rtol=1e-4, atol=1e-5 * float(g.abs().max() + 1))


def test_update_ramps_cleans_and_averages():
    net = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(net.weight, 1.0)
    trained = TrainedNetwork(
        net, CPU, lr=0.1, optimizer="sgd", lr_factor=linear_rampup(100), ema_halflife=10, loss_scale=LossScale(4.0)
    )
    trained.optimizer.param_groups[0]["momentum"] = 0
    net.weight.grad.copy_(torch.tensor([[float("nan"), 8.0]]))
    trained.update(nimg=50, batch_size=10)  # lr 0.05, gradient (0, 2), EMA half-life min(10, 2.5)
    torch.testing.assert_close(net.weight.data, torch.tensor([[1.0, 0.9]]))
    beta = 0.5 ** (10 / 2.5)
    torch.testing.assert_close(trained.ema.weight.data, torch.tensor([[1.0, beta + (1 - beta) * 0.9]]))
    assert trained.ema.weight.is_leaf and not trained.ema.weight.requires_grad
    assert int(trained.take_bad_grads()) == 1 and int(trained.take_bad_grads()) == 0
    assert not net.weight.grad.any()
    net.weight.grad.copy_(torch.tensor([[float("inf"), -float("inf")]]))
    trained.update(nimg=100, batch_size=10)
    assert net.weight[0, 0] < -9000 < 9000 < net.weight[0, 1]


def test_channels_last_changes_the_layout_and_nothing_else(tmp_path):
    found, data = [], Data()
    for channels_last in (False, True):
        config = make_config()
        config.network.kwargs |= dict(dropout=0.0, attn_resolutions=[4])
        objective = ready(DSM, config, data, CPU)
        net = objective.trained["net"].net
        objective.trained["net"] = trained = TrainedNetwork(
            net, CPU, lr=0.1, optimizer="sgd", ema_halflife=1e6, channels_last=channels_last
        )
        for nimg in (0, 32):
            objective.step(data.pixels, data.onehot(torch.arange(32)), nimg, Stats(CPU))
        path = str(tmp_path / f"{channels_last}.pkl")
        save_snapshot(path, objective.snapshot() | dict(info={}))
        weight = next(p for p in trained.net.parameters() if p.ndim == 4 and min(p.shape) > 1)
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        found.append([trained.net.state_dict(), load_snapshot(path)["ema"].state_dict()])
    for plain, other in zip(*found, strict=True):
        for name, value in plain.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_training_compiles_once_and_whole():
    """One graph for all steps, micro-batches and the check that processes agree, whatever the learning rate does."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config, data, counter = make_config(batch_gpu=8, lr_rampup_nimg=100), Data(), CompileCounter()
    config.network.kwargs["attn_resolutions"] = [4]
    objective = ready(DSM, config, data, CPU)
    objective.trained["net"].net.compile(backend=counter)
    for nimg in range(0, 128, 32):
        objective.step(data.pixels, data.onehot(torch.arange(32)), nimg, Stats(CPU))
        objective.probe(nimg)
    assert counter.frame_count == 1 and not torch._dynamo.utils.counters["graph_break"]
