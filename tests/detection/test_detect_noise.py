"""detect_noise.py: what it writes and prints, cleaned archives, bad input."""

import math
import shutil
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import dataset_tool
import detect_noise
import dnnlib
import train_classifier
from archives.dataset import ImageDataset, to_float
from archives.label_file import flagged_labels, load_label_file, save_label_file
from archives.label_noise import load_matrix
from archives.label_table import load_labels_or_table
from archives.reader import ArchiveReader
from detection.bayes import judge
from detection.options import METHODS
from detection.quality import label_file, quality
from tests.support.commands import callers
from tests.support.runs import torchrun
from tests.support.synth import make_archive, pictures
from torch_utils import persistence
from training.objectives.tdsm import posterior_weights
from training.transition_estimate import noise_rate

pytestmark = pytest.mark.slow
succeed, fail = callers(detect_noise.main)


def make_noisy(source, path):
    result = CliRunner().invoke(
        dataset_tool.main, [f"--source={source}", f"--dest={path}", "--noise_type=sym", "--noise_rate=0.4", "--seed=0"]
    )
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """120 noisy images of a bright bar in one of three places; 40% of the labels are wrong."""
    folder = tmp_path_factory.mktemp("data")
    images, labels = pictures(120, channels=1) // 4, np.arange(120) % 3
    for c in range(3):
        images[labels == c, 3 * c : 3 * c + 2] += 190
    make_archive(folder / "clean.zip", images, labels.tolist(), class_names=["top", "middle", "bottom"])
    return make_noisy(folder / "clean.zip", folder / "d.zip")


TINY = ["--epochs=12", "--batch=16", "--device=cpu"]


@pytest.fixture(scope="module")
def detected(data, tmp_path_factory):
    """The folder and the output of a short run that writes everything it can."""
    folder = tmp_path_factory.mktemp("detected")
    output = succeed(f"--data={data}", f"--dest={folder}/new/labels.npz", f"--cleaned={folder}/clean.zip", *TINY)
    return folder, output


def test_what_is_written_and_printed(data, detected):
    folder, output = detected
    assert sorted(p.name for p in (folder / "new").iterdir()) == [
        "labels-classifier.pkl",
        "labels.csv",
        "labels.npz",
        "labels.png",
    ]
    dataset = ImageDataset(str(data))
    found = load_label_file(folder / "new" / "labels.npz", dataset)
    wrong = (~found.is_clean).sum()
    q = quality(found.is_clean, dataset.labels, dataset.clean_labels)
    assert 0 < wrong < 120 and q["f1"] > 0.8  # guessing 40% of the images at random would give 0.4
    limits = "{:.1%} to {:.1%}".format(*found.noise_interval)
    rate = f"about {found.noise_rate:.1%} of 120 labels are wrong ({limits}; in truth 4"
    for text in (rate, f"Flagged:     {wrong} labels", f"F1 {q['f1']:.4f}", "T, %"):
        assert text in output
    assert "epoch 12/12  " in output and " images/s  time " in output and "left 0s" in output
    assert (found.suggested != dataset.labels).sum() == wrong and found.transition.shape == (3, 3)
    with PIL.Image.open(folder / "new" / "labels.png") as picture:
        columns = math.ceil(math.sqrt(min(wrong, 64)))
        assert picture.width == columns * 69 + 5
    snapshot = persistence.load_snapshot(folder / "new" / "labels-classifier.pkl", kind="classifier")
    info = snapshot["info"]
    assert snapshot["ema"].label_dim == 3 and info["method"] == "detector"
    # What generate.py judges images by: at this temperature, the classifier states the rate that T implies.
    x = to_float(dataset.images(np.arange(120)))
    temp = math.exp(info["temperature"]["coefficients"][0])
    log_probs = torch.log_softmax(snapshot["ema"](x) / temp, dim=1)
    right = posterior_weights(log_probs, torch.tensor(info["transition"]), torch.from_numpy(dataset.labels))
    stated = 1 - right[range(120), dataset.labels].mean()
    assert float(stated) == pytest.approx(noise_rate(np.array(info["transition"]), dataset.labels), abs=0.02)
    assert 0.2 < temp < 10 and info["noise_rates"] == pytest.approx(found.per_class_noise_rate)


