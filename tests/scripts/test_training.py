"""The training scripts through their command lines, on digits: run directories, resume, kills, bad input."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import click
import numpy as np
import pytest
from click.testing import CliRunner

import dataset_tool
import train
import train_classifier
import train_noise
from tests.support.paths import ROOT
from tests.support.runs import TINY, assert_same, final_weights
from torch_utils import persistence

SCRIPTS = dict(train=train, train_classifier=train_classifier, train_noise=train_noise)


def invoke(script, *args):
    return CliRunner().invoke(SCRIPTS[script].main, [str(a) for a in args])


def succeed(script, *args):
    result = invoke(script, *args)
    assert result.exit_code == 0, result.output + str(result.exception)
    return result


def fail(exit_code, match, script, *args):
    result = invoke(script, *args)
    assert result.exit_code == exit_code, result.output + repr(result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ") and re.search(match, lines[0]), lines


def states(run_dir):
    return sorted(p.name for p in pathlib.Path(run_dir).glob("training-state-*.pt"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """160 digits, 40% of the labels wrong."""
    path = tmp_path_factory.mktemp("data") / "digits.zip"
    args = ["--source=digits", f"--dest={path}", "--max-images=160", "--noise_type=sym", "--noise_rate=0.4", "--seed=0"]
    result = CliRunner().invoke(dataset_tool.main, args)
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The run directory of an uninterrupted baseline run of 480 images."""
    outdir = tmp_path_factory.mktemp("trained")
    succeed("train", f"--outdir={outdir}", f"--data={data}", "--cond=1", "--duration=0.00048", *TINY)
    return outdir / "00000-digits-cond-ddpmpp_tiny-edm-gpus1-batch32-fp32"


@pytest.fixture(scope="module")
def classifier(data, tmp_path_factory):
    """The run directory of a classifier trained with the known noise."""
    outdir = tmp_path_factory.mktemp("classifier")
    succeed(
        "train_classifier",
        f"--outdir={outdir}",
        f"--data={data}",
        "--duration=0.0003",
        "--noise_type=sym",
        "--noise_rate=0.4",
        *TINY,
    )
    return next(outdir.iterdir())


def test_run_directory(trained):
    names = {p.name for p in trained.iterdir()}
    assert {
        "training_options.json",
        "log.txt",
        "stats.jsonl",
        "network-snapshot-000000.pkl",
        "samples-000000.png",
    } <= names
    assert not [n for n in names if n.endswith(".tmp")]
    options = json.loads((trained / "training_options.json").read_text())
    assert options["batch_size"] == 32 and options["seed"] == 3 and options["network"]["kwargs"]["model_channels"] == 8
    rows = [json.loads(line) for line in (trained / "stats.jsonl").read_text().splitlines()]
    assert [r["Progress/kimg"]["mean"] for r in rows] == [0.032, 0.096, 0.192, 0.288, 0.384, 0.48]
    assert all(set(r["Loss/loss"]) == {"num", "mean", "std"} and "timestamp" in r for r in rows)
    log = (trained / "log.txt").read_text()
    assert "Training options" in log and "tick 5" in log and "left" in log
    snapshot = persistence.load_snapshot(str(trained / "network-snapshot-000000.pkl"), kind="denoiser")
    assert snapshot["info"]["method"] == "dsm" and snapshot["info"]["nimg"] == 480 and snapshot["ema"].label_dim == 10
    assert snapshot["info"]["class_names"] == [str(i) for i in range(10)]
    assert len(states(trained)) == 1  # All within one kimg: the newer replaces the older.


def test_classifier_keeps_the_best(classifier):
    snapshots = list(classifier.glob("network-snapshot-*.pkl"))
    assert len(snapshots) == 1
    info = persistence.load_snapshot(str(snapshots[0]), kind="classifier")["info"]
    assert info["posterior"] == "clean" and np.shape(info["transition"]) == (10, 10)
    losses = [float(x) for x in re.findall(r"Validation loss ([\d.]+)", (classifier / "log.txt").read_text())]
    assert info["validation_loss"] == pytest.approx(min(losses), abs=1e-4)


