"""Train the time-dependent classifier of TDSM on noisy labels.

Without --noise_type it learns the noisy posterior. With a known transition (sym, asym, pair, matrix) or a learned one
(learn) it learns the clean posterior. A held-out share of the labels chooses the best snapshot; only that one is kept.
"""

from __future__ import annotations

import dnnlib.before_torch

import click

import dnnlib.cli
from dnnlib.cli import FloatRange
from training import options, run
from training.config import ClassifierConfig
from training.objectives.classifier import ClassifierObjective

EXAMPLES = """
Examples:
  python train_classifier.py --outdir=classifier-runs --data=datasets/digits_sym40.zip --preset=digits \\
      --noise_type=sym --noise_rate=0.4
  torchrun --standalone --nproc_per_node=1 train_classifier.py --outdir=classifier-runs \\
      --data=datasets/cifar10_sym_40-32x32.zip --cond=1 --arch=ddpmpp --batch 1024
"""
SHARE = FloatRange(min=0, max=0.5)


# fmt: off
@click.command(cls=dnnlib.cli.Command, help=__doc__, epilog=EXAMPLES + options.preset_help("train_classifier.py"))
@options.run_options("train_classifier.py", cond=True, duration=10.0, batch=1024, dropout=0.3)
@options.noise_level_options(ema=0.05)
@options.noise_options("clean", "sym", "asym", "pair", "matrix", "learn")
@click.option("--optimizer", type=click.Choice(["adam", "adamw", "sgd"]), default="adam", help="Optimizer")
@click.option("--val", metavar="SHARE", type=SHARE, default=0.05,
              help="Share of the noisy labels held out to choose the best snapshot")
@click.option("--shift", metavar="SHARE", type=SHARE, default=0.125,
              help="Random whole-pixel shifts up to this share of the image size")
# fmt: on
def main(**opts) -> None:
    noise_type = opts["noise_type"] if opts["noise_type"] != "clean" else None

    def make(config, dataset, device):
        transition = options.stated_transition(noise_type, opts["noise_rate"], opts["noise_matrix"], dataset)
        return ClassifierObjective(config, dataset, device, transition=transition, learn=noise_type == "learn")

    section = ClassifierConfig(
        **options.noise_settings(opts) | dict(noise_type=noise_type or "clean"),
        val=opts["val"],
        shift=opts["shift"],
    )
    run.start(opts, ClassifierObjective.method, make, options.resnet, require_labels=True, classifier=section)


if __name__ == "__main__":
    main()
