"""Train a diffusion model of a few steps by RDUOT, which leaves outlier images out, or its baseline DDGAN.

Unbalanced optimal transport leaves out the images that are expensive to make from noise. When the archive records its
outliers, or a label file names them, the run says before it starts whether they are the expensive ones.
"""

from __future__ import annotations

import dnnlib.before_torch

from typing import Any

import click

import dnnlib.cli
from archives.dataset import ImageDataset
from archives.label_table import load_outliers
from dnnlib.cli import INT_LIST, FloatRange, blame
from sampling.sheet import save_samples
from training import options, run
from training.config import NetworkConfig, OptimizerConfig, RDUOTConfig
from training.objectives.rduot import CONJUGATES, DDGAN, GROUP, RDUOT, ema_halflife
from training.transport_cost import COSTS

EXAMPLES = """
Examples:
  python train_rduot.py --outdir=rduot-runs --data=datasets/photos_digits10.zip --preset=photos
  torchrun --standalone --nproc_per_node=4 train_rduot.py --outdir=rduot-runs --data=datasets/cifar10_mnist-32x32.zip
"""
METHODS = {objective.method: objective for objective in (RDUOT, DDGAN)}
BASELINE = dict(tau=0.0, phi1="softplus", phi2="softplus", cost="pixels")  # what DDGAN has in place of options
TAU = {"robust": 6.0}  # a mean over features, 0 for usual images; the other costs are sums, with the published tau
COUNT, POSITIVE = click.IntRange(min=1), FloatRange(min=0, min_open=True)
PHI = click.Choice(list(CONJUGATES))


# fmt: off
@click.command(cls=dnnlib.cli.Command, help=__doc__, epilog=EXAMPLES + options.preset_help("train_rduot.py"))
@options.run_options("train_rduot.py", duration=90.0, batch=256, dropout=0.0)
@click.option("--method", type=click.Choice(list(METHODS)), default="rduot", help="The method, or its baseline")
@click.option("--num_epoch", metavar="INT", type=COUNT, help="Length of training in passes over the data")
@click.option("--num_timesteps", metavar="INT", type=COUNT, default=4, help="Steps of the diffusion")
@click.option("--beta_min", metavar="FLOAT", type=POSITIVE, default=0.1, help="Noise schedule: rate at the start")
@click.option("--beta_max", metavar="FLOAT", type=POSITIVE, default=20.0, help="Noise schedule: rate at the end")
@click.option("--phi1", type=PHI, default="softplus", help="Conjugate on generated images; linear keeps all images")
@click.option("--phi2", type=PHI, default="softplus", help="Conjugate on real images; linear keeps all images")
@click.option("--tau", metavar="FLOAT", type=FloatRange(min=0), help="Weight of the transport cost; compare "
              "Potential/tau_cost with Potential/size in stats.jsonl  [default: 0.001; with --cost=robust 6]")
@click.option("--cost", type=click.Choice(COSTS), default="pixels",
              help="What the transport cost compares; robust has shown good results at 8x8 pixels")
@click.option("--outlier_data", metavar="NPZ|CSV",
              help="Label file that says which images are foreign, in place of the archive's record")
@click.option("--r1_gamma", metavar="FLOAT", type=FloatRange(min=0), default=0.02, help="Weight of the penalty R1")
@click.option("--lazy_reg", metavar="STEPS", type=COUNT, default=15, help="Apply R1 every so many steps")
@click.option("--lr_g", metavar="FLOAT", type=POSITIVE, default=1.6e-4, help="Learning rate of the generator")
@click.option("--lr_d", metavar="FLOAT", type=POSITIVE, default=1.25e-4, help="Learning rate of the potential")
@click.option("--schedule", metavar="MIMG", type=POSITIVE,
              help="The learning rates fall to 1e-5 over this many million images  [default: the whole training]")
@click.option("--ema_decay", metavar="FLOAT", type=FloatRange(min=0, max=1, max_open=True), default=0.9999,
              help="Decay per step of the generator's moving average; shorter at the start")
@click.option("--use_ema/--no_use_ema", default=True, help="Keep that average, or take the generator as it is")
@click.option("--nz", metavar="INT", type=COUNT, default=100, help="Width of the generator's latent")
@click.option("--z_emb_dim", metavar="INT", type=COUNT, default=256, help="Width of the latent's embedding")
@click.option("--n_mlp", metavar="INT", type=click.IntRange(min=0), default=4, help="Further layers of the embedding")
@click.option("--num_channels_dae", metavar="INT", type=COUNT, default=128, help="Generator: channels of level 1")
@click.option("--ch_mult", metavar="LIST", type=INT_LIST, default="1,2,2,2", help="Generator: multiplier of each level")
@click.option("--num_res_blocks", metavar="INT", type=COUNT, default=2, help="Generator: residual blocks per level")
@click.option("--embedding_type", type=click.Choice(["positional", "fourier"]), default="positional",
              help="How both networks see the time step")
@click.option("--ngf", metavar="INT", type=COUNT, default=64, help="Potential: channels of level 1")
# fmt: on
def main(**opts) -> None:
    check_usage(opts)
    if opts["method"] == "ddgan":
        opts |= BASELINE
    elif opts["tau"] is None:
        opts["tau"] = TAU.get(opts["cost"], 1e-3)
    names = ("num_timesteps", "beta_min", "beta_max", "cost", "tau", "phi1", "phi2", "r1_gamma", "lazy_reg")
    nimg = opts["schedule"] and max(round(opts["schedule"] * 1e6), 1)
    section = RDUOTConfig(**{name: opts[name] for name in names}, schedule_nimg=nimg)

    def make(config, dataset, device):
        if opts["outlier_data"]:
            with blame("--outlier_data"):
                dataset.outliers = load_outliers(opts["outlier_data"], dataset)
        with blame(f"--cost={opts['cost']}"):
            return METHODS[opts["method"]](config, dataset, device)

    sizes = "--num_channels_dae, --ch_mult"
    run.start(opts, opts["method"], make, settings, network_options=sizes, draw_samples=save_samples, rduot=section)


def settings(opts: dict[str, Any], _dataset: ImageDataset) -> dict[str, Any]:
    """Return the fields of the configuration that the two networks decide."""
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
    potential = dict(model_channels=opts["ngf"], embedding_type=opts["embedding_type"])
    return dict(
        network=NetworkConfig(opts["method"], None, generator, potential),
        noise_levels=None,
        augment=None,
        optimizer=OptimizerConfig("adam", dict(net=opts["lr_g"], potential=opts["lr_d"]), [0.5, 0.9]),
        ema_halflife_nimg=ema_halflife(opts["ema_decay"], opts["batch"]) if opts["use_ema"] else 0,
    )


def check_usage(opts: dict[str, Any]) -> None:
    """Raise UsageError for options that contradict each other."""
    given = dnnlib.cli.given_options()
    for name, own in BASELINE.items():
        if opts["method"] == "ddgan" and f"--{name}" in given and opts[name] != own:
            raise click.UsageError(f"--{name}={opts[name]}: belongs to --method=rduot; the baseline has {own}")
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
