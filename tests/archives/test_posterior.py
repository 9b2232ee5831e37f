"""Posteriors cut to the most probable classes: what is kept, in label files, after decisions, and errors."""

import numpy as np
import pytest

import dnnlib
from archives.dataset import ImageDataset
from archives.decisions import Decisions, apply_to_labels
from archives.label_file import LabelFile, load_label_file, save_label_file
from archives.posterior import TopPosterior, compress, from_arrays
from tests.support.synth import make_archive, pictures

LABELS = np.array([0, 1, 2, 3])
POSTERIOR = np.array([
    [0.50, 0.25, 0.125, 0.0625, 0.0625],
    [0.00, 0.00, 1.000, 0.0000, 0.0000],
    [0.25, 0.00, 0.125, 0.1250, 0.5000],
    [0.25, 0.25, 0.125, 0.2500, 0.1250],
], np.float32)  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    names = list("abcde")
    folder = tmp_path_factory.mktemp("posterior")
    return ImageDataset(str(make_archive(folder / "a.zip", pictures(4), LABELS.tolist(), class_names=names)))


def label_file(dataset, **changes):
    fields = dict(
        names=dataset.file_names,
        labels=LABELS,
        is_clean=np.ones(4, bool),
        score=np.ones(4, np.float32),
        suggested=LABELS,
        noise_rate=0.0,
        per_class_noise_rate=np.zeros(5, np.float32),
        posterior=compress(POSTERIOR, LABELS, 2),
    )
    return LabelFile(**(fields | changes))


def saved(tmp_path, file, **changes):
    save_label_file(tmp_path / "labels.npz", file)
    if changes:
        with np.load(tmp_path / "labels.npz") as arrays:
            kept = {k: v for k, v in {**arrays, **changes}.items() if v is not None}
        np.savez(tmp_path / "labels.npz", **kept)
    return tmp_path / "labels.npz"


def assert_equal(a: TopPosterior, b: TopPosterior):
    for name, value in vars(b).items():
        np.testing.assert_array_equal(getattr(a, name), value, err_msg=name)
        assert getattr(a, name).dtype == value.dtype, name


def test_keeps_the_label_the_best_others_and_the_rest():
    found = compress(POSTERIOR, LABELS, 2)
    np.testing.assert_array_equal(found.probabilities, [
        [0.5, 0.25, 0.125, 0.125],
        [0, 1, 0, 0],
        [0.125, 0.5, 0.25, 0.125],
        [0.25, 0.25, 0.25, 0.25],
    ])  # fmt: skip
    assert found.classes[0].tolist() == [1, 2] and found.classes[1, 0] == 2 and found.classes[2].tolist() == [4, 0]
    assert sorted(found.classes[3]) == [0, 1]
    assert (found.probabilities.dtype, found.classes.dtype) == (np.float16, np.int16)
    np.testing.assert_allclose(found.prior, POSTERIOR.mean(axis=0), rtol=1e-6)
    best, p = found.best()
    assert best.tolist() == [0, 2, 4, 3]  # among equals the label stays
    np.testing.assert_array_equal(p, [0.5, 1, 0.5, 0.25])


def test_little_mass_stays_little():
    """1 minus rounded numbers would give the rest ten times what it has."""
    p = np.full([1, 1000], 1e-5 / 998)
    p[0, :2] = 0.7654321, 1 - 0.7654321 - 1e-5
    found = compress(p, np.array([1]), 1)
    assert float(found.probabilities[0, -1]) == pytest.approx(1e-5, rel=1e-2)
    assert found.classes.tolist() == [[0]]


def test_few_classes_leave_no_rest():
    p = np.random.default_rng(0).dirichlet(np.ones(3), 50)
    found = compress(p, np.arange(50) % 3)
    assert found.classes.shape == (50, 2) and not found.probabilities[:, -1].any()
    assert compress(np.ones([2, 1]), np.zeros(2, int)).best()[0].tolist() == [0, 0]


