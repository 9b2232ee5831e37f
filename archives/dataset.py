"""From archives to batches: a labeled image set, and an endless stream of batches that can start at any image."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

import dnnlib
from archives.archive_set import open_archives
from archives.classes import check_name_count, check_number, describe_empty
from archives.contents import describe_contents
from archives.decode import image_shape
from archives.labels import describe_truth
from archives.workers import ordered_map

__all__ = ["MEMORY_LIMIT", "BatchStream", "ImageDataset", "draw_subset", "to_float"]

MEMORY_LIMIT = 4 << 30  # bytes of decoded images up to which they stay in memory instead of being decoded again


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 images of any shape as float32 in [-1, 1], as all networks take them."""
    return images.to(torch.float32) / 127.5 - 1


def draw_subset(total: int, count: int, seed: int) -> np.ndarray:
    """Return `count` of the numbers 0 .. total - 1, sorted: those that EDM's data set draws with this seed."""
    order = np.arange(total)
    np.random.RandomState(seed % (1 << 31)).shuffle(order)
    return np.sort(order[:count])


class ImageDataset:
    """The images and labels of one or several archives (ZIPs or folders).

    Opening reads the names, the labels and one image header of each archive.

    path        ZIP or folder as written by the dataset tools of this project, EDM, StyleGAN or TDSM; or several of
                them, which are one set: a glob or a list with commas (see `find_archives`)
    use_labels  False ignores the labels of the archive
    resolution  expected side in pixels; None accepts any
    max_size    use a random subset of this many images, chosen by `seed` as in EDM
    xflip       append the mirrored images, which doubles the length
    cache       whether a `BatchStream` may keep the decoded images in memory if they fit
    square      refuse images that are not square with a power of two as side, which the U-Nets cannot take

    An item is an image or a mirrored copy of one, and every array below has one entry per item. `label_dim` counts the
    classes of the whole archive, also those without images in a subset. UserError: the archive cannot be used.
    """

    def __init__(
        self,
        path: str,
        use_labels: bool = True,
        resolution: int | None = None,
        max_size: int | None = None,
        xflip: bool = False,
        seed: int = 0,
        cache: bool = True,
        square: bool = True,
    ) -> None:
        self._reader = reader = open_archives(path)
        self.archives = reader.paths
        self._kwargs = dict(
            path=",".join(self.archives),
            use_labels=use_labels,
            resolution=resolution,
            max_size=max_size,
            xflip=xflip,
            seed=seed,
        )
        self.path, self.cache = path, cache
        self.name = os.path.splitext(os.path.basename(os.path.abspath(self.archives[0])))[0]
        if len(self.archives) > 1:
            self.name += f"+{len(self.archives) - 1}"
        height, width, self.num_channels = image_shape(reader.read(0), reader.where(0))
        self.image_shape = (self.num_channels, height, width)
        if square and (height != width or height & (height - 1)):
            raise dnnlib.UserError(
                f"{path}: images are {width}x{height}, expected square ones with a power of two as side: "
                "convert them with dataset_tool.py --transform=center-crop --resolution=WxH"
            )
        if resolution is not None and (height, width) != (resolution, resolution):
            raise dnnlib.UserError(f"{path}: images are {width}x{height}, expected {resolution}x{resolution}")
        self.resolution = height

        self.corruption = reader.corruption()
        self.family: str | None = self.corruption.get("family")
        self.class_names: list[str] | None = None
        self.label_dim = 0
        labels = clean = None
        if use_labels:
            labels, clean = reader.labels(), reader.labels("clean_labels")
        self._vectors: np.ndarray | None = None
        if labels is not None:
            self.class_names = reader.class_names()
            if labels.ndim == 2:
                check_name_count(self.class_names, labels.shape[1], path)
                self.label_dim, self._vectors, labels = labels.shape[1], labels, _from_onehot(labels)
            else:
                self.label_dim = self._count_classes(labels, clean)
            if clean is not None and clean.ndim == 2:
                clean = _from_onehot(clean)

        # The subset is drawn before images are mirrored, so it holds both copies of an image or none.
        self._raw: np.ndarray | None = None  # the rows of a subset; None: all
        self.num_raw = len(reader)
        if max_size is not None and max_size < len(reader):
            if max_size < 1:
                raise dnnlib.UserError(f"{path}: a subset must have at least 1 image, found {max_size}")
            self._raw = draw_subset(len(reader), max_size, seed)
            self.num_raw = max_size
        self._copies = 2 if xflip else 1
        self.labels = self._select(labels)
        self.clean_labels = self._select(clean)
        self.outliers = self._select(reader.outliers())  # bool, which came from another source; None without a record
        self._vectors = self._select(self._vectors)
        self._pixels: torch.Tensor | None = None
        self._held: torch.Tensor | None = None

    def _count_classes(self, labels: np.ndarray, clean: np.ndarray | None) -> int:
        count = int(labels.max()) + 1
        if clean is not None and clean.ndim == 1:
            count = max(count, int(clean.max()) + 1)
        if self.class_names is not None:
            if len(self.class_names) < count:
                raise dnnlib.UserError(
                    f'{self.path}: "class_names" has {len(self.class_names)} names, but the labels go up to {count - 1}'
                )
            count = len(self.class_names)
        return count

    def _select(self, array: np.ndarray | None) -> np.ndarray | None:
        if array is not None and self._raw is not None:
            array = array[self._raw]
        return array if array is None or self._copies == 1 else np.concatenate([array] * self._copies)

    def __len__(self) -> int:
        return self.num_raw * self._copies

    @property
    def has_labels(self) -> bool:
        return self.label_dim > 0

    @property
    def file_names(self) -> list[str]:
        """The image names in the archive, one per item."""
        names = self._reader.names
        return (list(names) if self._raw is None else [names[i] for i in self._raw]) * self._copies

    @property
    def files(self) -> list[str]:
        """The paths of the files that the images are in, one per item."""
        rows = range(self.num_raw) if self._raw is None else self._raw.tolist()
        return [self._reader.file(row) for row in rows] * self._copies

    @property
    def source_names(self) -> list[str] | None:
        """The original paths of the images, one per item; None where the archive does not know them."""
        names = self._reader.source_names()
        if names is None:
            return None
        return (names if self._raw is None else [names[i] for i in self._raw]) * self._copies

    @property
    def truth(self) -> str | None:
        """What `clean_labels` are, in words; None where they are unknown."""
        return None if self.clean_labels is None else describe_truth(self.corruption)

    def shown_name(self, index: int) -> str:
        """Return what messages call an item: its name in the archive, and its original path where that is known."""
        raw = index % self.num_raw
        return self._reader.shown_name(raw if self._raw is None else int(self._raw[raw]))

    @property
    def nbytes(self) -> int:
        """The bytes of all decoded images. Mirrored copies take no memory, since they are made when needed."""
        return self.num_raw * int(np.prod(self.image_shape))

    @property
    def shown_classes(self) -> list[str]:
        """The names of the classes, or their numbers where the archive does not name them."""
        return self.class_names or [str(c) for c in range(self.label_dim)]

    @property
    def notes(self) -> list[str]:
        """What was left out of the set or may be a mistake, one line each."""
        return self._reader.notes

    def class_notes(self) -> list[str]:
        """Return a line about classes without images, if there are any. UserError: see `images_per_class`."""
        empty = None if self.labels is None else describe_empty(self.images_per_class(), self.class_names)
        return [] if empty is None else [f"{self.path}: {empty} (dataset_tool.py --compact_labels leaves them out)"]

    def images_per_class(self, also_clean: bool = False) -> np.ndarray:
        """Return the items per class, int64 [label_dim]; with `also_clean`, those that should have it count, too.

        UserError: the classes have no names, and there are more of them than images.
        """
        check_number(self.label_dim, self.num_raw, self.class_names, self.path)
        known = [self.labels, self.clean_labels if also_clean else None]
        return sum(np.bincount(labels, minlength=self.label_dim) for labels in known if labels is not None)

    def kwargs(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain data, for snapshots and option files."""
        return dict(self._kwargs)

    def contents(self, *records: str) -> dict[str, Any]:
        """Return what identifies the images and labels wherever they lie, as plain data (`archives.contents`).

        `records` name what counts besides: "clean_labels", "outliers".
        """
        arrays = dict(labels=self.labels if self._vectors is None else self._vectors)
        arrays |= {name: getattr(self, name) for name in records}
        arrays = {name: None if array is None else array[: self.num_raw] for name, array in arrays.items()}
        return describe_contents(self._reader, classes=self.label_dim, **arrays)

    def image(self, index: int) -> np.ndarray:
        """Return one image, uint8 array [C, H, W]."""
        index = range(len(self))[index]  # negative indices, IndexError
        raw = index % self.num_raw
        pixels = self._pixels[raw].numpy() if self._pixels is not None else self._decode(raw)
        return pixels[:, :, ::-1].copy() if index >= self.num_raw else pixels

    def images(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """Return a batch of images, uint8 tensor [B, C, H, W] on the CPU."""
        indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        if self._pixels is not None:
            return _take(self._pixels, torch.from_numpy(indices), self._copies)
        return torch.from_numpy(np.stack([self.image(i) for i in indices])) if len(indices) else self._empty(0)

    def onehot(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """Return labels as the networks take them, float32 [B, label_dim]; label vectors stay unchanged."""
        indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        if self._vectors is not None:
            return torch.from_numpy(self._vectors[indices])
        if self.labels is None:
            return torch.zeros([len(indices), 0])
        return _onehot(torch.from_numpy(self.labels[indices]), self.label_dim)

    def load(self, workers: int = 1) -> torch.Tensor:
        """Decode all images on `workers` threads and keep them: uint8 [num_raw, C, H, W], without mirrored copies."""
        if self._pixels is None:
            pixels = self._empty(self.num_raw)
            table = pixels.numpy()
            step = max(1, (1 << 20) // int(np.prod(self.image_shape)))  # about 1 MiB per task

            def decode(start: int) -> None:
                for raw in range(start, min(start + step, self.num_raw)):
                    table[raw] = self._decode(raw)

            for _ in ordered_map(decode, range(0, self.num_raw, step), workers):
                pass
            self._pixels = pixels
        return self._pixels

    def hold(self, device: torch.device | str, workers: int = 1, limit: int = MEMORY_LIMIT) -> bool:
        """Decode all images and keep them on `device`. Return False if `limit` (bytes) or `cache` forbids it.

        A GPU gives a quarter of its free memory at most: the networks need the rest.
        """
        if torch.device(device).type == "cuda" and self._held is None:
            limit = min(limit, torch.cuda.mem_get_info(device)[0] // 4)
        if not self.cache or (self.nbytes > limit and self._held is None):
            return False
        if self._held is None:
            pixels, self._pixels = self.load(workers), None
            self._held = pixels.to(device)
            if self._held.device.type == "cpu":
                self._pixels = self._held
        return True

    def images_on(self, device: torch.device | str, items: torch.Tensor) -> torch.Tensor:
        """Return a batch of images, uint8 [B, C, H, W] on `device`, decoded now unless `hold` did it."""
        if self._held is not None:
            return _take(self._held, items.to(device, non_blocking=_may_run_ahead(device)), self._copies)
        return self.images(items.cpu()).to(device, non_blocking=_may_run_ahead(device))

    def _empty(self, n: int) -> torch.Tensor:
        return torch.empty([n, *self.image_shape], dtype=torch.uint8)

    def _decode(self, raw: int) -> np.ndarray:
        row = raw if self._raw is None else int(self._raw[raw])
        image, (channels, height, width) = self._reader.image(row), self.image_shape
        if image.shape != (height, width, channels):
            found = f"{image.shape[1]}x{image.shape[0]} with {image.shape[2]} channels"
            same_size = image.shape[:2] == (height, width)
            hint = ": convert all with dataset_tool.py --channels=1 (gray) or --channels=3 (RGB)" if same_size else ""
            raise dnnlib.UserError(
                f"{self._reader.where(row)}: image is {found}, the first one is {width}x{height} with {channels}{hint}"
            )
        return np.ascontiguousarray(image.transpose(2, 0, 1))


def _may_run_ahead(device: torch.device | str) -> bool:
    """Return whether a copy to `device` keeps its source until it is done; on MPS it may read freed memory."""
    return torch.device(device).type == "cuda"


class BatchStream:
    """Endless iterator over (images uint8 [b, C, H, W], labels float32 [b, label_dim]), both on `device`.

    Epoch e visits the data set in a permutation that depends on (seed, e) only. Chained, these permutations are one
    endless order of items. A global batch that starts at image number nimg covers positions nimg .. nimg + B - 1 of
    that order, B = world_size * batch_per_rank, and each rank takes its contiguous share. So the stream can start
    anywhere, and neither `workers` nor the place where images are kept changes it.

    Data of up to `memory_limit` bytes are decoded once and indexed on the device, unless the data set says
    `cache=False`. Larger data are decoded ahead of time by `workers` threads. `indices` restricts the stream to some
    items of the data set.

    The attribute `items` [b] holds the items of the latest batch: on the device if the images are kept there (then only
    the order of each epoch travels to it), else on the CPU.

    `choose_companions(items, nimg)` says which other item a loss will read beside each item of the batch that begins at
    image number nimg, int64 [b], -1: none. The threads that decode the batch decode them too, and the attribute
    `companions` uint8 [b, C, H, W] holds them, zeros for none. It is None where the images are kept on the device.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_per_rank: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_nimg: int = 0,
        device: torch.device | str = "cpu",
        workers: int = 1,
        memory_limit: int = MEMORY_LIMIT,
        indices: Sequence[int] | np.ndarray | torch.Tensor | None = None,
        choose_companions: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    ) -> None:
        self._items = np.arange(len(dataset)) if indices is None else np.asarray(indices, dtype=np.int64)
        if not len(self._items):
            raise dnnlib.UserError(f"{dataset.path}: no images are left to train on")
        self._dataset, self._batch, self._device = dataset, batch_per_rank, torch.device(device)
        self._stride, self._seed = batch_per_rank * world_size, seed
        self._before = rank * batch_per_rank  # images of other ranks that come first in a global batch
        self._position = start_nimg + self._before
        self._choose_companions = choose_companions
        self._orders: dict[int, torch.Tensor] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[tuple[torch.Tensor, Future[list[torch.Tensor]]]] = deque()
        self.items = torch.empty(0, dtype=torch.int64)
        self.companions: torch.Tensor | None = None
        self._on_device = dataset.cache and dataset.hold(self._device, workers, memory_limit)
        if self._on_device:
            source = dataset._vectors if dataset._vectors is not None else dataset.labels
            self._labels = None if source is None else torch.from_numpy(source).to(self._device)
        else:
            self._depth = max(2, workers)
            self._pool = ThreadPoolExecutor(max(1, workers))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._on_device:
            self.items = self._next_indices()
            return self._dataset.images_on(self._device, self.items), self._take_labels(self.items)
        while len(self._pending) < self._depth:
            nimg, items = self._position - self._before, self._next_indices()
            self._pending.append((items, self._pool.submit(self._fetch, items, nimg)))
        self.items, pending = self._pending.popleft()
        ahead = _may_run_ahead(self._device)
        images, labels, *rest = (x.to(self._device, non_blocking=ahead) for x in pending.result())
        self.companions = rest[0] if rest else None
        return images, labels

    def close(self) -> None:
        """Stop reading ahead."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _next_indices(self) -> torch.Tensor:
        """Return the items at the next `batch` positions, which may belong to several epochs."""
        start, stop, n = self._position, self._position + self._batch, len(self._items)
        self._position += self._stride
        touched = range(start // n, (stop - 1) // n + 1)
        self._orders = {e: self._orders[e] if e in self._orders else self._order(e) for e in touched}
        return torch.cat([self._orders[e][max(start - e * n, 0) : stop - e * n] for e in touched])

    def _order(self, epoch: int) -> torch.Tensor:
        order = torch.from_numpy(np.random.default_rng([self._seed, epoch]).permutation(self._items))
        return order.to(self._device) if self._on_device else order

    def _take_labels(self, indices: torch.Tensor) -> torch.Tensor:
        if self._labels is None:
            return torch.zeros([len(indices), 0], device=self._device)
        labels = self._labels[indices]
        return labels if labels.ndim == 2 else _onehot(labels, self._dataset.label_dim)

    def _fetch(self, indices: torch.Tensor, nimg: int) -> list[torch.Tensor]:
        batch = [self._dataset.images(indices), self._dataset.onehot(indices)]
        if self._choose_companions is not None:
            chosen = self._choose_companions(indices, nimg)
            batch.append(torch.zeros_like(batch[0]))
            batch[2][chosen >= 0] = self._dataset.images(chosen[chosen >= 0])
        # From pinned memory, the copy overlaps with the previous step.
        return [x.pin_memory() for x in batch] if self._device.type == "cuda" else batch


def _take(pixels: torch.Tensor, indices: torch.Tensor, copies: int) -> torch.Tensor:
    """Return items of the set `pixels` [N, C, H, W], which continues with its mirror images if copies = 2."""
    if copies == 1:
        return pixels[indices]
    images = pixels[indices % len(pixels)]
    mirrored = (indices >= len(pixels))[:, None, None, None]
    return torch.where(mirrored, images.flip(3), images)


def _onehot(labels: torch.Tensor, label_dim: int) -> torch.Tensor:
    return (labels[:, None] == torch.arange(label_dim, device=labels.device)).to(torch.float32)


def _from_onehot(vectors: np.ndarray) -> np.ndarray | None:
    """Return the class numbers of one-hot vectors, or None for other vectors."""
    exact = ((vectors == 0) | (vectors == 1)).all() and (vectors.sum(axis=1) == 1).all()
    return vectors.argmax(axis=1).astype(np.int64) if exact else None
