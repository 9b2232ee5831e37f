"""The table says what the judge sees in every image, and how good it is in each class of real images."""

import json

import numpy as np
import torch

from metrics.features import Features
from metrics.format import save_json
from metrics.settings import EvaluationSettings
from metrics.table import evaluate_features


def features(labels, judged=None):
    """Return points around one place per class. They say by themselves which class they show."""
    noise = np.random.default_rng(0).normal(size=[len(labels), 3])
    return Features(torch.from_numpy((np.eye(3)[labels] * 10 + noise).astype(np.float32)), None, judged)


def test_an_svm_and_its_held_out_images():
    real, asked = np.arange(300) % 3, np.arange(30) % 3
    shown = np.where(np.arange(30) < 6, (asked + 1) % 3, asked)  # six of them show another class
    table = evaluate_features(features(real), features(shown), real, asked, EvaluationSettings("d", "pixels"))
    assert table["judged"] == shown.tolist() and table["metrics"]["label_accuracy"] == 0.8
    judge = table["judge"]
    assert judge["accuracy"] == 1 and sum(c["num"] for c in judge["classes"].values()) == judge["num"] == 60
    assert all(c["accuracy"] == 1 and c["num"] > 0 for c in judge["classes"].values()) and len(judge["classes"]) == 3


def test_classes_that_the_svm_never_saw_are_named():
    real, asked, names = np.arange(300) % 2, np.arange(30) % 3, ["cat", "dog", "fox"]

    def note(asked):
        made = features(asked)
        table = evaluate_features(
            features(real), made, real, asked, EvaluationSettings("d", "pixels"), class_names=names
        )
        return table["metrics"]["label_accuracy"], table["notes"].get("label_accuracy")

    accuracy, text = note(asked)
    assert accuracy < 0.7 and text == "the judge never saw these classes, so all their images count as wrong: fox"
    assert note(asked[asked < 2]) == (1, None)


def test_an_svm_errs_in_one_class():
    """A fifth of the images of class 0 are labeled 1 in the reference: the judge contradicts labels of class 1 only."""
    shown = np.arange(300) % 3
    labels = np.where((shown == 0) & (np.arange(300) % 5 == 0), 1, shown)
    settings = EvaluationSettings("d", "pixels")
    classes = evaluate_features(features(shown), features(shown), labels, shown, settings)["judge"]["classes"]
    assert classes["1"]["accuracy"] < 0.95 and classes["0"]["accuracy"] == classes["2"]["accuracy"] == 1


def test_a_classifier_and_classes_of_which_few_labels_are_known():
    real = np.repeat([0, 1, 2], 10)
    seen = features(real, np.where(np.arange(30) % 5 == 0, 2, real))  # two errors each in classes 0 and 1
    known = np.where((np.arange(30) % 10 < 5) & (real < 2), real, -1)
    settings = EvaluationSettings("d", "pixels", judge="cls.pkl")
    judge = evaluate_features(seen, seen, real, real, settings, judge_labels=known)["judge"]
    assert judge["classes"] == {str(c): dict(accuracy=0.8, num=5) for c in (0, 1)} and judge["accuracy"] == 0.8


def test_without_a_judge_nothing_is_judged():
    labels = np.arange(30) % 3
    settings = EvaluationSettings("d", "pixels", judge="none")
    table = evaluate_features(features(labels), features(labels), labels, labels, settings)
    assert table["judge"] is None and table["judged"] is None


def test_one_line_for_all_images(tmp_path):
    result = dict(images="[\\n 1,\n 2 ]", judged=[3, -1, *range(5)], one=[4], interval=[0.5, 2], empty=[], nested=[[1]])
    save_json([result], str(tmp_path / "t.json"))
    text = (tmp_path / "t.json").read_text()
    assert json.loads(text) == [result] and '"judged": [3, -1, 0, 1, 2, 3, 4],\n' in text
