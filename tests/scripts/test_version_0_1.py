"""What version 0.1 (commit ffae26e) wrote: its snapshots sample, its runs resume, bit for bit on the same machine.

`fixtures/v0.1.zip` holds tiny runs of every method after five steps, the images and logits of their snapshots, and the
weights after ten steps. `made.json` says on which processor and with which PyTorch they were made.
"""

import json
import platform
import shutil
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import generate
import train
import train_classifier
import train_discriminator
import train_noise
import train_rduot
from tests.support.generated import read
from tests.support.paths import FIXTURES
from tests.support.runs import final_weights
from torch_utils import persistence

SCRIPTS = {
    f"{module.__name__}.py": module
    for module in (train, train_classifier, train_noise, train_discriminator, train_rduot)
}
# Version 0.1 computed ln (T^T p) as a sum of exponentials in float32. Now it is a product in float64, which changes the
# last bit of some weights.
ROUNDED = ("classifier", "learned")
METHODS = ["dsm", "classifier", "learned", "tdsm", "discriminator", "rduot", "ddgan"]


def processor():
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """Folder with what version 0.1 left, what it made of that, and whether this machine computes alike."""
    folder = tmp_path_factory.mktemp("old")
    with zipfile.ZipFile(FIXTURES / "v0.1.zip") as archive:
        archive.extractall(folder)
    made = json.loads((folder / "made.json").read_text())
    return (
        folder,
        made,
        dict(np.load(folder / "expected.npz")),
        (made["torch"], made["cpu"])
        == (
            torch.__version__,
            processor(),
        ),
    )


def compare(found, expected, exact, tolerance):
    if exact:
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), atol=tolerance)


def run(module, *args):
    result = CliRunner().invoke(module.main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


@pytest.mark.parametrize("name", ["dsm", "tdsm", "rduot", "ddgan", "guided"])
def test_snapshots_sample_as_before(old, name, tmp_path):
    folder, _, expected, exact = old
    options = [f"--network={folder}/runs/{name}"]
    if name == "guided":
        options = [f"--network={folder}/runs/dsm", f"--discriminator={folder}/runs/discriminator"]
        options.append("--dg_mode=calibrated")
    if name not in ("rduot", "ddgan"):
        options.append("--steps=4")
    run(generate, *options, "--seeds=0-3", f"--outdir={tmp_path}/out")
    images, labels = read(tmp_path / "out")
    # Version 0.1 did not guide classes that have wrong labels only: their weight was not a number. Classes 0 and 5 have
    # right labels, too.
    same = np.isin(labels, [0, 5]) if name == "guided" else slice(None)
    assert len(images[same])
    compare(images.transpose(0, 2, 3, 1)[same], expected[f"images.{name}"][same], exact, 1)


@pytest.mark.parametrize("name", ["classifier", "learned", "detector", "discriminator"])
def test_classifiers_and_discriminators_answer_as_before(old, name):
    folder, _, expected, exact = old
    path = folder / ("labels-classifier.pkl" if name == "detector" else f"runs/{name}")
    net = persistence.load_snapshot(persistence.find_snapshot(path))["ema"]
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = [torch.eye(10)[:2]] if name == "discriminator" else []
    logits = net(x, torch.tensor([0.5, 2.0]), *labels)
    compare(logits.numpy(), expected[f"logits.{name}"], exact, 1e-6)


def test_classifier_without_a_temperature_keeps_its_logits(old, tmp_path, monkeypatch):
    folder, made, _, _ = old
    monkeypatch.chdir(folder)
    script, *args = made["commands"]["tdsm"]
    args = [arg for arg in args if arg != "--temp=0.5"]
    output = run(SCRIPTS[script], *args, f"--outdir={tmp_path}/new", "--duration=0.00001")
    assert "The classifier's snapshot records no temperature; its logits stay as they are.\n" in output


@pytest.mark.parametrize("name", METHODS)
def test_runs_resume_as_before(old, name, tmp_path, monkeypatch):
    folder, made, expected, exact = old
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    script, *args = made["commands"][name]
    output = run(SCRIPTS[script], *args, f"--resume=runs/{name}")
    assert "Resuming at 0.0 kimg" in output
    state = final_weights(tmp_path / "runs" / name)
    assert state["nimg"] == 80
    for part, trained in state["objective"].items():
        weights = torch.cat([value.flatten().float() for value in trained["ema"].values()])
        compare(weights.numpy(), expected[f"{name}.{part}"], exact and name not in ROUNDED, 1e-6 if exact else 1e-3)
