"""Classification accuracy score: what it trains on, what it tests on, and that only the seed is random."""

import sys

import numpy as np
import pytest
import torch

import dnnlib
from archives.dataset import ImageDataset
from metrics.cas import classification_accuracy_score
from metrics.images import NpzImages
from tests.support.synth import make_archive

pytestmark = pytest.mark.slow

CLASSES = 3


def bands(n, seed, channels=1):
    """Return images [n,8,8,channels] uint8 with a band of light in one of three places, and the places."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % CLASSES)
    images = rng.integers(0, 60, [n, 8, 8, channels])
    for image, label in zip(images, labels, strict=True):
        image[2 + 2 * label : 4 + 2 * label] += 180
    return images.astype(np.uint8), labels


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("cas")
    made, asked = bands(96, seed=0)
    real, clean = bands(30, seed=1)
    np.savez(root / "made.npz", made, asked)
    np.savez(root / "wrong.npz", made, (asked + 1) % CLASSES)
    np.savez(root / "unlabeled.npz", made)
    np.savez(root / "rgb.npz", *bands(12, seed=2, channels=3))
    np.savez(root / "tiny.npz", made[:, :4, :4], asked)
    make_archive(root / "made.zip", made, asked.tolist())
    make_archive(
        root / "real.zip", real, [0] * 30, clean_labels=[[f"00000/img{i:08d}.png", int(c)] for i, c in enumerate(clean)]
    )
    names = [f"00000/img{i:08d}.png" for i in range(30)]
    foreign = np.where(np.arange(30)[:, None, None, None] < 15, 255 - real, real)  # dark bands
    make_archive(root / "mixed.zip", foreign, ((clean + (np.arange(30) < 15)) % CLASSES).tolist(), outliers=names[:15])
    make_archive(root / "foreign.zip", foreign, clean.tolist(), outliers=names)
    found = {name: NpzImages(str(root / f"{name}.npz")) for name in ("made", "wrong", "unlabeled", "rgb", "tiny")}
    return (
        found
        | {name: ImageDataset(str(root / f"{name}.zip")) for name in ("real", "mixed", "foreign")}
        | {"zip": ImageDataset(str(root / "made.zip"))}
    )


def score(files, made, test="real", arch="small", **kwargs):
    return classification_accuracy_score(files[made], files[test], arch, "cpu", **{"epochs": 20} | kwargs)


def test_trained_on_requested_labels_tested_on_clean_ones(files):
    right = score(files, "made")
    assert right["accuracy"] > 0.9 and right["accuracy_on_generated"] > 0.9
    assert (right["num_generated"], right["num_test"], right["arch"]) == (96, 30, "small")
    wrong = score(files, "wrong")
    assert wrong["accuracy"] < 0.1 and wrong["accuracy_on_generated"] > 0.9


def test_the_seed_decides_and_nothing_else(files):
    state = torch.random.get_rng_state()
    first = score(files, "made", epochs=2, seed=4)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert score(files, "zip", epochs=2, seed=4) == first
    assert len({score(files, "made", epochs=2, seed=s)["accuracy_on_generated"] for s in range(3)}) > 1


def test_outliers_of_the_test_set_do_not_count(files):
    found = score(files, "made", "mixed")
    assert found["accuracy"] > 0.9 and found["num_test"] == 15


@pytest.mark.parametrize("epochs", [1, 9, 10, 11])
def test_trainings_of_a_few_steps(files, epochs):
    assert 0 <= score(files, "made", epochs=epochs)["accuracy"] <= 1  # 96 images are one step


def test_resnet18_is_ours(files):
    assert score(files, "made", arch="resnet18", epochs=1)["arch"] == "resnet18"


@pytest.mark.parametrize("made, test", [("made", "real"), ("rgb", "rgb")])
def test_resnet50_is_torchvisions(files, made, test):
    pytest.importorskip(
        "torchvision", reason="the optional package torchvision is not installed", exc_type=(ImportError, RuntimeError)
    )
    assert 0 <= score(files, made, test, "resnet50", epochs=1)["accuracy"] <= 1


@pytest.mark.parametrize(
    "made, test, arch, words",
    [
        ("made", "unlabeled", "small", ["unlabeled.npz has no labels"]),
        ("unlabeled", "made", "small", ["unlabeled.npz has no labels"]),
        ("rgb", "real", "small", ["8x8 gray", "8x8 RGB"]),
        ("tiny", "tiny", "resnet18", ["resnet18", "4 pixels", "choose small"]),
        ("made", "foreign", "small", ["foreign.zip", "all its images as outliers"]),
        ("made", "real", "resnet50", ["resnet50", "pip install torchvision", "small"]),
    ],
)
def test_sets_that_do_not_fit_are_refused(files, monkeypatch, made, test, arch, words):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(dnnlib.UserError) as e:
        score(files, made, test, arch)
    assert "--" not in e.value.message.split("; dataset_tool.py ")[0]  # what to do may be a command
    assert all(word in e.value.message for word in words), e.value.message
