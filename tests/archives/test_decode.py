"""Decoding of images: every format, one limit on pixels, and an import that changes nothing in the process."""

import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import PIL.Image
import pytest

import dnnlib
from archives import decode
from tests.support import synth
from tests.support.paths import ROOT


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", decode.FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_format_is_decoded_as_pillow_does(kind, mode):
    data = encoded(PIL.Image.fromarray(synth.pictures(1)[0]).convert(mode), kind)
    image = decode.decode_image(data, "x")
    with PIL.Image.open(io.BytesIO(data)) as picture:
        assert picture.format == kind
        expected = np.asarray(picture.convert("L" if picture.mode == "L" else "RGB"))
    np.testing.assert_array_equal(image.squeeze(), expected)
    assert decode.image_shape(data, "x") == image.shape


def test_extensions_are_those_of_pillow():
    PIL.Image.init()
    ours = {extension: kind for kind, extensions in decode.FORMATS.items() for extension in extensions}
    theirs = {extension: kind for extension, kind in PIL.Image.EXTENSION.items() if kind in decode.FORMATS}
    assert ours | theirs == ours
    assert ours.keys() - theirs.keys() <= {".pfm"}  # Pillow knows it since 10.3
    assert set(ours) == decode.EXTENSIONS


@pytest.mark.parametrize("kind", decode.FORMATS)
@pytest.mark.parametrize("limit", [140, 40])
def test_one_limit_on_pixels_and_no_warning(monkeypatch, kind, limit):
    """Pillow would warn of 12 x 12 pixels above a limit of 140, and raise an error above 40."""
    data = encoded(PIL.Image.fromarray(synth.pictures(1, 12)[0]), kind)
    decode.decode_image(data, "x")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with pytest.raises(dnnlib.UserError, match=f"x: .*more .*than the limit of {limit}"):
            decode.decode_image(data, "x")
    # Files that other tests forgot to close are found at any time.
    assert not [str(warning) for warning in found if warning.category is not ResourceWarning]


def test_gif_with_a_frame_larger_than_its_canvas(monkeypatch):
    data = bytearray(encoded(PIL.Image.fromarray(synth.pictures(1, 12)[0]), "GIF"))
    data[6:10] = b"\x01\0\x01\0"  # the canvas is 1 x 1, the frame 12 x 12
    assert decode.decode_image(bytes(data), "x").shape == (12, 12, 3)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 140)
    with warnings.catch_warnings(), pytest.raises(dnnlib.UserError, match="more than the limit of 140"):
        warnings.simplefilter("ignore")
        decode.decode_image(bytes(data), "x")


def test_formats_are_told_by_content():
    data = encoded(PIL.Image.fromarray(synth.pictures(1)[0]), "TGA")  # Pillow knows it, we do not ask for it
    with pytest.raises(dnnlib.UserError, match=r"x\.png: not an image in a supported format \(PNG, JPEG, W"):
        decode.decode_image(data, "x.png")


