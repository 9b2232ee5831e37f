"""generate.py by rejection, through its command line."""

import re

import numpy as np
import pytest
import torch

from archives.label_noise import transition_matrix
from sampling import rejection
from tests.support.generated import FAST, make, random_network, read, run
from torch_utils import persistence
from training.networks_conv import ConvClassifier
from training.networks_resnet import Discriminator


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """The options that name a network and a calibrated discriminator, which is unsure of most images."""
    folder = tmp_path_factory.mktemp("networks")
    persistence.save_snapshot(folder / "net.pkl", dict(ema=random_network(), info={}))
    torch.manual_seed(1)
    judge = Discriminator(img_resolution=8, img_channels=1, label_dim=3, depth="small", model_channels=8)
    temperature = dict(coefficients=[0.0, 0.0, 0.0], sigma_min=0.002, sigma_max=80.0)
    info = dict(noise_rates=[0.5, 0.4, 0.3], right_shares=[0.5, 0.5, 0.5], temperature=temperature, held_out=9)
    persistence.save_snapshot(folder / "judge.pkl", dict(ema=judge.eval(), info=info))
    return [f"--network={folder / 'net.pkl'}", f"--discriminator={folder / 'judge.pkl'}", "--steps=3"]


def drawn(out):
    return int(re.search(r"Drew (\d+) images, of which the discriminator accepted \d+%", out)[1])


def test_the_noise_rate_decides_how_much_is_accepted(guide, tmp_path):
    count = {}
    for name, args in {"0": ["--noise_rate=0"], "own": [], "0.9": ["--noise_rate=0.9"]}.items():
        out = make(tmp_path / name, *guide, "--seeds=0-19", *args)
        count[name] = drawn(out)
        assert "Rejection: " in out and "times the network time" not in out
    assert count["0"] == 20 < count["own"] < count["0.9"]
    make(tmp_path / "plain", guide[0], guide[2], "--seeds=0-19")
    assert np.array_equal(read(tmp_path / "0")[0], read(tmp_path / "plain")[0])


def test_images_depend_on_neither_batch_nor_interruption(guide, tmp_path):
    make(tmp_path / "a", *guide, "--seeds=0-19")
    make(tmp_path / "b", *guide, "--seeds=0-19", "--batch=3")
    wanted = read(tmp_path / "a")[0]
    assert np.array_equal(wanted, read(tmp_path / "b")[0])
    for seed in (3, 4):
        next((tmp_path / "b").glob(f"**/*{seed:06d}.png")).unlink()
    out = make(tmp_path / "b", *guide, "--seeds=0-19", "--resume")
    assert "18 of 20 images are there already" in out and np.array_equal(wanted, read(tmp_path / "b")[0])
    assert drawn(out) == drawn(make(tmp_path / "c", *guide, "--seeds=3,4"))  # without those that were made again


def test_images_that_were_not_rejected_are_not_mixed_in(guide, tmp_path):
    """Nearly all seeds accept their first draw, so few images differ."""
    args = ["--seeds=0-67", "--noise_rate=0.2"]
    make(tmp_path / "out", guide[0], guide[2], args[0])
    result = run(f"--outdir={tmp_path / 'out'}", *FAST, *guide, *args, "--resume")
    assert result.exit_code == 1 and "of another network, class or setting" in result.stderr
    make(tmp_path / "right", *guide, *args)
    assert (read(tmp_path / "right")[0] != read(tmp_path / "out")[0]).any((1, 2, 3)).sum() < 15
    make(tmp_path / "right", *guide, *args, "--resume")


def test_what_is_never_accepted_is_counted(guide, tmp_path, monkeypatch):
    assert rejection.TRIES == 100
    monkeypatch.setattr(rejection, "TRIES", 10)
    out = make(tmp_path / "out", *guide, "--seeds=0-2", "--noise_rate=1")
    assert "WARNING: 3 images were not accepted in 10 draws" in out and drawn(out) == 30
    assert len(read(tmp_path / "out")[0]) == 3


