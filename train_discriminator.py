"""Train SBDC's discriminator: is this the right label for this image? Its gradient corrects the sampling of a diffusion
model that was trained on noisy labels (generate.py --discriminator).
"""

from __future__ import annotations

import os

import click
import numpy as np
import torch

import dnnlib.cli
from archives.dataset import ImageDataset
from archives.label_file import LabelFile, load_label_file
from dnnlib.cli import BOOL, FloatRange
from torch_utils import distributed, persistence
from torch_utils.distributed import print0
from training import options
from training.objectives.discriminator import DiscriminatorObjective
from training.objectives.simix import EMBEDDINGS, nearest_partners
from training.objectives.tdsm import check_classifier

EXAMPLES = """
Examples:
  python train_discriminator.py --outdir=discriminator-runs --data=datasets/digits_sym40.zip --label-path=labels.npz \\
      --arch=ddpmpp_tiny --augment=0 --duration=0.4 --batch=256 --lr=3e-3 --lr_rampup_kimg=10 --ema=0.02 --dropout=0 \\
      --shift=0 --P_mean=0.2 --P_std=0.9 --tick=20
  torchrun --standalone --nproc_per_node=1 train_discriminator.py --outdir=discriminator-runs \\
      --data=datasets/cifar10_sym_40-32x32.zip --label-path=labels.npz --cond=1 --arch=ddpmpp --batch 1024 --simix 1
"""


@click.command(cls=dnnlib.cli.Command, help=__doc__, epilog=EXAMPLES)
@options.training_options(cond=True, duration=10.0, batch=1024, dropout=0.1, ema=0.05)
@options.noise_options("sym", "asym", "pair", "matrix")
@click.option(
    "--label-path",
    metavar="NPZ",
    required=True,
    help="Which labels are believed right: a label file of detect_noise.py, or one in a published layout",
)
@click.option(
    "--shuffle",
    type=click.Choice(["uniform", "transition"]),
    help="How right pairs become wrong ones: any other label, or as the label noise does it "
    "[default: transition when --noise_type states it or the label file estimates it]",
)
@click.option("--simix", type=BOOL, default=True, help="Mix half of each batch with similar images; 0: with any")
@click.option(
    "--embed",
    type=click.Choice(EMBEDDINGS),
    help="What similar means, for --simix=1 [default: classifier where there is one, else pixels]",
)
@click.option(
    "--cls",
    metavar="PKL|DIR|URL",
    help="Classifier whose features tell what is similar "
    "[default: detect_noise.py's, where it lies beside the label file]",
)
@click.option("--optimizer", type=click.Choice(["adam", "adamw", "sgd"]), default="adam", help="Optimizer")
@click.option(
    "--shift",
    metavar="SHARE",
    type=FloatRange(min=0, max=0.5),
    default=0.125,
    help="Random whole-pixel shifts up to this share of the image size",
)
def main(**opts) -> None:
    o = dnnlib.EasyDict(opts)
    if o.embed is not None and not o.simix:
        raise click.UsageError(f"--embed={o.embed}: belongs to --simix=1")
    if o.cls is not None and not (o.simix and o.embed in (None, "classifier")):
        raise click.UsageError("--cls: only --simix=1 --embed=classifier uses it")
    path = persistence.find_snapshot(o.cls) if o.cls else None
    beside = os.path.splitext(o.label_path)[0] + "-classifier.pkl"
    if o.simix and path is None and o.embed in (None, "classifier") and os.path.isfile(beside):
        path = beside
    if o.embed == "classifier" and path is None:
        raise click.UsageError("--embed=classifier: needs --cls, a snapshot of train_classifier.py or detect_noise.py")
    embed = o.embed or ("classifier" if path else "pixels")

    def make(config: dict, dataset: ImageDataset, device: torch.device) -> DiscriminatorObjective:
        known = load_label_file(o.label_path, dataset)
        transition = chosen_transition(o, known, dataset)
        partners = distributed.together(lambda: similar(dataset, device, embed, path, o)) if o.simix else None
        print0(
            f"Labels believed right: {known.is_clean.mean():.1%}. "
            f"Shuffle: {'uniform' if transition is None else 'transition'}. "
            f"Mixed up with: {f'similar images, by {embed}' if o.simix else 'any image'}."
        )
        return DiscriminatorObjective(
            config,
            dataset,
            device,
            is_clean=known.is_clean,
            transition=transition,
            noise_rates=known.per_class_noise_rate,
            partners=partners,
        )

    options.run(
        opts,
        "discriminator",
        make,
        require_labels=True,
        discriminator=dict(
            label_path=o.label_path,
            shuffle=o.shuffle,
            simix=o.simix,
            embed=embed if o.simix else None,
            cls=path,
            shift=o.shift,
            noise_type=o.noise_type,
            noise_rate=o.noise_rate,
            noise_matrix=o.noise_matrix,
        ),
    )


def chosen_transition(o: dnnlib.EasyDict, known: LabelFile, dataset: ImageDataset) -> np.ndarray | None:
    """T that --shuffle follows: as stated, else as the label file estimates it; None: uniform."""
    if o.shuffle == "uniform":
        return None
    stated = options.stated_transition(o.noise_type, o.noise_rate, o.noise_matrix, dataset)
    transition = known.transition if stated is None else stated
    if transition is None and o.shuffle == "transition":
        raise click.UsageError(f"--shuffle=transition: {o.label_path} estimates no transition; state --noise_type")
    return transition


def similar(
    dataset: ImageDataset, device: torch.device, embed: str, path: str | None, o: dnnlib.EasyDict
) -> np.ndarray:
    """Partners for SiMix, int64 [N,2]."""
    classifier = None
    if path is not None:
        classifier = persistence.load_snapshot(path, trust_pickle=o.trust_pickle, kind="classifier")["ema"].to(device)
        check_classifier(classifier, dataset, path)
    return nearest_partners(dataset, embed, classifier, device)


if __name__ == "__main__":
    main()
