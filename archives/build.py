"""Build an archive from a source: PNGs of its images, and `dataset.json` with their labels.

This file is in the order of the work. First label noise and outliers are planned (`plan_noise`, `plan_outliers`), then
all is written (`build_archive`). Planning finds mistakes before the work begins. `archives/relabel.py` gives a source
other labels before that.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import dnnlib
from archives import label_noise
from archives.classes import check_name_count, check_number, name_class
from archives.decode import Color
from archives.encoder import Encoder
from archives.label_file import flagged_labels, save_label_file
from archives.labels import describe_truth
from archives.listing import count_of, quoted, some
from archives.sources import Source, open_source
from archives.summary import Summary
from archives.tables import guarded
from archives.writer import ArchiveWriter, Transform, check_destination, is_zip
from dnnlib.threads import usable_cores

__all__ = ["Noise", "Outliers", "build_archive", "count_classes", "plan_noise", "plan_outliers"]

SKIPPED = ["file", "problem"]  # columns of the list of damaged images


@dataclass
class Noise:
    """Label noise to add, from `plan_noise`."""

    type: str  # sym, asym, pair, instance or matrix
    rate: float | None  # probability of a wrong label, 0 to 1; None for a matrix, which has its own
    seed: int  # of the random numbers that choose the wrong labels
    T: np.ndarray | None  # float64 [C, C], T[clean, observed]; None for instance noise, which depends on the image


@dataclass
class Outliers:
    """Images of another source that replace some of the images, from `plan_outliers`."""

    path: str  # the other source
    percent: float  # how many images are replaced, 0 to 100
    seed: int  # of the random numbers that choose which images are replaced, and by which
    images: dict[int, Callable[[], np.ndarray]]  # for each replaced index a function that reads the other image
    names: dict[int, str]  # what that image is called


# ---------------------------------------------------------------------------------------------------------------------
# Plans.


def plan_noise(
    source: Source, noise_type: str, rate: float | None, matrix: str | None, seed: int, max_images: int | None = None
) -> Noise:
    """Return label noise for the first `max_images` of a source: no label turns into that of a class without images.

    `matrix` is a file with T, for the type 'matrix'; the other types have a `rate`.
    UserError: the source has no labels, label vectors or clean labels on record, or the type does not fit its classes.
    """
    if source.labels is None:
        raise dnnlib.UserError("the source has no labels (add them with dataset_tool.py --labels=FILE)")
    if source.labels.ndim != 1:
        raise dnnlib.UserError("the labels are vectors, expected class numbers")
    if source.clean_labels is not None and not np.array_equal(source.labels, source.clean_labels):
        raise dnnlib.UserError(
            "the source's labels are noisy already (it has clean labels on record): start from the clean source"
        )
    classes = count_classes(source, max_images)
    counts = np.bincount(source.labels[: count_images(source, max_images)], minlength=classes)
    if noise_type == "instance":
        label_noise.used_classes(counts)
        return Noise(noise_type, label_noise.check_rate(rate), seed, None)
    family, given = source.corruption.get("family"), None
    if matrix is not None:
        given = label_noise.load_matrix(matrix, classes)
        label_noise.check_targets(given, counts)
    T = label_noise.transition_matrix(noise_type, rate, classes, family, given, counts)
    if noise_type == "asym":
        targets = label_noise.asym_targets(family, classes)
        kept = [
            name_class(c, source.class_names) for c in np.flatnonzero((counts > 0) & (counts[targets] == 0)).tolist()
        ]
        if kept:
            source.notes.append(f"no noise for {some(kept)}: the class that it would turn into has no images")
    return Noise(noise_type, rate, seed, T)


def plan_outliers(
    source: Source, path: str, percent: float, seed: int, max_images: int | None = None, background: Color | None = None
) -> Outliers:
    """Choose images of another source, `path` (see `open_source`), and which of the first `max_images` they replace.

    Exactly round(count * percent / 100) images are replaced. They are drawn without replacement, and so are the
    outliers, unless their source has fewer: then each is used once before any is used again. `background` is the color
    behind their transparent pixels.
    UserError: the other source cannot be read, or `source` has outliers on record.
    """
    if source.outliers is not None:
        raise dnnlib.UserError(f"{source.path} has outliers on record already: start from the clean source")
    count = count_images(source, max_images)
    number = round(count * percent / 100)
    other = open_source(path, number=max(number, 1), seed=seed, background=background, need_labels=False)
    source.notes += other.notes
    rng = np.random.default_rng([seed, 1])  # independent of the crops of `photos`, which use `seed`
    places = rng.permutation(count)[:number]
    rounds = [rng.permutation(other.length) for _ in range(0, number, other.length)]
    chosen = np.concatenate([np.zeros(0, np.int64), *rounds])[:number]
    pairs = list(zip(places.tolist(), chosen.tolist(), strict=True))
    images = {i: functools.partial(other.image, j) for i, j in pairs}
    return Outliers(path, percent, seed, images, {i: other.name(j) for i, j in pairs})


def count_images(source: Source, max_images: int | None) -> int:
    """Return how many images of a source are used."""
    return source.length if max_images is None else min(max_images, source.length)


def count_classes(source: Source, max_images: int | None = None) -> int:
    """Return the number of classes of the first `max_images` of a source, 0 without labels.

    UserError: a label exceeds the class names, or there are more classes without names than images.
    """
    if source.labels is None:
        return 0
    if source.labels.ndim == 2:
        check_name_count(source.class_names, source.labels.shape[1], source.path)
        return source.labels.shape[1]
    images = count_images(source, max_images)
    known = [labels for labels in (source.labels, source.clean_labels) if labels is not None and labels.ndim == 1]
    count = max(int(labels[:images].max()) for labels in known) + 1
    if source.class_names is None:
        check_number(count, images, None, source.path)
        return count
    if count > len(source.class_names):
        raise dnnlib.UserError(
            f"{source.path}: names {len(source.class_names)} classes, but has labels up to {count - 1}"
        )
    return len(source.class_names)


# ---------------------------------------------------------------------------------------------------------------------
# The archive.


def build_archive(
    source: Source,
    dest: str,
    transform: Transform,
    *,
    noise: Noise | None = None,
    outliers: Outliers | None = None,
    max_images: int | None = None,
    channels: int | None = None,
    skip_damaged: bool = False,
    overwrite: bool = False,
    workers: int = 0,
) -> Summary:
    """Write `source` as an archive to `dest`, a .zip or a folder, complete or not at all (see `ArchiveWriter`).

    noise, outliers  from `plan_noise`, and from `plan_outliers` with the same `max_images`; an outlier takes the size,
                     the channels and the label of the image it replaces
    max_images       use only the first images of the source
    channels         1 or 3: convert all images to gray or RGB; None: the first image decides
    skip_damaged     leave out images that cannot be decoded, and list them in a CSV beside the archive
    overwrite        replace an archive that is there
    workers          processes that decode, transform, encode and write (see `work_in_order`), 0 for one per core; their
                     number changes no byte of the archive

    UserError: images are damaged, then it says how many; an image differs in size from the others, or is not square
    with a power of two as side.
    """
    check_destination(dest, overwrite)
    label_file = None if source.verified is None else beside(dest, "labels.npz")
    if label_file is not None and os.path.exists(label_file) and not overwrite:
        raise dnnlib.UserError(f"{label_file}: exists already, and the labels that people looked at would go there")
    skipped = beside(dest, "skipped.csv")
    ours = not os.path.lexists(skipped) or dnnlib.read_bytes(skipped).startswith(",".join(SKIPPED).encode())
    if skip_damaged and not ours:
        raise dnnlib.UserError(f"{skipped}: exists already, and the list of damaged images would go there")
    count = count_images(source, max_images)
    classes = count_classes(source, max_images)
    foreign = {} if outliers is None else outliers.images
    keep = noise is not None and noise.type == "instance"
    encoder = Encoder(source, count, transform, channels, foreign, keep, skip_damaged)
    with ArchiveWriter(dest, overwrite=overwrite) as archive:
        kept = encoder.run(archive, workers or usable_cores())
        if not len(kept):
            damaged = "damaged or " if encoder.skipped else ""
            raise dnnlib.UserError(
                f"all {count} images are {damaged}smaller than the resolution, none is left: "
                "choose a lower one with dataset_tool.py --resolution=WxH"
            )
        record = make_record(source, kept)
        if outliers is not None:
            record_outliers(record, outliers, kept)
        if noise is not None:
            add_noise(record, noise, classes, encoder.images)
        rate = record.corruption["realised_rate"] = realized_rate(record.labels, record.clean_labels)
        with dnnlib.no_garbage():
            origins = find_origins(source, kept, {} if outliers is None else outliers.names)
            archive.add_metadata(make_metadata(record, encoder.names, source.class_names, origins))
        if encoder.skipped:
            found = [(guarded(error.file.removeprefix(f"{source.path}: ")), error.problem) for error in encoder.skipped]
            dnnlib.write_csv(skipped, SKIPPED, found)
        elif overwrite and ours:
            pathlib.Path(skipped).unlink(missing_ok=True)  # of what was there
        if label_file is not None:
            right = source.verified[kept] & (record.labels == source.labels[kept])  # noise makes right labels wrong
            save_label_file(label_file, flagged_labels(encoder.names, record.labels, right, classes))
    damaged, notes = len(encoder.skipped), []
    if encoder.animated:
        examples = (name.removeprefix(f"{source.path}: ") for name in encoder.examples)
        notes.append(
            f"{source.path}: {count_of(encoder.animated, 'file')} with several frames or pages, of which the first was "
            f"taken: {some(quoted(examples), encoder.animated)}"
        )
    return Summary(
        path=dest,
        images=len(kept),
        left_out=count - len(kept) - damaged,
        damaged=damaged,
        skipped_list=skipped if damaged else None,
        label_file=label_file,
        oblong=encoder.oblong,
        enlarged=encoder.enlarged,
        classes=classes,
        counts=None
        if record.labels is None or record.labels.ndim > 1
        else np.bincount(record.labels, minlength=classes),
        class_names=source.class_names,
        shape=encoder.shape,
        noise=any(record.corruption.get(key) for key in ("noise_type", "cleaned")),
        realized_rate=rate,
        truth=None if record.clean_labels is None else describe_truth(record.corruption),
        outliers=None if record.outliers is None else int(record.outliers.sum()),
        notes=notes,
    )


def beside(dest: str, ending: str) -> str:
    """Return the name of a file beside an archive, such as X-skipped.csv for X.zip."""
    return f"{os.path.splitext(dest)[0] if is_zip(dest) else dest.rstrip(os.sep)}-{ending}"


# ---------------------------------------------------------------------------------------------------------------------
# `dataset.json` (docs/formats.md).


@dataclass
class Record:
    """What `dataset.json` says about the N images that were written."""

    labels: np.ndarray | None  # int64 [N] or float32 [N, D], as observed
    clean_labels: np.ndarray | None  # the labels before noise, where they are known
    previous_labels: np.ndarray | None  # the labels that others replaced
    outliers: np.ndarray | None  # bool [N], which images came from another source; None without a record
    corruption: dict[str, Any]  # family of the images; how labels and images were changed


def make_record(source: Source, kept: np.ndarray) -> Record:
    """Return what the source says about its images number `kept`, int64 [N]."""
    arrays = (source.labels, source.clean_labels, source.previous_labels, source.outliers)
    return Record(*(None if values is None else values[kept] for values in arrays), dict(source.corruption))


def find_origins(source: Source, kept: np.ndarray, foreign: dict[int, str]) -> list[str] | None:
    """Return the original paths of the images number `kept`, None where the source knows none.

    `foreign` holds the names of the images that replace others, by index.
    """
    origins = source.names if source.origins is None else source.origins
    if origins is None:
        return None
    origins = list(origins)
    for i, name in foreign.items():
        origins[i] = name
    return [origins[i] for i in kept.tolist()] if len(kept) < len(origins) else origins


def record_outliers(record: Record, outliers: Outliers, kept: np.ndarray) -> None:
    """Record which of the images number `kept` are outliers, and where they come from."""
    record.outliers = np.isin(kept, list(outliers.images))
    record.corruption.update(
        outlier_source=outliers.path, outlier_rate=outliers.percent / 100, outlier_seed=outliers.seed
    )
    if record.corruption.get("seed") is None:  # keep the seed of label noise that the source has already
        record.corruption["seed"] = outliers.seed


def add_noise(record: Record, noise: Noise, classes: int, images: np.ndarray | None) -> None:
    """Make the labels noisy, and record how. `images` are needed for instance noise only."""
    record.clean_labels = clean = record.labels
    T = noise.T
    if noise.type in ("sym", "asym", "pair"):  # the transform may have left out all images of a class
        counts = np.bincount(clean, minlength=classes)
        T = label_noise.transition_matrix(
            noise.type, noise.rate, classes, record.corruption.get("family"), None, counts
        )
    if T is not None:
        record.labels = label_noise.corrupt_labels(clean, T, noise.seed)
    else:
        pixels = images[: len(clean)]
        record.labels = label_noise.instance_noise(pixels, clean, noise.rate, classes, noise.seed)
    record.corruption.update(noise_type=noise.type, noise_rate=noise.rate, seed=noise.seed, clean_labels="before noise")
    record.corruption["T"] = None if T is None else T.tolist()


def realized_rate(labels: np.ndarray | None, clean: np.ndarray | None) -> float | None:
    """Return the share of labels that differ from the clean ones, None if it is unknown or their shapes differ."""
    if labels is None or clean is None or labels.shape != clean.shape:
        return None
    return float(np.mean((labels != clean).reshape(len(labels), -1).any(axis=1)))


def make_metadata(
    record: Record, names: list[str], class_names: list[str] | None, origins: list[str] | None = None
) -> dict[str, Any]:
    """Return the content of `dataset.json`. `names` are the names of the images, [N], `origins` their original ones."""

    def pairs(values: list[Any]) -> list[tuple[str, Any]]:
        return list(zip(names, values, strict=True))

    metadata: dict[str, Any] = dict(labels=None if record.labels is None else pairs(record.labels.tolist()))
    for key in ("clean_labels", "previous_labels"):
        if (values := getattr(record, key)) is not None:
            metadata[key] = pairs(values.tolist())
    if origins is not None and origins != names:
        metadata["source_names"] = pairs(origins)
    if record.outliers is not None:
        metadata["outliers"] = [names[i] for i in np.flatnonzero(record.outliers)]
    if class_names is not None:
        metadata["class_names"] = class_names
    empty = dict(family=None, noise_type=None, noise_rate=None, T=None, seed=None)
    metadata["corruption"] = {**empty, **record.corruption, "version": dnnlib.__version__}
    return metadata
