"""Rows about sampling: generate.py's ways of running a network against the plain form, and how far the images differ.

The plain form runs the network as it was saved: eager, in float32, with its memory format. Every form has a process of
its own, because the settings of memory allocator and backends hold for a whole process.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.core import Row, Turns, compare, processes
from benchmarks.roofline import count
from sampling.generation import generate_images
from sampling.loading import prepare
from sampling.samplers import heun_sampler
from sampling.seeds import StackedRandomGenerator
from torch_utils import misc
from training.networks import EDMPrecond
from training.presets import network_kwargs

__all__ = ["CASES", "FORMS", "random_denoiser", "rows"]

SECONDS = 500

CASES = (("ddpmpp_tiny", None, 1, 8, 64), ("ddpmpp", 32, 3, 16, 32), ("ddpmpp", 32, 3, 32, 16))
FORMS = {
    "default": dict(),
    "bf16": dict(precision="bf16"),
    "compile": dict(compile=True),
    "bf16, compile": dict(precision="bf16", compile=True),
}


def random_denoiser(arch: str, cbase: int | None, channels: int, resolution: int) -> EDMPrecond:
    """Return a denoiser of 10 classes with random weights, in which all layers matter, as in a trained one."""
    torch.manual_seed(0)
    net = EDMPrecond(resolution, channels, 10, **network_kwargs(arch, cbase)).eval().requires_grad_(False)
    for name, p in net.named_parameters():
        if name.endswith(("conv1.weight", "proj.weight", "aux_conv.weight")):
            p *= 1e4  # The initial values are nearly zero.
    return net


def images_of(net: torch.nn.Module, n: int, batch: int, steps: int) -> np.ndarray:
    """Return the images of seeds 0..n-1, uint8 [n,H,W,C], by `steps` steps of the Heun sampler."""
    parts = generate_images(
        net,
        range(n),
        device=next(net.parameters()).device,
        batch=batch,
        same_shape=True,
        sampler=functools.partial(heun_sampler, num_steps=steps),
    )
    return np.concatenate([images for _, images, _ in parts])


def plain_images(net: torch.nn.Module, latents: torch.Tensor, labels: torch.Tensor, steps: int = 18) -> torch.Tensor:
    """Return the images of the plain form, uint8 [N,H,W,C]: float64 Heun steps around the unchanged network."""
    with torch.no_grad():
        images = heun_sampler(net, latents, labels, num_steps=steps)
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def rows(repeats: int, forms: tuple[str, ...] = tuple(FORMS), steps: int = 18) -> Iterator[Row]:
    """Measure every form against the plain one on a batch; notes give the share of pixels within one gray level."""
    for case in CASES:
        arch, cbase, _, resolution, n = case
        label = f"{arch}{f' --cbase={cbase}' if cbase else ''}, {resolution}x{resolution}"
        with tempfile.TemporaryDirectory() as folder:
            paths = {form: os.path.join(folder, f"{i}.npy") for i, form in enumerate(("plain", *forms))}
            with processes(
                **{
                    form: ("benchmarks.sampling_rows", dict(case=case, form=form, steps=steps, images=path))
                    for form, path in paths.items()
                }
            ) as run:
                facts = run["plain"].facts
                seconds = compare(run, repeats, f"sampling, {label}")
            images = {form: np.load(path).astype(int) for form, path in paths.items()}
        for form in forms:
            near = np.mean(np.abs(images[form] - images["plain"]) <= 1)
            yield Row(
                f"sampling, {form}, {label}",
                seconds[form],
                seconds["plain"],
                facts["flops"],
                facts["bytes"],
                f"batch {n}, {near:.3%} of pixels within a gray level",
                n,
                FORMS[form].get("precision", "fp32"),
            )


def main() -> None:
    """Serve the form `form` of the given `case` with `steps` steps, and save its images in the file `images`."""
    turns, wanted = Turns(), json.loads(sys.argv[1])
    arch, cbase, channels, resolution, n = wanted["case"]
    net, steps = random_denoiser(arch, cbase, channels, resolution), wanted["steps"]
    rnd = StackedRandomGenerator(torch.device("cpu"), range(n))
    latents = rnd.randn([n, channels, resolution, resolution])
    labels = torch.eye(10)[rnd.randint(10, size=[n])]
    work = count(functools.partial(net, latents, torch.ones([n]), labels))
    if wanted["form"] == "plain":
        form = functools.partial(plain_images, net, latents, labels, steps)
    else:
        misc.keep_freed_memory()  # Scripts do this when they start.
        form = functools.partial(images_of, prepare(net, **FORMS[wanted["form"]]), n, n, steps)
    np.save(wanted["images"], np.asarray(form()))

    def turn() -> None:
        form()  # Returns nothing: a form that returns something has measured its own time.

    turns.serve(turn, dict(flops=work.flops * (2 * steps - 1), bytes=work.bytes * (2 * steps - 1)))


if __name__ == "__main__":
    main()
