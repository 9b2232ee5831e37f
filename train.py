"""Train a diffusion model by denoising score matching: the baseline, which takes every label at its word."""

from __future__ import annotations

import click

import dnnlib.cli
from sampling.sheet import save_samples
from training import options
from training.objectives.dsm import DSM

EXAMPLES = """
Examples:
  python train.py --outdir=training-runs --data=datasets/digits_sym40.zip --cond=1 --arch=ddpmpp_tiny --augment=0 \\
      --duration=0.15 --batch=128 --lr=3e-3 --lr_rampup_kimg=2 --ema=0.02 --dropout=0 --P_mean=-0.4 --tick=7.5 --snap=10
  torchrun --standalone --nproc_per_node=8 train.py --outdir=training-runs --cond=1 \\
      --data=datasets/cifar10_sym_40-32x32.zip
"""


@click.command(cls=dnnlib.cli.Command, help=__doc__, epilog=EXAMPLES)
@options.training_options()
def main(**opts) -> None:
    options.run(opts, "dsm", DSM, draw_samples=save_samples)


if __name__ == "__main__":
    main()
