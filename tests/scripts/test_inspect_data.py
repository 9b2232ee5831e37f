"""inspect_data.py: what it writes and prints, what it recommends, and that its commands are accepted."""

import html
import importlib
import json
import re
import shlex
from types import SimpleNamespace

import numpy as np
import pytest

import inspect_data
from archives.dataset import ImageDataset
from archives.label_file import LabelFile, load_label_file, save_label_file
from archives.posterior import compress
from detection.inspection import confusable_pairs
from dnnlib import content_hash
from recipes.advice import advise, name_confusable
from tests.support.commands import callers
from tests.support.synth import make_archive, pictures, run_dataset_tool

succeed, fail = callers(inspect_data.main)


def check_commands(text):
    """Let click check the names, types and choices of all commands of ours in a text."""
    for line in text.splitlines():
        _, script, *args = shlex.split(line)
        importlib.import_module(script.removesuffix(".py")).main.make_context(script, args)


def judged(labels, clean, classes, **fields):
    """Return the label file of a detector that knows the clean labels."""
    right = labels == clean
    rates = np.zeros(classes, np.float32)
    names = [f"00000/img{i:08d}.png" for i in range(len(labels))]
    return LabelFile(names, labels, right, right.astype(np.float32), clean, float(np.mean(~right)), rates, **fields)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """400 digits, 40% of the labels wrong."""
    path = tmp_path_factory.mktemp("data") / "my digits.zip"
    noise = ["--noise_type=sym", "--noise_rate=0.4", "--max-images=400"]
    assert run_dataset_tool("--source=digits", f"--dest={path}", *noise)[0] == 0
    return path


def test_one_command_says_what_is_wrong_and_what_to_do(data, tmp_path):
    out = tmp_path / "check"
    output = succeed(f"--data={data}", f"--outdir={out}", "--preset=digits", "--epochs=2", "--batch=64", "--images=50")
    assert sorted(p.name for p in out.iterdir()) == [
        *("labels-classifier.pkl", "labels.csv", "labels.npz", "report.html")
    ]
    dataset = ImageDataset(str(data))
    found = load_label_file(out / "labels.npz", dataset)
    for words in (
        "left 0s",
        "Step 3 of 3",
        "400 images of 8x8, gray, 10 classes",
        f"about {found.noise_rate:.1%} are wrong",
    ):
        assert words in output, words
    assert f"Foreign:     {found.is_outlier.sum()} of 400" in output and "\nRecommended: " in output
    page = html.unescape((out / "report.html").read_text())
    commands = re.findall(r"<pre[^>]*>(.*?)</pre>", page, re.DOTALL)
    assert len(commands) == 6 and f"--label-path={out}/labels.npz" in commands[3]
    check_commands("\n".join(commands))
    assert len(json.loads(re.search(r"id='data'>(.*?)</script>", page)[1])["names"]) == 50


def test_a_label_file_is_taken_and_completed(tmp_path):
    assert run_dataset_tool("--source=digits", f"--dest={tmp_path}/c.zip", "--max-images=300")[0] == 0
    digits = ImageDataset(f"{tmp_path}/c.zip")
    images = digits.images(range(300)).permute(0, 2, 3, 1).numpy()
    images[[100, 200]] = images[[5, 6]]  # doubles: the first one contradicts, the second does not
    images[250] = np.random.default_rng(0).integers(0, 256, images[250].shape)  # foreign
    clean = digits.labels.copy()
    clean[[100, 200, 250]] = [clean[5] + 1, clean[6], 0]
    labels = clean.copy()
    labels[:30] = (labels[:30] + 1) % 10
    labels[[5, 6]] = clean[[5, 6]]
    path = make_archive(tmp_path / "d.zip", images, labels.tolist())
    save_label_file(tmp_path / "l.npz", judged(labels, clean, 10))
    args = [f"--data={path}", f"--labels={tmp_path}/l.npz", f"--outdir={tmp_path}/check"]
    (tmp_path / "check").mkdir()
    (tmp_path / "check" / "labels-classifier.pkl").write_text("of another set")
    output = succeed(*args)
    found = load_label_file(tmp_path / "check" / "labels.npz", ImageDataset(str(path)))
    assert found.duplicate_of[100] == 5 and found.duplicate_of[200] == 6 and found.is_outlier[250]
    assert "epoch" not in output and "about 9.3% are wrong" in output
    assert "2 groups" in output and " 1 of them with different labels" in output
    page = (tmp_path / "check" / "report.html").read_text()
    assert found.transition[3].argmax() == 3 and "train_discriminator.py" in page  # not by a classifier of other labels
    assert (tmp_path / "check" / "labels-classifier.pkl").exists()  # which is not ours to delete
    known = load_label_file(tmp_path / "check" / "labels.npz", ImageDataset(str(path)))
    known.is_outlier = np.zeros(300, bool)  # what a file knows is not looked for again
    save_label_file(tmp_path / "check" / "labels.npz", known)
    (tmp_path / "check" / "decisions.csv").write_text("")  # may lie there
    again = [*args[::2], f"--labels={tmp_path}/check/labels.npz"]
    assert "Foreign:     0 of 300 images\n" in succeed(*again)
    assert "labels-classifier.pkl" not in (tmp_path / "check" / "report.html").read_text()  # it judged other labels
    known.classifier = content_hash(tmp_path / "check" / "labels-classifier.pkl")
    save_label_file(tmp_path / "check" / "labels.npz", known)
    succeed(*again)
    assert "--discriminator=" in (tmp_path / "check" / "report.html").read_text()


