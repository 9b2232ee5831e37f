"""Train a diffusion model of a few steps by RDUOT, which leaves outlier images out, or its baseline DDGAN.

Unbalanced optimal transport leaves out the images that are expensive to make from noise; --cost=robust leaves out,
before training, those that are far from what is usual in the set, and trains on the others as DDGAN does. When the
archive records its outliers, or a label file names them, the run says before it starts whether they are the expensive
ones.
"""

from __future__ import annotations

import dnnlib.before_torch

from typing import Any

import click

import dnnlib.cli
from archives.dataset import ImageDataset
from archives.label_table import load_outliers
from dnnlib.cli import FloatRange, blame
from sampling.grid import save_grid
from sampling.sheet import save_samples
from torch_utils.distributed import print0
from training import options, run
from training.config import NetworkConfig, OptimizerConfig, RDUOTConfig
from training.noise_levels import DiffusionSteps
from training.objectives.rduot import CONJUGATES, DDGAN, GROUP, RDUOT, ema_halflife
from training.transport_cost import COSTS

EXAMPLES = """
Examples:
  python train_rduot.py --outdir=rduot-runs --data=datasets/photos_digits10.zip --preset=photos
  torchrun --standalone --nproc_per_node=4 train_rduot.py --outdir=rduot-runs --data=datasets/cifar10_mnist-32x32.zip
"""
METHODS = {objective.method: objective for objective in (RDUOT, DDGAN)}
BASELINE = dict(tau=0.0, phi1="softplus", phi2="softplus", cost="pixels")  # what DDGAN has in place of options
COUNT = click.IntRange(min=1)
PHI = click.Choice(list(CONJUGATES))


# fmt: off
@click.command(cls=dnnlib.cli.Command, help=__doc__, epilog=EXAMPLES + options.preset_help("train_rduot.py"))
@options.run_options("train_rduot.py", duration=90.0, batch=256, dropout=0.0)
@click.option("--method", type=click.Choice(list(METHODS)), default="rduot", help="The method, or its baseline")
@click.option("--phi1", type=PHI, default="softplus", help="Conjugate on generated images")
@click.option("--phi2", type=PHI, default="softplus", help="Conjugate on real images; linear leaves none out")
@click.option("--tau", metavar="FLOAT", type=FloatRange(min=0), help="Weight of the transport cost. Compare "
              "Potential/tau_cost with Potential/size in stats.jsonl; with --cost=robust, the run says before it "
              "starts what is left out  [default: 0.001; with --cost=robust 10]")
@click.option("--cost", type=click.Choice(COSTS), default="pixels",
              help="What the transport cost compares; robust finds outliers at any size, and leaves "
              "them out before training")
@click.option("--outlier_data", metavar="NPZ|CSV",
              help="Label file that says which images are foreign, in place of the archive's record. The run says what "
              "they cost; nothing is left out by it")
@click.option("--r1_gamma", metavar="FLOAT", type=FloatRange(min=0), default=0.02, help="Weight of the penalty R1")
@click.option("--lazy_reg", metavar="STEPS", type=COUNT, default=15, help="Apply R1 once in this many steps")
@options.few_step_options()
@options.posterior_options()
# fmt: on
def main(**opts) -> None:
    check_usage(opts)
    preset = click.get_current_context().default_map or {}
    if "--tau" not in dnnlib.cli.given_options() and opts["cost"] != preset.get("cost", opts["cost"]):
        opts["tau"] = None  # the preset's is for its own cost
    if opts["method"] == "ddgan":
        opts |= BASELINE

    def make(config, dataset, device):
        if opts["outlier_data"]:
            with blame("--outlier_data"):
                dataset.outliers = load_outliers(opts["outlier_data"], dataset)
        labels = options.posterior_labels(config, dataset, device)
        return METHODS[opts["method"]](config, dataset, device, posterior_labels=labels, draw_sheet=save_grid)

    sizes = "--ngf, --t_emb_dim, --num_channels_dae, --ch_mult"
    sections = dict(posterior=options.posterior_settings(opts))
    run.start(opts, opts["method"], make, settings, network_options=sizes, draw_samples=save_samples, **sections)


