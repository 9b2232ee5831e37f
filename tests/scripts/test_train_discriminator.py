"""train_discriminator.py, generate.py --discriminator and sweep.py through their command lines, on a few digits."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import generate
import sweep
import train_discriminator
from archives.dataset import ImageDataset
from archives.label_file import LabelFile, class_noise_rates, save_label_file
from tests.support.generated import random_network
from tests.support.paths import FIXTURES, ROOT
from tests.support.runs import TINY, assert_same, final_weights
from tests.support.synth import make_cifar10, run_dataset_tool
from torch_utils import persistence
from training.networks_resnet import Classifier, Discriminator
from training.temperature import Temperature


def invoke(script, *args):
    result = CliRunner().invoke(script.main, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(script, *args):
    result = invoke(script, *args)
    assert result.exit_code == 0, result.output
    return result.output


def fail(exit_code, match, script, *args):
    result = invoke(script, *args)
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == exit_code and len(lines) == 1 and lines[0].startswith("Error: "), result.output
    assert re.search(match, lines[0]), lines[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with 160 noisy digits, their label file, a classifier and a network of ten classes."""
    folder = tmp_path_factory.mktemp("world")
    data = folder / "digits.zip"
    assert (
        run_dataset_tool(
            "--source=digits", f"--dest={data}", "--max-images=160", "--noise_type=sym", "--noise_rate=0.4", "--seed=0"
        )[0]
        == 0
    )
    dataset = ImageDataset(str(data))
    clean = dataset.labels == dataset.clean_labels
    save_label_file(
        folder / "labels.npz",
        LabelFile(
            dataset.file_names,
            dataset.labels,
            clean,
            clean.astype(np.float32),
            dataset.clean_labels,
            float(np.mean(~clean)),
            class_noise_rates(dataset.labels, clean, 10),
            transition=np.eye(10) * 0.5 + 0.05,
        ),
    )
    np.savez(folder / "published.npz", clean)
    torch.manual_seed(0)
    classifier = Classifier(8, 1, 10, depth="small", model_channels=8, channel_mult=[1, 1])
    persistence.save_snapshot(folder / "cls.pkl", dict(ema=classifier, info=dict(posterior="clean")))
    persistence.save_snapshot(folder / "net.pkl", dict(ema=random_network(label_dim=10), info={}))
    return folder


def train_args(world, outdir, labels="labels.npz", **changes):
    options = dict(duration=0.00048) | changes
    return [
        f"--outdir={outdir}",
        f"--data={world / 'digits.zip'}",
        f"--label-path={world / labels}",
        *TINY,
        *(f"--{k}={v}" for k, v in options.items()),
    ]


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """The run directory of an uninterrupted run of 480 images, with SiMix by a classifier's features."""
    outdir = tmp_path_factory.mktemp("discriminator")
    succeed(train_discriminator, *train_args(world, outdir, cls=world / "cls.pkl"))
    return outdir / "00000-digits-cond-ddpmpp_tiny-edm-gpus1-batch32-fp32"


def test_snapshot_says_what_guidance_needs(world, trained):
    snapshot = persistence.load_snapshot(persistence.find_snapshot(str(trained)), kind="discriminator")
    assert isinstance(snapshot["ema"], Discriminator)
    info, dataset = snapshot["info"], ImageDataset(str(world / "digits.zip"))
    clean = dataset.labels == dataset.clean_labels
    assert info["noise_rates"] == pytest.approx([np.mean(~clean[dataset.labels == c]) for c in range(10)])
    assert info["shuffle"] == "transition" and all(0 < r < 1 for r in info["right_shares"])
    assert info["held_out"] == 16 and Temperature.read(info["temperature"], "")(torch.ones(())) > 0
    last = json.loads((trained / "stats.jsonl").read_text().splitlines()[-1])
    bands = [v for k, v in last.items() if k.startswith("Discriminator/correction_rate_sigma")]
    assert len(bands) == 5 and sum(b["num"] for b in bands) == last["Discriminator/correction_rate"]["num"] == 48


