"""Options of `fid.py`, declared once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from dnnlib.cli import output_file
from metrics.bootstrap import LEVEL
from metrics.cas import CAS_ARCHS, CAS_EPOCHS
from metrics.detectors import DETECTORS, PRECISIONS
from metrics.inception_score import IS_SPLIT

__all__ = [
    "batch_option",
    "detector_option",
    "device_option",
    "measuring",
    "output_option",
    "precision_option",
    "seed_option",
]


def need_detector(_ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    if value is None:
        raise click.BadParameter(f"is missing; choose {DETECTORS}", param=param)
    return value


detector_option = click.option(
    "--detector",
    "detector_name",
    metavar="NAME",
    callback=need_detector,
    help=f"What turns images into features (required): {DETECTORS}",
)
precision_option = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    help="Arithmetic of the detector; bf16 is faster on a GPU, but its figures compare with each other only",
)
batch_option = click.option("--batch", type=click.IntRange(min=1), default=64, help="Images a batch and process")
seed_option = click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    help="Chooses the images if there are more than --num, and all that is random",
)
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", help="Where the detector runs"
)


def output_option(*names: str, metavar: str, help: str, **kwargs: Any) -> Callable:
    """Option for a file to write, refused at once where it cannot be."""
    return click.option(*names, metavar=metavar, callback=output_file, help=help, **kwargs)


def measuring(function: Callable) -> Callable:
    """The options that `evaluate` and `compare` share."""
    options = [
        click.option(
            "--data",
            metavar="PATH",
            required=True,
            help="Reference archive, less the outliers it records, with its clean labels where it has them",
        ),
        detector_option,
        precision_option,
        click.option("--num", type=click.IntRange(min=2), help="Number of generated images to use  [default: all]"),
        seed_option,
        batch_option,
        click.option(
            "--nearest_k",
            type=click.IntRange(min=1),
            default=5,
            help="Neighbours that make the radius for precision, recall, density, coverage",
        ),
        click.option(
            "--splits",
            metavar="IMAGES",
            type=click.IntRange(min=1),
            default=IS_SPLIT,
            help="Images in each split of the inception score",
        ),
        click.option(
            "--bootstrap",
            metavar="DRAWS",
            type=click.IntRange(min=10),
            help=f"Add {LEVEL:.0%} intervals from so many resampled sets of the images, 200 say  [default: none]",
        ),
        click.option(
            "--judge",
            metavar="svm|none|PKL",
            default="svm",
            help="Label accuracy by an SVM trained on the reference, or by a classifier snapshot",
        ),
        output_option(
            "--features",
            metavar="NPZ",
            help="Keep features in this file, and take them from it when the same are asked for again",
        ),
        click.option(
            "--test",
            metavar="PATH",
            help="Archive of real images: adds CAS, the accuracy on them of a classifier trained on the "
            f"generated images for {CAS_EPOCHS} epochs",
        ),
        click.option(
            "--cas_arch",
            type=click.Choice(CAS_ARCHS),
            default=CAS_ARCHS[0],
            help="That classifier; resnet50 needs torchvision",
        ),
        click.option(
            "--outlier_data",
            metavar="PATH",
            help="Archive that records its outliers, to learn the outlier ratio from  [default: --data, if it does]",
        ),
        device_option,
    ]
    for option in reversed(options):
        function = option(function)
    return function
