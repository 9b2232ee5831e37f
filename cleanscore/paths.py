"""What may stand for an archive in Python: a ZIP, a folder, a URL, or the directory of a run that was trained on it."""

from __future__ import annotations

import os

import dnnlib
from torch_utils import safe_files

__all__ = ["find_archive"]

OPTIONS = "training_options.json"


def find_archive(path: str | os.PathLike[str]) -> str:
    """Return the path of an archive on this machine. A URL is downloaded once, a run directory stands for its data.

    UserError: the URL cannot be reached, or the run directory does not say what its data were.
    """
    path = os.fspath(path)
    if dnnlib.is_url(path):
        with dnnlib.open_url(path) as file:
            return os.fspath(file.name)
    matches = [match for match in dnnlib.match_paths(path) if os.path.isfile(os.path.join(match, OPTIONS))]
    if len(matches) > 1:
        raise dnnlib.UserError(f"{path}: matches {matches[0]} and {len(matches) - 1} other runs; name one of them")
    if not matches:
        return path
    name = os.path.join(matches[0], OPTIONS)
    options = safe_files.load_json(dnnlib.read_bytes(name), name)
    try:
        return str(options["dataset"]["path"])
    except (KeyError, TypeError):
        raise dnnlib.UserError(f"{name}: does not say which data the run was trained on") from None
