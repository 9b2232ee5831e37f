"""RDUOT in closed form: schedule, posterior, conjugates, reduced objectives, R1, costs; and across processes."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid, softplus

from archives.posterior import compress
from sampling.ddgan import ddgan_sampler
from tests.support.objectives import CPU
from tests.support.paths import FIXTURES, ROOT
from tests.support.rduot import Images, batch, contrasts, make, step
from torch_utils.training_stats import Stats
from training.noise_levels import DiffusionSteps
from training.objectives.posterior_labels import PosteriorLabels
from training.objectives.rduot import CONJUGATES, ema_halflife, gradient_penalty
from training.trained_network import cosine_decay
from training.transport_cost import TransportCost, squared_distance

FIXTURE = np.load(FIXTURES / "rduot.npz")
CLOSE = dict(atol=1e-6, rtol=1e-6)
NAMES = dict(
    betas="betas",
    a="a_s",
    sigma="sigmas",
    abar="a_s_cum",
    posterior_variance="posterior_variance",
    coef_x0="posterior_mean_coef_x0",
    coef_xt="posterior_mean_coef_xt",
)


# The diffusion.


@pytest.mark.parametrize("timesteps", [2, 4])
def test_schedule_and_posterior_coefficients(timesteps):
    steps = DiffusionSteps(timesteps)
    for ours, theirs in NAMES.items():
        value = getattr(steps, ours)
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value, FIXTURE[f"T{timesteps}/{theirs}"], **CLOSE)
    zero, one = torch.zeros(timesteps + 1, 1), torch.ones(timesteps + 1, 1)
    noise_std = steps.diffuse(zero, torch.arange(timesteps + 1), one)[:, 0]
    np.testing.assert_allclose(noise_std, FIXTURE[f"T{timesteps}/sigmas_cum"], **CLOSE)
    assert vars(DiffusionSteps(**steps.settings())).keys() == vars(steps).keys()
    with pytest.raises(ValueError, match="num_timesteps=0"):
        DiffusionSteps(0)


@pytest.mark.parametrize("timesteps", [1, 2, 4])
def test_posterior_from_the_true_image_has_the_forward_marginals(timesteps):
    """Gaussian data: means, variances and the covariance of (x_t, x_{t+1}), forwards and through the posterior."""
    steps, n, mean, std = DiffusionSteps(timesteps), 100_000, 0.5, 0.3
    rng = torch.Generator().manual_seed(0)
    for k in range(timesteps):
        x_0 = mean + std * torch.randn(n, generator=rng)
        t, (e, e_step, e_posterior) = torch.full([n], k), torch.randn([3, n], generator=rng)
        x_t, x_next = steps.pair(x_0, t, e, e_step)
        abar, a = float(steps.abar[k]), float(steps.a[k + 1])
        var = abar**2 * std**2 + 1 - abar**2
        for x in (x_t, steps.posterior(x_0, x_next, t, e_posterior)):
            moments = [x.mean(), x.var(), ((x - x.mean()) * (x_next - x_next.mean())).mean()]
            np.testing.assert_allclose(moments, [abar * mean, var, a * var], atol=1e-2)
        if k == 0:
            torch.testing.assert_close(steps.posterior(x_0, x_next, t, e), x_0)


class GaussianPosterior(torch.nn.Module):
    """The perfect generator of pixels N(mean, std^2): a sample of p(x_0 | x_{t+1}), drawn with z."""

    mean, std, nz, num_timesteps, beta_min, beta_max, geometric = 0.5, 0.3, 4, 4, 0.1, 20.0, False

    def forward(self, x, t, z, class_labels):
        abar = DiffusionSteps(4).abar[t + 1][:, None, None, None]
        gain = abar * self.std**2 / (abar**2 * self.std**2 + 1 - abar**2)
        spread = (self.std**2 * (1 - gain * abar)).sqrt()
        return self.mean + gain * (x - abar * self.mean) + spread * z.reshape(x.shape)


def test_sampler_with_a_perfect_generator():
    net, n, drawn = GaussianPosterior(), 50_000, []
    rng = torch.Generator().manual_seed(0)

    def randn_like(x):
        drawn.append(tuple(x.shape))
        return torch.randn(x.shape, generator=rng, dtype=x.dtype)

    x = ddgan_sampler(net, torch.randn([n, 1, 2, 2], generator=rng), randn_like=randn_like)
    assert drawn == [(n, 4), (n, 1, 2, 2)] * 3 + [(n, 4)] and x.dtype == torch.float32
    np.testing.assert_allclose([x.mean(), x.std()], [net.mean, net.std], atol=3e-3)


# The objective.


def test_conjugates():
    x = torch.from_numpy(FIXTURE["phi/x"])
    assert set(CONJUGATES) == {"linear", "kl", "chi", "softplus"}
    for name, psi in CONJUGATES.items():
        np.testing.assert_allclose(psi(x), FIXTURE[f"phi/{name}"], **CLOSE)


def by_hand(objective, part):
    """(D(real), D(fake), cost) of one loss's draws, straight from the page."""
    _, labels, x_0, draws = batch(objective)
    d, steps = draws[part], objective.steps
    potential, net = objective.trained["potential"].net, objective.trained["net"].net
    k = d["t"][:, None, None, None]
    x_t = steps.abar[k] * x_0 + (1 - steps.abar[k] ** 2).sqrt() * d["noise"]
    x_next = steps.a[k + 1] * x_t + steps.sigma[k + 1] * d["step_noise"]
    fake_0 = net(x_next, d["t"], d["z"], labels)
    noise = steps.posterior_variance[k].sqrt() * d["posterior_noise"]
    fake = steps.coef_x0[k] * fake_0 + steps.coef_xt[k] * x_next + noise
    cost = ((fake_0 - x_next) ** 2).sum(dim=[1, 2, 3])
    return potential(x_t, d["t"], x_next, labels), potential(fake, d["t"], x_next, labels), cost


