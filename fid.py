"""Measure how good generated images are. The metrics and their meaning are described in docs/metrics.md.

\b
Examples:
  python fid.py evaluate --images=out --data=datasets/digits.zip --detector=pixels --out=out.json
  python fid.py compare --images=a --images=b --data=datasets/digits.zip --detector=pixels --chart=ab.png
  python fid.py sweep --network='training-runs/00000-*' --data=datasets/digits.zip --detector=pixels --num=1000
  python fid.py ppl --network=generator.pkl --detector=vgg16.pkl
  python fid.py ref --data=datasets/digits.zip --dest=fid-refs/digits.npz --detector=pixels
  python fid.py calc --images=out --ref=fid-refs/digits.npz --num=1000 --detector=pixels
  torchrun --standalone --nproc_per_node=2 fid.py evaluate --images=out --data=datasets/digits.zip --detector=pixels
"""

from __future__ import annotations

import dnnlib.before_torch

import sys
from typing import Any

import click

import dnnlib.cli
from dnnlib.cli import blame
from metrics.features import compute_statistics, feature_width
from metrics.fid import frechet_distance
from metrics.format import format_comparison, format_curve, format_paths, format_table, save_json
from metrics.images import open_images
from metrics.networks import curve_of_files, paths_of_files
from metrics.options import (
    calc_options,
    comparison_options,
    curve_options,
    evaluate_files,
    open_detector,
    paths_options,
    ref_options,
    table_options,
)
from metrics.reference import load_reference, save_reference
from reports.plots import bar_chart, metric_curve
from torch_utils import distributed
from torch_utils.precision import tf32


@click.group(cls=dnnlib.cli.Group, help=__doc__)
@click.pass_context
def main(ctx: click.Context) -> None:
    ctx.call_on_close(distributed.shutdown)
    ctx.with_resource(tf32(False))  # PyTorch itself would let convolutions use it
    sys.stdout.reconfigure(errors="replace")  # a terminal without arrows shows question marks


@main.command(epilog="Example:\n  python fid.py calc --images=out --ref=ref.npz --num=1000 --detector=pixels")
@calc_options
def calc(
    images: str, ref: str, num: int, detector: str | None, precision: str, seed: int, batch: int, device: str
) -> None:
    """Compute the FID of images against a reference, and sFID if the reference has spatial features."""
    device = distributed.init(device)
    with blame("--ref"):
        reference = load_reference(ref)
    with blame(f"--precision={precision}"):
        reference.check_precision(precision)
    extractor = open_detector(detector, precision, device)
    with blame("--images"):
        source = open_images(images, num, seed, use_labels=False)
    with blame("--ref"):
        reference.check_width(feature_width(source, extractor, device))
    distributed.print0(f"Calculating FID of {len(source)} images in {images}...")
    _, mu, sigma, *more = compute_statistics(source, extractor, batch, device, spatial=reference.mu_s is not None)
    with blame("--ref"):
        sfid = reference.sfid(*more)
    if reference.mu_s is not None:
        lacking = "No sFID, since the detector gives no spatial features."
        distributed.print0(f"{lacking if sfid is None else f'sFID {sfid:g},'} FID:")
    distributed.print0(f"{frechet_distance(reference.mu, reference.sigma, mu, sigma):g}")


@main.command(epilog="Example:\n  python fid.py ref --data=datasets/digits.zip --dest=ref.npz --detector=pixels")
@ref_options
def ref(data: str, dest: str, detector: str | None, precision: str, batch: int, device: str) -> None:
    """Write a reference for calc.

    It holds the mean and the covariance of the features of an archive, and of spatial features for sFID if the detector
    gives some.
    """
    device = distributed.init(device)
    with blame("--data"):
        source = open_images(data, use_labels=False)
    extractor = open_detector(detector, precision, device)
    count, mu, sigma, *more = compute_statistics(source, extractor, batch, device, spatial=True)
    if distributed.get_rank() == 0:
        save_reference(dest, mu, sigma, precision, *more)
    among = "" if source.outliers is None else f", {source.outliers.sum()} recorded outliers among them"
    distributed.print0(f"Wrote {dest}: {len(mu)} features of {count} images{among}.")


@main.command(epilog="Example:\n  python fid.py evaluate --images=out --data=data.zip --detector=pixels")
@table_options
def evaluate(images: str, out: str | None, device: str, **options: Any) -> None:
    """Print all metrics of one set of images.

    These are FID, sFID, KID, IS, precision, recall, density and coverage, means over classes of these (cw_...), label
    accuracy, CAS, MiFID and the outlier ratio.
    """
    for result in evaluate_files([images], distributed.init(device), **options):
        if out is not None:
            save_json(result, out)
        print(format_table(result))


@main.command(epilog="Example:\n  python fid.py compare --images=a --images=b --data=data.zip --detector=pixels")
@comparison_options
def compare(images: tuple[str], out: str | None, chart: str | None, device: str, **options: Any) -> None:
    """Print the metrics of several sets of images side by side."""
    results = evaluate_files(images, distributed.init(device), **options)
    if results:
        if out is not None:
            save_json(results, out)
        if chart is not None:
            bar_chart(results, chart)
        print(format_comparison(results))


@main.command(epilog="Example:\n  python fid.py sweep --network='run/*.pkl' --data=data.zip --detector=pixels")
@curve_options
def sweep(device: str, chart: str | None, **options: Any) -> None:
    """Measure one metric of all snapshots of a run, and print it as a curve. The images are not kept."""
    result = curve_of_files(distributed.init(device), **options)
    if result is not None:
        if chart is not None:
            numbers, values = zip(*((point["number"], point["value"]) for point in result["curve"]), strict=True)
            metric_curve(numbers, values, result["unit"], result["metric"], chart)
        print(format_curve(result))


@main.command(epilog="Example:\n  python fid.py ppl --network=generator.pkl --detector=vgg16.pkl --out=ppl.json")
@paths_options
def ppl(device: str, out: str | None, **options: Any) -> None:
    """Measure the perceptual path length of a generator of train_rduot.py."""
    result = paths_of_files(distributed.init(device), **options)
    if distributed.get_rank() == 0:
        if out is not None:
            save_json(result, out)
        print(format_paths(result))


if __name__ == "__main__":
    main()
