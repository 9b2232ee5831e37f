"""The options of the training scripts, and the configuration that they stand for. The option bag ends here."""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import torch

import dnnlib
from archives.archive_set import SEVERAL
from archives.dataset import ImageDataset
from archives.label_file import load_label_file
from archives.label_noise import load_matrix, transition_matrix
from dnnlib.cli import BOOL, INT_LIST, FloatRange, add_options, blame, given_options
from torch_utils import distributed
from training.augment import default_augment
from training.config import DatasetConfig, NetworkConfig, OptimizerConfig, PosteriorConfig, RunConfig
from training.networks_resnet import DEPTHS, resnet_kwargs
from training.noise_levels import NoiseLevels
from training.objectives.posterior_labels import MODES, PosteriorLabels
from training.presets import ARCHS, network_kwargs, presets_of
from training.trackers import WANDB_MODES, check_package

__all__ = [
    "check_precision",
    "check_usage",
    "denoiser_options",
    "encoder_options",
    "few_step_options",
    "make_config",
    "noise_level_options",
    "noise_options",
    "noise_settings",
    "posterior_labels",
    "posterior_options",
    "posterior_settings",
    "preset_help",
    "preset_option",
    "resnet",
    "run_options",
    "sigma_settings",
    "stated_transition",
    "unet",
]

COUNT, COUNT_OR_0 = click.IntRange(min=1), click.IntRange(min=0, max=2**63 - 1)
POSITIVE, SHARE = FloatRange(min=0, min_open=True), FloatRange(min=0, max=1)
DECAY = FloatRange(min=0, max=1, max_open=True)
LENGTH, LENGTH_OR_0 = (
    FloatRange(min=0, min_open=True, max=1e12),
    FloatRange(min=0, max=1e12),
)  # become numbers of images


# ----------------------------------------------------------------------------------------------------------------------
# The tables, one option per line.