def losses(objective, penalize):
    images, labels, _, draws = batch(objective)
    stats = Stats(CPU)
    return (
        objective.potential_loss(penalize, images, labels, draws, stats),
        objective.loss(images, labels, draws, stats),
        stats.reduce(),
    )


def test_linear_without_cost_is_the_plain_difference():
    objective = make(phi1="linear", phi2="linear", tau=0.0)
    potential, generator, _ = losses(objective, penalize=False)
    real, fake, _ = by_hand(objective, "potential")
    torch.testing.assert_close(potential, fake - real)
    torch.testing.assert_close(generator, -by_hand(objective, "generator")[1])


def test_unbalanced_losses_and_their_log():
    objective = make(phi1="kl", phi2="chi", tau=0.02)
    potential, generator, log = losses(objective, penalize=True)
    real, fake, cost = by_hand(objective, "potential")
    y = (2 - real).clamp(min=0) - 2
    penalty = log["Potential/r1"]["mean"]
    torch.testing.assert_close(potential.mean(), (y**2 / 4 + y + (fake - 0.02 * cost).exp()).mean() + 0.25 * penalty)
    assert penalty > 1e-4
    assert log["Potential/tau_cost"]["mean"] == pytest.approx(0.02 * float(cost.detach().mean()), rel=1e-5)
    assert log["Potential/size"]["mean"] == pytest.approx(float(fake.detach().abs().mean()), rel=1e-5)
    _, fake, cost = by_hand(objective, "generator")
    torch.testing.assert_close(generator, 0.02 * cost - fake)


def test_baseline_is_the_logistic_gan():
    objective = make(method="ddgan", tau=0.0)
    potential, generator, _ = losses(objective, penalize=False)
    real, fake, _ = by_hand(objective, "potential")
    torch.testing.assert_close(potential, -logsigmoid(real) - logsigmoid(-fake))
    torch.testing.assert_close(generator, -logsigmoid(by_hand(objective, "generator")[1]))


