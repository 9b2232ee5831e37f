"""The options of generate.py and sweep.py, and the checks that they fit together.

The bag of options ends here and in the scripts: everything below takes what it needs.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import click
import torch

import dnnlib
from archives.archive_set import SEVERAL
from archives.writer import is_zip
from dnnlib.cli import (
    BOOL,
    CLASS_LIST,
    FLOAT_LIST,
    INT_LIST,
    FloatRange,
    add_options,
    given_options,
    output_file,
    parse_int_list,
)
from sampling.ddgan import is_generator
from sampling.loading import DEFAULT_WEIGHTS, MODES, PRECISIONS, warn_if_never_unlabeled
from sampling.samplers import SOLVERS
from sampling.schedules import DISCRETIZATIONS, SCALINGS, SCHEDULES
from torch_utils.distributed import print0
from training.published_ddgan import SETTINGS

__all__ = [
    "PUBLISHED_SETTINGS",
    "check_guidance",
    "check_network",
    "check_precision",
    "check_usage",
    "find_classes",
    "gate",
    "generate_options",
    "sampler_settings",
    "sweep_options",
]

COUNT, POSITIVE, NOT_NEGATIVE = click.IntRange(min=1), FloatRange(min=0, min_open=True), FloatRange(min=0)
NOT_NEGATIVE_OR_INF, RATE = FloatRange(min=0, finite=False), FloatRange(min=0, max=1)

SAMPLER_SETTINGS = [
    "num_steps",
    "sigma_min",
    "sigma_max",
    "rho",
    "S_churn",
    "S_min",
    "S_max",
    "S_noise",
    "solver",
    "discretization",
    "schedule",
    "scaling",
]
SHAPES = ["dg_weight_1st_order", "dg_weight_2nd_order", "S_clip_min", "S_clip_max"]  # of a gradient
GUIDANCE_SETTINGS = ["dg_published", "dg_mode", *SHAPES, "noise_rate"]
PUBLISHED_SETTINGS = list(SETTINGS)  # options that state what a published generator does not record
# What generate.py can be asked when the network is a generator; everything else shapes the path of a denoiser.
GENERATOR_OPTIONS = {
    "network",
    "outdir",
    "seeds",
    "subdirs",
    "classes",
    "batch",
    "grid",
    "trajectory",
    "resume",
    "save_each_sample",
    "device",
    "trust_pickle",
    "precision",
    "compile",
    *PUBLISHED_SETTINGS,
}


# ----------------------------------------------------------------------------------------------------------------------
# The tables, one option per line.


# fmt: off
def seeds_option(default: str) -> Callable:
    """Return the option --seeds."""
    return click.option("--seeds", metavar="LIST", type=INT_LIST, default=default, help="Random seeds, one per image, e.g. 1,2,5-10")


def batch_option(default: int) -> Callable:
    """Return the option --batch."""
    return click.option("--batch", metavar="INT", type=COUNT, default=default, help="Images that each process makes at a time")


def discriminator_option(required: bool = False) -> Callable:
    """Return the option --discriminator."""
    default = "" if required else "  [default: no guidance]"
    return click.option("--discriminator", metavar="PKL|DIR|URL", required=required, help=f"Correct what the network learned from wrong labels. Takes a snapshot or run directory of train_discriminator.py, a published SBDC snapshot, or a classifier of detect_noise.py (for rejection only){default}")


network_option = click.option("--network", metavar="PKL|DIR|URL", required=True, help="Snapshot to sample, its run directory, or a published generator of RDUOT or DDGAN, netG_1200.pth")
steps_option = click.option("--steps", "num_steps", metavar="INT", type=COUNT, default=18, help="Number of sampling steps; not for RDUOT and DDGAN, whose steps are fixed")
noise_rate_option = click.option("--noise_rate", metavar="R", type=RATE, help="Share of wrong labels, for all but constant weights  [default: that of each class in the label file]")
device_option = click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", help="Where to run")
trust_option = click.option("--trust_pickle", is_flag=True, help="Run code that a snapshot contains; only for files that you trust")
clip_options = add_options([
    click.option("--S_clip_min", "S_clip_min", metavar="SIGMA", type=NOT_NEGATIVE, help="Lowest noise level that the discriminator corrects  [default: 0]"),
    click.option("--S_clip_max", "S_clip_max", metavar="SIGMA", type=NOT_NEGATIVE_OR_INF, help="Highest noise level that it corrects  [default: inf]"),
])

image_options = add_options([
    network_option,
    click.option("--outdir", metavar="DIR|ZIP", required=True, help="Folder for the images, or X.zip for one file"),
    seeds_option("0-63"),
    click.option("--subdirs", is_flag=True, help="Make a subfolder for every 1000 seeds"),
    click.option("--class", "classes", metavar="LIST", type=CLASS_LIST, help="Class of all images, by name or number, or several classes in turn, e.g. cat,dog or 0-9: seed s gets class number s mod n of the list  [default: drawn from the seed]"),
    batch_option(64),
])

sampler_options = add_options([
    steps_option,
    click.option("--sigma_min", metavar="FLOAT", type=POSITIVE, help="Lowest noise level  [default: 0.002, or that of --disc]"),
    click.option("--sigma_max", metavar="FLOAT", type=POSITIVE, help="Highest noise level  [default: 80, or that of --disc]"),
    click.option("--rho", metavar="FLOAT", type=POSITIVE, default=7, help="Exponent of EDM's steps; larger values put more steps at low noise"),
    click.option("--S_churn", "S_churn", metavar="FLOAT", type=NOT_NEGATIVE, default=0, help="How much fresh noise the steps add"),
    click.option("--S_min", "S_min", metavar="FLOAT", type=NOT_NEGATIVE, default=0, help="Lowest noise level at which they add it"),
    click.option("--S_max", "S_max", metavar="FLOAT", type=NOT_NEGATIVE_OR_INF, default=math.inf, help="Highest noise level at which they add it"),
    click.option("--S_noise", "S_noise", metavar="FLOAT", type=NOT_NEGATIVE, default=1, help="Standard deviation of that noise"),
    click.option("--solver", type=click.Choice(SOLVERS), help="One or two evaluations per step. This option and the next three choose the general sampler of the EDM paper  [default: heun]"),
    click.option("--disc", "discretization", type=click.Choice(DISCRETIZATIONS), help="Spacing of the noise levels  [default: edm]"),
    click.option("--schedule", type=click.Choice(SCHEDULES), help="Noise schedule sigma(t)  [default: linear]"),
    click.option("--scaling", type=click.Choice(SCALINGS), help="Signal scaling s(t)  [default: none]"),
])

guidance_options = add_options([
    click.option("--network_2", metavar="PKL|DIR|URL", help="A weaker network to steer away from; needs --affine_weight  [default: no guidance]"),
    click.option("--affine_weight", metavar="W", type=FloatRange(), help="Affine guidance: D' = (1+W) D - W D_2  [default: no guidance]"),
    click.option("--cfg", metavar="S", type=FloatRange(), help="Classifier-free guidance: D' = D_0 + S (D_y - D_0)  [default: no guidance]"),
    discriminator_option(),
    click.option("--dg_mode", type=click.Choice(MODES), help="How it corrects: by its gradient with a constant weight, or with one that is calibrated by the probability that the label is wrong for this image, or by rejection, which draws an image until the label is right for it  [default: constant if the discriminator is not calibrated; else calibrated if a weight or --S_clip_min or --S_clip_max is given, and rejection if not]"),
    click.option("--dg_weight_1st_order", metavar="W", type=FloatRange(), help="Weight at the first evaluation of each step  [default: constant 2, calibrated 1]"),
    click.option("--dg_weight_2nd_order", metavar="W", type=FloatRange(), help="Weight at the second evaluation of each step of --solver=heun  [default: constant 0, calibrated 1]"),
    click.option("--dg_published", metavar="BOOL", type=BOOL, help="Ask the discriminator as SBDC's published sampling does, for comparison: with the time of the VP process in place of the noise level, and constant weights  [default: 0]"),
    clip_options,
    noise_rate_option,
])

published_options = add_options([
    click.option("--image_size", metavar="INT", type=COUNT, help="Of a published generator, netG_1200.pth: height and width of its images. This option and the next six state what the file does not record  [default: that of content.pth beside it]"),
    click.option("--num_timesteps", metavar="INT", type=COUNT, help="Steps of its diffusion  [default: that of content.pth, else 4]"),
    click.option("--beta_min", metavar="FLOAT", type=POSITIVE, help="Rate of its noise schedule at the start  [default: that of content.pth, else 0.1]"),
    click.option("--beta_max", metavar="FLOAT", type=POSITIVE, help="Rate of its noise schedule at the end  [default: that of content.pth, else 20]"),
    click.option("--use_geometric", metavar="BOOL", type=BOOL, help="Its noise schedule has geometric variances  [default: that of content.pth, else 0]"),
    click.option("--centered", metavar="BOOL", type=BOOL, help="Its network sees the image as it is; 0: twice the image, minus 1  [default: that of content.pth, else 1]"),
    click.option("--not_use_tanh", metavar="BOOL", type=BOOL, help="It has no tanh at the end  [default: that of content.pth, else 0]"),
])

output_options = add_options([
    click.option("--resume", is_flag=True, help="Make only the images that are missing in --outdir, and keep those that are done when interrupted"),
    click.option("--grid", metavar="PNG", callback=output_file, help="Also write all images as one picture  [default: no picture]"),
    click.option("--trajectory", metavar="NPZ", callback=output_file, help="Also write all states from noise to image, 4 bytes for each value of each step  [default: no file]"),
    click.option("--save_each_sample", is_flag=True, expose_value=False, help="No effect; accepted for old commands"),
])

run_options = add_options([
    device_option,
    click.option("--precision", type=click.Choice(PRECISIONS), help="Arithmetic of the network. bf16 is faster and keeps nearly all pixels within one gray level; fp16 and tf32 need CUDA  [default: fp32, or fp16 on CUDA if the network was trained so]"),
    click.option("--compile", is_flag=True, help="Compile the network first: it takes minutes and pays off for many images"),
    trust_option,
])

generate_options = add_options([image_options, sampler_options, guidance_options, published_options, output_options, run_options])

sweep_options = add_options([
    network_option,
    discriminator_option(required=True),
    click.option("--data", metavar="PATH", required=True, help=f"Reference archive, with clean labels for its judge, or with --label-path. {SEVERAL}"),
    click.option("--label-path", metavar="NPZ|CSV", help="Label file of --data: the judge learns the labels that it is surest of  [default: where --data has no clean labels, the file that the discriminator was trained with, if it is about --data]"),
    click.option("--detector", metavar="NAME", required=True, help="As in fid.py evaluate"),
    click.option("--judge", metavar="svm|PKL", default="svm", help="As in fid.py evaluate"),
    click.option("--outdir", metavar="DIR", required=True, help="Folder for the plot, the table and the images"),
    click.option("--weights", metavar="LIST", type=FLOAT_LIST, default="0.2,0.5,1,1.5,2,3", help="Weights to try, each at both evaluations of a step"),
    click.option("--modes", type=click.Choice([*DEFAULT_WEIGHTS, "both"]), default="both", help="Kinds of weight to try, as --dg_mode in generate.py"),
    seeds_option("0-999"),
    batch_option(250),
    steps_option,
    clip_options,
    noise_rate_option,
    device_option,
    trust_option,
])
# fmt: on


# ----------------------------------------------------------------------------------------------------------------------
# Groups of settings, from the options of a command.


def sampler_settings(o: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `choose_sampler`; None stands for the sampler's own default."""
    return {name: o[name] for name in SAMPLER_SETTINGS}