def test_tdsm_with_clean_and_noisy_posterior(data, classifier, tmp_path):
    args = [f"--outdir={tmp_path}", f"--data={data}", "--duration=0.0001", *TINY]
    succeed(
        "train_noise",
        *args,
        f"--cls={classifier}/network-snapshot-*.pkl",
        "--noise_type=sym",
        "--noise_rate=0.4",
        "--tau=0.02",
        "--pairs=1",
        "--temp=1.5",
    )
    run_dir = next(tmp_path.iterdir())
    row = json.loads((run_dir / "stats.jsonl").read_text().splitlines()[-1])
    assert 0 < row["TDSM/observed_weight"]["mean"] < 1 and 1 >= row["TDSM/pairs_per_image"]["mean"] > 0
    assert row["TDSM/cut_weight"]["mean"] > 0.01
    assert 0 <= row["TDSM/corrected"]["mean"] <= 1
    info = persistence.load_snapshot(persistence.find_snapshot(str(run_dir)))["info"]
    assert info["method"] == "tdsm" and info["options"]["tdsm"]["pairs"] == 1
    assert info["transition"][0][0] == pytest.approx(0.6)

    for noise in ([], ["--noise_type=learn"]):
        out = tmp_path / f"cls{len(noise)}"
        told = succeed("train_classifier", f"--outdir={out}", f"--data={data}", "--duration=0.0002", *noise, *TINY)
        assert re.search(
            r"\nTemperature: [\d.]+ at sigma .* held-out loss [\d.]+ without it, [\d.]+ with it\n", told.output
        )
    for origin in ("estimated", "learned"):
        assert re.search(rf"\nLabel noise, {origin}: [\d.]+% .*\(in truth [\d.]+%; T differs", told.output)
    fail(1, "--noise_type.*sym.*0.4", "train_noise", *args, f"--cls={tmp_path}/cls0/00000*/network*.pkl")
    told = succeed(
        "train_noise",
        *args,
        f"--cls={tmp_path}/cls0/00000*/network*.pkl",
        "--noise_type=sym",
        "--noise_rate=0.4",
        "--precond=vp",
        "--resume_sub",
        persistence.find_snapshot(str(run_dir)),
    )
    assert re.search(r"\nThe classifier's temperature: [\d.]+ at sigma", told.output)
    succeed(
        "train_noise",
        *args,
        f"--cls={tmp_path}/cls1/00000*/network*.pkl",
        "--precond=ve",
        "--augment=0.2",
        "--batch-gpu=8",
        "--precision=bf16",
    )


def test_dry_run_and_published_spellings(data, tmp_path):
    result = succeed(
        "train",
        "--outdir",
        tmp_path / "out",
        "--data",
        data,
        "--cond",
        "1",
        "--batch_gpu=16",
        "--label_dropout=0.1",
        "--lr-rampup-kimg=5",
        "--cres=1,2",
        "--fp16=0",
        "--ls=2",
        "--bench=0",
        "--cache=0",
        "--workers=2",
        "-n",
    )
    options = json.loads(re.search(r"Training options:\n(\{.*?\n\})", result.output, re.S).group(1))
    assert options["precision"] == "fp32" and options["network"]["kwargs"]["channel_mult"] == [1, 2]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["train", "train_classifier", "train_noise"])
def test_resume_is_bit_exact(script, data, classifier, tmp_path):
    """Half a run, then the rest, equals the whole run; resumed from a run directory, `latest`, and a state file."""
    extra = dict(
        train=["--cond=1", "--dropout=0.2", "--augment=0.3"],
        train_noise=[f"--cls={classifier}"],
        train_classifier=["--noise_type=clean"],  # a learned T has a schedule in fractions of the run
    )[script]
    args = [f"--data={data}", *TINY, *extra]
    succeed(script, *args, f"--outdir={tmp_path}/whole", "--duration=0.0004")
    whole = final_weights(next((tmp_path / "whole").iterdir()))
    succeed(script, *args, f"--outdir={tmp_path}/half", "--duration=0.0002")
    half = next((tmp_path / "half").iterdir())
    state = half / states(half)[-1]
    if script == "train":
        succeed(script, *args, f"--outdir={tmp_path}/other", "--duration=0.0004", f"--resume={state}")
        assert_same(final_weights(next((tmp_path / "other").iterdir()))["objective"], whole["objective"])
    resume = half if script == "train" else "latest"
    succeed(script, *args, f"--outdir={tmp_path}/half", "--duration=0.0004", f"--resume={resume}")
    assert_same(final_weights(half)["objective"], whole["objective"])
    assert len(list((tmp_path / "half").iterdir())) == 1  # continued in place


