"""Read label, matrix and reference files (.json, .npy, .npz, .pt) and archive members without trusting them.

A ZIP of a kilobyte can claim a terabyte, and a line of JSON can nest a million lists. So each reader checks how large
the content would become before it reads it. Nothing here unpickles. See docs/security.md.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import tokenize
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dnnlib import UserError, read_bytes
from torch_utils import safe_pickle

__all__ = [
    "MAX_JSON",
    "decode_text",
    "json_error",
    "json_levels",
    "load_json",
    "load_npy",
    "load_npz",
    "load_pt",
    "place_in_text",
    "read_member",
    "read_npz",
    "unpacked_limit",
]

MAX_JSON = 1 << 30  # bytes of objects a JSON file may become, estimated from its punctuation
MAX_DEPTH = 64
MAX_UNPACKED = 512 << 20
_CHUNK = 1 << 20
_QUOTE, _BACKSLASH, _NEWLINE = b'"', b"\\", b"\n"
_MARK = codecs.BOM_UTF8
_STEP = np.zeros(256, dtype=np.int8)  # what each byte adds to the depth of a JSON text
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
# What the parsers below raise for damaged bytes. MemoryError means that a number in the file asked for too much.
_DAMAGED = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError,
            TypeError, ValueError, tokenize.TokenError, zipfile.BadZipFile)  # fmt: skip


def unpacked_limit(size: int) -> int:
    """Return how many bytes a compressed file of `size` bytes may unpack to: ten times `size`, at least 512 MiB."""
    return max(MAX_UNPACKED, 10 * size)


def load_json(
    data: bytes, name: str, limit: int = MAX_JSON, *, place: Callable[[int], tuple[bytes, int]] | None = None
) -> Any:
    """Return the value of a JSON text in UTF-8.

    Raise UserError that names `name` when it is not JSON (with line and column), is nested too deeply, or would take
    more than `limit` bytes. Where `data` is made of parts of a larger text, `place` turns a position in it into
    (the larger text, the position there).
    """
    # In CPython a list takes 64 bytes and more, a dictionary 240, an item with its string or number about 60.
    objects = 64 * (data.count(b"[") + data.count(b",")) + 240 * data.count(b"{")
    if objects + len(data) * (1 if data.isascii() else 4) > limit:
        raise UserError(f"{name}: JSON of {len(data):,} bytes is too large to be read safely")
    if max((int(levels.max()) for _, levels, _ in json_levels(data)), default=0) > MAX_DEPTH:
        raise UserError(f"{name}: not valid JSON for this purpose, it is nested more than {MAX_DEPTH} levels deep")
    place = place or (lambda at: (data, at))
    text = decode_text(data, f"{name}: not valid JSON", place)
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        at = len(text[: e.pos].encode()) + (len(_MARK) if data.startswith(_MARK) else 0)
        raise json_error(name, *place(at), e.msg) from None
    except (ValueError, RecursionError):  # numbers of very many digits
        raise UserError(f"{name}: not valid JSON") from None


def json_error(name: str, data: bytes, at: int, reason: str) -> UserError:
    """Return the error that JSON is not valid at a position, for a `reason`."""
    return UserError(f"{name}: not valid JSON, {place_in_text(data, at)}: {reason}")


def place_in_text(data: bytes, at: int) -> str:
    """Return a position in the bytes of a text in words: 'line 2, column 14'."""
    start = data.rfind(b"\n", 0, at) + 1
    column = len(data[start:at].decode("utf-8", "replace")) + 1
    return f"line {data.count(_NEWLINE, 0, at) + 1}, column {column}"


def decode_text(data: bytes, name: str, place: Callable[[int], tuple[bytes, int]] | None = None) -> str:
    """Return a text in UTF-8, without the mark of byte order that spreadsheets put in front.

    Raise UserError that begins with `name`: the text is UTF-16, or it has bytes that are not UTF-8 (where, see
    `load_json`).
    """
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in data[:4]:
        raise UserError(f"{name}: the text is UTF-16, save as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        where = place_in_text(*(place(e.start) if place else (data, e.start)))
        raise UserError(f"{name}: {where} is not UTF-8, save as UTF-8") from None


def json_levels(data: bytes) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield for each chunk of a JSON text where it starts, how deep the brackets are nested after each byte (int), and
    which bytes are outside of strings (bool). Nothing is built."""
    if _BACKSLASH in data:
        # Escaped characters do not matter here, and without them every quote begins or ends a string.
        data = data.replace(rb"\\", b"__").replace(rb"\"", b"__")
    level = inside = 0
    for start in range(0, len(data), _CHUNK):
        text = np.frombuffer(data, np.uint8, min(_CHUNK, len(data) - start), start)
        quotes = inside + np.cumsum(text == ord(_QUOTE), dtype=np.int32)
        outside = quotes % 2 == 0
        levels = level + np.cumsum(_STEP[text] * outside, dtype=np.int32)
        level, inside = int(levels[-1]), int(quotes[-1]) % 2
        yield start, levels, outside