def gate(o: dict[str, Any]) -> tuple[float, float]:
    """Return the lowest and the highest noise level that the discriminator corrects."""
    low, high = o["S_clip_min"], o["S_clip_max"]
    return (0.0 if low is None else low), (math.inf if high is None else high)


# ----------------------------------------------------------------------------------------------------------------------
# Whether they fit together.


def check_usage(o: dnnlib.EasyDict) -> None:
    """Raise UsageError for options that contradict each other, before anything is loaded."""
    if o.affine_weight is not None and o.network_2 is None:
        raise click.UsageError(f"--affine_weight={o.affine_weight:g}: needs a second network, --network_2")
    if o.network_2 is not None and o.affine_weight is None:
        raise click.UsageError(f"--network_2={o.network_2}: needs its weight, --affine_weight")
    for name in GUIDANCE_SETTINGS:
        if o[name] is not None and o.discriminator is None:
            raise click.UsageError(f"--{name}={o[name]}: needs --discriminator")
    unused = [f"--dg_mode={o.dg_mode}"] if o.dg_mode not in (None, "constant") else []
    unused += ["--noise_rate"] if o.noise_rate is not None else []
    if o.dg_published and unused:
        raise click.UsageError(f"--dg_published=1: has constant weights; leave out {' and '.join(unused)}")
    check_guidance(o, "dg_mode")
    if o.dg_weight_2nd_order is not None and o.solver == "euler":
        raise click.UsageError(
            f"--dg_weight_2nd_order={o.dg_weight_2nd_order:g}: --solver=euler has one evaluation per step; leave it out"
        )
    for name in SHAPES if o.dg_mode == "rejection" else ():
        if o[name] is not None:
            raise click.UsageError(f"--{name}={o[name]:g}: --dg_mode=rejection has no gradient; leave it out")
    if o.trajectory is not None:
        if o.resume:
            raise click.UsageError(
                "--trajectory: the states of images that are there already are gone; leave out --resume"
            )
        if not o.trajectory.lower().endswith(".npz"):
            raise click.UsageError(f"--trajectory={o.trajectory}: give a name that ends in .npz")
    if o.grid is None:
        return
    if not o.grid.lower().endswith(".png"):
        raise click.UsageError(f"--grid={o.grid}: the picture is a PNG; give a name that ends in .png")
    outdir = os.path.abspath(o.outdir)
    if not is_zip(outdir) and os.path.commonpath([outdir, os.path.abspath(o.grid)]) == outdir:
        raise click.UsageError(
            f"--grid={o.grid}: inside --outdir it would count as one of the images; put it elsewhere"
        )


