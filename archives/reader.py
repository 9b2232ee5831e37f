"""Read image archives (a ZIP or a folder) from any number of threads: names, labels, decoded images.

The reader accepts what the tools of EDM, StyleGAN and TDSM write, folders with one subfolder per class, and plain
folders of images.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFile

import dnnlib
from torch_utils.safe_files import load_json, read_member, unpacked_limit

try:
    import pyspng
except ImportError:  # Pillow decodes PNGs as well, only slower
    pyspng = None

__all__ = ["EXTENSIONS", "METADATA", "ArchiveReader", "check_name", "decode_image", "image_shape", "match_labels",
           "plain_labels"]  # fmt: skip

# The formats that are decoded, by Pillow's names, and the file names under which they are found. Pillow goes by
# content, not by name, and knows more formats. Some of them (EPS) it hands to other programs, which run what they hold.
FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
}
EXTENSIONS = frozenset(extension for extensions in FORMATS.values() for extension in extensions)
METADATA = "dataset.json"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SHARD = re.compile(r"\d{5,6}")  # the numbered folders in archives of this project and of EDM are not classes
# What the readers of a ZIP raise for a member that is not where the directory says, or whose bytes changed.
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, RuntimeError, EOFError, ValueError,
           ArithmeticError)  # fmt: skip
# What Pillow raises for damaged images.
DAMAGED_IMAGE = (*DAMAGED, SyntaxError, MemoryError, LookupError, TypeError, AttributeError)
MEMBER_LIMIT = unpacked_limit(0)  # the most bytes that one member of a ZIP may have


class ArchiveReader:
    """The images of a ZIP or a folder, in sorted order, and its `dataset.json`. Opening an archive reads no image.

    names     image names relative to the root, with '/' between folders
    metadata  the parsed `dataset.json`, or None without one

    UserError: the file is missing, unreadable or not a ZIP; it holds no images; `dataset.json` is not a JSON object
    with `labels`; members lead out of the archive, overlap, or are links or devices.
    """

    @dnnlib.no_garbage()  # makes a ZIP entry and a label for each image, and throws nothing away
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
        self._file = dnnlib.open_file(path)  # stays open until `close`
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
        """Return the files below the folder of `dataset.json`, which is not the root when a whole folder was zipped."""
        found = [name for name in files if name.split("/")[-1] == METADATA]
        self._root = found[0][: -len(METADATA)] if len(found) == 1 else ""
        return [name[len(self._root) :] for name in files if name.startswith(self._root)]

    def close(self) -> None:
        """Close the ZIP. A folder has nothing to close."""
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self.names)

    def where(self, name: str) -> str:
        """Return the name of a member for error messages: 'archive.zip: 00000/img00000000.png'."""
        return f"{self.path}: {name}"

    def read(self, name: str) -> bytes:
        """Return the bytes of a member. Threads need no lock. UserError names a member that is damaged."""
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
        """Read at given positions of the one open file: threads share no position, so they need no lock."""
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
        """Read an unusual compression with `zipfile`, which uses a lock and the position of the file.

        Forked processes would share that position, so each of them opens the file again.
        """
        if self._owner != os.getpid():
            self._zip, self._owner = zipfile.ZipFile(self.path), os.getpid()
        return read_member(self._zip, info, MEMBER_LIMIT)

    def image(self, name: str) -> np.ndarray:
        """Return a decoded image, uint8 [H, W, C] with C = 1 or 3."""
        return decode_image(self.read(name), self.where(name))

    def _parse_metadata(self) -> dict[str, Any]:
        where = self.where(METADATA)
        metadata = load_json(self.read(METADATA), where)
        if not isinstance(metadata, dict) or "labels" not in metadata:
            raise dnnlib.UserError(f'{where}: lacks "labels" (a list of [file name, label] pairs, or null)')
        return metadata

    def labels(self, key: str = "labels") -> np.ndarray | None:
        """Return the labels in the order of `names`: int64 [N], float32 [N, D], or None when the archive has none.

        Without a `dataset.json`, images in two or more subfolders are labeled by folder (`class_names`).
        """
        if self.metadata is None:
            return self._folder_labels()[0] if key == "labels" else None
        if self.metadata.get(key) is None:
            return None
        return match_labels(self.metadata[key], self.names, f'{self.where(METADATA)}: "{key}"')

    def class_names(self) -> list[str] | None:
        """Return the names of the classes: those in the metadata, else those of the subfolders, else None."""
        if self.metadata is None:
            return self._folder_labels()[1]
        names = self.metadata.get("class_names")
        if names is None:
            return None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise dnnlib.UserError(f'{self.where(METADATA)}: "class_names" must be a list of strings')
        return list(names)

    def outliers(self) -> np.ndarray | None:
        """Return which images came from another source, bool [N] in the order of `names`; None without a record."""
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
        """Return what the archive records about its label noise and outliers, an empty dict without a record."""
        found = (self.metadata or {}).get("corruption")
        return dict(found) if isinstance(found, dict) else {}

    def _folder_labels(self) -> tuple[np.ndarray | None, list[str] | None]:
        parts = [name.split("/")[:-1] for name in self.names]
        common = os.path.commonprefix(parts)  # compares whole folder names, since these are lists
        if any(len(part) == len(common) for part in parts):
            return None, None  # some images lie next to the subfolders, or all lie in one folder
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
    """Raise UserError for what is not a file (a device never ends, a pipe waits) and for links out of the folder."""
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            if os.path.commonpath([root, os.path.realpath(path)]) != root:
                raise dnnlib.UserError(f"{where}: is a link to a file outside the folder; replace it by a copy")
            mode = os.stat(path).st_mode
    except (OSError, ValueError) as err:
        raise dnnlib.UserError(f"{where}: cannot be read ({getattr(err, 'strerror', None) or err})") from None
    if not stat.S_ISREG(mode):
        raise dnnlib.UserError(f"{where}: is not a regular file")


def _check_members(members: list[zipfile.ZipInfo], path: str) -> None:
    """Raise UserError for members that lead out of the archive, occur twice, are links, or overlap."""
    seen: set[str] = set()
    end = 0
    for info in sorted(members, key=lambda info: info.header_offset):
        where = f"{path}: {info.filename}"
        check_name(info.filename, where)
        if info.filename in seen:
            raise dnnlib.UserError(f"{where}: occurs twice in the ZIP")
        seen.add(info.filename)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise dnnlib.UserError(f"{where}: is a {'link' if kind == stat.S_IFLNK else 'special file'}, not an image")
        if info.header_offset < end:  # a few bytes could unfold into very many images
            raise dnnlib.UserError(f"{where}: overlaps the member before it")
        end = info.header_offset + 30 + len(info.filename) + info.compress_size


def check_name(name: str, where: str) -> None:
    """Raise UserError for a name that would lead out of the folder into which the member is unpacked."""
    if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
        raise dnnlib.UserError(f"{where}: the name leads out of the archive")


def _is_image(name: str) -> bool:
    parts = name.split("/")
    hidden = parts[0] == "__MACOSX" or any(part.startswith(".") for part in parts)
    return not hidden and os.path.splitext(name)[1].lower() in EXTENSIONS


# ---------------------------------------------------------------------------------------------------------------------
# Labels.


def plain_labels(values: Any, where: str) -> np.ndarray:
    """Check a list of labels and return it as int64 [N], or as float32 [N, D] when each label is a vector.

    UserError names the first label that is negative or not an integer, and says when vectors differ in length.
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
    if kinds != {int}:  # bool is a type of its own, so true and false are refused too
        bad = [v for v in values if type(v) is not int and not (type(v) is float and v.is_integer())]
        if bad:
            raise dnnlib.UserError(f"{where}: label {json.dumps(bad[0], default=str)} is not an integer")
    low, high = min(values, default=0), max(values, default=0)
    if low < 0 or high >= 1 << 31:
        raise dnnlib.UserError(f"{where}: label {low if low < 0 else high} is {'negative' if low < 0 else 'too large'}")
    return np.array(values, dtype=np.int64)