def test_same_seed_same_file_other_seed_another(data, detected, tmp_path):
    folder, _ = detected
    for seed in (0, 1):
        dest, picture = f"--dest={tmp_path}/{seed}.npz", f"--picture={tmp_path}/p.png"
        succeed(f"--data={data}", dest, picture, f"--seed={seed}", *TINY)
    paths = folder / "new" / "labels.npz", tmp_path / "0.npz", tmp_path / "1.npz"
    first, same, other = (np.load(path)["score"] for path in paths)
    assert (first == same).all() and (first != other).any()
    assert (tmp_path / "p.png").exists() and not (tmp_path / "0.png").exists()


def test_cleaned_archives(data, detected, tmp_path):
    folder, _ = detected
    cls = folder / "new" / "labels-classifier.pkl"
    dest, drop = f"--dest={tmp_path}/l.npz", f"--cleaned={tmp_path}/drop.zip"
    succeed(f"--data={data}", dest, f"--cls={cls}", drop, "--fix=drop")
    original = ImageDataset(str(data))
    for path, labels, fix in (
        (folder / "clean.zip", folder / "new" / "labels.npz", "relabel"),
        (tmp_path / "drop.zip", tmp_path / "l.npz", "drop"),
    ):
        found, cleaned = load_label_file(labels, original), ImageDataset(str(path))
        sure = found.is_clean if fix == "drop" else found.is_clean | (found.suggested_score >= 0.9)
        rows = np.flatnonzero(sure)
        assert (cleaned.labels == found.suggested[rows]).all() and (cleaned.labels != original.labels[rows]).any() == (
            fix == "relabel"
        )
        assert (cleaned.clean_labels == original.clean_labels[rows]).all() and len(cleaned) == len(rows)
        assert torch.equal(cleaned.images(range(len(rows))), original.images(rows))
        assert cleaned.class_names == original.class_names and cleaned.label_dim == 3
        c = cleaned.corruption
        assert c["T"] is None and c["cleaned"]["before"]["noise_rate"] == 0.4
        assert (c["cleaned"]["fix"], c["cleaned"]["images"]) == (fix, (~found.is_clean).sum())
        assert c["realised_rate"] == np.mean(cleaned.labels != cleaned.clean_labels) < 0.3  # it was 0.4


def test_foreign_images_and_duplicates_are_written_and_left_out(data, detected, tmp_path):
    folder, output = detected
    dataset = ImageDataset(str(data))
    found = load_label_file(folder / "new" / "labels.npz", dataset)
    assert found.outlier_score.shape == (120,) and (found.duplicate_of == np.arange(120)).all()
    assert f"Foreign:     {found.is_outlier.sum()} of 120 images" in output and "Duplicates:  0 groups" in output
    table = load_labels_or_table(folder / "new" / "labels.csv", dataset)
    assert (table.is_clean == found.is_clean).all() and (table.suggested == found.suggested).all()
    found.is_outlier = np.arange(120) % 40 == 3
    save_label_file(tmp_path / "l.npz", found)
    args = [f"--data={data}", f"--labels={tmp_path}/l.npz", f"--dest={tmp_path}/out.npz"]
    output = succeed(*args, f"--cleaned={tmp_path}/c.zip", "--drop_foreign")
    assert "Foreign:     3 of 120 images" in output and "epoch" not in output
    left = np.flatnonzero(~found.is_outlier & (found.is_clean | (found.suggested_score >= 0.9)))
    cleaned = ImageDataset(str(tmp_path / "c.zip"))
    assert torch.equal(cleaned.images(range(len(left))), dataset.images(left)) and len(cleaned) == len(left)
    assert (cleaned.labels == found.suggested[left]).all()
    found.is_outlier = found.outlier_score = None
    save_label_file(tmp_path / "l.npz", found)
    fail(1, *args, "--foreign=0", f"--cleaned={tmp_path}/d.zip", "--drop_foreign", "--drop_foreign|which images")
    line = f"{found.names[0]},{dataset.class_names[dataset.labels[0]]},drop,"
    (tmp_path / "d.csv").write_text(f"file,label,decision,new_label\n{line}\n")
    fail(1, *args, "--foreign=0", f"--cleaned={tmp_path}/d.zip", "--drop_foreign", f"--decisions={tmp_path}/d.csv",
         "--drop_foreign|which images")  # fmt: skip
    assert not (tmp_path / "d.zip").exists()


