"""Reading image archives (ZIP or folder) by index, from any number of threads, and decoding images.

Accepts what EDM's, StyleGAN's and TDSM's tools write, folders named by class, and plain folders of images.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import re
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import PIL.Image

import dnnlib
from torch_utils.safe_files import load_json, read_member, unpacked_limit

try:
    import pyspng
except ImportError:  # Pillow decodes as well, only slower
    pyspng = None

__all__ = ["ArchiveReader", "check_name", "decode_image", "image_shape", "match_labels", "ordered_map", "plain_labels"]

PIL.Image.init()
# Pillow goes by content, not by name, and hands some of the formats it knows (EPS) to other programs that run them.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
EXTENSIONS = frozenset(ext.lower() for ext, kind in PIL.Image.EXTENSION.items() if kind in FORMATS)
METADATA = "dataset.json"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SHARD = re.compile(r"\d{5,6}")  # the numbered folders of this project's and EDM's archives: no class names

# Pillow warns at its limit and raises at twice the limit; one limit, always an error, is what a reader can rely on.
warnings.filterwarnings("error", category=PIL.Image.DecompressionBombWarning)
# What a member that is no ZIP entry, or whose bytes changed, makes of the readers.
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, RuntimeError, EOFError, ValueError,
           ArithmeticError)  # fmt: skip
MEMBER_LIMIT = unpacked_limit(0)  # bytes of one member of a ZIP


class ArchiveReader:
    """The images of a ZIP or a folder, in sorted order, and its `dataset.json`; opening reads no image.

    `names`: image names relative to the root, '/' between folders. `metadata`: the parsed `dataset.json` or None.
    UserError: missing or unreadable, not a ZIP, no images, `dataset.json` that is not a JSON object with `labels`,
    members that lead out of the archive, lie over each other, or are links or devices.
    """

    @dnnlib.no_garbage()  # an entry of the ZIP and a label for each image, and nothing to throw away
    def __init__(self, path: str) -> None:
        self.path = path
        self._file = None
        if os.path.isdir(path):
            files = sorted(_walk(path))
            self._root = ""
        else:
            self._open_zip(path)
            files = sorted(name for name in self._entries if not name.endswith("/"))
            files = self._strip_root(files)
        self.names = [name for name in files if _is_image(name)]
        if not self.names:
            kind = "folder" if self._file is None else "ZIP"
            raise dnnlib.UserError(f"{path}: {kind} without images (.png, .jpg, ...)")
        self.metadata = self._parse_metadata() if METADATA in files else None

    def _open_zip(self, path: str) -> None:
        self._file = dnnlib.open_file(path)  # stays open: the object owns it
        try:
            self._zip = zipfile.ZipFile(self._file)
            _check_members(self._zip.infolist(), path)
        except (zipfile.BadZipFile, ValueError, struct.error, OSError, OverflowError, RuntimeError):
            self._file.close()
            raise dnnlib.UserError(f"{path}: not a ZIP file (or an incomplete one)") from None
        except dnnlib.UserError:
            self._file.close()
            raise
        self._entries = {info.filename: info for info in self._zip.infolist()}
        self._owner = os.getpid()

    def _strip_root(self, files: list[str]) -> list[str]:
        """A ZIP of a folder holds everything under that folder's name: treat it as the root."""
        found = [name for name in files if name.split("/")[-1] == METADATA]
        self._root = found[0][: -len(METADATA)] if len(found) == 1 else ""
        return [name[len(self._root) :] for name in files if name.startswith(self._root)]

    def close(self) -> None:
        """Closes the ZIP; a folder has nothing to close."""
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self.names)

    def where(self, name: str) -> str:
        """How error messages call a member: 'archive.zip: 00000/img00000000.png'."""
        return f"{self.path}: {name}"

    def read(self, name: str) -> bytes:
        """The bytes of a member. Thread-safe without a lock. UserError names the member when it is damaged."""
        if self._file is None:
            try:
                with open(os.path.join(self.path, name), "rb") as f:
                    return f.read()
            except OSError as err:
                raise dnnlib.UserError(f"{self.where(name)}: cannot be read ({err.strerror or err})") from None
        try:
            return self._read_zip(self._entries[self._root + name])
        except DAMAGED:
            raise dnnlib.UserError(f"{self.where(name)}: damaged (or encrypted) in the ZIP") from None

    def _read_zip(self, info: zipfile.ZipInfo) -> bytes:
        """Positional reads of the one open file: no seek to share, so no lock and no handle per thread."""
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            return self._read_rare(info)
        if max(info.file_size, info.compress_size) > MEMBER_LIMIT:
            raise zipfile.BadZipFile
        fd = self._file.fileno()
        header = os.pread(fd, 30, info.header_offset)
        signature, name_length, extra_length = struct.unpack("<4s22xHH", header)
        if signature != b"PK\x03\x04":
            raise zipfile.BadZipFile
        data = os.pread(fd, info.compress_size, info.header_offset + 30 + name_length + extra_length)
        if info.compress_type == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-15).decompress(data, info.file_size + 1)
        if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
            raise zipfile.BadZipFile
        return data

    def _read_rare(self, info: zipfile.ZipInfo) -> bytes:
        """zipfile's own reader, which locks; forked processes share the file's position, so each opens it anew."""
        if self._owner != os.getpid():
            self._zip, self._owner = zipfile.ZipFile(self.path), os.getpid()
        return read_member(self._zip, info, MEMBER_LIMIT)

    def image(self, name: str) -> np.ndarray:
        """A decoded image, uint8 [H, W, C], C = 1 or 3."""
        return decode_image(self.read(name), self.where(name))

    def _parse_metadata(self) -> dict[str, Any]:
        where = self.where(METADATA)
        metadata = load_json(self.read(METADATA), where)
        if not isinstance(metadata, dict) or "labels" not in metadata:
            raise dnnlib.UserError(f'{where}: lacks "labels" (a list of [file name, label] pairs, or null)')
        return metadata

    def labels(self, key: str = "labels") -> np.ndarray | None:
        """Labels in the order of `names`: int64 [N], float32 [N, D], or None when the archive has none.

        Without a `dataset.json`, images in two or more sub-folders are labelled by folder (`class_names`).
        """
        if self.metadata is None:
            return self._folder_labels()[0] if key == "labels" else None
        if self.metadata.get(key) is None:
            return None
        return match_labels(self.metadata[key], self.names, f'{self.where(METADATA)}: "{key}"')

    def class_names(self) -> list[str] | None:
        """Names of the classes: from the metadata, else those of the sub-folders, else None."""
        if self.metadata is None:
            return self._folder_labels()[1]
        names = self.metadata.get("class_names")
        if names is None:
            return None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise dnnlib.UserError(f'{self.where(METADATA)}: "class_names" must be a list of strings')
        return list(names)

    def outliers(self) -> np.ndarray | None:
        """Which images were put in from another source, bool [N] in the order of `names`; None without a record."""
        listed = (self.metadata or {}).get("outliers")
        if listed is None:
            return None
        where = f'{self.where(METADATA)}: "outliers"'
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise dnnlib.UserError(f"{where} must be a list of file names")
        if absent := sorted(set(listed).difference(self.names)):
            raise dnnlib.UserError(f"{where} names '{absent[0]}', which is not among the {len(self)} images")
        return np.isin(self.names, listed)

    def corruption(self) -> dict[str, Any]:
        """What the archive records about its own label noise and outliers; an empty dict when it records nothing."""
        found = (self.metadata or {}).get("corruption")
        return dict(found) if isinstance(found, dict) else {}

    def _folder_labels(self) -> tuple[np.ndarray | None, list[str] | None]:
        parts = [name.split("/")[:-1] for name in self.names]
        common = os.path.commonprefix(parts)  # component-wise, since these are lists
        if any(len(part) == len(common) for part in parts):
            return None, None  # some images lie beside the sub-folders, or all in one folder
        folders = [part[len(common)] for part in parts]
        classes = sorted(set(folders))
        if all(SHARD.fullmatch(name) for name in classes):
            return None, None
        number = {name: i for i, name in enumerate(classes)}
        return np.array([number[name] for name in folders], dtype=np.int64), classes


