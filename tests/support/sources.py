"""Small sources for dataset_tool.py: four images of three classes, in memory and as a folder."""

import json
import zipfile

import numpy as np

from archives.dataset import ImageDataset
from archives.source import Source
from tests.support import synth
from tests.support.synth import run_dataset_tool as run

LABELS = np.array([0, 1, 1, 2])
NAMES = ["cat/a.jpg", "dog/b.jpg", "dog/c.jpg", "owl/d.jpg"]


def make_source(**fields) -> Source:
    """Return a source of four images in memory."""
    images = np.arange(4, dtype=np.uint8)[:, None, None, None]
    known = dict(labels=LABELS, class_names=["cat", "dog", "owl"], names=NAMES) | fields
    return Source("here", 4, images.__getitem__, **known)


def write(path, text) -> str:
    """Write a text. Return its path."""
    path.write_text(text)
    return str(path)


def build(tmp_path, source, *args):
    """Make `out.zip` of a source by dataset_tool.py. Return it, its record, and what was printed."""
    dest = tmp_path / "out.zip"
    dest.unlink(missing_ok=True)
    code, out, err = run(f"--source={source}", f"--dest={dest}", *args)
    assert code == 0, err
    with zipfile.ZipFile(dest) as archive:
        return ImageDataset(str(dest)), json.loads(archive.read("dataset.json")), out + err


def folder(tmp_path, name="in"):
    """Return a folder of four images in three classes."""
    for file, image in zip(NAMES, synth.pictures(4), strict=True):
        (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / file.replace(".jpg", ".png")).write_bytes(synth.png(image))
    return tmp_path / name
