"""generate.py --resume: after any interruption it makes the missing images only, and never mixes in others."""

import json
import os
import re
import zipfile

import numpy as np
import pytest

import generate
from sampling import output, resume
from tests.support.generated import FAST, make, random_network, read, run
from torch_utils import persistence

NAMES = ["zero", "one", "two"]


@pytest.fixture(scope="module")
def pkl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    networks = {"cond": random_network(), "other": random_network(1), "large": random_network(img_resolution=16)}
    for name, net in networks.items():
        persistence.save_snapshot(folder / f"{name}.pkl", dict(ema=net, info=dict(class_names=NAMES)))
    return {name: folder / f"{name}.pkl" for name in networks}


@pytest.fixture
def seen(monkeypatch):
    """The images that are encoded, which counts those that are really made."""
    encode, calls = output._png, []
    monkeypatch.setattr(output, "_png", lambda image: calls.append(image) or encode(image))
    return calls


@pytest.fixture(scope="module")
def whole(pkl, tmp_path_factory):
    """What uninterrupted calls make: a folder and a ZIP of seeds 0 to 11."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("out", "out.zip"):
        make(folder / name, f"--network={pkl['cond']}", "--seeds=0-11", "--subdirs", "--batch=4")
    return folder


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def same(tmp_path, whole, name):
    if name == "out":
        return files(tmp_path / name) == files(whole / name)
    return os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("name", ["out", "out.zip"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), SystemExit(143)])
def test_an_interrupted_call_goes_on(pkl, whole, tmp_path, monkeypatch, name, error):
    encode, calls = output._png, []

    def fail_once(image):
        calls.append(image)
        if len(calls) == 10:
            raise error
        return encode(image)

    monkeypatch.setattr(output, "_png", fail_once)
    args = [f"--outdir={tmp_path / name}", f"--network={pkl['cond']}", "--seeds=0-11", "--subdirs", *FAST, "--resume"]
    stopped = run(*args, "--batch=4")
    assert stopped.exit_code in (1, 130, 143) and not (tmp_path / "out.zip").exists()
    if not isinstance(error, OSError):
        assert "Interrupted: the same command goes on" in stopped.output
    result = run(*args, "--batch=3")
    there = int(re.search(r"(\d+) of 12 images are there already", result.output)[1])
    assert result.exit_code == 0 and 8 <= there < 12 and same(tmp_path, whole, name)
    assert f"Generating {12 - there} images" in result.output


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_more_seeds_are_added_to_a_finished_call(pkl, whole, tmp_path, seen, name):
    args = [f"--network={pkl['cond']}", "--subdirs"]
    make(tmp_path / name, *args, "--seeds=0-4")
    seen.clear()
    text = make(tmp_path / name, *args, "--seeds=0-11", "--resume")
    assert len(seen) == 7 and "5 of 12 images are there already" in text and "5 network evaluations per image" in text
    assert same(tmp_path, whole, name)
    seen.clear()
    text = make(tmp_path / name, *args, "--seeds=0-11", "--resume")
    assert not seen and "0 images in" in text and same(tmp_path, whole, name)


def test_damaged_and_deleted_images_are_made_again(pkl, whole, tmp_path, seen):
    args = [f"--network={pkl['cond']}", "--subdirs", "--seeds=0-11"]
    make(tmp_path / "out", *args)
    (tmp_path / "out/000000/000003.png").write_bytes((tmp_path / "out/000000/000003.png").read_bytes()[:60])
    (tmp_path / "out/000000/000004.png").write_bytes(b"")
    (tmp_path / "out/000000/000011.png").unlink()
    seen.clear()
    make(tmp_path / "out", *args, "--resume")
    assert len(seen) == 3 and same(tmp_path, whole, "out")


def test_the_first_call_may_have_the_option_already(pkl, whole, tmp_path):
    for name in ("out", "out.zip"):
        make(tmp_path / name / name, f"--network={pkl['cond']}", "--seeds=0-11", "--subdirs", "--resume")
        assert same(tmp_path / name, whole, name)


@pytest.mark.parametrize(
    "code, words, args",
    [
        (1, "000000.png of another network, class or setting", ["--network=other"]),
        (1, "of another network", ["--steps=2"]),
        (1, "of another network", ["--class=one"]),
        (1, "shape (8, 8, 1), but the network makes (16, 16, 1)", ["--network=large"]),
        (1, "holds 000000.png, which this command does not make", ["--subdirs"]),
    ],
)
def test_images_of_other_settings_are_not_mixed_in(pkl, tmp_path, code, words, args):
    make(tmp_path / "out", f"--network={pkl['cond']}", "--seeds=0-5")
    before = files(tmp_path)
    args = [f"--network={pkl[arg[10:]]}" if arg.startswith("--network") else arg for arg in args]
    for prepare in (lambda: None, (tmp_path / "out/dataset.json").unlink):  # finished, and killed before its end
        prepare()
        result = run(f"--outdir={tmp_path}/out", f"--network={pkl['cond']}", "--seeds=0-9", *FAST, *args, "--resume")
        errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
        assert result.exit_code == code and len(errors) == 1 and words in errors[0], result.output
    before.pop("out/dataset.json")
    assert files(tmp_path) == before


@pytest.mark.parametrize("args", [["--network=other"], ["--class=zero,zero,one"]])
def test_a_zip_of_other_settings_stays_as_it_is(pkl, tmp_path, args):
    """The second call would give image 5 another class; it is none of those that are made again."""
    classes = "--class=zero,zero,one,zero,zero,two,zero,zero,one,zero,zero,one"
    make(tmp_path / "out.zip", f"--network={pkl['cond']}", "--seeds=0-11", classes)
    before = files(tmp_path)
    args = [f"--network={pkl[arg[10:]]}" if arg.startswith("--network") else arg for arg in args]
    result = run(f"--outdir={tmp_path}/out.zip", f"--network={pkl['cond']}", "--seeds=0-14", *FAST, *args, "--resume")
    assert result.exit_code == 1 and "of another network, class or setting" in result.output
    assert files(tmp_path) == before


def test_other_seeds_stay_and_are_listed(pkl, tmp_path):
    make(tmp_path / "out", f"--network={pkl['cond']}", "--seeds=3-5", "--class=two")
    make(tmp_path / "out", f"--network={pkl['cond']}", "--seeds=0-1", "--class=two", "--resume")
    labels = json.loads((tmp_path / "out/dataset.json").read_text())["labels"]
    assert labels == [[f"{seed:06d}.png", 2] for seed in (0, 1, 3, 4, 5)]
    assert read(tmp_path / "out")[0].shape == (5, 1, 8, 8)


def test_a_list_of_other_images_is_not_replaced(pkl, tmp_path):
    (tmp_path / "dataset.json").write_text('{"labels": [["mine.png", 0]]}')
    result = run(f"--outdir={tmp_path}", f"--network={pkl['cond']}", "--seeds=0-3", *FAST, "--resume")
    assert result.exit_code == 1 and "holds dataset.json, but no image that this command makes" in result.output
    assert (tmp_path / "dataset.json").read_text() == '{"labels": [["mine.png", 0]]}'


def test_without_the_option_it_is_named(pkl, tmp_path):
    make(tmp_path / "out.zip", f"--network={pkl['cond']}", "--seeds=0")
    make(tmp_path / "out", f"--network={pkl['cond']}", "--seeds=0")
    (tmp_path / "new.zip.partial").mkdir()
    for name in ("out", "out.zip", "new.zip"):
        result = run(f"--outdir={tmp_path / name}", f"--network={pkl['cond']}", "--seeds=0-3", *FAST)
        assert result.exit_code == 1 and "make the missing images with --resume" in result.output


def test_parts_of_a_killed_call_are_removed(tmp_path):
    for rank in (1, 7):
        with zipfile.ZipFile(tmp_path / f".a[1].zip.part{rank}.zip", "w"):
            pass
    output.save_images([([0], np.zeros([1, 8, 8, 1], np.uint8), np.array([1]))], str(tmp_path / "a[1].zip"))
    assert os.listdir(tmp_path) == ["a[1].zip"]


def during(monkeypatch, other):
    """Let `other()` run once when a call of generate.py is about to make its first image."""
    progress, calls = generate.progress, [other]

    def wait(*args):
        if calls:
            calls.pop()()
        yield from progress(*args)

    monkeypatch.setattr(generate, "progress", wait)


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_calls_that_run_at_the_same_time_list_the_images_of_both(pkl, whole, tmp_path, monkeypatch, resume):
    args = [f"--network={pkl['cond']}", "--subdirs", *resume]
    during(monkeypatch, lambda: make(tmp_path / "out", *args, "--seeds=7-11"))
    text = make(tmp_path / "out", *args, "--seeds=0-6")
    assert "holds images of another call" in text and "5 network evaluations per image" in text
    assert same(tmp_path, whole, "out")


def test_images_that_another_call_takes_back_meanwhile_are_left_out(pkl, tmp_path, monkeypatch):
    args, find = [f"--network={pkl['cond']}"], resume._find_seeds
    make(tmp_path / "out", *args, "--seeds=0-2")

    def found(path, *more):
        seeds = find(path, *more)
        return [*seeds, 9] if seeds else []  # 9 was there a moment ago

    monkeypatch.setattr(resume, "_find_seeds", found)
    assert "3 of 5 images are there already" in make(tmp_path / "out", *args, "--seeds=0-4", "--resume")
    listed = json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"]
    assert [name for name, _ in listed] == [f"{seed:06d}.png" for seed in range(5)]


def test_a_damaged_image_of_another_seed_does_not_stay_on_the_list(pkl, tmp_path):
    args = [f"--network={pkl['cond']}"]
    make(tmp_path / "out", *args, "--seeds=0-4")
    (tmp_path / "out" / "000004.png").write_bytes(b"damaged")
    make(tmp_path / "out", *args, "--seeds=0-3,7", "--resume")
    listed = json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"]
    assert [name for name, _ in listed] == [f"{seed:06d}.png" for seed in (0, 1, 2, 3, 7)]


def test_a_single_call_decodes_each_image_once_to_check_it(tmp_path, monkeypatch):
    persistence.save_snapshot(tmp_path / "a.pkl", dict(ema=random_network(label_dim=0), info={}))
    args, seen, decode = [f"--network={tmp_path}/a.pkl"], [], resume.decode_sample
    make(tmp_path / "out", *args, "--seeds=0-19")
    monkeypatch.setattr(resume, "decode_sample", lambda folder, name: seen.append(name) or decode(folder, name))
    make(tmp_path / "out", *args, "--seeds=0-20", "--resume")
    assert len(seen) == 20 + resume.SAMPLE


@pytest.mark.parametrize(
    "words, args",
    [
        ("000006.png of another network, class or setting", ["--network=other", "--seeds=6-7"]),
        ("of another network, class or setting", ["--class=one", "--seeds=6-7"]),
        ("000003.png: another call has written it meanwhile", ["--seeds=3-7"]),
    ],
)
def test_calls_at_the_same_time_must_fit_each_other(pkl, tmp_path, monkeypatch, words, args):
    args = [f"--network={pkl[arg[10:]]}" if arg.startswith("--network") else arg for arg in args]
    network, held = f"--network={pkl['cond']}", []

    def other():
        make(tmp_path / "out", network, *args)
        held.append(files(tmp_path))

    during(monkeypatch, other)
    result = run(f"--outdir={tmp_path}/out", network, "--seeds=0-4", *FAST)
    assert result.exit_code == 1 and words in result.output, result.output
    assert files(tmp_path) == held[0]


def test_a_zip_of_another_call_is_not_replaced(pkl, tmp_path, monkeypatch):
    args = [f"--network={pkl['cond']}"]
    during(monkeypatch, lambda: make(tmp_path / "out.zip", *args, "--seeds=0-2"))
    result = run(f"--outdir={tmp_path}/out.zip", *args, "--seeds=3-4", *FAST)
    assert result.exit_code == 1 and "out.zip: another call has written it meanwhile" in result.output
    assert len(read(tmp_path / "out.zip")[0]) == 3 and os.listdir(tmp_path) == ["out.zip"]


def test_images_that_two_calls_repair_stay_on_the_list(pkl, tmp_path, monkeypatch):
    args = [f"--network={pkl['cond']}"]
    make(tmp_path / "out", *args, "--seeds=0-5")
    for seed in (1, 4):
        (tmp_path / "out" / f"{seed:06d}.png").write_bytes(b"damaged")
    during(monkeypatch, lambda: make(tmp_path / "out", *args, "--seeds=0-2", "--resume"))
    make(tmp_path / "out", *args, "--seeds=3-5", "--resume")
    listed = json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"]
    assert sorted(name for name, _ in listed) == [f"{seed:06d}.png" for seed in range(6)]
