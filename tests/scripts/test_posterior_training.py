"""train.py on labels by a posterior and by its other methods: runs, resume, what reaches the network, bad input."""

import json
import re

import numpy as np
import pytest

import train
import train_classifier
import train_noise
from archives.dataset import ImageDataset
from archives.label_file import LabelFile, class_noise_rates, load_label_file, save_label_file
from archives.posterior import compress
from tests.support.commands import callers
from tests.support.runs import TINY, assert_same, final_weights
from tests.support.synth import run_dataset_tool

succeed, fail = callers(train.main)
tdsm, tdsm_fails = callers(train_noise.main)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An archive of 96 digits with wrong labels, and label files with and without a posterior that knows better."""
    folder = tmp_path_factory.mktemp("posterior")
    args = ["--source=digits", f"--dest={folder}/d.zip", "--max-images=96", "--noise_type=sym", "--noise_rate=0.4"]
    assert run_dataset_tool(*args)[0] == 0
    data = ImageDataset(str(folder / "d.zip"))
    p = np.eye(10)[data.clean_labels] * 0.7 + 0.03
    right = data.labels == data.clean_labels
    known = data.file_names, data.labels, right, p[np.arange(96), data.labels].astype(np.float32), data.clean_labels
    file = LabelFile(*known, float(np.mean(~right)), class_noise_rates(data.labels, right, 10))
    save_label_file(folder / "without.npz", file)
    file.posterior = compress(p, data.labels)
    save_label_file(folder / "labels.npz", file)
    return folder


def common(folder, *args):
    return [f"--data={folder}/d.zip", "--cond=1", *TINY, *args]


def stats(run_dir):
    return [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Sampling takes longer than these runs."""
    for script in (train, train_noise):
        monkeypatch.setattr(script, "save_samples", None)


SAMPLE = ["--posterior=labels.npz", "--posterior_mode=sample"]
OTHERS = [["--method=cep", "--label-dropout=0.3"], ["--method=dmis"]]