# fmt: off
def run_options(script: str, *, cond: bool = False, duration: float = 200.0, batch: int = 512, dropout: float = 0.13) -> Callable:
    """Return a decorator for the options of every training script; the arguments are the script's own defaults."""
    return add_options([
        click.option("--outdir", metavar="DIR", required=True, help="Where to make the run directory"),
        click.option("--data", metavar="ZIP|DIR", required=True, help=f"Training images: an archive of dataset_tool.py, or a folder. {SEVERAL}"),
        preset_option(script),
        click.option("--cond", type=BOOL, default=cond, help="Train a class-conditional model on the archive's labels"),
        click.option("--duration", metavar="MIMG", type=LENGTH, default=duration, help="Length of training in millions of images; on a CPU start from --preset, or from a value below 1"),
        click.option("--batch", "--batch_size", "batch", metavar="INT", type=COUNT, default=batch, help="Batch size over all processes"),
        click.option("--batch-gpu", metavar="INT", type=COUNT, help="Images at a time on one process  [default: its whole share]"),
        click.option("--dropout", metavar="P", type=SHARE, default=dropout, help="Dropout probability"),
        click.option("--xflip", type=BOOL, default=False, help="Add the mirror image of every image to the data set"),
        click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16", "fp16"]), help="Arithmetic inside the networks; fp16 needs CUDA  [default: fp32]"),
        click.option("--bench", type=BOOL, default=True, help="Let cuDNN search for the fastest algorithms"),
        click.option("--compile", type=BOOL, default=False, help="Compile the network with torch.compile"),
        click.option("--shard", type=BOOL, default=False, help="Share weights, gradients and optimizer state between the processes of a machine (FSDP2)"),
        click.option("--cache", type=BOOL, default=True, help="Keep decoded images in memory: at most 4 GiB, and on a GPU at most a quarter of its free memory"),
        click.option("--workers", metavar="INT", type=COUNT, default=1, help="Threads that read images when they are not cached"),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", help="Where to train"),
        click.option("--desc", metavar="STR", help="Text for the end of the run directory's name"),
        click.option("--nosubdir", is_flag=True, help="Write into --outdir itself instead of a new run directory"),
        click.option("--tick", metavar="KIMG", type=LENGTH, default=50.0, help="Report after each KIMG thousand images"),
        click.option("--snap", metavar="TICKS", type=COUNT, default=50, help="Save a network snapshot after each TICKS ticks"),
        click.option("--dump", metavar="TICKS", type=COUNT, default=500, help="Save a training state after each TICKS ticks"),
        click.option("--keep", metavar="INT", type=COUNT, default=2, help="How many training states to keep"),
        click.option("--max_bad_steps", metavar="INT", type=COUNT, default=100, help="Stop after this many steps in a row with non-finite losses or gradients"),
        click.option("--seed", metavar="INT", type=COUNT_OR_0, help="Random seed  [default: random]"),
        click.option("--transfer", metavar="PKL|URL", help="Start from the weights of a snapshot"),
        click.option("--resume", metavar="PT|DIR|latest", help="Continue a run: a training state, a run directory, or the newest run in --outdir (a new run if there is none)"),
        click.option("--tensorboard", type=BOOL, default=False, help="Show the run in TensorBoard too: tensorboard --logdir=DIR"),
        click.option("--wandb", "--wandb-project", "wandb", metavar="PROJECT", help="Show the run in this project of Weights & Biases too"),
        click.option("--wandb-mode", type=click.Choice(WANDB_MODES), help="Send the run to Weights & Biases, or record it for `wandb sync`  [default: what the environment variable WANDB_MODE says, else online]"),
        click.option("--wandb-resume", metavar="ID", help="Go on with this run of the project  [default: with --resume the run of the run directory, else a new one]"),
        click.option("--wandb-api-key", metavar="KEY", help="Key of Weights & Biases. Other users of the machine can see it here: better set the environment variable WANDB_API_KEY, or call `wandb login` once"),
        click.option("--trust_pickle", is_flag=True, help="Run the code inside snapshots of other programs; only for files that you trust"),
        click.option("-n", "--dry-run", is_flag=True, help="Print the configuration and stop"),
    ])


def noise_level_options(*, lr: float = 1e-3, ema: float = 0.5) -> Callable:
    """Return a decorator for the options of networks that see noise levels sigma: U-Nets and ResNets."""
    return add_options([
        click.option("--arch", type=click.Choice(ARCHS), default="ddpmpp", metavar="|".join(ARCHS), help="Network: ddpmpp or ncsnpp for 32x32, adm for 64x64, ddpmpp_mnist and ddpmpp_tiny for small images on a CPU; classifiers take a ResNet of similar size"),
        click.option("--precond", type=click.Choice(["vp", "ve", "edm"]), default="edm", help="Preconditioning and noise distribution"),
        click.option("--P_mean", "P_mean", metavar="FLOAT", type=FloatRange(), help="Mean of ln sigma in training, for --precond=edm; use a larger value for small images  [default: -1.2]"),
        click.option("--P_std", "P_std", metavar="FLOAT", type=POSITIVE, help="Standard deviation of ln sigma in training, for --precond=edm  [default: 1.2]"),
        click.option("--cbase", metavar="INT", type=COUNT, help="Channels of the network's first level  [default: by architecture]"),
        click.option("--cres", metavar="LIST", type=INT_LIST, help="Channel multiplier of each level, e.g. 1,2,2  [default: by architecture]"),
        click.option("--lr", metavar="FLOAT", type=POSITIVE, default=lr, help="Learning rate"),
        click.option("--lr_rampup_kimg", metavar="KIMG", type=LENGTH_OR_0, default=10000.0, help="Learning-rate ramp-up in thousands of images"),
        click.option("--ema", metavar="MIMG", type=LENGTH_OR_0, default=ema, help="Half-life of the weights' moving average in millions of images"),
        click.option("--augment", metavar="P", type=SHARE, default=0.12, help="Probability of each non-leaking augmentation; 0 for none"),
        click.option("--fp16", type=BOOL, default=False, help="The same as --precision=fp16"),
        click.option("--ls", metavar="FLOAT", type=POSITIVE, default=1.0, help="Multiply the loss by this while gradients are computed, for fp16"),
    ])


