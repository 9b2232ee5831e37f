"""Build an archive from a source: PNGs of its images, and `dataset.json` with their labels.

This file is in the order of the work. First the source gets other labels (`replace_labels`, `clean_source`), then label
noise and outliers are planned (`plan_noise`, `plan_outliers`), then all is written (`build_archive`). Planning finds
mistakes before the work begins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import dnnlib
from archives import label_noise
from archives.decisions import load_decisions
from archives.encoder import Encoder
from archives.imported_labels import load_labels
from archives.label_file import LabelFile
from archives.sources import Source, open_source
from archives.summary import Summary
from archives.writer import ArchiveWriter, Transform, check_destination, image_names
from dnnlib.threads import usable_cores

__all__ = ["Noise", "Outliers", "build_archive", "clean_source", "plan_noise", "plan_outliers",
           "replace_labels"]  # fmt: skip


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


# ---------------------------------------------------------------------------------------------------------------------
# Other labels for a source.


def replace_labels(source: Source, path: str, key: str | None = None) -> None:
    """Give a source the labels of a file (see `load_labels`). Its old labels become its clean labels, if it has none.

    A `.csv` holds decisions about single images instead (see `decide`).
    UserError: the file does not fit the source, or a label exceeds the number of class names.
    """
    own_names = [source.names] if source.names is not None else []
    archive_names = image_names(0, source.length)
    if path.lower().endswith(".csv"):
        if key is not None:
            raise dnnlib.UserError(f"{path}: a CSV has no entry '{key}', it holds decisions")
        decide(source, path, archive_names if source.names is None else source.names)
        return
    labels = load_labels(path, [*own_names, archive_names], source.length, key)
    if source.class_names is not None and labels.ndim == 1 and labels.max() >= len(source.class_names):
        raise dnnlib.UserError(
            f"{path}: label {labels.max()} is too large, the source has {len(source.class_names)} classes"
        )
    if source.clean_labels is None:
        source.clean_labels = source.labels
    source.labels = labels
    source.corruption = {k: v for k, v in source.corruption.items() if k == "family" or k.startswith("outlier_")}
    if source.clean_labels is not None:
        source.corruption["noise_type"] = "imported"


def clean_source(source: Source, file: LabelFile, classes: int, fix: str, drop_outliers: bool = False) -> None:
    """Correct the labels of a source. `fix`: 'relabel' replaces wrong labels by the suggested ones, 'drop' leaves
    these images out, 'keep' does neither. `drop_outliers` leaves out the images that the file believes foreign, too.

    The old record of the noise no longer describes the labels, so it moves to `corruption["cleaned"]["before"]`.
    UserError: no image would be left, or the file does not say which images are foreign.
    """
    left = file.is_clean if fix == "drop" else np.ones(source.length, dtype=bool)
    what: dict[str, Any] = dict(fix=fix, images=int(np.sum(~file.is_clean)))
    if drop_outliers:
        if file.is_outlier is None:
            raise dnnlib.UserError("the label file does not say which images are foreign")
        left, what["outliers"] = left & ~file.is_outlier, int(file.is_outlier.sum())
    record_cleaning(source, classes, **what)
    source.labels = np.where(file.is_clean, file.labels, file.suggested) if fix == "relabel" else file.labels
    if not left.all():
        select_images(source, left, "images are foreign or their labels are believed wrong" if drop_outliers
                      else "labels are believed wrong")  # fmt: skip


def decide(source: Source, path: str, names: Sequence[str]) -> None:
    """Correct labels and leave out images as a CSV says, which calls the images `names` (see `load_decisions`).

    UserError: the source has no class numbers, the CSV does not fit it, or no image would be left.
    """
    if source.labels is None or source.labels.ndim != 1:
        raise dnnlib.UserError(
            f"{path}: cannot be used with {source.path}, which has no labels with one class per image"
        )
    classes = count_classes(source)
    found = load_decisions(path, names, source.labels, source.class_names, classes)
    counts = dict(kept=len(found.keep), relabeled=len(found.relabel), dropped=len(found.drop))
    record_cleaning(source, classes, fix="decisions", **counts)
    source.labels = source.labels.copy()
    source.labels[found.relabel] = found.new_labels
    left = np.ones(source.length, dtype=bool)
    left[found.drop] = False
    select_images(source, left, "images are to be dropped")


def record_cleaning(source: Source, classes: int, **what: Any) -> None:
    """Record `what` was done to the labels; the record of their noise no longer describes them."""
    before = {k: v for k, v in source.corruption.items() if k != "family"}
    source.corruption = dict(family=source.corruption.get("family"), cleaned=dict(**what, before=before))
    if source.class_names is None:  # the corrected labels may not show how many classes there are
        source.class_names = [str(i) for i in range(classes)]


def select_images(source: Source, chosen: np.ndarray, problem: str) -> None:
    """Leave out all images but the `chosen`, bool [N]. UserError: none is left, because of the `problem` of all."""
    rows, image = np.flatnonzero(chosen), source.image
    if not len(rows):
        raise dnnlib.UserError(f"{source.path}: all {source.length} {problem}, so no image would be left")
    source.image, source.length = lambda index: image(rows[index]), len(rows)
    for name in ("labels", "clean_labels", "outliers"):
        if (values := getattr(source, name)) is not None:
            setattr(source, name, values[rows])
    source.names = None if source.names is None else [source.names[i] for i in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Plans.


def plan_noise(source: Source, noise_type: str, rate: float | None, matrix: str | None, seed: int) -> Noise:
    """Return label noise for a source. `matrix` is a file with T, for the type 'matrix'; the other types have a `rate`.

    UserError: the source has no labels, label vectors or clean labels on record, or the type does not fit its classes.
    """
    if source.labels is None:
        raise dnnlib.UserError("the source has no labels (add them with dataset_tool.py --labels=FILE)")
    if source.labels.ndim != 1:
        raise dnnlib.UserError("the labels are vectors, expected class numbers")
    if source.clean_labels is not None:
        raise dnnlib.UserError(
            "the source's labels are noisy already (it has clean labels on record): start from the clean source"
        )
    if noise_type == "instance":
        return Noise(noise_type, label_noise.check_rate(rate), seed, None)
    classes = count_classes(source)
    given = None if matrix is None else label_noise.load_matrix(matrix, classes)
    T = label_noise.transition_matrix(noise_type, rate, classes, source.corruption.get("family"), given)
    return Noise(noise_type, rate, seed, T)


def plan_outliers(source: Source, path: str, percent: float, seed: int, max_images: int | None = None) -> Outliers:
    """Choose images of another source, `path` (see `open_source`), and which of the first `max_images` they replace.

    Exactly round(count * percent / 100) images are replaced. They are drawn without replacement, and so are the
    outliers, unless their source has fewer: then each is used once before any is used again.
    UserError: the other source cannot be read, or `source` has outliers on record.
    """
    if source.outliers is not None:
        raise dnnlib.UserError(f"{source.path} has outliers on record already: start from the clean source")
    count = count_images(source, max_images)
    number = round(count * percent / 100)
    other = open_source(path, number=max(number, 1), seed=seed)
    rng = np.random.default_rng([seed, 1])  # independent of the crops of `photos`, which use `seed`
    places = rng.permutation(count)[:number]
    rounds = [rng.permutation(other.length) for _ in range(0, number, other.length)]
    chosen = np.concatenate([np.zeros(0, np.int64), *rounds])[:number]
    images = {int(i): functools.partial(other.image, int(j)) for i, j in zip(places, chosen, strict=True)}
    return Outliers(path, percent, seed, images)


def count_images(source: Source, max_images: int | None) -> int:
    """Return how many images of a source are used."""
    return source.length if max_images is None else min(max_images, source.length)


def count_classes(source: Source) -> int:
    """Return the number of classes of a source, 0 without labels. UserError: a label exceeds the class names."""
    if source.labels is None:
        return 0
    if source.labels.ndim == 2:
        return source.labels.shape[1]
    known = [labels for labels in (source.labels, source.clean_labels) if labels is not None and labels.ndim == 1]
    count = max(int(labels.max()) for labels in known) + 1
    if source.class_names is None:
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
    workers: int = 0,
) -> Summary:
    """Write `source` as an archive to `dest`, a .zip or a folder, complete or not at all (see `ArchiveWriter`).

    noise, outliers  from `plan_noise`, and from `plan_outliers` with the same `max_images`; an outlier takes the size,
                     the channels and the label of the image it replaces
    max_images       use only the first images of the source
    channels         1 or 3: convert all images to gray or RGB; None: the first image decides
    workers          processes that decode, transform, encode and write (see `work_in_order`), 0 for one per core; their
                     number changes no byte of the archive

    UserError: an image cannot be read, differs in size from the others, or is not square with a power of two as side.
    """
    check_destination(dest)
    count = count_images(source, max_images)
    classes = count_classes(source)
    foreign = {} if outliers is None else outliers.images
    encoder = Encoder(source, transform, channels, foreign, keep=noise is not None and noise.type == "instance")
    with ArchiveWriter(dest) as archive:
        kept = encoder.run(archive, count, workers or usable_cores())
        if not len(kept):
            raise dnnlib.UserError(
                f"all {count} images are smaller than the resolution, none is left: "
                "choose a lower one with dataset_tool.py --resolution=WxH"
            )
        record = make_record(source, kept)
        if outliers is not None:
            record_outliers(record, outliers, kept)
        if noise is not None:
            add_noise(record, noise, classes, encoder.images)
        rate = record.corruption["realised_rate"] = realized_rate(record.labels, record.clean_labels)
        with dnnlib.no_garbage():
            archive.add_metadata(make_metadata(record, encoder.names, source.class_names))
    outlier_count = None if record.outliers is None else int(record.outliers.sum())
    return Summary(dest, len(kept), count - len(kept), classes, encoder.shape, rate, outlier_count)


# ---------------------------------------------------------------------------------------------------------------------
# `dataset.json` (docs/formats.md).


@dataclass
class Record:
    """What `dataset.json` says about the N images that were written."""

    labels: np.ndarray | None  # int64 [N] or float32 [N, D], as observed
    clean_labels: np.ndarray | None  # the labels before noise, where they are known
    outliers: np.ndarray | None  # bool [N], which images came from another source; None without a record
    corruption: dict[str, Any]  # family of the images; how labels and images were changed


def make_record(source: Source, kept: np.ndarray) -> Record:
    """Return what the source says about its images number `kept`, int64 [N]."""
    labels, clean, outliers = (
        None if values is None else values[kept] for values in (source.labels, source.clean_labels, source.outliers)
    )
    return Record(labels, clean, outliers, dict(source.corruption))


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
    if noise.T is not None:
        record.labels = label_noise.corrupt_labels(clean, noise.T, noise.seed)
    else:
        pixels = images[: len(clean)]
        record.labels = label_noise.instance_noise(pixels, clean, noise.rate, classes, noise.seed)
    record.corruption.update(noise_type=noise.type, noise_rate=noise.rate, seed=noise.seed)
    record.corruption["T"] = None if noise.T is None else noise.T.tolist()


def realized_rate(labels: np.ndarray | None, clean: np.ndarray | None) -> float | None:
    """Return the share of labels that differ from the clean ones, None if it is unknown or their shapes differ."""
    if labels is None or clean is None or labels.shape != clean.shape:
        return None
    return float(np.mean((labels != clean).reshape(len(labels), -1).any(axis=1)))


def make_metadata(record: Record, names: list[str], class_names: list[str] | None) -> dict[str, Any]:
    """Return the content of `dataset.json`. `names` are the names of the images, [N]."""

    def pairs(values: np.ndarray) -> list[tuple[str, Any]]:
        return list(zip(names, values.tolist(), strict=True))

    metadata: dict[str, Any] = dict(labels=None if record.labels is None else pairs(record.labels))
    if record.clean_labels is not None:
        metadata["clean_labels"] = pairs(record.clean_labels)
    if record.outliers is not None:
        metadata["outliers"] = [names[i] for i in np.flatnonzero(record.outliers)]
    if class_names is not None:
        metadata["class_names"] = class_names
    empty = dict(family=None, noise_type=None, noise_rate=None, T=None, seed=None)
    metadata["corruption"] = {**empty, **record.corruption, "version": dnnlib.__version__}
    return metadata
