"""Bad input for every script that can get it: one line, the right exit code, nothing lost.

Cases that concern only one script are among the tests of that script.
"""

import json
import os
import resource

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dnnlib import downloads
from tests.support import fuzz, synth
from torch_utils import checkpoint, persistence
from training.networks import EDMPrecond
from training.networks_conv import ConvClassifier
from training.networks_resnet import Classifier

TINY = " ".join(fuzz.TINY)
NAMES = [f"00000/img{i:08d}.png" for i in range(4)]
PNG = [synth.png(image) for image in synth.pictures(4)]


def invoke(script, line, **files):
    return CliRunner().invoke(fuzz.SCRIPTS[script].main, [arg.format(**files) for arg in line.split()])


def fails(code, words, script, line, **files):
    result = invoke(script, line, **files)
    assert result.exit_code == code, result.output + repr(result.exception)
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    return {**fuzz.honest(root), "root": root}


# ---- archives. For dataset_tool.py these cases are in test_dataset_tool_bad_input.py, for decoding in test_decode.py


def labels(*values):
    return json.dumps({"labels": [[name, value] for name, value in zip(NAMES, values, strict=False)]}).encode()


def archive(**changes):
    """Return four images with labels, by name. `img2` replaces the third image, `json` the metadata."""
    members = {**dict(zip(NAMES, PNG, strict=True)), "dataset.json": labels(0, 1, 0, 1)}
    for key, value in changes.items():
        name = "dataset.json" if key == "json" else NAMES[2]
        members[name] = value
    return members


def every(size=8, channels=3):
    return {
        name: synth.png(image.squeeze()) for name, image in zip(NAMES, synth.pictures(4, size, channels), strict=True)
    } | {"dataset.json": labels(0, 1, 0, 1)}


ARCHIVES = {
    "missing": (None, ["No such file"]),
    "not a ZIP": (b"no archive", ["not a ZIP"]),
    "without images": ({"readme.txt": b""}, ["ZIP without images"]),
    "truncated image": (archive(img2=PNG[2][:-30]), [NAMES[2], "truncated"]),
    "not JSON": (archive(json=b"{"), ["dataset.json", "not valid JSON"]),
    "no labels in it": (archive(json=b"{}"), ["dataset.json", "lacks"]),
    "absent file": (archive(json=labels(0, 1, 0, 1).replace(b"3.png", b"9.png")), ["dataset.json", NAMES[3]]),
    "label missing": (archive(json=labels(0, 1, 0)), ["dataset.json", NAMES[3]]),
    "negative": (archive(json=labels(0, 1, 0, -1)), ["dataset.json", "-1 is negative"]),
    "not integer": (archive(json=labels(0, 1, 0, 0.5)), ["dataset.json", "0.5 is not an integer"]),
    "ragged": (archive(json=labels([0, 1], [1, 0], [1], [0, 1])), ["dataset.json", "ragged"]),
    "mixed sizes": (archive(img2=synth.png(synth.pictures(1, 16)[0])), [NAMES[2], "16x16", "8x8"]),
    "alpha": (archive(img2=synth.png(synth.pictures(1, channels=4)[0])), [NAMES[2], "has transparent pixels"]),
    "gray among RGB": (archive(img2=synth.png(synth.pictures(1)[0], "LA")), [NAMES[2], "1 channels", "8x8 with 3"]),
    "not square": ({"a.png": synth.png(synth.pictures(1)[0][:4])}, ["8x4", "square"]),
    "not a power of two": (every(12), ["12x12", "power of two"]),
}
READERS = {
    "train": "--data={file} --outdir={new} --cond=1 " + TINY,
    "train_classifier": "--data={file} --outdir={new} " + TINY,
    "train_noise": "--data={file} --outdir={new} --cls={cls} " + TINY,
    "fid ref": "ref --data={file} --dest={new} --detector=pixels --device=cpu",
    "fid evaluate": "evaluate --images={file} --data={zip} --detector=pixels --out={new} --device=cpu",
}


