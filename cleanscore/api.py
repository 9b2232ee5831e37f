"""The functions of the package. They choose nothing themselves: the packages below know how each thing is done."""

from __future__ import annotations

import dnnlib.before_torch

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import click
import numpy as np
import torch

import dnnlib
from archives.dataset import ImageDataset
from archives.label_file import LabelFile
from cleanscore.paths import find_archive
from cleanscore.samples import Samples
from detection.classifier import check_labels
from detection.inspection import look_for_foreign
from detection.options import METHODS, detect_options, find_wrong_labels, save_results, training_state
from dnnlib.cli import writable
from metrics.detectors import INCEPTION
from metrics.options import evaluate_files
from metrics.protocols import PROTOCOLS
from sampling.ddgan import is_generator
from sampling.generation import generate_images
from sampling.guidance import ClassifierFreeGuidance
from sampling.loading import (
    PRECISIONS,
    TrainedDiscriminator,
    guide,
    load_denoiser,
    load_discriminator,
    warn_if_never_unlabeled,
)
from sampling.options import check_precision, find_classes
from sampling.rejection import Rejection, warn_of_given_up
from sampling.samplers import choose_sampler
from torch_utils import distributed
from torch_utils.precision import tf32
from training.presets import presets_of

__all__ = ["detect", "evaluate", "load", "sample"]

Guidance = float | str | os.PathLike | TrainedDiscriminator


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    precision: str | None = None,
    trust_pickle: bool = False,
    published: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """Return the network of a snapshot, ready to sample. Its attribute `class_names` holds names, or None.

    path          a run directory, a snapshot, a folder of `export.py --format=safetensors`, a glob of one, or a URL
    device        auto, cpu, cuda, mps
    precision     fp32, tf32, bf16 or fp16; None: as the network was trained
    trust_pickle  run the code inside the file; only for files that you trust
    published     what a published netG_1200.pth does not record, such as dict(image_size=32) (docs/formats.md)

    UserError: the file is missing or damaged, or its network makes no images.
    """
    if precision not in (None, *PRECISIONS):
        raise dnnlib.UserError(f"precision {precision!r} is unknown; there are {', '.join(PRECISIONS)}")
    place = _device(device)
    with _naming("precision"):
        check_precision(precision, place)
    form = dict(precision=precision, trust_pickle=trust_pickle, kinds=("denoiser", "generator"))
    net, net.class_names = load_denoiser(os.fspath(path), place, published=published, **form)
    return net


def sample(
    net: Callable[..., torch.Tensor] | str | os.PathLike[str],
    n: int,
    *,
    classes: int | str | Iterable[int | str] | None = None,
    guidance: Guidance | Sequence[Guidance] | None = None,
    seed: int = 0,
    batch: int = 64,
    steps: int | None = None,
    **settings: Any,
) -> Samples:
    """Return n images, those of the seeds `seed` to `seed` + n - 1. A seed's image depends on nothing but the seed.

    net       a network that `load` returned, or its path; also a denoiser that is guided already
    classes   a class by number or name, several of them in turn, or text as `generate.py --class` takes it, such as
              "cat,dog" or "0-9": seed s gets class number s mod their count. None: each seed draws its own. An int is
              always a number; text is a name where it is the number of no class
    guidance  a number s: classifier-free guidance D_0 + s (D_y - D_0); a discriminator of `train_discriminator.py`, by
              its path: SBDC; or a list of both
    batch     images at a time
    steps     of the sampler (18)
    settings  further arguments of the sampler: S_churn, sigma_min, solver, ... (docs/methods/edm.md)

    UserError: a class or a discriminator does not fit the network, a generator is asked for steps or guidance, a
    network that draws by rejection for guidance, or a number is too low.
    """
    for name, value, low in (("n", n, 1), ("batch", batch, 1), ("steps", steps, 1), ("seed", seed, 0)):
        if value is not None and value < low:
            raise dnnlib.UserError(f"{name} is {value}, expected {low} or more")
    net = load(net) if isinstance(net, (str, os.PathLike)) else net
    guidances = [] if guidance is None else guidance if isinstance(guidance, (list, tuple)) else [guidance]
    given = settings if steps is None else settings | dict(num_steps=steps)
    if is_generator(net) and (given or guidances):
        raise dnnlib.UserError("the network is a generator: its steps are fixed, and nothing guides it")
    inner = net
    while not isinstance(inner, torch.nn.Module):  # a guided denoiser
        inner = inner.net
    device, names = next(inner.parameters()).device, getattr(inner, "class_names", None)
    wanted = None if classes is None else _numbers(classes, net.label_dim, names)
    for one in sorted(guidances, key=lambda one: not isinstance(one, Real)):  # SBDC's gate stands outermost
        net = _guided(net, one, device, names)
    sampler = choose_sampler(net, **given)
    before = net.given_up if isinstance(net, Rejection) else 0
    seeds = list(range(seed, seed + n))
    class_idx = wanted and [wanted[s % len(wanted)] for s in seeds]
    parts = list(generate_images(net, seeds, device=device, class_idx=class_idx, batch=batch, sampler=sampler))
    if isinstance(net, Rejection):
        warn_of_given_up(net.given_up - before)
    _, images, labels = zip(*parts, strict=True)
    return Samples(np.concatenate(images), None if labels[0] is None else np.concatenate(labels), seeds, names)