def test_resume_is_bit_exact(world, trained, tmp_path):
    args = train_args(world, tmp_path, cls=world / "cls.pkl")
    shorter = [a if not a.startswith("--duration") else "--duration=0.000192" for a in args]
    succeed(train_discriminator, *shorter)
    assert "Resuming at 0.2 kimg" in succeed(train_discriminator, *args, "--resume=latest")
    assert_same(final_weights(tmp_path / trained.name)["objective"], final_weights(trained)["objective"])


def test_partners_are_decoded_ahead_and_change_no_number(world, trained, tmp_path, monkeypatch):
    """Without room for the decoded images, the threads that read batches ahead read the partners too."""
    decode, read = ImageDataset._decode, {True: [], False: []}

    def note(dataset, raw):
        read[threading.current_thread() is threading.main_thread()].append(raw)
        return decode(dataset, raw)

    monkeypatch.setattr(ImageDataset, "_decode", note)
    succeed(train_discriminator, *train_args(world, tmp_path, cls=world / "cls.pkl"), "--cache=0", "--workers=2")
    assert len(read[False]) > 480 and len(set(read[True])) == 16 and not set(read[True]) & set(read[False])
    assert_same(final_weights(tmp_path / trained.name)["objective"], final_weights(trained)["objective"])


def test_batch_splitting_changes_rounding_only(world, trained, tmp_path):
    succeed(train_discriminator, *train_args(world, tmp_path, cls=world / "cls.pkl", dropout=0, duration=0.000032))
    split = train_args(world, tmp_path, cls=world / "cls.pkl", dropout=0, duration=0.000032)
    succeed(train_discriminator, *split, "--batch-gpu=7", "--desc=split")
    whole, parts = (final_weights(p)["objective"]["net"]["net"] for p in sorted(tmp_path.iterdir()))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], atol=3e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(simix=0), "Mixed up with: any image"),
        (dict(), "similar images, by pixels"),
        (dict(shuffle="uniform", embed="pixels"), "Shuffle: uniform"),
        (dict(labels="published.npz"), "Shuffle: uniform"),
        (dict(labels="published.npz", noise_type="sym", noise_rate=0.4), "Shuffle: transition"),
        (dict(xflip=1, augment=0.3), "Shuffle: transition"),
    ],
)
def test_options_do_what_they_say(world, tmp_path, options, words):
    assert words in succeed(train_discriminator, *train_args(world, tmp_path, **(dict(duration=0.000064) | options)))


def test_detector_beside_the_label_file_is_the_embedding(world, tmp_path):
    (tmp_path / "labels.npz").write_bytes((world / "labels.npz").read_bytes())
    (tmp_path / "labels-classifier.pkl").write_bytes((world / "cls.pkl").read_bytes())
    args = [f"--data={world / 'digits.zip'}", f"--label-path={tmp_path / 'labels.npz'}", "--duration=0.000032", *TINY]
    assert "by classifier" in succeed(train_discriminator, f"--outdir={tmp_path / 'runs'}", *args)


@pytest.mark.parametrize(
    "match, options",
    [
        ("--embed=pixels: belongs to --simix=1", dict(simix=0, embed="pixels")),
        ("--cls: only --simix=1", dict(simix=0, cls="x.pkl")),
        ("--embed=classifier: needs --cls", dict(embed="classifier")),
        ("--shuffle=transition: .*estimates no transition", dict(labels="published.npz", shuffle="transition")),
        ("--cond=0: .* it needs --cond=1", dict(cond=0)),
        ("--noise_rate: --shuffle=uniform follows no", dict(shuffle="uniform", noise_rate=0.4)),
    ],
)
def test_usage(world, tmp_path, match, options):
    fail(2, match, train_discriminator, *train_args(world, tmp_path, **options))