@pytest.mark.parametrize("reader", READERS)
def test_archives(reader, files, tmp_path):
    for name, (content, words) in ARCHIVES.items():
        if reader.startswith("fid") and name in ("not square", "not a power of two"):
            continue  # metrics accept images of any size
        path = tmp_path / f"{name.replace(' ', '_')}.zip"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            synth.make_zip(path, content)
        new = tmp_path / f"new_{name.replace(' ', '_')}"
        if reader == "fid ref" and name in ("absent file", "label missing", "negative", "not integer", "ragged"):
            result = invoke("fid", READERS[reader], file=path, new=new, **files)  # a note, since it needs no labels
            assert result.exit_code == 0 and all(word in result.stderr for word in words), result.output
            continue
        fails(1, [path.name, *words], reader.split()[0], READERS[reader], file=path, new=new, **files)
        assert not new.exists() or not list(new.rglob("*.pkl")) + list(new.rglob("*.pt"))


def test_archives_without_labels_cannot_condition(files, tmp_path):
    path = synth.make_archive(tmp_path / "plain.zip", synth.pictures(4))
    for reader in ("train", "train_classifier", "train_noise"):
        fails(1, ["--cond=1", "plain.zip"], reader, READERS[reader], file=path, new=tmp_path / "new", **files)
    assert os.listdir(tmp_path) == ["plain.zip"]


# ---- label noise


@pytest.mark.parametrize("script", ["train_classifier", "train_noise"])
@pytest.mark.parametrize(
    "options, code, words",
    [
        ("--noise_type=sym --noise_rate=1.5", 2, ["--noise_rate", "1.5"]),
        ("--noise_type=sym --noise_rate=-0.1", 2, ["--noise_rate", "-0.1"]),
        ("--noise_type=sym --noise_rate=nan", 2, ["--noise_rate", "nan"]),
        ("--noise_type=pair", 2, ["--noise_rate"]),
        ("--noise_type=matrix", 2, ["--noise_matrix"]),
        ("--noise_type=matrix --noise_matrix={root}/none.npy", 1, ["none.npy", "No such file"]),
        ("--noise_type=matrix --noise_matrix={root}/tall.npy", 1, ["tall.npy", "square", "3x2"]),
        ("--noise_type=matrix --noise_matrix={root}/rows.json", 1, ["rows.json", "row 1 sums to 1.5"]),
        ("--noise_type=matrix --noise_matrix={root}/three.npy", 1, ["three.npy", "3x3", "2 classes"]),
        ("--noise_type=matrix --noise_matrix={root}/bad.json", 1, ["bad.json", "not valid JSON"]),
        ("--noise_type=matrix --noise_matrix={root}/text.npy", 1, ["text.npy", "not a readable .npy"]),
        ("--noise_type=asym --noise_rate=0.4", 1, ["--noise_type=asym: ", "'matrix'"]),
    ],
)
def test_noise(script, options, code, words, files, tmp_path):
    root = files["root"]
    np.save(root / "tall.npy", np.ones([3, 2]) / 2)
    np.save(root / "three.npy", np.eye(3))
    (root / "rows.json").write_text("[[1, 0], [1, 0.5]]")
    (root / "bad.json").write_text("[[1, 0")
    (root / "text.npy").write_text("text")
    extra = " --cls={cls}" if script == "train_noise" else ""
    fails(code, words, script, f"--data={{zip}} --outdir={tmp_path}/new {options}{extra} {TINY}", **files)
    assert os.listdir(tmp_path) == []


# ---- networks


def snapshot(path, net):
    persistence.save_snapshot(path, {"ema": net, "info": {}})
    return path


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(img_resolution=16), ["resolution", "16", "8"]),
        (dict(img_channels=1), ["channels", "1", "3"]),
        (dict(label_dim=3), ["classes", "3", "2"]),
    ],
)
def test_classifiers_of_other_data(change, words, files, tmp_path):
    kwargs = dict(img_resolution=8, img_channels=3, label_dim=2, depth="small", model_channels=8, channel_mult=[1])
    path = snapshot(tmp_path / "other.pkl", Classifier(**{**kwargs, **change}))
    fails(
        1,
        ["other.pkl", *words],
        "train_noise",
        READERS["train_noise"],
        file=files["zip"],
        new=tmp_path / "new",
        **{**files, "cls": path},
    )
    if "label_dim" not in change:
        fails(
            1,
            ["other.pkl"],
            "fid",
            "evaluate --images={zip} --data={zip} --detector={file} --device=cpu",
            file=path,
            **files,
        )


