"""Builds image archives for training, with or without label noise and outliers.

python dataset_tool.py --source=digits --dest=datasets/digits-8x8.zip
python dataset_tool.py --source=downloads/cifar10/cifar-10-python.tar.gz --dest=datasets/cifar10-32x32.zip
python dataset_tool.py --source=downloads/cifar10/cifar-10-python.tar.gz \\
    --dest=datasets/cifar10_sym_40-32x32.zip --noise_type=sym --noise_rate=0.4
python dataset_tool.py --source=photos --dest=datasets/photos_digits10-8x8.zip --resolution=8x8 --channels=1 \\
    --outliers=digits --perturb_percent=10
python dataset_tool.py --source=my_images/ --dest=datasets/mine-64x64.zip --transform=center-crop --resolution=64x64
"""

from __future__ import annotations

import re

import click

import dnnlib
from archives.build import Noise, Outliers, build_archive, replace_labels
from archives.sources import PHOTO_CROPS, open_source
from archives.writer import TRANSFORMS, check_destination, make_transform
from dnnlib.cli import FloatRange

EPILOG = f"""
Sources: digits (built in), photos (built in: random square crops of scikit-learn's two photographs, labelled by
photograph; --max-images of them, {PHOTO_CROPS} without it, and 32x32 without --resolution), a folder or ZIP of images
(labels from dataset.json or from sub-folders), a CIFAR-10 or CIFAR-100 archive (python version, .tar.gz), MNIST or
Fashion-MNIST (a folder with the .gz files, or the image file; a path that contains 'fashion' is Fashion-MNIST), an
LSUN LMDB folder.

Outliers: each has the size, the channels and the label of the image it replaces; dataset.json lists their names.

Examples:
  python dataset_tool.py --source=photos --dest=datasets/photos_digits10-8x8.zip --resolution=8x8 --channels=1 \\
      --outliers=digits --perturb_percent=10
  python dataset_tool.py --source=digits --dest=datasets/digits_sym_40-8x8.zip --noise_type=sym --noise_rate=0.4
"""
NOISE_TYPES = ("sym", "asym", "pair", "instance", "matrix")


class Resolution(click.ParamType):
    """WxH -> (width, height)."""

    name = "WxH"

    def convert(
        self, value: str | tuple[int, int], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([1-9]\d{0,4})[xX]([1-9]\d{0,4})", value)
        if match is None:
            self.fail(f"'{value}' is not of the form WxH, such as 64x64", param, ctx)
        return int(match[1]), int(match[2])


# fmt: off
@click.command(cls=dnnlib.cli.Command, epilog=EPILOG)
@click.option("--source", required=True, metavar="PATH|digits|photos", help="Images to read (see below)")
@click.option("--dest", required=True, metavar="ZIP|DIR", help="Archive to write: a .zip, or an empty or new folder")
@click.option("--eval", "test", is_flag=True, help="Test part of CIFAR and MNIST instead of the training part")
@click.option("--max-images", type=click.IntRange(min=1), metavar="INT", help="Use only the first images of the source")
@click.option("--transform", type=click.Choice(TRANSFORMS), help="Crop to a square, or to W:H within a black square")
@click.option("--resolution", type=Resolution(), help="Size of the images in pixels  [default: that of the source]")
@click.option("--channels", type=click.Choice(["1", "3"]), help="Make all images grey (1) or RGB (3)")
@click.option("--outliers", metavar="PATH|digits|photos", help="Replace some of the images by images of this source")
@click.option("--perturb_percent", type=FloatRange(0, 100), metavar="FLOAT", help="How many of them, in percent")
@click.option("--labels", metavar="FILE", help="Replace the labels: .json, .npy, .npz or .pt file")
@click.option("--label_key", metavar="NAME", help="Entry of the --labels file, where it has several")
@click.option("--noise_type", type=click.Choice(NOISE_TYPES), help="Label noise to add")
@click.option("--noise_rate", type=FloatRange(0, 1), metavar="FLOAT", help="Probability of a wrong label, 0 to 1")
@click.option("--noise_matrix", metavar="FILE", help="Row-stochastic matrix for --noise_type=matrix: .npy, .json, .npz")
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="INT", help="Seed of noise, outliers, photos")
@click.option("--workers", type=click.IntRange(min=0), default=0, metavar="INT", help="Threads; 0: one a core")
# fmt: on
def main(
    source: str, dest: str, test: bool, max_images: int | None, transform: str | None,
    resolution: tuple[int, int] | None, channels: str | None, outliers: str | None, perturb_percent: float | None,
    labels: str | None, label_key: str | None, noise_type: str | None, noise_rate: float | None,
    noise_matrix: str | None, seed: int, workers: int,
) -> None:  # fmt: skip
    """Build a dataset archive from images, optionally with label noise and outliers.

    The archive is a ZIP (or a folder) of PNGs with dataset.json, as EDM and StyleGAN read it. It records the clean
    labels, which images are outliers, and how all that was made.
    """
    check_usage(
        transform, resolution, labels, label_key, noise_type, noise_rate, noise_matrix, outliers, perturb_percent
    )
    check_destination(dest)  # before reading a large source
    opened = open_source(source, test, max_images or PHOTO_CROPS, seed)
    if source == "photos":
        resolution = resolution or (32, 32)
    if labels is not None:
        replace_labels(opened, labels, label_key)
    noise = Noise(noise_type, noise_rate, noise_matrix, seed) if noise_type else None
    foreign = Outliers(outliers, perturb_percent, seed) if outliers is not None else None
    kind = int(channels) if channels else None
    summary = build_archive(
        opened, dest, make_transform(transform, resolution), noise, max_images, workers, kind, foreign
    )

    height, width, depth = summary.shape
    rate = summary.realised_rate
    print(f"Images:      {summary.images:,}" + (f" ({summary.left_out:,} too small)" if summary.left_out else ""))
    print(f"Classes:     {summary.classes or 'no labels'}")
    print(f"Resolution:  {width}x{height}, {'grey' if depth == 1 else 'RGB'}")
    if summary.outliers is not None:
        print(f"Outliers:    {summary.outliers:,} of the images")
    print("Label noise: " + ("unknown" if rate is None else f"{rate:.2%} of the labels are wrong"))
    print(f"Written to:  {summary.path}")


