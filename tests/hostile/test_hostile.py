"""Every script gets the corpus of hostile files: nothing runs, nothing is written, each file gets one line."""

import contextlib
import copyreg
import io
import os
import pickle
import pickletools
import shlex
import warnings
import zipfile

import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import dataset_tool
import detect_noise
import fid
import generate
import train
import train_classifier
import train_discriminator
import train_noise
from archives.decode import image_shape
from archives.writer import ArchiveWriter
from dnnlib import UserError
from tests.support import hostile, synth
from torch_utils.persistence import save_snapshot
from training.networks import EDMPrecond
from training.networks_resnet import Classifier

TINY = "--arch=ddpmpp_tiny --cbase=8 --batch=8 --duration=0.00001 --augment=0 --device=cpu"
# The doors: commands that read each kind of file. {file} is the hostile file, {new} a name to write to; all others are
# honest files. The default run sends all files through the first door of each kind, and every tenth through another.
DOORS = {
    "snapshot": [
        (generate, "--network={file} --outdir={new} --seeds=0 --device=cpu"),
        (generate, "--network={pkl} --network_2={file} --affine_weight=1 --outdir={new} --seeds=0 --device=cpu"),
        (fid, "evaluate --images={zip} --data={zip} --detector={file} --out={new} --device=cpu"),
        (fid, "evaluate --images={zip} --data={zip} --detector=pixels --judge={file} --out={new} --device=cpu"),
        (train, f"--data={{zip}} --outdir={{new}} --transfer={{file}} {TINY}"),
        (train_noise, f"--data={{zip}} --outdir={{new}} --cls={{file}} --noise_type=sym --noise_rate=0.1 {TINY}"),
        (train_noise, f"--data={{zip}} --outdir={{new}} --cls={{cls}} --noise_type=sym --noise_rate=0.1 "
                      f"--resume_sub={{file}} {TINY}"),
        (generate, "--network={pkl} --discriminator={file} --outdir={new} --seeds=0 --device=cpu"),
        (detect_noise, "--data={zip} --dest={new}.npz --cls={file} --device=cpu"),
    ],
    "checkpoint": [
        (generate, "--network={file} --image_size=8 --outdir={new} --seeds=0 --device=cpu"),
        (train, f"--data={{zip}} --outdir={{new}} --transfer={{file}} {TINY}"),
        (generate, "--network={pkl} --discriminator={file} --outdir={new} --seeds=0 --device=cpu"),
        (detect_noise, "--data={zip} --dest={new}.npz --cls={file} --device=cpu"),
    ],
    "label file": [
        (train_discriminator, f"--data={{zip}} --outdir={{new}} --label-path={{file}} {TINY}"),
    ],
    "state": [
        (train, f"--data={{zip}} --outdir={{new}} --resume={{file}} {TINY}"),
        (train_classifier, f"--data={{zip}} --outdir={{new}} --resume={{file}} {TINY}"),
    ],
    "labels": [
        (dataset_tool, "--source={zip} --labels={file} --dest={new}"),
        (dataset_tool, "--source={zip} --clean_labels={file} --skip_damaged --dest={new}"),
    ],
    "matrix": [
        (dataset_tool, "--source={zip} --noise_type=matrix --noise_matrix={file} --dest={new}"),
        (train_classifier, f"--data={{zip}} --outdir={{new}} --noise_type=matrix --noise_matrix={{file}} {TINY}"),
    ],
    "reference": [
        (fid, "calc --images={zip} --ref={file} --detector=pixels --num=4 --device=cpu"),
    ],
    "images": [
        (fid, "evaluate --images={file} --data={zip} --detector=pixels --out={new} --device=cpu"),
    ],
    "arrays": [
        (dataset_tool, "--source={file} --dest={new}"),
        (dataset_tool, "--source={zip} --outliers={file} --perturb_percent=50 --dest={new}"),
    ],
    "archive": [
        (dataset_tool, "--source={file} --dest={new}"),
        (dataset_tool, "--source={file} --dest={new}.zip --workers=2"),
        (fid, "ref --data={file} --detector=pixels --dest={new} --device=cpu"),
        (train, f"--data={{file}} --outdir={{new}} --cond=1 {TINY}"),
        (detect_noise, "--data={file} --dest={new}.npz --epochs=1 --device=cpu"),
    ],
    "cifar": [
        (dataset_tool, "--source={file} --dest={new}"),
        (dataset_tool, "--source={file} --eval --dest={new}"),
    ],
}  # fmt: skip