def test_many_images_of_many_classes_in_blocks():
    rng = np.random.default_rng(0)
    p, labels = rng.dirichlet(np.full(20, 0.2), 9000).astype(np.float32), rng.integers(20, size=9000)
    found = compress(p, labels, 5, prior=np.arange(20.0))
    rows = np.array([0, 4095, 4096, 8999])
    for i in rows:
        others = [c for c in np.argsort(-p[i]) if c != labels[i]]
        assert found.classes[i].tolist() == others[:5]
        wanted = [p[i, labels[i]], *p[i, others[:5]], p[i, others[5:]].sum()]
        np.testing.assert_allclose(found.probabilities[i], wanted, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(found.prior, np.arange(20) / 190, rtol=1e-6)
    assert_equal(found.take(rows), compress(p[rows], labels[rows], 5, prior=np.arange(20.0)))


def test_label_files_hold_them_in_any_order(dataset, tmp_path):
    file = label_file(dataset)
    path = saved(tmp_path, file)
    assert_equal(load_label_file(path, dataset).posterior, file.posterior)
    order = np.array([2, 0, 3, 1])
    moved = {name: np.asarray(getattr(file, name))[order] for name in ("names", "labels")}
    path = saved(tmp_path, label_file(dataset, **moved, posterior=file.posterior.take(order)))
    assert_equal(load_label_file(path, dataset).posterior, file.posterior)
    mirrored = ImageDataset(dataset.path, xflip=True)
    assert_equal(load_label_file(path, mirrored).posterior, file.posterior.take(np.tile(np.arange(4), 2)))
    assert load_label_file(saved(tmp_path, label_file(dataset, posterior=None)), dataset).posterior is None


GOOD = compress(POSTERIOR, LABELS, 2)


@pytest.mark.parametrize("changes, words", [
    (dict(posterior_prior=None), "lacks posterior_prior"),
    (dict(posterior=None, posterior_classes=None), "lacks posterior, posterior_classes"),
    (dict(posterior=GOOD.probabilities[:, :3]), r"posterior is float16 \[4, 3\], expected numbers \[4, 4\]"),
    (dict(posterior=GOOD.probabilities[:3]), r"posterior is float16 \[3, 4\]"),
    (dict(posterior=GOOD.probabilities * 2), "sum to 1.*img00000000.png"),
    (dict(posterior=np.where(np.eye(4)[1] > 0, np.nan, GOOD.probabilities)), "sum to 1"),
    (dict(posterior=GOOD.probabilities - np.float16([1, -1, 0, 0])), "sum to 1"),
    (dict(posterior_classes=GOOD.classes * 1.0), "posterior_classes is float64"),
    (dict(posterior_classes=GOOD.classes[:, 0]), "posterior_classes is int16"),
    (dict(posterior_classes=GOOD.classes + 3), r"posterior_classes.*within 0\.\.4.*img00000000.png"),
    (dict(posterior_classes=GOOD.classes - 3), r"posterior_classes.*within 0\.\.4"),
    (dict(posterior_classes=np.int16([[1, 2], [2, 2], [4, 0], [0, 1]])), "differ.*img00000001.png"),
    (dict(posterior_classes=np.int16([[1, 2], [2, 0], [4, 0], [3, 1]])), "differ.*img00000003.png"),
    (dict(posterior_prior=GOOD.prior[:4]), r"posterior_prior is float32 \[4\].*5 classes"),
    (dict(posterior_prior=GOOD.prior * np.nan), "posterior_prior must"),
    (dict(posterior_prior=GOOD.prior * 2), "posterior_prior must"),
])  # fmt: skip
def test_mistakes_are_named(dataset, tmp_path, changes, words):
    path = saved(tmp_path, label_file(dataset), **changes)
    with pytest.raises(dnnlib.UserError, match=f"labels.npz.*{words}"):
        load_label_file(path, dataset)


def test_decisions_are_certain(dataset):
    empty = np.zeros(0, np.int64)
    decisions = Decisions(np.array([2]), np.array([0, 1, 3]), np.array([2, 4, 0]), empty)
    before = label_file(dataset)
    found = apply_to_labels(before, decisions).posterior
    assert_equal(before.posterior, GOOD)
    best, p = found.best()
    assert best.tolist() == [2, 4, 2, 0] and (p == 1).all()
    arrays = dict(posterior=found.probabilities, posterior_classes=found.classes, posterior_prior=found.prior)
    assert_equal(from_arrays(arrays, dataset.file_names, LABELS, 5, "x"), found)  # the classes still differ
