"""Train the time-dependent classifier of TDSM on noisy labels.

Without --noise_type it learns the noisy posterior. With a transition that is known (sym, asym, pair, matrix), estimated
(auto) or learned (learn) it learns the clean posterior. It learns that best from what detect_noise.py has found out
about each image (auto with --label-path). A held-out share of the images chooses the best snapshot, which alone is
kept, and the temperature that makes it honest.
"""

from __future__ import annotations

import dnnlib.before_torch

from collections.abc import Callable
from typing import Any

import click
import numpy as np
import torch

import dnnlib
import dnnlib.cli
from archives.dataset import ImageDataset
from archives.posterior import TopPosterior
from detection import gce
from detection.classifier import check_labels
from detection.options import load_labels
from detection.trainer import CONV, Settings
from dnnlib.cli import FloatRange, blame
from torch_utils.distributed import print0
from training import options, run
from training.config import ClassifierConfig, RunConfig
from training.objectives.classifier import ClassifierObjective

EXAMPLES = """
Examples:
  python train_classifier.py --outdir=classifier-runs --data=datasets/digits_sym40.zip --preset=digits \\
      --noise_type=auto
  torchrun --standalone --nproc_per_node=1 train_classifier.py --outdir=classifier-runs \\
      --data=datasets/cifar10_sym_40-32x32.zip --cond=1 --arch=ddpmpp --batch 1024
"""
SHARE = FloatRange(min=0, max=0.5)


# fmt: off
@click.command(cls=dnnlib.cli.Command, help=__doc__, epilog=EXAMPLES + options.preset_help("train_classifier.py"))
@options.run_options("train_classifier.py", cond=True, duration=10.0, batch=1024, dropout=0.3)
@options.encoder_options()
@options.noise_options("clean", "sym", "asym", "pair", "matrix", "auto", "learn")
@click.option("--label-path", metavar="NPZ|CSV",
              help="Label file of detect_noise.py: --noise_type=auto takes its T and learns its posterior of each "
                   "image; learn starts from its T  [default: T is estimated first]")
@click.option("--optimizer", type=click.Choice(["adam", "adamw", "sgd"]), default="adam", help="Optimizer")
@click.option("--val", metavar="SHARE", type=SHARE, default=0.05,
              help="Share of the noisy labels held out to choose the best snapshot and its temperature")
@click.option("--shift", metavar="SHARE", type=SHARE, default=0.125,
              help="Random whole-pixel shifts up to this share of the image size")
# fmt: on
def main(**opts) -> None:
    noise_type = opts["noise_type"] if opts["noise_type"] != "clean" else None
    if opts["label_path"] and noise_type not in ("auto", "learn"):
        raise click.UsageError("--label-path goes with --noise_type=auto or learn")

    def make(config, dataset, device):
        transition = options.stated_transition(noise_type, opts["noise_rate"], opts["noise_matrix"], dataset)
        estimate = targets = None
        if noise_type == "auto" or (noise_type == "learn" and config.classifier.warm_start):
            with blame("--data"):
                check_labels(dataset)
            estimate, targets = choose_estimate(opts, config, dataset, device)
        if noise_type == "learn":
            targets = None
        elif targets is not None:
            print0("Targets: the label file's posterior of each image.")
        return ClassifierObjective(
            config,
            dataset,
            device,
            transition=transition,
            learn=noise_type == "learn",
            estimate=estimate,
            targets=targets,
        )

    section = ClassifierConfig(
        **options.noise_settings(opts) | dict(noise_type=noise_type or "clean"),
        label_path=opts["label_path"],
        val=opts["val"],
        shift=opts["shift"],
    )
    run.start(opts, ClassifierObjective.method, make, options.resnet, require_labels=True, classifier=section)


def choose_estimate(
    opts: dict[str, Any], config: RunConfig, dataset: ImageDataset, device: torch.device
) -> tuple[Callable[[], np.ndarray], TopPosterior | None]:
    """Return what finds T, the label file or a classifier trained beforehand, and what is known of each image."""
    if opts["label_path"]:
        with blame("--label-path"):
            found = load_labels(opts["label_path"], dataset)
            if found.transition is None:
                raise dnnlib.UserError(
                    f"{opts['label_path']}: says neither what T is nor which classes the images have; "
                    "without a label file, T is estimated"
                )
        return lambda: found.transition, found.posterior

    def estimate() -> np.ndarray:
        print0("Estimating how the labels were corrupted, as detect_noise.py does.")
        plain = ImageDataset(opts["data"], cache=opts["cache"]) if opts["xflip"] else dataset
        # As long as it needs, but at most half as long as the run itself.
        n, most = len(plain), config.total_nimg // 2
        epochs = None if most >= max(gce.EPOCHS * n, gce.IMAGES) else max(most // n, 1)
        found, _ = gce.detect(plain, device, Settings(arch=CONV, epochs=epochs, seed=config.seed))
        return found.transition

    return estimate, None


if __name__ == "__main__":
    main()