def _walk(path: str) -> Iterator[str]:
    def fail(err: OSError) -> None:
        raise dnnlib.UserError(f"{err.filename or path}: cannot be read ({err.strerror or err})")

    root = os.path.realpath(path)
    for folder, _folders, files in os.walk(path, onerror=fail):
        prefix = os.path.relpath(folder, path).replace(os.sep, "/")
        for name in files:
            member = name if prefix == "." else f"{prefix}/{name}"
            if _is_image(member) or member == METADATA:
                _check_file(os.path.join(folder, name), root, f"{path}: {member}")
            yield member


def _check_file(path: str, root: str, where: str) -> None:
    """UserError for what is no file (a device never ends, a pipe waits) and for links that leave the folder."""
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            if os.path.commonpath([root, os.path.realpath(path)]) != root:
                raise dnnlib.UserError(f"{where}: is a link to a file outside the folder; put a copy in its place")
            mode = os.stat(path).st_mode
    except (OSError, ValueError) as err:
        raise dnnlib.UserError(f"{where}: cannot be read ({getattr(err, 'strerror', None) or err})") from None
    if not stat.S_ISREG(mode):
        raise dnnlib.UserError(f"{where}: is no regular file")


def _check_members(members: list[zipfile.ZipInfo], path: str) -> None:
    """UserError for members that lead out of the archive, are there twice, are links, or lie over each other."""
    seen: set[str] = set()
    end = 0
    for info in sorted(members, key=lambda info: info.header_offset):
        where = f"{path}: {info.filename}"
        check_name(info.filename, where)
        if info.filename in seen:
            raise dnnlib.UserError(f"{where}: is there twice")
        seen.add(info.filename)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise dnnlib.UserError(f"{where}: is a {'link' if kind == stat.S_IFLNK else 'special file'}, not an image")
        if info.header_offset < end:  # how a few bytes are made to unfold into very many images
            raise dnnlib.UserError(f"{where}: lies over the member before it")
        end = info.header_offset + 30 + len(info.filename) + info.compress_size