def encoder_options() -> Callable:
    """Return a decorator for the options of classifiers and discriminators: `noise_level_options` and the depth."""
    return add_options([
        noise_level_options(ema=0.05),
        click.option("--encoder", type=click.Choice(DEPTHS), help="Depth of the residual network  [default: by --arch and the data: small for ddpmpp_tiny, ddpmpp_mnist or gray images, resnet34 from 64 pixels or with more than 50 classes, else resnet18]"),
    ])


def few_step_options() -> Callable:
    """Return a decorator for the published options of RDUOT and DDGAN, without those of the loss."""
    return add_options([
        click.option("--num_epoch", metavar="INT", type=COUNT, help="Length of training in passes over the data"),
        click.option("--num_timesteps", metavar="INT", type=COUNT, default=4, help="Steps of the diffusion"),
        click.option("--beta_min", metavar="FLOAT", type=POSITIVE, default=0.1, help="Noise schedule: rate at the start"),
        click.option("--beta_max", metavar="FLOAT", type=POSITIVE, default=20.0, help="Noise schedule: rate at the end"),
        click.option("--use_geometric", is_flag=True, help="Noise schedule: the variance rises geometrically from --beta_min to --beta_max, both below 1"),
        click.option("--lr_g", metavar="FLOAT", type=POSITIVE, default=1.6e-4, help="Learning rate of the generator"),
        click.option("--lr_d", metavar="FLOAT", type=POSITIVE, default=1.25e-4, help="Learning rate of the potential"),
        click.option("--beta1", metavar="FLOAT", type=DECAY, default=0.5, help="Adam: decay of the mean gradient per step"),
        click.option("--beta2", metavar="FLOAT", type=DECAY, default=0.9, help="Adam: decay of the mean squared gradient per step"),
        click.option("--schedule", metavar="MIMG", type=POSITIVE, help="The learning rates fall to 1e-5 over this many million images, or, with --num_epoch, passes over the data  [default: the whole training]"),
        click.option("--no_lr_decay", is_flag=True, help="The learning rates stay as they are"),
        click.option("--ema_decay", metavar="FLOAT", type=DECAY, default=0.9999, help="Decay per step of the generator's moving average; shorter at the start"),
        click.option("--use_ema/--no_use_ema", default=True, help="Keep that average, or take the generator as it is"),
        click.option("--nz", metavar="INT", type=COUNT, default=100, help="Width of the generator's latent"),
        click.option("--z_emb_dim", metavar="INT", type=COUNT, default=256, help="Width of the latent's embedding"),
        click.option("--n_mlp", metavar="INT", type=COUNT_OR_0, default=4, help="Further layers of the embedding"),
        click.option("--num_channels_dae", metavar="INT", type=COUNT, default=128, help="Generator: channels of level 1"),
        click.option("--ch_mult", metavar="LIST", type=INT_LIST, default="1,2,2,2", help="Generator: multiplier of each level"),
        click.option("--num_res_blocks", metavar="INT", type=COUNT, default=2, help="Generator: residual blocks per level"),
        click.option("--attn_resolutions", metavar="LIST", type=INT_LIST, help="Generator: levels with attention, by their size in pixels; 0: none  [default: 16, where there is this level]"),
        click.option("--embedding_type", type=click.Choice(["positional", "fourier"]), default="positional", help="How both networks see the time step"),
        click.option("--centered", metavar="BOOL", type=BOOL, is_flag=False, flag_value="0", default=True, help="1: the generator sees x; 0: it sees 2 x - 1. A bare --centered means 0, as in the published code"),
        click.option("--not_use_tanh", is_flag=True, help="Generator: no tanh at the end"),
        click.option("--ngf", metavar="INT", type=COUNT, default=64, help="Potential: channels of level 1"),
        click.option("--t_emb_dim", metavar="INT", type=COUNT, help="Potential: width of the time embedding; published is 256  [default: twice --ngf]"),
    ])


