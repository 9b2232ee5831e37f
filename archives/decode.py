"""Decode image files: every format becomes uint8 [H, W, C], gray or RGB."""

from __future__ import annotations

import contextlib
import contextvars
import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import PIL.Image
import PIL.ImageFile

import dnnlib

try:
    import pyspng
except ImportError:  # Pillow decodes PNGs as well, only slower
    pyspng = None

__all__ = ["EXTENSIONS", "PNG_SIGNATURE", "Color", "DamagedFile", "decode_image", "image_shape", "list_animated"]

Color = tuple[int, int, int]  # red, green, blue, 0 to 255

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
UNKNOWN = f"not an image in a supported format ({', '.join(FORMATS)})"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What Pillow raises for damaged images.
DAMAGED = (OSError, EOFError, ValueError, ArithmeticError, RuntimeError, struct.error, zlib.error, SyntaxError,
           MemoryError, LookupError, TypeError, AttributeError)  # fmt: skip


ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")  # Pillow's modes
# EXIF's tag Orientation (CIPA DC-008, 4.6.5.1.6), and for its values how to put the stored pixels upright: whether to
# exchange rows and columns, then the steps with which to go through rows and columns.
ORIENTATION = 0x0112
EXIF_IN = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # where Pillow keeps what may hold it
UPRIGHT = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}
# Chunks of a PNG that change how its pixels look: by transparency, by an orientation, which three formats can hold, or
# because there are further frames.
LOOKS = (b"tRNS", b"eXIf", b"acTL")
TEXTS, LOOKS_IN_TEXTS = (b"tEXt", b"zTXt", b"iTXt"), (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
# What `list_animated` fills in the thread that decodes.
_ANIMATED: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("animated", default=None)


@contextlib.contextmanager
def list_animated() -> Iterator[list[str]]:
    """Yield a list that names each image decoded inside, in this thread, which has further frames or pages."""
    found: list[str] = []
    token = _ANIMATED.set(found)
    try:
        yield found
    finally:
        _ANIMATED.reset(token)


class DamagedFile(dnnlib.UserError):
    """A file of which nothing can be had. A whole set need not stop at it, unlike at an image of the wrong kind.

    `file` is what messages call it, and `problem` what is wrong with it.
    """

    def __init__(self, file: object, problem: str = "truncated or damaged image") -> None:
        self.file, self.problem = str(file), problem
        super().__init__(f"{self.file}: {problem}")
        self.args = (self.file, problem)  # with these it is made again in another process


def decode_image(data: bytes, where: object, background: Color | None = None) -> np.ndarray:
    """Decode an image file into uint8 [H, W, C] with C = 1 (gray) or 3 (RGB), upright as its EXIF data say.

    Of several frames or pages it takes the first (`list_animated` names such files). Palettes and CMYK become RGB,
    1-bit images become gray. Alpha that is opaque everywhere is dropped. Transparent pixels are blended with the
    `background`; a gray image becomes RGB if that has a color.

    DamagedFile names the file (`where`) when it is truncated or damaged, or in another format. UserError: it has
    transparent pixels and there is no background, more than 8 bits per channel, or more pixels than
    `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    kind = _png_kind(data)
    if kind is not None:
        width, height = kind[:2]
        _check_pixels(width, height, where)
        if kind[2] == 16:
            raise dnnlib.UserError(f"{where}: has 16 bits per channel, expected 8-bit gray or RGB")
        if pyspng is not None and kind[2:] in ((8, 0), (8, 2)):
            try:
                if not _read_chunks(data):  # pyspng ignores checksums
                    return pyspng.load(data).reshape(height, width, -1)
            except (RuntimeError, ValueError, MemoryError):
                raise DamagedFile(where) from None
    try:
        with _open_image(data, where) as image:
            _check_pixels(*image.size, where)
            _check_mode(image, where)
            image.load()  # a PNG may have its EXIF data after the pixels
            if kind is not None and "transparency" in image.info and kind[3] in (0, 2):
                image.info["transparency"] = _transparent_color(data, *kind[2:])
            pixels = _upright(_pixels(image, where, background), _orientation(image))
            _list_if_animated(image, where)  # last, since what follows the first frame may be damaged
            return pixels
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise dnnlib.UserError(f"{where}: more pixels than the limit of {PIL.Image.MAX_IMAGE_PIXELS:,}") from None
    except DAMAGED:
        raise DamagedFile(where) from None


def image_shape(data: bytes, where: str, background: Color | None = None) -> tuple[int, int, int]:
    """Return (height, width, channels) of an image file: from the header of common PNGs, else by decoding it."""
    kind = _png_kind(data)
    if kind is not None and kind[2:] in ((8, 0), (8, 2)):
        _check_pixels(*kind[:2], where)
        with contextlib.suppress(ValueError):
            if not _read_chunks(data, check=False):
                return kind[1], kind[0], 3 if kind[3] == 2 else 1
    return decode_image(data, where, background).shape


def _open_image(data: bytes, where: object) -> PIL.ImageFile.ImageFile:
    """Read the header of an image in one of `FORMATS`. DamagedFile for other formats; ValueError if nothing is there.

    `PIL.Image.open` does the same, but warns of sizes above its limit and raises only at twice the limit. Warnings are
    settings of the whole process, so we open the image without that check: `_check_pixels` has one limit.
    """
    if not FORMATS.keys() <= PIL.Image.OPEN.keys():
        PIL.Image.init()  # imports Pillow's decoders
    for kind in FORMATS:
        factory, accept = PIL.Image.OPEN[kind]
        if accept(data[:16]) is True:  # a text says that this Pillow was built without the decoder
            return factory(io.BytesIO(data), "")
    if any(data):  # else it was never written, although it may have its size
        raise DamagedFile(where, UNKNOWN)
    raise ValueError


def _png_kind(data: bytes) -> tuple[int, int, int, int] | None:
    """Return (width, height, bits per channel, color type) of a PNG; None for other formats."""
    if len(data) < 26 or data[:8] != PNG_SIGNATURE or data[12:16] != b"IHDR":
        return None
    return struct.unpack(">IIBB", data[16:26])


def _read_chunks(data: bytes, check: bool = True) -> dict[bytes, int]:
    """Return where the chunks of a PNG are that change how its pixels look (see `LOOKS`), most often none.

    ValueError: the last chunk is not IEND, or one does not match its checksum, with `check`.
    """
    view, start, kind, found = memoryview(data), 8, b"", {}
    while kind != b"IEND":
        if start + 12 > len(data):
            raise ValueError
        size, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + size
        if end > len(data):
            raise ValueError
        if check and zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise ValueError
        if kind > b"a":  # the names of chunks that hold the image begin with capital letters
            if kind in LOOKS or (kind in TEXTS and data.startswith(LOOKS_IN_TEXTS, start + 8)):
                found[kind] = start
        start = end
    return found


def _check_pixels(width: int, height: int, where: str) -> None:
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise dnnlib.UserError(f"{where}: {width}x{height} is more than the limit of {limit:,} pixels")


def _check_mode(image: PIL.Image.Image, where: object) -> None:
    if image.mode == "RGBX":
        raise dnnlib.UserError(f"{where}: has a fourth channel of unknown meaning, expected gray, RGB or RGBA")
    if image.mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV", *ALPHA):
        raise dnnlib.UserError(f"{where}: pixel format {image.mode} is not supported, expected 8-bit gray or RGB")


def _orientation(image: PIL.Image.Image) -> int:
    """Return the orientation of a loaded image, 1 to 8."""
    if image.format == "TIFF":  # Pillow has turned it, and some versions still call it turned
        return 1
    if EXIF_IN.isdisjoint(image.info):  # looking for it takes a tenth of the time of a small JPEG
        return 1
    try:
        return image.getexif().get(ORIENTATION, 1)
    except DAMAGED:  # the pixels are fine
        return 1


def _list_if_animated(image: PIL.Image.Image, where: object) -> None:
    found = _ANIMATED.get()
    # The further images of an MPO, as phones write it, are previews and maps of the first one.
    if found is None or image.format in ("JPEG", "MPO"):
        return
    with contextlib.suppress(*DAMAGED):
        if getattr(image, "is_animated", False):
            found.append(str(where))


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation not in UPRIGHT:
        return pixels
    turned, rows, columns = UPRIGHT[orientation]
    return np.ascontiguousarray((pixels.swapaxes(0, 1) if turned else pixels)[::rows, ::columns])


def _transparent_color(data: bytes, bits: int, color_type: int) -> int | tuple[int, ...]:
    """Return the color of a PNG that is transparent, as 8-bit gray or RGB. Pillow does not stretch it as the pixels."""
    start, most = _read_chunks(data, check=False)[b"tRNS"] + 8, (1 << bits) - 1
    values = struct.unpack_from(">H" if color_type == 0 else ">3H", data, start)
    stretched = tuple((value & most) * 255 // most for value in values)  # as the standard says, only these bits count
    return stretched[0] if color_type == 0 else stretched


def _pixels(image: PIL.Image.Image, where: object, background: Color | None) -> np.ndarray:
    """Return the pixels of a loaded image without alpha, uint8 [H, W, C] with C = 1 or 3."""
    gray = image.mode in ("1", "L", "LA", "La")
    if image.mode not in ALPHA and "transparency" not in image.info:
        mode = "L" if gray else "RGB"
        image = image if image.mode == mode else image.convert(mode)  # to convert means to copy
        return np.asarray(image).reshape(image.height, image.width, -1)
    layers = np.asarray(image.convert("LA" if gray else "RGBA"))
    colors, alpha = layers[..., :-1], layers[..., -1:].astype(np.uint16)
    if (alpha == 255).all():
        return np.ascontiguousarray(colors)
    if background is None:
        raise dnnlib.UserError(
            f"{where}: has transparent pixels, and nothing says what is behind them: "
            "make an archive with dataset_tool.py --background=white, black or R,G,B"
        )
    behind = np.array(background if len(set(background)) > 1 else background[: colors.shape[2]], dtype=np.uint16)
    return ((colors * alpha + behind * (255 - alpha) + 127) // 255).astype(np.uint8)