def test_the_best_snapshot_comes_along(data, classifier, tmp_path):
    """Into another folder, and out of it again what an interruption left there: no state knows it."""
    args = [f"--data={data}", "--duration=0.0003", "--noise_type=sym", "--noise_rate=0.4", *TINY]
    state = classifier / states(classifier)[-1]
    succeed("train_classifier", *args, f"--outdir={tmp_path}/a", "--nosubdir", f"--resume={state}")
    (snapshot,) = (tmp_path / "a").glob("network-snapshot-*")
    assert snapshot.read_bytes() == (classifier / snapshot.name).read_bytes()
    later = snapshot.with_name("network-snapshot-000001.pkl")
    later.write_bytes(snapshot.read_bytes())
    shutil.copy(state, tmp_path / "a")
    succeed("train_classifier", *args, f"--outdir={tmp_path}/a", "--nosubdir", f"--resume={tmp_path}/a")
    assert snapshot.exists() and not later.exists()
    moved = pathlib.Path(shutil.copy(state, tmp_path))
    lost = succeed("train_classifier", *args, f"--outdir={tmp_path}/b", f"--resume={moved}")
    assert f"{tmp_path}/{snapshot.name} is gone" in lost.output


def test_a_run_does_not_take_over_the_folder_of_another(data, trained, classifier, tmp_path):
    args = ["train", f"--data={data}", "--cond=1", "--duration=0.00048", "--nosubdir", *TINY]
    state, before = trained / states(trained)[-1], (classifier / "training_options.json").read_bytes()
    fail(1, "already holds a run", *args, f"--outdir={classifier}", f"--resume={state}")
    assert (classifier / "training_options.json").read_bytes() == before
    (tmp_path / "link").symlink_to(trained)
    succeed(*args, f"--outdir={tmp_path}/link", f"--resume={state}")  # its own


# A run in a process of its own that kills itself at the n-th rename of a state (before it: in the middle of a save) or
# at the n-th step, in the way that a power cut does.
KILLER = """
import os, signal, sys
sys.path.insert(0, {root!r})
what, count, script = sys.argv[1], int(sys.argv[2]), sys.argv[3]
sys.argv = [script] + sys.argv[4:]
def killing(function, matters=lambda *a: True, number=signal.SIGKILL):
    seen = []
    def wrapped(*args, **kwargs):
        if matters(*args):
            seen.append(1)
            if len(seen) == count and os.environ.get('RANK', '0') == '0':
                os.kill(os.getpid(), number)
        return function(*args, **kwargs)
    return wrapped
if what in ('save', 'fsync'):
    name = 'replace' if what == 'save' else 'fsync'
    setattr(os, name, killing(getattr(os, name), lambda *a: what == 'fsync' or 'training-state' in str(a[-1])))
if what in ('step', 'term', 'int'):
    from training.objective import Objective
    number = dict(step=signal.SIGKILL, term=signal.SIGTERM, int=signal.SIGINT)[what]
    Objective.step = killing(Objective.step, number=number)
import importlib
from tests.support.quick import quicken
quicken()
importlib.import_module(script).main()
"""