def denoiser_options() -> Callable:
    """Return a decorator for the options of denoisers."""
    return add_options([
        noise_level_options(),
        click.option("--label-dropout", metavar="P", type=SHARE, default=0.0, help="Drop the label this often (for --cfg in generate.py)"),
    ])


def posterior_options() -> Callable:
    """Return a decorator for --posterior, --posterior_mode and --posterior_min."""
    return add_options([
        click.option("--posterior", metavar="NPZ", help="Learn labels by the posterior in this label file of detect_noise.py, in place of the observed labels"),
        click.option("--posterior_mode", type=click.Choice(MODES), help="relabel: take the most probable class; sample: draw the label anew at each use; drop: leave out images whose label is not the most probable class; null: relabel, and no label where it is uncertain  [default: relabel]"),
        click.option("--posterior_min", metavar="P", type=SHARE, help="Least probability of a label that --posterior_mode=null keeps  [default: 0.5]"),
    ])


def noise_options(*names: str) -> Callable:
    """Return a decorator for --noise_type (one of `names`), --noise_rate and --noise_matrix."""
    return add_options([
        click.option("--noise_type", type=click.Choice(names), help="How the labels were corrupted"),
        click.option("--noise_rate", metavar="R", type=SHARE, help="Share of wrong labels"),
        click.option("--noise_matrix", metavar="FILE", help="T for --noise_type=matrix, T[y,o] = P(labeled o | class y): .npy, .json or a label file of detect_noise.py"),
    ])
# fmt: on


def preset_option(script: str) -> Callable:
    """Return a decorator for --preset: settings of the table in `training.presets` that the other options override."""
    presets = presets_of(script)

    def use(ctx: click.Context, _param: click.Parameter, name: str | None) -> None:
        if name is not None:
            ctx.default_map = {**(ctx.default_map or {}), **presets[name].options}

    return click.option(
        "--preset",
        type=click.Choice(list(presets)),
        is_eager=True,
        expose_value=False,
        callback=use,
        help="Settings to start from, listed below; every option that you give overrides them",
    )


