"""Label files: for each image of an archive, whether its label is believed right, how surely, and what else it may be.

`detect_noise.py` writes them, and the training scripts read them. Published label files in two other layouts are read,
too (docs/formats.md, "Label file").
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import dnnlib
from archives.label_noise import check_matrix
from archives.labels import plain_labels
from archives.posterior import TopPosterior, from_arrays, to_arrays
from torch_utils import safe_files

if TYPE_CHECKING:  # needs PyTorch, which dataset_tool.py avoids because it loads slowly
    from archives.dataset import ImageDataset

__all__ = [
    "LabelFile",
    "check_labels",
    "class_noise_rates",
    "flagged_labels",
    "is_detection",
    "load_label_file",
    "load_outlier_flags",
    "match_rows",
    "read_classes",
    "read_flags",
    "save_label_file",
]

FIELDS = ("names", "labels", "is_clean", "score", "suggested", "noise_rate", "per_class_noise_rate")
PER_IMAGE = ("suggested_score", "outlier_score", "is_outlier", "duplicate_of")
OPTIONAL = ("transition", "noise_interval", "looks_like", "source_names", "classifier", *PER_IMAGE)
EXPECTED = (
    "expected a label file of detect_noise.py, or arr_0 with flags (1: label believed right), or arr_0 with "
    "labels or images, arr_1 labels, arr_2 flags"
)


@dataclass
class LabelFile:
    """What is known about the labels of N images of C classes."""

    names: list[str]  # [N] image names in the archive
    labels: np.ndarray  # [N] int64, the observed labels
    is_clean: np.ndarray  # [N] bool, whether the label is believed right
    score: np.ndarray  # [N] float32, probability that the label is right
    suggested: np.ndarray  # [N] int64, the class that the image probably has
    noise_rate: float  # estimated share of wrong labels
    per_class_noise_rate: np.ndarray  # [C] float32, that share among the images observed as each class, or 0
    # None where unknown:
    source_names: list[str] | None = None  # [N] original paths of the images
    transition: np.ndarray | None = None  # [C,C] float64, estimate of T[clean, observed]
    noise_interval: tuple[float, float] | None = None  # lower and upper limit of the noise rate
    looks_like: np.ndarray | None = None  # [C,C] float64, mean posterior of the classifier for the images of each class
    suggested_score: np.ndarray | None = None  # [N] float32, probability that the suggested label is right
    outlier_score: np.ndarray | None = None  # [N] float32, larger for images that are more foreign
    is_outlier: np.ndarray | None = None  # [N] bool, whether the image is believed foreign
    duplicate_of: np.ndarray | None = None  # [N] int64, the first image that it equals or nearly equals, or itself
    posterior: TopPosterior | None = None  # probabilities of the classes that each image may have
    classifier: str | None = None  # SHA-256 of the snapshot of the classifier that judged the labels


def class_noise_rates(labels: np.ndarray, right: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the share of wrong labels among the images observed as each class, float32 [C]; 0 without images.

    `right` [N]: whether each label is right, or the probability that it is.

    This is eta_o = P(clean != o | observed = o) of docs/methods/sbdc.md. It differs from 1 - T[o,o] unless all classes
    are equally common.
    """
    count = np.bincount(labels, minlength=num_classes)
    wrong = np.bincount(labels, weights=1.0 - right, minlength=num_classes)
    return (wrong / np.maximum(count, 1)).astype(np.float32)


def save_label_file(path: str | os.PathLike[str], file: LabelFile) -> None:
    """Write a label file, complete or not at all. Unknown fields are left out. Nothing is pickled."""
    known = [name for name in (*FIELDS, *OPTIONAL) if getattr(file, name) is not None]
    arrays = {name: np.asarray(getattr(file, name)) for name in known}
    if file.posterior is not None:
        arrays |= to_arrays(file.posterior)
    with dnnlib.atomic_open(path) as f:
        np.savez(f, **arrays)