def test_label_files_that_do_not_fit(world, tmp_path):
    cases = {
        "short": (dict(arr_0=np.ones(100)), "arr_0 has 100 entries, but .* has 160 images"),
        "gray": (dict(arr_0=np.full(160, 0.5)), "holds 0.5, expected flags"),
        "object": (dict(arr_0=np.array([{}] * 160, dtype=object)), "object"),
        "other": (
            dict(arr_0=np.zeros(160, dtype=int), arr_1=np.zeros(160, dtype=int), arr_2=np.ones(160)),
            "labels are not those of",
        ),
    }
    for name, (arrays, match) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        args = train_args(tmp_path, tmp_path / "runs", f"{name}.npz")
        fail(1, match, train_discriminator, *args, f"--data={world / 'digits.zip'}")


def test_open_clip_is_optional(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    fail(
        1,
        "--embed=clip: CLIP features need the package open_clip",
        train_discriminator,
        *train_args(world, tmp_path, embed="clip"),
    )


# ----------------------------------------------------------------------------------------------------------------------
# generate.py and sweep.py.


def images(path):
    return np.stack([ImageDataset(str(path)).image(i) for i in range(len(ImageDataset(str(path))))])


def test_generate_with_guidance(world, trained, tmp_path):
    base = [f"--network={world / 'net.pkl'}", "--seeds=0-5", "--steps=4", "--device=cpu"]
    guide = [*base, f"--discriminator={trained}", "--dg_mode=calibrated", "--dg_weight_1st_order=30"]
    succeed(generate, *base, f"--outdir={tmp_path / 'plain'}")
    out = succeed(generate, *guide, f"--outdir={tmp_path / 'guided'}", "--batch=6")
    ratio = float(re.search(r"took ([\d.]+) times the network time of unguided", out)[1])
    assert (
        ratio > 1
        and "Guidance: calibrated (fitted to 16 held-out images), weights 30 and 1, where 0 <= sigma <= inf" in out
    )
    assert "7 network evaluations per image" in out
    succeed(generate, *guide, f"--outdir={tmp_path / 'batch2.zip'}", "--batch=2")
    succeed(generate, *guide, f"--outdir={tmp_path / 'closed'}", "--S_clip_min=1e3", "--S_clip_max=1e4")
    guided = images(tmp_path / "guided")
    assert (guided != images(tmp_path / "plain")).any()
    assert np.array_equal(guided, images(tmp_path / "batch2.zip"))
    assert np.array_equal(images(tmp_path / "closed"), images(tmp_path / "plain"))


def test_default_follows_from_what_the_discriminator_records(world, trained, tmp_path):
    old = persistence.load_snapshot(persistence.find_snapshot(str(trained)))
    del old["info"]["temperature"]  # as version 0.1 wrote it
    persistence.save_snapshot(tmp_path / "old.pkl", old)
    base = [f"--network={world / 'net.pkl'}", "--seeds=0", "--steps=3", "--device=cpu"]
    with_old, said = [f"--discriminator={tmp_path / 'old.pkl'}", f"--outdir={tmp_path / 'none'}"], {}
    for name, disc, args in (
        ("new", trained, []),
        ("weight", trained, ["--dg_weight_1st_order=1"]),
        ("gate", trained, ["--S_clip_max=9"]),
        ("asked", trained, ["--dg_mode=constant"]),
        ("old", tmp_path / "old.pkl", []),
        ("old-calibrated", tmp_path / "old.pkl", ["--dg_mode=calibrated"]),
    ):
        out = succeed(generate, *base, f"--discriminator={disc}", f"--outdir={tmp_path / name}", *args)
        said[name] = re.search("Guidance: (.*), where|(Rejection: .*)", out)[0]
    assert said == {
        "new": "Rejection: images are drawn until the discriminator takes them for right, fitted to 16 held-out images",
        "weight": "Guidance: calibrated (fitted to 16 held-out images), weights 1 and 1, where",
        "gate": "Guidance: calibrated (fitted to 16 held-out images), weights 1 and 1, where",
        "asked": "Guidance: constant (as asked), weights 2 and 0, where",
        "old": "Guidance: constant (not fitted to held-out images), weights 2 and 0, where",
        "old-calibrated": "Guidance: calibrated (not fitted to held-out images), weights 1 and 1, where",
    }
    match = "--discriminator: .*old.pkl: is not calibrated, so the weights are constant and the noise rate 0.2"
    fail(
        1,
        match,
        generate,
        *base,
        f"--discriminator={tmp_path / 'old.pkl'}",
        "--noise_rate=0.2",
        f"--outdir={tmp_path}/x",
    )
    old["info"]["temperature"] = dict(coefficients="hot")
    persistence.save_snapshot(tmp_path / "old.pkl", old)
    match = "--discriminator: .*old.pkl: the temperature that it records is none"
    fail(1, match, generate, *base, *with_old)


def test_without_calibration_every_image_is_trained_on(world, tmp_path):
    """As published: the same run as before there was calibration."""
    args = train_args(world, tmp_path, duration=0.000064, calibrate=0, embed="pixels")
    assert "Held out: none" in succeed(train_discriminator, *args)
    snapshot = persistence.load_snapshot(persistence.find_snapshot(str(next(tmp_path.iterdir()))))
    assert snapshot["info"]["temperature"] is None
    assert snapshot["info"]["options"]["discriminator"]["calibrate"] == 0


def test_noise_rate_replaces_the_label_files(world, trained, tmp_path):
    fast = ["--seeds=0-3", "--steps=4", "--device=cpu"]
    base = [f"--network={world / 'net.pkl'}", f"--discriminator={trained}", *fast, "--dg_mode=calibrated"]
    for name, args in {"own": [], "zero": ["--noise_rate=0"], "all": ["--noise_rate=1"]}.items():
        succeed(generate, *base, *args, "--dg_weight_1st_order=30", f"--outdir={tmp_path / name}")
    succeed(generate, base[0], *fast, f"--outdir={tmp_path / 'plain'}")
    assert np.array_equal(images(tmp_path / "zero"), images(tmp_path / "plain"))
    assert (images(tmp_path / "own") != images(tmp_path / "all")).any()


@pytest.mark.parametrize(
    "match, args",
    [
        ("--dg_mode=calibrated: needs --discriminator", ["--dg_mode=calibrated"]),
        ("--S_clip_min=1.5: needs --discriminator", ["--S_clip_min=1.5"]),
        (
            "--noise_rate=0.4: --dg_mode=constant does not use it",
            ["--noise_rate=0.4", "--dg_mode=constant", "--discriminator={trained}"],
        ),
        (
            "--S_clip_max=9: --dg_mode=rejection has no gradient",
            ["--S_clip_max=9", "--dg_mode=rejection", "--discriminator={trained}"],
        ),
        ("--trajectory: rejection draws an image several times", ["--trajectory=x.npz", "--discriminator={trained}"]),
        (
            "--S_clip_min=3: must not exceed --S_clip_max=2",
            ["--S_clip_min=3", "--S_clip_max=2", "--discriminator={trained}"],
        ),
    ],
)
def test_generate_usage(world, trained, tmp_path, match, args):
    fail(
        2,
        match,
        generate,
        f"--network={world / 'net.pkl'}",
        f"--outdir={tmp_path / 'out'}",
        *(a.format(trained=trained) for a in args),
    )
    assert not (tmp_path / "out").exists()


def test_networks_and_discriminators_that_do_not_fit(world, trained, tmp_path):
    others = dict(
        classes=random_network(),
        channels=random_network(label_dim=10, img_channels=3),
        resolution=random_network(label_dim=10, img_resolution=16),
    )
    found = dict(
        classes="8x8 .* 1 channel.* 3 classes",
        channels="8x8 .* 3 channel.* 10 classes",
        resolution="16x16 .* 1 channel.* 10 classes",
    )
    for name, net in others.items():
        persistence.save_snapshot(tmp_path / f"{name}.pkl", dict(ema=net, info={}))
        fail(
            1,
            "--discriminator: trained on 8x8 images with 1 channel.* and 10 classes; the network makes " + found[name],
            generate,
            f"--network={tmp_path / f'{name}.pkl'}",
            f"--discriminator={trained}",
            f"--outdir={tmp_path / 'out'}",
        )
    fail(1, "discriminator", generate, f"--network={trained}", f"--outdir={tmp_path / 'out'}")
    fail(
        1,
        "classifier",
        generate,
        f"--network={world / 'net.pkl'}",
        f"--discriminator={world / 'cls.pkl'}",
        f"--outdir={tmp_path / 'out'}",
    )


def test_published_edm_checkpoint_is_guided(tmp_path):
    path = FIXTURES / "edm_snapshot.pkl"
    net = persistence.load_snapshot(str(path))["ema"]
    torch.manual_seed(0)
    disc = Discriminator(net.img_resolution, net.img_channels, net.label_dim, depth="small", model_channels=8)
    for p in disc.parameters():
        p.data += 0.3 * torch.randn_like(p)
    info = dict(noise_rates=[0.4] * net.label_dim, right_shares=[0.5] * net.label_dim)
    persistence.save_snapshot(tmp_path / "d.pkl", dict(ema=disc, info=info))
    base = [f"--network={path}", "--seeds=0-2", "--steps=4", "--device=cpu"]
    succeed(generate, *base, f"--outdir={tmp_path / 'plain'}")
    for mode in ("constant", "calibrated"):
        succeed(
            generate,
            *base,
            f"--outdir={tmp_path / mode}",
            f"--discriminator={tmp_path / 'd.pkl'}",
            f"--dg_mode={mode}",
            "--dg_weight_1st_order=20",
        )
        assert (images(tmp_path / mode) != images(tmp_path / "plain")).any()


def test_sweep(world, trained, tmp_path, monkeypatch):
    loaded, load = [], persistence.load_snapshot

    def count(path, **kwargs):
        loaded.append(path)
        return load(path, **kwargs)

    monkeypatch.setattr(persistence, "load_snapshot", count)
    args = [
        f"--network={world / 'net.pkl'}",
        f"--discriminator={trained}",
        f"--data={world / 'digits.zip'}",
        "--detector=pixels",
        f"--outdir={tmp_path}",
        "--weights=2,0.5",
        "--seeds=0-39",
        "--steps=3",
        "--device=cpu",
    ]
    out = succeed(sweep, *args)
    assert len(loaded) == 2  # once for all settings
    rows = [line.split("|") for line in (tmp_path / "sweep.md").read_text().splitlines()[2:7]]
    assert (tmp_path / "sweep.md").read_text().splitlines()[-1].startswith("At equal FD")
    assert [(r[1].strip(), r[2].strip()) for r in rows] == [
        ("unguided", "0"),
        ("constant", "0.5"),
        ("constant", "2"),
        ("calibrated", "0.5"),
        ("calibrated", "2"),
    ]
    assert rows[0][5].strip() == "1.00" and (tmp_path / "sweep.png").stat().st_size > 5000 and "| unguided |" in out
    known = json.loads((tmp_path / "sweep.json").read_text())
    del known["results"]["constant-2"]  # interrupted there: the images may exist, the result does not
    (tmp_path / "sweep.json").write_text(json.dumps(known))
    again = succeed(sweep, *args)
    assert re.findall(r"\[(\d)/5\]", again) == ["3"] and (tmp_path / "sweep.md").read_text() in again + "\n"
    assert len(loaded) == 4
    succeed(sweep, *args)
    assert len(loaded) == 4  # nothing to measure
    fail(1, "sweep with other options", sweep, *args, "--steps=4")
    (tmp_path / "sweep.json").write_text("[")
    fail(1, "sweep.json", sweep, *args)
    persistence.save_snapshot(tmp_path / "uncond.pkl", dict(ema=random_network(label_dim=0), info={}))
    args += [f"--network={tmp_path / 'uncond.pkl'}", f"--outdir={tmp_path / 'u'}"]
    fail(1, "trained without labels", sweep, *args)
    fail(2, "must be above 0", sweep, *args, "--weights=0,1")


def test_sweep_without_clean_labels(world, trained, tmp_path):
    """The label file that the discriminator was trained with judges; the table says what that means."""
    record = json.loads(zipfile.ZipFile(world / "digits.zip").read("dataset.json"))
    del record["clean_labels"]
    data = tmp_path / "unknown.zip"
    with zipfile.ZipFile(world / "digits.zip") as source, zipfile.ZipFile(data, "w") as dest:
        for name in source.namelist():
            dest.writestr(name, json.dumps(record) if name == "dataset.json" else source.read(name))
    args = [
        f"--network={world / 'net.pkl'}",
        f"--discriminator={trained}",
        f"--data={data}",
        "--detector=pixels",
        "--modes=calibrated",
        "--weights=2",
        "--seeds=0-19",
        "--steps=2",
        "--device=cpu",
    ]
    said = "Nobody knows the clean labels. The judge learned [0-9]+ of the 160 labels of .*unknown.zip, those"
    out = succeed(sweep, *args, f"--outdir={tmp_path / 'sweep'}")
    assert re.search(said, out) and re.search(said, (tmp_path / "sweep/sweep.md").read_text())
    assert re.search(said, succeed(sweep, *args, f"--outdir={tmp_path / 'sweep'}"))  # nothing left to measure
    match = "--label-path: .*arr_0 has 100 entries"
    np.savez(tmp_path / "short.npz", np.ones(100))
    fail(1, match, sweep, *args, f"--outdir={tmp_path / 'b'}", f"--label-path={tmp_path / 'short.npz'}")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_published_commands(tmp_path, processes, monkeypatch):
    """The paper's two commands as they are typed, on a synthetic archive of CIFAR-10's layout."""
    monkeypatch.chdir(tmp_path)
    source, _, labels = make_cifar10(tmp_path / "cifar-10-python.tar.gz")
    assert (
        run_dataset_tool(
            f"--source={source}",
            f"--dest={tmp_path}/datasets/cifar10_sym_40-32x32.zip",
            "--noise_type=sym",
            "--noise_rate=0.4",
        )[0]
        == 0
    )
    np.savez(tmp_path / "flags.npz", np.arange(len(labels)) % 5 < 3)
    for script in ROOT.glob("*.py"):
        (tmp_path / script.name).symlink_to(script)
    net = random_network(img_resolution=32, img_channels=3, label_dim=10)
    persistence.save_snapshot(tmp_path / "net.pkl", dict(ema=net, info={}))

    def type_in(line):
        args = shlex.split(line)
        if processes == 1:  # without starting one
            return succeed(sys.modules[args[3].removesuffix(".py")], *args[4:])
        args[:1] = [sys.executable, "-m", "torch.distributed.run"]
        done = subprocess.run(
            args, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr

    type_in(
        f"torchrun --standalone --nproc_per_node={processes} train_discriminator.py --outdir=discriminator-runs "
        "--data=datasets/cifar10_sym_40-32x32.zip --label-path flags.npz --cond=1 --arch=ddpmpp --batch 1024 "
        "--simix 1 --duration=0.000001 --cbase=8 --cres=1,1"
    )
    type_in(
        f"torchrun --standalone --nproc_per_node={processes} generate.py --outdir=out --seeds=0-999 --batch=64 "
        "--network=net.pkl --discriminator=discriminator-runs/00000-*/network-snapshot-*.pkl --S_clip_min 1.5 "
        "--S_clip_max 50 --dg_weight_1st_order 0.9 --dg_weight_2nd_order 0.9 --seeds=0-4 --steps=4"
    )
    assert len(list((tmp_path / "out").glob("*.png"))) == 5
