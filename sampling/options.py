"""From generate.py's options to a denoiser with its guidance, and to a sampler."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import click
import torch

import dnnlib
from sampling.ddgan import check_options, ddgan_sampler, is_generator
from sampling.generation import EvaluationMeter, Stopwatch
from sampling.guidance import AffineGuidance, ClassifierFreeGuidance, DiscriminatorGuidance
from sampling.output import check_free, is_zip
from sampling.precision import prepare
from sampling.samplers import ablation_sampler, heun_sampler
from torch_utils import persistence
from torch_utils.distributed import print0
from training import networks, networks_ddgan, networks_resnet  # noqa: F401  They register what a snapshot may hold.

__all__ = ["check_usage", "choose_sampler", "guided", "load", "load_denoiser", "load_discriminator"]

SAMPLER_OPTIONS = ["num_steps", "sigma_min", "sigma_max", "rho", "S_churn", "S_min", "S_max", "S_noise"]
SAMPLER_PARTS = ["solver", "discretization", "schedule", "scaling"]
GUIDANCE_OPTIONS = ["dg_mode", "dg_weight_1st_order", "dg_weight_2nd_order", "S_clip_min", "S_clip_max", "noise_rate"]
DEFAULT_WEIGHTS = {"constant": (2.0, 0.0), "calibrated": (1.0, 1.0)}  # first and second order


def check_usage(o: dnnlib.EasyDict) -> None:
    """Raise for options that contradict each other, before anything is loaded."""
    if o.affine_weight is not None and o.network_2 is None:
        raise click.UsageError(f"--affine_weight={o.affine_weight:g}: needs a second network, --network_2")
    if o.network_2 is not None and o.affine_weight is None:
        raise click.UsageError(f"--network_2={o.network_2}: needs its weight, --affine_weight")
    for name in GUIDANCE_OPTIONS:
        if o[name] is not None and o.discriminator is None:
            raise click.UsageError(f"--{name}={o[name]}: needs --discriminator")
    if o.noise_rate is not None and o.dg_mode != "calibrated":
        raise click.UsageError(f"--noise_rate={o.noise_rate:g}: only --dg_mode=calibrated uses it")
    low, high = gate(o)
    if low > high:
        raise click.UsageError(f"--S_clip_min={low:g}: must not exceed --S_clip_max={high:g}")
    if o.grid is None:
        return
    if not o.grid.lower().endswith(".png"):
        raise click.UsageError(f"--grid={o.grid}: the sheet is a PNG; give a name that ends in .png")
    outdir = os.path.abspath(o.outdir)
    if not is_zip(outdir) and os.path.commonpath([outdir, os.path.abspath(o.grid)]) == outdir:
        raise click.UsageError(f"--grid={o.grid}: inside --outdir the sheet would count as an image; put it elsewhere")


def load(
    o: dnnlib.EasyDict, device: torch.device
) -> tuple[Callable, EvaluationMeter, Stopwatch | None, list[str] | None]:
    """The denoiser with its guidance, meters of its networks and of any discriminator, and its class names or None.

    `o`: generate.py's options; those that are missing are not given.
    """
    check_free(o.outdir)
    net, modules, names = load_denoiser(o, device)
    if o.discriminator is None:  # The clock makes some devices wait; it is for the ratio of the two times only.
        return net, EvaluationMeter(*modules), None, names
    stopwatch = Stopwatch(device)
    net = guided(net, load_discriminator(o, device), o, device, stopwatch)
    return net, EvaluationMeter(*modules, stopwatch=Stopwatch(device)), stopwatch, names


def load_denoiser(o: dnnlib.EasyDict, device: torch.device) -> tuple[Callable, list[torch.nn.Module], list[str] | None]:
    """The denoiser guided by all but a discriminator, its networks, and its class names or None."""
    if o.get("precision") in ("tf32", "fp16") and device.type != "cuda":
        raise click.UsageError(f"--precision={o.precision}: for CUDA only, this is {device.type}; use fp32 or bf16")

    def ready(snapshot: dict) -> torch.nn.Module:
        return prepare(snapshot["ema"].to(device), o.get("precision"), o.get("compile", False))

    snapshot = load_snapshot(o.network, o, "denoiser", "generator")
    if is_generator(snapshot["ema"]):
        check_options(o.network)
    net = ready(snapshot)
    modules = [net]
    if net.img_channels not in (1, 3):
        raise dnnlib.UserError(f"--network={o.network}: makes images of {net.img_channels} channels; PNGs have 1 or 3")
    if o.get("classes") is not None and max(o.classes) >= net.label_dim:
        known = f"knows classes 0 to {net.label_dim - 1}" if net.label_dim else "was trained without labels"
        raise click.UsageError(f"--class={max(o.classes)}: this network {known}")
    if o.get("cfg") is not None:
        if not net.label_dim:
            raise click.UsageError(f"--cfg={o.cfg:g}: needs a network trained with labels; this one was not")
        net = ClassifierFreeGuidance(net, o.cfg)
    if o.get("network_2") is not None:
        modules.append(ready(load_snapshot(o.network_2, o, "denoiser")))
        net = AffineGuidance(net, modules[1], o.affine_weight)
    return net, modules, (snapshot.get("info") or {}).get("class_names")


def load_discriminator(o: dnnlib.EasyDict, device: torch.device) -> dict:
    """The snapshot of --discriminator, its network on the device."""
    snapshot = load_snapshot(o.discriminator, o, "discriminator")
    return snapshot | dict(ema=snapshot["ema"].to(device))


def guided(
    net: Callable, snapshot: dict, o: dnnlib.EasyDict, device: torch.device, stopwatch: Stopwatch | None = None
) -> DiscriminatorGuidance:
    """The denoiser corrected by the discriminator of `load_discriminator`."""
    mode = o.dg_mode or "constant"
    rates, shares = None, None
    if mode == "calibrated":
        info = snapshot.get("info") or {}
        rates, shares = info.get("noise_rates"), info.get("right_shares")
        if shares is None or rates is None:
            raise dnnlib.UserError(
                f"--dg_mode=calibrated: {o.discriminator} does not say what it was trained on; use --dg_mode=constant"
            )
        rates, shares = (torch.tensor(x, dtype=torch.float32, device=device) for x in (rates, shares))
        if o.noise_rate is not None:
            rates = torch.full_like(rates, o.noise_rate)
    given = (o.dg_weight_1st_order, o.dg_weight_2nd_order)
    weights = [default if w is None else w for w, default in zip(given, DEFAULT_WEIGHTS[mode], strict=True)]
    low, high = gate(o)
    print0(f"Guidance: {mode}, weights {weights[0]:g} and {weights[1]:g}, where {low:g} <= sigma <= {high:g}")
    return DiscriminatorGuidance(
        net,
        snapshot["ema"],
        weights=weights,
        gate=(low, high),
        noise_rates=rates,
        right_shares=shares,
        stopwatch=stopwatch,
    )


def gate(o: dnnlib.EasyDict) -> tuple[float, float]:
    """The noise levels at which the discriminator is asked; by default all."""
    return (0.0 if o.S_clip_min is None else o.S_clip_min), (float("inf") if o.S_clip_max is None else o.S_clip_max)


def load_snapshot(pattern: str, o: dnnlib.EasyDict, *kinds: str) -> dict:
    path = persistence.find_snapshot(pattern)
    return persistence.load_snapshot(path, trust_pickle=o.trust_pickle, kind=kinds)


def choose_sampler(o: dnnlib.EasyDict, net: Callable) -> Callable:
    """EDM's sampler, or the general one as soon as a part of it is named; None leaves the sampler its own default."""
    if is_generator(net):
        return ddgan_sampler
    kwargs = {name: o[name] for name in SAMPLER_OPTIONS + SAMPLER_PARTS if o.get(name) is not None}
    return functools.partial(ablation_sampler if any(map(o.get, SAMPLER_PARTS)) else heun_sampler, **kwargs)
