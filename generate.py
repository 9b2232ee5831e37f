"""Make images with a trained diffusion model: one per seed, with the labels asked for in dataset.json beside them."""

from __future__ import annotations

import functools
import math
import os
import signal
import sys
import time
from collections.abc import Callable

import click
import torch

import dnnlib
from dnnlib.cli import INT_LIST, Command, FloatRange
from sampling.ddgan import check_options, ddgan_sampler, is_generator
from sampling.generation import EvaluationCounter, generate_images, share_of
from sampling.guidance import AffineGuidance, ClassifierFreeGuidance
from sampling.output import check_free, is_zip, progress, save_images, save_sheet
from sampling.samplers import DISCRETIZATIONS, SCALINGS, SCHEDULES, SOLVERS, ablation_sampler, heun_sampler
from torch_utils import distributed, persistence
from training import ddgan_networks, networks, resnet  # noqa: F401  They register what a snapshot may hold.

EXAMPLES = """
Examples:
  python generate.py --network=training-runs/00000-digits-cond-ddpmpp_tiny-edm-gpus1-batch128-fp32 --outdir=out
  python generate.py --network=network.pkl --outdir=threes.zip --class=3 --seeds=0-999 --grid=threes.png
  torchrun --standalone --nproc_per_node=2 generate.py --network=network.pkl --outdir=out --seeds=0-49999 --batch=64
"""
COUNT, POSITIVE, NOT_NEGATIVE = click.IntRange(min=1), FloatRange(min=0, min_open=True), FloatRange(min=0)
SAMPLER_OPTIONS = ["num_steps", "sigma_min", "sigma_max", "rho", "S_churn", "S_min", "S_max", "S_noise"]
SAMPLER_PARTS = ["solver", "discretization", "schedule", "scaling"]


@click.command(cls=Command, help=__doc__, epilog=EXAMPLES)
@click.option("--network", metavar="PKL|DIR|URL", required=True, help="Snapshot to sample, or its run directory")
@click.option("--outdir", metavar="DIR|ZIP", required=True, help="Folder for the images, or X.zip for an archive")
@click.option("--seeds", metavar="LIST", type=INT_LIST, default="0-63", help="Random seeds, e.g. 1,2,5-10")
@click.option("--subdirs", is_flag=True, help="Make a folder per 1000 seeds")
@click.option("--class", "classes", metavar="LIST", type=INT_LIST,
              help="Class to make, or several in turn: seed s gets number s mod n  [default: by seed]")
@click.option("--batch", metavar="INT", type=COUNT, default=64, help="Images at a time on each process")
@click.option("--steps", "num_steps", metavar="INT", type=COUNT, default=18, help="Sampling steps")
@click.option("--sigma_min", metavar="FLOAT", type=POSITIVE, help="Lowest noise level  [default: by --disc]")
@click.option("--sigma_max", metavar="FLOAT", type=POSITIVE, help="Highest noise level  [default: by --disc]")
@click.option("--rho", metavar="FLOAT", type=POSITIVE, default=7, help="Exponent of EDM's time steps")
@click.option("--S_churn", "S_churn", metavar="FLOAT", type=NOT_NEGATIVE, default=0, help="Noise added while sampling")
@click.option("--S_min", "S_min", metavar="FLOAT", type=NOT_NEGATIVE, default=0, help="Add it from this noise level")
@click.option("--S_max", "S_max", metavar="FLOAT", type=FloatRange(min=0, finite=False), default=math.inf,
              help="Add it up to this noise level")
@click.option("--S_noise", "S_noise", metavar="FLOAT", type=NOT_NEGATIVE, default=1, help="Its standard deviation")
@click.option("--solver", type=click.Choice(SOLVERS), help="Ablate EDM's solver  [default: heun]")
@click.option("--disc", "discretization", type=click.Choice(DISCRETIZATIONS), help="Ablate its steps  [default: edm]")
@click.option("--schedule", type=click.Choice(SCHEDULES), help="Ablate the schedule sigma(t)  [default: linear]")
@click.option("--scaling", type=click.Choice(SCALINGS), help="Ablate the scaling s(t)  [default: none]")
@click.option("--network_2", metavar="PKL|DIR|URL", help="A weaker network to steer away from, with --affine_weight")
@click.option("--affine_weight", metavar="W", type=FloatRange(), help="Affine guidance: (1+W) D - W D_2")
@click.option("--cfg", metavar="S", type=FloatRange(), help="Classifier-free guidance: D = D_0 + S (D_y - D_0)")
@click.option("--grid", metavar="PNG", type=click.Path(dir_okay=False), help="Also write all images as one sheet")
@click.option("--save_each_sample", is_flag=True, expose_value=False, help="Write every image; this is the default")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", help="Where to run")
@click.option("--trust_pickle", is_flag=True, help="Run code that a snapshot contains; for files you trust only")
def main(**opts) -> None:
    o = dnnlib.EasyDict(opts)
    check_usage(o)
    try:
        run(o, distributed.init(o.device))
    finally:
        distributed.shutdown()


