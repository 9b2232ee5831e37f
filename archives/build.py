"""Building an archive: source -> transform, outliers, label noise -> PNGs and `dataset.json`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import dnnlib
from archives import label_noise
from archives.imported_labels import load_labels
from archives.label_file import LabelFile
from archives.sources import Source, open_source
from archives.workers import work_in_order
from archives.writer import (
    ArchiveWriter,
    Transform,
    check_destination,
    encode_png,
    fit_image,
    image_names,
    with_channels,
)

__all__ = ["Noise", "Outliers", "Summary", "build_archive", "clean_source", "replace_labels"]


@dataclass
class Noise:
    """Label noise to add. `type`: sym, asym, pair, instance or matrix; `rate` in [0, 1], or `matrix` a file."""

    type: str
    rate: float | None
    matrix: str | None
    seed: int


@dataclass
class Outliers:
    """Images of another source to put in place of some: `path` as `open_source` takes it, `percent` of the images."""

    path: str
    percent: float
    seed: int


@dataclass
class Summary:
    """What was written. `realised_rate`: share of labels that differ from the clean ones, None when unknown.

    `outliers`: how many images are on record as put in, None without a record.
    """

    path: str
    images: int
    left_out: int
    classes: int
    shape: tuple[int, ...]
    realised_rate: float | None
    outliers: int | None


def replace_labels(source: Source, path: str, key: str | None = None) -> None:
    """Gives a source the labels of a file (`--labels`); those it had become its clean labels unless it has these."""
    own_names = [source.names] if source.names is not None else []
    archive_names = image_names(0, source.length)
    labels = load_labels(path, [*own_names, archive_names], source.length, key)
    if source.class_names is not None and labels.ndim == 1 and labels.max() >= len(source.class_names):
        raise dnnlib.UserError(
            f"--labels: {path}: label {labels.max()} is too large, the source has {len(source.class_names)} classes"
        )
    if source.clean_labels is None:
        source.clean_labels = source.labels
    source.labels = labels
    source.corruption = {k: v for k, v in source.corruption.items() if k == "family" or k.startswith("outlier_")}
    if source.clean_labels is not None:
        source.corruption["noise_type"] = "imported"


def clean_source(source: Source, file: LabelFile, classes: int, fix: str) -> None:
    """Corrects a source's labels: `fix` is 'relabel' (wrong ones become the suggested) or 'drop' (left out).

    What was recorded of the noise no longer describes the labels: it moves to `corruption["cleaned"]["before"]`.
    UserError when no image would be left.
    """
    before = {k: v for k, v in source.corruption.items() if k != "family"}
    cleaned = dict(fix=fix, images=int(np.sum(~file.is_clean)), before=before)
    source.corruption = dict(family=source.corruption.get("family"), cleaned=cleaned)
    if source.class_names is None:  # the labels alone may no longer show how many classes there are
        source.class_names = [str(i) for i in range(classes)]
    if fix == "relabel":
        source.labels = np.where(file.is_clean, file.labels, file.suggested)
        return
    rows, image = np.flatnonzero(file.is_clean), source.image
    if not len(rows):
        raise dnnlib.UserError(f"--fix=drop: all {source.length} labels are believed wrong, no image would be left")
    source.image, source.length, source.labels = lambda index: image(rows[index]), len(rows), file.labels[rows]
    source.clean_labels = None if source.clean_labels is None else source.clean_labels[rows]
    source.names = [source.names[i] for i in rows]


def build_archive(
    source: Source,
    dest: str,
    transform: Transform,
    noise: Noise | None = None,
    max_images: int | None = None,
    workers: int = 0,
    channels: int | None = None,
    outliers: Outliers | None = None,
) -> Summary:
    """Writes `source` as an archive to `dest`, a .zip or a folder; see `ArchiveWriter` for what makes it atomic.

    `workers` processes (0: one a core) decode, transform, encode and write, see `work_in_order`; they change no byte.
    The first `max_images` images are used. `channels` 1 or 3 converts all of them; None keeps the first image's kind.
    An outlier takes the size, the channels and the labels of the image it replaces.
    UserError on images that do not fit together or are not square with a power of two as side.
    """
    check_destination(dest)
    count = source.length if max_images is None else min(max_images, source.length)
    classes = count_classes(source)
    T = prepare_noise(source, noise, classes)  # its errors come before the work
    foreign = prepare_outliers(source, outliers, count)
    encoder = Encoder(source, transform, noise is not None and noise.type == "instance", channels, foreign)
    with ArchiveWriter(dest) as archive:
        kept = encoder.run(archive, count, workers or available_cores())
        if not len(kept):
            raise dnnlib.UserError(f"--resolution: all {count} images are smaller than that, none is left")
        labels = None if source.labels is None else source.labels[kept]
        clean = None if source.clean_labels is None else source.clean_labels[kept]
        corruption = dict(source.corruption)
        record = None if source.outliers is None else source.outliers[kept]
        if outliers is not None:
            record = np.isin(kept, list(foreign))
            rate = outliers.percent / 100
            corruption.update(outlier_source=outliers.path, outlier_rate=rate, outlier_seed=outliers.seed)
            if corruption.get("seed") is None:  # the source's own labels may have noise of another seed
                corruption["seed"] = outliers.seed
        if noise is not None:
            clean = labels
            if T is not None:
                labels = label_noise.corrupt_labels(clean, T, noise.seed)
            else:
                labels = label_noise.instance_noise(np.stack(encoder.images), clean, noise.rate, classes, noise.seed)
            corruption.update(noise_type=noise.type, noise_rate=noise.rate, seed=noise.seed)
            corruption["T"] = None if T is None else T.tolist()
        rate = realised_rate(labels, clean)
        corruption["realised_rate"] = rate
        with dnnlib.no_garbage():
            archive.add_metadata(make_metadata(source, encoder.names, labels, clean, corruption, record))
    outlier_count = None if record is None else int(record.sum())
    return Summary(dest, len(kept), count - len(kept), classes, encoder.shape, rate, outlier_count)


def count_classes(source: Source) -> int:
    """Number of classes of a source, 0 without labels. UserError when there are more labels than class names."""
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


def prepare_noise(source: Source, noise: Noise | None, classes: int) -> np.ndarray | None:
    """T for the noise, None for none and for instance noise. UserError when the source cannot take it."""
    if noise is None:
        return None
    if source.labels is None:
        raise dnnlib.UserError(f"--noise_type={noise.type}: the source has no labels (add them with --labels)")
    if source.labels.ndim != 1:
        raise dnnlib.UserError(f"--noise_type={noise.type}: the labels are vectors, expected class numbers")
    if source.clean_labels is not None:
        raise dnnlib.UserError(
            f"--noise_type={noise.type}: the source's labels are noisy already (clean ones are recorded beside them): "
            "start from the clean source"
        )
    if noise.type == "instance":
        label_noise.check_rate(noise.rate)
        return None
    matrix = None if noise.matrix is None else label_noise.load_matrix(noise.matrix, classes)
    return label_noise.transition_matrix(noise.type, noise.rate, classes, source.corruption.get("family"), matrix)


def prepare_outliers(source: Source, outliers: Outliers | None, count: int) -> dict[int, Callable[[], np.ndarray]]:
    """{index of an image to replace: what reads the image to put there}, for the first `count` images.

    Exactly round(count * percent / 100) of them, drawn without replacement; so are the outliers, going through their
    source again only when it has fewer. UserError when it cannot be read or `source` records outliers already.
    """
    if outliers is None:
        return {}
    if source.outliers is not None:
        raise dnnlib.UserError(f"--outliers: {source.path} has outliers on record already: start from the clean source")
    number = round(count * outliers.percent / 100)
    other = open_source(outliers.path, number=max(number, 1), seed=outliers.seed, option="--outliers")
    rng = np.random.default_rng([outliers.seed, 1])  # other random numbers than the crops of `photos`
    places = rng.permutation(count)[:number]
    rounds = [rng.permutation(other.length) for _ in range(0, number, other.length)]
    chosen = np.concatenate([np.zeros(0, np.int64), *rounds])[:number]
    return {int(i): functools.partial(other.image, int(j)) for i, j in zip(places, chosen, strict=True)}


def realised_rate(labels: np.ndarray | None, clean: np.ndarray | None) -> float | None:
    """Share of labels that differ from the clean ones; None when either is unknown or they are of two kinds."""
    if labels is None or clean is None or labels.shape != clean.shape:
        return None
    return float(np.mean((labels != clean).reshape(len(labels), -1).any(axis=1)))


def make_metadata(
    source: Source, names: list[str], labels: np.ndarray | None, clean: np.ndarray | None,
    corruption: dict[str, Any], outliers: np.ndarray | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The content of `dataset.json`; `labels` is null for an archive without labels."""

    def pairs(values: np.ndarray) -> list[tuple[str, Any]]:
        return list(zip(names, values.tolist(), strict=True))

    metadata: dict[str, Any] = dict(labels=None if labels is None else pairs(labels))
    if clean is not None:
        metadata["clean_labels"] = pairs(clean)
    if outliers is not None:
        metadata["outliers"] = [names[i] for i in np.flatnonzero(outliers)]
    if source.class_names is not None:
        metadata["class_names"] = source.class_names
    empty = dict(family=None, noise_type=None, noise_rate=None, T=None, seed=None)
    metadata["corruption"] = {**empty, **corruption, "version": dnnlib.__version__}
    return metadata