def test_import_changes_nothing():
    code = (
        "import warnings, numpy, PIL.Image, requests\n"
        "before = list(warnings.filters), list(PIL.Image.OPEN)\n"
        "import archives.decode\n"
        "print((list(warnings.filters), list(PIL.Image.OPEN)) == before)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "True\n"


@pytest.mark.parametrize("fast", [True, False])
def test_image_formats(monkeypatch, fast):
    if not fast:
        monkeypatch.setattr(decode, "pyspng", None)
    rgb, gray = synth.pictures(1)[0], synth.pictures(1, channels=1)[0]
    np.testing.assert_array_equal(decode.decode_image(synth.png(rgb), ""), rgb)
    np.testing.assert_array_equal(decode.decode_image(synth.png(gray[..., 0]), ""), gray)
    palette = PIL.Image.fromarray(rgb).convert("P")
    buffer = io.BytesIO()
    palette.save(buffer, "png")
    np.testing.assert_array_equal(decode.decode_image(buffer.getvalue(), ""), palette.convert("RGB"))
    bits = decode.decode_image(synth.png(gray[..., 0], "1"), "")
    assert bits.shape == (8, 8, 1) and set(bits.ravel()) <= {0, 255}
    buffer = io.BytesIO()
    PIL.Image.fromarray(rgb).convert("CMYK").save(buffer, "jpeg")
    assert decode.decode_image(buffer.getvalue(), "").shape == (8, 8, 3)
    for bad in (synth.png(rgb)[:-40], b"\x89PNG\r\n\x1a\n", b"", bytes(99), synth.png(rgb)[:60] + bytes(200)):
        with pytest.raises(dnnlib.UserError, match="x.png: truncated or damaged"):
            decode.decode_image(bad, "x.png")


# EXIF's tag Orientation: the sides of the upright picture at which the first row and the first column are stored.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored(picture, orientation):
    """Return a picture's pixels in the order in which a camera of this orientation stores them."""
    row, column = SIDES[orientation]
    pixels = picture if row in ("top", "bottom") else picture.swapaxes(0, 1)
    pixels = pixels[::-1] if row in ("bottom", "right") else pixels
    return np.ascontiguousarray(pixels[:, ::-1] if column in ("right", "bottom") else pixels)


def exif(orientation):
    found = PIL.Image.Exif()
    found[0x0112] = orientation
    return found


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "TIFF LZW"])
@pytest.mark.parametrize("orientation", SIDES)
def test_images_are_upright(kind, orientation):
    """Red stands above blue and left of green, at every orientation and in every format that can hold one."""
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[8:, :, 2], picture[:, 16:, 1], picture[:8, :16, 0] = 255, 255, 255
    lossless = dict(WEBP=dict(lossless=True), JPEG=dict(quality=100, subsampling=0)).get(kind, {})
    if kind == "TIFF LZW":
        kind, lossless = "TIFF", dict(compression="tiff_lzw")
    data = encoded(PIL.Image.fromarray(stored(picture, orientation)), kind, exif=exif(orientation), **lossless)
    image = decode.decode_image(data, "x")
    assert decode.image_shape(data, "x") == image.shape == picture.shape
    assert np.abs(image.astype(int) - picture).max() <= (20 if kind == "JPEG" else 0)
    gray = encoded(PIL.Image.fromarray(stored(picture[..., 0], orientation)), kind, exif=exif(orientation), **lossless)
    if kind != "WEBP":  # which has no gray
        assert np.abs(decode.decode_image(gray, "x")[..., 0].astype(int) - picture[..., 0]).max() <= 20


def with_chunk(png, kind, content, end=False):
    """Return a PNG with one chunk more, before its pixels or at its end."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    place = png.index(b"IEND" if end else b"IDAT") - 4
    return png[:place] + chunk + png[place:]


PROFILE = exif(3).tobytes()
AS_TEXT = b"\nexif\n%8d\n%s\n" % (len(PROFILE), PROFILE.hex().encode())  # as ImageMagick writes it
TURNED = {
    "eXIf behind the pixels": (b"eXIf", PROFILE[6:], True),
    "profile as text": (b"tEXt", b"Raw profile type exif\0" + AS_TEXT),
    "profile as packed text": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(AS_TEXT)),
    "XMP": (b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="3"/>'),
}


@pytest.mark.parametrize("case", TURNED)
@pytest.mark.parametrize("fast", [True, False])
def test_wherever_a_png_holds_its_orientation(monkeypatch, case, fast):
    if not fast:
        monkeypatch.setattr(decode, "pyspng", None)
    picture = synth.pictures(1)[0]
    data = with_chunk(synth.png(stored(picture, 3)), *TURNED[case])
    np.testing.assert_array_equal(decode.decode_image(data, "x"), picture)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow says it
@pytest.mark.parametrize("content", [b"", b"MM\0*", b"II*\0\xff\xff\xff\xff", b"hello", exif(99).tobytes()[6:]])
def test_exif_data_that_make_no_sense_change_nothing(content):
    picture = synth.pictures(1)[0]
    np.testing.assert_array_equal(decode.decode_image(with_chunk(synth.png(picture), b"eXIf", content), "x"), picture)
    data = encoded(PIL.Image.fromarray(picture), "WEBP", lossless=True, exif=b"Exif\0\0" + content)
    np.testing.assert_array_equal(decode.decode_image(data, "x"), picture)


def test_usual_text_in_a_png_is_no_reason_to_read_it_slowly(monkeypatch):
    data = with_chunk(synth.png(synth.pictures(1)[0]), b"tEXt", b"Software\0matplotlib")
    monkeypatch.setattr(decode, "_open_image", None)
    assert decode.decode_image(data, "x").shape == (8, 8, 3)


# ---- transparency. Each case: an image of which the upper half is opaque, and the lower half as the case says.

RGB = synth.pictures(1)[0]
GRAY = synth.pictures(1, channels=1)[0][..., 0]
HALF = np.repeat(np.uint8([[255], [255], [255], [255], [0], [0], [0], [0]]), 8, axis=1)


def palette(transparency):
    """Return red pixels above green ones as a palette, with the transparency of PNG's palettes."""
    picture = PIL.Image.fromarray(np.repeat(np.uint8([[0], [1]]), 4, axis=0).repeat(8, axis=1))
    picture = picture.convert("P")
    picture.putpalette([255, 0, 0, 0, 255, 0])
    return picture, dict(transparency=transparency)