def match_labels(pairs: Any, names: list[str], where: str) -> np.ndarray:
    """Return labels given as [[name, label], ...] in the order of `names`: int64 [N] or float32 [N, D].

    UserError: an entry is not a pair, names an unknown file or occurs twice, or an image has no label.
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
    """Decode an image file into uint8 [H, W, C] with C = 1 (gray) or 3 (RGB).

    Palettes and CMYK become RGB, 1-bit images become gray. UserError names the file (`where`) when it is truncated or
    damaged, has an alpha channel, more than 8 bits per channel, or more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    kind = _png_kind(data)
    if kind is not None:
        width, height = kind[:2]
        _check_pixels(width, height, where)
        if kind[2] == 16:
            raise dnnlib.UserError(f"{where}: has 16 bits per channel, expected 8-bit gray or RGB")
        if pyspng is not None and kind[2:] in ((8, 0), (8, 2)):
            try:
                _check_chunks(data)  # pyspng ignores checksums
                image = pyspng.load(data)
            except (RuntimeError, ValueError, MemoryError):
                raise dnnlib.UserError(f"{where}: truncated or damaged image") from None
            return image.reshape(height, width, -1)
    try:
        with _open_image(data) as image:
            _check_pixels(*image.size, where)
            _check_mode(image, where)
            mode = image.mode if image.mode in ("L", "RGB") else "L" if image.mode == "1" else "RGB"
            return np.asarray(image.convert(mode)).reshape(image.height, image.width, -1)
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise dnnlib.UserError(f"{where}: more pixels than the limit of {PIL.Image.MAX_IMAGE_PIXELS:,}") from None
    except DAMAGED_IMAGE:
        raise dnnlib.UserError(f"{where}: truncated or damaged image") from None