def is_detection(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a label file that says more than which labels are right, as a detection does.

    One that says no more may hold what people have found: dataset_tool.py writes it beside an archive.
    """
    try:
        arrays = safe_files.read_npz(os.fspath(path), EXPECTED)
    except dnnlib.UserError:
        return False
    if not set(FIELDS) <= set(arrays):
        return False
    flags = all(np.array_equal(arrays[a], arrays[b]) for a, b in (("score", "is_clean"), ("suggested", "labels")))
    return not flags or len(arrays) > len(FIELDS)


def load_label_file(path: str | os.PathLike[str], dataset: ImageDataset) -> LabelFile:
    """Load a label file for the items of `dataset`, in their order. Mirrored copies (xflip) repeat their original.

    Our own files are matched by name and may know more images than the data set. Published files are matched by
    position: `arr_0` flags; or `arr_0` labels (or images), `arr_1` classes (or labels), `arr_2` flags. One of the two
    must be the observed labels, as numbers or one-hot. These files hold neither scores nor other classes, so the score
    is the flag and the suggested label is the observed one; the noise rates are counted.

    UserError: the file is missing, has no known layout, holds pickled objects, another number of images or flags other
    than 0 and 1, lacks names, or its labels are not those of the archive; or a field is outside its range.
    """
    if dataset.labels is None:
        raise dnnlib.UserError(
            f"{path}: cannot be used with {dataset.path}, which has no labels with one class per image"
        )
    arrays = safe_files.read_npz(path, EXPECTED)
    if "names" in arrays:
        return _load_ours(str(path), arrays, dataset)
    return _load_published(str(path), arrays, dataset)


def load_outlier_flags(path: str | os.PathLike[str], dataset: ImageDataset) -> np.ndarray:
    """Return `is_outlier` of a label file for the items of `dataset`, bool [items]. The set needs no labels.

    UserError: the file holds no outliers, lacks images of the set, or holds other labels than the set.
    """
    arrays = safe_files.read_npz(path, EXPECTED)
    missing = [name for name in ("names", "is_outlier") if name not in arrays]
    if missing:
        raise dnnlib.UserError(f"{path}: lacks {', '.join(missing)}, so it does not say which images are foreign")
    order = _match_names(str(path), arrays, ("labels", "is_outlier"), dataset)
    if "labels" in arrays and dataset.labels is not None:
        check_labels(read_classes(arrays["labels"], f"{path}: labels")[order], dataset, str(path))
    return read_flags(arrays["is_outlier"], f"{path}: is_outlier")[order]


def _load_ours(path: str, arrays: dict[str, np.ndarray], dataset: ImageDataset) -> LabelFile:
    missing = [name for name in FIELDS if name not in arrays]
    if missing:
        raise dnnlib.UserError(f"{path}: lacks {', '.join(missing)}; {EXPECTED}")
    order = _match_names(path, arrays, ("labels", "is_clean", "score", "suggested", *PER_IMAGE), dataset)
    stored = read_classes(arrays["labels"], f"{path}: labels")
    labels = check_labels(stored[order], dataset, path)
    suggested = read_classes(arrays["suggested"], f"{path}: suggested")[order]
    rates = _shares(path, arrays, "per_class_noise_rate")
    if rates.shape != (dataset.label_dim,) or suggested.max() >= dataset.label_dim:
        raise dnnlib.UserError(
            f"{path}: per_class_noise_rate is {list(rates.shape)}, suggested labels go up to "
            f"{suggested.max()}, but {dataset.path} has {dataset.label_dim} classes"
        )
    file = LabelFile(
        dataset.file_names,
        labels,
        read_flags(arrays["is_clean"], f"{path}: is_clean")[order],
        _shares(path, arrays, "score")[order].astype(np.float32),
        suggested,
        float(_shares(path, arrays, "noise_rate").mean()),
        rates.astype(np.float32),
    )
    if "transition" in arrays:
        file.transition = check_matrix(arrays["transition"], dataset.label_dim, f"{path}: transition")
    if "noise_interval" in arrays:
        limits = arrays["noise_interval"]
        if limits.shape != (2,) or limits.dtype.kind != "f" or not 0 <= limits[0] <= limits[1] <= 1:
            raise dnnlib.UserError(f"{path}: noise_interval must be two numbers, 0 <= lower <= upper <= 1")
        file.noise_interval = (float(limits[0]), float(limits[1]))
    if "looks_like" in arrays:
        file.looks_like = check_matrix(arrays["looks_like"], dataset.label_dim, f"{path}: looks_like")
    if "suggested_score" in arrays:
        file.suggested_score = _shares(path, arrays, "suggested_score")[order].astype(np.float32)
    if "outlier_score" in arrays:
        values = arrays["outlier_score"]
        if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
            raise dnnlib.UserError(f"{path}: outlier_score must be finite numbers")
        file.outlier_score = values[order].astype(np.float32)
    if "is_outlier" in arrays:
        file.is_outlier = read_flags(arrays["is_outlier"], f"{path}: is_outlier")[order]
    if "duplicate_of" in arrays:
        file.duplicate_of = _duplicates(path, arrays["duplicate_of"], order, dataset)
    if "classifier" in arrays:
        if arrays["classifier"].shape != () or arrays["classifier"].dtype.kind != "U":
            raise dnnlib.UserError(f"{path}: classifier must be a text, the SHA-256 of a snapshot")
        file.classifier = str(arrays["classifier"])
    posterior = from_arrays(arrays, arrays["names"].reshape(-1), stored, dataset.label_dim, path)
    if posterior is not None:
        file.posterior = posterior.take(order)
    return file


def _match_names(path: str, arrays: dict[str, np.ndarray], fields: Iterable[str], dataset: ImageDataset) -> np.ndarray:
    """Return the rows [items] of the file that hold the items of the data set. Check the lengths of `fields`."""
    names = arrays["names"].reshape(-1).tolist()
    for field in fields:
        if field in arrays and arrays[field].shape != (len(names),):
            raise dnnlib.UserError(f"{path}: {field} is {list(arrays[field].shape)}, but there are {len(names)} names")
    origins = arrays["source_names"].reshape(-1).tolist() if "source_names" in arrays else None
    return match_rows(path, names, dataset, origins)


def match_rows(
    path: str, names: Sequence[str], dataset: ImageDataset, origins: Sequence[str] | None = None
) -> np.ndarray:
    """Return the rows [items] of a file with these image names that hold the items of the data set.

    `origins`: the original paths of these images, where the file knows them. `names` may be such paths, too. Original
    paths count first: an archive without some images of another one gives the same names to other images. Names in the
    archive count where no original path is known to both.
    UserError: the file lacks some images.
    """
    known, paths = dataset.file_names, dataset.source_names
    same_paths = origins is None or paths is None or origins == paths[: dataset.num_raw]
    if same_paths and names == known[: dataset.num_raw]:
        return np.tile(np.arange(len(names)), len(known) // len(names))
    given = names if origins is None else origins
    pairs = [(known, names)]
    if paths is not None and len(set(given)) == len(given):  # the parts of a set may have files of the same paths
        pairs.insert(0, (paths, given))
    lacking = []
    for wanted, given in pairs:
        row = {name: i for i, name in enumerate(given)}
        absent = [i for i, name in enumerate(wanted) if name not in row]
        if not absent and len(row) < len(given):
            twice = next(name for i, name in enumerate(given) if row[name] != i)
            raise dnnlib.UserError(f"{path}: has several lines about '{twice}'")
        if not absent:
            return np.array([row[name] for name in wanted])
        lacking.append((len({wanted[i] for i in absent}), absent[0]))
        if given is origins and len(absent) < len(wanted):
            break  # the same names would mean other images
    number, first = min(lacking)
    raise dnnlib.UserError(
        f"{path}: lacks {number} of the {dataset.num_raw} images of {dataset.path}, first '{dataset.shown_name(first)}'"
    )


def _shares(path: str, arrays: dict[str, np.ndarray], field: str) -> np.ndarray:
    """Return an array of the file, checked to hold numbers from 0 to 1."""
    values = arrays[field]
    if values.dtype.kind not in "biuf" or not ((values >= 0) & (values <= 1)).all():
        raise dnnlib.UserError(f"{path}: {field} must be from 0 to 1")
    return values


def _duplicates(path: str, values: np.ndarray, order: np.ndarray, dataset: ImageDataset) -> np.ndarray:
    """Return for each item the first item of its group, int64 [items], from rows of the file, int [N].

    The first image of a group may be absent from the data set. Mirrored copies have groups of their own.
    """
    n = len(values)
    if values.dtype.kind not in "iu" or not ((values >= 0) & (values < n)).all() or (values[values] != values).any():
        raise dnnlib.UserError(f"{path}: duplicate_of must name the first image of each group, by its row 0..{n - 1}")
    groups = values[order[: dataset.num_raw]]
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    copies = np.arange(len(order) // dataset.num_raw) * dataset.num_raw
    return (first[group] + copies[:, None]).reshape(-1)


def _load_published(path: str, arrays: dict[str, np.ndarray], dataset: ImageDataset) -> LabelFile:
    expected_names = [f"arr_{i}" for i in range(3 if len(arrays) > 1 else 1)]
    if sorted(arrays) != expected_names:
        raise dnnlib.UserError(f"{path}: holds {', '.join(arrays) or 'nothing'}; {EXPECTED}")
    parts = [arrays[name] for name in expected_names]
    for name, part in zip(expected_names, parts, strict=True):
        if part.ndim == 0 or len(part) != dataset.num_raw:
            found = len(part) if part.ndim else 1
            raise dnnlib.UserError(
                f"{path}: {name} has {found} entries, but {dataset.path} has {dataset.num_raw} images"
            )
    copies = len(dataset) // dataset.num_raw
    flags = np.tile(read_flags(parts[-1], f"{path}: {expected_names[-1]}"), copies)
    if len(parts) == 3:
        stated = [np.tile(read_classes(p, f"{path}: arr_{i}"), copies) for i, p in enumerate(parts[:2]) if p.ndim <= 2]
        if not stated:
            raise dnnlib.UserError(f"{path}: arr_0 and arr_1 are both images; {EXPECTED}")
        if not any((labels == dataset.labels).all() for labels in stated):
            check_labels(stated[0], dataset, path)
    return flagged_labels(dataset.file_names, dataset.labels, flags, dataset.label_dim)


def flagged_labels(names: list[str], labels: np.ndarray, flags: np.ndarray, num_classes: int) -> LabelFile:
    """Return a label file that only knows which labels [N] are right, `flags` bool [N].

    The score is the flag, the suggested label is the observed one, and the noise rates are counted.
    """
    score, rates = flags.astype(np.float32), class_noise_rates(labels, flags, num_classes)
    return LabelFile(names, labels, flags, score, labels, float(np.mean(~flags)), rates)


def read_flags(values: np.ndarray, where: str) -> np.ndarray:
    """Return bool [N] from numbers 0 and 1 of any type, [N] or [N,1]."""
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        raise dnnlib.UserError(f"{where} is {values.dtype} {list(values.shape)}, expected flags 0 or 1, one per image")
    bad = values[(values != 0) & (values != 1)]
    if len(bad):
        raise dnnlib.UserError(f"{where} holds {bad[0]:g}, expected flags: 1 (label believed right) or 0")
    return values.astype(bool)


def read_classes(values: np.ndarray, where: str) -> np.ndarray:
    """Return int64 [N] from class numbers [N] or [N,1], or from one-hot vectors [N,C]."""
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim == 2:
        if not (((values == 0) | (values == 1)).all() and (values.sum(axis=1) == 1).all()):
            raise dnnlib.UserError(f"{where}: label vectors must be one-hot")
        return values.argmax(axis=1).astype(np.int64)
    if values.ndim != 1:
        raise dnnlib.UserError(f"{where} is {list(values.shape)}, expected one label per image")
    whole = values.astype(np.int64) if values.dtype.kind == "f" and (values % 1 == 0).all() else values
    return plain_labels(whole.tolist(), where)


def check_labels(labels: np.ndarray, dataset: ImageDataset, path: str) -> np.ndarray:
    """Return the labels if they are the archive's, else raise UserError with their number and the first one."""
    differ = np.flatnonzero(labels != dataset.labels)
    if len(differ):
        i = differ[0]
        raise dnnlib.UserError(
            f"{path}: {len(differ)} of {len(labels)} labels are not those of {dataset.path}, first "
            f"'{dataset.shown_name(i)}': {labels[i]} here, {dataset.labels[i]} there"
        )
    return labels
