"""Outliers in an archive: how they are put in and recorded, the source `photos`, their cost, the outlier ratio."""

import json
import math
import zipfile
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import fid
from archives.dataset import ImageDataset
from metrics import label_accuracy
from metrics.fid import fid_from_features
from tests.support import synth
from tests.support.synth import run_dataset_tool as run
from training.noise_levels import DiffusionSteps
from training.transport_cost import TransportCost


def build(source, dest, *args):
    """Run the tool, which must succeed. Return the archive, with images [N, H, W, C] as `pixels`, output as `out`."""
    code, out, err = run(f"--source={source}", f"--dest={dest}", *args)
    assert code == 0, err
    data = ImageDataset(str(dest))
    data.pixels, data.out = data.images(range(len(data))).permute(0, 2, 3, 1).numpy(), out
    return data


def rows(images):
    return {image.tobytes() for image in images}


@pytest.fixture
def clean(tmp_path):
    """40 random 8x8 RGB images of 4 classes."""
    return synth.make_archive(tmp_path / "clean.zip", synth.pictures(40), (np.arange(40) % 4).tolist())


def gray_archive(path, images):
    return synth.make_archive(path, images.mean(3, keepdims=True).astype(np.uint8))


# ---------------------------------------------------------------------------------------------------------------------


def test_exactly_the_share_is_replaced_and_on_record(tmp_path, clean):
    other = synth.make_archive(tmp_path / "other.zip", synth.pictures(12, seed=1))
    args = [f"--outliers={other}", "--perturb_percent=25", "--seed=3"]
    data = build(clean, tmp_path / "a.zip", *args, "--workers=1")
    assert data.outliers.sum() == 10 and data.outliers.dtype == bool and "10 of the images" in data.out
    np.testing.assert_array_equal(data.pixels[~data.outliers], synth.pictures(40)[~data.outliers])
    assert len(rows(data.pixels[data.outliers]) & rows(synth.pictures(12, seed=1))) == 10  # none of them twice
    np.testing.assert_array_equal(data.labels, np.arange(40) % 4)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        listed = json.loads(archive.read("dataset.json"))["outliers"]
    assert listed == [name for name, foreign in zip(data.file_names, data.outliers, strict=True) if foreign]
    c = data.corruption
    assert (c["outlier_source"], c["outlier_rate"], c["outlier_seed"], c["seed"]) == (str(other), 0.25, 3, 3)

    build(clean, tmp_path / "b.zip", *args, "--workers=3")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert (build(clean, tmp_path / "c.zip", *args[:2], "--seed=4").outliers != data.outliers).any()
    none = build(clean, tmp_path / "d.zip", args[0], "--perturb-percent=0")
    assert none.outliers.sum() == 0 and build(clean, tmp_path / "e.zip").outliers is None


def test_outliers_take_the_size_and_channels_of_what_they_replace(tmp_path, clean):
    wide = np.zeros([16, 32, 3], np.uint8)
    wide[:, 8:24] = 30, 100, 200  # the central square; luma 90
    (tmp_path / "wide").mkdir()
    PIL.Image.fromarray(wide).save(tmp_path / "wide/a.png")
    gray = gray_archive(tmp_path / "gray.zip", synth.pictures(10))
    data = build(gray, tmp_path / "a.zip", f"--outliers={tmp_path / 'wide'}", "--perturb_percent=30")
    assert data.outliers.sum() == 3  # the only image, three times
    np.testing.assert_array_equal(data.pixels[data.outliers], 90)
    few = gray_archive(tmp_path / "few.zip", synth.pictures(4, 4, seed=2))
    data = build(clean, tmp_path / "b.zip", f"--outliers={few}", "--perturb_percent=25", "--resolution=16x16")
    outliers = data.pixels[data.outliers]
    assert outliers.shape == (10, 16, 16, 3) and (outliers == outliers[..., :1]).all()
    times = [sum(image.tobytes() == row for image in outliers) for row in rows(outliers)]
    assert sorted(times) == [2, 2, 3, 3]  # all are used before any is used again


