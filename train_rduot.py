"""Train a diffusion model of few steps by RDUOT, which leaves outlier images out, or its baseline DDGAN.

Unbalanced optimal transport drops the images that are expensive to make from noise. The run says before it starts
whether the archive's outliers are.
"""

from __future__ import annotations

import click

import dnnlib.cli
from dnnlib.cli import INT_LIST, FloatRange
from sampling.sheet import save_samples
from training import options
from training.objectives.rduot import CONJUGATES, GROUP, RDUOT, ema_halflife
from training.transport_cost import COSTS

EXAMPLES = """
Examples:
  python train_rduot.py --outdir=rduot-runs --data=datasets/photos_outliers.zip --num_channels_dae=32 --ch_mult=1,2 \\
      --num_res_blocks=1 --ngf=32 --batch=64 --lr_g=4e-4 --lr_d=4e-4 --r1_gamma=0.2 --lazy_reg=10 --tau=0.01 \\
      --duration=0.4 --tick=20 --snap=10
  torchrun --standalone --nproc_per_node=4 train_rduot.py --outdir=rduot-runs --data=datasets/cifar10_mnist-32x32.zip
"""
# What denoisers have and these two networks lack: noise levels sigma, EDM's widths, one learning rate, augmentation.
LEAVE_OUT = [
    "arch",
    "precond",
    "P_mean",
    "P_std",
    "cbase",
    "cres",
    "lr",
    "lr_rampup_kimg",
    "ema",
    "augment",
    "fp16",
    "ls",
    "label_dropout",
]
COUNT, POSITIVE = click.IntRange(min=1), FloatRange(min=0, min_open=True)
TAU = {"robust": 6.0}  # a mean over features that is 0 for usual images; the other costs are sums: as published
PHI = click.Choice(list(CONJUGATES))


# fmt: off
@click.command(cls=dnnlib.cli.Command, help=__doc__, epilog=EXAMPLES)
@options.training_options(leave_out=LEAVE_OUT, duration=90.0, batch=256, dropout=0.0)
@click.option("--method", type=click.Choice(["rduot", "ddgan"]), default="rduot", help="The method, or its baseline")
@click.option("--num_epoch", metavar="INT", type=COUNT, help="Length of training in passes over the data")
@click.option("--num_timesteps", metavar="INT", type=COUNT, default=4, help="Steps of the diffusion")
@click.option("--beta_min", metavar="FLOAT", type=POSITIVE, default=0.1, help="Noise schedule: rate at the start")
@click.option("--beta_max", metavar="FLOAT", type=POSITIVE, default=20.0, help="Noise schedule: rate at the end")
@click.option("--phi1", type=PHI, help="Conjugate on generated images  [default: softplus]")
@click.option("--phi2", type=PHI, help="Conjugate on real images  [default: softplus]")
@click.option("--tau", metavar="FLOAT", type=FloatRange(min=0),
              help="Weight of the transport cost; see what Potential/tau_cost becomes  "
              "[default: 0.001; of --cost=robust 6]")
@click.option("--cost", type=click.Choice(COSTS), default="pixels", help="What the transport cost compares")
@click.option("--r1_gamma", metavar="FLOAT", type=FloatRange(min=0), default=0.02, help="Weight of the penalty R1")
@click.option("--lazy_reg", metavar="STEPS", type=COUNT, default=15, help="Apply R1 every so many steps")
@click.option("--lr_g", metavar="FLOAT", type=POSITIVE, default=1.6e-4, help="Learning rate of the generator")
@click.option("--lr_d", metavar="FLOAT", type=POSITIVE, default=1.25e-4, help="Learning rate of the potential")
@click.option("--schedule", metavar="MIMG", type=POSITIVE,
              help="Learning rates fall to 1e-5 over this many million images  [default: the whole training]")
@click.option("--ema_decay", metavar="FLOAT", type=FloatRange(min=0, max=1, max_open=True), default=0.9999,
              help="Decay of the generator's moving average, a step; shorter at the start")
@click.option("--use_ema/--no_use_ema", default=True, help="Keep that average, or take the generator as it is")
@click.option("--nz", metavar="INT", type=COUNT, default=100, help="Width of the generator's latent")
@click.option("--z_emb_dim", metavar="INT", type=COUNT, default=256, help="Width of the latent's embedding")
@click.option("--n_mlp", metavar="INT", type=click.IntRange(min=0), default=4, help="Further layers of the embedding")
@click.option("--num_channels_dae", metavar="INT", type=COUNT, default=128, help="Generator: unit of the channels")
@click.option("--ch_mult", metavar="LIST", type=INT_LIST, default="1,2,2,2", help="Generator: multiplier of each level")
@click.option("--num_res_blocks", metavar="INT", type=COUNT, default=2, help="Generator: residual blocks a level")
@click.option("--embedding_type", type=click.Choice(["positional", "fourier"]), default="positional",
              help="How both networks see the time step")
@click.option("--ngf", metavar="INT", type=COUNT, default=64, help="Potential: unit of the channels")
# fmt: on
def main(**opts) -> None:
    o = dnnlib.EasyDict(opts)
    check_usage(o)
    baseline = o.method == "ddgan"
    options.run(
        opts, o.method, RDUOT, draw_samples=save_samples,
        network=dict(
            arch=o.method, precond=None,
            kwargs=dict(nz=o.nz, z_emb_dim=o.z_emb_dim, n_mlp=o.n_mlp, model_channels=o.num_channels_dae,
                        channel_mult=o.ch_mult, num_blocks=o.num_res_blocks, dropout=o.dropout,
                        embedding_type=o.embedding_type),
            potential_kwargs=dict(model_channels=o.ngf, embedding_type=o.embedding_type)),
        noise_levels=None, augment=None, loss_scaling=1.0, lr_rampup_nimg=0,
        optimizer=dict(name="adam", lr=dict(net=o.lr_g, potential=o.lr_d), betas=[0.5, 0.9]),
        ema_halflife_nimg=ema_halflife(o.ema_decay, o.batch) if o.use_ema else 0,
        rduot=dict(num_timesteps=o.num_timesteps, beta_min=o.beta_min, beta_max=o.beta_max, cost=o.cost,
                   tau=0.0 if baseline else TAU.get(o.cost, 1e-3) if o.tau is None else o.tau,
                   phi1=o.phi1 or "softplus", phi2=o.phi2 or "softplus", r1_gamma=o.r1_gamma, lazy_reg=o.lazy_reg,
                   schedule_nimg=o.schedule and max(round(o.schedule * 1e6), 1)))


def check_usage(o: dnnlib.EasyDict) -> None:
    """Raise for options that contradict each other."""
    if o.method == "ddgan":
        for name, own in dict(tau=0, phi1="softplus", phi2="softplus", cost="pixels").items():
            if (value := o[name]) not in (None, own):
                raise click.UsageError(f"--{name}={value}: belongs to --method=rduot; the baseline has {own}")
    if o.precision == "fp16":
        raise click.UsageError("--precision=fp16: the gradient penalty leaves its range; use bf16")
    if o.num_epoch is not None and "--duration" in dnnlib.cli.given_options():
        raise click.UsageError("--num_epoch and --duration both say how long to train; give one")
    if o.batch_gpu is not None and o.batch_gpu % GROUP:
        raise click.UsageError(f"--batch-gpu={o.batch_gpu}: must be a multiple of {GROUP}, the number of images whose "
                               "deviation the potential sees")


if __name__ == "__main__":
    main()