def check_guidance(o: dnnlib.EasyDict, mode: str) -> None:
    """Raise UsageError for a gate or a noise rate that a discriminator cannot use; `mode`: the option of its mode."""
    if o.noise_rate is not None and o[mode] == "constant":
        raise click.UsageError(f"--noise_rate={o.noise_rate:g}: --{mode}=constant does not use it")
    low, high = gate(o)
    if low > high:
        raise click.UsageError(f"--S_clip_min={low:g}: must not exceed --S_clip_max={high:g}")


def check_precision(precision: str | None, device: torch.device) -> None:
    """Raise UsageError for a precision that the device does not have."""
    if precision in ("tf32", "fp16") and device.type != "cuda":
        raise click.UsageError(f"--precision={precision}: for CUDA only, this is {device.type}; use fp32 or bf16")


def check_network(o: dnnlib.EasyDict, net: torch.nn.Module) -> None:
    """Raise UsageError for options that the network of --network cannot follow; print notes on those that do little."""
    if is_generator(net):
        for option in given_options(besides=GENERATOR_OPTIONS):
            raise click.UsageError(
                f"{option}: is for diffusion models in EDM's sense, but {o.network} holds a generator, "
                "whose steps are fixed; leave it out"
            )
    if o.classes is not None and not net.label_dim:
        raise click.UsageError(f"--class={o.classes}: this network was trained without labels")
    if o.cfg is not None and not net.label_dim:
        raise click.UsageError(f"--cfg={o.cfg:g}: needs a network trained with labels; this one was not")
    if o.cfg not in (None, 1):
        warn_if_never_unlabeled(net)
    shaping = [option for option in given_options() if option in ("--S_min", "--S_max", "--S_noise")]
    if shaping and not o.S_churn:
        change = "changes" if len(shaping) == 1 else "change"
        print0(f"Note: without --S_churn no noise is added, so {' and '.join(shaping)} {change} nothing")


