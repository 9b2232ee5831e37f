"""Decode image files: every format becomes uint8 [H, W, C], gray or RGB."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageFile

import dnnlib

try:
    import pyspng
except ImportError:  # Pillow decodes PNGs as well, only slower
    pyspng = None

__all__ = ["EXTENSIONS", "PNG_SIGNATURE", "decode_image", "image_shape"]

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
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What Pillow raises for damaged images.
DAMAGED = (OSError, EOFError, ValueError, ArithmeticError, RuntimeError, struct.error, zlib.error, SyntaxError,
           MemoryError, LookupError, TypeError, AttributeError)  # fmt: skip


def decode_image(data: bytes, where: object) -> np.ndarray:
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
    except DAMAGED:
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
