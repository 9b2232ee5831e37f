"""Labels from metadata.csv and metadata.jsonl among the images, and notes about tables that are not read."""

import json

import numpy as np
import pytest

import dnnlib
from archives.dataset import ImageDataset
from archives.reader import ArchiveReader
from tests.support import synth

CSV = "file_name,label\na.png,cat\nb.png,dog\n"
CAPTIONS = "file_name,text\na.png,x\nb.png,y\n"
JSONL = '{"file_name": "a.png", "label": "dog"}\n{"file_name": "b.png", "label": "cat"}\n'


def make(tmp_path, kind, files):
    """Write the files, texts or None for an image, into a folder or a ZIP."""
    pngs = iter(synth.pictures(20))
    members = {name: synth.png(next(pngs)) if text is None else text.encode() for name, text in files.items()}
    if kind == "zip":
        return str(synth.make_zip(tmp_path / "a.zip", members))
    for name, data in members.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    return str(tmp_path / "in")


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    "files, labels, names, said",
    [
        ({"metadata.csv": CSV}, [0, 1], ["cat", "dog"], "labels come from metadata.csv"),
        ({"metadata.jsonl": JSONL}, [1, 0], ["cat", "dog"], "labels come from metadata.jsonl"),
        ({"metadata.csv": CSV, "metadata.jsonl": JSONL}, [0, 1], ["cat", "dog"], "'metadata.jsonl' is not read"),
        ({"metadata.csv": "file_name,label\na.png,7\nb.png,3\n"}, [7, 3], None, "metadata.csv"),
        ({"metadata.csv": CAPTIONS}, None, None, "no column of labels"),
        (
            {"metadata.csv": CAPTIONS, "metadata.jsonl": JSONL},
            [1, 0],
            ["cat", "dog"],
            "labels come from metadata.jsonl",
        ),
        ({"labels.csv": CSV}, None, None, "'labels.csv' is not read"),
        ({"metadata.csv": CSV, "dataset.json": '{"labels": null}'}, None, None, "'metadata.csv' is not read"),
    ],
)
def test_what_a_table_among_the_images_says(tmp_path, kind, files, labels, names, said):
    reader = ArchiveReader(make(tmp_path, kind, {"a.png": None, "b.png": None} | files))
    found = reader.labels()
    assert (found is None if labels is None else found.tolist() == labels) and reader.class_names() == names
    assert said in " ".join(reader.notes)
    for table in files:  # one note each
        assert sum(f" {table}" in note or f"'{table}'" in note for note in reader.notes) <= 1, reader.notes


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_folders_with_a_table_each_share_their_classes(tmp_path, kind):
    files = {"x/a.png": None, "x/b.png": None, "y/sub/a.png": None, "x/metadata.csv": CSV}
    files["y/metadata.csv"] = "file_name,label\nsub/a.png,bee\n"
    reader = ArchiveReader(make(tmp_path, kind, files))
    assert reader.labels().tolist() == [1, 2, 0] and reader.class_names() == ["bee", "cat", "dog"]


def test_tables_of_parts_are_not_mixed(tmp_path):
    files = {
        f"{part}/{name}": text for part in ("train", "test") for name, text in {"a.png": None, "b.png": None}.items()
    }
    files |= {"train/metadata.csv": CSV, "test/metadata.csv": CSV}
    with pytest.raises(dnnlib.UserError, match="train and test|test, train.*name one of them"):
        ImageDataset(make(tmp_path, "folder", files))
    assert ImageDataset(str(tmp_path / "in/train")).labels.tolist() == [0, 1]


def test_the_table_counts_more_than_the_folders(tmp_path):
    files = {"p1/a.png": None, "p2/b.png": None, "metadata.csv": "file_name,label\np1/a.png,cat\np2/b.png,cat\n"}
    data = ImageDataset(make(tmp_path, "zip", files))
    assert data.labels.tolist() == [0, 0] and data.class_names == ["cat"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("file_name,label\na.png,cat\n", ["metadata.csv", "no label for 1 of the 2 images: 'b.png'"]),
        ("file_name,label\nx.png,cat\n", ["none of its 1 file names"]),
        ('file_name,label\n"a.png,cat\n', ["unexpected end of data"]),
    ],
)
def test_a_table_that_does_not_fit_is_refused_where_labels_are_needed(tmp_path, text, words):
    path = make(tmp_path, "folder", {"a.png": None, "b.png": None, "metadata.csv": text})
    assert len(ImageDataset(path, use_labels=False)) == 2
    with pytest.raises(dnnlib.UserError) as error:
        ImageDataset(path)
    assert all(word in error.value.message for word in words), error.value.message


def test_the_index_remembers_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr("archives.reader.INDEX_FROM", 0)
    path = make(tmp_path, "zip", {"a.png": None, "b.png": None, "metadata.jsonl": JSONL})
    for _ in range(2):
        reader = ArchiveReader(path)
        np.testing.assert_array_equal(reader.labels(), [1, 0])
        assert "metadata.jsonl" in json.dumps(reader.notes) and reader.class_names() == ["cat", "dog"]
