"""Measure how good generated images are. The metrics and their meaning are described in docs/metrics.md.

\b
Examples:
  python fid.py evaluate --images=out --data=datasets/digits.zip --detector=pixels --out=out.json
  python fid.py compare --images=a --images=b --data=datasets/digits.zip --detector=pixels --chart=ab.png
  python fid.py ref --data=datasets/digits.zip --dest=fid-refs/digits.npz --detector=pixels
  python fid.py calc --images=out --ref=fid-refs/digits.npz --num=1000 --detector=pixels
  torchrun --standalone --nproc_per_node=2 fid.py evaluate --images=out --data=datasets/digits.zip --detector=pixels
"""

from __future__ import annotations

import dnnlib.before_torch

from typing import Any

import click

import dnnlib.cli
from archives.archive_set import SEVERAL
from dnnlib.cli import blame
from metrics.features import compute_statistics, feature_width
from metrics.fid import frechet_distance
from metrics.format import format_comparison, format_table, save_json
from metrics.images import open_images
from metrics.options import (
    batch_option,
    detector_option,
    device_option,
    evaluate_files,
    evaluation_options,
    open_detector,
    output_option,
    precision_option,
    seed_option,
)
from metrics.reference import load_reference, save_reference
from reports.plots import bar_chart
from torch_utils import distributed
from torch_utils.precision import tf32


@click.group(cls=dnnlib.cli.Group, help=__doc__)
@click.pass_context
def main(ctx: click.Context) -> None:
    ctx.call_on_close(distributed.shutdown)
    ctx.with_resource(tf32(False))  # PyTorch itself would let convolutions use it


# fmt: off
@main.command(epilog="Example:\n  python fid.py calc --images=out --ref=ref.npz --num=1000 --detector=pixels")
@click.option("--images", metavar="PATH", required=True, help="Generated images: folder, ZIP, or .npz (arr_0)")
@click.option("--ref", metavar="NPZ|URL", required=True, help="Reference: a file of 'fid.py ref' or of EDM")
@click.option("--num", type=click.IntRange(min=2), default=50000, help="Number of images to use")
@detector_option
@precision_option
@seed_option
@batch_option
@device_option
# fmt: on
def calc(images: str, ref: str, num: int, detector: str, precision: str, seed: int, batch: int, device: str) -> None:
    """Compute the FID of images against a reference."""
    device = distributed.init(device)
    with blame("--ref"):
        reference = load_reference(ref)
    with blame(f"--precision={precision}"):
        reference.check_precision(precision)
    with blame("--images"):
        source = open_images(images, num, seed)
    extractor = open_detector(detector, precision, device)
    with blame("--ref"):
        reference.check_width(feature_width(source, extractor, device))
    distributed.print0(f"Calculating FID of {len(source)} images in {images}...")
    _, mu, sigma = compute_statistics(source, extractor, batch, device)
    distributed.print0(f"{frechet_distance(reference.mu, reference.sigma, mu, sigma):g}")


# fmt: off
@main.command(epilog="Example:\n  python fid.py ref --data=datasets/digits.zip --dest=ref.npz --detector=pixels")
@click.option("--data", metavar="PATH", required=True,
              help=f"Archive of real images: ZIP, folder, or .npz (arr_0). {SEVERAL}")
@output_option("--dest", metavar="NPZ", required=True, help="Reference file to write")
@detector_option
@precision_option
@batch_option
@device_option
# fmt: on
def ref(data: str, dest: str, detector: str, precision: str, batch: int, device: str) -> None:
    """Write a reference for calc.

    It holds the mean and the covariance of the features of an archive.
    """
    device = distributed.init(device)
    with blame("--data"):
        source = open_images(data)
    extractor = open_detector(detector, precision, device)
    count, mu, sigma = compute_statistics(source, extractor, batch, device)
    if distributed.get_rank() == 0:
        save_reference(dest, mu, sigma, precision)
    distributed.print0(f"Wrote {dest}: {len(mu)} features of {count} images.")


# fmt: off
@main.command(epilog="Example:\n  python fid.py evaluate --images=out --data=datasets/digits.zip --detector=pixels --out=out.json")  # noqa: E501
@click.option("--images", metavar="PATH", required=True,
              help="Generated images: folder or ZIP (labels in its dataset.json), or .npz (arr_0 images, arr_1 labels)")
@evaluation_options
@output_option("--out", metavar="JSON", help="Save all values here, also those of each class")
# fmt: on
def evaluate(images: str, out: str | None, device: str, **options: Any) -> None:
    """Print all metrics of one set of images.

    These are FID, KID, IS, precision, recall, density and coverage, means over classes of these (cw_...), label
    accuracy, CAS and the outlier ratio.
    """
    for result in evaluate_files([images], distributed.init(device), **options):
        if out is not None:
            save_json(result, out)
        print(format_table(result))


# fmt: off
@main.command(epilog="Example:\n  python fid.py compare --images=a --images=b --data=datasets/digits.zip --detector=pixels")  # noqa: E501
@click.option("--images", metavar="PATH", required=True, multiple=True,
              help="Generated images, as for evaluate; give this option once for each set")
@evaluation_options
@output_option("--out", metavar="JSON", help="Save all values here, as a list with one entry per set")
@output_option("--chart", metavar="PNG", help="Draw the metrics as bars into this file")
# fmt: on
def compare(images: tuple[str], out: str | None, chart: str | None, device: str, **options: Any) -> None:
    """Print the metrics of several sets of images side by side."""
    results = evaluate_files(images, distributed.init(device), **options)
    if results:
        if out is not None:
            save_json(results, out)
        if chart is not None:
            bar_chart(results, chart)
        print(format_comparison(results))


if __name__ == "__main__":
    main()