def image_shape(data: bytes, where: str) -> tuple[int, int, int]:
    """Return (height, width, channels) of an image file: from the header of common PNGs, else by decoding it."""
    kind = _png_kind(data)
    if kind is not None and kind[2:] in ((8, 0), (8, 2)):
        _check_pixels(*kind[:2], where)
        return kind[1], kind[0], 3 if kind[3] == 2 else 1
    return decode_image(data, where).shape


def _open_image(data: bytes) -> PIL.ImageFile.ImageFile:
    """Read the header of an image in one of `FORMATS`. ValueError for other formats.

    `PIL.Image.open` does the same, but warns of sizes above its limit and raises only at twice the limit. Warnings are
    settings of the whole process, so we open the image without that check: `_check_pixels` has one limit.
    """
    if not FORMATS.keys() <= PIL.Image.OPEN.keys():
        PIL.Image.init()  # imports Pillow's decoders
    for kind in FORMATS:
        factory, accept = PIL.Image.OPEN[kind]
        if accept(data[:16]) is True:  # a text says that this Pillow was built without the decoder
            return factory(io.BytesIO(data), "")
    raise ValueError


def _png_kind(data: bytes) -> tuple[int, int, int, int] | None:
    """Return (width, height, bits per channel, color type) of a PNG; None for other formats."""
    if len(data) < 26 or data[:8] != PNG_SIGNATURE or data[12:16] != b"IHDR":
        return None
    return struct.unpack(">IIBB", data[16:26])


def _check_chunks(data: bytes) -> None:
    """Raise ValueError unless all chunks of a PNG match their checksums and the last one is IEND."""
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
        raise dnnlib.UserError(f"{where}: has {channels} channels ({mode}), expected 1 (gray) or 3 (RGB)")
    if mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV"):
        raise dnnlib.UserError(f"{where}: pixel format {mode} is not supported, expected 8-bit gray or RGB")