def check_usage(
    transform: str | None, resolution: tuple[int, int] | None, labels: str | None, label_key: str | None,
    noise_type: str | None, noise_rate: float | None, noise_matrix: str | None, outliers: str | None,
    perturb_percent: float | None,
) -> None:  # fmt: skip
    """Options that need or exclude each other; click.UsageError."""
    if transform and resolution is None:
        raise click.UsageError(f"--transform={transform} needs --resolution=WxH")
    if resolution is not None and transform != "center-crop-wide" and resolution[0] != resolution[1]:
        raise click.UsageError(f"--resolution={resolution[0]}x{resolution[1]}: must be square, e.g. 64x64")
    if resolution is not None and resolution[0] & (resolution[0] - 1):
        raise click.UsageError(f"--resolution: the width {resolution[0]} must be a power of two, e.g. 64x64")
    if resolution is not None and resolution[1] > resolution[0]:
        raise click.UsageError("--transform=center-crop-wide: the height in --resolution must not exceed the width")
    if label_key is not None and labels is None:
        raise click.UsageError("--label_key needs --labels=FILE")
    if outliers is not None and perturb_percent is None:
        raise click.UsageError(f"--outliers={outliers} needs --perturb_percent=FLOAT, e.g. 5")
    if perturb_percent is not None and outliers is None:
        raise click.UsageError("--perturb_percent needs --outliers=PATH, or digits or photos")
    if noise_type == "matrix":
        if noise_matrix is None:
            raise click.UsageError("--noise_type=matrix needs --noise_matrix=FILE (.npy, .json or .npz)")
        if noise_rate is not None:
            raise click.UsageError("--noise_rate: --noise_type=matrix takes its rates from the matrix, leave it out")
        return
    if noise_matrix is not None:
        raise click.UsageError("--noise_matrix needs --noise_type=matrix")
    if noise_type is not None and noise_rate is None:
        raise click.UsageError(f"--noise_type={noise_type} needs --noise_rate=FLOAT, e.g. 0.4")
    if noise_rate is not None and noise_type is None:
        raise click.UsageError("--noise_rate needs --noise_type (sym, asym, pair or instance)")


if __name__ == "__main__":
    main()
