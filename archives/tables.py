"""Read tables that other programs wrote, without trusting them: CSV, TSV, JSON lines, parquet (docs/formats.md)."""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import dnnlib
from archives.decode import EXTENSIONS
from torch_utils.safe_files import decode_text, load_json

__all__ = ["SEPARATOR", "TABLES", "Table", "file_and_label", "guarded", "is_table", "read_table", "table_of",
           "unguarded"]  # fmt: skip

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
DELIMITERS = ",;\t|"
# The line in front of a CSV that tells Excel its delimiter. Programs that do not know it take it for a row of cells.
SEPARATOR = re.compile(r'\A"?sep=([^\w\s"]|\t)"?\1*\r?\n', re.IGNORECASE)
ROWS = 1 << 14  # that are read at a time
MOST_COLUMNS = 10_000
MOST_ROWS = 1 << 22  # in a small parquet file
OLDEST_PYARROW = 15  # up to 14.0.0 a file could run code: CVE-2023-47248
MOST_TEXT = 1 << 20  # bytes of JSON lines that are parsed at a time
# What people call the column of file names, and that of labels, the usual names first.
FILE = ("file_name", "filename", "file", "file_path", "filepath", "path", "image_path", "image_file", "image_name",
        "image_filename", "image", "img", "img_name", "img_path", "name", "image_id", "img_id", "id")  # fmt: skip
LABEL = ("label", "labels", "class", "class_name", "category", "category_name", "target", "noisy_label", "given_label",
         "class_id", "label_id", "category_id", "label_name", "y")  # fmt: skip

# A spreadsheet takes a cell that begins with one of these for a formula.
FORMULA = "=+-@\t\r'"


