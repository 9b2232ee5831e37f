"""Bad input to dataset_tool.py: one line that names the option, the right exit code, nothing left behind."""

import gzip
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from tests.support import synth
from tests.support.synth import run_dataset_tool as run

RGB, ALPHA = synth.pictures(4), synth.pictures(1, channels=4)
PNG = synth.png(RGB[0])


def files(**contents):
    return {name.replace("__", "/").replace("_", "."): data for name, data in contents.items()}


def tree(*images):
    return {f"in/{i}.png": image for i, image in enumerate(images)}


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return {"in.zip": buffer.getvalue()}


def labeled(labels):
    return zipped({"a.png": PNG, "b.png": PNG, "dataset.json": json.dumps({"labels": labels}).encode()})


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


class Hostile:
    def __reduce__(self):
        return os.system, ("touch HOSTILE",)


def torch_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def mnist_files(change):
    def make(folder):
        synth.make_mnist(folder / "mnist", n=6)
        change(folder / "mnist")

    return make


def cifar_files(cut=None, **members):
    def make(folder):
        if members:
            synth._tar(folder / "c.tar.gz", members)
        else:
            path, _, _ = synth.make_cifar10(folder / "c.tar.gz")
            path.write_bytes(path.read_bytes()[:cut])

    return make


def cut_file(name, n=-20):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:n])


