"""The rows of Table 1 that a sampler chooses from (Karras et al., NeurIPS 2022): sampling steps, sigma(t), s(t).

All functions of t and sigma take and return float64 tensors on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import dnnlib
from training.networks import vp_sigma, vp_sigma_inv

__all__ = [
    "DISCRETIZATIONS",
    "SCALINGS",
    "SCHEDULES",
    "Function",
    "churn",
    "default_range",
    "edm_steps",
    "no_scaling",
    "overlap",
    "sigma_steps",
    "sigma_of_t",
    "vp_scaling",
]

DISCRETIZATIONS = ("vp", "ve", "iddpm", "edm")
SCHEDULES = ("vp", "ve", "linear")
SCALINGS = ("vp", "none")

VP_BETA_D, VP_BETA_MIN, VP_EPSILON_S = 19.9, 0.1, 1e-3
IDDPM_C_1, IDDPM_C_2, IDDPM_M = 0.001, 0.008, 1000

Function = Callable[[torch.Tensor], torch.Tensor]


# ----------------------------------------------------------------------------------------------------------------------
# What every sampler needs: the range of noise levels, EDM's steps, the noise that a step adds.


def overlap(net, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """Return the part of [sigma_min, sigma_max] that the denoiser `net` knows. UserError: there is none."""
    if sigma_min >= sigma_max:
        raise dnnlib.UserError(f"sigma_min={sigma_min:g} is not below sigma_max={sigma_max:g}")
    low, high = max(sigma_min, float(net.sigma_min)), min(sigma_max, float(net.sigma_max))
    if not 0 < low < high:
        raise dnnlib.UserError(
            f"sigma_min={sigma_min:g}, sigma_max={sigma_max:g}: nothing of this range is within "
            f"the network's, {float(net.sigma_min):g} to {float(net.sigma_max):g}"
        )
    return low, high


def edm_steps(num_steps: int, low: float, high: float, rho: float) -> torch.Tensor:
    """Return noise levels from `high` down to `low` whose sigma^(1/rho) lie evenly (Eq. 5), float64 [num_steps]."""
    a, b = high ** (1 / rho), low ** (1 / rho)
    return (a + _ramp(num_steps) * (b - a)) ** rho


def churn(sigma: torch.Tensor, num_steps: int, S_churn: float, S_min: float, S_max: float) -> torch.Tensor:
    """Return gamma of Algorithm 2 for every noise level: how much noise to add, relative to the noise already there."""
    gate = (sigma >= S_min) & (sigma <= S_max)
    return gate.to(sigma.dtype) * min(S_churn / num_steps, math.sqrt(2) - 1)


def _ramp(num_steps: int) -> torch.Tensor:
    return torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling steps.


def default_range(discretization: str) -> tuple[float, float]:
    """Return the lowest and the highest noise level of a discretization."""
    if discretization == "vp":
        t = torch.tensor([VP_EPSILON_S, 1], dtype=torch.float64)
        return tuple(vp_sigma(t, VP_BETA_D, VP_BETA_MIN).tolist())
    return {"ve": (0.02, 100), "iddpm": (0.002, 81), "edm": (0.002, 80)}[discretization]


def sigma_steps(discretization: str, num_steps: int, low: float, high: float, rho: float) -> torch.Tensor:
    """Return the noise levels of a discretization from `high` down to `low`, float64 [num_steps]."""
    if discretization == "edm":
        return edm_steps(num_steps, low, high, rho)
    if discretization == "ve":
        return high * (low / high) ** _ramp(num_steps)
    if discretization == "vp":
        return vp_sigma(1 + _ramp(num_steps) * (VP_EPSILON_S - 1), *_vp_betas(low, high))
    levels = _iddpm_levels()
    levels = levels[(levels >= low) & (levels <= high)]
    if not len(levels):
        raise dnnlib.UserError(f"sigma_min, sigma_max: iddpm has no noise level between {low:g} and {high:g}")
    return levels[((len(levels) - 1) * _ramp(num_steps)).round().long()]


def _vp_betas(low: float, high: float) -> tuple[float, float]:
    """Return beta_d, beta_min with sigma(epsilon_s) = low and sigma(1) = high.

    They solve ln(1 + sigma^2) = beta_d t^2/2 + beta_min t at these two points.
    """
    per_t_low, per_t_high = math.log1p(low**2) / VP_EPSILON_S, math.log1p(high**2)
    beta_d = 2 * (per_t_high - per_t_low) / (1 - VP_EPSILON_S)
    return beta_d, per_t_high - beta_d / 2


def _iddpm_levels() -> torch.Tensor:
    """Return u_0 .. u_{M-1}, falling, float64: u_{j-1}^2 + 1 = (u_j^2 + 1) / max(abar(j-1)/abar(j), C_1), u_M = 0."""
    # The model was trained with float32 levels; only the same roundings agree with them to ten digits.
    j = torch.arange(IDDPM_M + 1)
    abar = (0.5 * math.pi * j / IDDPM_M / (IDDPM_C_2 + 1)).sin() ** 2
    ratio = (abar[:-1] / abar[1:]).clamp(min=IDDPM_C_1).double()
    return (ratio.flip(0).cumprod(0).flip(0).reciprocal() - 1).sqrt()


# ----------------------------------------------------------------------------------------------------------------------
# Schedules sigma(t) and scalings s(t).


@dataclass(frozen=True)
class Schedule:
    """sigma(t), its derivative by t, and its inverse t(sigma)."""

    sigma: Function
    derivative: Function
    inverse: Function


@dataclass(frozen=True)
class Scaling:
    """s(t) and its derivative by t."""

    s: Function
    derivative: Function


def sigma_of_t(name: str, low: float, high: float) -> Schedule:
    """Return the schedule `name`; 'vp' depends on the range of noise levels."""
    if name == "vp":
        beta_d, beta_min = _vp_betas(low, high)

        def derivative(t: torch.Tensor) -> torch.Tensor:
            sigma = vp_sigma(t, beta_d, beta_min)
            return (beta_d * t + beta_min) * (sigma + 1 / sigma) / 2

        return Schedule(
            lambda t: vp_sigma(t, beta_d, beta_min), derivative, lambda sigma: vp_sigma_inv(sigma, beta_d, beta_min)
        )
    if name == "ve":
        return Schedule(torch.sqrt, lambda t: 0.5 / t.sqrt(), torch.square)
    return Schedule(lambda t: t, torch.ones_like, lambda sigma: sigma)


def vp_scaling(curve: Schedule) -> Scaling:
    """Return s = 1/sqrt(1 + sigma^2), s' = -sigma sigma' s^3: data of variance 1 keep the variance of x at 1."""

    def s(t: torch.Tensor) -> torch.Tensor:
        return (1 + curve.sigma(t).square()).rsqrt()

    return Scaling(s, lambda t: -curve.sigma(t) * curve.derivative(t) * s(t) ** 3)


def no_scaling() -> Scaling:
    """Return s = 1."""
    return Scaling(torch.ones_like, torch.zeros_like)
