"""Samplers of Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022.

A sampler takes a denoiser `net(x, sigma, class_labels) -> D` and latents [N,C,H,W] ~ N(0, I), and returns images
[N,C,H,W] in about [-1,1]. The denoiser states its range as `sigma_min`, `sigma_max` and its grid by `round_sigma`;
guidance is a denoiser too. The arithmetic is float64 (float32 on MPS, which has no more), whatever the network's is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import dnnlib
from sampling.guidance import at_step
from training.networks import vp_sigma, vp_sigma_inv

__all__ = ["DISCRETIZATIONS", "SCALINGS", "SCHEDULES", "SOLVERS", "ablation_sampler", "heun_sampler"]

SOLVERS = ("euler", "heun")
DISCRETIZATIONS = ("vp", "ve", "iddpm", "edm")
SCHEDULES = ("vp", "ve", "linear")
SCALINGS = ("vp", "none")

VP_BETA_D, VP_BETA_MIN, VP_EPSILON_S = 19.9, 0.1, 1e-3
IDDPM_C_1, IDDPM_C_2, IDDPM_M = 0.001, 0.008, 1000

Denoiser = Callable[..., torch.Tensor]
Function = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def heun_sampler(
    net: Denoiser,
    latents: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    randn_like: Function = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = math.inf,
    S_noise: float = 1,
) -> torch.Tensor:
    """Second-order stochastic sampler (Karras et al. 2022, Algorithm 2): 2 num_steps - 1 evaluations of `net`.

    `class_labels` [N,label_dim] go to `net` as they are; `randn_like` supplies the churn noise, once a step.
    Returns float64 [N,C,H,W]. UserError when the sigma range and the network's do not overlap.
    """
    low, high = _clip_range(net, sigma_min, sigma_max)
    # All but x is computed on the host: nothing waits for the device, however far behind it is.
    steps = net.round_sigma(_edm_steps(num_steps, low, high, rho)).double()
    gamma = _churn(steps, num_steps, S_churn, S_min, S_max)
    t_hat = torch.where(gamma > 0, net.round_sigma(steps + gamma * steps).double(), steps)
    noise_std = ((t_hat.square() - steps.square()).clamp(min=0).sqrt() * S_noise).tolist()
    t_next = torch.cat([steps[1:], steps.new_zeros(1)])
    sigma_hat, sigma_next = _on_device(torch.stack([t_hat, t_next]), latents)
    t_hat, t_next = t_hat.tolist(), t_next.tolist()

    dtype = _dtype(latents)
    x = latents.to(dtype) * float(steps[0])
    for i in range(num_steps):
        # Drawn also when the churn is zero, so that a seed's stream means the same for all settings.
        x_hat = x + noise_std[i] * randn_like(x)
        h = t_next[i] - t_hat[i]
        d = (x_hat - at_step(net, 1, t_hat[i])(x_hat, sigma_hat[i], class_labels).to(dtype)) / t_hat[i]
        x = x_hat + h * d
        if i < num_steps - 1:
            d_next = (x - at_step(net, 2, t_next[i])(x, sigma_next[i], class_labels).to(dtype)) / t_next[i]
            x = x_hat + h * (d + d_next) / 2
    return x


@torch.no_grad()
def ablation_sampler(
    net: Denoiser,
    latents: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    randn_like: Function = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7,
    solver: str = "heun",
    discretization: str = "edm",
    schedule: str = "linear",
    scaling: str = "none",
    alpha: float = 1,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = math.inf,
    S_noise: float = 1,
) -> torch.Tensor:
    """The general sampler of which VP, VE, iDDPM and EDM sampling are settings (Karras et al. 2022, Table 1, Eq. 4).

    Solves x' = (s'/s + sigma'/sigma) x - sigma' s/sigma D(x/s; sigma) in t. `discretization` chooses the steps,
    `schedule` sigma(t), `scaling` s(t); `alpha` places the second evaluation of the Heun-like solver (1 = Heun, 1/2 =
    midpoint). A range of None is that of `discretization`. Other arguments, result and errors as `heun_sampler`.
    """
    for name, value, known in [
        ("solver", solver, SOLVERS),
        ("discretization", discretization, DISCRETIZATIONS),
        ("schedule", schedule, SCHEDULES),
        ("scaling", scaling, SCALINGS),
    ]:
        if value not in known:
            raise ValueError(f"{name} is {value!r}; known: {', '.join(known)}")
    default_min, default_max = _default_range(discretization)
    low, high = _clip_range(
        net, default_min if sigma_min is None else sigma_min, default_max if sigma_max is None else sigma_max
    )
    curve = _schedule(schedule, low, high)
    scale = _vp_scaling(curve) if scaling == "vp" else _no_scaling()
    steps = net.round_sigma(_sigma_steps(discretization, num_steps, low, high, rho)).double()

    t = curve.inverse(steps)
    sigma = curve.sigma(t)
    gamma = _churn(sigma, num_steps, S_churn, S_min, S_max)
    # Without churn t_hat is t itself: a round trip through sigma would be off by a rounding, and inject noise.
    t_hat = torch.where(gamma > 0, curve.inverse(net.round_sigma((1 + gamma) * sigma).double()), t)
    noise_std = (curve.sigma(t_hat).square() - sigma.square()).clamp(min=0).sqrt() * scale.s(t_hat) * S_noise
    h = torch.cat([t[1:], t.new_zeros(1)]) - t_hat

    # What x' needs at the first and the second evaluation of every step, as numbers of the host and sigma as a tensor.
    times = torch.stack([t_hat, t_hat + alpha * h])
    sigmas, s = curve.sigma(times), scale.s(times)
    growth = curve.derivative(times) / sigmas
    levels, factors = _on_device(sigmas, latents), (scale.derivative(times) / s + growth).tolist()
    sigmas, scales, shares = sigmas.tolist(), s.tolist(), (growth * s).tolist()
    rescale, noise_std, h = (scale.s(t_hat) / scale.s(t)).tolist(), noise_std.tolist(), h.tolist()

    dtype = _dtype(latents)

    def slope(order: int, x: torch.Tensor, i: int) -> torch.Tensor:
        k = order - 1
        denoised = at_step(net, order, sigmas[k][i])(x / scales[k][i], levels[k][i], class_labels).to(dtype)
        return factors[k][i] * x - shares[k][i] * denoised

    x = latents.to(dtype) * float(sigma[0] * scale.s(t[0]))
    for i in range(num_steps):
        x_hat = rescale[i] * x + noise_std[i] * randn_like(x)
        d = slope(1, x_hat, i)
        if solver == "euler" or i == num_steps - 1:
            x = x_hat + h[i] * d
        else:
            d_next = slope(2, x_hat + alpha * h[i] * d, i)
            x = x_hat + h[i] * ((1 - 1 / (2 * alpha)) * d + d_next / (2 * alpha))
    return x


# ----------------------------------------------------------------------------------------------------------------------
# What both samplers share.


def _dtype(latents: torch.Tensor) -> torch.dtype:
    return torch.float32 if latents.device.type == "mps" else torch.float64


def _on_device(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    values = values.to(_dtype(latents))
    # From memory that may move, the copy would wait for what the device still has to do.
    return (values.pin_memory() if latents.is_cuda else values).to(latents.device, non_blocking=True)


def _clip_range(net: Denoiser, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    low, high = max(sigma_min, float(net.sigma_min)), min(sigma_max, float(net.sigma_max))
    if not 0 < low < high:
        raise dnnlib.UserError(
            f"sigma_min={sigma_min:g}, sigma_max={sigma_max:g}: nothing of this range is within "
            f"the network's, {float(net.sigma_min):g} to {float(net.sigma_max):g}"
        )
    return low, high


def _churn(sigma: torch.Tensor, num_steps: int, S_churn: float, S_min: float, S_max: float) -> torch.Tensor:
    """gamma of Algorithm 2 for every step: how much noise to add, relative to what is there."""
    gate = (sigma >= S_min) & (sigma <= S_max)
    return gate.to(sigma.dtype) * min(S_churn / num_steps, math.sqrt(2) - 1)


def _ramp(num_steps: int) -> torch.Tensor:
    return torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)


def _edm_steps(num_steps: int, low: float, high: float, rho: float) -> torch.Tensor:
    """Noise levels that fall as sigma^(1/rho) does on a straight line (Eq. 5), float64 [num_steps]."""
    a, b = high ** (1 / rho), low ** (1 / rho)
    return (a + _ramp(num_steps) * (b - a)) ** rho


# ----------------------------------------------------------------------------------------------------------------------
# The rows of Table 1: sampling steps, sigma(t), s(t).


def _default_range(discretization: str) -> tuple[float, float]:
    if discretization == "vp":
        t = torch.tensor([VP_EPSILON_S, 1], dtype=torch.float64)
        return tuple(vp_sigma(t, VP_BETA_D, VP_BETA_MIN).tolist())
    return {"ve": (0.02, 100), "iddpm": (0.002, 81), "edm": (0.002, 80)}[discretization]


def _vp_betas(low: float, high: float) -> tuple[float, float]:
    """beta_d, beta_min with sigma(epsilon_s) = low, sigma(1) = high: ln(1 + sigma^2) = beta_d t^2/2 + beta_min t."""
    per_t_low, per_t_high = math.log1p(low**2) / VP_EPSILON_S, math.log1p(high**2)
    beta_d = 2 * (per_t_high - per_t_low) / (1 - VP_EPSILON_S)
    return beta_d, per_t_high - beta_d / 2


def _iddpm_levels() -> torch.Tensor:
    """u_0 .. u_{M-1}, falling, float64: u_{j-1}^2 + 1 = (u_j^2 + 1) / max(abar(j-1)/abar(j), C_1), u_M = 0."""
    # float32, as the model was trained with; ten digits of agreement need these very roundings.
    j = torch.arange(IDDPM_M + 1)
    abar = (0.5 * math.pi * j / IDDPM_M / (IDDPM_C_2 + 1)).sin() ** 2
    ratio = (abar[:-1] / abar[1:]).clamp(min=IDDPM_C_1).double()
    return (ratio.flip(0).cumprod(0).flip(0).reciprocal() - 1).sqrt()


def _sigma_steps(discretization: str, num_steps: int, low: float, high: float, rho: float) -> torch.Tensor:
    """Noise levels from `high` down to `low`, float64 [num_steps]."""
    if discretization == "edm":
        return _edm_steps(num_steps, low, high, rho)
    if discretization == "ve":
        return high * (low / high) ** _ramp(num_steps)
    if discretization == "vp":
        return vp_sigma(1 + _ramp(num_steps) * (VP_EPSILON_S - 1), *_vp_betas(low, high))
    levels = _iddpm_levels()
    levels = levels[(levels >= low) & (levels <= high)]
    if not len(levels):
        raise dnnlib.UserError(f"sigma_min, sigma_max: iddpm has no noise level between {low:g} and {high:g}")
    return levels[((len(levels) - 1) * _ramp(num_steps)).round().long()]


@dataclass(frozen=True)
class _Schedule:
    sigma: Function
    derivative: Function
    inverse: Function


@dataclass(frozen=True)
class _Scaling:
    s: Function
    derivative: Function


def _schedule(name: str, low: float, high: float) -> _Schedule:
    if name == "vp":
        beta_d, beta_min = _vp_betas(low, high)

        def derivative(t: torch.Tensor) -> torch.Tensor:
            sigma = vp_sigma(t, beta_d, beta_min)
            return (beta_d * t + beta_min) * (sigma + 1 / sigma) / 2

        return _Schedule(
            lambda t: vp_sigma(t, beta_d, beta_min), derivative, lambda sigma: vp_sigma_inv(sigma, beta_d, beta_min)
        )
    if name == "ve":
        return _Schedule(torch.sqrt, lambda t: 0.5 / t.sqrt(), torch.square)
    return _Schedule(lambda t: t, torch.ones_like, lambda sigma: sigma)


def _vp_scaling(curve: _Schedule) -> _Scaling:
    """s = 1/sqrt(1 + sigma^2), which keeps the variance of x at 1 for data of variance 1; s' = -sigma sigma' s^3."""

    def s(t: torch.Tensor) -> torch.Tensor:
        return (1 + curve.sigma(t).square()).rsqrt()

    return _Scaling(s, lambda t: -curve.sigma(t) * curve.derivative(t) * s(t) ** 3)


def _no_scaling() -> _Scaling:
    return _Scaling(torch.ones_like, torch.zeros_like)
