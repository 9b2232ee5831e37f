"""Train a diffusion model by denoising score matching: the baseline, which takes every label at its word."""

from __future__ import annotations

import dnnlib.before_torch

import click

import dnnlib.cli
from sampling.sheet import save_samples
from training import options, run
from training.objectives.dsm import DSM

EXAMPLES = """
Examples:
  python train.py --outdir=training-runs --data=datasets/digits_sym40.zip --preset=digits
  torchrun --standalone --nproc_per_node=8 train.py --outdir=training-runs --cond=1 \\
      --data=datasets/cifar10_sym_40-32x32.zip
"""


@click.command(cls=dnnlib.cli.Command, help=__doc__, epilog=EXAMPLES + options.preset_help("train.py"))
@options.run_options("train.py")
@options.denoiser_options()
def main(**opts) -> None:
    run.start(opts, DSM.method, DSM, draw_samples=save_samples)


if __name__ == "__main__":
    main()