class Table:
    """Named columns of N values.

    name    what messages call the file
    fields  the columns' names, as the file has them
    find    column number -> its values [N]
    line    row -> where it stands in the file, in words: 'line 7'
    packed  whether `find` takes long
    """

    def __init__(
        self, name: str, fields: list[str], find: Callable[[int], list[Any]], line: Callable[[int], str],
        packed: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.fields, self._find, self.line, self._packed = name, fields, find, line, packed

    def first(self, index: int) -> Any:
        """Return the first value of a column by its number, None where there is none or finding it takes long."""
        return None if self._packed else next(iter(self._find(index)[:1]), None)

    def column(self, field: str) -> list[Any]:
        """Return the values of a column by its name. UserError: there is no such column, or there are two."""
        count = self.fields.count(field)
        if count != 1:
            raise dnnlib.UserError(
                f"{self.name}: has {count or 'no'} columns '{field}'"
                + ("" if count else f" (there are: {', '.join(self.fields[:20]) or 'none'})")
            )
        return self._find(self.fields.index(field))


def guarded(cell: str) -> str:
    """Return a cell that no spreadsheet takes for a formula: with a ' in front where that is needed."""
    return f"'{cell}" if cell[:1] in FORMULA and cell else cell


def unguarded(cell: str) -> str:
    """Return a cell without the ' that guards it against being taken for a formula."""
    return cell[1:] if cell[:1] == "'" and cell[1:2] and cell[1] in FORMULA else cell


def is_table(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a table by its name."""
    return str(path).lower().endswith(TABLES)


def read_table(data: bytes, name: str) -> Table:
    """Return the table in the bytes of a file, whose `name` says its kind.

    Cells of CSV and TSV are texts; lines without any text do not count. UserError: the file is no such table.
    """
    kind = os.path.splitext(name)[1].lower()
    if kind == ".parquet":
        return _read_parquet(data, name)
    return _read_json_lines(data, name) if kind in (".jsonl", ".ndjson") else _read_csv(data, name, kind == ".tsv")


def file_and_label(
    table: Table, key: str | None = None, guess: bool = True
) -> tuple[list[Any] | None, list[Any], list[str]]:
    """Return the file names of a table, None without such a column, its labels, and notes on which columns these are.

    `key` names the column of labels. With `guess`, the other one of two columns holds labels whatever it is called, and
    a CSV of two columns needs no header if the first line names an image.
    UserError: the table does not show which column holds labels, or has no column `key`.
    """
    fields = table.fields
    pictures = [i for i, field in enumerate(fields) if _is_image(field)]
    if guess and len(fields) == 2 and len(pictures) == 1 and key is None:  # no header
        files, labels = ([fields[i], *table._find(i)] for i in (pictures[0], 1 - pictures[0]))
        return files, labels, []
    plain = [field.strip().lower().replace(" ", "_").replace("-", "_") for field in fields]
    if key is not None and key not in fields:
        table.column(key)
    rest = [i for i, field in enumerate(fields) if field != key]
    file = next((i for name in FILE[:-4] for i in rest if plain[i] == name), None)
    if file is None:
        file = next((i for i in rest if _is_image(table.first(i))), None)
    if file is None:
        file = next((i for name in FILE[-4:] for i in rest if plain[i] == name), None)
    label = None if key is None else fields.index(key)
    if label is None:
        usual = LABEL if guess else LABEL[:-1]  # y may be a coordinate
        label = next((i for name in usual for i in rest if plain[i] == name and i != file), None)
    if label is None and guess and file is not None and len(fields) == 2:
        label = 1 - file
    if label is None:
        raise dnnlib.UserError(
            f"{table.name}: has no column of labels (label, class, category, ...); name it: dataset_tool.py "
            f"--label_key=NAME (there are: {', '.join(fields[:20]) or 'none'})"
        )
    labels = table.column(fields[label])
    if file is None:
        return None, labels, []
    notes = [f"{table.name}: labels come from the column '{fields[label]}', file names from '{fields[file]}'"]
    return table.column(fields[file]), labels, notes if len(fields) > 2 else []


def _is_image(cell: Any) -> bool:
    return isinstance(cell, str) and os.path.splitext(cell.strip())[1].lower() in EXTENSIONS


# ----------------------------------------------------------------------------------------------------------------------
# CSV.


def _read_csv(data: bytes, name: str, tabs: bool) -> Table:
    text = decode_text(data, f"{name}: is not a CSV in UTF-8")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise dnnlib.UserError(f"{name}: is not a CSV in UTF-8: line {line} holds a null character")
    stated = SEPARATOR.match(text)
    skipped = 0 if stated is None else 1  # lines in front of the table
    text = text[stated.end() :] if stated else text
    head = text[:MOST_TEXT].split("\n", 1)[0]
    delimiter = stated[1] if stated else "\t" if tabs else max(DELIMITERS, key=head.count)

    def lines() -> Any:
        return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)

    def place(row: int) -> str:
        reader, before = lines(), 0
        for cells in reader:
            if any(cells):
                row -= 1
            if row < -1:  # the header is the first
                break
            before = reader.line_num
        return f"line {skipped + before + 1}"

    reader, count = lines(), 0
    try:
        fields = [cell.strip() for cell in next(filter(any, reader), [])]
        if len(fields) > MOST_COLUMNS:
            raise dnnlib.UserError(f"{name}: has {len(fields):,} columns, expected one line per image")
        columns: list[list[str]] = [[] for _ in fields]
        while rows := list(itertools.islice(reader, ROWS)):
            rows = list(filter(any, rows))
            if set(map(len, rows)) - {len(fields)}:
                bad = next(i for i, row in enumerate(rows) if len(row) != len(fields))
                raise dnnlib.UserError(
                    f"{name}: {place(count + bad)} has {len(rows[bad])} cells, but the header has {len(fields)}"
                )
            count += len(rows)
            for column, cells in zip(columns, zip(*rows, strict=True), strict=False):  # no rows: nothing to append
                column.extend(cells)
    except csv.Error as e:
        raise dnnlib.UserError(f"{name}: is not a CSV in UTF-8: line {skipped + reader.line_num}: {e}") from None
    return Table(name, fields, columns.__getitem__, place)


# ----------------------------------------------------------------------------------------------------------------------
# JSON.


def table_of(records: Sequence[Any], name: str, line: Callable[[int], str]) -> Table:
    """Return the table of JSON objects, one per row; what an object lacks is None. UserError: others are among them."""
    bad = next((i for i, record in enumerate(records) if type(record) is not dict), None)
    if bad is not None:
        raise dnnlib.UserError(f'{name}: {line(bad)}: expected an object, such as {{"file_name": "a.png", "label": 3}}')
    fields = list(dict.fromkeys(itertools.chain.from_iterable(records)))
    if len(fields) > MOST_COLUMNS:
        raise dnnlib.UserError(f"{name}: has {len(fields):,} different keys, expected one object per image")
    return Table(name, fields, lambda i: [record.get(fields[i]) for record in records], line)


def _read_json_lines(data: bytes, name: str) -> Table:
    texts = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lines = [number for number, text in enumerate(texts, 1) if text.strip()]
    texts = [texts[number - 1] for number in lines]
    records: list[Any] = []
    while len(records) < len(texts):
        start = len(records)
        sizes = itertools.accumulate(map(len, texts[start : start + ROWS]))
        part = texts[start : start + max(1, sum(size <= MOST_TEXT for size in sizes))]
        try:
            found = load_json(b"[" + b",".join(part) + b"]", name)
        except dnnlib.UserError:
            found = []
        if len(found) != len(part):  # one of these lines is wrong, or no value of its own
            found = [load_json(text, f"{name}: line {lines[start + i]}") for i, text in enumerate(part)]
        records += found
    return table_of(records, name, lambda row: f"line {lines[row]}")


# ----------------------------------------------------------------------------------------------------------------------
# Parquet.


def _read_parquet(data: bytes, name: str) -> Table:
    """Return the table in a parquet file. Only the columns that are asked for are unpacked."""
    try:
        import pyarrow  # optional dependency
        import pyarrow.parquet
    except ImportError:
        raise dnnlib.UserError(f"{name}: reading parquet needs the package pyarrow: pip install pyarrow") from None
    if int(pyarrow.__version__.split(".")[0]) < OLDEST_PYARROW:
        raise dnnlib.UserError(f"{name}: pyarrow {pyarrow.__version__} is too old to read the files of strangers")
    damaged = (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError, MemoryError, ArithmeticError)
    most = max(MOST_ROWS, len(data))  # an honest row takes at least a byte
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data), pre_buffer=False)
        fields = list(file.schema_arrow.names)
        if file.metadata.num_rows > most:
            raise ValueError(f"{file.metadata.num_rows:,} rows in {len(data):,} bytes")
    except damaged as e:
        raise dnnlib.UserError(f"{name}: not a readable parquet file ({str(e)[:200]})") from None

    def find(index: int) -> list[Any]:
        values: list[Any] = []
        try:
            batches = file.iter_batches(ROWS, columns=[fields[index]], use_threads=False)
            for batch in batches:
                values += batch.column(0).to_pylist()
                if len(values) > most:
                    raise ValueError(f"over {most:,} rows in {len(data):,} bytes")
        except damaged as e:
            raise dnnlib.UserError(f"{name}: column '{fields[index]}' is not readable ({str(e)[:200]})") from None
        return values

    return Table(name, fields, find, lambda row: f"row {row + 1}", packed=True)