class Encoded(NamedTuple):
    """What the first process hears of a part of the images, which stay where they were encoded."""

    kept: np.ndarray  # int64: indices of those that the transform does not leave out
    shapes: dict[tuple[int, ...], int]  # their shapes, each with the first index that has it
    size: int  # bytes of the PNGs
    images: list[np.ndarray]  # their pixels, when wanted


class Encoder:
    """Writes the images of a source as PNGs on several processes, in order, and checks that they fit together.

    `shape` [H, W, C] of the written images, `names` theirs; `images` holds them when `keep` is set (instance noise
    looks at pixels). `channels` and `foreign` as `build_archive` and `prepare_outliers` have them.
    """

    def __init__(
        self, source: Source, transform: Transform, keep: bool, channels: int | None,
        foreign: dict[int, Callable[[], np.ndarray]],
    ) -> None:  # fmt: skip
        self._source, self._transform, self._keep, self._foreign = source, transform, keep, foreign
        first = source.image(0)
        self._convert, self._channels = channels is not None, channels or first.shape[2]
        self._step = max(1, (1 << 20) // first.size)  # about a megabyte of pixels a task
        self.shape: tuple[int, ...] = ()
        self.names: list[str] = []
        self.images: list[np.ndarray] = []

    def run(self, archive: ArchiveWriter, count: int, workers: int) -> np.ndarray:
        """Writes images 0 .. count - 1; returns the indices of those that the transform does not leave out."""
        kept = [np.zeros(0, dtype=np.int64)]

        def place(part: range, found: Encoded) -> tuple[int, int]:
            for shape, index in found.shapes.items():
                self._check(shape, index)
            self.images += found.images
            kept.append(found.kept)
            first = len(self.names)
            names = image_names(first, first + len(found.kept))
            self.names += names
            bar.update(len(part))
            return first, archive.reserve(len(names), found.size + sum(map(len, names)))

        def write(pngs: list[bytes], where: tuple[int, int]) -> bytes:
            first, offset = where
            return archive.write(offset, image_names(first, first + len(pngs)), pngs)

        parts = [range(start, min(start + self._step, count)) for start in range(0, count, self._step)]
        with tqdm(total=count, unit="img", desc="archive", disable=None, leave=False) as bar:
            archive.record(work_in_order(parts, self._encode, place, write, workers))
        return np.concatenate(kept)

    def _encode(self, part: range) -> tuple[Encoded, list[bytes]]:
        pngs: list[bytes] = []
        kept, shapes, images = [], {}, []
        for index in part:
            image = self._transform(self._same_channels(self._source.image(index), index))
            if image is not None and index in self._foreign:
                image = fit_image(self._foreign[index](), image.shape)
            if image is None:
                continue
            pngs.append(encode_png(image))
            kept.append(index)
            shapes.setdefault(image.shape, index)
            if self._keep:
                images.append(image)
        return Encoded(np.array(kept, dtype=np.int64), shapes, sum(map(len, pngs)), images), pngs

    def _same_channels(self, image: np.ndarray, index: int) -> np.ndarray:
        """Grey images among RGB ones become RGB; the reverse would lose something, so one must ask for it."""
        if image.shape[2] > self._channels and not self._convert:
            raise dnnlib.UserError(
                f"{self._source.name(index)}: is an RGB image, but {self._source.name(0)} is grey: "
                "give --channels=1 or --channels=3"
            )
        return with_channels(image, self._channels)

    def _check(self, shape: tuple[int, ...], index: int) -> None:
        if shape == self.shape:
            return
        name, size = self._source.name(index), f"{shape[1]}x{shape[0]}"
        hint = "give --transform=center-crop --resolution=WxH"
        if self.shape:
            raise dnnlib.UserError(f"{name}: is {size}, images before it are {self.shape[1]}x{self.shape[0]}: {hint}")
        if shape[0] != shape[1]:
            raise dnnlib.UserError(f"{name}: is {size} after the transform, images must be square: {hint}")
        if shape[0] & (shape[0] - 1):
            raise dnnlib.UserError(f"{name}: is {size}, the side must be a power of two: {hint}")
        self.shape = shape


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
