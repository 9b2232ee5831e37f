"""The few-step sampler of denoising diffusion GANs (Xiao et al., ICLR 2022, Algorithm 2)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from training.noise_levels import DiffusionSteps

__all__ = ["ddgan_sampler", "is_generator"]


@torch.no_grad()
def ddgan_sampler(
    net: torch.nn.Module,
    latents: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    randn_like: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like,
    observe: Callable[[torch.Tensor, float, float], None] | None = None,
) -> torch.Tensor:
    """Return images float32 [N,C,H,W] in [-1,1] from latents [N,C,H,W] ~ N(0,I), by T calls of the generator `net`.

    For t = T-1..0: z ~ N(0,I), x_0 = G(x_{t+1}, t, z), then a sample of q(x_t | x_0, x_{t+1}). `randn_like` supplies
    z and then, except for t = 0, the noise of that sample; `observe` sees all states x = s (image + sigma noise).
    """
    steps = _steps(net.num_timesteps, net.beta_min, net.beta_max, latents.device, net.geometric)
    x = latents.to(torch.float32)
    abar = [] if observe is None else steps.abar.tolist()
    for i in reversed(range(net.num_timesteps)):
        if observe is not None:
            observe(x, (1 - abar[i + 1] ** 2) ** 0.5 / abar[i + 1], abar[i + 1])
        t = torch.full([len(x)], i, device=x.device)
        z = randn_like(x.new_empty([len(x), net.nz]))
        x_0 = net(x, t, z, class_labels)
        x = steps.posterior(x_0, x, t, randn_like(x) if i else torch.zeros_like(x))
    if observe is not None:
        observe(x, 0.0, 1.0)
    return x


_steps = functools.lru_cache(maxsize=1)(DiffusionSteps)  # Made anew, its copies to a GPU would wait for the last batch.


def is_generator(net) -> bool:
    """Return whether `net` is a generator for `ddgan_sampler`, and not a denoiser."""
    return getattr(net, "network_kind", None) == "generator"