def check_name(name: str, where: str) -> None:
    """UserError for names of members that would lead out of the folder into which they are unpacked."""
    if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
        raise dnnlib.UserError(f"{where}: the name leads out of the archive")


def _is_image(name: str) -> bool:
    parts = name.split("/")
    hidden = parts[0] == "__MACOSX" or any(part.startswith(".") for part in parts)
    return not hidden and os.path.splitext(name)[1].lower() in EXTENSIONS


# ---------------------------------------------------------------------------------------------------------------------
# Labels.


def plain_labels(values: Any, where: str) -> np.ndarray:
    """Checks a list of labels: int64 [N], or float32 [N, D] when each is a vector of numbers.

    UserError names the first label that is negative, no whole number, or of another length than the others.
    """
    kinds = set(map(type, values))
    if kinds & {list, tuple}:
        if not kinds <= {list, tuple} or len(set(map(len, values))) > 1:
            raise dnnlib.UserError(f"{where}: labels are ragged (all must be integers, or all vectors of one length)")
        try:
            array = np.array(values, dtype=np.float32)
        except (TypeError, ValueError):
            array = np.zeros(0)
        if array.ndim != 2 or not array.size or not np.isfinite(array).all():
            raise dnnlib.UserError(f"{where}: label vectors must hold finite numbers")
        return array
    if kinds != {int}:  # bool is another type, so true and false are refused too
        bad = [v for v in values if type(v) is not int and not (type(v) is float and v.is_integer())]
        if bad:
            raise dnnlib.UserError(f"{where}: label {json.dumps(bad[0], default=str)} is not an integer")
    low, high = min(values, default=0), max(values, default=0)
    if low < 0 or high >= 1 << 31:
        raise dnnlib.UserError(f"{where}: label {low if low < 0 else high} is {'negative' if low < 0 else 'too large'}")
    return np.array(values, dtype=np.int64)


def match_labels(pairs: Any, names: list[str], where: str) -> np.ndarray:
    """Labels from [[name, label], ...] in any order, arranged as `names`: int64 [N] or float32 [N, D].

    UserError when an entry is no pair, names a file that is not there, is there twice, or an image has none.
    """
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
    ):
        raise dnnlib.UserError(f"{where}: must be a list of [file name, label] pairs, or null")
    table = {name.replace("\\", "/"): label for name, label in pairs}
    known = set(names)
    absent = next((name for name in table if name not in known), None)
    if absent is not None:
        raise dnnlib.UserError(f"{where}: names '{absent}', which is not among the {len(names)} images")
    missing = next((name for name in names if name not in table), None)
    if missing is not None:
        raise dnnlib.UserError(f"{where}: has {len(table)} labels for {len(names)} images, none for '{missing}'")
    if len(table) != len(pairs):
        raise dnnlib.UserError(f"{where}: {len(pairs) - len(table)} files are listed twice")
    return plain_labels([table[name] for name in names], where)