def test_penalty_and_its_gradient():
    """Against finite differences: the penalty through the gradient of D, and what it teaches the weights."""
    rng = torch.Generator().manual_seed(0)
    w, v = (torch.randn(shape, generator=rng, dtype=torch.float64, requires_grad=True) for shape in ([6, 5], [5]))
    x = torch.randn([3, 6], generator=rng, dtype=torch.float64, requires_grad=True)

    def penalty(w, v):
        return gradient_penalty(softplus(x @ w) @ v, x)

    assert torch.autograd.gradcheck(penalty, (w, v), eps=1e-6, atol=1e-7)
    slopes = torch.stack(
        [
            (softplus((x + h) @ w) @ v - softplus((x - h) @ w) @ v) / 2e-6
            for h in 1e-6 * torch.eye(6, dtype=torch.float64)
        ]
    )
    torch.testing.assert_close(penalty(w, v), slopes.square().sum(dim=0))

    objective = make()
    _, labels, x_0, draws = batch(objective)
    d = draws["potential"]
    x_t, x_next = objective.steps.pair(x_0, d["t"], d["noise"], d["step_noise"])

    def potential(x):
        return objective.trained["potential"].net(x, d["t"], x_next, labels)

    x_t.requires_grad_()
    (g,) = torch.autograd.grad(potential(x_t).sum(), x_t)
    slope = float((potential(x_t + 1e-3 * g) - potential(x_t - 1e-3 * g)).detach().sum()) / 2e-3
    penalties = gradient_penalty(potential(x_t), x_t).detach()
    assert float(penalties.sum()) == pytest.approx(slope, rel=1e-2)


def test_lazy_penalty_follows_the_images_seen():
    def penalized(objective):
        return [nimg // 8 for nimg in range(0, 80, 8) if objective.phases(nimg)[0][1].args[0]]

    assert penalized(make(lazy_reg=3)) == [0, 3, 6, 9]
    assert penalized(make(lazy_reg=1)) == list(range(10))
    assert penalized(make(r1_gamma=0.0)) == []


def test_schedules_of_training():
    factor = cosine_decay(1000, 0.1)
    assert [factor(n) for n in (0, 500, 1000, 9999)] == pytest.approx([1, 0.55, 0.1, 0.1])
    assert cosine_decay(1000, 3.0)(700) == 1  # never upwards
    assert 0.5 ** (256 / ema_halflife(0.9999, 256)) == pytest.approx(0.9999, abs=1e-8) and ema_halflife(0.0, 256) == 0
    objective = make(schedule_nimg=400)
    potential = objective.trained["potential"]
    assert potential.lr == 2e-3 and potential.lr_factor(400) * potential.lr == pytest.approx(1e-5)
    assert objective.trained["net"].optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    assert make().trained["net"].lr_factor(1000) * 1e-3 == pytest.approx(1e-5)  # by default over all 1000 images


# A step.


def assert_same_gradients(a, b):
    assert a.keys() == b.keys() and {k.split(".")[0] for k in a} == {"net", "potential"}
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-5, atol=1e-6)
    assert sum(g.abs().max() > 1e-3 for g in a.values()) > len(a) / 2


def test_each_network_learns_from_its_own_loss():
    objective = make()
    images, labels, _, draws = batch(objective)
    objective.draw = lambda *_: draws
    got = step(objective)
    assert not objective.trained["potential"]._flat_grads.any()  # the generator's loss left it alone
    for loss, name in ((objective.loss, "net"), (lambda *a: objective.potential_loss(True, *a), "potential")):
        net = objective.trained[name].net
        want = torch.autograd.grad(loss(images, labels, draws, Stats(CPU)).mean(), list(net.parameters()))
        for (k, _), g in zip(net.named_parameters(), want, strict=True):
            torch.testing.assert_close(got[f"{name}.{k}"], g, rtol=1e-5, atol=1e-6)


def test_batch_gpu_changes_nothing():
    assert_same_gradients(step(make(batch_gpu=4)), step(make()))


def test_bfloat16_comes_near():
    a, b = step(make(precision="bf16")), step(make())
    a, b = (torch.cat([g.flatten() for g in grads.values()]) for grads in (a, b))
    assert torch.cosine_similarity(a, b, dim=0) > 0.99 and not torch.equal(a, b)


