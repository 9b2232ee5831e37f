"""Samplers of Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022.

A sampler takes a denoiser `net(x, sigma, class_labels) -> D` and latents [N,C,H,W] ~ N(0, I), and returns images
[N,C,H,W] in about [-1,1]. The denoiser states its range of noise levels as `sigma_min` and `sigma_max`, and rounds to
the levels it knows with `round_sigma`; a guided denoiser does the same. The arithmetic is float64 (float32 on MPS),
whatever the network computes in.

All numbers of the steps are computed on the CPU before the loop, so no step waits for a GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from sampling.ddgan import ddgan_sampler, is_generator
from sampling.evaluations import evaluations, on_host, precise
from sampling.guidance import Denoiser
from sampling.schedules import (
    DISCRETIZATIONS,
    SCALINGS,
    SCHEDULES,
    Function,
    churn,
    default_range,
    edm_steps,
    no_scaling,
    overlap,
    sigma_of_t,
    sigma_steps,
    vp_scaling,
)

__all__ = ["SOLVERS", "ablation_sampler", "choose_sampler", "heun_sampler"]

SOLVERS = ("euler", "heun")
Observe = Callable[[torch.Tensor, float, float], None]  # sees a state x [N,C,H,W], its sigma and its scale s


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
    observe: Observe | None = None,
) -> torch.Tensor:
    """Return samples of the second-order stochastic sampler (Algorithm 2), float64 [N,C,H,W].

    It evaluates `net` 2 num_steps - 1 times. `class_labels` [N,label_dim] go to `net` as they are; `randn_like`
    supplies the noise that each step adds; `observe` sees all states x = s (image + sigma noise). UserError: the sigma
    range and the network's do not overlap.
    """
    low, high = overlap(net, sigma_min, sigma_max)
    t = net.round_sigma(edm_steps(num_steps, low, high, rho)).double()
    gamma = churn(t, num_steps, S_churn, S_min, S_max)
    t_hat = torch.where(gamma > 0, net.round_sigma(t + gamma * t).double(), t)
    noise_std = (t_hat.square() - t.square()).clamp(min=0).sqrt() * S_noise
    t_next = torch.cat([t[1:], t.new_zeros(1)])

    x = precise(latents)
    denoise_hat = evaluations(net, 1, t_hat, x, class_labels)
    denoise_next = evaluations(net, 2, t_next, x, class_labels)
    t, t_hat, t_next, noise_std = on_host(t, t_hat, t_next, noise_std)

    x = x * t[0]
    for i in range(num_steps):
        if observe is not None:
            observe(x, t[i], 1.0)
        # The noise is drawn even when gamma is 0, so a seed's random numbers mean the same for all settings.
        x_hat = x + noise_std[i] * randn_like(x)
        d = (x_hat - denoise_hat[i](x_hat)) / t_hat[i]
        x = x_hat + (t_next[i] - t_hat[i]) * d
        if i < num_steps - 1:  # second-order correction
            d_next = (x - denoise_next[i](x)) / t_next[i]
            x = x_hat + (t_next[i] - t_hat[i]) * (d + d_next) / 2
    if observe is not None:
        observe(x, 0.0, 1.0)
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
    observe: Observe | None = None,
) -> torch.Tensor:
    """Return samples of the general sampler, of which VP, VE, iDDPM and EDM sampling are settings (Table 1, Eq. 4).

    It solves dx/dt = (s'/s + sigma'/sigma) x - (sigma' s/sigma) D(x/s; sigma). `discretization` chooses the steps,
    `schedule` sigma(t), `scaling` s(t). `alpha` places the second evaluation of the Heun-like solver: 1 is Heun's
    method, 1/2 the midpoint method. A range of None is that of `discretization`. Other arguments, result and errors
    are those of `heun_sampler`.
    """
    for name, value, known in [
        ("solver", solver, SOLVERS),
        ("discretization", discretization, DISCRETIZATIONS),
        ("schedule", schedule, SCHEDULES),
        ("scaling", scaling, SCALINGS),
    ]:
        if value not in known:
            raise ValueError(f"{name} is {value!r}; known: {', '.join(known)}")
    default_min, default_max = default_range(discretization)
    low, high = overlap(
        net, default_min if sigma_min is None else sigma_min, default_max if sigma_max is None else sigma_max
    )
    curve = sigma_of_t(schedule, low, high)
    scale = vp_scaling(curve) if scaling == "vp" else no_scaling()

    t = curve.inverse(net.round_sigma(sigma_steps(discretization, num_steps, low, high, rho)).double())
    sigma = curve.sigma(t)
    gamma = churn(sigma, num_steps, S_churn, S_min, S_max)
    # Without churn t_hat is t itself: a round trip through sigma would be off by a rounding, and inject noise.
    t_hat = torch.where(gamma > 0, curve.inverse(net.round_sigma((1 + gamma) * sigma).double()), t)
    noise_std = (curve.sigma(t_hat).square() - sigma.square()).clamp(min=0).sqrt() * scale.s(t_hat) * S_noise
    h = torch.cat([t[1:], t.new_zeros(1)]) - t_hat

    def slopes(order: int, t: torch.Tensor) -> list[Function]:
        """Return one function x -> dx/dt for each time of `t`."""
        denoise = evaluations(net, order, curve.sigma(t), x, class_labels)
        growth = curve.derivative(t) / curve.sigma(t)
        s, a, b = on_host(scale.s(t), scale.derivative(t) / scale.s(t) + growth, growth * scale.s(t))
        return [lambda x, i=i: a[i] * x - b[i] * denoise[i](x / s[i]) for i in range(num_steps)]

    x = precise(latents)
    slope_hat, slope_next = slopes(1, t_hat), slopes(2, t_hat + alpha * h)
    start, rescale, noise_std, h = on_host(sigma * scale.s(t), scale.s(t_hat) / scale.s(t), noise_std, h)
    sigma, s = on_host(sigma, scale.s(t))

    x = x * start[0]
    for i in range(num_steps):
        if observe is not None:
            observe(x, sigma[i], s[i])
        x_hat = rescale[i] * x + noise_std[i] * randn_like(x)
        d = slope_hat[i](x_hat)
        if solver == "euler" or i == num_steps - 1:
            x = x_hat + h[i] * d
        else:
            d_next = slope_next[i](x_hat + alpha * h[i] * d)
            x = x_hat + h[i] * ((1 - 1 / (2 * alpha)) * d + d_next / (2 * alpha))
    if observe is not None:
        observe(x, 0.0, 1.0)
    return x


def choose_sampler(net: Denoiser, **settings: Any) -> Function:
    """Return a sampler with its settings; those that are None keep the sampler's own default.

    A generator has one sampler without settings. A denoiser gets EDM's, or the general one as soon as a part of it
    (solver, discretization, schedule or scaling) is named.
    """
    if is_generator(net):
        return ddgan_sampler
    given = {name: value for name, value in settings.items() if value is not None}
    general = given.keys() & {"solver", "discretization", "schedule", "scaling"}
    return functools.partial(ablation_sampler if general else heun_sampler, **given)
