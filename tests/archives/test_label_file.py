"""Label files: our layout and the published ones, how they are matched to archives, and errors for bad files."""

import numpy as np
import pytest

import dnnlib
from archives.build import build_archive
from archives.dataset import ImageDataset
from archives.label_file import LabelFile, class_noise_rates, load_label_file, save_label_file
from archives.label_table import load_labels_or_table, save_label_table
from archives.source import Source
from archives.sources import open_archive
from archives.writer import make_transform
from tests.support.synth import make_archive, pictures

LABELS = np.array([0, 1, 2, 1, 0, 1])
FLAGS = np.array([1, 0, 1, 1, 0, 1])
RATES = [1 / 2, 1 / 3, 0]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return str(make_archive(tmp_path_factory.mktemp("labels") / "a.zip", pictures(6), LABELS.tolist()))


@pytest.fixture(scope="module")
def dataset(archive):
    return ImageDataset(archive)


def ours(dataset, **changes) -> LabelFile:
    values = dict(
        names=dataset.file_names,
        labels=LABELS,
        is_clean=FLAGS.astype(bool),
        score=np.linspace(0, 1, 6, dtype=np.float32),
        suggested=np.array([0, 2, 2, 1, 1, 1]),
        noise_rate=0.33,
        per_class_noise_rate=np.array(RATES, np.float32),
        transition=np.full([3, 3], 1 / 3),
    )
    return LabelFile(**(values | changes))


def write(tmp_path, *arrays, **named) -> str:
    path = tmp_path / "labels.npz"
    np.savez(path, *arrays, **named)
    return str(path)


def assert_same(a: LabelFile, b: LabelFile):
    for name, value in vars(b).items():
        np.testing.assert_array_equal(getattr(a, name), value, err_msg=name)


def refused(path, dataset, *words):
    with pytest.raises(dnnlib.UserError) as error:
        load_label_file(path, dataset)
    assert str(path) in error.value.message and all(word in error.value.message for word in words), error.value.message


FURTHER = dict(
    noise_interval=(0.25, 0.5),
    suggested_score=np.linspace(1, 0, 6, dtype=np.float32),
    outlier_score=np.array([3, -1, 0, 700, 2, 5], np.float32),
    is_outlier=np.array([0, 0, 0, 1, 0, 1], bool),
    duplicate_of=np.array([0, 1, 0, 3, 1, 1]),
)
PER_IMAGE = ("names", "labels", "is_clean", "score", "suggested", "suggested_score", "outlier_score", "is_outlier")


@pytest.mark.parametrize("changes", [
    dict(transition=np.array([[0.5, 0.5, 0], [0, 1, 0], [0.25, 0.25, 0.5]])),
    dict(transition=None),
    FURTHER,
])  # fmt: skip
def test_round_trip(dataset, tmp_path, changes):
    file = ours(dataset, **changes)
    save_label_file(tmp_path / "labels.npz", file)
    loaded = load_label_file(tmp_path / "labels.npz", dataset)
    assert_same(loaded, file)
    assert (loaded.is_clean.dtype, loaded.score.dtype, loaded.labels.dtype) == (bool, np.float32, np.int64)
    with np.load(tmp_path / "labels.npz") as arrays:  # docs/formats.md: readable without unpickling
        assert set(arrays) == {k for k, v in vars(file).items() if v is not None}


def test_ours_is_matched_by_name_in_any_order_and_to_subsets_and_mirrored_sets(archive, dataset, tmp_path):
    file, order = ours(dataset, **FURTHER), np.array([3, 1, 5, 0, 2, 4])
    moved = {k: np.asarray(getattr(file, k))[order] for k in PER_IMAGE}
    moved["duplicate_of"] = np.array([0, 1, 1, 3, 3, 1])  # groups 3 | 1, 5, 4 | 0, 2
    shuffled = ours(dataset, **(FURTHER | moved))
    save_label_file(tmp_path / "labels.npz", shuffled)
    assert_same(load_label_file(tmp_path / "labels.npz", dataset), file)
    for other in (ImageDataset(archive, max_size=4, seed=1), ImageDataset(archive, xflip=True)):
        loaded = load_label_file(tmp_path / "labels.npz", other)
        items = [dataset.file_names.index(name) for name in other.file_names]
        assert loaded.names == other.file_names and len(loaded.labels) == len(other) != 6
        np.testing.assert_array_equal(loaded.score, file.score[items])
        np.testing.assert_array_equal(loaded.is_clean, file.is_clean[items])
        np.testing.assert_array_equal(loaded.outlier_score, file.outlier_score[items])