def refuse(outdir, *args):
    result = run(f"--outdir={outdir}", *FAST, *args)
    assert result.exit_code == 1 and not outdir.exists(), result.output
    return result.stderr


def test_a_discriminator_that_numbers_the_classes_differently_is_refused(guide, tmp_path):
    names, paths = dict(net=["cat", "dog", "cow"], judge=["dog", "cat", "cow"]), {}
    for option, (name, own) in zip(guide, names.items(), strict=False):
        snapshot = persistence.load_snapshot(option.partition("=")[2])
        snapshot["info"]["class_names"] = own
        paths[name] = tmp_path / f"{name}.pkl"
        persistence.save_snapshot(paths[name], snapshot)
    found = refuse(tmp_path / "out", f"--network={paths['net']}", f"--discriminator={paths['judge']}", guide[2])
    assert "--discriminator" in found and "class 'dog' is number 0 of" in found
    make(tmp_path / "out", guide[0], f"--discriminator={paths['judge']}", guide[2], "--seeds=0")


@pytest.fixture
def detector(tmp_path):
    """The classifier of a detector, as detect_noise.py writes it, and its parts."""
    torch.manual_seed(1)
    net = ConvClassifier(img_resolution=8, img_channels=1, label_dim=3, model_channels=8).eval()
    T = transition_matrix("sym", 0.4, 3)
    temperature = dict(coefficients=[-0.7], sigma_min=0.002, sigma_max=0.002)
    facts = dict(method="detector", transition=T.tolist(), noise_rates=[0.4, 1e-12, 1.0], temperature=temperature)
    parts = dict(ema=net, info=facts)
    persistence.save_snapshot(tmp_path / "labels-classifier.pkl", parts)
    return tmp_path / "labels-classifier.pkl", parts


def test_the_classifier_of_a_detector_rejects_too(guide, detector, tmp_path):
    path, _ = detector
    network, judge = [guide[0], guide[2]], f"--discriminator={path}"
    out = make(tmp_path / "out", *network, judge, "--seeds=0-19")
    assert "until the detector's classifier takes them for right" in out and drawn(out) > 20
    assert "WARNING" not in out  # the rates by themselves say nothing: T does
    assert drawn(make(tmp_path / "all", *network, judge, "--seeds=0-19", "--noise_rate=0")) == 20
    for discriminator, advice in ((judge, "leave it out"), (guide[1], "add --dg_mode=calibrated")):
        result = run(f"--outdir={tmp_path / 'no'}", *network, discriminator, f"--trajectory={tmp_path / 'no.npz'}")
        assert result.exit_code == 2 and f"several times; {advice}\n" in result.stderr


@pytest.mark.parametrize(
    "args", [["--dg_mode=constant"], ["--dg_mode=calibrated"], ["--dg_published=1"], ["--dg_weight_1st_order=1"]]
)
def test_the_classifier_of_a_detector_does_not_guide(guide, detector, tmp_path, args):
    out = refuse(tmp_path / "out", guide[0], f"--discriminator={detector[0]}", *args)
    assert "--discriminator" in out and "can reject images but not guide" in out


def test_other_classifiers_do_not_reject(guide, detector, tmp_path):
    path, parts = detector
    for name in ("temperature", "transition", "noise_rates", "method"):
        persistence.save_snapshot(path, parts | dict(info={k: v for k, v in parts["info"].items() if k != name}))
        out = refuse(tmp_path / "out", guide[0], f"--discriminator={path}")
        assert f"{path.name}: is a classifier that cannot judge labels" in out and "detect_noise.py" in out
    for name, value in (("temperature", 0.5), ("transition", [[0.5, 0.5]] * 2), ("noise rates", [0.1])):
        persistence.save_snapshot(path, parts | dict(info=parts["info"] | {name.replace(" ", "_"): value}))
        out = refuse(tmp_path / "out", guide[0], f"--discriminator={path}")
        assert path.name in out and name in out
