"""Train a diffusion model by denoising score matching, on the labels as they are or on labels by a posterior.

Without further options this is the baseline, which takes every label at its word. --posterior learns from the labels
that detect_noise.py finds probable. --method chooses one of two other baselines for wrong labels.
"""

from __future__ import annotations

import dnnlib.before_torch

import click

import dnnlib.cli
from dnnlib.cli import FloatRange
from sampling.sheet import save_samples
from training import options, run
from training.config import CEPConfig
from training.objective import Objective
from training.objectives.cep import CEP
from training.objectives.dmis import DMIS
from training.objectives.dsm import DSM
from training.outlier_options import outlier_options, outlier_rule, outlier_settings

EXAMPLES = """
Examples:
  python train.py --outdir=training-runs --data=datasets/digits_sym40.zip --preset=digits
  python train.py --outdir=training-runs --data=datasets/digits_sym40.zip --preset=digits --posterior=labels.npz
  torchrun --standalone --nproc_per_node=8 train.py --outdir=training-runs --cond=1 \\
      --data=datasets/cifar10_sym_40-32x32.zip
"""


def methods() -> dict[str, type[Objective]]:
    """Return what --method chooses among."""
    return {cls.method: cls for cls in (DSM, CEP, DMIS)}


# fmt: off
@click.command(cls=dnnlib.cli.Command, help=__doc__, epilog=EXAMPLES + options.preset_help("train.py"))
@options.run_options("train.py")
@options.denoiser_options()
@options.posterior_options()
@outlier_options()
@click.option("--method", type=click.Choice(list(methods())), default="dsm",
              help="dsm: denoising score matching; cep: with noise on the embeddings of labels; dmis: the denoiser "
                   "finds the posterior itself")
@click.option("--gamma", metavar="FLOAT", type=FloatRange(min=0),
              help="Length of the perturbation of an embedding, for --method=cep  [default: 1]")
# fmt: on
def main(**opts) -> None:
    cls = methods()[opts["method"]]
    posterior = options.posterior_settings(opts)
    if opts["gamma"] is not None and cls is not CEP:
        raise click.UsageError("--gamma: belongs to --method=cep")
    if posterior is not None and cls is DMIS:
        raise click.UsageError("--method=dmis: finds its own posterior; leave --posterior out")

    def make(config, dataset, device):
        known = {} if cls is DMIS else dict(posterior_labels=options.posterior_labels(config, dataset, device))
        return cls(config, dataset, device, outliers=outlier_rule(config, dataset, device), **known)

    sections = dict(posterior=posterior, outliers=outlier_settings(opts))
    if cls is CEP:
        sections["cep"] = CEPConfig() if opts["gamma"] is None else CEPConfig(opts["gamma"])
    run.start(opts, cls.method, make, require_labels=cls is not DSM, draw_samples=save_samples, **sections)


if __name__ == "__main__":
    main()
