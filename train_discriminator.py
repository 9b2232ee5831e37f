"""Train SBDC's discriminator: is this the right label for this image?

It corrects the sampling of a model that was trained on noisy labels, by rejection or gradient (generate.py).
"""

from __future__ import annotations

import dnnlib.before_torch

import os

import click
import numpy as np
import torch

import dnnlib.cli
from archives.dataset import ImageDataset
from archives.label_file import LabelFile
from archives.label_table import load_labels_or_table
from dnnlib.cli import BOOL, FloatRange, blame, given_options
from torch_utils import distributed, persistence
from torch_utils.distributed import print0
from training import options, run
from training.config import DiscriminatorConfig
from training.objective import split_items
from training.objectives.classifier import check_classifier
from training.objectives.discriminator import DiscriminatorObjective, believed
from training.objectives.simix import EMBEDDINGS, nearest_partners

EXAMPLES = """
Examples:
  python train_discriminator.py --outdir=discriminator-runs --data=datasets/digits_sym40.zip --label-path=labels.npz \\
      --preset=digits
  torchrun --standalone --nproc_per_node=1 train_discriminator.py --outdir=discriminator-runs \\
      --data=datasets/cifar10_sym_40-32x32.zip --label-path=labels.npz --cond=1 --arch=ddpmpp --batch 1024 --simix 1
"""


# fmt: off
@click.command(cls=dnnlib.cli.Command, help=__doc__, epilog=EXAMPLES + options.preset_help("train_discriminator.py"))
@options.run_options("train_discriminator.py", cond=True, duration=10.0, batch=1024, dropout=0.1)
@options.encoder_options()
@options.noise_options("sym", "asym", "pair", "matrix")
@click.option("--label-path", metavar="NPZ|CSV", required=True,
              help="Which labels are believed right: a label file of detect_noise.py, or one in a published layout")
@click.option("--shuffle", type=click.Choice(["uniform", "transition"]),
              help="Which label a right pair gets when it is made wrong: any other, or one that the label noise "
                   "draws  [default: transition where --noise_type or the label file says what T is, else uniform]")
@click.option("--suggested", type=BOOL,
              help="Where a label is believed wrong, take the label file's suggestion for a right pair; 0: only take "
                   "that label for a wrong pair, as published  [default: 1; a run of version 0.1 continues with 0]")
@click.option("--simix", type=BOOL, default=True, help="Mix half of each batch with similar images; 0: with any images")
@click.option("--embed", type=click.Choice(EMBEDDINGS),
              help="Features that decide what is similar, for --simix=1  [default: classifier if any, else pixels]")
@click.option("--cls", metavar="PKL|DIR|URL", help="Classifier that gives those features  "
              "[default: the one that detect_noise.py wrote beside the label file]")
@click.option("--optimizer", type=click.Choice(["adam", "adamw", "sgd"]), default="adam", help="Optimizer")
@click.option("--shift", metavar="SHARE", type=FloatRange(min=0, max=0.5), default=0.125,
              help="Random whole-pixel shifts up to this share of the image size")
@click.option("--calibrate", metavar="SHARE", type=FloatRange(min=0, max=0.5),
              help="Hold out this share of the images to calibrate the logits at each noise level, which generate.py "
                   "--dg_mode=rejection needs; 0: train on all images, as published  "
                   "[default: 0.1; a run of version 0.1 continues with 0]")
# fmt: on
def main(**opts) -> None:
    if opts["shuffle"] == "uniform" and (unused := [name for name in given_options() if name.startswith("--noise_")]):
        raise click.UsageError(f"{unused[0]}: --shuffle=uniform follows no label noise; leave one of them out")
    path, embed = choose_embedding(opts["simix"], opts["embed"], opts["cls"], opts["label_path"])

    def make(config, dataset, device):
        with blame("--label-path"):
            known = load_labels_or_table(opts["label_path"], dataset)
        stated = options.stated_transition(**options.noise_settings(opts), dataset=dataset)
        transition = choose_transition(opts["shuffle"], stated, known, opts["label_path"])
        belief = believed(known, config.discriminator.suggested)
        split = split_items(dataset, share, config.seed) if (share := config.discriminator.calibrate) else None
        partners = None
        if opts["simix"]:
            partners = find_partners(dataset, device, embed, path, opts["trust_pickle"], split and split[0])
        print0(
            f"Labels believed right: {known.is_clean.mean():.1%}; "
            f"replaced by suggestions: {np.mean(belief['right'] & ~known.is_clean):.1%}. "
            f"Shuffle: {'uniform' if transition is None else 'transition'}. "
            f"Mixed up with: {f'similar images, by {embed}' if opts['simix'] else 'any image'}. "
            f"Held out: {f'{len(split[0]):,} images, to calibrate' if split else 'none'}."
        )
        return DiscriminatorObjective(
            config,
            dataset,
            device,
            transition=transition,
            noise_rates=known.per_class_noise_rate,
            partners=partners,
            split=split,
            **belief,
        )

    own = {name: opts[name] for name in ("label_path", "shuffle", "suggested", "simix", "shift", "calibrate")}
    section = DiscriminatorConfig(embed=embed, cls=path, **own, **options.noise_settings(opts))
    run.start(opts, DiscriminatorObjective.method, make, options.resnet, require_labels=True, discriminator=section)


def choose_embedding(
    simix: bool, embed: str | None, cls: str | None, label_path: str
) -> tuple[str | None, str | None]:
    """Return the classifier's snapshot and the features for SiMix; None for what it does not need."""
    if embed is not None and not simix:
        raise click.UsageError(f"--embed={embed}: belongs to --simix=1")
    if cls is not None and not (simix and embed in (None, "classifier")):
        raise click.UsageError("--cls: only --simix=1 --embed=classifier uses it")
    if not simix:
        return None, None
    with blame("--cls"):
        path = persistence.find_snapshot(cls) if cls else None
    beside = os.path.splitext(label_path)[0] + "-classifier.pkl"
    if path is None and embed in (None, "classifier") and os.path.isfile(beside):
        path = beside
    if embed == "classifier" and path is None:
        raise click.UsageError("--embed=classifier: needs --cls, a snapshot of train_classifier.py or detect_noise.py")
    return path, embed or ("classifier" if path else "pixels")


def choose_transition(
    shuffle: str | None, stated: np.ndarray | None, known: LabelFile, label_path: str
) -> np.ndarray | None:
    """Return the T that the shuffle follows: the stated one, else the label file's estimate; None: uniform."""
    transition = known.transition if stated is None else stated
    if transition is None and shuffle == "transition":
        raise click.UsageError(f"--shuffle=transition: {label_path} estimates no transition; state --noise_type")
    return None if shuffle == "uniform" else transition


def find_partners(
    dataset: ImageDataset, device, embed: str, path: str | None, trust_pickle: bool, held_out: torch.Tensor | None
) -> np.ndarray:
    """Return which images SiMix mixes with each image, int64 [N,2]; none of those `held_out`. Collective."""

    def load() -> torch.nn.Module:
        snapshot = persistence.load_snapshot(path, trust_pickle=trust_pickle, kind="classifier")
        check_classifier(snapshot, dataset, path)
        return snapshot["ema"].to(device)

    with blame("--cls"):
        classifier = None if path is None else distributed.together(load)
    with blame(f"--simix=1 --embed={embed}"):
        return nearest_partners(dataset, embed, classifier, device, held_out=held_out)


if __name__ == "__main__":
    main()
