"""The build backend of pyproject.toml: an editable install as setuptools makes it, and nothing else.

An ordinary install would put packages named `training` and `metrics` into site-packages, for all programs to trip over,
and leave the scripts behind.
"""

from __future__ import annotations

from typing import Any, NoReturn

from setuptools.build_meta import build_editable, get_requires_for_build_editable, prepare_metadata_for_build_editable

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
]


def get_requires_for_build_wheel(*_: Any, **__: Any) -> NoReturn:
    """Say in one line how to install."""
    raise SystemExit("cleanscore runs from its checkout; install it with: pip install -e .")


build_wheel = build_sdist = get_requires_for_build_wheel
