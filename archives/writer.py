"""Write image archives: transforms, PNG encoding, and a ZIP or folder that appears only when it is complete."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

import dnnlib
from archives.decode import PNG_SIGNATURE, Color
from archives.reader import METADATA
from archives.zip_directory import check_name, list_names
from archives.zip_writer import ZipWriter

__all__ = [
    "TRANSFORMS",
    "ArchiveWriter",
    "encode_png",
    "fit_image",
    "image_names",
    "is_zip",
    "make_transform",
    "with_channels",
]

_OTHER = "choose another name, or replace it with dataset_tool.py --overwrite"
_STAYS = "so it is no archive of this tool and stays; choose another name"
TRANSFORMS = ("center-crop", "center-crop-wide", "pad")
FOLDER = re.compile(r"\d{5,}")  # the folders of `image_names`
MEMBER = re.compile(r"\d{5,}/|\d{6,}\.png$")  # how the names of images in our ZIPs begin, also in those of samples


def image_names(start: int, stop: int) -> list[str]:
    """Return the archive's names of images start .. stop - 1: '00000/img00000000.png', ..., 1000 images per folder."""
    return [f"{i // 1000:05d}/img{i:08d}.png" for i in range(start, stop)]


# ---------------------------------------------------------------------------------------------------------------------
# Transforms, uint8 [H, W, C] -> uint8 [H', W', C].


class Transform(NamedTuple):
    """What becomes of each image, see `make_transform`."""

    apply: Callable[[np.ndarray], np.ndarray | None]  # image -> image; None: it is left out
    enlarges: Callable[[int, int], bool]  # whether an image of this height and width is enlarged

    def __call__(self, image: np.ndarray) -> np.ndarray | None:
        return self.apply(image)


def make_transform(name: str | None, resolution: tuple[int, int] | None, background: Color = (0, 0, 0)) -> Transform:
    """Return the transform of this name (None or one of TRANSFORMS) and this resolution (width, height).

    None              resizes to `resolution` if there is one, which squashes images of another shape
    center-crop       crops the largest central square, then resizes
    center-crop-wide  crops to the shape width:height, resizes, and centers the result in a black square of side width;
                      returns None for images that it would have to enlarge: they are left out
    pad               resizes the whole image until it just fits, and centers it on the `background`
    """
    if resolution is None:
        return Transform(lambda image: image, lambda _rows, _columns: False)
    width, height = resolution
    return {
        None: Transform(
            lambda image: _resize(image, width, height), lambda rows, columns: rows < height or columns < width
        ),
        "center-crop": Transform(
            lambda image: _resize(_crop(image, *[min(image.shape[:2])] * 2), width, height),
            lambda rows, columns: min(rows, columns) < max(width, height),
        ),
        "center-crop-wide": Transform(
            lambda image: _center_crop_wide(image, width, height), lambda _rows, _columns: False
        ),
        "pad": Transform(
            lambda image: _pad(image, width, height, background),
            lambda rows, columns: rows < height and columns < width,
        ),
    }[name]


