"""Runs whose networks are sharded (FSDP2) against runs with DDP: the same losses, weights, states and snapshots."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.distributed.fsdp import FSDPModule

import generate
import train
from archives.label_file import LabelFile, save_label_file
from tests.support.faults import KILLED
from tests.support.paths import ROOT
from tests.support.runs import assert_same, errors
from tests.support.synth import make_archive, pictures
from torch_utils import checkpoint, distributed, persistence
from training.networks_resnet import Classifier

pytestmark = pytest.mark.slow

CLASSES = 4
STEP = 24  # images; three micro-batches on each of two processes, two on each of three
COMMON = [
    f"--batch={STEP}",
    "--batch-gpu=4",
    f"--tick={STEP / 1000}",
    "--snap=9",
    "--dump=1",
    "--seed=3",
    "--keep=9",
    "--nosubdir",
    "--device=cpu",
]
TINY = [
    "--cond=1",
    "--arch=ddpmpp_tiny",
    "--cbase=8",
    "--cres=1,1",
    "--lr_rampup_kimg=0",
    "--augment=0.1",
    "--ema=0.00005",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An archive of 64 random images, a label file and a classifier for it."""
    folder = tmp_path_factory.mktemp("sharding")
    labels = np.arange(64) % CLASSES
    make_archive(folder / "d.zip", pictures(64, channels=1), labels.tolist())
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(64)]
    save_label_file(
        folder / "labels.npz",
        LabelFile(
            names,
            labels,
            np.arange(64) % 3 > 0,
            np.full(64, 0.5, np.float32),
            labels,
            1 / 3,
            np.full(CLASSES, 1 / 3, np.float32),
        ),
    )
    torch.manual_seed(0)
    net = Classifier(8, 1, CLASSES, depth="small", model_channels=8, channel_mult=[1], augment_dim=9)
    net.head.weight.data.normal_()  # opinions, so that images differ in the number of classes that they may be of
    persistence.save_snapshot(folder / "cls.pkl", dict(ema=net, info=dict(posterior="clean")))
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """Have `faults.py` run a script for some steps: what its processes left, once they all succeeded."""
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "support" / "faults.py", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def run(outdir, script, *options, steps=3, ranks=2, codes=0, **more):
        args = [f"--outdir={outdir}", f"--data={folder / 'd.zip'}", f"--duration={steps * STEP / 1e6}", *COMMON]
        request = dict(script=script, args=[*args, *options], ranks=ranks, root=str(outdir), **more)
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = json.loads(server.stdout.readline())
        assert codes is None or answer["codes"] == [codes] * ranks, answer
        return answer

    yield run
    server.stdin.close()
    assert server.wait() == 0


def state(outdir):
    return checkpoint.load_state(checkpoint.latest_state(outdir))


def losses(outdir):
    with open(outdir / "stats.jsonl") as file:
        rows = [json.loads(line) for line in file]
    return [{k: v["mean"] for k, v in row.items() if k.startswith(("Loss", "Health", "TDSM"))} for row in rows]


def tensors(data):
    """All tensors in nested data, after what else there is: names, shapes, types, numbers."""
    if isinstance(data, torch.Tensor):
        return [(data.shape, data.dtype)], [data.flatten().to(torch.float64)]
    if not isinstance(data, (dict, list)):
        return [data], []
    parts = [tensors(value) for value in (data.values() if isinstance(data, dict) else data)]
    form = [type(data), *(data if isinstance(data, dict) else []), *(p[0] for p in parts)]
    return form, sum((p[1] for p in parts), [])


def assert_alike(found, expected, tolerance):
    """Nested data of the same form, whose tensors together differ by `tolerance` of their norm at most."""
    (form, ours), (expected_form, theirs) = tensors(found), tensors(expected)
    assert form == expected_form
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    assert (ours - theirs).norm() < tolerance * theirs.norm()