def test_a_look_leaves_an_unfinished_training_alone(data, detected, tmp_path):
    (tmp_path / "l-training.pt").write_bytes(b"of a long training")
    succeed(f"--data={data}", f"--labels={detected[0] / 'new' / 'labels.npz'}", f"--dest={tmp_path}/l.npz")
    assert (tmp_path / "l-training.pt").read_bytes() == b"of a long training"


def test_a_second_call_replaces_the_files_of_the_first_one(data, tmp_path):
    """Even if the label file holds flags alone. The picture goes where no label is believed wrong."""
    dataset = ImageDataset(str(data))
    for flags in (np.arange(len(dataset)) > 3, np.ones(len(dataset), bool)):
        save_label_file(tmp_path / "p.npz", flagged_labels(dataset.file_names, dataset.labels, flags, 3))
        succeed(f"--data={data}", f"--labels={tmp_path}/p.npz", f"--dest={tmp_path}/l.npz", "--foreign=0")
        assert (tmp_path / "l.png").exists() == (not flags.all())
        assert (np.load(tmp_path / "l.npz")["is_clean"] == flags).all()


@pytest.mark.parametrize("fix", ["relabel", "drop"])
def test_decisions_are_believed(data, detected, tmp_path, fix):
    labels = detected[0] / "new" / "labels.npz"
    dataset = ImageDataset(str(data))
    found = load_label_file(labels, dataset)
    wrong, right = np.flatnonzero(~found.is_clean), np.flatnonzero(found.is_clean)
    keep, relabel, drop = wrong[0], right[0], right[1]
    new = (dataset.labels[relabel] + 1) % 3
    rows = [(keep, "keep", ""), (relabel, "relabel", dataset.class_names[new]), (drop, "drop", "")]
    lines = [f"{found.names[i]},{dataset.class_names[dataset.labels[i]]},{what},{to}" for i, what, to in rows]
    (tmp_path / "d.csv").write_text("\n".join(["file,label,decision,new_label", *lines]) + "\n")
    output = succeed(
        *(f"--data={data}", f"--labels={labels}", f"--decisions={tmp_path}/d.csv", f"--dest={tmp_path}/l.npz"),
        *(f"--cleaned={tmp_path}/c.zip", f"--fix={fix}"),
    )
    assert "Decisions:   1 kept, 1 relabeled, 1 dropped" in output
    after = load_label_file(tmp_path / "l.npz", dataset)
    changed = np.flatnonzero(after.is_clean != found.is_clean)
    assert sorted(changed) == sorted([keep, relabel, drop]) and after.suggested[relabel] == new
    assert after.noise_rate == pytest.approx(1 - after.score.mean()) and f"{after.noise_rate:.1%} of 120" in output
    unsure = ~after.is_clean & (after.suggested_score < 0.9)
    left = (np.arange(120) != drop) & ~unsure if fix == "relabel" else after.is_clean | (np.arange(120) == relabel)
    cleaned = ImageDataset(str(tmp_path / "c.zip"))
    assert torch.equal(cleaned.images(range(len(cleaned))), dataset.images(np.flatnonzero(left)))
    expected = after.suggested.copy() if fix == "relabel" else after.labels.copy()
    expected[relabel] = new  # in any case: a person said so
    assert (cleaned.labels == expected[left]).all()


