"""The options of `dataset_tool.py`: their table, the object they become, and which need or exclude each other."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import click

from archives.decode import Color
from archives.relabel import SOURCE
from archives.writer import TRANSFORMS
from dnnlib.cli import FloatRange, add_options

__all__ = ["DatasetOptions", "check_usage", "dataset_options"]

NOISE_TYPES = ("sym", "asym", "pair", "instance", "matrix")


@dataclass
class DatasetOptions:
    """What the user asked for. Every field has the name of its option."""

    source: str  # digits, photos or a path
    dest: str  # the archive to write, a .zip or a folder
    overwrite: bool  # replace an archive that is there
    eval: bool  # take the test part of the source
    part: str | None  # take this part of the source; None: the usual one
    max_images: int | None  # use only the first images; None: all
    skip_damaged: bool  # leave out images that cannot be decoded
    background: Color | None  # behind transparent pixels; None: these are refused
    transform: str | None  # how images are cropped or padded; None: not at all
    resolution: tuple[int, int] | None  # width and height in pixels; None: as in the source
    channels: str | None  # "1" for gray, "3" for RGB; None: as in the source
    outliers: str | None  # replace some images by images of this source
    perturb_percent: float | None  # how many of them, 0 to 100
    labels: str | None  # replace the labels by those in this file
    label_key: str | None  # the entry or column of that file; without a file, the kind of labels of the source
    skip_unlabeled: bool  # leave out images without a label in that file
    clean_labels: str | None  # the clean labels are those in this file, or `source`: those that the source had
    clean_label_key: str | None  # the entry or column of that file
    compact_labels: bool  # renumber the classes so that all have images
    noise_type: str | None  # label noise to add, one of NOISE_TYPES
    noise_rate: float | None  # probability of a wrong label, 0 to 1
    noise_matrix: str | None  # file with the transition matrix
    seed: int  # of all random numbers
    workers: int  # processes; 0: one per core


class Background(click.ParamType):
    """The type of an option that reads white, black or R,G,B and returns (red, green, blue)."""

    name = "COLOR"

    def convert(self, value: str | Color, param: click.Parameter | None, ctx: click.Context | None) -> Color:
        if isinstance(value, tuple):
            return value
        named = {"white": (255, 255, 255), "black": (0, 0, 0)}
        if value.strip().lower() in named:
            return named[value.strip().lower()]
        match = re.fullmatch(r"\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*", value)
        if match is None or max(color := tuple(map(int, match.groups()))) > 255:
            self.fail(f"'{value}' is not white, black or of the form R,G,B with numbers from 0 to 255", param, ctx)
        return color


class Resolution(click.ParamType):
    """The type of an option that reads WxH, or W,H as EDM does, and returns (width, height)."""

    name = "WxH"

    def convert(
        self, value: str | tuple[int, int], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([1-9]\d{0,4})[xX,]([1-9]\d{0,4})", value)
        if match is None:
            self.fail(f"'{value}' is not of the form WxH, such as 64x64", param, ctx)
        return int(match[1]), int(match[2])


# ----------------------------------------------------------------------------------------------------------------------
# The table, one option per line.


# fmt: off
def dataset_options() -> Callable:
    """Return a decorator for the options of `dataset_tool.py`."""
    return add_options([
        click.option("--source", required=True, metavar="PATH|digits|photos", help="Images to read (see below)"),
        click.option("--dest", required=True, metavar="ZIP|DIR", help="Archive to write: a .zip, or an empty or new folder"),
        click.option("--overwrite", is_flag=True, help="Replace the archive that is there"),
        click.option("--eval", is_flag=True, help="Take the test part of a published data set instead of the training part"),
        click.option("--part", metavar="NAME", help="Take another part of a published data set: unlabeled, clean, mini, ... (docs/data.md)"),
        click.option("--max-images", type=click.IntRange(min=1), metavar="INT", help="Use only the first images of the source"),
        click.option("--transform", type=click.Choice(TRANSFORMS), help="Crop to a square, crop to W:H in a black square, or pad to a square"),
        click.option("--resolution", type=Resolution(), help="Size of the images in pixels  [default: that of the source]"),
        click.option("--background", type=Background(), metavar="white|black|R,G,B", help="Color to put behind transparent pixels; images with such pixels are refused without it. --transform=pad also fills its border with it (default there: black)."),
        click.option("--skip_damaged", is_flag=True, help="Leave out images that are damaged, and list them in a CSV beside --dest"),
        click.option("--channels", type=click.Choice(["1", "3"]), help="Make all images gray (1) or RGB (3)"),
        click.option("--outliers", metavar="PATH|digits|photos", help="Replace some of the images by images of this source"),
        click.option("--perturb_percent", type=FloatRange(0, 100), metavar="FLOAT", help="How many of them, in percent"),
        click.option("--labels", metavar="FILE", help="Replace the labels by those in a table (.csv, .tsv, .jsonl, .parquet), .json, .npy, .npz or .pt file, or follow the decisions in such a table"),
        click.option("--label_key", metavar="NAME", help="Entry or column of the --labels file, if it has several; without --labels, the labels of a source that has several kinds (CelebA: an attribute)"),
        click.option("--skip_unlabeled", is_flag=True, help="Leave out images without a label in the --labels file"),
        click.option("--clean_labels", metavar="FILE|source", help="Declare these labels clean, for measuring: those in a file, or those that the source had before --labels"),
        click.option("--clean_label_key", metavar="NAME", help="Entry or column of the --clean_labels file, if it has several"),
        click.option("--compact_labels", is_flag=True, help="Renumber the labels so that every class has images; the old "
                     "numbers become names"),
        click.option("--noise_type", type=click.Choice(NOISE_TYPES), help="Add label noise of this type"),
        click.option("--noise_rate", type=FloatRange(0, 1), metavar="FLOAT", help="Probability of a wrong label, 0 to 1"),
        click.option("--noise_matrix", metavar="FILE", help="Row-stochastic matrix for --noise_type=matrix: .npy, .json, .npz"),
        click.option("--seed", type=click.IntRange(min=0), default=0, metavar="INT", help="Seed of noise, outliers, photos"),
        click.option("--workers", type=click.IntRange(min=0), default=0, metavar="INT", help="Processes; 0: one per core"),
    ])
# fmt: on


def check_usage(o: DatasetOptions) -> None:
    """Raise click.UsageError for options that need or exclude each other."""
    if o.transform and o.resolution is None:
        raise click.UsageError(f"--transform={o.transform} needs --resolution=WxH")
    if o.resolution is not None:
        width, height = o.resolution
        if o.transform != "center-crop-wide" and width != height:
            raise click.UsageError(f"--resolution={width}x{height}: must be square, e.g. 64x64")
        if width & (width - 1):
            raise click.UsageError(f"--resolution: the width {width} must be a power of two, e.g. 64x64")
        if height > width:
            raise click.UsageError("--transform=center-crop-wide: the height in --resolution must not exceed the width")
    if o.skip_unlabeled and o.labels is None:
        raise click.UsageError("--skip_unlabeled needs --labels=FILE")
    if o.clean_label_key is not None and o.clean_labels in (None, SOURCE):
        raise click.UsageError("--clean_label_key needs --clean_labels=FILE")
    if o.outliers is not None and o.perturb_percent is None:
        raise click.UsageError(f"--outliers={o.outliers} needs --perturb_percent=FLOAT, e.g. 5")
    if o.perturb_percent is not None and o.outliers is None:
        raise click.UsageError("--perturb_percent needs --outliers=PATH, or digits or photos")
    if o.noise_type == "matrix":
        if o.noise_matrix is None:
            raise click.UsageError("--noise_type=matrix needs --noise_matrix=FILE (.npy, .json or .npz)")
        if o.noise_rate is not None:
            raise click.UsageError("--noise_rate: --noise_type=matrix takes its rates from the matrix, leave it out")
        return
    if o.noise_matrix is not None:
        raise click.UsageError("--noise_matrix needs --noise_type=matrix")
    if o.noise_type is not None and o.noise_rate is None:
        raise click.UsageError(f"--noise_type={o.noise_type} needs --noise_rate=FLOAT, e.g. 0.4")
    if o.noise_rate is not None and o.noise_type is None:
        raise click.UsageError("--noise_rate needs --noise_type (sym, asym, pair or instance)")
