"""The commands of docs/data.md for published data sets, on small samples of them."""

import pickle
import re
import tarfile

import numpy as np
import pytest
import torch

from archives.dataset import ImageDataset
from tests.support import published, synth
from tests.support.paths import ROOT
from tests.support.synth import run_dataset_tool

TEN = np.arange(10)


def documented():
    """Return {name of the archive: options} of the commands whose source was downloaded."""
    text = (ROOT / "docs/data.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^ +python dataset_tool\.py (--source=downloads/.*)$", text, re.MULTILINE)
    return {re.search(r"--dest=datasets/(\S+)\.zip", command)[1]: command.split() for command in commands}


def make_downloads(folder):
    """Write the samples where the commands look for them."""
    synth.make_cifar10(folder / "cifar10/cifar-10-python.tar.gz", per_batch=2)
    synth.make_cifar10(folder / "cifar-10-python.tar.gz", per_batch=2)
    human = {key: (TEN + shift) % 10 for key, shift in (("clean_label", 0), ("worse_label", 1), ("aggre_label", 2))}
    torch.save(human, folder / "CIFAR-10_human.pt")
    synth.make_mnist(folder / "mnist", 10)
    published.make_idx(folder / "FashionMNIST/raw", 10, dot=False)
    unpack_cifar100(folder)
    published.make_stl10(folder / "stl10_binary", 4)
    published.make_celeba(folder / "celeba")
    published.make_clothing1m(folder / "clothing1m")
    published.make_webvision(folder / "webvision")
    published.make_food101n(folder / "Food-101N_release")
    published.make_animal10n(folder / "ANIMAL-10N")
    sbdc = {"data": synth.pictures(4, 32), "labels": [0, 1, 1, 0], "flags": [1, 0, 1, 1]}
    (folder / "cifar10_sym_40.pk").write_bytes(pickle.dumps(sbdc))


def unpack_cifar100(folder):
    with tarfile.open(synth.make_cifar100(folder / "c.tar.gz", 120)[0]) as tar:
        tar.extractall(folder, filter="data")
    (folder / "c.tar.gz").unlink()


# Archive -> labels, clean labels.
EXPECTED = {
    "cifar10-32x32": (TEN, None),
    "cifar10-test": ([0, 1], None),
    "mnist-32x32": (TEN, None),
    "fashion-32x32": (TEN, None),
    "cifar100-32x32": (np.arange(120) % 100, None),
    "cifar10n-32x32": ((TEN + 1) % 10, TEN),
    "stl10-64x64": (None, None),
    "celeba-male-64x64": ([1, 0, 1, 0], None),
    "clothing1m-both-64x64": ([4, 3], [3, 2]),
    "webvision-mini-64x64": ([3], None),
    "food101n-verified-64x64": ([2, 1], None),
    "animal10n-64x64": ([0, 0, 3], None),
    "sbdc-32x32": ([0, 1, 1, 0], None),
}


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    for name in ("downloads/cifar10", "downloads/cifar-100-python", "datasets"):
        (folder / name).mkdir(parents=True)
    make_downloads(folder / "downloads")
    return folder


@pytest.mark.parametrize("name", EXPECTED)
def test_the_documented_command(name, downloads, monkeypatch):
    monkeypatch.chdir(downloads)
    code, _, err = run_dataset_tool(*documented()[name])
    assert code == 0, err
    data = ImageDataset(f"datasets/{name}.zip")
    size = re.search(r"(\d+)x\1", name)
    assert size is None or data.resolution == int(size[1])
    labels, clean = EXPECTED[name]
    assert labels is None or data.labels.tolist() == list(labels)
    assert data.clean_labels is None if clean is None else data.clean_labels.tolist() == list(clean)


def test_every_documented_set_has_a_sample():
    assert documented().keys() - {"bedroom-256x256"} == EXPECTED.keys()  # LSUN needs the package lmdb


def test_cifar100n(downloads, tmp_path):
    """The file for CIFAR-100 has one kind of labels beside CIFAR's own."""
    fine = np.arange(120) % 100
    torch.save(dict(clean_label=fine, noisy_label=(fine + 7) % 100), tmp_path / "CIFAR-100_human.pt")
    args = [f"--source={downloads}/downloads/cifar-100-python", f"--dest={tmp_path}/a.zip"]
    args += [f"--labels={tmp_path}/CIFAR-100_human.pt", "--label_key=noisy_label"]
    assert run_dataset_tool(*args)[0] == 0
    data = ImageDataset(f"{tmp_path}/a.zip")
    assert data.labels.tolist() == ((fine + 7) % 100).tolist() and data.clean_labels.tolist() == fine.tolist()
    assert data.class_names[3] == "fine3"
