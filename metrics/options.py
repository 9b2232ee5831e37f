"""Options of `fid.py`, and what opens the files that they name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import click
import numpy as np
import torch

import dnnlib
from archives.archive_set import SEVERAL
from dnnlib.cli import FloatRange, add_options, blame, given_options, output_file
from metrics.bootstrap import LEVEL
from metrics.cas import CAS_ARCHS, check_arch, check_test
from metrics.class_matching import match_classes
from metrics.detectors import (
    DETECTORS,
    INCEPTION,
    PRECISIONS,
    Detector,
    find_inception,
    in_precision,
    load_detector,
)
from metrics.evaluation import Inputs, evaluate, load_judge
from metrics.feature_cache import FeatureCache
from metrics.images import check_same_shape, open_images
from metrics.outliers import check_reference, open_record
from metrics.ppl import EPSILON, LPIPS_URL
from metrics.protocols import PROTOCOLS
from metrics.settings import EvaluationSettings
from sampling.options import sampler_options, trust_option
from torch_utils import distributed

__all__ = [
    "calc_options",
    "comparison_options",
    "curve_options",
    "evaluate_files",
    "open_detector",
    "open_inputs",
    "paths_options",
    "ref_options",
    "table_options",
]

POSITIVE = click.IntRange(min=1)
NUMBER, STEP = FloatRange(min=0), FloatRange(min=0, min_open=True)
D = EvaluationSettings  # its class attributes are the defaults


def _need_detector(_ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    """Say which detectors there are when the option is missing."""
    if value is None:
        raise click.BadParameter(f"is missing; choose {DETECTORS}", param=param)
    return value


def _set_protocol(ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """Make the settings of a protocol the defaults of the options that follow."""
    if value is not None:
        ctx.default_map = {**(ctx.default_map or {}), **PROTOCOLS[value].settings}
    return value


def output_option(*names: str, metavar: str, help: str, **kwargs: Any) -> Callable:
    """Return an option for a file to write. A path that cannot be written is refused before any work begins."""
    return click.option(*names, metavar=metavar, callback=output_file, help=help, **kwargs)


# fmt: off
detector_option = click.option("--detector", metavar="NAME", callback=_need_detector, help=f"What turns images into features (required): {DETECTORS}")
precision_option = click.option("--precision", type=click.Choice(PRECISIONS), default=D.precision, help="Arithmetic of the detector. bf16 is faster on a GPU, but its values only compare with other bf16 values")
batch_option = click.option("--batch", type=POSITIVE, default=D.batch, help="Images per batch and process")
seed_option = click.option("--seed", type=click.IntRange(min=0), default=D.seed, help="Random seed; it also chooses the images if there are more than --num")
device_option = click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", help="Where the detector runs")

data_option = click.option("--data", metavar="PATH", required=True, help=f"Archive of real images: ZIP, folder, or .npz (arr_0). {SEVERAL}")
inception_option = click.option("--detector", metavar="NAME", help=f"What turns images into features: {DETECTORS}  [default: {INCEPTION}, if it is installed]")
judge_option = click.option("--judge", metavar="svm|none|PKL", default=D.judge, help="What measures label accuracy: an SVM trained on the reference, nothing, or a classifier snapshot")

calc_options = add_options([
    click.option("--images", metavar="PATH", required=True, help="Generated images: folder, ZIP, or .npz (arr_0)"),
    click.option("--ref", metavar="NPZ|URL", required=True, help="Reference: a file of 'fid.py ref', of EDM, or of ADM (mu, sigma, mu_s, sigma_s)"),
    click.option("--num", type=click.IntRange(min=2), default=50000, help="Number of images to use"),
    inception_option,
    precision_option,
    seed_option,
    batch_option,
    device_option,
])

ref_options = add_options([
    data_option,
    output_option("--dest", metavar="NPZ", required=True, help="Reference file to write"),
    inception_option,
    precision_option,
    batch_option,
    device_option,
])

# What `fid.py evaluate` and `fid.py compare` share: the fields of EvaluationSettings, --device.
evaluation_options = add_options([
    click.option("--protocol", type=click.Choice(list(PROTOCOLS)), is_eager=True, callback=_set_protocol, help="Use the settings of a paper as defaults for --num and, where the paper states them, --nearest_k and --splits. The table lists them"),
    click.option("--data", metavar="PATH", required=True, help=f"Archive of real images, the reference. Its clean labels are used if it has any, and the outliers that it records are left out. {SEVERAL}"),
    detector_option,
    precision_option,
    click.option("--num", type=click.IntRange(min=2), help="Number of generated images to use  [default: all]"),
    click.option("--num_reference", type=click.IntRange(min=2), help="Use at most this many reference images for KID, precision, recall, density and coverage of the whole sets, which take time quadratic in their number  [default: all]"),
    seed_option,
    batch_option,
    click.option("--nearest_k", type=POSITIVE, default=D.nearest_k, help="Precision, recall, density and coverage use the distance to this nearest neighbor"),
    click.option("--splits", metavar="IMAGES", type=POSITIVE, default=D.splits, help="Images per split of the inception score; not the number of splits"),
    click.option("--bootstrap", metavar="DRAWS", type=click.IntRange(min=10), help=f"Add {LEVEL:.0%} intervals from this many resampled sets of the images, for example 200  [default: no intervals]"),
    judge_option,
    click.option("--mifid", is_flag=True, help="Add MiFID: FID made worse if images are copies of reference images"),
    output_option("--features", metavar="NPZ", help="Keep features in this file, and read them from it in later calls"),
    click.option("--test", metavar="PATH", help="Archive of real images. Adds CAS: the accuracy on them of a classifier trained on the generated images"),
    click.option("--cas_arch", type=click.Choice(CAS_ARCHS), default=D.cas_arch, help="Classifier of CAS; resnet50 needs torchvision"),
    click.option("--cas_epochs", metavar="INT", type=POSITIVE, default=D.cas_epochs, help="How often CAS trains on each generated image"),
    click.option("--outlier_data", metavar="PATH", help="Archive that records its outliers, or label file with outliers of --data (.npz, or .csv of cleanlab). Adds the outlier ratio, by a classifier trained on this archive  [default: --data, if it records any]"),
    device_option,
])

table_options = add_options([
    click.option("--images", metavar="PATH", required=True, help="Generated images: folder or ZIP (labels in its dataset.json), or .npz (arr_0 images, arr_1 labels)"),
    evaluation_options,
    output_option("--out", metavar="JSON", help="Save all values here, also those of each class"),
])

comparison_options = add_options([
    click.option("--images", metavar="PATH", required=True, multiple=True, help="Generated images, as for evaluate; give this option once for each set"),
    evaluation_options,
    output_option("--out", metavar="JSON", help="Save all values here, as a list with one entry per set"),
    output_option("--chart", metavar="PNG", help="Draw the metrics as bars into this file"),
])

curve_options = add_options([
    click.option("--network", metavar="DIR|GLOB", required=True, help="Snapshots: a run directory, or a quoted glob such as 'DIR/network-snapshot-*.pkl'"),
    data_option,
    detector_option,
    precision_option,
    click.option("--metric", metavar="NAME", default="fid", help="A metric of the table of evaluate, such as fid, cw_fid, density_k3 or label_accuracy"),
    click.option("--num", type=click.IntRange(min=2), default=50000, help="Images per snapshot; their seeds are 0, 1, 2, ..."),
    judge_option,
    click.option("--kimg_start", metavar="KIMG", type=NUMBER, help="First snapshot to measure  [default: the first]"),
    click.option("--kimg_end", metavar="KIMG", type=NUMBER, help="Last snapshot to measure  [default: the last]"),
    click.option("--kimg_jump", metavar="KIMG", type=STEP, help="Least distance of two snapshots to measure  [default: measure all]"),
    click.option("--epoch_start", metavar="EPOCH", type=NUMBER, help="As --kimg_start for published generators of RDUOT, netG_1200.pth, whose names count epochs"),
    click.option("--epoch_end", metavar="EPOCH", type=NUMBER, help="As --kimg_end for them"),
    click.option("--epoch_jump", metavar="EPOCH", type=STEP, help="As --kimg_jump for them"),
    sampler_options,
    batch_option,
    output_option("--out", metavar="JSON", help="Save the values here after each snapshot; the same command goes on after an interruption"),
    output_option("--chart", metavar="PNG", help="Draw the curve into this file"),
    device_option,
    trust_option,
])

paths_options = add_options([
    click.option("--network", metavar="PKL|DIR|URL", required=True, help="Generator of train_rduot.py"),
    click.option("--detector", metavar="NAME", required=True, help=f"What measures the distance of two images: for LPIPS the VGG16 published at {LPIPS_URL} (file or URL), else what evaluate takes, but for fidelity:NAME"),
    click.option("--sampling", type=click.Choice(["both", "full", "end"]), default="both", help="Where on the path the steps are: anywhere, or at its start"),
    click.option("--num", type=click.IntRange(min=2), default=50000, help="Number of steps; their seeds are 0, 1, 2, ..."),
    click.option("--epsilon", metavar="FLOAT", type=FloatRange(min=0, min_open=True, max=1), default=EPSILON, help="Length of a step, as a share of the path"),
    batch_option,
    output_option("--out", metavar="JSON", help="Save the values here"),
    device_option,
    trust_option,
])
# fmt: on


def open_detector(name: str | None, precision: str, device: torch.device) -> Detector:
    """Return the detector that --detector and --precision ask for; without --detector, Inception-v3."""
    if name is None:
        try:
            detector = find_inception(device)
        except dnnlib.UserError as e:
            raise click.UsageError(f"--detector is missing; {e.message}") from None
        distributed.print0(f"Detector: {detector.name}")
    else:
        with blame("--detector"):
            detector = load_detector(name, device)
    with blame(f"--precision={precision}"):
        return in_precision(detector, precision, device)


def evaluate_files(
    images: Sequence[str], device: torch.device, judge_labels: np.ndarray | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Open the files that the options name, and return what `metrics.evaluation.evaluate` does.

    `images` are the paths of --images, `options` are fields of EvaluationSettings, `judge_labels` is a field of
    `metrics.evaluation.Inputs`. Every process must call this function. An error begins with the option that it belongs
    to.
    """
    settings = EvaluationSettings(**options)
    _check_usage(settings)
    inputs = replace(open_inputs(images, settings, device), judge_labels=judge_labels)
    return evaluate(inputs, settings, device)