def assert_same_run(sharded, plain):
    for ours, theirs in zip(losses(sharded), losses(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    validated = [state(outdir)["best"]["value"] or 0 for outdir in (sharded, plain)]
    assert validated[0] == pytest.approx(validated[1], rel=1e-6)
    for name, theirs in state(plain)["objective"].items():
        ours = state(sharded)["objective"][name]
        for part in ("net", "ema"):
            assert_alike(ours[part], theirs[part], 1e-6)
        assert_alike(ours["optimizer"], theirs["optimizer"], 1e-5)


METHODS = {
    "dsm": ("train", *TINY, "--dropout=0.1"),
    "tdsm": ("train_noise", *TINY, "--cls={}/cls.pkl", "--noise_type=sym", "--noise_rate=0.4", "--tau=0.1"),
    "learned T": ("train_classifier", *TINY, "--noise_type=learn", "--val=0.2"),
    "discriminator": ("train_discriminator", *TINY, "--label-path={}/labels.npz"),
    "rduot": (
        "train_rduot",
        "--num_channels_dae=8",
        "--ch_mult=1,1",
        "--num_res_blocks=1",
        "--ngf=4",
        "--lazy_reg=2",
        "--num_timesteps=2",
        "--nz=8",
        "--z_emb_dim=8",
    ),
}


OTHERS = sorted(METHODS.keys() - {"learned T"})  # which has two networks


def arguments(method, folder):
    return [text.format(folder) for text in METHODS[method]]


@pytest.mark.parametrize("method", ["learned T", *(pytest.param(m, marks=pytest.mark.long) for m in OTHERS)])
def test_every_method_learns_the_same_as_with_ddp(run, folder, tmp_path, method):
    ranks = 3 if method == "discriminator" else 2  # three: slices of unequal size, and empty ones
    for name in ("0", "1"):
        run(tmp_path / name, *arguments(method, folder), f"--shard={name}", steps=2, ranks=ranks)
    assert_same_run(tmp_path / "1", tmp_path / "0")
    kept = [persistence.load_snapshot(path) for path in sorted(tmp_path.glob("?/network-snapshot-000000.pkl"))]
    assert_alike(kept[1]["ema"].state_dict(), kept[0]["ema"].state_dict(), 1e-6)


def test_states_go_between_ddp_and_shards_and_numbers_of_processes(run, folder, tmp_path):
    dsm = arguments("dsm", folder)
    run(tmp_path / "whole", *dsm, steps=4)
    for name in ("0", "1"):
        run(tmp_path / name, *dsm, f"--shard={name}", steps=2)
        shutil.copytree(tmp_path / name, tmp_path / f"{name} then 1 process")
    for before, after in (("0", "1"), ("1", "0")):
        answer = run(tmp_path / before, *dsm, f"--shard={after}", f"--resume={tmp_path / before}", steps=4)
        assert "Resuming at" in answer["out"][0]
        assert_same_run(tmp_path / before, tmp_path / "whole")
    for name in ("0 then 1 process", "1 then 1 process"):
        answer = run(tmp_path / name, *dsm, "--shard=1", f"--resume={tmp_path / name}", steps=4, ranks=1)
        assert "1 processes continue where 2 were" in answer["out"][0]
    assert_same_run(tmp_path / "1 then 1 process", tmp_path / "0 then 1 process")
    # The snapshots of sharded runs are like any others.
    pkl = tmp_path / "0" / "network-snapshot-000000.pkl"
    made = CliRunner().invoke(
        generate.main, [f"--network={pkl}", f"--outdir={tmp_path / 'made'}", "--seeds=0-1", "--steps=2", "--device=cpu"]
    )
    assert made.exit_code == 0 and len(list((tmp_path / "made").glob("*.png"))) == 2, made.output


@pytest.mark.long
def test_two_machines_of_two_processes_shard_within_and_replicate_across(run, folder, tmp_path):
    for name in ("0", "1"):
        run(tmp_path / name, *arguments("tdsm", folder), f"--shard={name}", ranks=4, env=dict(LOCAL_WORLD_SIZE="2"))
    assert_same_run(tmp_path / "1", tmp_path / "0")


def test_bad_gradients_are_counted_once_for_all_processes(run, tmp_path):
    for name in ("0", "1"):
        run(tmp_path / name, "tiny", "--augment=0", f"--shard={name}", "--ls=8", hook=dict(nan=[1], rank=1))
    counts = [[row["Health/bad_gradients"] for row in losses(tmp_path / name)] for name in ("0", "1")]
    parameters = 64 * 2 + 2 + 2 * 64 + 64
    assert counts[0] == counts[1] == [0, parameters, 0]
    assert_same_run(tmp_path / "1", tmp_path / "0")


KILLED_RUNS = {"shards": ("tiny", "--augment=0", "--shard=1"), "train.py": ("train", *TINY, "--dropout=0.1")}


@pytest.mark.parametrize("args", KILLED_RUNS.values(), ids=KILLED_RUNS)
def test_killed_while_saving_and_resumed_bit_for_bit(args, run, tmp_path):
    undisturbed = run(tmp_path / "whole", *args, steps=4)
    at = max(i for i, what in enumerate(undisturbed["operations"]) if what == "replace") - 2  # before the last state
    killed = run(tmp_path / "killed", *args, steps=4, fault=dict(kind="kill", at=at), codes=None)
    assert killed["codes"] == [KILLED, 1] and state(tmp_path / "killed")["nimg"] < 4 * STEP
    run(tmp_path / "killed", *args, "--resume=latest", steps=4)
    assert_same(state(tmp_path / "killed"), state(tmp_path / "whole"))


def test_a_machine_that_computes_wrongly_is_found(run, tmp_path):
    answer = run(tmp_path, "tiny", "--augment=0", "--shard=1", hook=dict(miscompute=1.2, rank=1), codes=1)
    assert "processes 0 and 1 have drifted apart" in errors(answer)[0] and errors(answer)[1] == ""


def test_a_pytorch_without_what_is_needed_is_refused(monkeypatch, tmp_path):
    monkeypatch.delattr(FSDPModule, "set_reshard_after_forward")
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    asked = ["--data=x.zip", f"--outdir={tmp_path}", "--batch=2", "--device=cpu", "--shard=1"]
    result = CliRunner().invoke(train.main, asked)
    assert result.exit_code == 1 and result.output.startswith("Error: --shard=1: PyTorch"), result.output


def test_a_state_of_another_network_is_refused(run, folder, tmp_path):
    run(tmp_path / "a", "tiny", "--augment=0", steps=1)
    path = checkpoint.latest_state(tmp_path / "a")
    kept = checkpoint.load_state(path)
    kept["objective"]["net"]["net"]["layers.0.weight"] = torch.zeros(2, 7)
    checkpoint.save_state(path, kept)
    answer = run(tmp_path / "a", "tiny", "--augment=0", "--shard=1", f"--resume={path}", codes=1)
    assert "the training state does not fit this run (layers.0.weight is [2, 7], expected [2, 64])" in errors(answer)[0]