def load_npy(data: bytes, name: str, hint: str = "") -> np.ndarray:
    """Return the array in a `.npy` file: numbers, truth values or text.

    Otherwise raise UserError that begins with `name` and ends with `hint`.
    """
    try:
        return _array(data)
    except _DAMAGED as e:
        raise UserError(f"{name}: not a readable .npy file ({_reason(e)}){hint}") from None


def _array(data: bytes) -> np.ndarray:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("holds Python objects, which are never loaded")
    if dtype.kind not in "biufcU" or dtype.shape:
        raise ValueError(f"holds {str(dtype)[:50]}, expected numbers or text")
    content = memoryview(data)[stream.tell() :]
    count = math.prod(shape)
    if min(shape, default=0) < 0 or count * dtype.itemsize != len(content):
        raise ValueError(f"{len(content)} bytes for shape {list(shape)} of {dtype}")
    if not count and math.prod(n for n in shape if n) > 1:
        raise ValueError(f"shape {list(shape)} is empty")
    if dtype.kind == "U" and np.frombuffer(content, dtype.byteorder + "u4").max(initial=0) > 0x10FFFF:
        raise ValueError("its text holds impossible characters")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C").copy()


def load_npz(data: bytes, name: str, hint: str = "") -> dict[str, np.ndarray]:
    """Return the arrays in a `.npz` file by name. Raise UserError like `load_npy`, and when they would be too large."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if len({member.filename for member in members}) < len(members):
                raise ValueError("a name occurs twice")
            if not all(member.filename.endswith(".npy") for member in members):
                raise ValueError("holds files other than arrays")
            if sum(member.file_size for member in members) > unpacked_limit(len(data)):
                raise ValueError(f"its {len(data):,} bytes would unpack to too many")
            return {m.filename.removesuffix(".npy"): _array(read_member(archive, m, m.file_size)) for m in members}
    except _DAMAGED as e:
        raise UserError(f"{name}: not a readable .npz file ({_reason(e)}){hint}") from None


def read_npz(path_or_url: str, expected: str) -> dict[str, np.ndarray]:
    """Return the arrays in an `.npz` file or URL. Raise UserError that ends with what was `expected`."""
    return load_npz(read_bytes(path_or_url), path_or_url, f"; {expected}")


def load_pt(data: bytes, name: str) -> Any:
    """Return the tensors, arrays and plain data in a file of torch.save.

    Raise UserError that names `name` when the file holds anything else.
    """
    try:
        return safe_pickle.load_torch(io.BytesIO(data), name, safe_pickle.ARRAYS)
    except UserError as e:
        raise UserError(f"{name}: not a readable .pt file ({e.message.removeprefix(f'{name}: ')})") from None


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> bytes:
    """Return the bytes of a member of a ZIP.

    Raise BadZipFile when it is damaged or encrypted, or longer than `limit` or than the ZIP says.
    """
    if member.flag_bits & 1 or member.file_size > limit:
        raise zipfile.BadZipFile(f"{member.file_size:,} bytes, or encrypted")
    with archive.open(member) as file:
        # For other methods zipfile unpacks all that a step of compressed bytes holds, so the steps are small.
        step = member.file_size + 1 if member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else 1 << 12
        parts = list(iter(lambda: file.read(step), b""))
    data = b"".join(parts)
    if len(data) != member.file_size:
        raise zipfile.BadZipFile(f"{len(data):,} bytes instead of {member.file_size:,}")
    return data


def _reason(error: BaseException) -> str:
    return str(error).split("\n")[0][:200].rstrip(".") or type(error).__name__
