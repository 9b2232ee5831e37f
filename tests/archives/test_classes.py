"""Labels that are not 0 .. C - 1: empty classes are named, get no noise, and can be renumbered."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import detect_noise
import dnnlib
import train
import train_classifier
from archives import label_noise
from archives.classes import check_class_numbers, describe_empty
from archives.dataset import ImageDataset
from archives.relabel import compact_labels
from archives.source import Source
from tests.support import synth
from tests.support.synth import run_dataset_tool as run

NOISE = ("sym", "pair", "instance")


def make(tmp_path, labels, **extra):
    """Return the path of an archive with these labels."""
    return str(synth.make_archive(tmp_path / "in.zip", synth.pictures(len(labels)), labels, **extra))


def build(source, dest, *args):
    code, out, err = run(f"--source={source}", f"--dest={dest}", *args)
    assert code == 0, err
    return ImageDataset(str(dest)), " ".join(out.split())


def test_networks_and_data_number_their_classes_alike():
    names = ["heron", "crane", "maillot", "crane"]  # as in ImageNet
    for theirs in (names, None, ["heron", "bird", "crane", "ship"], ["stork"]):
        check_class_numbers(theirs, "c.pkl", names, "d.zip")
        check_class_numbers(names, "c.pkl", theirs, "d.zip")
    with pytest.raises(dnnlib.UserError, match="class 'maillot' is number 0 of c.pkl, but number 2 of d.zip"):
        check_class_numbers(["maillot", "heron"], "c.pkl", names, "d.zip")


def test_vectors_have_a_name_for_each_entry(tmp_path):
    vectors = np.eye(3)[[0, 1, 2, 0]].tolist()
    path = make(tmp_path, vectors, class_names=["a", "b"])
    with pytest.raises(dnnlib.UserError, match='"class_names" has 2 names, but labels are vectors of length 3'):
        ImageDataset(path)
    code, _, err = run(f"--source={path}", f"--dest={tmp_path}/out.zip")
    assert code == 1 and "vectors of length 3" in err and not (tmp_path / "out.zip").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Empty classes.


@pytest.mark.parametrize(
    "labels, names, found",
    [([0, 1, 2], None, None), ([1, 2, 3], None, "1 of 4 classes have no images: 0"),
     ([0, 3, 7], None, "5 of 8 classes have no images: 1, 2, 4, 5, 6"),
     ([0, 30], None, "29 of 31 classes have no images: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 19 more"),
     ([0, 2], ["ant", "bee", "cat"], "1 of 3 classes have no images: bee")],
)  # fmt: skip
def test_empty_classes_are_named(labels, names, found):
    counts = np.bincount(labels, minlength=len(names or []))
    assert describe_empty(counts, names) == found


def test_the_summary_counts_images_by_class(tmp_path):
    _, out = build(make(tmp_path, [1, 2, 3, 3] * 3), tmp_path / "a.zip")
    assert "Classes: 4 0 (0), 1 (3), 2 (3), 3 (6) 1 of 4 classes have no images: 0" in out
    path = make(tmp_path, [0, 1, 1, 0], class_names=["no\x1b[1m", "yes", "perhaps"])
    _, out = build(path, tmp_path / "b.zip")
    assert "no?[1m (2), yes (2), perhaps (0) 1 of 3 classes have no images: perhaps" in out
    _, out = build(make(tmp_path, list(range(300))), tmp_path / "c.zip")
    assert "99 (1) and 200 more" in out and "no images" not in out


def test_training_and_detection_name_empty_classes(tmp_path):
    path = make(tmp_path, [1, 2, 3] * 4)
    args = [f"--data={path}", f"--outdir={tmp_path}/runs", "--cond=1", "--batch=4", "--device=cpu", "--dry-run"]
    args += ["--arch=ddpmpp_tiny", "--cbase=8"]
    for script in (train, train_classifier):
        result = CliRunner().invoke(script.main, args)
        assert result.exit_code == 0, result.output
        assert "Note: " in result.stdout and "1 of 4 classes have no images: 0" in result.stdout
    args = [f"--data={path}", f"--dest={tmp_path}/l.npz", "--epochs=1", "--foreign=0", "--device=cpu", "--batch=4"]
    result = CliRunner().invoke(detect_noise.main, args)
    assert result.exit_code == 0 and "1 of 4 classes have no images: 0" in result.stderr, result.output


@pytest.mark.parametrize("labels", [[1_234_567, 5, 7], [3, 3, 3], [0, (1 << 31) - 1]])
def test_more_classes_than_images(tmp_path, labels):
    """The largest label would make arrays of 16 GiB and matrices that no machine holds."""
    path = make(tmp_path, labels)
    for args in ([], ["--noise_type=sym", "--noise_rate=0.1"], ["--noise_type=instance", "--noise_rate=0.1"]):
        code, _, err = run(f"--source={path}", f"--dest={tmp_path}/a.zip", *args)
        assert code == 1 and err.startswith("Error: ") and err.count("\n") == 1
        assert f"{max(labels) + 1:,} classes for {len(labels)} images" in err and "--compact_labels" in err
    assert not (tmp_path / "a.zip").exists()
    args = [f"--data={path}", f"--outdir={tmp_path}/runs", "--cond=1", "--batch=1", "--device=cpu"]
    scripts = [(train, args), (train_classifier, args), (detect_noise, [args[0], f"--dest={tmp_path}/l.npz"])]
    for script, args in scripts:
        result = CliRunner().invoke(script.main, args)
        assert result.exit_code == 1 and result.stderr.startswith("Error: --data: "), result.output
        assert result.stderr.count("\n") == 1 and "classes for" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_classes_with_names_may_outnumber_the_images(tmp_path):
    data, out = build("digits", tmp_path / "a.zip", "--max-images=3")
    assert data.label_dim == 10 and "7 of 10 classes have no images" in out and len(data.class_notes()) == 1


def test_max_images_counts(tmp_path):
    path = make(tmp_path, list(range(20)))
    code, _, err = run(f"--source={path}", f"--dest={tmp_path}/a.zip", "--max-images=10")
    assert code == 0, err
    path = make(tmp_path, list(range(20))[::-1])
    code, _, err = run(f"--source={path}", f"--dest={tmp_path}/b.zip", "--max-images=10")
    assert code == 1 and "20 classes for 10 images" in err


# ---------------------------------------------------------------------------------------------------------------------
# Noise.


@pytest.mark.parametrize("noise_type", NOISE)
def test_no_noise_into_classes_without_images(tmp_path, noise_type):
    labels = [1, 2, 5] * 40
    data, _ = build(make(tmp_path, labels), tmp_path / "a.zip", f"--noise_type={noise_type}", "--noise_rate=0.6")
    np.testing.assert_array_equal(data.clean_labels, labels)
    assert set(data.labels.tolist()) == {1, 2, 5} and 0.4 < np.mean(data.labels != data.clean_labels) < 0.8
    if noise_type != "instance":
        counts = data.images_per_class(also_clean=True)
        T = label_noise.transition_matrix(noise_type, 0.6, 6, counts=counts)  # what training states
        np.testing.assert_array_equal(data.corruption["T"], T)
        assert (T[:, [0, 3, 4]] == np.eye(6)[:, [0, 3, 4]]).all() and T[1, 2] == (0.3 if noise_type == "sym" else 0.6)


@pytest.mark.parametrize("noise_type", ["sym", "pair", "asym"])
@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_matrices_do_not_change_where_all_classes_have_images(noise_type, rate):
    plain = label_noise.transition_matrix(noise_type, rate, 10, "mnist")
    np.testing.assert_array_equal(
        label_noise.transition_matrix(noise_type, rate, 10, "mnist", None, np.full(10, 3)), plain
    )


def test_asym_keeps_labels_that_would_turn_into_an_empty_class(tmp_path):
    labels = [2, 3, 5, 6] * 10  # of the digits, 2 turns into 7, 3 into 8
    path = make(tmp_path, labels, corruption=dict(family="mnist"), class_names=list("0123456789"))
    code, _, err = run(f"--source={path}", f"--dest={tmp_path}/a.zip", "--noise_type=asym", "--noise_rate=1")
    assert code == 0 and "Note: no noise for 2, 3: " in err
    assert ImageDataset(f"{tmp_path}/a.zip").labels.tolist() == [2, 3, 6, 5] * 10


def test_a_matrix_into_an_empty_class_is_refused(tmp_path):
    T = np.eye(4)
    T[2] = [0.25, 0, 0.75, 0]
    (tmp_path / "T.json").write_text(json.dumps(T.tolist()))
    args = ["--noise_type=matrix", f"--noise_matrix={tmp_path}/T.json"]
    code, _, err = run(f"--source={make(tmp_path, [1, 2, 3] * 2)}", f"--dest={tmp_path}/a.zip", *args)
    assert code == 1 and "turns label 2 into 0 (row 2, column 0), but no image has label 0" in err
    assert (
        run(f"--source={make(tmp_path, [0, 2, 3] * 2)}", f"--dest={tmp_path}/a.zip", *args)[0] == 0
    )  # row 1 is not used


def test_noise_needs_two_classes_with_images(tmp_path):
    path = make(tmp_path, [1, 1, 1])
    for noise_type in NOISE:
        code, _, err = run(
            f"--source={path}", f"--dest={tmp_path}/a.zip", f"--noise_type={noise_type}", "--noise_rate=1"
        )
        assert code == 1 and "at least 2 classes with images, found 1" in err


def test_a_class_whose_images_are_all_too_small_gets_no_noise(tmp_path):
    """It is left out by the transform, after the noise was planned."""
    for i in range(60):
        (tmp_path / f"in/{i % 3}").mkdir(parents=True, exist_ok=True)
        image = synth.pictures(1, 8 if i % 3 == 1 else 16)[0]
        (tmp_path / f"in/{i % 3}/{i}.png").write_bytes(synth.png(image))
    args = ["--transform=center-crop-wide", "--resolution=16x8", "--noise_type=pair", "--noise_rate=1"]
    data, out = build(tmp_path / "in", tmp_path / "a.zip", *args)
    assert data.clean_labels.tolist() == [0] * 20 + [2] * 20 and data.labels.tolist() == [2] * 20 + [0] * 20
    assert "1 of 3 classes have no images: 1" in out


# ---------------------------------------------------------------------------------------------------------------------
# Renumbering.


def test_compact_labels(tmp_path):
    labels = [1_234_567, 12, 700, 12]
    data, out = build(make(tmp_path, labels), tmp_path / "a.zip", "--compact_labels")
    assert data.labels.tolist() == [2, 0, 1, 0] and data.class_names == ["12", "700", "1234567"]
    assert "Classes: 3 12 (2), 700 (1), 1234567 (1) Resolution" in out
    again, _ = build(tmp_path / "a.zip", tmp_path / "b.zip", "--compact_labels")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    pairs = [[f"00000/img{i:08d}.png", c] for i, c in enumerate([3, 1, 1, 1])]
    path = make(
        tmp_path, [3, 1, 4, 1], class_names=list("abcde"), clean_labels=pairs, corruption=dict(T=np.eye(5).tolist())
    )
    data, _ = build(path, tmp_path / "c.zip", "--compact_labels")
    assert (data.labels.tolist(), data.clean_labels.tolist()) == ([1, 0, 2, 0], [1, 0, 0, 0])
    assert data.class_names == ["b", "d", "e"] and data.corruption["T"] is None


def test_numbers_of_millions_from_a_table(tmp_path):
    path = str(synth.make_archive(tmp_path / "in.zip", synth.pictures(3)))
    rows = [f"00000/img{i:08d}.png,{label}" for i, label in enumerate([9_000_001, 7, 9_000_001])]
    (tmp_path / "l.csv").write_text("\n".join(["file,label", *rows]))
    args = [f"--source={path}", f"--labels={tmp_path}/l.csv"]
    code, _, err = run(*args, f"--dest={tmp_path}/a.zip")
    assert code == 1 and "9,000,002 classes for 3 images" in err
    data, _ = build(path, tmp_path / "a.zip", args[1], "--compact_labels")
    assert data.labels.tolist() == [1, 0, 1] and data.class_names == ["7", "9000001"]


def test_compact_labels_of_the_first_images_with_noise(tmp_path):
    path = make(tmp_path, [5, 9] * 20 + [7] * 5)
    args = ["--compact_labels", "--max-images=40", "--noise_type=pair", "--noise_rate=1"]
    data, _ = build(path, tmp_path / "a.zip", *args)
    assert data.clean_labels.tolist() == [0, 1] * 20 and data.labels.tolist() == [1, 0] * 20
    assert data.class_names == ["5", "9"]


def test_compact_labels_without_classes(tmp_path):
    for labels in (None, [[0.5, 1.0]] * 3):
        path = str(synth.make_archive(tmp_path / "in.zip", synth.pictures(3), labels))
        code, _, err = run(f"--source={path}", f"--dest={tmp_path}/a.zip", "--compact_labels")
        assert code == 1 and err.startswith("Error: --compact_labels: ") and "no labels with one class per image" in err


def test_previous_labels_are_renumbered_too():
    source = Source("x", 3, None, labels=np.array([2, 4, 4]), previous_labels=np.array([4, 2, 4]))
    compact_labels(source)
    assert source.previous_labels.tolist() == [1, 0, 1]
    source = Source("x", 3, None, labels=np.array([2, 4, 4]), previous_labels=np.array([4, 3, 4]))
    compact_labels(source)
    assert source.labels.tolist() == [0, 1, 1] and source.previous_labels is None


def test_used_classes():
    assert label_noise.used_classes(np.array([0, 2, 1])).tolist() == [1, 2]
    with pytest.raises(dnnlib.UserError, match="found 0"):
        label_noise.used_classes(np.zeros(3))
