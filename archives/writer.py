"""Writing image archives: transforms, PNG encoding, and a ZIP or folder that appears only when it is complete."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image

import dnnlib
from archives.reader import METADATA, PNG_SIGNATURE, check_name
from archives.zip_writer import ZipWriter

__all__ = ["TRANSFORMS", "ArchiveWriter", "encode_png", "fit_image", "image_names", "make_transform", "with_channels"]

TRANSFORMS = ("center-crop", "center-crop-wide")
Transform = Callable[[np.ndarray], "np.ndarray | None"]


def image_names(start: int, stop: int) -> list[str]:
    """'00000/img00000000.png', ...: names of images start .. stop - 1 in an archive, a thousand images a folder."""
    return [f"{i // 1000:05d}/img{i:08d}.png" for i in range(start, stop)]


# ---------------------------------------------------------------------------------------------------------------------
# Transforms, uint8 [H, W, C] -> uint8 [H', W', C].


def make_transform(name: str | None, resolution: tuple[int, int] | None) -> Transform:
    """The transform of `--transform` and `--resolution` (width, height). It returns None for an image to leave out.

    none              resizes to `resolution` when given
    center-crop       crops the largest central square, then resizes
    center-crop-wide  crops to the shape width:height, resizes, and centers the result in a black square of side width;
                      leaves out images that would have to be enlarged
    """
    if name is None:
        return (lambda image: image) if resolution is None else (lambda image: _resize(image, *resolution))
    width, height = resolution
    return {
        "center-crop": lambda image: _resize(_crop(image, *[min(image.shape[:2])] * 2), width, height),
        "center-crop-wide": lambda image: _center_crop_wide(image, width, height),
    }[name]


def fit_image(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The largest central square of an image, resized to `shape` [H, W, C] with H = W, in its number of channels."""
    return _resize(_crop(with_channels(image, shape[2]), *[min(image.shape[:2])] * 2), shape[1], shape[0])


def with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """The image as grey (1; the luma of ITU-R 601) or RGB (3)."""
    if image.shape[2] == channels:
        return image
    if channels == 1:
        return np.asarray(PIL.Image.fromarray(image).convert("L"))[:, :, None]
    return np.repeat(image, 3, axis=2)


def _resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    squeezed = PIL.Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    return np.asarray(squeezed.resize((width, height), PIL.Image.Resampling.LANCZOS)).reshape(height, width, -1)


def _crop(image: np.ndarray, width: int, height: int) -> np.ndarray:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def _center_crop_wide(image: np.ndarray, width: int, height: int) -> np.ndarray | None:
    rows = round(image.shape[1] * height / width)  # of the full width, in the wanted shape
    if image.shape[1] < width or image.shape[0] < rows:
        return None
    canvas = np.zeros([width, width, image.shape[2]], dtype=np.uint8)
    top = (width - height) // 2
    canvas[top : top + height] = _resize(_crop(image, image.shape[1], rows), width, height)
    return canvas


# ---------------------------------------------------------------------------------------------------------------------
# PNG.


def encode_png(image: np.ndarray) -> bytes:
    """An uncompressed PNG of a uint8 image [H, W, C], C = 1 or 3.

    Small images compress badly and decompression costs training time. Written directly: for 32 x 32 pixels ten times
    faster than through an image library, and the same bytes whatever library version is installed.
    """
    height, width, channels = image.shape
    rows = np.zeros([height, 1 + width * channels], dtype=np.uint8)  # each row starts with its filter: 0, none
    rows[:, 1:] = image.reshape(height, -1)
    data = rows.tobytes()
    stream = [b"\x78\x01"]  # zlib header, then stored blocks: last flag, length, its complement, bytes
    for start in range(0, len(data), 65535):
        block = data[start : start + 65535]
        stream += [struct.pack("<BHH", start + 65535 >= len(data), len(block), len(block) ^ 0xFFFF), block]
    stream.append(struct.pack(">I", zlib.adler32(data)))
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    return PNG_SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"".join(stream)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


# ---------------------------------------------------------------------------------------------------------------------
# The archive.


class ArchiveWriter:
    """Writes a ZIP (`path` ends in .zip) or a folder; use as a context manager.

    All goes to a temporary name beside `path`, renamed when the block ends without an error: there is never a partial
    archive under the final name. An existing ZIP is replaced, a folder that is not empty refused. Missing parent
    folders are made. The same members give the same bytes: entries carry no time.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._stack = contextlib.ExitStack()
        check_destination(path)

    def __enter__(self) -> ArchiveWriter:
        parent, name = os.path.split(os.path.abspath(self.path))
        os.makedirs(parent, exist_ok=True)
        if is_zip(self.path):
            with contextlib.ExitStack() as stack:
                file = stack.enter_context(dnnlib.atomic_open(self.path))
                self._zip = ZipWriter(file.fileno())
                stack.push(self._close_zip)
                self._stack = stack.pop_all()
        else:
            self._zip = None
            self._temp = os.path.join(parent, f".{name}.{secrets.token_hex(4)}.tmp")
            os.mkdir(self._temp)
        return self

    def add(self, name: str, data: bytes) -> None:
        """Appends a member. UserError: a name that leads out of the archive."""
        check_name(name, f"{self.path}: {name}")
        self.record([self.write(self.reserve(1, len(name.encode()) + len(data)), [name], [data])])

    def reserve(self, count: int, size: int) -> int:
        """Room for `count` members, `size` bytes of names and contents, to be written in the block; returns where."""
        return 0 if self._zip is None else self._zip.reserve(count, size)

    def write(self, offset: int, names: Sequence[str], contents: Sequence[bytes]) -> bytes:
        """Writes members to the room at `offset`; returns what `record` is to be told, in the order of the offsets.

        A process forked inside the block may do it.
        """
        if self._zip is not None:
            return self._zip.write(offset, names, contents)
        for name, data in zip(names, contents, strict=True):
            target = os.path.join(self._temp, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "wb") as f:
                f.write(data)
        return b""

    def record(self, written: Sequence[bytes]) -> None:
        """Takes note of members that were written."""
        if self._zip is not None:
            self._zip.record(written)

    def add_metadata(self, metadata: dict[str, Any]) -> None:
        """Appends `dataset.json`."""
        self.add(METADATA, json.dumps(metadata, separators=(",", ":")).encode())

    def _close_zip(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self._zip.close()
        else:
            self._zip.stop()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: Any) -> None:
        if self._zip is not None:
            self._stack.__exit__(kind, value, traceback)
        elif kind is None:
            os.rename(self._temp, self.path)  # also over an empty folder
        else:
            shutil.rmtree(self._temp, ignore_errors=True)


def is_zip(path: str) -> bool:
    return path.lower().endswith(".zip")


def check_destination(path: str) -> None:
    """UserError when `path` cannot become an archive: of the wrong kind, or a folder that is not empty."""
    if is_zip(path):
        if os.path.isdir(path):
            raise dnnlib.UserError(f"{path}: is a folder, expected the name of a ZIP file")
    elif os.path.isdir(path):
        if os.listdir(path):
            raise dnnlib.UserError(f"{path}: folder is not empty, choose another one or a name that ends in .zip")
    elif os.path.lexists(path):
        raise dnnlib.UserError(f"{path}: exists and is no folder; the name of a ZIP must end in .zip")