def preset_help(script: str) -> str:
    """Return the lines of --help that list a script's presets: their options and results."""
    lines = ["", "Presets:"]
    for name, preset in presets_of(script).items():
        options = " ".join(f"--{key}={_shown(value)}" for key, value in preset.options.items())
        wrap = functools.partial(textwrap.wrap, width=118, break_on_hyphens=False)
        lines += wrap(f"{name}: {preset.result}", initial_indent="  ", subsequent_indent="    ")
        lines += wrap(options, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


# ----------------------------------------------------------------------------------------------------------------------
# From options to the configuration.


def check_usage(opts: dict[str, Any], method: str, require_labels: bool) -> None:
    """Raise UsageError for options that contradict each other or do not fit the number of processes."""
    if require_labels and not opts["cond"]:
        raise click.UsageError(f"--cond=0: {method} trains on labels; it needs --cond=1")
    if opts.get("label_dropout") and not opts["cond"]:
        raise click.UsageError("--label-dropout: without labels there is nothing to drop; it needs --cond=1")
    if opts.get("fp16") and opts["precision"] not in (None, "fp16"):
        raise click.UsageError(f"--fp16=1 contradicts --precision={opts['precision']}")
    if opts.get("precond", "edm") != "edm" and {"--P_mean", "--P_std"} & {*given_options()}:
        raise click.UsageError(f"--P_mean and --P_std belong to --precond=edm, not {opts['precond']}")
    if re.search(r"[/\\\0]", opts["desc"] or ""):
        raise click.UsageError(f"--desc={opts['desc']} becomes part of a folder's name; leave out slashes")
    for name in ("tensorboard", "wandb"):
        if opts[name]:
            try:
                check_package(name)
            except dnnlib.UserError as e:
                raise click.UsageError(f"--{name} {e.message}") from None
    for name in ("wandb_mode", "wandb_resume", "wandb_api_key"):
        if opts[name] is not None and not opts["wandb"]:
            raise click.UsageError(f"--{name.replace('_', '-')} goes with --wandb=PROJECT")
    world = distributed.get_world_size()
    if opts["batch"] % world:
        raise click.UsageError(f"--batch={opts['batch']} must be divisible by the number of processes ({world})")
    share = opts["batch"] // world
    if opts["compile"] and share % min(opts["batch_gpu"] or share, share):
        raise click.UsageError(
            f"--compile=1: compiled networks take batches of one size, so --batch-gpu={opts['batch_gpu']} must divide the "
            f"{share} images of a process"
        )


def check_precision(opts: dict[str, Any], device: torch.device) -> None:
    """Raise UsageError for float16 on a device that does not train in it; say where TF32 has no effect."""
    precision = _precision(opts)
    if precision == "fp16" and device.type != "cuda":
        option = f"--precision={precision}" if opts["precision"] else "--fp16=1"
        raise click.UsageError(f"{option}: for CUDA only, this is {device.type}; use fp32 or bf16")
    if precision == "tf32" and device.type != "cuda":
        distributed.print0(f"--precision=tf32: only CUDA has TF32; on {device.type} the run computes in float32.")


def _precision(opts: dict[str, Any]) -> str:
    return opts["precision"] or ("fp16" if opts.get("fp16") else "fp32")


def make_config(
    opts: dict[str, Any], method: str, dataset: ImageDataset, settings: dict[str, Any], **sections: Any
) -> RunConfig:
    """Return the configuration of a run.

    `settings`: fields that depend on the kind of network (`sigma_settings`, or a script's own). `sections`: the
    method's section of the configuration. An option `num_epoch` counts passes over the data in place of --duration.
    """
    return RunConfig(
        method=method,
        dataset=DatasetConfig(",".join(dataset.archives), opts["cond"], opts["xflip"], opts["cache"]),
        batch_size=opts["batch"],
        batch_gpu=opts["batch_gpu"],
        num_processes=distributed.get_world_size(),
        total_nimg=images(opts, dataset),
        kimg_per_tick=opts["tick"],
        snapshot_ticks=opts["snap"],
        state_ticks=opts["dump"],
        keep=opts["keep"],
        precision=_precision(opts),
        cudnn_bench=opts["bench"],
        compile=opts["compile"],
        shard=opts["shard"],
        workers=opts["workers"],
        max_bad_steps=opts["max_bad_steps"],
        transfer=opts["transfer"],
        desc=opts["desc"],
        tensorboard=opts["tensorboard"],
        wandb=opts["wandb"],
        wandb_mode=opts["wandb_mode"],
        wandb_resume=opts["wandb_resume"],
        **settings,
        **sections,
    )


def images(opts: dict[str, Any], dataset: ImageDataset, length: float | None = None) -> int:
    """Return a length in images, at least 1: that of the training, or a `length` in the unit of the training.

    The unit is a million images, or one pass over the data where an option `num_epoch` is given.
    """
    epochs = opts.get("num_epoch")
    if length is None:
        length = opts["duration"] if epochs is None else epochs
    return max(round(length * (1e6 if epochs is None else len(dataset))), 1)


def sigma_settings(opts: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the configuration that `noise_level_options` decide; `kwargs` of `unet` or `resnet`."""
    of_edm = opts["precond"] == "edm"  # the levels of a preset are for this one
    levels = {name: opts[name] for name in ("P_mean", "P_std") if of_edm and opts[name] is not None}
    return dict(
        network=NetworkConfig(opts["arch"], opts["precond"], kwargs),
        noise_levels=NoiseLevels(opts["precond"], **levels).settings(),
        augment=default_augment(opts["augment"]).settings() if opts["augment"] else None,
        optimizer=OptimizerConfig(opts.get("optimizer") or "adam", opts["lr"]),
        ema_halflife_nimg=round(opts["ema"] * 1e6),
        lr_rampup_nimg=round(opts["lr_rampup_kimg"] * 1e3),
        loss_scaling=opts["ls"],
    )


def unet(opts: dict[str, Any], dataset: ImageDataset) -> dict[str, Any]:
    """Return the settings of a run that trains a U-Net with its preconditioner."""
    kwargs = network_kwargs(opts["arch"], opts["cbase"], opts["cres"])
    return sigma_settings(opts, kwargs | dict(dropout=opts["dropout"], label_dropout=opts["label_dropout"]))


def resnet(opts: dict[str, Any], dataset: ImageDataset) -> dict[str, Any]:
    """Return the settings of a run that trains the ResNet that goes with an architecture and a data set."""
    shape = (dataset.resolution, dataset.num_channels, dataset.label_dim)
    kwargs = resnet_kwargs(opts["arch"], *shape, opts["cbase"], opts["cres"], opts["encoder"])
    return sigma_settings(opts, kwargs | dict(dropout=opts["dropout"]))


def posterior_settings(opts: dict[str, Any]) -> PosteriorConfig | None:
    """Return what the options of `posterior_options` say; None without a posterior."""
    mode, limit = opts["posterior_mode"], opts["posterior_min"]
    if opts["posterior"] is None:
        if (mode, limit) != (None, None):
            raise click.UsageError("--posterior_mode and --posterior_min go with --posterior=NPZ")
        return None
    if not opts["cond"]:
        raise click.UsageError("--posterior: is about labels; give --cond=1")
    if limit is not None and mode != "null":
        raise click.UsageError("--posterior_min: belongs to --posterior_mode=null")
    return PosteriorConfig(opts["posterior"], mode, limit)


def posterior_labels(config: RunConfig, dataset: ImageDataset, device: torch.device) -> PosteriorLabels | None:
    """Return the labels that replace those of the data set; None without a posterior."""
    section = config.posterior
    if section is None:
        return None
    with blame("--posterior"):
        found = load_label_file(section.path, dataset)
        if found.posterior is None:
            raise dnnlib.UserError(f"{section.path}: holds no posterior; make it anew with detect_noise.py")
    learned = config.outliers is None and config.rduot is None  # RDUOT leaves out what its cost makes expensive
    foreign = found.is_outlier if learned else None
    with blame(f"--posterior_mode={section.mode}"):
        return PosteriorLabels(found.posterior, section.mode, device, section.limit, foreign)


def noise_settings(opts: dict[str, Any]) -> dict[str, Any]:
    """Return what the options of `noise_options` say, for the method's section of the configuration."""
    return {name: opts[name] for name in ("noise_type", "noise_rate", "noise_matrix")}


def stated_transition(
    noise_type: str | None, noise_rate: float | None, noise_matrix: str | None, dataset: ImageDataset
) -> np.ndarray | None:
    """Return T [C,C] that the options of `noise_options` state for this data set; None when they state none."""
    if (noise_type == "matrix") != (noise_matrix is not None):
        raise click.UsageError("--noise_type=matrix and --noise_matrix=FILE go together")
    if (noise_type in ("sym", "asym", "pair")) != (noise_rate is not None):
        raise click.UsageError("--noise_rate goes with --noise_type=sym, asym or pair, and they with it")
    if noise_type in (None, "auto", "learn"):
        return None
    if noise_type == "clean":
        return np.eye(dataset.label_dim)
    with blame(f"--noise_type={noise_type}"):
        T = load_matrix(noise_matrix, dataset.label_dim) if noise_matrix else None
        counts = dataset.images_per_class(also_clean=True)
        return transition_matrix(noise_type, noise_rate, dataset.label_dim, dataset.family, T, counts)