def test_without_foreign_nothing_is_looked_for(data, tmp_path):
    dataset = ImageDataset(str(data))
    save_label_file(tmp_path / "l.npz", judged(dataset.labels, dataset.clean_labels, 10))
    output = succeed(f"--data={data}", f"--labels={tmp_path}/l.npz", f"--outdir={tmp_path}/check", "--foreign=0")
    found = load_label_file(tmp_path / "check" / "labels.npz", dataset)
    assert found.is_outlier is None and found.duplicate_of is None and "Foreign" not in output
    assert "nobody has looked for foreign ones" in (tmp_path / "check" / "report.html").read_text()


CLASSES = 10


def noisy(n, rate, seed=0):
    """Return clean labels of n images, and observed ones: a wrong one for this share, any other class."""
    rng = np.random.default_rng(seed)
    clean = np.arange(n) % CLASSES
    return clean, np.where(rng.random(n) < rate, (clean + rng.integers(1, CLASSES, n)) % CLASSES, clean)


@pytest.mark.parametrize("n, rate, foreign, resolution, best, words", [
    (2000, 0.02, 0.0, 16, "Leave", "2."),
    (20000, 0.4, 0.0, 16, "Clean", "1.63"),
    (2000, 0.4, 0.0, 8, "Clean", "1.07"),
    (2000, 0.02, 0.05, 16, "Clean", "loses little"),
    (2000, 0.0, 0.2, 8, "RDUOT", "12.5%"),
    (2000, 0.0, 0.2, 16, "RDUOT", "7.2%"),
    (2000, 0.0, 0.2, 32, "Clean", "loses little"),
    (2000, 0.6, 0.0, 32, "Clean", "With 80% wrong"),
])  # fmt: skip
def test_what_is_recommended(tmp_path, n, rate, foreign, resolution, best, words):
    clean, labels = noisy(n, rate)
    found = judged(labels, clean, CLASSES, is_outlier=np.arange(n) < foreign * n, transition=np.eye(CLASSES))
    found.suggested_score = np.where(np.arange(n) % 7, 0.95, 0.6)
    shape = dict(resolution=resolution, num_channels=3, label_dim=CLASSES, class_names=None)
    path = str(make_archive(tmp_path / "it's mine.zip", pictures(1)))
    labels = tmp_path / "labels.npz"
    trained = tmp_path / "labels-classifier.pkl"
    corrected = advise(SizedDataset(n, shape), found, path, str(labels), str(trained))[0][3]
    assert corrected.method == "Rejection" and "train_discriminator" not in corrected.command
    assert f"--discriminator={trained}" in corrected.command
    check_commands(corrected.command)
    rows, why = advise(SizedDataset(n, shape), found, path, str(labels))
    assert rows[3].method == "SBDC" and "train_discriminator.py" in rows[3].command
    chosen = [row for row in rows if row.recommended]
    assert len(chosen) == 1 and chosen[0].method.startswith(best) and words in why
    assert f"About {found.noise_rate:.1%} of the labels are wrong" in why
    for row in rows:
        check_commands(row.command)
        assert "passes" in row.cost
    (tdsm,) = (row for row in rows if row.method == "TDSM")
    assert ("--others=sample --temp=auto" in tdsm.command) == (resolution > 16)  # the small preset has them
    assert ("--drop_foreign" in rows[1].command) == (foreign > 0)
    few = bool(foreign and rate <= 0.05)
    assert ("--fix=keep" if few else "--fix=relabel") in rows[1].command
    kept = ~found.is_outlier & (found.is_clean | few | (found.suggested_score >= 0.9))
    assert f"{(~kept).sum():,} of {n:,} images are lost" in rows[1].cost
    assert "--network" in rows[3].when and all("--resume=latest" in row.command for row in rows)
    # A pass is n images: the preset trains the baseline for 0.15 (digits) or 200 (cifar10) million images.
    passes = 200e6 * max(0.05, n / 50000) / n if resolution > 16 else 0.15e6 * max(1, n / 15000) / n
    assert f"{int(np.ceil(passes)):,} training passes" in rows[0].cost


