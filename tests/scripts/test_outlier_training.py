"""train.py and train_noise.py on images that do not belong: runs, resume, what is learned, bad input."""

import json

import numpy as np
import pytest

import train
import train_noise
from archives.dataset import ImageDataset
from tests.support.commands import callers
from tests.support.runs import TINY, assert_same, final_weights
from tests.support.synth import run_dataset_tool

succeed, fail = callers(train.main)
tdsm, tdsm_fails = callers(train_noise.main)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An archive of 96 digits, of which 24 are photographs, as a label file says too, and one without outliers."""
    folder = tmp_path_factory.mktemp("outliers")
    args = ["--source=digits", "--max-images=96"]
    assert run_dataset_tool(*args, f"--dest={folder}/plain.zip")[0] == 0
    assert run_dataset_tool(*args, f"--dest={folder}/d.zip", "--outliers=photos", "--perturb_percent=25")[0] == 0
    data = ImageDataset(str(folder / "d.zip"))
    np.savez(folder / "found.npz", names=data.file_names, is_outlier=data.outliers)
    np.savez(folder / "every.npz", names=data.file_names, is_outlier=np.ones(96, dtype=bool))
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Sampling takes longer than these runs."""
    monkeypatch.setattr(train, "save_samples", None)


def test_outliers_teach_where_noise_hides_them_and_runs_resume_bit_for_bit(folder, tmp_path):
    args = [f"--data={folder}/d.zip", "--nosubdir", *TINY, "--outliers=ambient"]
    shown = succeed(*args, f"--outdir={tmp_path}/whole", "--duration=0.000192")
    assert "Outliers: 24 of 96 images. They teach from noise level" in shown
    used = [json.loads(line)["Outliers/used"] for line in open(tmp_path / "whole" / "stats.jsonl")]
    share = sum(s["mean"] * s["num"] for s in used) / sum(s["num"] for s in used)
    assert sum(s["num"] for s in used) == 48 and share < 0.5  # two epochs; a photograph among digits is easily told
    succeed(*args, f"--outdir={tmp_path}/half", "--duration=0.000096")
    named = [f"--outlier_data={folder}/found.npz", "--duration=0.000192", f"--resume={tmp_path}/half"]
    fail(1, *args, f"--outdir={tmp_path}/half", *named, "outliers.path")
    succeed(*args, f"--outdir={tmp_path}/half", *named[1:])
    assert_same(final_weights(tmp_path / "whole")["objective"], final_weights(tmp_path / "half")["objective"])


@pytest.mark.parametrize("args", [["--drop_outliers"], ["--outliers=drop", "--outlier_data={d}/found.npz"]])
def test_outliers_are_left_out(folder, tmp_path, monkeypatch, args):
    seen = []
    loss = train.DSM.loss
    monkeypatch.setattr(train.DSM, "loss", lambda self, images, *rest: seen.append(images) or loss(self, images, *rest))
    args = [arg.format(d=folder) for arg in args]
    shown = succeed(f"--data={folder}/d.zip", f"--outdir={tmp_path}/a", *TINY, *args, "--duration=0.000144")
    assert "Outliers: 24 of 96 images, which are left out" in shown
    data = ImageDataset(str(folder / "d.zip"))
    foreign = {image.numpy().tobytes() for image in data.images(np.flatnonzero(data.outliers))}
    assert len(seen) > 2 and not foreign & {image.numpy().tobytes() for batch in seen for image in batch}


def test_bad_input(folder, tmp_path):
    args = [f"--data={folder}/d.zip", f"--outdir={tmp_path}/x", *TINY]
    fail(2, *args, "--outlier_data=a.npz", "--outlier_data goes with --outliers=drop or ambient")
    fail(2, *args, "--outliers=keep", "--drop_outliers", "--drop_outliers contradicts --outliers=keep")
    fail(1, *args, "--outliers=drop", f"--outlier_data={folder}/none.npz", "--outlier_data|none.npz")
    fail(1, *args, "--outliers=drop", f"--outlier_data={folder}/every.npz", "--outliers=drop|every image is an outlier")
    plain = [f"--data={folder}/plain.zip", *args[1:]]
    fail(1, *plain, "--outliers=ambient", "--outliers=ambient|has no record of outliers")
    assert not (tmp_path / "x").exists()
    tdsm_fails(2, *args, "--cls=x.pkl", "--outlier_data=a.npz", "--outlier_data goes with")
