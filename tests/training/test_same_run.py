"""Which run a continued run is: files compare by contents, wherever they lie and however their paths are spelled."""

import json
import os
import shutil
import zipfile

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

import train
import train_classifier
import train_noise
from archives.contents import SAMPLE, describe_contents, what_differs
from archives.reader import ArchiveReader
from dnnlib import UserError
from tests.support.commands import callers
from tests.support.runs import TINY
from tests.support.synth import make_archive, pictures
from torch_utils import checkpoint, persistence
from training.networks_resnet import Classifier

PIXELS, LABELS = pictures(40, channels=1), [i % 4 for i in range(40)]
STEP = ["--device=cpu", "--duration=0.000032", "--nosubdir", *TINY]
succeed, fail = callers(train.main)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """The training state of a run of one step on d.zip, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    data = make_archive(folder / "d.zip", PIXELS, LABELS)
    succeed(f"--data={data}", f"--outdir={folder}/run", "--cond=1", *STEP)
    return folder, checkpoint.latest_state(folder / "run")


def continued(state, data, *options):
    """The arguments that continue the run on `data`, as far as to compare its options."""
    return [
        f"--data={data}",
        "--cond=1",
        *STEP,
        f"--outdir={os.path.dirname(state)}",
        f"--resume={state}",
        *options,
        "-n",
    ]


def test_moved_and_respelled_data_goes_on(state, tmp_path, monkeypatch):
    folder, saved = state
    shutil.copy(folder / "d.zip", tmp_path / "elsewhere.zip")
    (tmp_path / "linked.zip").symlink_to(folder / "d.zip")
    with zipfile.ZipFile(folder / "d.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    monkeypatch.chdir(folder)
    os.mkdir(tmp_path / "a[1]")
    shutil.copy(folder / "d.zip", tmp_path / "a[1]")
    for data in ("d.zip", "./run/../d.zip", *(tmp_path / name for name in ("elsewhere.zip", "linked.zip", "unpacked"))):
        assert "Dry run" in succeed(*continued(saved, data))
    assert "Dry run" in succeed(*continued(saved, tmp_path / "a[1]" / "*.zip"))


def changed(**changes):
    pixels, labels = PIXELS.copy(), list(LABELS)
    if "pixel" in changes:
        pixels[changes["pixel"], 0, 0] += 1
    if "label" in changes:
        labels[changes["label"]] ^= 1
    return pixels, labels


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda path: make_archive(path, PIXELS[:36], LABELS[:36]), "holds 36 images instead of 40"),
        (lambda path: make_archive(path, PIXELS, [*LABELS[1:], 4]), "holds 5 classes instead of 4"),
        (lambda path: make_archive(path, *changed(label=7)), "holds other labels)"),
        (lambda path: make_archive(path, *changed(pixel=39)), "holds other image files)"),
        (lambda path: make_archive(path, *changed(pixel=3, label=3)), "holds other labels and image files)"),
    ],
)
def test_other_contents_at_the_same_path_are_refused(state, tmp_path, change, words):
    folder, saved = state
    shutil.copytree(folder / "run", tmp_path / "run")
    data = folder / "d.zip"
    kept = data.read_bytes()
    try:
        change(data)
        fail(1, *continued(saved, data), f"--resume|dataset.path: {data} {words}")
    finally:
        data.write_bytes(kept)


def test_another_record_of_outliers_is_another_run_where_it_decides(state, tmp_path):
    def archive(listed):
        extra = {} if listed is None else dict(outliers=[f"00000/img{i:08d}.png" for i in listed])
        return make_archive(tmp_path / "d.zip", PIXELS, LABELS, **extra)

    args = [f"--data={archive([1, 2])}", f"--outdir={tmp_path}/run", "--cond=1", *STEP]
    succeed(*args, "--outliers=drop")
    for listed in ([1, 3], None):
        archive(listed)
        fail(1, *args, "--outliers=drop", f"--resume={tmp_path}/run", "-n", "d.zip holds other recorded outliers")
    archive([1, 2])
    succeed(*args, "--outliers=drop", f"--resume={tmp_path}/run", "-n")
    succeed(f"--data={archive([1])}", *continued(state[1], tmp_path / "d.zip")[1:])  # nobody asked for them


def test_renamed_images_are_other_data(state, tmp_path):
    with zipfile.ZipFile(state[0] / "d.zip") as archive:
        archive.extractall(tmp_path / "d")
    metadata = (tmp_path / "d/dataset.json").read_text()
    (tmp_path / "d/dataset.json").write_text(metadata.replace("img00000039", "img00000040"))
    os.rename(tmp_path / "d/00000/img00000039.png", tmp_path / "d/00000/img00000040.png")
    fail(1, *continued(state[1], tmp_path / "d"), f"holds other file names (it was {state[0]}/d.zip)")


def test_states_of_earlier_versions_compare_paths(state, tmp_path):
    folder, saved = state
    old = checkpoint.load_state(saved)
    del old["config"]["contents"]
    checkpoint.save_state(tmp_path / "old.pt", old)
    shutil.copy(folder / "d.zip", tmp_path / "moved.zip")
    args = ["--cond=1", *STEP, f"--outdir={tmp_path}/new", f"--resume={tmp_path}/old.pt", "-n"]
    succeed(f"--data={folder}/d.zip", *args)
    fail(1, f"--data={tmp_path}/moved.zip", *args, f"dataset.path: {folder}/d.zip there, {tmp_path}/moved.zip here")


def test_a_folder_is_known_by_sizes_and_some_of_its_files(tmp_path):
    """BMPs of one shape have one size, so their contents count."""
    for i in range(3):
        PIL.Image.fromarray(PIXELS[i, :, :, 0]).save(tmp_path / f"{i}.bmp")
    there = describe_contents(ArchiveReader(str(tmp_path)))
    assert what_differs(there, describe_contents(ArchiveReader(str(tmp_path)))) is None
    PIL.Image.fromarray(PIXELS[5, :, :, 0]).save(tmp_path / "1.bmp")
    assert what_differs(there, describe_contents(ArchiveReader(str(tmp_path)))) == "other image files"
    assert "checksums" not in there and SAMPLE >= 500


def test_a_file_is_known_by_its_contents(state, tmp_path):
    """The classifier of TDSM may move, but not change; the same for the other files that a run names."""
    kwargs = dict(img_resolution=8, img_channels=1, label_dim=4, depth="small", model_channels=8, channel_mult=[1])
    for name in ("a", "b"):
        net = Classifier(**kwargs).eval().requires_grad_(False)
        info = dict(posterior="clean", transition=np.eye(4).tolist())
        persistence.save_snapshot(tmp_path / f"{name}.pkl", dict(ema=net, info=info))
    shutil.copy(tmp_path / "a.pkl", tmp_path / "moved.pkl")
    ok, refused = callers(train_noise.main)
    args = [f"--data={state[0]}/d.zip", f"--outdir={tmp_path}/run", *STEP]
    ok(*args, f"--cls={tmp_path}/a.pkl")
    ok(*args, f"--resume={tmp_path}/run", f"--cls={tmp_path}/moved.pkl", "-n")
    refused(1, *args, f"--resume={tmp_path}/run", f"--cls={tmp_path}/b.pkl", "-n",
            f"tdsm.cls: {tmp_path}/b.pkl holds other contents (it was {tmp_path}/a.pkl)")  # fmt: skip


def test_parts_of_a_batch_may_change_and_that_is_said_once(state):
    folder, saved = state
    text = succeed(*continued(saved, folder / "d.zip", "--batch-gpu=8"))
    assert text.count("dropout draws other random numbers") == 1
    assert "dropout" not in succeed(*continued(saved, folder / "d.zip")).split("Training options")[0]


def test_a_continued_run_remembers_the_weights_that_it_began_with(state, tmp_path):
    folder, _ = state
    start = f"--transfer={folder}/run"
    succeed(f"--data={folder}/d.zip", f"--outdir={tmp_path}/run", "--cond=1", *STEP, start)
    resume = [f"--data={folder}/d.zip", f"--outdir={tmp_path}/run", "--cond=1", *STEP, f"--resume={tmp_path}/run", "-n"]
    for options in ([], [start]):
        text = succeed(*resume, *options)
        assert json.loads(text[text.index("{") : text.rindex("}") + 1])["transfer"] == f"{folder}/run"
    fail(1, *resume, "--transfer=another.pkl", "transfer|another.pkl here")


def test_a_run_directory_may_be_a_glob_and_have_brackets(state, tmp_path):
    folder, _ = state
    runs = tmp_path / "runs [v1]"
    shutil.copytree(folder / "run", runs / "00000-d")
    args = [f"--data={folder}/d.zip", f"--outdir={runs}", "--cond=1", *STEP, "-n"]
    assert "Resuming from" in succeed(*args, f"--resume={runs}/00000-*")
    assert persistence.find_snapshot(f"{runs}/0*") == persistence.find_snapshot(f"{runs}/0*/network-*.pkl")
    shutil.copytree(folder / "run", runs / "00001-d")
    fail(1, *args, f"--resume={runs}/0*", "--resume|matches|00000-d|1 others")
    for pattern in (f"{runs}/0*", f"{runs}/0*/network-*.pkl"):  # the newest of several runs is not what anybody means
        with pytest.raises(UserError, match=r"matches .*2 folders, .*00000-d and others; name one of them"):
            persistence.find_snapshot(pattern)
    fail(1, *args, f"--resume={runs}/9*", "is neither a training state")


@pytest.mark.parametrize("script", [train_classifier, train_noise])
def test_label_vectors_are_refused_at_once(tmp_path, script):
    data = make_archive(tmp_path / "d.zip", PIXELS, [[0.5, 0.5]] * 40)
    cls = [f"--cls={__file__}"] if script is train_noise else []
    _, refused = callers(script.main)
    refused(1, f"--data={data}", f"--outdir={tmp_path}/run", *STEP, *cls, "--data|vectors of 2 numbers|one class per")
    assert not (tmp_path / "run").exists()


def test_missing_packages_are_noticed_before_there_is_a_run_directory(state, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    result = CliRunner().invoke(
        train.main, [f"--data={state[0]}/d.zip", f"--outdir={tmp_path}/run", *STEP, "--wandb=project"]
    )
    assert result.exit_code == 2 and "--wandb" in result.stderr and "pip install wandb" in result.stderr
    assert not (tmp_path / "run").exists()
