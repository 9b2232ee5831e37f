"""A detector that was killed continues from its training state beside the label file, and finds the same."""

import os

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import detect_noise
import inspect_data
from archives.dataset import ImageDataset
from detection.trainer import Settings, Trainer, TrainingState
from tests.support.commands import callers
from tests.support.synth import make_archive, pictures

succeed, _ = callers(detect_noise.main)
SHORT = ["--epochs=2", "--batch=12", "--arch=ddpmpp_tiny", "--device=cpu", "--foreign=0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("data") / "d.zip", pictures(24, channels=1), [i % 3 for i in range(24)])


@pytest.fixture
def epochs(monkeypatch):
    """Count the epochs, after each of which a state is saved; `die` holds what is raised before which epoch."""

    class Epochs:
        count, die = 0, {}

    epoch = Trainer.epoch

    def counted(self, *args):
        if Epochs.count in Epochs.die:
            raise Epochs.die.pop(Epochs.count)
        Epochs.count += 1
        epoch(self, *args)

    monkeypatch.setattr(Trainer, "epoch", counted)
    monkeypatch.setattr(TrainingState, "due", lambda self: bool(self.path))
    return Epochs


def judged(path):
    with np.load(path, allow_pickle=False) as found:
        return {name: found[name] for name in ("is_clean", "score", "suggested")}


@pytest.mark.parametrize("method, die, total", [("cores", 1, 2), ("gce", 1, 2), ("confident", 5, 10)])
def test_an_interrupted_detector_goes_on(data, tmp_path, epochs, method, die, total):
    if method == "confident":
        pytest.importorskip("cleanlab")
    args = [f"--data={data}", f"--method={method}", *SHORT]
    succeed(*args, f"--dest={tmp_path}/whole.npz")
    assert epochs.count == total
    epochs.count, epochs.die = 0, {die: KeyboardInterrupt()}
    stopped = CliRunner().invoke(detect_noise.main, [*args, f"--dest={tmp_path}/new/part.npz"])
    assert stopped.exit_code == 130 and "The same command goes on" in stopped.stdout
    assert os.listdir(tmp_path / "new") == ["part-training.pt"]
    text = succeed(*args, f"--dest={tmp_path}/new/part.npz")
    assert f"Training continues from {tmp_path}/new/part-training.pt" in text and epochs.count == total
    whole, part = judged(tmp_path / "whole.npz"), judged(tmp_path / "new/part.npz")
    assert all(np.array_equal(whole[name], part[name]) for name in whole)
    assert "part-training.pt" not in os.listdir(tmp_path / "new")


def test_a_state_counts_for_its_own_options_and_data_only(data, tmp_path, capsys):
    def state(archive=data, method="cores", **settings):
        return TrainingState(method, ImageDataset(str(archive)), Settings(state=f"{tmp_path}/new/x.pt", **settings))

    assert state().load() is None and not (tmp_path / "new").exists()
    table = torch.arange(6.0).reshape(3, 2)
    state().save(dict(epoch=3, weights=dict(a=torch.ones(2))), table)
    moved = tmp_path / "moved.zip"
    moved.write_bytes(data.read_bytes())
    for same in (state(), state(moved)):
        found = same.load()
        assert found["epoch"] == 3 and found["weights"]["a"].tolist() == [1, 1] and torch.equal(found["table"], table)
    assert capsys.readouterr().out.count("Training continues from") == 2
    other = make_archive(tmp_path / "other.zip", pictures(24, channels=1, seed=1), [i % 3 for i in range(24)])
    for different in (state(seed=1), state(epochs=4), state(method="gce"), state(other)):
        assert different.load() is None and "belongs to other options or data" in capsys.readouterr().out
    path = tmp_path / "new/x.pt"
    path.write_bytes(path.read_bytes()[:-70])
    assert state().load() is None and "x.pt: truncated" in capsys.readouterr().out


def test_a_full_disk_does_not_stop_the_training(data, tmp_path, monkeypatch):
    def full(path, state):
        raise OSError(28, os.strerror(28), path)

    monkeypatch.setattr("detection.trainer.checkpoint.save_state", full)
    text = succeed(f"--data={data}", f"--dest={tmp_path}/l.npz", *SHORT)
    assert "l-training.pt: No space left on device; a killed run could not continue" in text


def test_saving_takes_a_small_share_of_the_time(data, monkeypatch):
    state = object.__new__(TrainingState)
    state.path, state.saved, state.took = "x.pt", 100.0, 2.0
    for now, due in ((139, False), (141, True)):
        monkeypatch.setattr("detection.trainer.time.time", lambda now=now: now)
        assert state.due() is due


def test_inspection_goes_on_in_its_folder(data, tmp_path, epochs):
    ok, stopped = callers(inspect_data.main)
    args = [f"--data={data}", f"--outdir={tmp_path}/check", "--method=cores", *SHORT]
    epochs.die = {1: KeyboardInterrupt()}
    stopped(130, *args, "interrupted")
    (tmp_path / "check/.labels-training.pt.0123abcd.tmp").write_bytes(b"")
    assert "Training continues" in ok(*args) and epochs.count == 2
    assert "labels-training.pt" not in os.listdir(tmp_path / "check")