def test_a_given_classifier_is_not_trained(data, detected, tmp_path):
    folder, _ = detected
    cls = folder / "new" / "labels-classifier.pkl"
    shutil.copy(cls, tmp_path / "l-classifier.pkl")
    output = succeed(f"--data={data}", f"--dest={tmp_path}/l.npz", f"--cls={tmp_path}/l-classifier.pkl")
    assert "epoch" not in output and (tmp_path / "l-classifier.pkl").read_bytes() == cls.read_bytes()
    dataset, net = ImageDataset(str(data)), persistence.load_snapshot(cls)["ema"]
    x = dataset.load().float() / 127.5 - 1
    expected = judge(net(x, torch.tensor(0.002)).log_softmax(1).numpy(), dataset.labels)
    score = expected.posterior[np.arange(120), dataset.labels]
    np.testing.assert_allclose(load_label_file(tmp_path / "l.npz", dataset).score, score, rtol=1e-3, atol=1e-6)


def test_vector_labels_without_names_keep_their_classes(tmp_path):
    onehot = np.eye(3)[[0, 1, 0, 1]].tolist()
    path = make_archive(tmp_path / "a.zip", pictures(4), onehot)
    succeed(f"--data={path}", f"--dest={tmp_path}/l.npz", f"--cleaned={tmp_path}/c.zip", "--epochs=1", "--unsure=keep")
    assert ImageDataset(str(tmp_path / "c.zip")).label_dim == 3


def test_estimated_transition_trains_a_classifier(data, detected, tmp_path):
    folder, _ = detected
    labels = folder / "new" / "labels.npz"
    T = load_matrix(str(labels), 3)
    np.testing.assert_allclose(T, load_label_file(labels, ImageDataset(str(data))).transition)
    result = CliRunner().invoke(
        train_classifier.main,
        [
            f"--outdir={tmp_path}",
            f"--data={data}",
            "--arch=ddpmpp_tiny",
            "--cbase=8",
            "--batch=32",
            "--augment=0",
            "--duration=0.000032",
            "--nosubdir",
            "--noise_type=matrix",
            f"--noise_matrix={labels}",
        ],
    )
    assert result.exit_code == 0, result.output
    info = persistence.load_snapshot(persistence.find_snapshot(tmp_path))["info"]
    np.testing.assert_allclose(info["transition"], T, atol=1e-6)
    np.savez(tmp_path / "other.npz", arr_0=T)
    with pytest.raises(dnnlib.UserError, match="other.npz: holds no 'transition' .there are: arr_0"):
        load_matrix(str(tmp_path / "other.npz"))


