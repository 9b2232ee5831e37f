"""Cleaning a source by a label file: foreign images are left out only when asked for."""

import numpy as np
import pytest

import dnnlib
from archives.label_file import LabelFile, flagged_labels
from archives.relabel import clean_source
from archives.sources import Source

IMAGES = np.arange(6, dtype=np.uint8)[:, None, None, None]
LABELS = np.array([0, 1, 1, 0, 1, 0])


def found(is_outlier) -> LabelFile:
    is_clean = np.array([True, False, True, True, True, False])
    suggested = np.where(is_clean, LABELS, 1 - LABELS)
    score = is_clean.astype(np.float32)
    return LabelFile(list("abcdef"), LABELS, is_clean, score, suggested, 1 / 3, np.zeros(2), is_outlier=is_outlier)


@pytest.mark.parametrize("fix, drop_outliers, kept, labels", [
    ("relabel", False, [0, 1, 2, 3, 4, 5], [0, 0, 1, 0, 1, 1]),
    ("relabel", True, [0, 2, 3, 5], [0, 1, 0, 1]),
    ("drop", False, [0, 2, 3, 4], [0, 1, 0, 1]),
    ("drop", True, [0, 2, 3], [0, 1, 0]),
    ("keep", True, [0, 2, 3, 5], [0, 1, 0, 0]),
])  # fmt: skip
def test_foreign_images_are_left_out_when_asked_for(fix, drop_outliers, kept, labels):
    source = Source("here", 6, IMAGES.__getitem__, LABELS, names=list("abcdef"))
    clean_source(source, found(np.array([0, 1, 0, 0, 1, 0], bool)), 2, fix, drop_outliers)
    assert [int(source.image(i)[0, 0, 0]) for i in range(source.length)] == kept
    assert source.labels.tolist() == labels and source.names == [list("abcdef")[i] for i in kept]
    assert source.corruption["cleaned"].get("outliers") == (2 if drop_outliers else None)


@pytest.mark.parametrize("unsure, kept, labels, after", [
    ("drop", [0, 1, 2, 3, 4], [0, 0, 1, 0, 1], 0.99),
    ("keep", [0, 1, 2, 3, 4, 5], [0, 0, 1, 0, 1, 0], (5 * 0.99 + 0.2) / 6),
])  # fmt: skip
def test_relabels_only_where_the_new_label_is_sure(unsure, kept, labels, after):
    source = Source("here", 6, IMAGES.__getitem__, LABELS, names=list("abcdef"))
    file = found(None)
    file.score = np.array([0.99, 0.01, 0.99, 0.99, 0.99, 0.2], np.float32)
    file.suggested_score = np.array([0.99, 0.99, 0.99, 0.99, 0.99, 0.8], np.float32)
    done = clean_source(source, file, 2, "relabel", confidence=0.9, unsure=unsure)
    assert [int(source.image(i)[0, 0, 0]) for i in range(source.length)] == kept and source.labels.tolist() == labels
    assert (done.relabeled, done.left_out) == (1, 6 - len(kept))
    assert done.before == pytest.approx(np.mean(file.score)) and done.after == pytest.approx(after)


@pytest.mark.parametrize("unsure, kept, after", [("drop", [0, 2, 3, 4], 1.0), ("keep", [0, 1, 2, 3, 4, 5], 2 / 3)])
def test_a_file_that_suggests_nothing_relabels_nothing(unsure, kept, after):
    source = Source("here", 6, IMAGES.__getitem__, LABELS, names=list("abcdef"))
    file = flagged_labels(list("abcdef"), LABELS, np.array([1, 0, 1, 1, 1, 0], bool), 2)
    done = clean_source(source, file, 2, "relabel", unsure=unsure)
    assert source.labels.tolist() == LABELS[kept].tolist()
    assert (done.relabeled, done.left_out) == (0, 6 - len(kept)) and done.after == pytest.approx(after)
    assert source.corruption["cleaned"]["relabeled"] == 0


def test_a_file_that_does_not_tell_is_refused_and_so_is_an_empty_rest():
    source = Source("here", 6, IMAGES.__getitem__, LABELS, names=list("abcdef"))
    with pytest.raises(dnnlib.UserError, match="does not say which images are foreign"):
        clean_source(source, found(None), 2, "relabel", drop_outliers=True)
    with pytest.raises(dnnlib.UserError, match="all 6 images are foreign"):
        clean_source(source, found(np.ones(6, bool)), 2, "relabel", drop_outliers=True)