@pytest.mark.parametrize("net", [Classifier, ConvClassifier])
def test_tdsm_refuses_a_detectors_classifier(net, files, tmp_path):
    shape = dict(img_resolution=8, img_channels=3, label_dim=2)
    kwargs = dict(depth="small", channel_mult=[1]) if net is Classifier else {}
    info = dict(method="detector", posterior="clean")
    path = tmp_path / "labels-classifier.pkl"
    path.write_bytes(fuzz.snapshot_bytes(tmp_path, net(**shape, model_channels=8, **kwargs), info))
    words = ["labels-classifier.pkl", "images without noise", "train_classifier.py"]
    fails(
        1,
        words,
        "train_noise",
        READERS["train_noise"],
        file=files["zip"],
        new=tmp_path / "new",
        **{**files, "cls": path},
    )


DOORS = {
    "generate --network": ("generate", "--network={file} --outdir={new} --seeds=0 --device=cpu", "denoiser"),
    "generate --network_2": (
        "generate",
        "--network={pkl} --network_2={file} --affine_weight=1 --outdir={new}",
        "denoiser",
    ),
    "train --transfer": ("train", "--data={zip} --outdir={new} --transfer={file} " + TINY, None),
    "train_noise --cls": ("train_noise", "--data={zip} --outdir={new} --cls={file} " + TINY, "classifier"),
    "fid --detector": ("fid", "evaluate --images={zip} --data={zip} --detector={file} --device=cpu", "classifier"),
    "fid --judge": (
        "fid",
        "evaluate --images={zip} --data={zip} --detector=pixels --judge={file} --device=cpu",
        "classifier",
    ),
}