def run(o: dnnlib.EasyDict, device: torch.device) -> None:
    """Everything after the options are known to fit together; collective."""
    torch.backends.cudnn.allow_tf32 = False     # With ten-bit products an image would depend on its batch.
    net, counter, class_names = distributed.together(lambda: load(o, device), rank0_first=True)
    seeds = list(dict.fromkeys(o.seeds))
    own = share_of(seeds, distributed.get_rank(), distributed.get_world_size())
    classes = o.classes and [o.classes[seed % len(o.classes)] for seed in own]
    batches = generate_images(net, own, device=device, class_idx=classes, batch=o.batch, sampler=choose_sampler(o, net))
    distributed.print0(f"Generating {len(seeds)} images to {o.outdir}")

    start, handler = time.time(), signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        save_images(progress(batches, len(seeds)), o.outdir, o.subdirs, class_names)
    finally:
        signal.signal(signal.SIGTERM, handler)
    seconds = time.time() - start
    if o.grid is not None:
        distributed.together(lambda: save_sheet(o.grid, o.outdir, seeds, o.subdirs))
    distributed.print0(f"{len(seeds)} images in {dnnlib.format_time(seconds)}, {len(seeds) / seconds:.1f} images/s, "
                       f"{counter.count / max(len(own), 1):g} network evaluations per image")


def check_usage(o: dnnlib.EasyDict) -> None:
    """Raise for options that contradict each other, before anything is loaded."""
    if o.affine_weight is not None and o.network_2 is None:
        raise click.UsageError(f"--affine_weight={o.affine_weight:g}: needs a second network, --network_2")
    if o.network_2 is not None and o.affine_weight is None:
        raise click.UsageError(f"--network_2={o.network_2}: needs its weight, --affine_weight")
    if o.grid is None:
        return
    if not o.grid.lower().endswith(".png"):
        raise click.UsageError(f"--grid={o.grid}: the sheet is a PNG; give a name that ends in .png")
    outdir = os.path.abspath(o.outdir)
    if not is_zip(outdir) and os.path.commonpath([outdir, os.path.abspath(o.grid)]) == outdir:
        raise click.UsageError(f"--grid={o.grid}: inside --outdir the sheet would count as an image; put it elsewhere")


def load(o: dnnlib.EasyDict, device: torch.device):
    """The denoiser with its guidance, a counter of its evaluations, and its class names or None."""
    check_free(o.outdir)
    snapshot = load_snapshot(o.network, o, "denoiser", "generator")
    net = snapshot["ema"].to(device)
    if is_generator(net):
        check_options(o.network)
    modules = [net]
    if net.img_channels not in (1, 3):
        raise dnnlib.UserError(f"--network={o.network}: makes images of {net.img_channels} channels; PNGs have 1 or 3")
    if o.classes is not None and max(o.classes) >= net.label_dim:
        known = f"knows classes 0 to {net.label_dim - 1}" if net.label_dim else "was trained without labels"
        raise click.UsageError(f"--class={max(o.classes)}: this network {known}")
    if o.cfg is not None:
        if not net.label_dim:
            raise click.UsageError(f"--cfg={o.cfg:g}: needs a network trained with labels; this one was not")
        net = ClassifierFreeGuidance(net, o.cfg)
    if o.network_2 is not None:
        modules.append(load_snapshot(o.network_2, o, "denoiser")["ema"].to(device))
        net = AffineGuidance(net, modules[1], o.affine_weight)
    return net, EvaluationCounter(*modules), (snapshot.get("info") or {}).get("class_names")


def load_snapshot(pattern: str, o: dnnlib.EasyDict, *kinds: str) -> dict:
    path = persistence.find_snapshot(pattern)
    return persistence.load_snapshot(path, trust_pickle=o.trust_pickle, kind=kinds)


def choose_sampler(o: dnnlib.EasyDict, net) -> Callable:
    """EDM's sampler, or the general one as soon as a part of it is named; None leaves the sampler its own default."""
    if is_generator(net):
        return ddgan_sampler
    kwargs = {name: o[name] for name in SAMPLER_OPTIONS + SAMPLER_PARTS if o[name] is not None}
    return functools.partial(ablation_sampler if any(o[name] for name in SAMPLER_PARTS) else heun_sampler, **kwargs)


if __name__ == "__main__":
    main()
