"""Several archives as one set: images, labels and batches of one archive of all, or one line that says why not."""

import json
import os

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import dnnlib
import train
from archives import build
from archives.archive_set import find_archives
from archives.dataset import BatchStream, ImageDataset
from archives.label_file import LabelFile, load_label_file, save_label_file
from archives.sources import open_source
from archives.writer import make_transform
from metrics.feature_cache import _version_of_images
from tests.support import synth
from tests.support.runs import TINY

IMAGES = synth.pictures(11)
LABELS = [2, 0, 1, 1, 0, 2, 2, 1, 0, 0, 1]
CUTS = [range(0, 2), range(2, 7), range(7, 11)]


def archive(path, rows, **extra):
    clean = [[f"00000/img{i:08d}.png", row % 3] for i, row in enumerate(rows)]
    extra = dict(class_names=["a", "b", "c"], clean_labels=clean) | extra
    return str(synth.make_archive(path, IMAGES[list(rows)], [LABELS[row] for row in rows], **extra))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Return one archive, and three that hold the same images."""
    folder = tmp_path_factory.mktemp("set")
    whole = archive(folder / "whole.zip", range(11), corruption=dict(realised_rate=5 / 11, family="x", seed=3))
    rates = [0.5, 0.2, 0.75]
    return whole, [
        archive(folder / f"s{i}.zip", rows, corruption=dict(realised_rate=rates[i], family="x", seed=i))
        for i, rows in enumerate(CUTS)
    ]


def batches(data, **kwargs):
    stream = BatchStream(data, 4, seed=7, **kwargs)
    found = [(*next(stream), stream.items) for _ in range(8)]
    stream.close()
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("how", ["list", "glob", "list of globs"])
@pytest.mark.parametrize("kwargs", [{}, dict(xflip=True, max_size=7, cache=False), dict(use_labels=False)], ids=str)
def test_shards_give_the_batches_of_one_archive(shards, how, kwargs):
    whole, parts = shards
    folder = os.path.dirname(whole)
    name = {"list": ",".join(parts), "glob": f"{folder}/s*.zip", "list of globs": f"{folder}/s[01].zip,{parts[2]}"}[how]
    one, several = ImageDataset(whole, **kwargs), ImageDataset(name, **kwargs)
    for rank in range(2):
        for a, b in zip(batches(one, rank=rank, world_size=2), batches(several, rank=rank, world_size=2), strict=True):
            assert torch.equal(a, b)
    for field in ("label_dim", "class_names", "num_raw", "resolution", "num_channels", "family"):
        assert getattr(one, field) == getattr(several, field)
    for field in ("labels", "clean_labels", "outliers"):
        np.testing.assert_array_equal(getattr(one, field), getattr(several, field))
    assert several.archives == parts and several.name == "s0+2" and several.path == name
    assert several.kwargs()["path"] == ",".join(parts) and len(ImageDataset(**several.kwargs())) == len(several)
    assert several.corruption == dict(realised_rate=pytest.approx(5 / 11), family="x")


def test_names_and_label_files(shards, tmp_path):
    whole, parts = shards
    data = ImageDataset(",".join(parts))
    names = [f"s{i}.zip/00000/img{row - rows.start:08d}.png" for i, rows in enumerate(CUTS) for row in rows]
    assert data.file_names == names and ImageDataset(",".join(parts), max_size=3).file_names[0] in names
    flags, path = np.arange(11) % 2 == 0, str(tmp_path / "l.npz")
    rates = np.zeros(3, np.float32)
    save_label_file(path, LabelFile(names, data.labels, flags, flags.astype(np.float32), data.labels, 0.5, rates))
    found = load_label_file(path, ImageDataset(",".join(parts[::-1])))
    assert found.names == names[7:] + names[2:7] + names[:2]
    np.testing.assert_array_equal(found.is_clean, np.concatenate([flags[7:], flags[2:7], flags[:2]]))


def test_a_set_is_a_source(shards, tmp_path):
    whole, parts = shards
    for name, source in (("one", whole), ("several", ",".join(parts))):
        opened = open_source(source)
        opened.corruption, opened.names = {}, None  # the names are those of the archives
        build.build_archive(opened, str(tmp_path / f"{name}.zip"), make_transform(None, None), workers=1)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "several.zip").read_bytes()
    with pytest.raises(dnnlib.UserError, match="no test part"):
        open_source(",".join(parts), test=True)


@pytest.mark.parametrize("change, message", [
    (lambda path: synth.make_archive(path, synth.pictures(2, 16), [0, 1]), "b.zip has images of 16x16 with 3 channels"),
    (lambda path: synth.make_archive(path, synth.pictures(2, 8, 1), [0, 1]), "b.zip has images of 8x8 with 1 channels"),
    (lambda path: archive(path, range(3), class_names=["a", "c", "b"]), "b.zip has the class names ['a', 'c', 'b']"),
    (lambda path: archive(path, range(3), class_names=None), "b.zip has the class names None"),
    (lambda path: archive(path, range(3), clean_labels=None), "b.zip has no clean labels, but"),
    (lambda path: archive(path, range(3), outliers=[]), "a.zip has no record of outliers:"),
    (lambda path: synth.make_archive(path, IMAGES, None, class_names=["a", "b", "c"]), "b.zip has no labels"),
    (lambda path: synth.make_archive(path, IMAGES[:1], [[0, 1]], class_names=["a", "b", "c"]), "vectors of 2"),
    (lambda path: path.write_bytes(b"no"), "b.zip: not a ZIP"),
    (lambda path: None, "b.zip: cannot be read (No such file"),
])  # fmt: skip
def test_archives_that_do_not_belong_together(change, message, tmp_path):
    first = archive(tmp_path / "a.zip", range(5))
    change(tmp_path / "b.zip")
    with pytest.raises(dnnlib.UserError) as error:
        ImageDataset(f"{first},{tmp_path}/b.zip")
    assert message in error.value.message and "\n" not in error.value.message


def test_what_names_mean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.zip", "a10.zip", "a2.zip", "a2.zip.index", "x,y.zip", "[0].zip", "c[1],d.zip", "c[1]"):
        open(name, "w").close()
    assert find_archives("b.zip,a2.zip") == ["b.zip", "a2.zip"]
    assert find_archives("a*") == ["a10.zip", "a2.zip"]
    assert find_archives("b.zip,a?.zip") == ["b.zip", "a2.zip"]
    assert find_archives("b.zip,x,y.zip,a2.zip") == ["b.zip", "x,y.zip", "a2.zip"]
    for name in ("x,y.zip", "[0].zip", "c[1],d.zip", "missing.zip", ""):
        assert find_archives(name) == [name]
    for name, message in [
        ("n*.zip", "n\\*.zip: no archive matches"),
        ("b.zip,,a2.zip", "is empty"),
        ("b.zip,", "is empty"),
        ("b.zip,./b.zip", "./b.zip is named twice"),
        ("a*.zip,a2.zip", "a2.zip is named twice"),
    ]:
        with pytest.raises(dnnlib.UserError, match=message):
            find_archives(name)


def dry_run(*args):
    result = CliRunner().invoke(train.main, [*TINY, *args, "--dry-run"])
    return json.loads(result.output[result.output.index("{") : result.output.rindex("\n}") + 2])


def test_a_run_records_the_archives_that_a_glob_means(shards, tmp_path):
    """Then a resumed run notices when another archive has come."""
    whole, parts = shards
    folder = os.path.dirname(whole)
    found = [dry_run(f"--outdir={tmp_path}", f"--data={name}") for name in (f"{folder}/s?.zip", ",".join(parts))]
    assert found[0]["dataset"]["path"] == ",".join(parts) == found[1]["dataset"]["path"]
    assert dry_run(f"--outdir={tmp_path}", f"--data={whole}")["dataset"]["path"] == whole


def test_kept_features_belong_to_every_archive(shards, tmp_path):
    name = f"{tmp_path}/*"
    for i in range(2):
        archive(tmp_path / f"{i}.zip", CUTS[i])
    before = _version_of_images(ImageDataset(name))
    assert _version_of_images(ImageDataset(name)) == before
    archive(tmp_path / "1.zip", CUTS[2])
    after = _version_of_images(ImageDataset(name))
    build.build_archive(open_source(f"{tmp_path}/0.zip"), str(tmp_path / "f"), make_transform(None, None), workers=1)
    assert len({json.dumps(version) for version in (before, after, _version_of_images(ImageDataset(name)))}) == 3
    touched = _version_of_images(ImageDataset(name))
    os.utime(tmp_path / "f" / "00000" / "img00000001.png", (1, 1))
    assert _version_of_images(ImageDataset(name)) != touched


def folder(path, classes, side=8):
    """Write a folder of two images per class. An image has the brightness of its class everywhere."""
    for name, value in classes.items():
        (path / name).mkdir(parents=True)
        for i in range(2):
            (path / name / f"{i}.png").write_bytes(synth.png(np.full((side, side, 3), value, np.uint8)))
    return str(path)


def test_folders_with_different_sizes_and_classes_are_one_source(tmp_path):
    parts = [folder(tmp_path / "a", dict(cat=40, dog=80)), folder(tmp_path / "b", dict(bird=120, cat=40), side=12)]
    source, dest = ",".join(parts), tmp_path / "out.zip"
    code, out, err = synth.run_dataset_tool(f"--source={source}", f"--dest={dest}", "--resolution=4x4")
    assert code == 0 and "bird (2), cat (4), dog (2)" in out, err
    assert f"Note: {source}: the classes differ between the folders; the set has all of them: bird, cat, dog\n" == err
    data = ImageDataset(str(dest))
    assert data.class_names == ["bird", "cat", "dog"] and data.labels.tolist() == [1, 1, 2, 2, 0, 0, 1, 1]
    assert data.images(range(8))[:, 0, 0, 0].tolist() == [40, 40, 80, 80, 120, 120, 40, 40]
    assert data.source_names[4] == "b/bird/0.png"
    code, _, err = synth.run_dataset_tool(f"--source={source}", f"--dest={tmp_path}/o.zip")
    assert code == 1 and "b/bird/0.png: is 12x12, images before it are 8x8: convert all with" in err
    with pytest.raises(dnnlib.UserError, match="archives of one set must agree"):
        ImageDataset(source)  # training resizes nothing


def test_notes_about_class_numbers_are_about_those_of_the_set(tmp_path):
    source = ",".join([folder(tmp_path / "a", {"1": 0, "2": 0}), folder(tmp_path / "b", {"0": 0, "1": 0})])
    found = open_source(source)
    assert found.labels.tolist() == [1, 1, 2, 2, 0, 0, 1, 1] and len(found.notes) == 1
    parts = [folder(tmp_path / "c", {"Cat": 0, "10": 0}), folder(tmp_path / "d", {"cat": 0, "9": 0})]
    found = open_source(",".join(parts))
    assert found.class_names == ["10", "9", "Cat", "cat"] and "'Cat', 'cat' are different classes" in found.notes[1]
    found = open_source(",".join([folder(tmp_path / "e", {"3": 0, "10": 0}), folder(tmp_path / "f", {"3": 0, "7": 0})]))
    assert found.class_names == ["10", "3", "7"] and "10 has the label 0" in found.notes[1] and len(found.notes) == 2


def test_archives_with_a_list_of_labels_must_have_the_same_classes(tmp_path):
    """Their numbers may be on record elsewhere: in a matrix of label noise, in label files."""
    first = archive(tmp_path / "a.zip", range(3))
    with pytest.raises(dnnlib.UserError, match="b has the class names .'a', 'z'., but"):
        open_source(f"{first},{folder(tmp_path / 'b', dict(a=0, z=0))}")