def test_bad_input(data, detected, tmp_path):
    folder, _ = detected
    cls, dest = f"--cls={folder / 'new' / 'labels-classifier.pkl'}", f"--dest={tmp_path}/l.npz"
    fail(2, f"--data={data}", f"--dest={tmp_path}/l.txt", "--dest|.npz")
    fail(2, f"--data={data}", dest, cls, "--epochs=3", "--cls|--epochs")
    for method in ("confident", "gce"):
        fail(2, f"--data={data}", dest, cls, f"--method={method}", "--cls|--method")
    fail(2, f"--data={data}", dest, "--fix=drop", "--fix|--cleaned")
    keep = f"--cleaned={tmp_path}/c.zip", "--fix=keep"
    fail(2, f"--data={data}", dest, *keep, "--fix=keep|--drop_foreign")
    fail(2, f"--data={data}", dest, *keep, "--drop_foreign", "--decisions=d.csv", "--fix=keep|--decisions")
    labels = f"--labels={folder / 'new' / 'labels.npz'}"
    fail(2, f"--data={data}", dest, "--drop_foreign", "--drop_foreign|--cleaned")
    fail(2, f"--data={data}", dest, "--drop_foreign", "--foreign=0", f"--cleaned={tmp_path}/c.zip", "--foreign=1")
    fail(2, f"--data={data}", dest, cls, labels, "--labels|--cls")
    fail(2, f"--data={data}", dest, labels, "--method=cores", "--labels|--method")
    fail(1, f"--data={data}", dest, f"--labels={tmp_path}/none.npz", "--labels|none.npz")
    fail(1, f"--data={data}", dest, f"--decisions={tmp_path}/none.csv", "--decisions|none.csv")
    tiny = make_archive(tmp_path / "u.zip", pictures(4)[:, :4, :4], [0, 1, 0, 1])
    fail(1, f"--data={tiny}", dest, "--method=cores", "levels are too many for images of 4 pixels|conv")
    mine = tmp_path / "mine.csv"
    mine.write_text("file,label\na.png,cat\n")
    fail(1, f"--data={data}", labels, f"--dest={tmp_path}/mine.npz", "mine.csv: exists|choose another name")
    assert mine.read_text() == "file,label\na.png,cat\n"
    mine.unlink()
    for name, how in (("mine.png", [labels]), ("mine-classifier.pkl", ["--epochs=1"])):
        mine = tmp_path / name
        mine.write_text("not yours")
        fail(1, f"--data={data}", *how, f"--dest={tmp_path}/mine.npz", f"{name}: exists|choose another name")
        assert mine.read_text() == "not yours"
        mine.unlink()
    number = ImageDataset(str(data)).num_raw
    people = flagged_labels([f"{i}.png" for i in range(number)], np.zeros(number, np.int64), np.arange(number) > 3, 3)
    save_label_file(tmp_path / "mine-labels.npz", people)  # as dataset_tool.py writes what people have looked at
    np.savez(tmp_path / "mine.npz", pictures(4))
    for name in ("mine.npz", "mine-labels.npz"):
        before = (tmp_path / name).read_bytes()
        fail(1, f"--data={data}", labels, f"--dest={tmp_path}/{name}", f"{name}: exists|choose another name")
        assert (tmp_path / name).read_bytes() == before
        (tmp_path / name).unlink()
    fail(2, f"--data={data}", f"--dest={tmp_path / 'no' / 'l.npz'}", f"--picture={tmp_path}", "--picture|folder")
    fail(1, f"--data={data}", dest, f"--cleaned={folder}", "choose another name")
    fail(1, f"--data={data}", dest, f"--cls={data}", "d.zip")
    fail(1, f"--data={tmp_path}/none.zip", dest, "none.zip")
    kept = data.read_bytes()
    fail(1, f"--data={data}", dest, f"--cleaned={data}", "--cleaned: |is the set itself")
    other = make_archive(tmp_path / "u.zip", pictures(4), [0, 1, 0, 1])
    fail(1, f"--data={data}", dest, f"--cleaned={other}", "--cleaned: |not an archive that was cleaned")
    assert data.read_bytes() == kept
    unlabeled = make_archive(tmp_path / "u.zip", pictures(4))
    one_class = make_archive(tmp_path / "o.zip", pictures(4), [0] * 4)
    for path in (unlabeled, one_class):
        fail(1, f"--data={path}", dest, "--data|labels|2 classes")
    other = make_archive(tmp_path / "rgb.zip", pictures(4), [0, 1, 0, 1])
    fail(1, f"--data={other}", dest, cls, "--cls|channels|1|3")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.zip", "rgb.zip", "u.zip"]


