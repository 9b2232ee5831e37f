"""Images/s of sampling: what generate.py does against the plain form, and how far the images differ.

The plain form is the network as it stands: eager, float32, the layout and precision it was saved with, one call after
the other.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch

from benchmarks.core import Row, compare
from benchmarks.roofline import count
from sampling.generation import generate_images
from sampling.precision import prepare
from sampling.samplers import heun_sampler
from training.networks import EDMPrecond
from training.presets import network_kwargs

__all__ = ["CASES", "FORMS", "plain_images", "random_denoiser", "rows"]

SECONDS = 400

CASES = (("ddpmpp_tiny", None, 1, 8, 64), ("ddpmpp", 32, 3, 16, 32), ("ddpmpp", 32, 3, 32, 16))
FORMS = {
    "default": dict(),
    "bf16": dict(precision="bf16"),
    "compile": dict(compile=True),
    "bf16, compile": dict(precision="bf16", compile=True),
}


def random_denoiser(arch: str, cbase: int | None, channels: int, resolution: int) -> EDMPrecond:
    """A class-conditional denoiser (10 classes) whose random layers all have a say, as those of a trained one do."""
    torch.manual_seed(0)
    net = EDMPrecond(resolution, channels, 10, **network_kwargs(arch, cbase)).eval().requires_grad_(False)
    for name, p in net.named_parameters():
        if name.endswith(("conv1.weight", "proj.weight", "aux_conv.weight")):
            p *= 1e4    # They begin as nearly zero.
    return net


def images_of(net: torch.nn.Module, n: int, batch: int, steps: int) -> np.ndarray:
    """uint8 [n,H,W,C] of seeds 0..n-1 by the Heun sampler with `steps` steps."""
    parts = generate_images(net, range(n), device=next(net.parameters()).device, batch=batch, same_shape=True,
                            sampler=functools.partial(heun_sampler, num_steps=steps))
    return np.concatenate([images for _, images, _ in parts])


def plain_images(net: torch.nn.Module, latents: torch.Tensor, labels: torch.Tensor, steps: int = 18) -> torch.Tensor:
    """The plain form: Heun's steps in float64 around the network as it stands; uint8 [N,H,W,C]."""
    with torch.no_grad():
        images = heun_sampler(net, latents, labels, num_steps=steps)
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def rows(repeats: int, forms: tuple[str, ...] = tuple(FORMS), steps: int = 18) -> Iterator[Row]:
    """Every form against the plain one on one batch; notes say which share of pixels is within one grey level of it."""
    for arch, cbase, channels, resolution, n in CASES:
        net = random_denoiser(arch, cbase, channels, resolution)
        nets = {name: prepare(copy.deepcopy(net), **FORMS[name]) for name in forms}
        latents = torch.randn([n, channels, resolution, resolution], generator=torch.Generator().manual_seed(0))
        labels = torch.eye(10)[torch.arange(n) % 10]
        evaluations = 2 * steps - 1
        work = count(functools.partial(net, latents, torch.ones([n]), labels))
        label = f"{arch}{f' --cbase={cbase}' if cbase else ''}, {resolution}x{resolution}"
        run = {"plain": functools.partial(_wait_for, plain_images, net, latents, labels, steps)}
        run |= {name: functools.partial(_wait_for, images_of, nets[name], n, n, steps) for name in forms}
        seconds = compare(run, repeats, f"sampling, {label}")
        images = images_of(net, n, n, steps).astype(int)
        for name in forms:
            near = np.mean(np.abs(images_of(nets[name], n, n, steps) - images) <= 1)
            yield Row(f"sampling, {name}, {label}", seconds[name], seconds["plain"], work.flops * evaluations,
                      work.bytes * evaluations, f"batch {n}, {near:.3%} of pixels within a grey level", n,
                      FORMS[name].get("precision", "fp32"))


def _wait_for(function: Callable, *args) -> None:
    function(*args)     # What it returns is no time.
