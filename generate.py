"""Make images with a trained diffusion model: one per seed, with the labels asked for in dataset.json beside them."""

from __future__ import annotations

import math
import signal
import sys
import time

import click
import torch

import dnnlib
from dnnlib.cli import INT_LIST, Command, FloatRange
from sampling.generation import generate_images, share_of
from sampling.options import DEFAULT_WEIGHTS, check_usage, choose_sampler, load
from sampling.output import progress, save_images, save_sheet
from sampling.precision import PRECISIONS
from sampling.samplers import DISCRETIZATIONS, SCALINGS, SCHEDULES, SOLVERS
from torch_utils import distributed

EXAMPLES = """
Examples:
  python generate.py --network=training-runs/00000-digits-cond-ddpmpp_tiny-edm-gpus1-batch128-fp32 --outdir=out
  python generate.py --network=network.pkl --outdir=threes.zip --class=3 --seeds=0-999 --grid=threes.png
  python generate.py --network=network.pkl --outdir=right --discriminator=discriminator.pkl --dg_mode=calibrated
  torchrun --standalone --nproc_per_node=2 generate.py --network=network.pkl --outdir=out --seeds=0-49999 --batch=64
"""
COUNT, POSITIVE, NOT_NEGATIVE = click.IntRange(min=1), FloatRange(min=0, min_open=True), FloatRange(min=0)
RATE = FloatRange(min=0, max=1)


@click.command(cls=Command, help=__doc__, epilog=EXAMPLES)
@click.option("--network", metavar="PKL|DIR|URL", required=True, help="Snapshot to sample, or its run directory")
@click.option("--outdir", metavar="DIR|ZIP", required=True, help="Folder for the images, or X.zip for an archive")
@click.option("--seeds", metavar="LIST", type=INT_LIST, default="0-63", help="Random seeds, e.g. 1,2,5-10")
@click.option("--subdirs", is_flag=True, help="Make a folder per 1000 seeds")
@click.option(
    "--class",
    "classes",
    metavar="LIST",
    type=INT_LIST,
    help="Class to make, or several in turn: seed s gets number s mod n  [default: by seed]",
)
@click.option("--batch", metavar="INT", type=COUNT, default=64, help="Images at a time on each process")
@click.option("--steps", "num_steps", metavar="INT", type=COUNT, default=18, help="Sampling steps")
@click.option("--sigma_min", metavar="FLOAT", type=POSITIVE, help="Lowest noise level  [default: by --disc]")
@click.option("--sigma_max", metavar="FLOAT", type=POSITIVE, help="Highest noise level  [default: by --disc]")
@click.option("--rho", metavar="FLOAT", type=POSITIVE, default=7, help="Exponent of EDM's time steps")
@click.option("--S_churn", "S_churn", metavar="FLOAT", type=NOT_NEGATIVE, default=0, help="Noise added while sampling")
@click.option("--S_min", "S_min", metavar="FLOAT", type=NOT_NEGATIVE, default=0, help="Add it from this noise level")
@click.option(
    "--S_max",
    "S_max",
    metavar="FLOAT",
    type=FloatRange(min=0, finite=False),
    default=math.inf,
    help="Add it up to this noise level",
)
@click.option("--S_noise", "S_noise", metavar="FLOAT", type=NOT_NEGATIVE, default=1, help="Its standard deviation")
@click.option("--solver", type=click.Choice(SOLVERS), help="Ablate EDM's solver  [default: heun]")
@click.option("--disc", "discretization", type=click.Choice(DISCRETIZATIONS), help="Ablate its steps  [default: edm]")
@click.option("--schedule", type=click.Choice(SCHEDULES), help="Ablate the schedule sigma(t)  [default: linear]")
@click.option("--scaling", type=click.Choice(SCALINGS), help="Ablate the scaling s(t)  [default: none]")
@click.option("--network_2", metavar="PKL|DIR|URL", help="A weaker network to steer away from, with --affine_weight")
@click.option("--affine_weight", metavar="W", type=FloatRange(), help="Affine guidance: (1+W) D - W D_2")
@click.option("--cfg", metavar="S", type=FloatRange(), help="Classifier-free guidance: D = D_0 + S (D_y - D_0)")
@click.option("--discriminator", metavar="PKL|DIR|URL", help="Correct wrong labels by this network")
@click.option(
    "--dg_mode",
    type=click.Choice(list(DEFAULT_WEIGHTS)),
    help="Weight of its gradient: the same "
    "everywhere, or times the probability that the label is wrong here  [default: constant]",
)
@click.option(
    "--dg_weight_1st_order",
    metavar="W",
    type=FloatRange(),
    help="Weight at a step's first evaluation  [default: 2; calibrated: 1]",
)
@click.option(
    "--dg_weight_2nd_order",
    metavar="W",
    type=FloatRange(),
    help="Weight at its second evaluation  [default: 0; calibrated: 1]",
)
@click.option("--S_clip_min", "S_clip_min", metavar="SIGMA", type=NOT_NEGATIVE, help="Correct from this noise level on")
@click.option("--S_clip_max", "S_clip_max", metavar="SIGMA", type=NOT_NEGATIVE, help="Correct up to this noise level")
@click.option(
    "--noise_rate",
    metavar="R",
    type=RATE,
    help="Share of wrong labels, for --dg_mode=calibrated  [default: each class's own, from the label file]",
)
@click.option("--grid", metavar="PNG", type=click.Path(dir_okay=False), help="Also write all images as one sheet")
@click.option("--save_each_sample", is_flag=True, expose_value=False, help="Write every image; this is the default")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", help="Where to run")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Arithmetic of the network: bf16 is faster and keeps "
    "nearly all pixels within a grey level; fp16 and tf32 are for CUDA only  [default: fp32, but fp16 on "
    "CUDA for networks trained so]",
)
@click.option("--compile", is_flag=True, help="Compile the network first; it takes minutes, for many images")
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
    net, meter, corrections, class_names = distributed.together(lambda: load(o, device), rank0_first=True)
    seeds = list(dict.fromkeys(o.seeds))
    own = share_of(seeds, distributed.get_rank(), distributed.get_world_size())
    classes = o.classes and [o.classes[seed % len(o.classes)] for seed in own]
    batches = generate_images(
        net, own, device=device, class_idx=classes, batch=o.batch, sampler=choose_sampler(o, net), same_shape=o.compile
    )
    distributed.print0(f"Generating {len(seeds)} images to {o.outdir}")

    start, handler = time.time(), signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        save_images(progress(batches, len(seeds)), o.outdir, o.subdirs, class_names)
    finally:
        signal.signal(signal.SIGTERM, handler)
    seconds = time.time() - start
    if o.grid is not None:
        distributed.together(lambda: save_sheet(o.grid, o.outdir, seeds, o.subdirs))
    distributed.print0(
        f"{len(seeds)} images in {dnnlib.format_time(seconds)}, {len(seeds) / seconds:.1f} images/s, "
        f"{meter.count / max(len(own), 1):g} network evaluations per image"
    )
    if o.discriminator is not None and own:
        ratio = 1 + corrections.seconds / meter.stopwatch.seconds
        distributed.print0(f"Guided sampling took {ratio:.2f} times the network time of unguided sampling")


if __name__ == "__main__":
    main()