def settings(opts: dict[str, Any], dataset: ImageDataset) -> dict[str, Any]:
    """Return the fields of the configuration that the two networks decide, and the section of the method."""
    generator = dict(
        nz=opts["nz"],
        z_emb_dim=opts["z_emb_dim"],
        n_mlp=opts["n_mlp"],
        model_channels=opts["num_channels_dae"],
        channel_mult=opts["ch_mult"],
        num_blocks=opts["num_res_blocks"],
        dropout=opts["dropout"],
        embedding_type=opts["embedding_type"],
    )
    # What is as usual is left out: earlier runs, which continue, do not know these settings.
    rare = dict(attn_resolutions=opts["attn_resolutions"], centered=opts["centered"], tanh=not opts["not_use_tanh"])
    generator |= {name: value for name, value in rare.items() if value not in (None, True)}
    potential = dict(model_channels=opts["ngf"], embedding_type=opts["embedding_type"])
    if opts["t_emb_dim"] is not None:
        potential["t_emb_dim"] = opts["t_emb_dim"]
    levels = [dataset.resolution >> level for level in range(len(opts["ch_mult"]))]
    for size in opts["attn_resolutions"] or ():
        if size and size not in levels:
            raise click.UsageError(f"--attn_resolutions={size}: there are levels of {levels} pixels; 0 is none of them")
    names = ("num_timesteps", "beta_min", "beta_max", "cost", "tau", "phi1", "phi2", "r1_gamma", "lazy_reg")
    nimg = 0 if opts["no_lr_decay"] else opts["schedule"] and options.images(opts, dataset, opts["schedule"])
    total = options.images(opts, dataset)
    if nimg and nimg > total:
        print0(f"Note: the learning rates fall over {nimg:,} images, and the training ends after {total:,} of them")
    return dict(
        network=NetworkConfig(opts["method"], None, generator, potential),
        noise_levels=None,
        augment=None,
        optimizer=OptimizerConfig(
            "adam", dict(net=opts["lr_g"], potential=opts["lr_d"]), [opts["beta1"], opts["beta2"]]
        ),
        ema_halflife_nimg=ema_halflife(opts["ema_decay"], opts["batch"]) if opts["use_ema"] else 0,
        rduot=RDUOTConfig(
            **{name: opts[name] for name in names}, geometric=opts["use_geometric"] or None, schedule_nimg=nimg
        ),
    )


def check_usage(opts: dict[str, Any]) -> None:
    """Raise UsageError for options that contradict each other."""
    given = dnnlib.cli.given_options()
    for name, own in BASELINE.items():
        if opts["method"] == "ddgan" and f"--{name}" in given and opts[name] != own:
            raise click.UsageError(f"--{name}={opts[name]}: belongs to --method=rduot; the baseline has {own}")
    off = {"no_lr_decay": opts["no_lr_decay"], "no_use_ema": not opts["use_ema"], "r1_gamma=0": not opts["r1_gamma"]}
    for other, name in zip(off, ("schedule", "ema_decay", "lazy_reg"), strict=True):
        if off[other] and f"--{name}" in given:
            raise click.UsageError(f"--{other}: then --{name}={opts[name]:g} means nothing; leave it out")
    if opts["cost"] == "robust" and opts["phi2"] == "linear":
        raise click.UsageError("--phi2=linear: leaves no image out, whatever it costs, so --cost=robust means nothing")
    try:
        DiffusionSteps(opts["num_timesteps"], opts["beta_min"], opts["beta_max"], geometric=opts["use_geometric"])
    except ValueError as e:
        raise click.UsageError(f"the noise schedule: {e}") from None
    if opts["precision"] == "fp16":
        raise click.UsageError("--precision=fp16: the gradient penalty exceeds its range; use bf16")
    if opts["num_epoch"] is not None and "--duration" in given:
        raise click.UsageError("--num_epoch and --duration both say how long to train; give one")
    if opts["batch_gpu"] is not None and opts["batch_gpu"] % GROUP:
        raise click.UsageError(
            f"--batch-gpu={opts['batch_gpu']}: must be a multiple of {GROUP}, the number of images whose deviation "
            "the potential sees"
        )


if __name__ == "__main__":
    main()
