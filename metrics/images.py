"""Sets of images for the metrics: archives, folders and `.npz` files."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

import dnnlib
from archives.dataset import ImageDataset, draw_subset
from archives.labels import plain_labels
from torch_utils import distributed, safe_files

__all__ = [
    "ImageSource",
    "NpzImages",
    "best_labels",
    "check_same_shape",
    "describe_shape",
    "labels_are_clean",
    "open_images",
]


class ImageSource(Protocol):
    """What the metrics need from a set of images. `archives.dataset.ImageDataset` fits."""

    path: str
    archives: list[str]  # the files or folders that hold the images: one, or those of a set
    image_shape: tuple[int, int, int]  # channels, height, width
    label_dim: int  # number of classes
    labels: np.ndarray | None  # int64 [N]
    clean_labels: np.ndarray | None  # int64 [N]
    truth: str | None  # what the clean labels are, in words; None without clean labels
    class_names: list[str] | None
    outliers: np.ndarray | None  # bool [N]: does the image come from another source? None: not recorded
    cache: bool  # may the decoded images be kept in memory?

    def __len__(self) -> int: ...

    def images(self, indices: Any) -> torch.Tensor:
        """Return images uint8 [B,C,H,W] on the CPU."""

    def onehot(self, indices: Any) -> torch.Tensor:
        """Return one-hot labels float32 [B,label_dim]."""


class NpzImages:
    """Images of an `.npz`: `arr_0` holds images [N,H,W,C] uint8, `arr_1` their labels [N] if it is present.

    Raise UserError for any other content. `max_size` images are chosen by `seed` if there are more.
    Without `use_labels`, the labels are ignored.
    """

    def __init__(self, path: str, max_size: int | None = None, seed: int = 0, use_labels: bool = True):
        self.path, self.archives = path, [path]
        arrays = safe_files.read_npz(path, "expected arr_0, images [N,H,W,C] uint8")
        images, labels = arrays.get("arr_0"), arrays.get("arr_1") if use_labels else None
        if images is None or images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in (1, 3):
            found = f"holds {', '.join(arrays)}" if images is None else f"arr_0 is {images.dtype} {list(images.shape)}"
            raise dnnlib.UserError(f"{path}: {found}; expected arr_0, images [N,H,W,C] uint8, C = 1 or 3")
        if labels is not None:
            if labels.shape != images.shape[:1]:
                raise dnnlib.UserError(f"{path}: arr_1 is {list(labels.shape)}, expected {len(images)} labels")
            labels = plain_labels(labels.tolist(), f"{path}: arr_1")
        chosen = np.arange(len(images))
        if max_size is not None and max_size < len(images):
            chosen = draw_subset(len(images), max_size, seed)
        self._images, self._chosen, self.cache = images, chosen, False
        self.image_shape = (images.shape[3], *images.shape[1:3])
        self.labels = labels if labels is None else labels[chosen]
        self.clean_labels = self.truth = self.class_names = self.outliers = None
        self.label_dim = int(labels.max()) + 1 if labels is not None and len(labels) else 0

    def __len__(self) -> int:
        return len(self._chosen)

    def images(self, indices: Any) -> torch.Tensor:
        """Return images uint8 [B,C,H,W] on the CPU."""
        return torch.from_numpy(self._images[self._chosen[indices]].transpose(0, 3, 1, 2).copy())

    def onehot(self, indices: Any) -> torch.Tensor:
        """Return one-hot labels float32 [B,label_dim]."""
        return torch.nn.functional.one_hot(torch.from_numpy(self.labels[indices]), self.label_dim).float()


def open_images(path: str, num: int | None = None, seed: int = 0, use_labels: bool = True) -> ImageSource:
    """Open a folder, a ZIP archive or an `.npz` as a set of `num` images, chosen by `seed` (None: all images).

    Without `use_labels`, a note replaces the error for labels that cannot be used.
    Raise UserError if there are fewer than `num`, or fewer than 2.
    """
    if path.endswith(".npz"):
        source: ImageSource = NpzImages(path, num, seed, use_labels)
    else:
        wanted, unusable = dict(max_size=num, seed=seed, square=False), []
        try:
            source = ImageDataset(path, **wanted)
        except dnnlib.UserError as error:
            if use_labels:
                raise
            source = ImageDataset(path, use_labels=False, **wanted)  # raises again what is not about the labels
            unusable = [f"{error.message}; the labels are ignored"]
        if distributed.get_rank() == 0:
            dnnlib.print_notes([*source.notes, *unusable])
    if len(source) < (num or 2):
        needed = f"num = {num} asks for more" if num else "metrics need at least 2"
        raise dnnlib.UserError(f"found {len(source)} images in {path}, {needed}")
    return source


def labels_are_clean(source: ImageSource) -> bool:
    """Return whether `best_labels` are known to be right: somebody declared them clean, or recorded them so."""
    return source.truth is not None and source.truth.startswith("clean labels")


def best_labels(source: ImageSource) -> np.ndarray | None:
    """Return the clean labels [N] if the set has any, else its labels [N], else None."""
    return source.labels if source.clean_labels is None else source.clean_labels


def check_same_shape(source: ImageSource, other: ImageSource) -> None:
    """Raise UserError unless the images of `source` have the same size and channels as those of `other`."""
    if source.image_shape != other.image_shape:
        raise dnnlib.UserError(
            f"{source.path} has {describe_shape(source.image_shape)} images, "
            f"but {other.path} has {describe_shape(other.image_shape)} ones{_advice(source, other)}"
        )


def _advice(source: ImageSource, other: ImageSource) -> str:
    channels = {source.image_shape[0], other.image_shape[0]}
    if channels != {1, 3} or source.image_shape[1:] != other.image_shape[1:]:
        return ""
    gray = source if source.image_shape[0] == 1 else other
    return f"; dataset_tool.py --source={gray.path} --channels=3 makes RGB of the gray ones"


def describe_shape(shape: tuple[int, int, int]) -> str:
    """Return channels, height and width in words: (1, 8, 8) -> '8x8 gray'."""
    channels, height, width = shape
    return f"{width}x{height} {'gray' if channels == 1 else 'RGB' if channels == 3 else f'{channels}-channel'}"
