"""Test noise levels: moments in closed form, weights, determinism."""

import math

import pytest
import torch

from training.networks import vp_sigma_inv
from training.noise_levels import NoiseLevels

N = 100_000
CPU = torch.device("cpu")


def draw(levels, seed=0, n=N):
    return levels.sample(n, torch.Generator().manual_seed(seed), CPU)


def close(values, mean, std):
    """Assert that sample mean and standard deviation lie within five standard errors."""
    values = values.double()
    assert values.mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(N))
    assert values.std().item() == pytest.approx(std, rel=5 / math.sqrt(N))


def test_edm_is_log_normal():
    close(draw(NoiseLevels("edm")).log(), -1.2, 1.2)
    close(draw(NoiseLevels("edm", P_mean=0.4, P_std=0.3)).log(), 0.4, 0.3)


def test_ve_is_log_uniform():
    sigma = draw(NoiseLevels("ve"))
    assert 0.02 * 0.9999 <= sigma.min() < 0.0201 and 99 < sigma.max() <= 100 * 1.0001
    low, high = math.log(0.02), math.log(100)
    close(sigma.log(), (low + high) / 2, (high - low) / math.sqrt(12))


def test_vp_is_uniform_in_time():
    sigma = draw(NoiseLevels("vp"))
    t = vp_sigma_inv(sigma.double())
    assert 1e-5 * 0.99 <= t.min() < 1e-4 and 0.9999 < t.max() <= 1.00001
    close(t, (1 + 1e-5) / 2, (1 - 1e-5) / math.sqrt(12))
    t = vp_sigma_inv(draw(NoiseLevels("vp", beta_d=5, beta_min=1, epsilon_t=0.5)).double(), 5, 1)
    close(t, 0.75, 0.5 / math.sqrt(12))


@pytest.mark.parametrize("precond", ["vp", "ve", "edm"])
def test_draws_depend_only_on_the_generator(precond):
    levels = NoiseLevels(precond)
    a = draw(levels, seed=3, n=9)
    torch.manual_seed(8)
    b = draw(NoiseLevels(**levels.settings()), seed=3, n=9)
    assert torch.equal(a, b) and a.shape == (9,) and a.dtype == torch.float32
    assert not torch.equal(a, draw(levels, seed=4, n=9))


def test_weights():
    sigma = torch.tensor([[0.02], [0.5], [10.0]])
    for precond in ("vp", "ve"):
        torch.testing.assert_close(NoiseLevels(precond).weight(sigma), sigma**-2)
    torch.testing.assert_close(NoiseLevels("edm").weight(sigma), 1 / sigma**2 + 4)
    torch.testing.assert_close(NoiseLevels("edm", sigma_data=1).weight(sigma), 1 / sigma**2 + 1)


def test_settings_are_plain_and_checked():
    assert NoiseLevels("edm", P_mean=0.0).settings() == dict(precond="edm", P_mean=0.0, P_std=1.2, sigma_data=0.5)
    assert NoiseLevels("vp").settings() == dict(precond="vp", beta_d=19.9, beta_min=0.1, epsilon_t=1e-5)
    with pytest.raises(ValueError, match="precond='ddpm': must be one of vp, ve, edm"):
        NoiseLevels("ddpm")
    with pytest.raises(ValueError, match="P_mean: no setting of ve"):
        NoiseLevels("ve", P_mean=1)