PROGRAM = """
import sys
import torch

import dnnlib
from tests.support.rduot import Images, batch, contrasts, make, step
from torch_utils import distributed

distributed.init("cpu")
objective = make()
rank = distributed.get_rank()
half = slice(4 * rank, 4 * rank + 4)
whole = batch(make())[3]
objective.draw = lambda images, generator: {k: {n: v[half] for n, v in d.items()} for k, d in whole.items()}
torch.save(step(objective, half), sys.argv[1] + str(rank))
torch.save(make(Images(n=65), cost="robust", tau=10.0).train_indices, sys.argv[1] + f"{rank}-items")
objective.close()
distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes_average_to_one(tmp_path):
    objective = make()
    draws = batch(objective)[3]
    objective.draw = lambda *_: draws
    want = step(objective)
    items = make(Images(n=65), cost="robust", tau=10.0).train_indices
    assert 0 < len(items) < 65
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        env = {
            **os.environ,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "rank")],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    for rank in range(2):
        assert_same_gradients(torch.load(tmp_path / f"rank{rank}"), want)
        assert torch.equal(torch.load(tmp_path / f"rank{rank}-items"), items)


# What it costs.


def test_costs():
    steps = DiffusionSteps(4)
    x, y, t = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 3])
    want = torch.stack([((a - b) ** 2).sum() for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(squared_distance(x, y, t), want)
    data = contrasts(0.3, 0.3)
    data.pixels[..., 0] = 255  # a constant column: its deviation is no measure
    cost = TransportCost("standardized", data, steps, CPU)
    x_0 = data.pixels.float() / 127.5 - 1
    std = x_0.std(dim=0, correction=0)
    x_0, mean = x_0 + 0.1, x_0.mean(dim=0)
    u = (x_0 - mean) / std.clamp(min=0.3 * float(std.mean()))
    x_next = torch.randn(64, 1, 8, 8)  # x_T is nearly that, whatever the data
    got = cost(x_0, x_next, torch.full([64], 3))
    want = squared_distance(u, x_next, t)
    assert torch.corrcoef(torch.stack([got, want]))[0, 1] > 0.9 and abs(float((got / want).mean()) - 1) < 0.1
    for kind in ("standardized", "robust", "features"):
        cost = TransportCost(kind, data, steps, CPU)
        x_0 = torch.randn(64, 1, 8, 8)  # nothing like the training set
        x_0.requires_grad_()
        (gradient,) = torch.autograd.grad(cost(x_0, x_next, torch.full([64], 2)).sum(), x_0)
        assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_the_costs_of_training_images_are_means_over_the_steps():
    """E ||x_0 - x_{t+1}||^2 over t, for constant images: d ((1 - abar)^2 x^2 + 1 - abar^2)."""
    data = Images(n=400)
    data.pixels = torch.where(torch.from_numpy(data.outliers)[:, None, None, None], 255, 128).expand(-1, 1, 8, 8).byte()
    steps = DiffusionSteps(4)
    cost = TransportCost("pixels", data, steps, CPU)
    assert cost.of_training(torch.arange(0)).shape == (0,)  # the share of a process that has none
    costs = cost.of_training()
    abar = steps.abar[1:].double()
    want = [64 * float(((1 - abar) ** 2 * x**2 + 1 - abar**2).mean()) for x in (0.5 / 127.5, 1.0)]
    np.testing.assert_allclose([costs[~data.outliers].mean(), costs[data.outliers].mean()], want, rtol=0.05)


@pytest.mark.parametrize("clean, outlier, more", [(0.2, 0.8, True), (0.8, 0.2, False)])
def test_the_log_says_which_images_cost_more(clean, outlier, more):
    objective = make(contrasts(clean, outlier))
    flags = torch.from_numpy(objective.dataset.outliers)
    a, b = (objective.losses.cost.of_training(mask.nonzero()[:, 0]).mean() for mask in (~flags, flags))
    assert (b > a) == more
    notes = objective.notes()
    line = next(line for line in notes if "mean:" in line)
    assert f"{a:.4g} for clean" in line and f"{b:.4g} for outliers" in line
    assert ("Warning: the outliers cost less" in notes[-1]) != more
    assert "of 64 training images" in notes[0] and "Expected to be left out" in "".join(notes)
    for known in (np.zeros(64, dtype=bool), None):
        objective.dataset.outliers = known
        assert not any("mean:" in line for line in objective.notes())
    baseline = make(contrasts(clean, outlier), method="ddgan", tau=0.0)
    assert baseline.notes()[0].startswith("Transport cost (pixels), mean")


def test_the_first_step_logs_the_costs():
    objective = make(contrasts(0.2, 0.8))
    objective.notes()
    images, stats = objective.dataset.pixels[:8], Stats(CPU)
    objective.step(images, objective.dataset.onehot(torch.arange(8)), 0, stats)
    log = stats.reduce()
    assert log["Cost/mean"]["mean"] == pytest.approx(float(objective.losses.cost.of_training().mean()))
    assert sum(v["mean"] for k, v in log.items() if k.startswith("Cost/bin")) == pytest.approx(1)
    objective.step(images, objective.dataset.onehot(torch.arange(8)), 8, stats)
    assert not any(name.startswith("Cost/") for name in stats.reduce())


def test_in_the_end_the_log_says_what_the_potential_prices_out(tmp_path):
    objective = make(contrasts(0.2, 0.8))
    drawn = []
    objective.draw_sheet = lambda images, path: drawn.append((images, path))
    objective.trained["potential"].net.forward = lambda x_t, t, x_next, labels: 20 * x_t.std(dim=(1, 2, 3)) - 8
    line, picture = objective.finish(str(tmp_path))
    assert "prices out 25.0% of 64" in line and "0.0% of the clean images, 100.0% of the outliers" in line
    images, path = drawn[0]
    assert images.shape == (64, 8, 8, 1) and path == str(tmp_path / "expensive.png") and path in picture
    order = images.astype(float).std(axis=(1, 2, 3))
    assert order[:16].min() > order[16:].max()


def test_the_potential_is_asked_about_the_labels_that_it_has_learned(tmp_path):
    data = contrasts(0.2, 0.8)
    objective, classes = make(data), (data.labels + 1) % 4
    objective.posterior_labels = PosteriorLabels(compress(np.eye(4)[classes], data.labels), "sample", CPU)
    known, seen = {tuple(x.flatten().tolist()): c for x, c in zip(data.pixels, classes, strict=True)}, []

    def potential(x_t, _t, _next, labels):
        images = (x_t * 127.5 + 127.5).round().int()
        seen.append([known[tuple(x.flatten().tolist())] for x in images] == labels.argmax(dim=1).tolist())
        return x_t.mean(dim=(1, 2, 3))

    objective.trained["potential"].net.forward = potential
    objective.draw_sheet = None
    (line,) = objective.finish(str(tmp_path))
    assert seen == [True] and line.endswith("outliers.")


def test_labels_by_the_posterior_are_the_same_in_both_losses():
    data = Images()
    p = np.full([8, 4], 0.25)
    objective = make(data)
    objective.posterior_labels = PosteriorLabels(compress(p, data.labels), "sample", CPU)
    images, labels, _, draws = batch(objective)
    draws["items"] = torch.arange(8)
    seen = []
    for trained in objective.trained.values():
        trained.net.register_forward_pre_hook(lambda _, args: seen.append(args[3]))
    objective.potential_loss(False, images, labels, draws, Stats(CPU))
    objective.loss(images, labels, draws, Stats(CPU))
    want = torch.nn.functional.one_hot(objective.posterior_labels.classes(draws["items"], draws["label"]), 4).float()
    assert len(seen) == 5 and all(torch.equal(given, want) for given in seen) and not torch.equal(want, labels)


def test_snapshot_says_how_it_was_trained():
    data = make().snapshot()
    assert data["loss_fn"]["class_name"] == "rduot" and data["loss_fn"]["tau"] == 0.01
    assert json.dumps(data["loss_fn"]) and data["ema"].network_kind == "generator"