@pytest.mark.parametrize("n, share", [(500, 0.05), (10000, 0.2), (50000, 1), (90000, 1)])
def test_trainings_on_large_images_grow_with_the_set(tmp_path, n, share):
    """Up to the length that the preset has for CIFAR-10. A machine without a GPU should have smaller images."""
    clean, labels = noisy(n, 0.4)
    shape = dict(resolution=64, num_channels=3, label_dim=CLASSES, class_names=None)
    path = str(make_archive(tmp_path / "it's mine.zip", pictures(1)))
    rows, why = advise(SizedDataset(n, shape), judged(labels, clean, CLASSES), path, "l.npz")
    for row in rows:
        check_commands(row.command)
    [words] = [shlex.split(row.command) for row in rows if row.method.startswith("Leave")]
    lengths = [f"--duration={200 * share:.3g}", f"--lr_rampup_kimg={10000 * share:.3g}", f"--ema={0.5 * share:.3g}"]
    assert [word for word in words if word.split("=")[0] in ("--duration", "--lr_rampup_kimg", "--ema")] == (
        lengths if share < 1 else []
    )
    for row in rows if share < 1 else []:  # ten states on the way, if there are as many ticks
        for command in [line for line in row.command.splitlines() if "--duration" in line]:
            found = dict(re.findall(r"--(duration|dump|snap)=(\S+)", command))
            assert found["dump"] == found["snap"] and 50 * int(found["dump"]) <= 1000 * float(found["duration"]) / 8
    sentence, command = why.split(" first, and inspect it: ")
    assert sentence.endswith("made for GPUs. On a CPU make an archive of 16x16")
    check_commands(command)
    assert shlex.split(command)[-2:] == [f"--dest={tmp_path}/it's mine-16x16.zip", "--resolution=16x16"]


@pytest.mark.parametrize("posterior", [False, True])
def test_cleaning_is_not_recommended_where_it_empties_a_class(tmp_path, posterior):
    clean, labels = noisy(1000, 0.4)
    found = judged(labels, clean, CLASSES, transition=np.eye(CLASSES))
    found.suggested_score = np.full(1000, 0.95)
    found.is_clean[labels == 3], found.suggested_score[clean == 3] = False, 0.6
    found.posterior = compress(np.eye(CLASSES)[clean], labels) if posterior else None
    shape = dict(resolution=8, num_channels=1, label_dim=CLASSES, class_names=[f"class {c}" for c in range(CLASSES)])
    path = str(make_archive(tmp_path / "part0.zip", pictures(1)))
    rows, why = advise(SizedDataset(1000, shape), found, path, "l.npz")
    [row] = [row for row in rows if row.recommended]
    assert row.method == ("Posterior" if posterior else "TDSM")
    assert ("--posterior_mode=sample" in row.command) == posterior
    assert "Cleaning would leave no image of class 3:" in why


def test_classes_whose_labels_are_all_believed_wrong_are_named(tmp_path):
    clean, labels = noisy(100, 0.4)
    found = judged(labels, clean, CLASSES)
    shape = dict(resolution=8, num_channels=1, label_dim=CLASSES, class_names=None)
    path = str(make_archive(tmp_path / "part0.zip", pictures(1)))
    assert "are believed wrong" not in advise(SizedDataset(100, shape), found, path, "l.npz")[1]
    found.is_clean[np.isin(labels, [2, 5])] = False
    assert "all images labeled 2, 5 are believed wrong" in advise(SizedDataset(100, shape), found, path, "l.npz")[1]