@pytest.mark.parametrize("door", DOORS)
def test_snapshots(door, files, tmp_path, monkeypatch):
    script, line, kind = DOORS[door]
    new = tmp_path / "new"
    good = files["pkl" if kind == "denoiser" else "cls"].read_bytes()
    for name, data, words in [
        ("missing.pkl", None, ["missing.pkl"]),
        ("empty.pkl", b"", ["empty.pkl", "not a pickle"]),
        ("truncated.pkl", good[: len(good) // 2], ["truncated.pkl", "truncated or corrupt"]),
        ("flipped.pkl", good[:5000] + bytes([good[5000] ^ 1]) + good[5001:], ["flipped.pkl", "checksum"]),
        ("other.pkl", b"\x80\x04}.", ["other.pkl", "snapshot"]),
    ]:
        if data is not None:
            (tmp_path / name).write_bytes(data)
        fails(1, words, script, line, file=tmp_path / name, new=new, **files)
    if kind is not None:
        wrong = files["cls" if kind == "denoiser" else "pkl"]
        fails(1, [wrong.name, f"not a {kind}"], script, line, file=wrong, new=new, **files)
    (tmp_path / "folder").mkdir()
    fails(1, ["folder", "no network-snapshot-*.pkl"], script, line, file=tmp_path / "folder", new=new, **files)
    # A URL that cannot be reached: the message names the path where a copy could be put instead.
    monkeypatch.setattr(downloads, "_PAUSE", 0)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    fails(
        1,
        ["https://127.0.0.1:9/a.pkl", f"put the file at {tmp_path}/cache/"],
        script,
        line,
        file="https://127.0.0.1:9/a.pkl",
        new=new,
        **files,
    )
    assert not new.exists()


def test_networks_of_another_shape_have_nothing_to_transfer(files, tmp_path):
    net = EDMPrecond(16, 1, model_type="DhariwalUNet", model_channels=32, channel_mult=[1], num_blocks=1)
    path = snapshot(tmp_path / "other.pkl", net)
    stderr = fails(
        1,
        ["--transfer", "other.pkl"],
        "train",
        f"--data={{zip}} --outdir={tmp_path}/new --transfer={path} {TINY} --cbase=24",
        **files,
    )
    assert "no parameter" in stderr and not (tmp_path / "new").exists()


def test_networks_that_number_the_classes_differently(files, tmp_path):
    for name, names in dict(a=["cat", "dog"], b=["dog", "cat"]).items():
        net = EDMPrecond(8, 1, label_dim=2, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1)
        persistence.save_snapshot(tmp_path / f"{name}.pkl", dict(ema=net, info=dict(class_names=names)))
    line = f"--network={tmp_path}/a.pkl --network_2={tmp_path}/b.pkl --affine_weight=1 --outdir={tmp_path}/new"
    fails(1, ["--network_2", "class 'dog' is number 0 of", "but number 1 of the network"], "generate", line, **files)
    persistence.save_snapshot(tmp_path / "few.pkl", dict(ema=net, info=dict(class_names=["dog"])))
    line = f"--network={tmp_path}/few.pkl --outdir={tmp_path}/new"
    fails(1, ["--network", "2 classes, but 1 class_names"], "generate", line, **files)


# ---- devices and pipes


@pytest.mark.parametrize(
    "script, line",
    [
        *((reader.split()[0], line) for reader, line in READERS.items()),
        ("dataset_tool", "--source={file} --dest={new}"),
        ("fid", "calc --images={zip} --ref={file} --detector=pixels --num=4"),
        *(door[:2] for door in DOORS.values()),
        ("dataset_tool", "--source={zip} --labels={file} --dest={new}"),
        ("train", "--data={zip} --outdir={new} --resume={file}"),
    ],
)
def test_devices_and_pipes(script, line, files, tmp_path):
    os.mkfifo(tmp_path / "pipe.npy")
    for path in ("/dev/zero", tmp_path / "pipe.npy"):
        fails(1, [str(path)], script, line, file=path, new=tmp_path / "new", **files)
    assert not (tmp_path / "new").exists()


def test_numbers_beyond_all_range(files, tmp_path):
    line = f"--network={{pkl}} --outdir={tmp_path}/new --seeds=0 --steps=3"
    for options in ("--sigma_max=1e308 --disc=vp", "--rho=1e-300", "--sigma_max=1e300", "--S_churn=1 --S_noise=1e300"):
        fails(1, ["a broken network or setting"], "generate", f"{line} {options}", **files)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("option", ["--duration", "--tick", "--ema", "--lr_rampup_kimg"])
def test_lengths_that_are_not_a_number_of_images(option, files, tmp_path):
    line = f"--data={{zip}} --outdir={tmp_path}/new {TINY}"
    for value in ("1e+308", "-1", "nan", "inf"):
        fails(2, [option, value], "train", f"{line} {option}={value}", **files)


# ---- runs


@pytest.mark.parametrize("script", ["train", "train_classifier", "train_noise"])
def test_batches_must_be_divisible_by_processes(script, files, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    extra = " --cls={cls}" if script == "train_noise" else ""
    fails(2, ["--batch=8", "divisible", "3"], script, f"--data={{zip}} --outdir={tmp_path}/new{extra} {TINY}", **files)
    assert os.listdir(tmp_path) == []


def state_of(value):
    return lambda path: torch.save(value, path)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: path.write_bytes(b"no state"), ["not a state"]),
        (state_of([1]), ["list"]),
        (state_of({"nimg": 1}), ["not the state of a run"]),
        (
            state_of({"config": {}, "nimg": -1, "best": {"value": None, "name": None}, "objective": {}}),
            ["not the state"],
        ),
        (
            state_of({"config": {}, "nimg": 8, "best": {"value": None, "name": None}, "objective": {}}),
            ["other options"],
        ),
    ],
)
def test_states(make, words, files, tmp_path):
    make(tmp_path / "other.pt")
    line = f"--data={{zip}} --outdir={tmp_path}/new --resume={tmp_path}/other.pt {TINY}"
    fails(1, ["other.pt", *words], "train", line, **files)
    assert os.listdir(tmp_path) == ["other.pt"]


def test_a_state_that_does_not_fit(files, tmp_path):
    state = checkpoint.load_state(files["state"])
    state["objective"]["net"]["net"].popitem()
    checkpoint.save_state(tmp_path / "less.pt", state)
    # The options are those of the run, but the weights are not.
    fails(
        1,
        ["--resume", "does not fit this run", "Missing key"],
        "train",
        f"--data={{zip}} --outdir={tmp_path}/new --resume={tmp_path}/less.pt {TINY} --duration=0.00002",
        **files,
    )


def test_a_full_disk_keeps_the_last_state_and_snapshot(files, tmp_path):
    line = f"--data={{zip}} --outdir={tmp_path}/run --nosubdir {TINY}"
    assert invoke("train", line, **files).exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.suffix in (".pt", ".pkl")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, limits[1]))
    try:
        fails(
            1,
            ["network-snapshot-", "too large"],
            "train",
            f"{line} --resume={tmp_path}/run --duration=0.00003",
            **files,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.suffix in (".pt", ".pkl")}
    assert after == before
    assert invoke("train", f"{line} --resume={tmp_path}/run --duration=0.00003", **files).exit_code == 0
