"""Options of `fid.py`, and what opens the files that they name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import click
import numpy as np
import torch

from archives.archive_set import SEVERAL
from dnnlib.cli import add_options, blame, output_file
from metrics.bootstrap import LEVEL
from metrics.cas import CAS_ARCHS, check_arch, check_test
from metrics.detectors import DETECTORS, PRECISIONS, Detector, in_precision, load_detector
from metrics.evaluation import Inputs, evaluate, load_judge
from metrics.feature_cache import FeatureCache
from metrics.images import check_same_shape, open_images
from metrics.outliers import check_reference, open_record
from metrics.settings import EvaluationSettings
from torch_utils import distributed

__all__ = [
    "batch_option",
    "detector_option",
    "device_option",
    "evaluate_files",
    "evaluation_options",
    "open_detector",
    "output_option",
    "precision_option",
    "seed_option",
]

POSITIVE = click.IntRange(min=1)
D = EvaluationSettings  # its class attributes are the defaults


def _need_detector(_ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    """Say which detectors there are when the option is missing."""
    if value is None:
        raise click.BadParameter(f"is missing; choose {DETECTORS}", param=param)
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

# What `fid.py evaluate` and `fid.py compare` share: the fields of EvaluationSettings, --device.
evaluation_options = add_options([
    click.option("--data", metavar="PATH", required=True, help=f"Archive of real images, the reference. Its clean labels are used if it has any, and the outliers that it records are left out. {SEVERAL}"),
    detector_option,
    precision_option,
    click.option("--num", type=click.IntRange(min=2), help="Number of generated images to use  [default: all]"),
    click.option("--num_reference", type=click.IntRange(min=2), help="Compare at most this many reference images pair by pair, for KID, precision, recall, density and coverage of the whole sets. Their time grows with its square  [default: all]"),
    seed_option,
    batch_option,
    click.option("--nearest_k", type=POSITIVE, default=D.nearest_k, help="Precision, recall, density and coverage use the distance to this nearest neighbor"),
    click.option("--splits", metavar="IMAGES", type=POSITIVE, default=D.splits, help="Images per split of the inception score"),
    click.option("--bootstrap", metavar="DRAWS", type=click.IntRange(min=10), help=f"Add {LEVEL:.0%} intervals from this many resampled sets of the images, for example 200  [default: no intervals]"),
    click.option("--judge", metavar="svm|none|PKL", default=D.judge, help="What measures label accuracy: an SVM trained on the reference, nothing, or a classifier snapshot"),
    output_option("--features", metavar="NPZ", help="Keep features in this file, and read them from it in later calls"),
    click.option("--test", metavar="PATH", help="Archive of real images. Adds CAS: the accuracy on them of a classifier trained on the generated images"),
    click.option("--cas_arch", type=click.Choice(CAS_ARCHS), default=D.cas_arch, help="Classifier of CAS; resnet50 needs torchvision"),
    click.option("--cas_epochs", metavar="INT", type=POSITIVE, default=D.cas_epochs, help="How often CAS trains on each generated image"),
    click.option("--outlier_data", metavar="PATH", help="Archive that records its outliers, or label file with outliers of --data (.npz, or .csv of cleanlab). Adds the outlier ratio, by a classifier trained on this archive  [default: --data, if it records any]"),
    device_option,
])
# fmt: on


def open_detector(name: str, precision: str, device: torch.device) -> Detector:
    """Return the detector that --detector and --precision ask for."""
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
    inputs = replace(_open_inputs(images, settings, device), judge_labels=judge_labels)
    return evaluate(inputs, settings, device)


def _open_inputs(images: Sequence[str], settings: EvaluationSettings, device: torch.device) -> Inputs:
    with blame("--images"):
        sources = [open_images(path, settings.num, settings.seed) for path in images]
    with blame("--data"):
        reference = open_images(settings.data)
        check_reference(reference)
        for source in sources:
            check_same_shape(reference, source)
    test = None
    if settings.test is not None:
        with blame("--test"):
            test = open_images(settings.test)
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
