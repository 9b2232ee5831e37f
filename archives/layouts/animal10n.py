"""ANIMAL-10N: JPEGs in one folder per part, whose labels are the digits at the beginning of their names."""

from __future__ import annotations

import os
import re

import numpy as np

import dnnlib
from archives.archive_set import open_archives
from archives.source import Choice, Source

__all__ = ["find_animal10n", "open_animal10n"]

NAME = re.compile(r"(\d)_\d+\.jpe?g", re.IGNORECASE)
IMAGE = re.compile(r".*\.(jpe?g|png|bmp|gif|webp|tiff?)", re.IGNORECASE)
PARTS = {False: "training", True: "testing"}  # by whether it is the test part
CLASSES = ["cat", "lynx", "wolf", "coyote", "cheetah", "jaguar", "chimpanzee", "orangutan", "hamster", "guinea pig"]


def find_animal10n(path: str) -> list[str]:
    """Return where ANIMAL-10N is: a folder of images with its names, or one that holds the folders of its parts."""
    for folder in ("", "raw_image"):
        place = os.path.join(path, folder) if folder else path
        if _fits(place) or any(_fits(os.path.join(place, part)) for part in PARTS.values()):
            return [place]
    return []


def _fits(folder: str) -> bool:
    """Return whether all images in a folder have names of ANIMAL-10N, and more than one label."""
    labels = set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:  # of other folders the first image decides, so that large ones are not read twice
                if entry.name.startswith("metadata."):  # which says what the labels are
                    return False
                if IMAGE.fullmatch(entry.name):
                    match = NAME.fullmatch(entry.name)
                    if match is None:
                        return False
                    labels.add(match[1])
    except (OSError, ValueError):
        return False
    return len(labels) > 1


def open_animal10n(path: str, choice: Choice) -> Source:
    """Open one part of ANIMAL-10N. UserError: its folder is missing, or holds images with other names."""
    flat = _fits(path)
    choice.check(path, test=not flat)
    if not flat:
        path = os.path.join(path, PARTS[choice.test])
        if not os.path.isdir(path):
            raise dnnlib.UserError(f"{path}: is missing, ANIMAL-10N has this part of the images there")
    reader = open_archives(path, choice.background)
    names = [name.rsplit("/", 1)[-1] for name in reader.names]
    odd = next((name for name in names if not NAME.fullmatch(name)), None)
    if odd is not None:
        raise dnnlib.UserError(f"{path}: {odd}: expected names such as 0_123.jpg, which begin with the label")
    source = Source(path, len(reader), reader.image, np.array([int(name[0]) for name in names]), names=reader.names)
    source.corruption["family"] = "animal10n"
    source.notes += reader.notes
    source.notes.append(f"{path}: labels are the digits before '_' in the names of the images, as in ANIMAL-10N")
    folder = os.path.basename(os.path.abspath(path)).lower()
    if not flat or folder in PARTS.values() or "animal" in folder:  # else a folder of other images with such names
        source.class_names = list(CLASSES)
    return source