def run_killed(tmp_path, what, count, *args, processes=1):
    killer = tmp_path / "killer.py"
    killer.write_text(KILLER.format(root=str(ROOT)))
    launch = (
        [sys.executable]
        if processes == 1
        else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    )
    return subprocess.run(
        [*launch, str(killer), what, str(count), *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


# tests/hostile/test_faults.py dies at every operation of a save; here the scripts themselves do, at a few places.
@pytest.mark.parametrize(
    ("what", "count"),
    [
        ("step", 9),
        pytest.param("save", 3, marks=pytest.mark.long),
        pytest.param("fsync", 15, marks=pytest.mark.long),
    ],
)
def test_killed_run_resumes_bit_exactly(what, count, data, trained, tmp_path):
    args = [
        "train",
        f"--outdir={tmp_path}/runs",
        f"--data={data}",
        "--cond=1",
        "--duration=0.00048",
        *TINY,
        "--resume=latest",
    ]
    killed = run_killed(tmp_path, what, count, *args)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "runs" / trained.name / "network-snapshot-000480.pkl").exists()
    succeed(*args)
    run_dir = tmp_path / "runs" / trained.name
    assert "Resuming at" in (run_dir / "log.txt").read_text()
    assert_same(final_weights(run_dir)["objective"], final_weights(trained)["objective"])
    assert not list(run_dir.glob("*.tmp*"))


# Between saves, and in the middle of the second one. tests/training/test_sharding.py has it without the launcher.
@pytest.mark.long
@pytest.mark.parametrize(("what", "count"), [("step", 7), ("save", 2)])
def test_two_processes_killed_and_resumed(what, count, data, tmp_path):
    args = ["train", f"--data={data}", "--cond=1", "--duration=0.0003", *TINY]
    whole = run_killed(tmp_path, "none", 0, *args, f"--outdir={tmp_path}/whole", processes=2)
    assert whole.returncode == 0, whole.stderr
    expected = next((tmp_path / "whole").iterdir())
    assert "gpus2" in expected.name
    outdir = tmp_path / what
    killed = run_killed(tmp_path, what, count, *args, f"--outdir={outdir}", processes=2)
    assert killed.returncode != 0 and states(outdir / expected.name)
    again = run_killed(tmp_path, "none", 0, *args, f"--outdir={outdir}", "--resume=latest", processes=2)
    assert again.returncode == 0 and "Resuming at" in again.stdout, again.stderr
    assert_same(final_weights(outdir / expected.name)["objective"], final_weights(expected)["objective"])


@pytest.mark.parametrize(("what", "code"), [("term", 143), pytest.param("int", 130, marks=pytest.mark.long)])
def test_signals_save_and_say_how_to_resume(what, code, data, trained, tmp_path):
    args = ["train", f"--outdir={tmp_path}/runs", f"--data={data}", "--cond=1", "--duration=0.00048", *TINY]
    stopped = run_killed(tmp_path, what, 5, *args)
    assert stopped.returncode == code and "Traceback" not in stopped.stderr, stopped.stderr
    run_dir = tmp_path / "runs" / trained.name
    assert f"--resume={run_dir}" in stopped.stdout
    succeed(*args, f"--resume={run_dir}")
    assert_same(final_weights(run_dir)["objective"], final_weights(trained)["objective"])


def test_batch_must_be_divisible_by_the_processes(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    fail(2, "--batch=32.*divisible.*3", "train", f"--outdir={tmp_path}/out", f"--data={data}", "--batch=32")


def test_bad_options(data, trained, classifier, tmp_path):
    out = f"--outdir={tmp_path}/out"
    good = [out, f"--data={data}"]
    fail(2, "--data", "train", out)
    fail(1, "no-such.zip", "train", out, "--data=no-such.zip")
    fail(2, "--batch.*'x'", "train", *good, "--batch=x")
    fail(2, "--dropout.*1.5", "train", *good, "--dropout=1.5")
    fail(2, "--lr.*nan", "train", *good, "--lr=nan")
    fail(2, "--arch.*nosuch", "train", *good, "--arch=nosuch")
    fail(1, "--cres", "train", *good, "--cond=1", "--cres=1,1,1,1,1")
    fail(1, "--cres.*5 levels", "train_classifier", *good, "--cres=1,1,1,1,1")
    fail(2, "--P_mean", "train", *good, "--precond=vp", "--P_mean=-1")
    fail(2, "--label-dropout.*needs --cond=1", "train", *good, "--label-dropout=0.1")
    fail(2, "--cond=0.*needs --cond=1", "train", *good, "--method=cep")
    fail(2, "--no-such-option", "train", *good, "--no-such-option=1")
    fail(2, "--fp16.*--precision", "train", *good, "--fp16=1", "--precision=bf16")
    fail(2, "--cond", "train_classifier", *good, "--cond=0")
    fail(2, "--noise_rate", "train_classifier", *good, "--noise_type=sym")
    fail(2, "--noise.rate.*1.4", "train_classifier", *good, "--noise_type=sym", "--noise_rate=1.4")
    fail(2, "--noise_matrix", "train_classifier", *good, "--noise_type=matrix")
    fail(1, "x.npy", "train_classifier", *good, "--noise_type=matrix", f"--noise_matrix={tmp_path}/x.npy")
    np.save(tmp_path / "bad.npy", np.eye(3))
    fail(1, "3.*10", "train_classifier", *good, "--noise_type=matrix", f"--noise_matrix={tmp_path}/bad.npy")
    fail(2, "--cls", "train_noise", *good)
    fail(1, "no-such", "train_noise", *good, "--cls=no-such/network-snapshot-*.pkl")
    snapshot = persistence.find_snapshot(str(trained))
    fail(1, "classifier", "train_noise", *good, f"--cls={snapshot}")  # a denoiser is no classifier
    fail(2, "--label-path goes with", "train_classifier", *good, "--noise_type=pair", f"--label-path={tmp_path}/x.npz")
    fail(1, "--label-path.*x.npz", "train_classifier", *good, "--noise_type=auto", f"--label-path={tmp_path}/x.npz")
    for temp in ("0", "-1", "nan", "warm"):
        fail(2, f"--temp.*{temp}", "train_noise", *good, f"--cls={classifier}", f"--temp={temp}")
    fail(1, "0.8.*0.6", "train_noise", *good, f"--cls={classifier}", "--noise_type=sym", "--noise_rate=0.2")
    fail(1, "not-a-snapshot", "train", *good, f"--transfer={_file(tmp_path / 'not-a-snapshot.pkl')}")
    fail(1, "garbage.pt", "train", *good, f"--resume={_file(tmp_path / 'garbage.pt')}")
    fail(1, "nowhere", "train", *good, f"--resume={tmp_path}/nowhere")
    fail(1, "empty", "train", *good, f"--resume={_dir(tmp_path / 'empty')}")
    fail(1, "batch_size.*32.*16", "train", *good, "--cond=1", *TINY, "--batch=16", f"--resume={trained}")
    fail(1, "already holds a run", "train", f"--data={data}", f"--outdir={trained}", "--nosubdir", *TINY)
    assert not (tmp_path / "out").exists()


def test_unlabeled_data(tmp_path):
    result = CliRunner().invoke(dataset_tool.main, ["--source=digits", f"--dest={tmp_path}/all.zip", "--max-images=40"])
    assert result.exit_code == 0, result.output
    import zipfile

    with zipfile.ZipFile(tmp_path / "all.zip") as a, zipfile.ZipFile(tmp_path / "none.zip", "w") as b:
        for name in a.namelist():
            b.writestr(name, a.read(name) if name != "dataset.json" else '{"labels": null}')
    fail(1, "--cond=1", "train", f"--outdir={tmp_path}/out", f"--data={tmp_path}/none.zip", "--cond=1", *TINY)
    succeed(
        "train", f"--outdir={tmp_path}/out", f"--data={tmp_path}/none.zip", "--duration=0.00006", "--xflip=1", *TINY
    )
    run_dir = next((tmp_path / "out").iterdir())
    assert "uncond" in run_dir.name
    assert persistence.load_snapshot(persistence.find_snapshot(str(run_dir)))["ema"].label_dim == 0
    fail(
        1,
        "resolution|label|classes|channels",
        "train_noise",
        f"--outdir={tmp_path}/o",
        f"--data={tmp_path}/all.zip",
        *TINY,
        f"--cls={_classifier_snapshot(tmp_path, img_resolution=16)}",
    )
    fail(
        1,
        "3.*10",
        "train_noise",
        f"--outdir={tmp_path}/o",
        f"--data={tmp_path}/all.zip",
        *TINY,
        f"--cls={_classifier_snapshot(tmp_path, label_dim=3)}",
    )


def _classifier_snapshot(tmp_path, **changes):
    from training.networks_resnet import Classifier

    kwargs = (
        dict(img_resolution=8, img_channels=1, label_dim=10, depth="small", model_channels=8, channel_mult=[1])
        | changes
    )
    path = str(tmp_path / "classifier.pkl")
    persistence.save_snapshot(path, dict(ema=Classifier(**kwargs).eval().requires_grad_(False), info={}))
    return path


def _file(path):
    path.write_bytes(b"not what it says")
    return path


def _dir(path):
    path.mkdir()
    return path


def test_no_option_is_declared_twice():
    for script in SCRIPTS.values():
        names = [o for p in script.main.params if isinstance(p, click.Option) for o in p.opts]
        assert len(names) == len(set(names))