def kinds(name, data):
    """Yield (kind of file, name, bytes) for every kind of file that can hold the pickle `data`."""
    yield "snapshot", "a.pkl", data
    yield (
        "cifar",
        "c.tar.gz",
        hostile.tar_of(
            ("data_batch_1", hostile.tarfile.REGTYPE, len(data), data, ""),
            ("test_batch", hostile.tarfile.REGTYPE, len(data), data, ""),
        ),
    )
    yield "state", "training-state-000001.pt", hostile.torch_zip(data)
    yield "state", "training-state-000001.pt", hostile.legacy(data)
    yield "checkpoint", "netG_1.pth", hostile.torch_zip(data)
    yield "checkpoint", "content.pth", hostile.legacy(data)
    yield "labels", "l.pt", hostile.torch_zip(data)
    yield "labels", "l.pt", hostile.legacy(data)
    yield "labels", "l.npy", hostile.npy_of_objects(data)
    yield "labels", "l.npz", hostile.npz_of_objects(data)
    yield "matrix", "t.npy", hostile.npy_of_objects(data)
    yield "reference", "r.npz", hostile.npz_of_objects(data)
    yield "images", "i.npz", hostile.npz_of_objects(data)
    yield "arrays", "a.npz", hostile.npz_of_objects(data)
    yield "arrays", "a.pk", data
    yield "label file", "f.npz", hostile.npz_of_objects(data)


GADGETS = list(hostile.gadgets(""))
PICKLES = [(name, i) for name in GADGETS for i in range(len(list(kinds(name, b""))))]


