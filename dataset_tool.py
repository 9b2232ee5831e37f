"""Turn images from any source into an archive for training, and add label noise or outliers if asked to.

python dataset_tool.py --source=digits --dest=datasets/digits-8x8.zip
"""

from __future__ import annotations

import dnnlib.before_torch

import click

import dnnlib
from archives.build import build_archive, plan_noise, plan_outliers, replace_labels
from archives.options import DatasetOptions, check_usage, dataset_options
from archives.sources import PHOTO_CROPS, open_source
from archives.summary import describe
from archives.writer import check_destination, make_transform
from dnnlib.cli import blame

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


@click.command(cls=dnnlib.cli.Command, epilog=EPILOG)
@dataset_options()
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
    dnnlib.print_notes(source.notes)
    summary = build_archive(
        source, o.dest, make_transform(o.transform, size),
        noise=noise, outliers=outliers, max_images=o.max_images, channels=channels, workers=o.workers,
    )  # fmt: skip
    print(describe(summary))


if __name__ == "__main__":
    main()
