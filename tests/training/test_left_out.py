"""What is expected to be left out: the optimum in closed form, and groups of costs with and without a valley."""

import numpy as np
import pytest
import torch

from training.left_out import Selection, describe_costs, expensive_group, is_clean
from training.objectives.rduot import CONJUGATES, slope


def test_slopes_are_derivatives():
    x = np.array([-4.0, -1.0, 0.0, 0.7])
    want = dict(linear=np.ones(4), kl=np.exp(x), chi=np.maximum(x + 2, 0) / 2, softplus=1 / (1 + np.exp(-x)))
    for name, values in want.items():
        np.testing.assert_allclose(slope(CONJUGATES[name])(torch.from_numpy(x)), values, rtol=1e-12)


def expected_weights(cost, tau, slope1, slope2):
    return Selection(cost, tau, slope1, slope2)(torch.from_numpy(cost)).numpy()


def optimum(cost, tau, phi1, phi2):
    """Weights of a set of points by minimizing E Psi2*(-k - tau c) + Psi1*(k) over k."""
    p = torch.full([len(cost)], 1 / len(cost), dtype=torch.float64)
    k = torch.zeros([], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([k], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)
    c = torch.from_numpy(cost)

    def loss():
        optimizer.zero_grad()
        value = (p * CONJUGATES[phi2](-k - tau * c)).sum() + CONJUGATES[phi1](k)
        value.backward()
        return value

    optimizer.step(loss)
    k = k.detach()
    (w,) = torch.autograd.grad(CONJUGATES[phi2](u := (-k - tau * c).requires_grad_()).sum(), u)
    return (w / w.mean()).numpy()


@pytest.mark.parametrize("phi1, phi2", [("softplus", "softplus"), ("kl", "kl"), ("softplus", "kl"), ("chi", "chi")])
def test_the_weights_are_those_of_the_least_dual_loss(phi1, phi2):
    """That is the potential's loss where D = k + tau c."""
    cost = np.array([0.0, 0.0, 0.1, 0.5, 1.0, 3.0])
    got = expected_weights(cost, 0.7, slope(CONJUGATES[phi1]), slope(CONJUGATES[phi2]))
    np.testing.assert_allclose(got, optimum(cost, 0.7, phi1, phi2), rtol=1e-4)
    assert got.mean() == pytest.approx(1) and (np.diff(got) <= 0).all() and got[-1] < 0.6


def test_without_cost_or_with_linear_conjugates_nothing_is_left_out():
    softplus, linear = slope(CONJUGATES["softplus"]), slope(CONJUGATES["linear"])
    np.testing.assert_allclose(expected_weights(np.zeros(5), 1, softplus, softplus), 1)
    np.testing.assert_allclose(expected_weights(np.array([0.0, 9.0]), 1, linear, linear), 1)
    w = expected_weights(np.repeat([0.0, 50.0], [95, 5]), 1, softplus, softplus)
    assert (w[95:] < 1e-9).all() and "5.0% of the images" in describe_costs(w, w, w)[0][-1]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_two_groups_are_found_with_their_share(share):
    rng = np.random.default_rng(0)
    far = np.arange(4000) < 4000 * share
    group = expensive_group(rng.normal(size=4000) + 6 * far)
    assert group.share == pytest.approx(share, rel=0.05) and 2 < group.above < 5
    lines, numbers = describe_costs(far + 0.0, 1.0 - far, rng.normal(size=4000) + 6 * far)
    assert any("two groups" in line for line in lines) and any(f"left out at this tau: {share:.1%}" in x for x in lines)
    assert numbers["left_out"] == pytest.approx(share) and numbers["mean"] == pytest.approx(share)
    assert sum(value for name, value in numbers.items() if name.startswith("bin")) == pytest.approx(1)


@pytest.mark.parametrize("draw", ["normal", "uniform", "standard_exponential", "standard_t"])
def test_one_group_is_one_group(draw):
    rng = np.random.default_rng(0)
    for _ in range(5):
        values = rng.standard_t(5, 4000) if draw == "standard_t" else getattr(rng, draw)(size=4000)
        assert expensive_group(values) is None
    for value in (0.0, np.log(0.05)):  # all alike; the standard deviation of the second ones is no exact 0
        assert expensive_group(np.full(60, value)) is None
    assert "They form one group" in describe_costs(values, np.ones(4000), values)[0][-2]


@pytest.mark.parametrize(
    "share, place, clean",
    [
        (0.0, 0.0, True),
        (0.005, 0.9, True),  # a few that are not apart
        (0.03, 0.9, False),
        (0.008, 4.0, False),  # a few that are
        (0.002, 4.0, True),  # too few to be a group
    ],
)
def test_a_set_is_clean_if_little_is_expensive_and_nothing_is_apart(share, place, clean):
    """Values as those of real clean sets, of which some 1% lie above 0, with foreign images at `place`."""
    values = np.random.default_rng(0).normal(-1.2, 0.5, size=4000)
    values[: round(share * 4000)] += place + 1.2
    costs = values.clip(min=0)
    weights = Selection(costs, 10.0, *2 * [slope(CONJUGATES["softplus"])])(torch.from_numpy(costs)).numpy()
    assert is_clean(weights, values) == clean