def test_channels(tmp_path, clean):
    gray = build(clean, tmp_path / "gray.zip", "--channels=1")
    luma = synth.pictures(40) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(gray.pixels[..., 0], luma, atol=1)
    rgb = build("digits", tmp_path / "rgb.zip", "--channels=3", "--max-images=5")
    assert rgb.image_shape == (3, 8, 8) and (rgb.pixels == rgb.pixels[..., :1]).all()
    (tmp_path / "mixed").mkdir()
    PIL.Image.fromarray(synth.pictures(1)[0]).convert("L").save(tmp_path / "mixed/0.png")
    PIL.Image.fromarray(synth.pictures(1)[0]).save(tmp_path / "mixed/1.png")
    code, _, err = run(f"--source={tmp_path}/mixed", f"--dest={tmp_path}/m.zip")
    assert code == 1 and "--channels=1" in err
    np.testing.assert_array_equal(*build(tmp_path / "mixed", tmp_path / "m.zip", "--channels=1").pixels)


def test_the_record_survives(tmp_path):
    first = build("digits", tmp_path / "a.zip", "--outliers=photos", "--perturb_percent=10", "--max-images=100",
                  "--noise_type=sym", "--noise_rate=0.5", "--seed=7")  # fmt: skip
    assert first.outliers.sum() == 10 and (first.labels != first.clean_labels).sum() > 20
    build(tmp_path / "a.zip", tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    np.save(tmp_path / "l.npy", first.clean_labels)
    again = build(tmp_path / "a.zip", tmp_path / "c.zip", f"--labels={tmp_path}/l.npy")
    np.testing.assert_array_equal(again.outliers, first.outliers)
    some = build(tmp_path / "a.zip", tmp_path / "d.zip", "--max-images=50")
    np.testing.assert_array_equal(some.outliers, first.outliers[:50])
    assert {k for k in again.corruption if "outlier" in k} == {"outlier_source", "outlier_rate", "outlier_seed"}
    subset = ImageDataset(str(tmp_path / "a.zip"), use_labels=False, max_size=30, xflip=True)
    listed = {name for name, foreign in zip(first.file_names, first.outliers, strict=True) if foreign}
    assert subset.outliers.tolist() == [name in listed for name in subset.file_names] and subset.outliers.any()


def test_outliers_keep_the_seed_of_the_label_noise(tmp_path):
    build("digits", tmp_path / "a.zip", "--max-images=50", "--noise_type=sym", "--noise_rate=0.5", "--seed=7")
    both = build(tmp_path / "a.zip", tmp_path / "b.zip", "--outliers=digits", "--perturb_percent=10", "--seed=3")
    assert (both.corruption["seed"], both.corruption["outlier_seed"]) == (7, 3)


def test_images_that_are_left_out_do_not_shift_the_record(tmp_path):
    for i in range(20):
        (tmp_path / f"in/{i:02d}").mkdir(parents=True)
        size = (20, 10) if i % 3 == 0 else (20, 32)  # every third is too small
        PIL.Image.fromarray(np.full([*size, 3], 10 * i, np.uint8)).save(tmp_path / f"in/{i:02d}/a.png")
    data = build(tmp_path / "in", tmp_path / "a.zip", "--transform=center-crop-wide", "--resolution=16x8",
                 "--outliers=digits", "--perturb_percent=50")  # fmt: skip
    assert len(data) == 13 and 0 < data.outliers.sum() < 13
    bars = data.pixels[:, :4].max((1, 2, 3)) == 0, data.pixels[:, 8, 8, 0] == 10 * data.labels
    np.testing.assert_array_equal(~data.outliers, bars[0] & bars[1])


# ---------------------------------------------------------------------------------------------------------------------
# photos.


def test_photos_are_square_windows_of_the_two_photographs(tmp_path, monkeypatch):
    """The pixels of these photographs tell their place: red is the row, green the column, blue the photograph."""
    y, x = np.mgrid[:427, :640]
    photos = [np.stack([y / 2, x / 3, np.full_like(y, 255 * i)], axis=2).astype(np.uint8) for i in range(2)]
    bundle = SimpleNamespace(images=photos, filenames=["/a/one.jpg", "/a/two.jpg"])
    monkeypatch.setattr("sklearn.datasets.load_sample_images", lambda: bundle)
    data = build("photos", tmp_path / "a.zip", "--resolution=32x32", "--max-images=300", "--seed=1")
    assert len(data) == 300 and data.class_names == ["one", "two"] and data.family == "photos"
    np.testing.assert_array_equal(data.pixels[:, :, :, 2], 255 * data.labels[:, None, None].repeat(32, 1).repeat(32, 2))
    assert 0.4 < data.labels.mean() < 0.6
    red, green = data.pixels[:, :, 0, 0].astype(float), data.pixels[:, 0, :, 1].astype(float)
    tall, wide = ((v[:, -1] - v[:, 0]) * step * 32 / 31 for v, step in ((red, 2), (green, 3)))
    np.testing.assert_allclose(tall, wide, atol=8)  # square
    assert 60 <= tall.min() < 80 and 240 < tall.max() <= 262
    assert red.min() < 8 and red.max() > 205 and green.min() < 8 and green.max() > 205  # up to every edge


def test_photos_at_every_resolution(tmp_path):
    large = build("photos", tmp_path / "a.zip", "--max-images=20")
    assert large.image_shape == (3, 32, 32) and large.class_names == ["china", "flower"]
    small = build("photos", tmp_path / "b.zip", "--resolution=8x8", "--channels=1", "--max-images=8")
    luma = large.pixels[:8].reshape(8, 8, 4, 8, 4, 3).mean((2, 4)) @ [0.299, 0.587, 0.114]
    assert np.abs(small.pixels[..., 0] - luma).mean() < 4  # the same squares, of which fewer are the first ones
    other = build("photos", tmp_path / "c.zip", "--max-images=20", "--seed=1")
    assert not rows(other.pixels) & rows(large.pixels) and len(rows(large.pixels)) == 20


# ---------------------------------------------------------------------------------------------------------------------
# Their transport cost.


@pytest.mark.parametrize("source, outliers, size", [("photos", "digits", 8), ("digits", "photos", 16)])
def test_outliers_are_expensive_by_the_robust_cost_whatever_the_paper_s_cost_says(tmp_path, source, outliers, size):
    args = [f"--outliers={outliers}", "--perturb_percent=15", f"--resolution={size}x{size}", "--channels=1"]
    data = build(source, tmp_path / "a.zip", *args, "--max-images=600")
    steps, cpu = DiffusionSteps(2), torch.device("cpu")
    cost = TransportCost("robust", data, steps, cpu)
    c = cost.of_training()
    assert c[data.outliers].mean() > 20 * c[~data.outliers].mean() and c[data.outliers].mean() > 0.5
    assert cost.distance.core[data.outliers].mean() <= 0.01
    x_0 = torch.from_numpy(data.pixels.transpose(0, 3, 1, 2) / 127.5 - 1).float()
    seen = cost(x_0, x_0, torch.zeros(600, dtype=torch.int64)).numpy()  # images of the core are their own neighbors
    np.testing.assert_allclose(seen[~cost.distance.core], c[~cost.distance.core], atol=1e-3)
    a, b = (
        TransportCost("pixels", data, steps, cpu).of_training()[mask].mean() for mask in (~data.outliers, data.outliers)
    )
    assert b > 1.1 * a if outliers == "digits" else b < 0.9 * a  # by the paper's cost only digits are expensive


# ---------------------------------------------------------------------------------------------------------------------
# Outlier ratio.


@pytest.fixture
def shades(tmp_path):
    """Dark images are clean, bright ones are outliers: 12 of the 60 real images, 15 of the 50 generated ones."""
    rng = np.random.default_rng(0)

    def draw(n, bright):
        images = rng.integers(0, 100, [n, 8, 8, 1])
        images[rng.permutation(n)[:bright]] += 100
        return images.astype(np.uint8)

    real, made = draw(60, 12), draw(50, 15)
    outliers = real.mean((1, 2, 3)) > 100
    labels = np.where(outliers, 2, np.arange(60) % 2).tolist()
    listed = [f"00000/img{i:08d}.png" for i in np.flatnonzero(outliers)]
    paths = {name: tmp_path / f"{name}.zip" for name in ("data", "plain", "fake")}
    synth.make_archive(paths["data"], real, labels, outliers=listed)
    synth.make_archive(paths["plain"], real, labels)
    synth.make_archive(paths["fake"], made)
    return SimpleNamespace(real=real, made=made, outliers=outliers, **paths)


def evaluate(tmp_path, images, data, *args):
    """Return exit code, table and output of `fid.py evaluate` on pixels."""
    out = tmp_path / "table.json"
    args = [f"--images={images}", f"--data={data}", "--detector=pixels", "--device=cpu", f"--out={out}", *args]
    result = CliRunner().invoke(fid.main, ["evaluate", *map(str, args)])
    return result.exit_code, json.loads(out.read_text()) if out.exists() else None, result.output


def flat(images):
    return images.reshape(len(images), -1) / 127.5 - 1


def test_outlier_ratio_and_the_clean_reference(tmp_path, shades):
    code, table, text = evaluate(tmp_path, shades.fake, shades.data)
    assert code == 0, text
    assert table["metrics"]["outlier_ratio"] == 15 / 50
    found = table["outliers"]
    assert (found["training_share"], found["accuracy"], found["num"]) == (0.2, 1, 12)
    assert found["name"] == "SVM on pixels features" and found["data"] == str(shades.data)
    clean = fid_from_features(flat(shades.real[~shades.outliers]), flat(shades.made))
    assert table["metrics"]["fid"] == pytest.approx(clean, rel=1e-6)
    assert (table["num_reference"], table["reference_outliers"]) == (48, 12)
    assert "48, labels as they are" in text and "12 outliers left out" in text and "share 0.200" in text
    made = synth.make_archive(tmp_path / "made.zip", shades.made, [0, 1] * 25)
    _, table, _ = evaluate(tmp_path, made, shades.data)
    even, odd = np.bincount(np.flatnonzero(~shades.outliers) % 2)
    assert {c: v["num_reference"] for c, v in table["classes"].items()} == {"0": even, "1": odd}  # without class 2


def test_a_reference_says_that_it_counts_outliers(tmp_path, shades):
    args = ["ref", f"--data={shades.data}", f"--dest={tmp_path / 'ref.npz'}", "--detector=pixels"]
    said = CliRunner().invoke(fid.main, args).output
    assert f"{len(shades.real)} images, {shades.outliers.sum()} recorded outliers among them." in said


def test_outlier_data(tmp_path, shades):
    _, table, _ = evaluate(tmp_path, shades.fake, shades.plain)
    assert table["outliers"] is None and "outlier_ratio" not in table["metrics"]
    listed = [f"00000/img{i:08d}.png" for i in np.flatnonzero(shades.outliers[:40])]
    record = synth.make_archive(tmp_path / "record.zip", shades.real[:40], outliers=listed)
    _, table, text = evaluate(tmp_path, shades.fake, shades.plain, f"--outlier_data={record}")
    assert table["metrics"]["outlier_ratio"] == 0.3 and table["outliers"]["data"] == str(record)
    assert table["outliers"]["training_share"] == shades.outliers[:40].mean() > 0
    assert (table["num_reference"], table["reference_outliers"]) == (60, 0) and "left out" not in text
    whole = fid_from_features(flat(shades.real), flat(shades.made))
    assert table["metrics"]["fid"] == pytest.approx(whole, rel=1e-6)


def test_a_label_file_takes_the_place_of_the_record(tmp_path, shades):
    """The table is the same as with the truth on record."""
    _, truth, _ = evaluate(tmp_path, shades.fake, shades.data)
    names = np.array([f"00000/img{i:08d}.png" for i in range(60)])
    np.savez(tmp_path / "found.npz", names=names[::-1], is_outlier=shades.outliers[::-1])
    code, table, text = evaluate(tmp_path, shades.fake, shades.plain, f"--outlier_data={tmp_path}/found.npz")
    assert code == 0, text
    assert table["metrics"] == truth["metrics"] and table["metrics"]["outlier_ratio"] == 0.3
    assert table["reference_outliers"] == 12


def test_too_few_outliers_to_learn_from(tmp_path, shades):
    few = synth.make_archive(tmp_path / "few.zip", shades.real, outliers=[f"00000/img{i:08d}.png" for i in range(4)])
    code, table, text = evaluate(tmp_path, shades.fake, few)
    assert code == 0 and table["metrics"]["outlier_ratio"] is table["outliers"] is None
    assert "needs 5 images of either kind, found 4 outliers of 60" in text


def test_a_rare_class_weighs_as_much():
    """For two normal densities at a distance of 3 standard deviations, each class has Phi(1.5) right answers.

    One of them is 5% of the data.
    """
    rng = np.random.default_rng(0)
    rare = np.arange(4000) % 20 == 0
    machine = label_accuracy.SvmJudge(rng.normal(size=[4000, 1]) + 3 * rare[:, None], rare, balanced=True)
    phi = 0.5 + 0.5 * math.erf(1.5 / math.sqrt(2))
    assert machine.accuracy == pytest.approx(phi, abs=0.06)
    for shift in (0, 3):
        right = machine.predict(rng.normal(size=[2000, 1]) + shift) == (shift > 0)
        assert right.mean() == pytest.approx(phi, abs=0.06)
    # Features without information: of the held-out images one class is all right, and the other all wrong.
    labels = np.repeat([True, False], [5, 495])
    blind = [label_accuracy.SvmJudge(np.zeros([500, 1]), labels, seed, balanced=True) for seed in range(8)]
    assert [machine.accuracy for machine in blind] == 8 * [0.5]
    few = label_accuracy.SvmJudge(np.zeros([500, 1]), labels, max_images=20, balanced=True)
    assert few.accuracy == 0.5 and few.fitted == 20
    np.testing.assert_allclose(few._machine.class_weight_, [20 / 2 / 15, 20 / 2 / 5])  # all five are among them


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(outlier="plain"), "--outlier_data: {d}/plain.zip records no outliers"),
        (
            dict(outlier="large"),
            "--outlier_data: {d}/large.zip has 16x16 gray images, but {d}/data.zip has 8x8 gray",
        ),
        (dict(outlier="some", suffix="npz"), "--outlier_data: {d}/some.npz: lacks 59 of the 60 images of {d}/data.zip"),
        (dict(data="all"), "--data: {d}/all.zip records 60 of its 60 images as outliers"),
        (dict(outlier="none"), "none.zip"),
    ],
)
def test_bad_records(tmp_path, shades, change, message):
    names = [f"00000/img{i:08d}.png" for i in range(60)]
    synth.make_archive(tmp_path / "large.zip", synth.pictures(20, 16, 1), outliers=names[:10])
    synth.make_archive(tmp_path / "all.zip", shades.real, outliers=names)
    np.savez(tmp_path / "some.npz", names=names[:1], is_outlier=[True])
    args = (
        [f"--outlier_data={tmp_path}/{change['outlier']}.{change.get('suffix', 'zip')}"] if "outlier" in change else []
    )
    code, table, text = evaluate(tmp_path, shades.fake, tmp_path / f"{change.get('data', 'data')}.zip", *args)
    assert code == 1 and table is None and text.count("\n") == 1 and message.format(d=tmp_path) in text, text


