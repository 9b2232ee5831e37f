"""What surrounds the steps of a run: devices, the agreement of processes, options that do not fit the machine."""

import types

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import train
from dnnlib import UserError
from tests.support.runs import TINY
from tests.support.synth import make_archive, pictures
from torch_utils import distributed
from training.training_loop import check_agreement


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
