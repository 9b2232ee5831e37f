"""dataset_tool.py --overwrite replaces archives, and never what somebody else has put there."""

import os
import zipfile

import pytest

import dataset_tool
from dnnlib import UserError
from recipes.steps import Journal
from sampling.output import check_free
from tests.support.commands import callers
from tests.support.synth import make_archive, pictures, png

succeed, fail = callers(dataset_tool.main)
IMAGE = png(pictures(1)[0])
STAYS = "so it is no archive of this tool and stays"


@pytest.mark.parametrize(
    "names", [["thesis.txt"], ["dataset.json", "thesis.txt"], ["00000"], ["photos", "dataset.json"]]
)
def test_a_folder_that_is_no_archive_stays(tmp_path, names):
    for name in names:
        if "." in name:
            (tmp_path / "a").mkdir(exist_ok=True)
            (tmp_path / "a" / name).write_text("{}")
        else:
            (tmp_path / "a" / name).mkdir(parents=True)
            (tmp_path / "a" / name / "x.png").write_bytes(IMAGE)
    before = sorted(tmp_path.rglob("*"))
    fail(1, "--source=digits", f"--dest={tmp_path}/a", "--overwrite", f"--dest: {tmp_path}/a: |{STAYS}")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("names", [["cat/0.png"], ["00000/0.png"], ["cat/0.png", "dataset.json"], []])
def test_a_zip_that_is_no_archive_stays(tmp_path, names):
    """Its images may be the originals, and the source itself."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, IMAGE)
    for data in (path.read_bytes(), path.read_bytes()[:-1]):
        path.write_bytes(data)
        fail(1, f"--source={path}", f"--dest={path}", "--overwrite", f"--dest: {path}: |{STAYS}")
        assert path.read_bytes() == data and os.listdir(tmp_path) == ["a.zip"]


def test_zips_that_are_archives_are_replaced(tmp_path):
    """Also those of EDM's tool, which writes `dataset.json` without labels, too, and those of generate.py."""
    for names in (["00000/img00000000.png"], ["000000/000007.png"], ["000007.png"]):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
            for name in names:
                file.writestr(name, IMAGE)
            file.writestr("dataset.json", '{"labels": null}')
        succeed("--source=digits", f"--dest={tmp_path}/a.zip", "--overwrite", "--max-images=2")


def test_files_of_the_operating_system_hinder_no_archive(tmp_path):
    source = make_archive(tmp_path / "in.zip", pictures(3))
    (tmp_path / "a").mkdir()
    for more in ([], ["--overwrite"]):
        (tmp_path / "a" / ".DS_Store").write_text("")
        succeed(f"--source={source}", f"--dest={tmp_path}/a", *more)
        assert sorted(os.listdir(tmp_path / "a")) == ["00000", "dataset.json"]


def test_files_of_the_operating_system_hinder_no_samples_and_no_plan(tmp_path):
    for name in (".DS_Store", "._000000.png"):
        (tmp_path / name).write_text("")
    check_free(str(tmp_path))
    Journal(str(tmp_path), [])
    (tmp_path / "000000.png").write_bytes(IMAGE)
    for call in (lambda: check_free(str(tmp_path)), lambda: Journal(str(tmp_path), [])):
        with pytest.raises(UserError, match="choose (an empty|another) folder"):
            call()
