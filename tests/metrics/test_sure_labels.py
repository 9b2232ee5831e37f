"""A judge where nobody knows the clean labels: it learns the labels that a label file is surest of."""

import numpy as np
import pytest
import torch

import dnnlib
from archives.dataset import ImageDataset
from archives.label_file import LabelFile, class_noise_rates, save_label_file
from metrics.features import Features
from metrics.settings import EvaluationSettings
from metrics.sure_labels import choose_judge_labels, sure_labels
from metrics.table import evaluate_features
from tests.support.synth import make_archive, pictures


def label_file(labels, is_clean, score, classes=3, names=(), **fields):
    labels, is_clean = np.array(labels), np.array(is_clean, dtype=bool)
    rates = class_noise_rates(labels, is_clean, classes)
    score = np.array(score, dtype=np.float32)
    return LabelFile(list(names), labels, is_clean, score, labels, float(np.mean(~is_clean)), rates, **fields)


def test_sure_labels_have_high_scores_or_are_the_better_half_of_their_class():
    labels, clean = [0, 0, 0, 0, 1, 1, 1, 2], [1, 1, 1, 0, 1, 1, 1, 0]
    found = label_file(labels, clean, [0.99, 0.95, 0.91, 0.99, 0.2, 0.3, 0.1, 0.99])
    assert sure_labels(found).tolist() == [0, 0, 0, -1, 1, 1, -1, -1]
    found.is_outlier = np.arange(8) == 0
    assert sure_labels(found).tolist() == [-1, 0, 0, -1, 1, 1, -1, -1]


def test_the_judge_learns_sure_labels_only():
    rng = np.random.default_rng(0)
    shown = np.arange(300) % 3
    features = Features(torch.from_numpy(rng.standard_normal([300, 4]) + 6 * np.eye(4)[shown]), None, None)
    labels = np.where(rng.random(300) < 0.75, (shown + 1) % 3, shown)  # three in four are wrong, and alike
    settings = EvaluationSettings("data.zip", "pixels")
    accuracy = {
        name: evaluate_features(features, features, labels, shown, settings, judge_labels=known)
        for name, known in (("noisy", None), ("sure", np.where(labels == shown, shown, -1)))
    }
    assert accuracy["noisy"]["metrics"]["label_accuracy"] < 0.1
    assert accuracy["sure"]["metrics"]["label_accuracy"] == 1 == accuracy["sure"]["judge"]["accuracy"]
    assert accuracy["sure"]["metrics"]["fid"] == accuracy["noisy"]["metrics"]["fid"]  # all images count there
    judged = Features(features.features, None, shown)
    found = evaluate_features(
        judged, judged, labels, shown, settings, judge_labels=np.where(labels == shown, shown, -1)
    )
    assert found["judge"]["accuracy"] == 1 and found["judge"]["num"] == (labels == shown).sum()


def test_choice_of_labels(tmp_path):
    labels = [0, 1, 2, 0, 1, 2]
    data = str(make_archive(tmp_path / "noisy.zip", pictures(6), labels))
    names = ImageDataset(data).file_names
    clean = str(make_archive(tmp_path / "clean.zip", pictures(6), labels, clean_labels=[[n, 0] for n in names]))
    path, other = str(tmp_path / "labels.npz"), str(tmp_path / "other.npz")
    save_label_file(path, label_file(labels, [1, 1, 0, 1, 1, 0], [1.0] * 6, names=names))
    save_label_file(other, label_file([0] * 6, [1] * 6, [1.0] * 6, names=names))

    def note(data, label_path=None, recorded=None, judge="svm"):
        found = choose_judge_labels(data, label_path, recorded, judge)
        return None if found.labels is None else found.labels.tolist(), found.note

    assert note(clean, None, path) == (None, f"The judge learned the clean labels of {clean}.")
    for recorded in (None, "nowhere.npz", other):  # a file about other labels is none about this archive
        known, text = note(data, None, recorded)
        assert known is None and "as they are. If some are wrong, all accuracies are too low" in text
    for args in ((path, None), (None, path)):
        known, text = note(data, *args)
        assert known == [0, 1, -1, 0, 1, -1]
        assert text.startswith(f"Nobody knows the clean labels. The judge learned 4 of the 6 labels of {data}, those")
        assert "cannot show what the file got wrong" in text
        assert text.endswith("all their images count as wrong: 2.")
    assert note(clean, path)[1].startswith("The judge learned 4 of the 6")
    assert note(data, path, judge="x.pkl")[1] == (
        f"Nobody knows the clean labels. The judge, x.pkl, is tried on 4 of the 6 labels of {data}, those that {path} "
        "is surest of."
    )
    assert note(clean, judge="x.pkl")[1] == f"The judge, x.pkl, is tried on the clean labels of {clean}."
    with pytest.raises(dnnlib.UserError, match="labels are not those of"):
        note(data, other)
    save_label_file(path, label_file(labels, [1, 0, 0, 1, 0, 0], [1.0] * 6, names=names))
    with pytest.raises(dnnlib.UserError, match="fewer than 2 classes"):
        note(data, path)
