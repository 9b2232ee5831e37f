"""Decoding of images: every format, one limit on pixels, and an import that changes nothing in the process."""

import io
import subprocess
import sys
import warnings

import numpy as np
import PIL.Image
import pytest

import dnnlib
from archives import decode
from tests.support import synth
from tests.support.paths import ROOT


def encoded(picture, kind):
    buffer = io.BytesIO()
    picture.save(buffer, kind)
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
    assert not found


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
    with pytest.raises(dnnlib.UserError, match=r"x\.png: truncated or damaged"):
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
    for bad in (synth.png(rgb)[:-40], b"\x89PNG\r\n\x1a\n", b"", b"hello", synth.png(rgb)[:60] + bytes(200)):
        with pytest.raises(dnnlib.UserError, match="x.png: truncated or damaged"):
            decode.decode_image(bad, "x.png")