def careless(path, data):
    """Read a file as programs do that trust it."""
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.endswith(".tar.gz"):
            with hostile.tarfile.open(fileobj=io.BytesIO(data)) as tar:
                pickle.load(tar.extractfile("data_batch_1"))
        elif path.endswith((".pt", ".pth")):
            torch.load(io.BytesIO(data), weights_only=False)
        elif path.endswith((".npy", ".npz")):
            found = np.load(io.BytesIO(data), allow_pickle=True)
            if path.endswith(".npz"):
                found["mu"]
        else:
            pickle.loads(data)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    root = tmp_path_factory.mktemp("honest")
    files = {"zip": synth.make_archive(root / "ok.zip", synth.pictures(8), [0, 1] * 4), "pkl": root / "ok.pkl"}
    net = EDMPrecond(8, 3, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    save_snapshot(files["pkl"], {"ema": net})
    files["cls"] = root / "classifier.pkl"
    save_snapshot(files["cls"], {"ema": Classifier(8, 3, 2, depth="small", model_channels=8, channel_mult=[1])})
    return files


@pytest.fixture
def tmp_path(tmp_path):
    """Two folders below the test's own, so that what leads out of them still ends where `tree` looks."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    return tmp_path / "a" / "b"


def around(tmp_path, honest):
    return tree(tmp_path.parents[1]) | tree(honest["zip"].parent)


@contextlib.contextmanager
def extensions():
    """Register extension codes, as a program may have done, for the opcodes EXT1, EXT2 and EXT4."""
    names = [("posix", "system"), ("os", "system"), ("tests.support.hostile", "system")]
    for (module, name), code in zip(names, hostile.EXTENSION_CODES, strict=True):
        copyreg.add_extension(module, name, code)
    yield
    for (module, name), code in zip(names, hostile.EXTENSION_CODES, strict=True):
        copyreg.remove_extension(module, name, code)


def tree(folder):
    return {p: None if p.is_dir() else p.lstat().st_size for p in folder.rglob("*") if "new" not in p.parts}


def refused(kind, door, path, honest, tmp_path):
    """Return the line that a script prints for a file. Fail if it prints more, or if it writes anything outside."""
    script, args = DOORS[kind][door]
    before = around(tmp_path, honest)
    names = {"file": path, "new": tmp_path / "new", **honest}
    result = CliRunner().invoke(script.main, shlex.split(args.format(**names)))
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
    assert path.name in result.stderr and len(result.stderr) < 5000 and "\x1b" not in result.stderr
    assert around(tmp_path, honest) == before
    assert (
        not list(tmp_path.glob("new*")) or script is train
    )  # train.py makes the run directory before it reads the images
    return result.stderr


def try_doors(kind, path, honest, tmp_path, number, all_doors):
    """Try the first door and, for every tenth file, one of the others; or all doors."""
    doors = range(len(DOORS[kind]))
    for door in doors if all_doors else {0, *([number // 10 % len(doors)] if number % 10 == 0 else [])}:
        refused(kind, door, path, honest, tmp_path)


def attack(name, index, honest, tmp_path, all_doors, number):
    marker = tmp_path / "ran"
    data = hostile.gadgets(marker)[name]
    kind, file, content = list(kinds(name, data))[index]
    with extensions():
        careless(file, content)
        assert marker.exists(), "not a gadget: a careless reader does not run it"
        marker.unlink()
        (tmp_path / file).write_bytes(content)
        try_doors(kind, tmp_path / file, honest, tmp_path, number, all_doors)
    assert not marker.exists()


@pytest.mark.parametrize("name", GADGETS)
def test_pickles_do_nothing(name, honest, tmp_path):
    """Each pickle is tried as a snapshot and in one of the other kinds of file, which take turns."""
    number = GADGETS.index(name)
    for index in (0, 1 + number % (len(list(kinds(name, b""))) - 1)):
        attack(name, index, honest, tmp_path, False, number)


@pytest.mark.long
@pytest.mark.parametrize("name", GADGETS)
def test_pickles_do_nothing_anywhere(name, honest, tmp_path):
    for index in range(len(list(kinds(name, b"")))):
        attack(name, index, honest, tmp_path, True, 0)


def write(kind, name, tmp_path):
    if kind == "folder":
        hostile.folders()[name](tmp_path / "bad")
        return tmp_path / "bad"
    data = hostile.archives()[name] if kind == "archive" else hostile.tars()[name]
    path = tmp_path / ("bad.zip" if kind == "archive" else "bad.tar.gz")
    path.write_bytes(data)
    return path


ARCHIVES = [
    *(("archive", name) for name in hostile.archives()),
    *(("folder", name) for name in hostile.folders()),
    *(("cifar", name) for name in hostile.tars()),
]


@pytest.mark.parametrize("kind, name", ARCHIVES)
def test_archives_do_nothing(kind, name, honest, tmp_path):
    number = ARCHIVES.index((kind, name))
    path = write(kind, name, tmp_path)
    try_doors("cifar" if kind == "cifar" else "archive", path, honest, tmp_path, number, False)


@pytest.mark.long
@pytest.mark.parametrize("kind, name", ARCHIVES)
def test_archives_do_nothing_anywhere(kind, name, honest, tmp_path):
    path = write(kind, name, tmp_path)
    try_doors("cifar" if kind == "cifar" else "archive", path, honest, tmp_path, 0, True)


@pytest.mark.parametrize(
    "kind, file", [("labels", "l.npy"), ("matrix", "t.npy"), ("reference", "r.npz"), ("arrays", "a.npz")]
)
@pytest.mark.parametrize("name", hostile.NPY)
def test_arrays_that_lie(kind, file, name, honest, tmp_path):
    data = hostile.NPY[name]
    data = data if file.endswith(".npy") else hostile.zip_of({"mu.npy": data, "sigma.npy": data})
    (tmp_path / file).write_bytes(data)
    try_doors(kind, tmp_path / file, honest, tmp_path, 0, True)


@pytest.mark.parametrize("name", hostile.TORCH)
def test_pickles_that_grow(name, honest, tmp_path):
    (tmp_path / "a.pk").write_bytes(hostile.TORCH[name])
    try_doors("arrays", tmp_path / "a.pk", honest, tmp_path, 0, True)


@pytest.mark.parametrize("kind, file", [("labels", "l.json"), ("matrix", "t.json")])
@pytest.mark.parametrize("data", [hostile.BRACKETS, b"[" + b"[]," * 12_000_000 + b"[]]", b"9" * 10**6, b'"\\'])
def test_json_that_grows(kind, file, data, honest, tmp_path):
    (tmp_path / file).write_bytes(data)
    try_doors(kind, tmp_path / file, honest, tmp_path, 0, True)


@pytest.mark.parametrize("kind, file", [("labels", "l.pt"), ("state", "s.pt"), ("checkpoint", "netG_1.pth")])
@pytest.mark.parametrize("wrap", [hostile.torch_zip, hostile.legacy])
@pytest.mark.parametrize("name", hostile.TORCH)
def test_torch_files_that_grow(kind, file, wrap, name, honest, tmp_path):
    (tmp_path / file).write_bytes(wrap(hostile.TORCH[name]))
    try_doors(kind, tmp_path / file, honest, tmp_path, 0, True)


@pytest.mark.parametrize("name", hostile.tables())
def test_tables_do_nothing(name, honest, tmp_path):
    """As a file of labels, and, under the name of which the reader takes notice, among the images of a folder."""
    file, data = hostile.tables()[name]
    (tmp_path / file).write_bytes(data)
    refused("labels", 0, tmp_path / file, honest, tmp_path)
    folder = tmp_path / "metadata"
    folder.mkdir()
    (folder / "00000").mkdir()
    (folder / "00000" / "img00000000.png").write_bytes(hostile.PNG)
    (folder / f"metadata{os.path.splitext(file)[1]}").write_bytes(data)
    result = CliRunner().invoke(dataset_tool.main, [f"--source={folder}", f"--dest={tmp_path}/new.zip"])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    lines = result.stderr.splitlines()
    assert lines and all(line.isprintable() and len(line) < 5000 for line in lines)
    assert [line[:6] for line in lines if line[:6] != "Note: "] == ["Error:"] * (result.exit_code == 1)


@pytest.mark.parametrize("name", ["PostScript", "PostScript as PNG"])
def test_no_interpreter_is_started(name, honest, tmp_path, monkeypatch):
    """Pillow would pass PostScript to Ghostscript, if it is installed."""
    started = []
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: started.append(args))
    with contextlib.suppress(Exception):
        PIL.Image.open(io.BytesIO(hostile.EPS)).load()
    assert started.pop() and not started
    refused("archive", 0, write("archive", name, tmp_path), honest, tmp_path)
    assert not started


def test_sizes_are_refused_before_memory_is_asked_for():
    with pytest.raises(UserError, match="65536x65536 is more than the limit"):
        image_shape(hostile.png_claiming(65536, 65536), "a.png")


def test_idx_bomb(tmp_path, honest):
    synth.make_mnist(tmp_path / "mnist")
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(hostile.gzip.compress(hostile.ZEROS) * 600)
    refused("cifar", 0, path, honest, tmp_path)


def test_the_corpus_is_large_and_different():
    files = {
        *(content for name in GADGETS for _, _, content in kinds(name, hostile.gadgets("/ran")[name])),
        *hostile.archives().values(),
        *hostile.tars().values(),
        *hostile.NPY.values(),
    }
    assert len(files) > 350 and len(GADGETS) >= 45 and len(ARCHIVES) >= 45
    opcodes = {
        opcode.name
        for name, data in hostile.gadgets("/ran").items()
        if name not in ("no STOP", "rubbish behind")
        for opcode, _, _ in pickletools.genops(data)
    }
    assert opcodes >= set(
        "REDUCE BUILD INST OBJ NEWOBJ NEWOBJ_EX GLOBAL STACK_GLOBAL EXT1 EXT2 EXT4 PERSID "
        "BINPERSID APPEND APPENDS ADDITEMS GET BINGET LONG_BINGET MEMOIZE DUP POP_MARK FRAME".split()
    )


def test_names_of_members_never_become_paths(tmp_path):
    """The reader refuses such names, and the writer does too."""
    for path in (tmp_path / "a.zip", tmp_path / "a"):
        with pytest.raises(UserError, match="leads out"), ArchiveWriter(str(path)) as archive:
            archive.add("../b.png", b"")
    assert os.listdir(tmp_path) == [] and not zipfile.is_zipfile(tmp_path)