def _guided(
    net: Callable[..., torch.Tensor], guidance: Guidance, device: torch.device, class_names: Sequence[str] | None
) -> Callable[..., torch.Tensor]:
    if isinstance(net, Rejection):
        raise dnnlib.UserError(
            "guidance: the network draws by rejection already, which nothing may guide; guide net.net"
        )
    if isinstance(guidance, Real):
        if guidance != 1:
            warn_if_never_unlabeled(net)
        return ClassifierFreeGuidance(net, float(guidance))
    if not isinstance(guidance, TrainedDiscriminator):
        guidance = load_discriminator(os.fspath(guidance), device, class_names=class_names)
    return guide(net, guidance, device)


def _numbers(classes: int | str | Iterable[int | str], count: int, names: Sequence[str] | None) -> list[int]:
    if not count:
        raise dnnlib.UserError(f"classes: {classes!r} is asked for, but the network was trained without labels")
    items = [classes] if isinstance(classes, (int, str, np.integer)) else [*classes]
    if items and all(isinstance(item, str) for item in items):
        items = [",".join(items)]  # together they tell names from numbers
    with _naming("classes"):  # an int has no name to be taken for
        known = [(item, names if isinstance(item, str) else None) for item in items]
        numbers = [number for item, named in known for number in find_classes(str(item), count, named)]
    if not numbers:
        raise dnnlib.UserError("classes: is empty; leave it out to draw the classes")
    return numbers


def evaluate(
    images: Samples | np.ndarray | str | os.PathLike[str],
    reference: str | os.PathLike[str],
    *,
    detector: str = INCEPTION,
    device: str = "auto",
    **settings: Any,
) -> dict[str, Any]:
    """Return all metrics of a set of images: a dictionary as `fid.py evaluate --out` writes it, with `metrics` in it.

    images     what `sample` returned, an array uint8 [N,H,W,C], or a folder, ZIP, `.npz` or URL
    reference  real images: an archive, its URL, or the directory of a run that was trained on it
    detector   what turns images into features: Inception-v3 by default, or "pixels", a classifier's path or URL, ...
    settings   further fields of `metrics.settings.EvaluationSettings`: `num`, `bootstrap`, `judge`, ...; a `protocol`
               chooses those that are not given

    UserError: the images do not fit each other, or there is no such detector or protocol.
    """
    protocol = settings.get("protocol")
    if protocol is not None:
        if protocol not in PROTOCOLS:
            raise dnnlib.UserError(f"protocol: there is no {protocol!r}; there are {', '.join(PROTOCOLS)}")
        settings = {**PROTOCOLS[protocol].settings, **settings}
    data, device = find_archive(reference), _device(device)
    with tempfile.TemporaryDirectory() as folder, tf32(False):
        path = name = "images"
        if isinstance(images, Samples):
            path = os.path.join(folder, "images.zip")
            images.save(path)  # with the names of the classes, which the reference may number otherwise
        elif isinstance(images, np.ndarray):
            path = os.path.join(folder, "images.npz")
            np.savez(path, images)
        else:
            path = name = _find_images(images)
        try:
            (result,) = evaluate_files([path], device, data=data, detector=detector, **settings)
        except dnnlib.UserError as e:
            e.message = e.message.replace(path, name)
            raise
    return result | dict(images=name)