def fit_image(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the largest central square of an image, resized and converted to `shape` [H, W, C], H = W."""
    return _resize(_crop(with_channels(image, shape[2]), *[min(image.shape[:2])] * 2), shape[1], shape[0])


def with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Return the image as gray (1 channel, the luma of ITU-R 601) or RGB (3 channels)."""
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


def _pad(image: np.ndarray, width: int, height: int, background: Color) -> np.ndarray:
    rows, columns = image.shape[:2]
    scale = min(width / columns, height / rows)
    inner_width, inner_height = max(1, round(columns * scale)), max(1, round(rows * scale))
    canvas = np.empty([height, width, image.shape[2]], dtype=np.uint8)
    canvas[:] = with_channels(np.array([[background]], dtype=np.uint8), image.shape[2])
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    canvas[top : top + inner_height, left : left + inner_width] = _resize(image, inner_width, inner_height)
    return canvas


# ---------------------------------------------------------------------------------------------------------------------
# PNG.


def encode_png(image: np.ndarray) -> bytes:
    """Return an uncompressed PNG of a uint8 image [H, W, C], C = 1 or 3.

    Small images compress badly, and decompression costs training time. This code writes the format itself: for 32 x 32
    pixels it is ten times faster than an image library, and the bytes do not depend on a library's version.
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
    """Writes an archive, a ZIP (`path` ends in .zip) or a folder; use it as a context manager.

    Everything goes to a temporary name beside `path`, which is renamed when the block ends without an error: there is
    never a partial archive under the final name. An archive that is there is refused, or with `overwrite` replaced (see
    `check_destination`). Missing parent folders are made. The same members give the same bytes: entries carry no time.

    With `in_place` the files of a folder appear in it at once, beside the files that it already holds, and several
    processes can write into the same folder. When the block ends with an error, the writer removes the files and the
    folders that it made, unless it shall `keep` them. All processes must construct their writers before the first one
    enters its block: the constructor notes whether the folder is new. For a ZIP `in_place` changes nothing.
    """

    def __init__(self, path: str, in_place: bool = False, overwrite: bool = False, keep: bool = False) -> None:
        self.path, self._keep = path, keep
        self._folder = None  # where a folder's files go; stays None for a ZIP
        self._in_place, self._new, self._written = in_place and not is_zip(path), not os.path.isdir(path), []
        if not self._in_place:
            check_destination(path, overwrite)

    def __enter__(self) -> ArchiveWriter:
        parent, name = os.path.split(os.path.abspath(self.path))
        os.makedirs(parent, exist_ok=True)
        if is_zip(self.path):
            with contextlib.ExitStack() as stack:
                file = stack.enter_context(dnnlib.atomic_open(self.path))
                self._zip = ZipWriter(file.fileno())
                stack.push(self._close_zip)
                self._stack = stack.pop_all()
        elif self._in_place:
            self._folder = os.path.abspath(self.path)
            os.makedirs(self._folder, exist_ok=True)
        else:
            folder, self._held = dnnlib.temporary_folder(Path(parent, name))
            self._folder = str(folder)
        return self

    def add(self, name: str, data: bytes) -> None:
        """Append a member. UserError: a name that leads out of the archive."""
        check_name(name, f"{self.path}: {name}")
        self.record([self.write(self.reserve(1, len(name.encode()) + len(data)), [name], [data])])

    def append(self, path: str) -> None:
        """Append all members of the ZIP `path`, in its order."""
        with zipfile.ZipFile(path) as part:
            for name in part.namelist():
                self.add(name, part.read(name))

    def reserve(self, count: int, size: int) -> int:
        """Reserve room for `count` members, `size` bytes of names and contents, and return the offset of that room."""
        return self._zip.reserve(count, size) if self._folder is None else 0

    def write(self, offset: int, names: Sequence[str], contents: Sequence[bytes]) -> bytes:
        """Write members to the room at `offset`; return what `record` must receive, in the order of the offsets.

        A process forked inside the block may call it, unless the folder is written in place.
        """
        if self._folder is None:
            return self._zip.write(offset, names, contents)
        for name, data in zip(names, contents, strict=True):
            target = os.path.join(self._folder, name)
            if self._in_place:
                self._written.append(target)
            try:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with open(target, "wb") as f:
                    f.write(data)
            except OSError as e:  # A full disk does not name the file.
                raise OSError(e.errno, e.strerror, os.path.join(self.path, name)) from e
        return b""

    def record(self, written: Sequence[bytes]) -> None:
        """Take note of members that were written."""
        if self._folder is None:
            self._zip.record(written)

    def add_metadata(self, metadata: dict[str, Any]) -> None:
        """Append `dataset.json`. A folder written in place gets it whole or not at all."""
        data = json.dumps(metadata, separators=(",", ":")).encode()
        if not self._in_place:
            self.add(METADATA, data)
            return
        target = os.path.join(self._folder, METADATA)
        self._written.append(target)
        with dnnlib.atomic_open(target) as f:
            f.write(data)

    def _close_zip(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self._zip.close()
        else:
            self._zip.stop()

    def _take_back(self) -> None:
        for target in self._written:
            with contextlib.suppress(OSError):
                os.remove(target)
        folders = {os.path.dirname(target) for target in self._written} - {self._folder}
        for folder in [*folders, *([self._folder] if self._new else [])]:
            with contextlib.suppress(OSError):  # Not empty: another process has files there, and will remove it.
                os.rmdir(folder)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: Any) -> None:
        if self._folder is None:
            self._stack.__exit__(kind, value, traceback)
        elif self._in_place:
            if kind is not None and not self._keep:
                self._take_back()
        else:
            try:
                if kind is None:
                    _move_folder(self._folder, self.path)
            finally:
                shutil.rmtree(self._folder, ignore_errors=True)
                os.close(self._held)


def is_zip(path: str) -> bool:
    """Return whether an archive of this name is a ZIP rather than a folder."""
    return path.lower().endswith(".zip")


def check_destination(path: str, overwrite: bool = False) -> None:
    """Raise UserError when an archive cannot be written to `path`, or would replace what is there.

    With `overwrite` it may replace an archive: a ZIP or a folder that holds `dataset.json`, folders with numbers as
    names, and nothing else; a ZIP may also hold images with numbers as names. Other images may be somebody's originals.
    """
    if is_zip(path):
        if os.path.isdir(path):
            raise dnnlib.UserError(f"{path}: is a folder, expected the name of a ZIP file")
        if os.path.lexists(path) and not overwrite:
            raise dnnlib.UserError(f"{path}: exists already, {_OTHER}")
        if os.path.exists(path):
            try:
                names = list_names(path)
            except dnnlib.UserError as e:
                raise dnnlib.UserError(f"{e.message}, {_STAYS}") from None
            _check_ours(path, names, [name for name in names if name != METADATA and not MEMBER.match(name)])
    elif os.path.isdir(path):
        found = dnnlib.list_contents(path)
        if found and not overwrite:
            raise dnnlib.UserError(f"{path}: folder is not empty, {_OTHER}")
        if found:
            _check_ours(path, found, [name for name in found if name != METADATA and not FOLDER.fullmatch(name)])
    elif os.path.lexists(path):
        raise dnnlib.UserError(f"{path}: exists and is not a folder; the name of a ZIP must end in .zip")


def _check_ours(path: str, names: list[str], foreign: list[str]) -> None:
    """Raise UserError if there are `foreign` ones among the `names` in a ZIP or folder, or no `dataset.json`."""
    if foreign or METADATA not in names:
        what = f"holds '{foreign[0]}'" if foreign else f"has no {METADATA}"
        raise dnnlib.UserError(f"{path}: {what}, {_STAYS}")


def _move_folder(source: str, path: str) -> None:
    """Move a folder to `path`. What is there goes to `source`, to be deleted; a link to a folder goes, not the folder.

    A process that is killed between the renames leaves what was there as `.NAME.XXXXXXXX.tmp.old`, which stays.
    """
    if not os.path.isdir(path) or not os.listdir(path):
        os.rename(source, path)  # also over an empty folder
        return
    old = f"{source}.old"
    os.rename(path, old)
    try:
        os.rename(source, path)
    except OSError:
        os.rename(old, path)
        raise
    os.unlink(old) if os.path.islink(old) else os.rename(old, source)
