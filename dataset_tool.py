"""Turn images from any source into an archive for training, and add label noise or outliers if asked to.

python dataset_tool.py --source=digits --dest=datasets/digits-8x8.zip
"""

from __future__ import annotations

import dnnlib.before_torch

import click

import dnnlib
from archives.build import Summary, build_archive, plan_noise, plan_outliers, replace_labels
from archives.options import NOISE_TYPES, DatasetOptions, Resolution, check_usage
from archives.sources import PHOTO_CROPS, open_source
from archives.writer import TRANSFORMS, check_destination, make_transform
from dnnlib.cli import FloatRange, blame

EPILOG = f"""
What --source and --outliers can name:
  digits                     1,797 handwritten digits, 8x8 gray, from scikit-learn
  photos                     random square crops of two photographs, from scikit-learn; the class is the photograph.
                             --max-images says how many ({PHOTO_CROPS:,} without it), --resolution their size (32x32)
  a folder or a ZIP          of images; labels come from dataset.json, or from one subfolder per class
  a file .tar.gz             CIFAR-10 or CIFAR-100, python version
  a folder of .gz files      MNIST, or Fashion-MNIST if the path contains 'fashion'; the image file works as well
  a folder with data.mdb     LSUN; needs the package lmdb

Examples. Images from several sources:
  python dataset_tool.py --source=digits --dest=datasets/digits-8x8.zip
  python dataset_tool.py --source=photos --dest=datasets/photos-64x64.zip --max-images=16000 --resolution=64x64
  python dataset_tool.py --source=my_images/ --dest=datasets/mine-64x64.zip --transform=center-crop --resolution=64x64
  python dataset_tool.py --source=downloads/cifar10/cifar-10-python.tar.gz --dest=datasets/cifar10-32x32.zip
  python dataset_tool.py --source=downloads/cifar10/cifar-10-python.tar.gz --dest=datasets/cifar10-test.zip --eval

With label noise; dataset.json keeps the clean labels too:
  python dataset_tool.py --source=digits --dest=datasets/digits_sym_40-8x8.zip --noise_type=sym --noise_rate=0.4
  python dataset_tool.py --source=downloads/cifar10/cifar-10-python.tar.gz \\
      --dest=datasets/cifar10_sym_40-32x32.zip --noise_type=sym --noise_rate=0.4

With outliers, each of which takes the size, the channels and the label of the image it replaces:
  python dataset_tool.py --source=photos --dest=datasets/photos_digits10-8x8.zip --resolution=8x8 --channels=1 \\
      --outliers=digits --perturb_percent=10
"""


# fmt: off
@click.command(cls=dnnlib.cli.Command, epilog=EPILOG)
@click.option("--source", required=True, metavar="PATH|digits|photos", help="Images to read (see below)")
@click.option("--dest", required=True, metavar="ZIP|DIR", help="Archive to write: a .zip, or an empty or new folder")
@click.option("--eval", is_flag=True, help="Take the test part of CIFAR or MNIST instead of the training part")
@click.option("--max-images", type=click.IntRange(min=1), metavar="INT", help="Use only the first images of the source")
@click.option("--transform", type=click.Choice(TRANSFORMS), help="Crop to a square, or to W:H in a black square")
@click.option("--resolution", type=Resolution(), help="Size of the images in pixels  [default: that of the source]")
@click.option("--channels", type=click.Choice(["1", "3"]), help="Make all images gray (1) or RGB (3)")
@click.option("--outliers", metavar="PATH|digits|photos", help="Replace some of the images by images of this source")
@click.option("--perturb_percent", type=FloatRange(0, 100), metavar="FLOAT", help="How many of them, in percent")
@click.option("--labels", metavar="FILE", help="Replace the labels by those in a .json, .npy, .npz or .pt file, "
              "or follow the decisions in a .csv")
@click.option("--label_key", metavar="NAME", help="Entry of the --labels file, if it has several")
@click.option("--noise_type", type=click.Choice(NOISE_TYPES), help="Add label noise of this type")
@click.option("--noise_rate", type=FloatRange(0, 1), metavar="FLOAT", help="Probability of a wrong label, 0 to 1")
@click.option("--noise_matrix", metavar="FILE", help="Row-stochastic matrix for --noise_type=matrix: .npy, .json, .npz")
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="INT", help="Seed of noise, outliers, photos")
@click.option("--workers", type=click.IntRange(min=0), default=0, metavar="INT", help="Processes; 0: one per core")
# fmt: on
def main(**options) -> None:
    """Turn images from any source into an archive for training, and add label noise or outliers if asked to.

    The archive is a ZIP or a folder of PNGs with dataset.json, as EDM and StyleGAN read it. dataset.json also records
    the clean labels, which images are outliers, and how the archive was made.
    """
    o = DatasetOptions(**options)
    check_usage(o)
    with blame("--dest"):
        check_destination(o.dest)  # before reading a large source
    with blame("--source --eval" if o.eval else "--source"):
        source = open_source(o.source, o.eval, o.max_images or PHOTO_CROPS, o.seed)
    if o.labels is not None:
        with blame("--labels"):
            replace_labels(source, o.labels, o.label_key)
    noise = outliers = None
    if o.noise_type is not None:
        with blame(f"--noise_type={o.noise_type}"):
            noise = plan_noise(source, o.noise_type, o.noise_rate, o.noise_matrix, o.seed)
    if o.outliers is not None:
        with blame("--outliers"):
            outliers = plan_outliers(source, o.outliers, o.perturb_percent, o.seed, o.max_images)
    size = (32, 32) if o.resolution is None and o.source == "photos" else o.resolution
    channels = None if o.channels is None else int(o.channels)
    summary = build_archive(
        source, o.dest, make_transform(o.transform, size),
        noise=noise, outliers=outliers, max_images=o.max_images, channels=channels, workers=o.workers,
    )  # fmt: skip
    print(describe(summary))


def describe(summary: Summary) -> str:
    """Return what was written as a few lines of text."""
    height, width, depth = summary.shape
    rate = summary.realized_rate
    lines = [
        f"Images:      {summary.images:,}" + (f" ({summary.left_out:,} too small)" if summary.left_out else ""),
        f"Classes:     {summary.classes or 'no labels'}",
        f"Resolution:  {width}x{height}, {'gray' if depth == 1 else 'RGB'}",
    ]
    if summary.outliers is not None:
        lines.append(f"Outliers:    {summary.outliers:,} of the images")
    lines.append("Label noise: " + ("unknown" if rate is None else f"{rate:.2%} of the labels are wrong"))
    lines.append(f"Written to:  {summary.path}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