def _find_images(path: str | os.PathLike[str]) -> str:
    """Return the path of images on this machine. UserError: it is a run directory, which holds none to evaluate."""
    found = find_archive(path)
    if not dnnlib.is_url(os.fspath(path)) and found != os.fspath(path):
        raise dnnlib.UserError(f"{path}: is a run; sample it first, cleanscore.sample({str(path)!r}, 1000)")
    return found


def detect(
    archive: str | os.PathLike[str],
    *,
    preset: str | None = None,
    method: str | None = None,
    cls: str | os.PathLike[str] | None = None,
    epochs: int | None = None,
    foreign: bool = True,
    seed: int = 0,
    device: str = "auto",
    dest: str | os.PathLike[str] | None = None,
) -> LabelFile:
    """Return what is wrong with the labels of an archive: `noise_rate`, and for each image `is_clean`, `suggested`, ...

    archive  a ZIP or folder, its URL, or the directory of a run that was trained on it
    preset   settings of `detect_noise.py --preset`, such as "digits" for few small images that are easy to tell apart
    method   gce, cores, or confident, as in detect_noise.py; it trains a classifier. None: gce, or that of the preset
    cls      a classifier of `train_classifier.py` that decides instead: run directory, snapshot or URL
    epochs   length of the training; None: what suits the method
    foreign  look for foreign images and duplicates, too
    dest     label file X.npz to write, with X.csv and, if a classifier trains that is kept, X-classifier.pkl beside it.
             A training that was stopped then continues in the next call

    UserError: the archive has no labels, the classifier does not fit it, or the arguments contradict each other.
    """
    for name, value, known in (("method", method, METHODS), ("preset", preset, presets_of("detect_noise.py"))):
        if value is not None and value not in known:
            raise dnnlib.UserError(f"{name} {value!r} is unknown; there are {', '.join(known)}")
    if epochs is not None and epochs < 1:
        raise dnnlib.UserError(f"epochs is {epochs}, expected 1 or more")
    if cls is not None and (preset, method, epochs) != (None, None, None):
        raise dnnlib.UserError(
            f"cls: {os.fspath(cls)} decides, and nothing trains; leave out preset, method and epochs"
        )
    dest = None if dest is None else os.fspath(dest)
    if dest is not None:
        _check_dest(dest)
    path = find_archive(archive)
    settings = _detection.make_context("detect", ["--data", path, *(["--preset", preset] if preset else [])]).params
    given = {name: value for name, value in dict(method=method, epochs=epochs).items() if value is not None}
    o = dnnlib.EasyDict(settings | given | dict(cls=cls and os.fspath(cls), seed=seed))
    with tf32(False):
        device, dataset = _device(device), ImageDataset(path)
        check_labels(dataset)
        dnnlib.print_notes([*dataset.notes, *dataset.class_notes()])
        found, snapshot = find_wrong_labels(o, dataset, device, dest)
        if foreign:
            look_for_foreign(dataset, found, seed)
    if dest is not None:
        save_results(dest, dataset, found, snapshot, cls is None)
        if cls is None:
            pathlib.Path(training_state(dest)).unlink(missing_ok=True)
    return found


def _check_dest(dest: str) -> None:
    """Raise UserError if no label file can be written there. What it would replace, `find_wrong_labels` checks."""
    folder = os.path.dirname(os.path.abspath(dest))
    if not dest.lower().endswith(".npz"):
        raise dnnlib.UserError(f"dest: {dest}: the name of a label file ends in .npz")
    if os.path.isdir(dest):
        raise dnnlib.UserError(f"dest: {dest}: is a folder, expected a file name")
    if not writable(folder):
        raise dnnlib.UserError(f"dest: {dest}: cannot be written in {folder}")


@contextlib.contextmanager
def _naming(argument: str) -> Iterator[None]:
    """Turn what a script's check says about an option, '--class=cow: ...', into an error about an argument."""
    try:
        yield
    except click.UsageError as e:
        text = e.message.partition("=")[2]
        raise dnnlib.UserError(f"{argument}: {text}") from None


@click.command()
@detect_options()
def _detection(**_: Any) -> None:
    """Hold the options of detection, for their default values."""


def _device(name: str) -> torch.device:
    """Return the device of a name. UserError: there is none. `auto` is the one that the scripts would choose."""
    if name == "auto":
        return distributed.init()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:  # AssertionError: a PyTorch without CUDA
        raise dnnlib.UserError(f"device {name!r}: {e}") from None
