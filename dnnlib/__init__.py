"""Errors, logs, files, downloads and command lines. Nothing here needs torch or the rest of the project."""

from dnnlib import cli
from dnnlib.downloads import is_url, open_url, read_bytes
from dnnlib.util import (
    EasyDict,
    Logger,
    UserError,
    atomic_open,
    format_time,
    no_garbage,
    one_line,
    open_file,
    print_notes,
)

__version__ = "0.2.0"

__all__ = [
    "EasyDict",
    "Logger",
    "UserError",
    "atomic_open",
    "cli",
    "format_time",
    "is_url",
    "no_garbage",
    "one_line",
    "open_file",
    "open_url",
    "print_notes",
    "read_bytes",
]