def png_with_color(pixels, color, bits=8):
    """Return a PNG in which one gray level or color is transparent; `bits` stores gray levels below 2**bits."""
    if bits == 8:
        return with_chunk(synth.png(pixels), b"tRNS", color)
    rows = np.packbits(np.unpackbits(pixels[..., None], axis=2)[..., 8 - bits :].reshape(len(pixels), -1), axis=1)
    raw = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", pixels.shape[1], len(pixels), bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in ((b"IHDR", header), (b"tRNS", color), (b"IDAT", raw), (b"IEND", b""))
    )


def layered(colors, alpha):
    return PIL.Image.fromarray(np.concatenate([colors.reshape(8, 8, -1), alpha[..., None]], axis=2))


@pytest.mark.parametrize("case", ["PNG RGBA", "PNG LA", "WEBP RGBA", "TIFF RGBA", "TIFF LA", "BMP RGBA"])
def test_alpha_that_is_opaque_everywhere_is_dropped(case):
    kind, mode = case.split()
    colors = RGB if mode == "RGBA" else GRAY[..., None]
    data = encoded(layered(colors, np.full_like(HALF, 255)), kind, **(dict(lossless=True) if kind == "WEBP" else {}))
    np.testing.assert_array_equal(decode.decode_image(data, "x"), colors)
    assert decode.image_shape(data, "x") == colors.shape


def test_transparent_colors_that_no_pixel_has_are_dropped():
    np.testing.assert_array_equal(decode.decode_image(png_with_color(RGB, struct.pack(">3H", 1, 2, 3)), "x"), RGB)
    unused = sorted(set(range(256)) - set(GRAY.ravel().tolist()))[0]
    np.testing.assert_array_equal(
        decode.decode_image(png_with_color(GRAY, struct.pack(">H", unused)), "x")[..., 0], GRAY
    )
    picture, options = palette(b"\xff\xff\0")
    expected = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(decode.decode_image(encoded(picture, "PNG", **options), "x"), expected)
    np.testing.assert_array_equal(decode.decode_image(encoded(picture, "GIF", transparency=2), "x"), expected)


def halves(upper, lower):
    """Return an image of two colors, uint8 [8, 8, C]."""
    return np.repeat(np.uint8([upper] * 4 + [lower] * 4)[:, None], 8, axis=1)


