"""Measure generated images.

\b
  python fid.py evaluate --images=out --data=datasets/digits.zip --detector=pixels --out=out.json
  python fid.py ref --data=datasets/digits.zip --dest=fid-refs/digits.npz --detector=pixels
  python fid.py calc --images=out --ref=fid-refs/digits.npz --num=1000 --detector=pixels
  python fid.py compare --images=a --images=b --data=datasets/digits.zip --detector=pixels --chart=ab.png
  torchrun --standalone --nproc_per_node=2 fid.py calc --images=out --ref=fid-refs/digits.npz --detector=pixels
"""

from __future__ import annotations

from typing import Any

import click

import dnnlib
import dnnlib.cli
from metrics import detectors, features, images, reference, table
from metrics.fid import frechet_distance
from metrics.options import (
    batch_option,
    detector_option,
    device_option,
    measuring,
    output_option,
    precision_option,
    seed_option,
)
from reports import page
from torch_utils import distributed


@click.group(cls=dnnlib.cli.Group, help=__doc__)
@click.pass_context
def main(ctx: click.Context) -> None:
    ctx.call_on_close(distributed.shutdown)


@main.command(epilog="Example: python fid.py calc --images=out --ref=ref.npz --num=1000 --detector=pixels")
@click.option("--images", "image_path", metavar="PATH", required=True, help="Images: folder, ZIP or .npz (arr_0)")
@click.option("--ref", "ref_path", metavar="NPZ|URL", required=True, help="Reference of 'fid.py ref'")
@click.option("--num", type=click.IntRange(min=2), default=50000, help="Number of images to use")
@detector_option
@precision_option
@seed_option
@batch_option
@device_option
def calc(
    image_path: str, ref_path: str, num: int, detector_name: str, precision: str, seed: int, batch: int, device: str
) -> None:
    """FID of images against a reference."""
    device = distributed.init(device)
    mu_ref, sigma_ref = reference.load_reference(ref_path, precision)
    source = images.open_images(image_path, num, seed)
    extractor = detectors.detector(detector_name, device, precision=precision)
    width = features.feature_width(source, extractor, device)
    if width != len(mu_ref):
        raise dnnlib.UserError(
            f"--ref: {ref_path} has {len(mu_ref)} features, --detector={detector_name} gives "
            f"{width}; make the reference with the same detector from images of the same size"
        )
    distributed.print0(f"Calculating FID of {len(source)} images in {image_path}...")
    _, mu, sigma = features.compute_statistics(source, extractor, batch, device)
    distributed.print0(f"{frechet_distance(mu_ref, sigma_ref, mu, sigma):g}")


@main.command(epilog="Example: python fid.py ref --data=digits.zip --dest=ref.npz --detector=pixels")
@click.option("--data", "dataset_path", metavar="PATH", required=True, help="Archive: ZIP, folder or .npz (arr_0)")
@output_option("--dest", "dest_path", metavar="NPZ", required=True, help="Reference to write")
@detector_option
@precision_option
@batch_option
@device_option
def ref(dataset_path: str, dest_path: str, detector_name: str, precision: str, batch: int, device: str) -> None:
    """Reference for 'fid.py calc': mean and covariance of an archive's features."""
    device = distributed.init(device)
    source = images.open_images(dataset_path, option="--data")
    extractor = detectors.detector(detector_name, device, precision=precision)
    count, mu, sigma = features.compute_statistics(source, extractor, batch, device)
    if distributed.get_rank() == 0:
        reference.save_reference(dest_path, mu, sigma, precision)
    distributed.print0(f"Wrote {dest_path}: {len(mu)} features of {count} images.")


@main.command(epilog="Example: python fid.py evaluate --images=out --data=digits.zip --detector=pixels --out=out.json")
@click.option(
    "--images",
    "image_path",
    metavar="PATH",
    required=True,
    help="Generated images: folder or ZIP with dataset.json, or .npz (arr_0 images, arr_1 labels)",
)
@measuring
@output_option("--out", "out_path", metavar="JSON", help="Save the table, classes included")
def evaluate(image_path: str, out_path: str | None, device: str, **settings: Any) -> None:
    """The whole table: FID, KID, IS, precision, recall, density, coverage, class-wise too, label accuracy, CAS."""
    for result in table.evaluate([image_path], device=distributed.init(device), **settings):
        if out_path is not None:
            table.save_json(result, out_path)
        print(table.format_table(result))


@main.command(epilog="Example: python fid.py compare --images=a --images=b --data=digits.zip --detector=pixels")
@click.option(
    "--images",
    "image_paths",
    metavar="PATH",
    required=True,
    multiple=True,
    help="A set of generated images, as for evaluate; once for each set",
)
@measuring
@output_option("--out", "out_path", metavar="JSON", help="Save the tables, a list")
@output_option("--chart", "chart_path", metavar="PNG", help="Draw them as bars")
def compare(
    image_paths: tuple[str], out_path: str | None, chart_path: str | None, device: str, **settings: Any
) -> None:
    """Several sets of images against one reference, side by side."""
    results = table.evaluate(image_paths, device=distributed.init(device), **settings)
    if results:
        if out_path is not None:
            table.save_json(results, out_path)
        if chart_path is not None:
            page.bar_chart(results, chart_path)
        print(table.format_comparison(results))


if __name__ == "__main__":
    main()