def test_an_archive_without_some_images_is_matched_by_what_they_were_called(tmp_path):
    """A cleaned archive numbers its images anew: the old names mean other images there, here with the same label."""
    for origins in (None, [f"cat/{i}.jpg" for i in (3, 1, 4, 5, 9, 2)]):
        source = Source("x", 6, pictures(6).__getitem__, LABELS * 0, origins=origins, class_names=list("abc"))
        whole, rest = tmp_path / f"whole{bool(origins)}.zip", tmp_path / f"rest{bool(origins)}.zip"
        build_archive(source, str(whole), make_transform(None, None))
        dataset = ImageDataset(str(whole))
        file = ours(dataset, labels=LABELS * 0, source_names=dataset.source_names)
        save_label_file(tmp_path / "labels.npz", file)
        save_label_table(tmp_path / "labels.csv", file, None)
        cleaned = open_archive(str(whole))
        cleaned.take(np.array([0, 2, 3, 5]))
        build_archive(cleaned, str(rest), make_transform(None, None))
        for name in ("labels.npz", "labels.csv"):
            loaded = load_labels_or_table(str(tmp_path / name), ImageDataset(str(rest)))
            np.testing.assert_allclose(loaded.score, file.score[[0, 2, 3, 5]], rtol=1e-6)
            whole_again = load_labels_or_table(str(tmp_path / name), dataset)
            np.testing.assert_allclose(whole_again.score, file.score, rtol=1e-6)


def test_archives_of_other_images_with_the_same_names_are_told_apart(tmp_path):
    """Two archives of six images each, which share five: only their original paths say which five."""
    datasets = []
    for rows in (range(6), range(1, 7)):
        origins = [f"cat/{i}.jpg" for i in rows]
        source = Source("x", 6, pictures(6).__getitem__, LABELS * 0, origins=origins, class_names=list("abc"))
        build_archive(source, str(tmp_path / f"{rows[0]}.zip"), make_transform(None, None))
        datasets.append(ImageDataset(str(tmp_path / f"{rows[0]}.zip")))
    assert datasets[0].file_names == datasets[1].file_names
    file = ours(datasets[0], labels=LABELS * 0, source_names=datasets[0].source_names)
    save_label_file(tmp_path / "labels.npz", file)
    save_label_table(tmp_path / "labels.csv", file, None)
    for name in ("labels.npz", "labels.csv"):
        with pytest.raises(dnnlib.UserError, match="lacks 1 of the 6 images .*cat/6.jpg"):
            load_labels_or_table(str(tmp_path / name), datasets[1])


def test_groups_of_duplicates_follow_the_items(archive, dataset, tmp_path):
    save_label_file(tmp_path / "labels.npz", ours(dataset, **FURTHER))
    mirrored = ImageDataset(archive, xflip=True)
    loaded = load_label_file(tmp_path / "labels.npz", mirrored).duplicate_of
    np.testing.assert_array_equal(loaded, [0, 1, 0, 3, 1, 1, 6, 7, 6, 9, 7, 7])
    subset = ImageDataset(archive, max_size=4, seed=11)
    assert subset.file_names == [dataset.file_names[i] for i in (2, 3, 4, 5)]  # without images 0 and 1, the first ones
    assert load_label_file(tmp_path / "labels.npz", subset).duplicate_of.tolist() == [0, 1, 2, 2]


ONEHOT = np.eye(3, dtype=np.float32)[LABELS]


@pytest.mark.parametrize(
    "arrays",
    [
        [FLAGS],
        [FLAGS.astype(bool)],
        [FLAGS.astype(np.float32)[:, None]],
        [LABELS, np.zeros(6, int), FLAGS],
        [LABELS.astype(np.float64), ONEHOT, FLAGS],
        [ONEHOT, ONEHOT, FLAGS],
        [pictures(6), LABELS, FLAGS],
        [pictures(6), ONEHOT, FLAGS],
        [np.zeros(6, int), LABELS[:, None], FLAGS],
    ],
    ids=["int", "bool", "column", "labels", "float", "onehot", "images", "images-onehot", "classes-observed"],
)
@pytest.mark.parametrize("xflip", [False, True])
def test_published_layouts(archive, tmp_path, arrays, xflip):
    dataset = ImageDataset(archive, xflip=xflip)
    loaded = load_label_file(write(tmp_path, *arrays), dataset)
    copies = 1 + xflip
    np.testing.assert_array_equal(loaded.is_clean, np.tile(FLAGS == 1, copies))
    np.testing.assert_array_equal(loaded.score, np.tile(FLAGS, copies))
    np.testing.assert_array_equal(loaded.suggested, np.tile(LABELS, copies))
    assert loaded.noise_rate == pytest.approx(1 / 3) and loaded.transition is None
    np.testing.assert_allclose(loaded.per_class_noise_rate, RATES, rtol=1e-6)


def test_class_without_images_has_rate_zero():
    np.testing.assert_array_equal(class_noise_rates(np.array([2, 2]), np.array([True, False]), 4), [0, 0, 0.5, 0])


WRONG = np.array([0, 1, 2, 2, 0, 0])