def test_a_cleaned_archive_is_no_part_of_the_set(tmp_path):
    clean, labels = noisy(100, 0.4)
    shape = dict(resolution=8, num_channels=1, label_dim=CLASSES, class_names=None)
    path = make_archive(tmp_path / "part0.zip", pictures(1))
    for data, cleaned in ((path, f"{tmp_path}/part0-clean.zip"), (tmp_path / "part*.zip", "runs/part0-clean.zip")):
        rows, _ = advise(SizedDataset(100, shape), judged(labels, clean, CLASSES), str(data), "l.npz")
        assert f"--cleaned={cleaned} " in rows[1].command


@pytest.mark.parametrize("foreign", [0, 7])
def test_a_posterior_is_one_of_the_ways(tmp_path, foreign):
    clean, labels = noisy(100, 0.4)
    found = judged(labels, clean, CLASSES, is_outlier=np.arange(100) < foreign)
    found.posterior = compress(np.full((100, CLASSES), 1 / CLASSES), labels)
    shape = dict(resolution=8, num_channels=1, label_dim=CLASSES, class_names=None)
    path = str(make_archive(tmp_path / "mine.zip", pictures(1)))
    [row] = [row for row in advise(SizedDataset(100, shape), found, path, "l.npz")[0] if row.method == "Posterior"]
    check_commands(row.command)
    assert (
        "--posterior=l.npz" in row.command
        and "_mode" not in row.command
        and f"{foreign} of 100 images are lost" in row.cost
    )
    assert ("--outliers=drop --outlier_data=l.npz" in row.command) == (foreign > 0)


class SizedDataset(SimpleNamespace):
    """The shape of a data set, without images."""

    def __init__(self, n, shape):
        super().__init__(n=n, **shape)

    def __len__(self):
        return self.n


def test_classes_that_look_alike_are_named():
    clean, labels = noisy(1000, 0.4)
    looks = 0.95 * np.eye(CLASSES) + 0.05 / CLASSES
    looks[2, [2, 4]] = 0.8, 0.15 + 0.05 / CLASSES  # one in seven of class 2 looks like class 4
    looks[7, [7, 9]] = 0.7, 0.25 + 0.05 / CLASSES
    found = judged(labels, clean, CLASSES, looks_like=looks)
    assert [(a, b) for a, b, _ in confusable_pairs(found)] == [(7, 9), (2, 4)]  # the most alike first
    names = [f"class {c}" for c in range(CLASSES)]
    first, second = name_confusable(SimpleNamespace(shown_classes=names), found)
    assert (first.first, first.second, second.first, second.second) == ("class 7", "class 9", "class 2", "class 4")
    assert first.text.startswith("1 in 4 looks") and second.text.startswith("1 in 6 looks")
    assert confusable_pairs(judged(labels, clean, CLASSES)) == []  # of wrong labels alone, nothing is known


def test_bad_input(data, tmp_path):
    out = f"--outdir={tmp_path}/check"
    (tmp_path / "full").mkdir()
    for name in (".DS_Store", "._report.html", "Desktop.ini", "Thumbs.db"):  # which are nobody's
        (tmp_path / "full" / name).write_text("")
    inspect_data.check_outdir(tmp_path / "full")
    (tmp_path / "full" / "notes.txt").write_text("mine")
    fail(1, f"--data={data}", f"--outdir={tmp_path}/full", "--outdir|notes.txt|empty")
    fail(1, f"--data={data}", f"--outdir={data}", "--outdir|is a file")
    fail(1, f"--data={tmp_path}/none.zip", out, "none.zip")
    fail(2, f"--data={data}", out, "--labels=l.npz", "--epochs=3", "--labels|--epochs")
    fail(2, f"--data={data}", out, "--labels=l.npz", "--cls=c.pkl", "--labels|--cls")
    fail(1, f"--data={data}", out, f"--labels={tmp_path}/l.npz", "--labels|l.npz")
    other = judged(np.zeros(2, int), np.zeros(2, int), 10)
    save_label_file(tmp_path / "l.npz", other)
    fail(1, f"--data={data}", out, f"--labels={tmp_path}/l.npz", "--labels|lacks 398 of the 400 images")
    unlabeled = make_archive(tmp_path / "u.zip", pictures(4))
    fail(1, f"--data={unlabeled}", out, "--data|labels|2 classes")
    assert not (tmp_path / "check").exists()