LEVELS = np.repeat(np.uint8([[3], [3], [3], [3], [1], [1], [1], [1]]), 8, axis=1)
# case: (file, what it shows on black, on (0, 0, 255))
TRANSPARENT = {
    "RGBA": (
        lambda: encoded(layered(halves([9, 9, 9], [255, 0, 255]), HALF), "PNG"),
        halves([9, 9, 9], [0, 0, 0]), halves([9, 9, 9], [0, 0, 255]),
    ),
    "RGBA, half": (
        lambda: encoded(layered(halves([9, 9, 9], [200, 100, 0]), np.maximum(HALF, 128)), "WEBP", lossless=True),
        halves([9, 9, 9], [100, 50, 0]), halves([9, 9, 9], [100, 50, 127]),
    ),
    "LA": (
        lambda: encoded(layered(halves([9], [200]), HALF), "PNG"), halves([9], [0]), halves([9, 9, 9], [0, 0, 255]),
    ),
    "LA in a TIFF": (
        lambda: encoded(layered(halves([9], [200]), HALF), "TIFF"), halves([9], [0]), halves([9, 9, 9], [0, 0, 255]),
    ),
    "palette": (
        lambda: encoded(palette(1)[0], "PNG", transparency=1), halves([255, 0, 0], [0, 0, 0]),
        halves([255, 0, 0], [0, 0, 255]),
    ),
    "palette, partly": (
        lambda: encoded(palette(1)[0], "PNG", transparency=b"\xff\x33"), halves([255, 0, 0], [0, 51, 0]),
        halves([255, 0, 0], [0, 51, 204]),
    ),
    "GIF": (
        lambda: encoded(palette(1)[0], "GIF", transparency=1), halves([255, 0, 0], [0, 0, 0]),
        halves([255, 0, 0], [0, 0, 255]),
    ),
    "gray and a level": (
        lambda: png_with_color(halves([9], [200])[..., 0], struct.pack(">H", 200)), halves([9], [0]),
        halves([9, 9, 9], [0, 0, 255]),
    ),
    "gray and a level with bits too many": (
        lambda: png_with_color(halves([9], [200])[..., 0], struct.pack(">H", 0x700 + 200)), halves([9], [0]),
        halves([9, 9, 9], [0, 0, 255]),
    ),
    "RGB and a color": (
        lambda: png_with_color(halves([9, 9, 9], [1, 2, 3]), struct.pack(">3H", 1, 2, 3)), halves([9, 9, 9], [0, 0, 0]),
        halves([9, 9, 9], [0, 0, 255]),
    ),
    "2-bit gray and a level": (
        lambda: png_with_color(LEVELS, struct.pack(">H", 1), bits=2), halves([255], [0]),
        halves([255, 255, 255], [0, 0, 255]),
    ),
    "1-bit gray and a level": (
        lambda: png_with_color(1 - LEVELS // 3, struct.pack(">H", 1), bits=1), halves([0], [0]),
        halves([0, 0, 0], [0, 0, 255]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TRANSPARENT)
@pytest.mark.parametrize("fast", [True, False])
def test_transparent_pixels_show_the_background_or_are_refused(monkeypatch, case, fast):
    if not fast:
        monkeypatch.setattr(decode, "pyspng", None)
    make, on_black, on_blue = TRANSPARENT[case]
    data = make()
    for ask in (decode.decode_image, decode.image_shape):
        with pytest.raises(dnnlib.UserError, match=r"x\.png: has transparent pixels.*--background=white"):
            ask(data, "x.png")
    np.testing.assert_array_equal(decode.decode_image(data, "x", (0, 0, 0)), on_black)
    np.testing.assert_array_equal(decode.decode_image(data, "x", (0, 0, 255)), on_blue)
    assert decode.image_shape(data, "x", (0, 0, 255)) == on_blue.shape


def test_16_bits_stay_refused_with_a_background():
    data = encoded(PIL.Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)), "PNG")
    with pytest.raises(dnnlib.UserError, match="x.png: has 16 bits per channel"):
        decode.decode_image(data, "x.png", (0, 0, 0))
    with pytest.raises(dnnlib.UserError, match="x.tif: pixel format I;16 is not supported"):
        decode.decode_image(encoded(PIL.Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)), "TIFF"), "x.tif")
