"""What surrounds the steps of a run: devices, the agreement of processes, options that do not fit the machine."""

import re
import types

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import train
from dnnlib import UserError, locked
from sampling import sheet
from tests.support.runs import TINY
from tests.support.synth import make_archive, pictures
from torch_utils import distributed, persistence
from torch_utils.checkpoint import states
from training import saver as saver_module
from training.objectives.dsm import DSM
from training.saver import Best, Saver
from training.training_loop import TickLog, check_agreement


def test_a_run_on_the_cpu_leaves_the_gpu_alone(tmp_path, monkeypatch):
    """Every process that initializes CUDA takes some hundred megabytes of the GPU, which others may need."""

    def refuse(*args, **kwargs):
        raise AssertionError("this initializes CUDA")

    torch.optim.Adam([torch.zeros(1)])  # Its imports remember PyTorch's functions, which from here on are other ones.
    for name in ("_lazy_init", "reset_peak_memory_stats", "current_device", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    archive = make_archive(tmp_path / "d.zip", pictures(32, channels=1), [0, 1] * 16)
    args = [f"--outdir={tmp_path}", f"--data={archive}", "--duration=0.00003", "--device=cpu", "--nosubdir", *TINY]
    result = CliRunner().invoke(train.main, args)
    assert result.exit_code == 0, repr(result.exception)


def start(archive, outdir, *args):
    common = [f"--outdir={outdir}", f"--data={archive}", "--device=cpu", "--nosubdir", *TINY]
    return CliRunner().invoke(train.main, [*common, *args])


@pytest.fixture
def archive(tmp_path):
    return make_archive(tmp_path / "d.zip", pictures(32, channels=1), [0, 1] * 16)


def test_steps_longer_than_a_tick_skip_neither_snapshots_nor_states(archive, tmp_path, monkeypatch):
    """Steps of 32 images, ticks of 10: the multiples of 5 and 7 ticks lie inside of steps."""
    saved = dict(save_snapshot=[], save_state=[])
    for name, seen in saved.items():
        monkeypatch.setattr(Saver, name, lambda self, nimg, *more, seen=seen: seen.append(nimg))
    result = start(archive, tmp_path / "run", "--tick=0.01", "--snap=5", "--dump=7", "--duration=0.00032")
    assert result.exit_code == 0, result.output
    assert saved["save_snapshot"] == [
        32,
        64,
        128,
        160,
        224,
        256,
        320,
    ]  # the first; past 50, 100, ...; the end
    assert saved["save_state"] == [96, 160, 224, 288, 320]


def test_a_network_that_makes_no_picture_is_trained_further(archive, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise UserError("image of seed 3: not finite")

    monkeypatch.setattr(sheet, "generate_images", fail)
    result = start(archive, tmp_path / "run", "--duration=0.0001")
    assert result.exit_code == 0 and "Warning: no picture of samples: image of seed 3" in result.output
    assert list((tmp_path / "run").glob("training-state-*.pt"))


@pytest.mark.parametrize("more, hint", [([], "choose a smaller --batch-gpu"), (["--batch-gpu=1"], "a smaller network")])
def test_too_little_memory_is_said_in_one_line(archive, tmp_path, monkeypatch, more, hint):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(DSM, "step", fail)
    result = start(archive, tmp_path / "run", "--duration=0.0001", *more)
    number = 1 if more else 32
    assert result.exit_code == 1 and result.stderr.count("\n") == 1, repr(result.exception)
    assert f"cpu has too little memory for {number} images at a time" in result.stderr and hint in result.stderr


def test_runs_that_begin_at_the_same_moment_get_folders_of_their_own(archive, tmp_path, monkeypatch):
    """The other run makes its folder after this one has chosen its number."""
    name, outdir = "00000-d-uncond-ddpmpp_tiny-edm-gpus1-batch32-fp32", tmp_path / "runs"
    setup = DSM.setup
    monkeypatch.setattr(DSM, "setup", lambda self: (setup(self), (outdir / name).mkdir(parents=True)))
    args = [f"--outdir={outdir}", f"--data={archive}", "--device=cpu", *TINY, "--duration=0.00003", "--cond=0"]
    result = CliRunner().invoke(train.main, args)
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert not list((outdir / name).iterdir()) and (outdir / name.replace("00000", "00001") / "log.txt").exists()


def test_a_folder_in_which_a_training_runs_is_refused(archive, tmp_path):
    run = tmp_path / "run"
    assert start(archive, run, "--duration=0.00003").exit_code == 0
    with locked(run / "run"):
        refused = start(archive, run, "--duration=0.00006", "--resume=latest")
    assert refused.exit_code == 1 and "another training is running here" in refused.stderr
    assert start(archive, run, "--duration=0.00006", "--resume=latest").exit_code == 0
    assert not (run / ".run.lock").exists()


def test_going_back_leaves_nothing_that_the_next_resume_prefers(archive, tmp_path):
    run, args = tmp_path / "run", ["--tick=1", "--dump=1", "--keep=9"]
    start(archive, run, *args, "--duration=0.002")
    assert [path.name for path in states(run)][-1] == "training-state-000001.pt"
    start(archive, run, *args, "--duration=0.0015", f"--resume={run}/training-state-000001.pt")
    assert [path.name for path in states(run)] == ["training-state-000001.pt"]
    assert (run / "outdated-training-state-000002.pt").exists()


def test_a_transfer_says_what_it_left_out(archive, tmp_path):
    start(archive, tmp_path / "a", "--duration=0.00003")
    snapshot = f"--transfer={tmp_path}/a/network-snapshot-000000.pkl"
    same = start(archive, tmp_path / "b", "--duration=0.00003", snapshot).output
    assert "Transferred" in same and "begin at random" not in same
    wider = start(archive, tmp_path / "c", "--duration=0.00003", snapshot, "--cbase=16").output
    found = re.search(r"Warning: (\d+) tensors with [0-9,]+ values of the new networks begin at random: net\.", wider)
    assert int(found[1]) > int(re.search(r"Transferred (\d+) tensors", wider)[1])


def test_a_slash_in_the_description_would_hide_the_run(archive, tmp_path):
    result = start(archive, tmp_path / "run", "--desc=lr/3e-4")
    assert result.exit_code == 2 and "--desc=lr/3e-4 becomes part of a folder's name" in result.stderr


def test_a_tick_whose_newline_was_lost_stays_whole(tmp_path):
    line = '{"Progress/kimg": {"mean": 1.0}}'
    (tmp_path / "stats.jsonl").write_text(line)
    TickLog(tmp_path, torch.device("cpu"), 1000, None)
    assert (tmp_path / "stats.jsonl").read_text() == line + "\n"


def test_a_value_that_is_no_number_is_not_the_best(tmp_path, monkeypatch):
    objective = types.SimpleNamespace(snapshot_on_best=True)
    saver = Saver(objective, types.SimpleNamespace(), str(tmp_path), Best(float("nan"), "network-snapshot-000001.pkl"))
    monkeypatch.setattr(saver_module, "to_dict", lambda config: {})
    monkeypatch.setattr(persistence, "save_snapshot", lambda path, data: None)
    for value, kept in ((0.5, True), (0.7, False), (0.4, True)):
        assert saver.save_snapshot(2000, value, {"info": {}}) == kept


LOSSES = np.random.default_rng(0).normal(size=64)
LOSSES -= LOSSES.mean() - 1e-3  # of either sign, with a mean near zero


def agree(monkeypatch, *theirs):
    """Let two processes compare their losses on the same images; the weights are the same."""
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather_object", lambda ours: [ours, [1, *theirs]])
    check_agreement(types.SimpleNamespace(probe=lambda nimg: [1, np.full(64, 1e3), LOSSES]), nimg=5000)


def test_processes_may_round_losses_near_zero_differently(monkeypatch):
    noise = np.random.default_rng(1).normal(size=64)
    agree(monkeypatch, np.full(64, 1e3), LOSSES + 0.02 * noise)
    both = np.where(np.arange(64) == 3, np.nan, LOSSES)
    with pytest.raises(UserError, match="drifted apart at 5.0 kimg"):
        agree(monkeypatch, np.full(64, 1e3), both)


@pytest.mark.parametrize("other", [LOSSES + 0.1, 1.1 * LOSSES, LOSSES[::-1]])
def test_processes_that_compute_wrongly_are_found(monkeypatch, other):
    with pytest.raises(UserError, match="processes 0 and 1 have drifted apart .* 0.001 and .* on average"):
        agree(monkeypatch, np.full(64, 1e3), other)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--precision=fp16"], "--precision=fp16: for CUDA only, this is cpu; use fp32 or bf16"),
        (["--fp16=1"], "--fp16=1: for CUDA only, this is cpu"),
        (["--compile=1", "--batch=24", "--batch-gpu=5"], "--batch-gpu=5 must divide the 24 images of a process"),
    ],
)
def test_what_a_run_could_not_keep_is_refused(tmp_path, options, message):
    outdir = tmp_path / "runs"
    archive = make_archive(tmp_path / "d.zip", pictures(4, channels=1), [0] * 4)
    args = [f"--outdir={outdir}", f"--data={archive}", "--device=cpu", "--duration=0.000024", *options]
    result = CliRunner().invoke(train.main, args)
    assert result.exit_code == 2 and result.output.startswith("Error: ") and message in result.output, result.output
    assert result.output.count("\n") == 1 and not outdir.exists()


def test_what_a_run_computes_otherwise_is_said(tmp_path):
    archive = make_archive(tmp_path / "d.zip", pictures(4, channels=1), [0] * 4)
    common = [f"--outdir={tmp_path}", f"--data={archive}", "--device=cpu", "--dry-run"]
    assert "only CUDA has TF32" in CliRunner().invoke(train.main, [*common, "--precision=tf32"]).output
    for options in (["--batch=24", "--batch-gpu=8"], ["--batch=24", "--batch-gpu=99"]):
        assert CliRunner().invoke(train.main, [*common, "--compile=1", *options]).exit_code == 0
