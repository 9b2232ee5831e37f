"""Errors, logs, files, downloads and command lines. Nothing here needs torch or the rest of the project."""

from dnnlib import cli
from dnnlib.downloads import content_hash, is_url, open_url, read_bytes
from dnnlib.locks import locked
from dnnlib.paths import match_paths
from dnnlib.util import (
    EasyDict,
    Logger,
    UserError,
    atomic_folder,
    atomic_open,
    format_time,
    list_contents,
    no_garbage,
    one_line,
    open_file,
    print_notes,
    temporary_folder,
    write_csv,
)

__version__ = "0.2.0"

__all__ = [
    "EasyDict",
    "Logger",
    "UserError",
    "atomic_folder",
    "atomic_open",
    "cli",
    "content_hash",
    "format_time",
    "is_url",
    "list_contents",
    "locked",
    "match_paths",
    "no_garbage",
    "one_line",
    "open_file",
    "open_url",
    "print_notes",
    "read_bytes",
    "temporary_folder",
    "write_csv",
]