def find_classes(text: str, classes: int, names: Sequence[str] | None) -> list[int]:
    """Return the numbers of the classes that --class lists by name, number or range of numbers.

    A text that is the number of one class and the name of another stands for the number, unless another number in the
    list can only be a name. Names may have commas, and lowercase letters for capital ones. UsageError: the network has
    no such class, or the list has numbers of both kinds and one that may be either.
    """
    number = {name: c for c, name in reversed([*enumerate(names or ())])}
    lower = {name.lower(): c for name, c in number.items()}
    lower = {name: c for name, c in lower.items() if sum(name == other.lower() for other in number) == 1}

    def named(part: str) -> int | None:
        return number.get(part, lower.get(part.lower()))

    parts, readings, only_names = text.split(","), [], False
    while parts:
        length = next((n for n in range(len(parts), 1, -1) if named(",".join(parts[:n]).strip()) is not None), 1)
        part, parts = ",".join(parts[:length]).strip(), parts[length:]
        numbers, by_name = [], [named(part)]
        with contextlib.suppress(ValueError):
            numbers = parse_int_list(part)
        if by_name == [None]:
            by_name = [number[str(n)] for n in numbers] if all(str(n) in number for n in numbers) else []
        known = numbers if max(numbers, default=0) < classes else []
        if not known and not by_name:
            part = max(numbers, default=part)
            raise click.UsageError(f"--class={part}: {_known_classes(str(part), classes, names)}")
        only_names |= bool(numbers) and not known
        readings.append((known, by_name))
    if only_names and not all(by_name for _, by_name in readings):
        if any(known and by_name and known != by_name for known, by_name in readings):
            raise click.UsageError(f"--class={text}: some of these are names only, some numbers only, and some either")
    return [c for known, by_name in readings for c in (only_names and by_name or known or by_name)]


def _known_classes(text: str, classes: int, names: Sequence[str] | None) -> str:
    known = f"this network knows classes 0 to {classes - 1}"
    shown = difflib.get_close_matches(text, names or (), 3) or [*(names or ())][:10]
    return f"{known}, {', '.join(shown)}{', ...' if len(shown) < len(names) else ''}" if shown else known