def _check_usage(settings: EvaluationSettings) -> None:
    """Raise UsageError for options of CAS without --test, which asks for it."""
    if settings.test is None and click.get_current_context(silent=True) is not None:
        for option in given_options():
            if option in ("--cas_arch", "--cas_epochs"):
                raise click.UsageError(f"{option}: is for CAS, which needs --test")


def open_inputs(images: Sequence[str], settings: EvaluationSettings, device: torch.device) -> Inputs:
    """Open and check the files that the settings name, and the sets of images at the paths `images`."""
    chosen = PROTOCOLS[settings.protocol].settings if settings.protocol else {}
    from_protocol = settings.num is not None and settings.num == chosen.get("num")
    with blame(f"--protocol={settings.protocol}" if from_protocol else "--images"):
        sources = [open_images(path, settings.num, settings.seed) for path in images]
    with blame("--data"):
        reference = open_images(settings.data)
        check_reference(reference)
        for source in sources:
            check_same_shape(reference, source)
    test = None
    if settings.test is None:
        sources = match_classes(sources, reference)
    else:
        with blame("--test"):
            *sources, test = match_classes([*sources, open_images(settings.test)], reference)
            for source in sources:
                check_test(source, test)
        with blame("--cas_arch"):
            check_arch(settings.cas_arch, reference.image_shape)
    detector = distributed.together(
        lambda: open_detector(settings.detector, settings.precision, device), rank0_first=True
    )
    with blame("--outlier_data"):
        record = open_record(settings.outlier_data, reference)
    judge = None
    if settings.judge not in ("svm", "none"):
        with blame("--judge"):
            judge = load_judge(settings.judge, device, reference)
    with blame("--features"):
        cache = FeatureCache(settings.features)
    return Inputs(sources, reference, detector, judge, test, record, cache)
