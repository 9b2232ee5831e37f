"""The options that say how to find wrong labels, their rules, and what they lead to."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import torch

import dnnlib
from archives.archive_set import SEVERAL
from archives.dataset import ImageDataset
from archives.label_file import LabelFile, is_detection, save_label_file
from archives.label_table import check_replaced, load_labels_or_table, save_label_table
from detection import classifier, confident, cores, gce
from detection.features import FEATURES, load_features
from detection.features import detect as detect_by_features
from detection.quality import confusion
from detection.trainer import CONV, Settings
from dnnlib.cli import BOOL, FloatRange, add_options, blame, given_options
from torch_utils import distributed, persistence
from torch_utils.precision import tf32
from training.networks_resnet import DEPTHS
from training.objectives.classifier import check_classifier
from training.options import preset_option
from training.presets import ARCHS

__all__ = [
    "check_beside",
    "check_usage",
    "detect_options",
    "find_wrong_labels",
    "open_data",
    "save_results",
    "training_state",
]

METHODS = {"gce": gce.detect, "cores": cores.detect, "confident": confident.detect}
TRAINING = {"--epochs", "--arch", "--encoder", "--batch", "--lr"}


# fmt: off
def detect_options() -> Callable:
    """Return a decorator for --data and the options that say how its wrong labels are found."""
    return add_options([
        click.option("--data", required=True, metavar="ZIP|DIR", help=f"Archive to examine. {SEVERAL}"),
        preset_option("detect_noise.py"),
        click.option("--method", type=click.Choice(METHODS), default="gce", help="How to find wrong labels"),
        click.option("--cls", metavar="PKL|DIR|URL", help="Decide by this snapshot of train_classifier.py, or one of TDSM's classifiers; train nothing"),
        click.option("--labels", metavar="NPZ|CSV", help="Take this label file, or a CSV in cleanlab's columns; train nothing"),
        click.option("--epochs", type=click.IntRange(min=1), metavar="INT", help="Length of training  [default: gce stops when held-out labels become no more likely; 60 for cores, 20 for each of the 5 classifiers of confident]"),
        click.option("--features", metavar="NAME", help=f"Find wrong and foreign images by the features of a network that others have trained: {FEATURES}. A linear classifier of these features trains, with the loss of gce"),
        click.option("--encoder", type=click.Choice(DEPTHS), help="Residual network of this depth, in place of --arch"),
        click.option("--arch", type=click.Choice([CONV, *ARCHS]), metavar="|".join([CONV, *ARCHS]), help="Small convolutional network, or the ResNet that goes with this U-Net  [default: conv for gce, ddpmpp otherwise]"),
        click.option("--batch", type=click.IntRange(min=1), default=256, metavar="INT", help="Batch size over all processes"),
        click.option("--lr", type=FloatRange(min=0, min_open=True), metavar="FLOAT", help="Learning rate  [default: 0.005 for conv, 0.002 otherwise]"),
        click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), default=0, metavar="INT", help="Random seed"),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", help="Where to train"),
        click.option("--foreign", type=BOOL, default=True, help="Look for foreign images and duplicates too: 25 s for 60,000 images on one core"),
        click.option("--trust_pickle", is_flag=True, help="Run code that the snapshot contains; only for files you trust"),
    ])
# fmt: on


def check_usage(given: set[str], o: dnnlib.EasyDict) -> None:
    """Raise click.UsageError when the options `given` contradict each other."""
    if o.cls and o.labels:
        raise click.UsageError("--labels: these labels are judged already; leave out --cls")
    useless = given & (TRAINING | {"--method"})
    for source in ("cls", "labels"):
        if o[source] and useless:
            raise click.UsageError(f"--{source}: nothing is trained with this option; leave out {sorted(useless)[0]}")
    if o.encoder and "--arch" in given:  # that of a preset gives way
        raise click.UsageError(f"--encoder={o.encoder} and --arch={o.arch} both choose the network; give one of them")
    useless = ["--cls"] * bool(o.cls) + sorted(given & {"--arch", "--encoder", "--lr", "--method"})
    if o.features and not o.labels and useless:
        raise click.UsageError(f"--features: a linear classifier of the features decides; leave out {useless[0]}")
    if o.features and o.labels and not o.foreign:
        raise click.UsageError("--features: --labels decides, and nobody looks for foreign images; leave it out")
    if o.batch % distributed.get_world_size():
        raise click.UsageError(
            f"--batch={o.batch} must be divisible by the number of processes ({distributed.get_world_size()})"
        )


def open_data(o: dnnlib.EasyDict) -> tuple[ImageDataset, torch.device, np.ndarray | None]:
    """Return the data set, the device and, on rank 0, what --features asks for. At the end, it leaves other processes.

    TF32 is forbidden until then. UserError: the data set has no class labels.
    """
    context = click.get_current_context()
    context.call_on_close(distributed.shutdown)
    context.with_resource(tf32(False))
    device = distributed.init(o.device)
    dataset = ImageDataset(o.data)
    with blame("--data"):
        classifier.check_labels(dataset)
    if distributed.get_rank() == 0:
        dnnlib.print_notes([*dataset.notes, *dataset.class_notes()])
    features = None
    if o.features is not None:
        with blame("--features"):
            features = load_features(o.features, dataset, device)
    return dataset, device, features


def training_state(path: str) -> str:
    """Return the file that keeps an unfinished training beside the label file `path`."""
    return f"{os.path.splitext(path)[0]}-training.pt"


def check_beside(path: str, trains: bool) -> None:
    """Raise UserError if writing the label file X.npz would replace it or files beside it, and no detection wrote them.

    The others are X.csv, X.png and, if a classifier `trains`, X-classifier.pkl; the last two count as ours where a
    label file or an unfinished training is there. A label file of flags alone is ours if our X.csv is there.
    """
    stem = os.path.splitext(path)[0]
    check_replaced(f"{stem}.csv")
    if os.path.lexists(path) and not os.path.lexists(f"{stem}.csv") and not is_detection(path):
        raise dnnlib.UserError(f"{path}: exists, and is no label file of an earlier detection; choose another name")
    if not os.path.lexists(path) and not os.path.lexists(training_state(path)):
        for other in (f"{stem}.png", *([f"{stem}-classifier.pkl"] if trains else [])):
            if os.path.lexists(other):
                raise dnnlib.UserError(
                    f"{other}: exists, and would be replaced, but without {path} no detection has written it; choose "
                    "another name"
                )


def find_wrong_labels(
    o: dnnlib.EasyDict,
    dataset: ImageDataset,
    device: torch.device,
    path: str | None,
    features: np.ndarray | None = None,
) -> tuple[LabelFile, dict[str, Any] | None]:
    """Return what the options find about the labels of a set, and the classifier's snapshot, if any. Collective.

    `features`: of `open_data`. `path`: the label file that it will become. A training that was killed continues from
    its `training_state` beside that file, which the caller deletes when everything is written. None: no file, and a
    killed training begins anew. UserError: files beside it would replace others (`check_beside`).
    """
    if path:
        check_beside(path, trains=not (o.labels or o.cls))
    if o.labels:
        with blame("--labels"):
            return load_labels(o.labels, dataset), None
    if o.cls:
        return detect_by_snapshot(o.cls, o.trust_pickle, dataset, device), None
    if o.features:
        epochs = o.epochs if "--epochs" in given_options() else None  # those of a preset are of its network
        settings = Settings(epochs=epochs, batch=o.batch, seed=o.seed)
        return detect_by_features(dataset, features, device, settings), None
    arch = o.encoder or o.arch or (CONV if o.method == "gce" else "ddpmpp")
    lr = o.lr or (5e-3 if arch == CONV else 2e-3)
    settings = Settings(
        arch=arch, epochs=o.epochs, batch=o.batch, lr=lr, seed=o.seed, state=path and training_state(path)
    )
    try:
        if o.method == "confident":
            return confident.detect(dataset, device, settings), None
        found, net = METHODS[o.method](dataset, device, settings)
        return found, None if net is None else classifier.make_snapshot(net, found, dataset, device)
    except KeyboardInterrupt:
        if path:
            distributed.print0("Stopped. The same command goes on from the last epoch that it has saved.")
        raise


def load_labels(path: str, dataset: ImageDataset) -> LabelFile:
    """Return a label file for the data set, with an estimate of T where it suggests other classes."""
    found = load_labels_or_table(path, dataset)
    if found.transition is None and np.any(found.suggested != found.labels):
        found.transition = confusion(found.suggested, dataset)
    return found


def detect_by_snapshot(cls: str, trust_pickle: bool, dataset: ImageDataset, device: torch.device) -> LabelFile:
    """Return the label file that follows from the classifier of the snapshot that `cls` means. Collective."""
    with blame("--cls"):
        path = persistence.find_snapshot(cls)
        snapshot = persistence.load_snapshot(path, trust_pickle=trust_pickle, kind="classifier")
        check_classifier(snapshot, dataset, path)
    found = classifier.detect(snapshot["ema"], snapshot["info"].get("posterior", "noisy"), dataset, device)
    found.classifier = dnnlib.content_hash(path)
    return found


def save_results(
    path: str, dataset: ImageDataset, found: LabelFile, snapshot: dict[str, Any] | None, trained: bool
) -> list[str]:
    """Write a label file X.npz, the same as X.csv in cleanlab's columns, and the classifier, if there is one.

    Where a detection has `trained` and kept no classifier, the one that an earlier detection left there goes. Return the
    paths of the files.
    """
    stem = os.path.splitext(path)[0]
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    written = [path, f"{stem}.csv"]
    found.source_names = dataset.source_names
    classifier = f"{stem}-classifier.pkl"
    if snapshot is not None:
        written.append(classifier)
        persistence.save_snapshot(classifier, snapshot)
        found.classifier = dnnlib.content_hash(classifier)
    elif trained:
        pathlib.Path(classifier).unlink(missing_ok=True)
    save_label_file(written[0], found)
    save_label_table(written[1], found, dataset.class_names)
    return written
