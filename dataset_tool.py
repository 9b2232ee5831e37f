"""Turn images from any source into an archive for training, and add label noise or outliers if asked to.

python dataset_tool.py --source=digits --dest=datasets/digits-8x8.zip
"""

from __future__ import annotations

import dnnlib.before_torch

import click

import dnnlib
from archives.build import build_archive, plan_noise, plan_outliers
from archives.decisions import holds_decisions
from archives.options import DatasetOptions, check_usage, dataset_options
from archives.relabel import SOURCE, compact_labels, declare_clean, replace_labels, select_images
from archives.sources import PHOTO_CROPS, open_source
from archives.summary import describe
from archives.writer import check_destination, make_transform
from dnnlib.cli import blame

EPILOG = f"""
What --source and --outliers can name:
  digits                     1,797 handwritten digits, 8x8 gray, from scikit-learn
  photos                     random square crops of two photographs, from scikit-learn; the class is the photograph.
                             --max-images says how many ({PHOTO_CROPS:,} without it), --resolution their size (32x32)
  a folder or a ZIP          of images; labels come from dataset.json, metadata.csv, or one subfolder per class
  a published data set       MNIST, Fashion-MNIST, CIFAR-10 and -100, STL-10, CelebA, Clothing1M, WebVision, Food-101N,
                             ANIMAL-10N, LSUN: its folder or file (docs/data.md)
  a file .npz or .pk         of images, and perhaps labels, as arrays

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
        check_destination(o.dest, o.overwrite)  # before reading a large source
    with blame("--labels"):
        replaced = o.labels is not None and not holds_decisions(o.labels)  # decisions are about the source's own labels
        if o.labels is not None and not replaced and o.clean_labels == SOURCE:
            raise dnnlib.UserError(f"{o.labels}: holds decisions, which correct labels of the source, but "
                                   f"--clean_labels={SOURCE} declares these labels clean")  # fmt: skip
    kind = o.label_key if o.labels is None else None
    chosen = {"--source": True, "--eval": o.eval, f"--part={o.part}": o.part, f"--label_key={kind}": kind}
    with blame(" ".join(option for option, given in chosen.items() if given)):
        source = open_source(o.source, o.eval, o.max_images or PHOTO_CROPS, o.seed, part=o.part, label_kind=kind,
                             background=o.background, need_labels=not replaced)  # fmt: skip
    labeled = None
    if o.labels is not None:
        with blame("--labels"):
            labeled = replace_labels(source, o.labels, o.label_key, o.skip_unlabeled, o.skip_damaged)
    if o.clean_labels is not None:
        with blame("--clean_labels"):
            declare_clean(source, o.clean_labels, o.clean_label_key, replaced, o.skip_damaged, labeled)
    if labeled is not None:
        with blame("--labels"):
            select_images(source, labeled, "images have no label")
    if o.compact_labels:
        with blame("--compact_labels"):
            compact_labels(source, o.max_images)
    noise = outliers = None
    if o.noise_type is not None:
        with blame(f"--noise_type={o.noise_type}"):
            noise = plan_noise(source, o.noise_type, o.noise_rate, o.noise_matrix, o.seed, o.max_images)
    if o.outliers is not None:
        with blame("--outliers"):
            outliers = plan_outliers(source, o.outliers, o.perturb_percent, o.seed, o.max_images, o.background)
    size = (32, 32) if o.resolution is None and o.source == "photos" else o.resolution
    channels = None if o.channels is None else int(o.channels)
    summary = build_archive(
        source, o.dest, make_transform(o.transform, size, o.background or (0, 0, 0)),
        noise=noise, outliers=outliers, max_images=o.max_images, channels=channels, skip_damaged=o.skip_damaged,
        overwrite=o.overwrite, workers=o.workers,
    )  # fmt: skip
    notes = [*source.notes, *summary.notes]  # only now: an error is all that a failed run says
    if summary.oblong and o.transform is None:
        shapes = f"{summary.oblong:,} of {summary.images:,} images are not square and were squashed"
        notes.append(f"{shapes} (--transform=center-crop crops them, --transform=pad pads them)")
    if summary.enlarged:
        below = f"{summary.enlarged:,} of {summary.images:,} images are smaller than the resolution and were enlarged"
        notes.append(f"{below} (a lower --resolution avoids that)")
    dnnlib.print_notes(notes)
    print(describe(summary))


if __name__ == "__main__":
    main()
