"""The few-step sampler of denoising diffusion GANs (Xiao et al., ICLR 2022, Algorithm 2)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import click
import torch

from dnnlib.cli import given_options
from training.noise_levels import DiffusionSteps

__all__ = ["check_options", "ddgan_sampler", "is_generator"]

# What generate.py can be asked when the network is a generator; all else shapes the path of a denoiser.
OPTIONS = {
    "network",
    "outdir",
    "seeds",
    "subdirs",
    "classes",
    "batch",
    "grid",
    "save_each_sample",
    "device",
    "trust_pickle",
    "precision",
    "compile",
}


@torch.no_grad()
def ddgan_sampler(
    net: torch.nn.Module,
    latents: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    randn_like: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like,
) -> torch.Tensor:
    """Images float32 [N,C,H,W] in [-1,1] from latents [N,C,H,W] ~ N(0,I), by T calls of the generator `net`.

    For t = T-1..0: z ~ N(0,I), x_0 = G(x_{t+1}, t, z), then a sample of q(x_t | x_0, x_{t+1}). `randn_like` supplies
    z and, but for t = 0, the noise of that sample, in this order.
    """
    steps = _steps(net.num_timesteps, net.beta_min, net.beta_max, latents.device)
    x = latents.to(torch.float32)
    for i in reversed(range(net.num_timesteps)):
        t = torch.full([len(x)], i, device=x.device)
        z = randn_like(x.new_empty([len(x), net.nz]))
        x_0 = net(x, t, z, class_labels)
        x = steps.posterior(x_0, x, t, randn_like(x) if i else torch.zeros_like(x))
    return x


_steps = functools.lru_cache(maxsize=1)(DiffusionSteps)  # Its copies to a GPU would wait for the batch before.


def is_generator(net) -> bool:
    """Whether `net` is sampled by `ddgan_sampler`, and not as a denoiser."""
    return getattr(net, "network_kind", None) == "generator"


def check_options(name: str) -> None:
    """Raise UsageError when generate.py was given an option that means nothing for the generator `name`."""
    for option in given_options(besides=OPTIONS):
        raise click.UsageError(
            f"{option}: belongs to diffusion models in EDM's sense, and {name} holds a generator, "
            "whose steps are fixed; leave it out"
        )