def test_drop_that_leaves_nothing(tmp_path, monkeypatch):
    path = make_archive(tmp_path / "a.zip", pictures(4), [0, 1, 0, 1])
    log_probs = np.log(np.array([[1e-6, 1], [1, 1e-6]] * 2, dtype=np.float32))
    wrong = lambda dataset, *_: (label_file(dataset, judge(log_probs, dataset.labels, np.full([2, 2], 0.5))), None)  # noqa: E731
    monkeypatch.setitem(METHODS, "gce", wrong)
    cleaned = f"--cleaned={tmp_path}/c.zip"
    fail(1, f"--data={path}", f"--dest={tmp_path}/l.npz", cleaned, "--fix=drop", "--fix=drop|all 4")
    assert not (tmp_path / "c.zip").exists()


def test_cleanlab_that_is_missing(data, tmp_path, monkeypatch):
    for name in ("cleanlab", "cleanlab.count", "cleanlab.filter"):
        monkeypatch.setitem(sys.modules, name, None)
    fail(1, f"--data={data}", f"--dest={tmp_path}/l.npz", "--method=confident", "pip install cleanlab")
    assert not list(tmp_path.iterdir())


def test_confident_learning(data, tmp_path):
    pytest.importorskip("cleanlab", reason="needs the optional package cleanlab")
    output = succeed(f"--data={data}", f"--dest={tmp_path}/l.npz", "--method=confident", "--epochs=8", "--batch=16")
    assert "epoch 40/40  " in output and "fold 5/5" in output and not (tmp_path / "l-classifier.pkl").exists()
    dataset = ImageDataset(str(data))
    found = load_label_file(tmp_path / "l.npz", dataset)
    assert quality(found.is_clean, dataset.labels, dataset.clean_labels)["f1"] > 0.8
    assert np.trace(found.transition) > 1.2 and ((found.suggested == dataset.labels) == found.is_clean).all()


@pytest.mark.filterwarnings("ignore:May not flag")
def test_confident_learning_with_a_class_that_has_no_images(tmp_path):
    pytest.importorskip("cleanlab", reason="needs the optional package cleanlab")
    path = make_archive(tmp_path / "a.zip", pictures(12), [0, 1] * 6, class_names=["a", "b", "never"])
    output = succeed(f"--data={path}", f"--dest={tmp_path}/l.npz", "--method=confident", "--epochs=1", "--batch=4")
    assert (
        "Warning: the labels are judged by the noisy posterior" in output
    )  # the images are noise, so the two other classes cannot be told apart either
    found = load_label_file(tmp_path / "l.npz", ImageDataset(str(path)))
    np.testing.assert_allclose(found.transition[2], [0, 0, 1], atol=1e-5)
    assert found.per_class_noise_rate[2] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Long.


@pytest.mark.long
def test_digits_with_40_percent_wrong_labels(tmp_path):
    data = make_noisy("digits", tmp_path / "d.zip")
    succeed(f"--data={data}", f"--dest={tmp_path}/l.npz")
    dataset = ImageDataset(str(data))
    found = load_label_file(tmp_path / "l.npz", dataset)
    assert quality(found.is_clean, dataset.labels, dataset.clean_labels)["f1"] >= 0.93


@pytest.mark.long
def test_two_processes_agree_with_one(data, detected, tmp_path):
    done = torchrun(
        "detect_noise.py",
        f"--data={data}",
        f"--dest={tmp_path}/l.npz",
        f"--cleaned={tmp_path}/c.zip",
        *TINY,
    )
    assert done.stdout.count("Noise rate") == 1 and len(ArchiveReader(str(tmp_path / "c.zip")).names) == 120
    one, two = np.load(detected[0] / "new" / "labels.npz"), np.load(tmp_path / "l.npz")
    # Dropout differs; the images and their order do not.
    assert np.corrcoef(one["score"], two["score"])[0, 1] > 0.9 and (one["labels"] == two["labels"]).all()
    assert ImageDataset(str(tmp_path / "c.zip")).corruption["cleaned"]["fix"] == "relabel"