NOISE = ["--noise_type=sym", "--noise_rate=0.4"]
PAIR = [["a.png", 0], ["b.png", 1]]
DIGITS = "--source=digits"
ZIP, TREE, CIFAR, MNIST = "--source={d}/in.zip", "--source={d}/in", "--source={d}/c.tar.gz", "--source={d}/mnist"
BAD = {
    # usage: exit code 2
    "no source": ({}, [], 2, "--source"),
    "unknown option": ({}, [DIGITS, "--outlier=x"], 2, "--outlier"),
    "rate": ({}, [DIGITS, "--noise_type=sym", "--noise_rate=1.5"], 2, "1.5"),
    "rate without type": ({}, [DIGITS, "--noise_rate=0.5"], 2, "--noise_rate needs --noise_type"),
    "type without rate": ({}, [DIGITS, "--noise_type=pair"], 2, "--noise_type=pair needs --noise_rate"),
    "type": ({}, [DIGITS, "--noise_type=odd", "--noise_rate=0.5"], 2, "'odd'"),
    "matrix without file": ({}, [DIGITS, "--noise_type=matrix"], 2, "--noise_matrix"),
    "matrix with rate": ({}, [DIGITS, "--noise_type=matrix", "--noise_matrix=x", "--noise_rate=0"], 2, "leave it out"),
    "matrix file alone": ({}, [DIGITS, "--noise_matrix=x.npy", *NOISE], 2, "--noise_matrix needs"),
    "resolution form": ({}, [DIGITS, "--resolution=64"], 2, "'64' is not of the form WxH"),
    "resolution square": ({}, [DIGITS, "--resolution=64x32"], 2, "64x32: must be square"),
    "resolution power": ({}, [DIGITS, "--resolution=48x48"], 2, "48 must be a power of two"),
    "resolution tall": ({}, [DIGITS, "--transform=center-crop-wide", "--resolution=16x32"], 2, "must not exceed"),
    "transform alone": ({}, [DIGITS, "--transform=center-crop"], 2, "needs --resolution"),
    "label key alone": ({}, [DIGITS, "--label_key=a"], 1, "--source --label_key=a: digits: has no kind of labels 'a' "
                        "(it has at most one kind, so there is nothing to choose; for a column of a table, name the "),
    "part": ({}, [DIGITS, "--part=a"], 1, "--source --part=a: digits: has no part 'a'"),
    "max images": ({}, [DIGITS, "--max-images=0"], 2, "--max-images"),
    "workers": ({}, [DIGITS, "--workers=-1"], 2, "--workers"),
    # sources
    "missing": ({}, ["--source={d}/nothing"], 1, "--source: {d}/nothing: no such file"),
    "kind": (files(in_txt=b"hello"), ["--source={d}/in.txt"], 1, "--source: {d}/in.txt: not a folder, a ZIP"),
    "not a zip": (files(in_zip=b"hello"), [ZIP], 1, "in.zip: not a ZIP"),
    "empty zip": (zipped({}), [ZIP], 1, "in.zip: ZIP without images"),
    "empty folder": (files(in__a_txt=b""), [TREE], 1, "in: folder without images"),
    "truncated": (tree(PNG, PNG[:-30], PNG), [TREE], 1, "in: 1.png: truncated"),
    "truncated later": (tree(*[PNG] * 40, PNG[:90]), [TREE, "--workers=2"], 1, "in: 40.png: truncated"),
    "json": (zipped({"a.png": PNG, "dataset.json": b"{"}), [ZIP], 1, "dataset.json: not valid JSON"),
    "json labels": (zipped({"a.png": PNG, "dataset.json": b"{}"}), [ZIP], 1, 'lacks "labels"'),
    "json misses": (labeled(PAIR[:1]), [ZIP], 1, "none for 'b.png'"),
    "negative": (labeled([["a.png", 0], ["b.png", -1]]), [ZIP], 1, "label -1 is negative"),
    "not integer": (labeled([["a.png", 0.5], ["b.png", 1]]), [ZIP], 1, "label 0.5 is not an integer"),
    "ragged": (labeled([["a.png", [1]], ["b.png", [0, 1]]]), [ZIP], 1, "ragged"),
    "mixed sizes": (tree(PNG, PNG, synth.png(synth.pictures(1, 16)[0])), [TREE], 1, "2.png: is 16x16, images before"),
    "not square": (tree(synth.png(RGB[0][:4])), [TREE], 1, "0.png: is 8x4, images must be square"),
    "power of two": (tree(synth.png(synth.pictures(1, 12)[0])), [TREE], 1, "0.png: is 12x12, the side must be"),
    "alpha": (tree(PNG, synth.png(ALPHA[0])), [TREE], 1, "1.png: has transparent pixels"),
    "gray alpha": (tree(PNG, synth.png(ALPHA[0], "LA")), [TREE], 1, "1.png: has transparent pixels"),
    "rgb among gray": (tree(synth.png(RGB[0], "L"), PNG), [TREE], 1,
                      "1.png: is an RGB image, but {d}/in: 0.png is gray: convert all with dataset_tool.py --channels"),
    "all too small": (tree(PNG), [TREE, "--transform=center-crop-wide", "--resolution=16x8"], 1,
                      "none is left: choose a lower one with dataset_tool.py --resolution"),
    "bomb": (tree(PNG[:16] + (50000).to_bytes(4, "big") * 2 + PNG[24:]), [TREE], 1, "50000x50000 is more than"),
    "eval": ({}, [DIGITS, "--eval"], 1, "--eval: digits has no test part"),
    "tar cut": (cifar_files(cut=-2000), [CIFAR], 1, "c.tar.gz: damaged or incomplete"),
    "tar of others": (cifar_files(**{"a/b.png": PNG}), [CIFAR], 1, "c.tar.gz: holds no CIFAR-10 or CIFAR-100 training "
                      "batches (of the version for Python); if it holds images, unpack it, and name the folder"),
    "tar without test": (
        cifar_files(**{"data_batch_1": b""}), [CIFAR, "--eval"], 1, "c.tar.gz: holds no CIFAR-10 or CIFAR-100 test"),
    "batch garbage": (cifar_files(data_batch_1=b"garbage"), [CIFAR], 1, "data_batch_1"),
    "batch keys": (cifar_files(data_batch_1=pickle.dumps({"data": 3}, 2)), [CIFAR], 1, "data_batch_1: not a CIFAR"),
    "hostile batch": (cifar_files(data_batch_1=pickle.dumps(Hostile(), 2)), [CIFAR], 1, "data_batch_1"),
    "idx cut": (mnist_files(cut_file("train-images-idx3-ubyte.gz")), [MNIST], 1, "images-idx3-ubyte.gz: damaged"),
    "idx empty images": (mnist_files(lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(
        b"\0\0\x08\3" + (6).to_bytes(4, "big") + bytes(4) + (28).to_bytes(4, "big")))), [MNIST], 1, "holds no images"),
    "idx labels": (
        mnist_files(lambda f: (f / "train-labels-idx1-ubyte.gz").unlink()), [MNIST], 1, "train-labels-idx1-ubyte"),
    "idx counts": (
        mnist_files(lambda f: (f / "t10k-labels-idx1-ubyte.gz").rename(f / "train-labels-idx1-ubyte.gz")), [MNIST], 1,
        "6 images, but 2 labels"),
    "lmdb": (files(in__data_mdb=b"x" * 9000), [TREE], 1, "lmdb"),
    # noise
    "asym unknown": (labeled(PAIR), [ZIP, "--noise_type=asym", "--noise_rate=0.4"], 1,
                     "--noise_type=asym: noise type 'asym' is not defined"),
    "no labels": (tree(PNG), [TREE, *NOISE], 1, "--noise_type=sym: the source has no labels"),
    "vector labels": (labeled([["a.png", [0.5]], ["b.png", [1]]]), [ZIP, *NOISE], 1, "labels are vectors"),
    "one class": (labeled([["a.png", 0], ["b.png", 0]]), [ZIP, *NOISE], 1, "at least 2 classes"),
    "noisy already": (zipped({"a.png": PNG, "dataset.json": json.dumps({"labels": [["a.png", 1]], "clean_labels": [
        ["a.png", 0]]}).encode()}), [ZIP, *NOISE], 1, "noisy already"),
    "matrix size": (files(T_npy=npy(np.eye(9))), [DIGITS, "--noise_type=matrix", "--noise_matrix={d}/T.npy"], 1,
                    "--noise_type=matrix: {d}/T.npy: is 9x9, but there are 10"),
    "matrix shape": (files(T_npy=npy(np.ones([10, 9]))), [DIGITS, "--noise_type=matrix", "--noise_matrix={d}/T.npy"],
                     1, "T.npy: must be square"),
    "matrix rows": (files(T_npy=npy(np.ones([10, 10]))), [DIGITS, "--noise_type=matrix", "--noise_matrix={d}/T.npy"],
                    1, "T.npy: not row-stochastic, row 0 sums to 10"),
    "matrix missing": ({}, [DIGITS, "--noise_type=matrix", "--noise_matrix={d}/T.npy"], 1, "T.npy"),
    # --labels
    "labels missing": ({}, [DIGITS, "--labels={d}/l.npy"], 1, "--labels: {d}/l.npy"),
    "labels kind": (files(l_txt=b""), [DIGITS, "--labels={d}/l.txt"], 1, "--labels: {d}/l.txt: expected a .json"),
    "labels length": (files(l_npy=npy(np.arange(5))), [DIGITS, "--labels={d}/l.npy"], 1,
                      "5 labels, but the source has 1797"),
    "labels negative": (files(l_npy=npy(np.arange(1797) * 0 - 1)), [DIGITS, "--labels={d}/l.npy"], 1, "label -1"),
    "labels too large": (files(l_npy=npy(np.arange(1797))), [DIGITS, "--labels={d}/l.npy"], 1, "has 10 classes"),
    "labels 2-D": (files(l_npy=npy(np.zeros([1797, 2]))), [DIGITS, "--labels={d}/l.npy"], 1, "must be 1-D"),
    "labels text": (files(l_npy=npy(np.array(["a"] + ["1"] * 1796))), [DIGITS, "--labels={d}/l.npy"], 1,
                    "1 of 2 different labels are none of the 10 classes: 'a'"),
    "clean labels": (files(l_npy=npy(np.arange(5))), [DIGITS, "--clean_labels={d}/l.npy"], 1,
                     "--clean_labels: {d}/l.npy: has 5 labels"),
    "no clean labels": (tree(PNG), [TREE, "--clean_labels=source"], 1, "had no labels"),
    "labels garbage": (files(l_npy=b"garbage"), [DIGITS, "--labels={d}/l.npy"], 1, "not a readable .npy"),
    "npz garbage": (files(l_npz=b"garbage"), [DIGITS, "--labels={d}/l.npz"], 1, "not a readable .npz"),
    "pt garbage": (files(l_pt=b"garbage"), [DIGITS, "--labels={d}/l.pt"], 1, "not a readable .pt"),
    "pt hostile": (files(l_pt=torch_file({"a": Hostile()})), [DIGITS, "--labels={d}/l.pt"], 1, "not a readable .pt"),
    "label keys": (files(l_npz=npz(a=np.arange(3), b=np.arange(3))), [DIGITS, "--labels={d}/l.npz"], 1,
                   "several entries, choose one: dataset_tool.py --label_key=NAME (there are: a, b)"),
    "label key": (files(l_npz=npz(a=np.arange(3))), [DIGITS, "--labels={d}/l.npz", "--label_key=c"], 1,
                  "--labels: {d}/l.npz: has no entry 'c'"),
    "label key of npy": (files(l_npy=npy(np.arange(3))), [DIGITS, "--labels={d}/l.npy", "--label_key=c"], 1, "one arr"),
    "json list": (files(l_json=b"[1, 2]"), [DIGITS, "--labels={d}/l.json"], 1, "must hold"),
    "json other names": (files(l_json=json.dumps(dict(labels=PAIR)).encode()), [DIGITS, "--labels={d}/l.json"], 1,
                         "none of its 2 file names is among the 1,797 images: it names 'a.png', 'b.png'"),
    "json names": (labeled(PAIR) | files(l_json=json.dumps(dict(labels=[["a.png", 0], ["x.png", 1]])).encode()),
                   [ZIP, "--labels={d}/l.json"], 1, "no label for 1 of the 2 images: 'b.png'"),
    "decisions with a key": (labeled(PAIR) | files(l_csv=b"file,label,decision,new_label\na.png,0,keep,\n"),
                             [ZIP, "--labels={d}/l.csv", "--label_key=x"], 1, "holds decisions"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name == "lmdb":
        pytest.importorskip("lmdb")
    make, args, expected, message = BAD[name]
    if callable(make):
        make(tmp_path)
    else:
        for file, data in make.items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    for dest in ("new.zip", "new"):
        code, out, err = run(*[a.format(d=tmp_path) for a in args], f"--dest={tmp_path}/{dest}")
        assert (code, out) == (expected, ""), err
        assert err.startswith("Error: ") and err.count("\n") == 1 and message.replace("{d}", str(tmp_path)) in err, err
        assert sorted(tmp_path.rglob("*")) == before


def test_bad_destinations(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note.txt").write_text("mine")
    (tmp_path / "dir.zip").mkdir()
    (tmp_path / "file").write_text("mine")
    for name, message in [("full", "not empty"), ("dir.zip", "is a folder"), ("file", "not a folder"),
                          ("file/a.zip", "file")]:  # fmt: skip
        code, _, err = run(DIGITS, f"--dest={tmp_path / name}")
        assert code == 1 and err.startswith("Error: ") and err.count("\n") == 1 and message in err, err
        assert name == "file/a.zip" or err.startswith(f"Error: --dest: {tmp_path / name}: ")
    assert (tmp_path / "full/note.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert run(DIGITS, f"--dest={tmp_path}/empty", "--max-images=3")[0] == 0


def test_a_failed_run_keeps_the_old_archive(tmp_path):
    assert run(DIGITS, f"--dest={tmp_path}/a.zip", "--max-images=10")[0] == 0
    old = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "in").mkdir()
    for name, data in tree(*[PNG] * 3, PNG[:90]).items():
        (tmp_path / name).write_bytes(data)
    code, _, err = run(f"--source={tmp_path}/in", f"--dest={tmp_path}/a.zip", "--overwrite")
    assert code == 1 and "3.png" in err
    assert (tmp_path / "a.zip").read_bytes() == old and not list(tmp_path.glob(".*"))
