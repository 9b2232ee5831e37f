"""Train a diffusion model by TDSM: clean-label scores from noisy labels and a classifier that has seen them.

T and the posterior's kind come from the classifier's snapshot; --noise_type and --noise_rate state T where it does not.
"""

from __future__ import annotations

import click

import dnnlib.cli
from dnnlib.cli import FloatRange
from sampling.sheet import save_samples
from torch_utils import persistence
from training import options
from training.objectives.tdsm import TDSM, check_classifier, known_transition

EXAMPLES = """
Examples:
  python train_noise.py --outdir=noise-runs --data=datasets/digits_sym40.zip --arch=ddpmpp_tiny --augment=0 \\
      --duration=0.28 --batch=128 --lr=3e-3 --lr_rampup_kimg=2 --ema=0.02 --dropout=0 --P_mean=-0.4 --tick=12 \\
      --cls='classifier-runs/00000-*/network-snapshot-*.pkl' --temp=0.5
  torchrun --standalone --nproc_per_node=8 train_noise.py --outdir=noise-runs --cond=1 --arch=ddpmpp \\
      --data=datasets/cifar10_sym_40-32x32.zip --noise_type=sym --noise_rate=0.4 \\
      --cls='classifier-runs/00000-*/network-snapshot-*.pkl'
"""


@click.command(cls=dnnlib.cli.Command, help=__doc__, epilog=EXAMPLES)
@options.training_options(cond=True)
@options.noise_options("clean", "sym", "asym", "pair", "matrix")
@click.option(
    "--cls",
    metavar="PKL|DIR|URL",
    required=True,
    help="Classifier: a snapshot of train_classifier.py, or its run directory",
)
@click.option(
    "--tau",
    metavar="W",
    type=FloatRange(min=0, max=1),
    default=0.01,
    help="Leave out other classes whose weight is at most this",
)
@click.option(
    "--pairs",
    metavar="K",
    type=click.IntRange(min=1),
    help="Of the other classes keep at most the K heaviest an image, for data with many [default: no limit]",
)
@click.option(
    "--temp",
    metavar="FLOAT",
    type=FloatRange(min=0, min_open=True),
    default=1.0,
    help="Divide the classifier's logits by this",
)
@click.option("--resume_sub", metavar="PKL|URL", help="The same as --transfer")
def main(**opts) -> None:
    if opts["resume_sub"]:
        if opts["transfer"]:
            raise click.UsageError("--resume_sub and --transfer are the same option; give one")
        opts["transfer"] = opts["resume_sub"]
    path = persistence.find_snapshot(opts["cls"])

    def make(config, dataset, device):
        snapshot = persistence.load_snapshot(path, trust_pickle=opts["trust_pickle"], kind="classifier")
        check_classifier(snapshot["ema"], dataset, path)
        stated = options.stated_transition(opts["noise_type"], opts["noise_rate"], opts["noise_matrix"], dataset)
        transition, posterior = known_transition(snapshot["info"], stated, dataset, path)
        return TDSM(config, dataset, device, classifier=snapshot["ema"], transition=transition, posterior=posterior)

    options.run(
        opts,
        "tdsm",
        make,
        require_labels=True,
        draw_samples=save_samples,
        tdsm=dict(
            cls=path,
            tau=opts["tau"],
            pairs=opts["pairs"],
            temp=opts["temp"],
            noise_type=opts["noise_type"],
            noise_rate=opts["noise_rate"],
            noise_matrix=opts["noise_matrix"],
        ),
    )


if __name__ == "__main__":
    main()
