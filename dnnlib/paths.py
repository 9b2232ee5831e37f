"""Globs in which a folder whose name has brackets is that folder."""

from __future__ import annotations

import glob
import os

__all__ = ["match_paths"]


def match_paths(pattern: str) -> list[str]:
    """Return the paths that a glob matches, sorted. A `**` stands for any folders.

    A part of it that exists under its whole name is that file or folder, whatever characters the name has.
    """
    found = ["/" if pattern.startswith("/") else ""]
    for part in filter(None, pattern.split("/")):
        here, found = found, []
        for folder in here:
            path = os.path.join(folder, part)
            if os.path.lexists(path):
                found.append(path)
            elif glob.has_magic(part):
                found += glob.glob(os.path.join(glob.escape(folder), part), recursive=True)
    return sorted(path for path in found if path)
