"""Measure generated images.

\b
  python fid.py evaluate --images=out --data=datasets/digits.zip --detector=pixels --out=out.json
  python fid.py ref --data=datasets/digits.zip --dest=fid-refs/digits.npz --detector=pixels
  python fid.py calc --images=out --ref=fid-refs/digits.npz --num=1000 --detector=pixels
  torchrun --standalone --nproc_per_node=2 fid.py calc --images=out --ref=fid-refs/digits.npz --detector=pixels
"""

from __future__ import annotations

import os

import click
import numpy as np

import dnnlib
import dnnlib.cli
from dnnlib.cli import output_file
from metrics import features, table
from metrics.frechet import frechet_distance
from torch_utils import distributed, safe_files


def load_reference(path: str) -> tuple[np.ndarray, np.ndarray]:
    """mu [d] and sigma [d,d] of a reference `.npz` (ours or EDM's). UserError when it is none."""
    expected = "expected a reference of 'fid.py ref': mu [d] and sigma [d,d]"
    arrays = safe_files.read_npz(path, expected)
    if not {"mu", "sigma"} <= arrays.keys():
        raise dnnlib.UserError(f"{path}: holds {', '.join(arrays) or 'nothing'}; {expected}")
    mu, sigma = arrays["mu"], arrays["sigma"]
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise dnnlib.UserError(f"{path}: mu is {list(mu.shape)} and sigma {list(sigma.shape)}; {expected}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise dnnlib.UserError(f"{path}: mu or sigma is not finite; {expected}")
    return mu, sigma


def need_detector(_ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    if value is None:
        raise click.BadParameter(f"is missing; choose {features.DETECTORS}", param=param)
    return value


detector_option = click.option("--detector", "detector_name", metavar="NAME", callback=need_detector,
                               help=f"What turns images into features (required): {features.DETECTORS}")
batch_option = click.option("--batch", type=click.IntRange(min=1), default=64, help="Images a batch and process")
seed_option = click.option("--seed", type=click.IntRange(min=0), default=0, help="Chooses the images if there are more")
device_option = click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto",
                             help="Where the detector runs")


@click.group(cls=dnnlib.cli.Group, help=__doc__)
@click.pass_context
def main(ctx: click.Context) -> None:
    ctx.call_on_close(distributed.shutdown)


@main.command(epilog="Example: python fid.py calc --images=out --ref=ref.npz --num=1000 --detector=pixels")
@click.option("--images", "image_path", metavar="PATH", required=True, help="Images: folder, ZIP or .npz (arr_0)")
@click.option("--ref", "ref_path", metavar="NPZ|URL", required=True, help="Reference of 'fid.py ref'")
@click.option("--num", type=click.IntRange(min=2), default=50000, help="Number of images to use")
@detector_option
@seed_option
@batch_option
@device_option
def calc(image_path: str, ref_path: str, num: int, detector_name: str, seed: int, batch: int, device: str) -> None:
    """FID of images against a reference."""
    device = distributed.init(device)
    mu_ref, sigma_ref = load_reference(ref_path)
    source = features.open_images(image_path, num, seed)
    extractor = features.detector(detector_name, device)
    width = features.feature_width(source, extractor, device)
    if width != len(mu_ref):
        raise dnnlib.UserError(f"--ref: {ref_path} has {len(mu_ref)} features, --detector={detector_name} gives "
                               f"{width}; make the reference with the same detector from images of the same size")
    distributed.print0(f"Calculating FID of {len(source)} images in {image_path}...")
    _, mu, sigma = features.compute_statistics(source, extractor, batch, device)
    distributed.print0(f"{frechet_distance(mu_ref, sigma_ref, mu, sigma):g}")


@main.command(epilog="Example: python fid.py ref --data=digits.zip --dest=ref.npz --detector=pixels")
@click.option("--data", "dataset_path", metavar="PATH", required=True, help="Archive: ZIP, folder or .npz (arr_0)")
@click.option("--dest", "dest_path", metavar="NPZ", required=True, callback=output_file, help="Reference to write")
@detector_option
@batch_option
@device_option
def ref(dataset_path: str, dest_path: str, detector_name: str, batch: int, device: str) -> None:
    """Reference for 'fid.py calc': mean and covariance of an archive's features."""
    device = distributed.init(device)
    source = features.open_images(dataset_path, option="--data")
    extractor = features.detector(detector_name, device)
    count, mu, sigma = features.compute_statistics(source, extractor, batch, device)
    if distributed.get_rank() == 0:
        os.makedirs(os.path.dirname(os.path.abspath(dest_path)), exist_ok=True)
        with dnnlib.atomic_open(dest_path) as file:
            np.savez(file, mu=mu, sigma=sigma)
    distributed.print0(f"Wrote {dest_path}: {len(mu)} features of {count} images.")


@main.command(epilog="Example: python fid.py evaluate --images=out --data=digits.zip --detector=pixels --out=out.json")
@click.option("--images", "image_path", metavar="PATH", required=True,
              help="Generated images: folder or ZIP with dataset.json, or .npz (arr_0 images, arr_1 labels)")
@click.option("--data", "dataset_path", metavar="PATH", required=True,
              help="Reference archive: all of it but recorded outliers, with its clean labels where it has them")
@detector_option
@click.option("--num", type=click.IntRange(min=2), help="Number of generated images to use  [default: all]")
@seed_option
@batch_option
@click.option("--nearest_k", type=click.IntRange(min=1), default=5,
              help="Neighbours that make the radius for precision, recall, density, coverage")
@click.option("--judge", metavar="svm|none|PKL", default="svm",
              help="Label accuracy by an SVM trained on the reference, or by a classifier snapshot")
@click.option("--outlier_data", metavar="PATH",
              help="Archive that records its outliers, to learn the outlier ratio from  [default: --data, if it does]")
@click.option("--out", "out_path", metavar="JSON", callback=output_file, help="Save the table, classes included")
@device_option
def evaluate(image_path: str, dataset_path: str, detector_name: str, num: int | None, seed: int, batch: int,
             nearest_k: int, judge: str, outlier_data: str | None, out_path: str | None, device: str) -> None:
    """The whole table: FID, KID, IS, precision, recall, density, coverage, class-wise too, label accuracy, outliers."""
    device = distributed.init(device)
    result = table.evaluate(image_path, dataset_path, detector_name, device=device, num=num, batch=batch, seed=seed,
                            nearest_k=nearest_k, judge=judge, outlier_data=outlier_data)
    if distributed.get_rank() == 0:
        if out_path is not None:
            table.save_json(result, out_path)
        print(table.format_table(result))


if __name__ == "__main__":
    main()