@pytest.mark.parametrize("args", [SAMPLE, *(pytest.param(args, marks=pytest.mark.long) for args in OTHERS)])
def test_runs_resume_bit_for_bit(folder, args, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    args = common(folder, *args, "--nosubdir")
    succeed(*args, f"--outdir={tmp_path}/whole", "--duration=0.000128")
    succeed(*args, f"--outdir={tmp_path}/half", "--duration=0.000064")
    succeed(*args, f"--outdir={tmp_path}/half", "--duration=0.000128", f"--resume={tmp_path}/half")
    assert_same(final_weights(tmp_path / "whole")["objective"], final_weights(tmp_path / "half")["objective"])


@pytest.mark.parametrize(
    "mode, said",
    [
        ("drop", "leaves out {} images"),
        pytest.param("relabel", "changes {} labels", marks=pytest.mark.long),
        pytest.param("null", "changes {} labels and takes 0 away", marks=pytest.mark.long),
    ],
)
def test_each_rule(folder, tmp_path, mode, said):
    truth = ImageDataset(str(folder / "d.zip"))
    wrong = int((truth.labels != truth.clean_labels).sum())
    rule = [f"--posterior={folder}/labels.npz", f"--posterior_mode={mode}"]
    args = common(folder, f"--outdir={tmp_path}/run", "--nosubdir", *rule)
    shown = succeed(*args, "--duration=0.000192")
    assert said.format(wrong) in shown and f"the rule '{mode}'" in shown
    changed = [s["Posterior/changed"] for s in stats(tmp_path / "run")]
    assert sum(s["mean"] * s["num"] for s in changed) == (0 if mode == "drop" else 2 * wrong)  # in two epochs
    fail(1, *args, "--posterior_mode=sample", f"--resume={tmp_path}/run", "--resume|posterior.mode")


def test_labels_are_relabeled_unless_a_continued_run_drew_them(folder, tmp_path):
    args = common(folder, f"--outdir={tmp_path}/run", "--nosubdir", f"--posterior={folder}/labels.npz")
    assert '"mode": "relabel"' in succeed(*args, "--duration=0.00003", "--dry-run")
    assert "the rule 'sample'" in succeed(*args, "--posterior_mode=sample", "--duration=0.00003")
    assert "the rule 'sample'" in succeed(*args, "--duration=0.00006", f"--resume={tmp_path}/run")


def test_foreign_images_that_are_learned_are_counted(folder, tmp_path):
    file = load_label_file(folder / "labels.npz", ImageDataset(str(folder / "d.zip")))
    file.is_outlier = np.arange(96) % 12 == 5
    save_label_file(tmp_path / "labels.npz", file)
    args = [*common(folder, f"--posterior={tmp_path}/labels.npz", "--duration=0.00003", "--nosubdir")]
    assert "8 of the images are foreign by the label file" in succeed(*args, f"--outdir={tmp_path}/a")
    dropped = ["--drop_outliers", f"--outlier_data={tmp_path}/labels.npz"]
    assert "are foreign by the label file" not in succeed(*args, *dropped, f"--outdir={tmp_path}/b")


def test_mistakes_are_named(folder, tmp_path):
    args = common(folder, f"--outdir={tmp_path}", "--duration=0.0001")
    known = f"--posterior={folder}/labels.npz"
    fail(2, *args, "--posterior_mode=drop", "--posterior_mode|go with --posterior")
    fail(2, *args, known, "--posterior_min=0.5", "--posterior_min|--posterior_mode=null")
    fail(2, *args, known, "--cond=0", "--posterior|--cond=1")
    fail(2, *args, known, "--method=dmis", "--method=dmis|--posterior")
    fail(2, *args, "--gamma=1", "--gamma|--method=cep")
    fail(2, *args, "--method=cep", "--cond=0", "--cond=0|cep")
    fail(1, *args, f"--posterior={folder}/without.npz", "--posterior|without.npz|holds no posterior|detect_noise.py")
    fail(1, *args, f"--posterior={folder}/absent.npz", "--posterior|absent.npz")
    fail(1, *args, known, "--posterior_mode=null", "--posterior_min=0.9", "--posterior_mode=null|0.9")
    assert not list(tmp_path.iterdir())
    assert load_label_file(folder / "labels.npz", ImageDataset(str(folder / "d.zip"))).posterior is not None


# TDSM.


@pytest.fixture(scope="module")
def classifier(folder):
    """The run directory of a classifier that has learned a little."""
    args = [f"--data={folder}/d.zip", f"--outdir={folder}/cls", "--nosubdir", "--duration=0.00004", *TINY]
    callers(train_classifier.main)[0](*args, "--noise_type=sym", "--noise_rate=0.4")
    return folder / "cls"


def settings(output):
    return json.loads(output.split("Training options:")[1].split("\n\n")[0])["tdsm"]


def test_tdsm_draws_one_class_unless_the_sum_is_shortened(folder, classifier, tmp_path):
    args = common(folder, f"--cls={classifier}", f"--outdir={tmp_path}")
    assert settings(tdsm(*args, "-n"))["others"] == "sample"
    for published in ("--preset=cifar10", "--tau=0.01", "--pairs=2", "--others=all"):
        assert settings(tdsm(*args, "-n", published))["others"] == "all"
    tdsm_fails(2, *args, "--others=sample", "--pairs=2", "--pairs|--others=all")
    assert not list(tmp_path.iterdir())


def test_a_continued_run_keeps_its_weights_by_class(folder, classifier, tmp_path):
    args = common(folder, f"--cls={classifier}", f"--outdir={tmp_path}/run", "--nosubdir")
    assert "Weights by class (S-DSM)" in tdsm(*args, "--weights=class", "--duration=0.000048")
    again = [f"--resume={tmp_path}/run", "--duration=0.000096"]
    assert "Weights by class (S-DSM)" in tdsm(*args, *again)  # the state says so, not the options
    tdsm_fails(1, *args, *again, "--weights=image", "--resume|tdsm.weights")


def test_tdsm_corrects_the_noise_that_posterior_labels_leave(folder, classifier, tmp_path):
    args = common(
        folder, f"--cls={classifier}", "--nosubdir", "--duration=0.000064", f"--posterior={folder}/labels.npz"
    )
    shown = tdsm(*args, f"--outdir={tmp_path}/a")
    assert "the rule 'relabel'" in shown
    left = float(re.search(r"Label noise that remains: ([\d.]+)%", shown)[1])
    assert 20 < left < 35  # each image has its class with 0.73
    assert 0 < stats(tmp_path / "a")[-1]["TDSM/pairs_per_image"]["mean"] < 1
    tdsm_fails(2, *args, f"--outdir={tmp_path}/b", "--posterior_mode=sample", "--posterior_mode=sample|train.py")
    assert not (tmp_path / "b").exists()