# ---------------------------------------------------------------------------------------------------------------------
# Images.


def decode_image(data: bytes, where: str) -> np.ndarray:
    """uint8 [H, W, C] with C = 1 (grey) or 3 (RGB) from the bytes of an image file.

    Palettes become RGB, 1-bit becomes grey, CMYK JPEG becomes RGB. UserError names the file (`where`) when it is
    truncated or damaged, has an alpha channel, more than 8 bits a channel, or more pixels than Pillow's limit.
    """
    kind = _png_kind(data)
    if kind is not None:
        width, height = kind[:2]
        _check_pixels(width, height, where)
        if kind[2] == 16:
            raise dnnlib.UserError(f"{where}: has 16 bits a channel, expected 8-bit grey or RGB")
        if pyspng is not None and kind[2:] in ((8, 0), (8, 2)):
            try:
                _check_chunks(data)  # pyspng ignores checksums
                image = pyspng.load(data)
            except (RuntimeError, ValueError, MemoryError):
                raise dnnlib.UserError(f"{where}: truncated or damaged image") from None
            return image.reshape(height, width, -1)
    try:
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_pixels(*image.size, where)
            _check_mode(image, where)
            mode = image.mode if image.mode in ("L", "RGB") else "L" if image.mode == "1" else "RGB"
            return np.asarray(image.convert(mode)).reshape(image.height, image.width, -1)
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise dnnlib.UserError(f"{where}: more pixels than the limit of {PIL.Image.MAX_IMAGE_PIXELS:,}") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        MemoryError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ):  # what Pillow raises on bad files
        raise dnnlib.UserError(f"{where}: truncated or damaged image") from None


def image_shape(data: bytes, where: str) -> tuple[int, int, int]:
    """(height, width, channels) of an image file: from the header for common PNGs, else by decoding it."""
    kind = _png_kind(data)
    if kind is not None and kind[2:] in ((8, 0), (8, 2)):
        _check_pixels(*kind[:2], where)
        return kind[1], kind[0], 3 if kind[3] == 2 else 1
    return decode_image(data, where).shape


def _png_kind(data: bytes) -> tuple[int, int, int, int] | None:
    """(width, height, bits a channel, color type) of a PNG; None for other formats."""
    if len(data) < 26 or data[:8] != PNG_SIGNATURE or data[12:16] != b"IHDR":
        return None
    return struct.unpack(">IIBB", data[16:26])


def _check_chunks(data: bytes) -> None:
    """ValueError unless the chunks of a PNG have their checksums and end with IEND."""
    view, start, kind = memoryview(data), 8, b""
    while kind != b"IEND":
        if start + 12 > len(data):
            raise ValueError
        size, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + size
        if end > len(data) or zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise ValueError
        start = end


def _check_pixels(width: int, height: int, where: str) -> None:
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise dnnlib.UserError(f"{where}: {width}x{height} is more than the limit of {limit:,} pixels")


def _check_mode(image: PIL.Image.Image, where: str) -> None:
    mode = image.mode
    if mode in ("LA", "La", "PA", "RGBA", "RGBa", "RGBX"):
        channels = len(image.getbands())
        raise dnnlib.UserError(f"{where}: has {channels} channels ({mode}), expected 1 (grey) or 3 (RGB)")
    if mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV"):
        raise dnnlib.UserError(f"{where}: pixel format {mode} is not supported, expected 8-bit grey or RGB")


def ordered_map(
    function: Callable[[Any], Any], items: Iterable[Any], workers: int, window: int | None = None
) -> Iterator[Any]:
    """`map` on `workers` threads: results in order, at most `window` of them ahead of the consumer.

    Threads, because the decoders and encoders used here release the interpreter lock where there is work to share.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers)
    pending = []
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= (window or 2 * workers):
                yield pending.pop(0).result()
        while pending:
            yield pending.pop(0).result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