@pytest.mark.parametrize("arrays, words", [
    ([FLAGS[:5]], ["5 entries", "6 images"]),
    ([np.array(1)], ["1 entries", "6 images"]),
    ([LABELS, LABELS, FLAGS[:4]], ["arr_2 has 4", "6 images"]),
    ([FLAGS * 2], ["arr_0 holds 2", "flags"]),
    ([np.where(FLAGS, np.nan, 0)], ["arr_0 holds nan"]),
    ([pictures(6)], ["arr_0 is uint8 [6, 8, 8, 3]", "flags"]),
    ([LABELS, FLAGS], ["holds arr_0, arr_1", "expected"]),
    ([WRONG, WRONG, FLAGS], ["2 of 6 labels", "00000/img00000003.png", "2 here, 1 there"]),
    ([pictures(6), WRONG, FLAGS], ["2 of 6 labels"]),
    ([pictures(6), pictures(6), FLAGS], ["both images"]),
    ([ONEHOT * 0.5, LABELS, FLAGS], ["arr_0", "one-hot"]),
    ([LABELS + 0.5, LABELS, FLAGS], ["arr_0", "not an integer"]),
    ([LABELS.astype(object), LABELS, FLAGS], ["Python objects", "never loaded"]),
    ([], ["holds nothing"]),
])  # fmt: skip
def test_published_mistakes_are_named(dataset, tmp_path, arrays, words):
    refused(write(tmp_path, *arrays), dataset, *words)


@pytest.mark.parametrize("changes, words", [
    (dict(names=["x", *[f"00000/img0000000{i}.png" for i in range(1, 6)]]), ["lacks 1 of the 6", "img00000000.png"]),
    (dict(labels=WRONG), ["2 of 6 labels"]),
    (dict(score=np.zeros(5)), ["score is [5]", "6 names"]),
    (dict(score=np.full(6, 1.5)), ["score must be from 0 to 1"]),
    (dict(score=np.array(list("abcdef"))), ["score must be from 0 to 1"]),
    (dict(is_clean=np.arange(6)), ["is_clean holds 2"]),
    (dict(suggested=np.full(6, 3)), ["go up to 3", "has 3 classes"]),
    (dict(per_class_noise_rate=np.zeros(4)), ["per_class_noise_rate is [4]", "3 classes"]),
    (dict(transition=np.ones([3, 3])), ["transition", "row-stochastic"]),
    (dict(names=np.array(["a"] * 6, dtype=object)), ["Python objects"]),
    (dict(noise_interval=np.array([0.5, 0.2])), ["noise_interval", "lower <= upper"]),
    (dict(noise_interval=np.array([0.5])), ["noise_interval", "two numbers"]),
    (dict(suggested_score=np.full(6, -0.1)), ["suggested_score must be from 0 to 1"]),
    (dict(outlier_score=np.full(6, np.nan)), ["outlier_score", "finite"]),
    (dict(outlier_score=np.zeros(7)), ["outlier_score is [7]", "6 names"]),
    (dict(is_outlier=np.full(6, 2)), ["is_outlier holds 2"]),
    (dict(duplicate_of=np.array([0, 1, 2, 3, 4, 6])), ["duplicate_of", "row 0..5"]),
    (dict(duplicate_of=np.array([1, 2, 2, 3, 4, 5])), ["duplicate_of", "first image"]),
    (dict(duplicate_of=np.zeros(6)), ["duplicate_of", "row 0..5"]),
])  # fmt: skip
def test_mistakes_in_ours_are_named(dataset, tmp_path, changes, words):
    fields = {k: v for k, v in vars(ours(dataset)).items() if v is not None} | changes
    refused(write(tmp_path, **fields), dataset, *words)


def test_other_files_are_refused(dataset, tmp_path):
    path = tmp_path / "labels.npz"
    refused(path, dataset, "No such file")
    for content in (b"", b"PK\x03\x04 truncated", b"\x80\x04K\x01.", b"text"):
        path.write_bytes(content)
        refused(path, dataset, "expected a label file")
    np.save(tmp_path / "flags.npy", FLAGS)
    refused(tmp_path / "flags.npy", dataset, "not a readable .npz")
    refused(write(tmp_path, names=np.array(["a"])), dataset, "lacks labels, is_clean")


def test_data_without_classes_are_refused(archive, dataset, tmp_path):
    save_label_file(tmp_path / "labels.npz", ours(dataset))
    refused(tmp_path / "labels.npz", ImageDataset(archive, use_labels=False), "no labels")


def test_failed_save_keeps_the_older_file(dataset, tmp_path):
    path = tmp_path / "labels.npz"
    save_label_file(path, ours(dataset))
    before = path.read_bytes()

    class Unsavable:
        def __array__(self, *args, **kwargs):
            raise OSError("disk full")

    with pytest.raises(OSError):
        save_label_file(path, ours(dataset, transition=Unsavable()))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["labels.npz"]