# ---------------------------------------------------------------------------------------------------------------------
# Bad input.


@pytest.mark.parametrize("args, code, message", [
    (["--outliers=digits"], 2, "--outliers=digits needs --perturb_percent"),
    (["--perturb_percent=5"], 2, "--perturb_percent needs --outliers"),
    (["--outliers=digits", "--perturb_percent=101"], 2, "101"),
    (["--outliers=digits", "--perturb_percent=nan"], 2, "nan"),
    (["--outliers={d}/nothing", "--perturb_percent=5"], 1, "--outliers: {d}/nothing: no such file"),
    (["--outliers={d}/broken", "--perturb_percent=100"], 1, "broken: a.png: truncated"),
    (["--source={d}/has.zip", "--outliers=digits", "--perturb_percent=5"], 1, "has.zip has outliers on record"),
    (["--source={d}/names.zip"], 1, "\"outliers\" names 'x.png'"),
    (["--source={d}/form.zip"], 1, '"outliers" must be a list of file names'),
    (["--channels=2"], 2, "'2'"),
    (["--source=photos", "--eval"], 1, "photos has no test part"),
])  # fmt: skip
def test_bad_input(tmp_path, clean, args, code, message):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(synth.png(synth.pictures(1)[0])[:-30])
    for name, listed in (("has", ["00000/img00000000.png"]), ("names", ["x.png"]), ("form", {"x.png": True})):
        synth.make_archive(tmp_path / f"{name}.zip", synth.pictures(2), outliers=listed)
    args = [arg.format(d=tmp_path) for arg in args]
    source = [] if args[0].startswith("--source") else [f"--source={clean}"]
    found, out, err = run(*source, f"--dest={tmp_path}/new.zip", *args)
    assert (found, out) == (code, "") and not (tmp_path / "new.zip").exists()
    assert err.startswith("Error: ") and err.count("\n") == 1 and message.format(d=tmp_path) in err, err
