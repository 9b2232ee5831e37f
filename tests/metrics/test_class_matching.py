"""Classes with names: the same class may have another number in each set."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from archives.dataset import BatchStream, ImageDataset
from dnnlib import UserError
from metrics import evaluation
from metrics.class_matching import match_classes, match_names
from metrics.detectors import ClassifierDetector, PixelDetector
from metrics.evaluation import Comparison, Inputs
from metrics.feature_cache import FeatureCache
from metrics.features import Features, compute_features
from metrics.settings import EvaluationSettings
from tests.support.synth import make_archive, pictures


@pytest.mark.parametrize(
    "names, others, numbers",
    [
        (["b", "a"], ["a", "b"], [1, 0]),
        (["c", "a", "d"], ["a", "b", "c"], [2, 0, 3]),  # the reference has no d
        (["a", "b"], ["a", "b", "c"], [0, 1]),
        (["a", "b"], ["a", "b"], None),
        (["x", "y"], ["a", "b"], None),
        (["a", "a", "b"], ["b", "a"], None),
        (None, ["a", "b"], None),
        (["a", "b"], None, None),
    ],
)
def test_numbers_by_name(names, others, numbers):
    found = match_names(names, others)
    assert (found if found is None else found.tolist()) == numbers


def test_matched_images(tmp_path):
    def archive(name, labels, names):
        return ImageDataset(str(make_archive(tmp_path / name, pictures(6), labels, class_names=names)))

    reference = archive("reference.zip", [0, 1, 2, 0, 1, 2], ["cat", "dog", "cow"])
    source = archive("source.zip", [0, 1, 2, 2, 1, 0], ["cow", "cat", "elk"])
    (found,) = match_classes([source], reference)
    assert found.labels.tolist() == [2, 0, 3, 3, 0, 2] and found.label_dim == 4
    assert found.class_names == ["cat", "dog", "cow", "elk"]
    assert found.class_matching == "by name; the reference has no elk"
    assert found.onehot(np.array([2, 0])).argmax(dim=1).tolist() == [3, 2]
    assert len(found) == 6 and found.path == source.path
    features = compute_features(found, PixelDetector(), 4, "cpu").features
    assert features.equal(compute_features(source, PixelDetector(), 4, "cpu").features)
    other = archive("other.zip", [0, 1, 2, 2, 1, 0], ["1", "2", "3"])
    (found,) = match_classes([other], reference)
    assert found.labels.tolist() == other.labels.tolist() and found.class_names == reference.class_names
    assert found.class_matching == "by number, since no name occurs in both sets: '1' is taken for 'cat'"
    for same in (reference, archive("few.zip", [0, 1, 0, 0, 1, 1], ["cat", "dog"])):
        assert match_classes([same], reference)[0] is same


def test_a_judge_must_know_every_class_that_it_meets(tmp_path, monkeypatch):
    def reference(labels, **extra):
        path = make_archive(tmp_path / "a.zip", pictures(4), labels, class_names=["a", "b", "c"], **extra)
        return ImageDataset(str(path))

    net = torch.nn.Linear(1, 1)
    net.label_dim = 2
    judge = ClassifierDetector(net, "judge.pkl", "cpu", ["c", "a"])
    monkeypatch.setattr(evaluation, "load_detector", lambda *_: judge)
    assert evaluation.load_judge("judge.pkl", "cpu", reference([0, 2, 0, 2])) is judge
    with pytest.raises(UserError, match="knows 2 classes, but not all of .*; it lacks b"):
        evaluation.load_judge("judge.pkl", "cpu", reference([0, 1, 0, 2]))
    foreign = reference([0, 1, 0, 2], outliers=["00000/img00000001.png"])
    assert evaluation.load_judge("judge.pkl", "cpu", foreign) is judge


def test_classes_that_the_reference_lacks_have_one_number_in_all_sets(tmp_path):
    def archive(name, labels, names):
        return ImageDataset(str(make_archive(tmp_path / name, pictures(4), labels, class_names=names)))

    reference = archive("reference.zip", [0, 1, 0, 1], ["a", "b"])
    vectors = np.eye(4)[[0, 1, 2, 3]].tolist()
    sets = archive("made.zip", vectors, ["a", "c", "b", "d"]), archive("test.zip", [0, 1, 2, 3], ["a", "b", "d", "c"])
    made, test = match_classes(sets, reference)
    assert made.labels.tolist() == [0, 2, 1, 3] and test.labels.tolist() == [0, 1, 3, 2]
    assert made.class_names == test.class_names == ["a", "b", "c", "d"]
    taken = torch.cat([next(BatchStream(made, batch_per_rank=2, start_nimg=start))[1] for start in (0, 2)])
    assert sorted(taken.argmax(dim=1).tolist()) == [0, 1, 2, 3]
    stream = BatchStream(made, batch_per_rank=4)
    images, labels = next(stream)
    assert labels.argmax(dim=1).tolist() == made.labels[stream.items].tolist()


def test_what_a_judge_sees_has_the_numbers_of_the_reference(tmp_path):
    path = make_archive(tmp_path / "a.zip", pictures(6), [0, 1, 0, 1, 0, 1], class_names=["a", "b"])
    reference = ImageDataset(str(path))

    def accuracy(names, source=reference, reference=reference):
        judge = SimpleNamespace(class_names=names, name="judge.pkl")
        inputs = Inputs([source], reference, PixelDetector(), judge, None, None, FeatureCache(None))
        seen = Features(torch.arange(12.0).view(6, 2), None, np.array([1, 0, 1, 0, 1, 2]))  # turned round, one wrong
        settings = EvaluationSettings("a.zip", "pixels", metrics=("label_accuracy",))
        result = Comparison(inputs, settings, "cpu", seen)(source, seen)
        return result["metrics"]["label_accuracy"], result["judge"]["accuracy"], result["class_matching"]

    assert accuracy(["b", "a", "c"]) == (
        pytest.approx(5 / 6),
        pytest.approx(5 / 6),
        "of the judge by name; the reference has no c",
    )
    assert accuracy(None) == (0, 0, None)
    more = make_archive(tmp_path / "c.zip", pictures(6), [0, 2, 0, 2, 0, 1], class_names=["a", "c", "b"])
    assert accuracy(["b", "a", "c"], match_classes([ImageDataset(str(more))], reference)[0])[0] == 1  # c, only there
    assert accuracy(["x", "y", "z"])[2].startswith("of the judge by number, since no name occurs in both sets")
    # The numbers of a reference without names are those of the images.
    nameless = ImageDataset(str(make_archive(tmp_path / "n.zip", pictures(6), [0, 1, 0, 1, 0, 1])))
    assert accuracy(["b", "a", "c"], reference, nameless) == accuracy(["b", "a", "c"])


def test_cas_matches_images_and_test_set_by_name_where_the_reference_has_no_names(tmp_path, monkeypatch):
    def archive(name, labels, **names):
        return ImageDataset(str(make_archive(tmp_path / name, pictures(6), labels, **names)))

    reference = archive("reference.zip", [0, 1, 2, 0, 1, 2])
    made = archive("made.zip", [0, 1, 2, 0, 1, 2], class_names=["cat", "cow", "dog"])
    test = archive("test.zip", [0, 1, 0, 1, 0, 2], class_names=["cow", "dog", "elk"])
    seen = []
    monkeypatch.setattr(evaluation, "classification_accuracy_score", lambda *a: seen.append(a[:2]) or dict(accuracy=1))
    inputs = Inputs([made], reference, PixelDetector(), None, test, None, FeatureCache(None))
    settings = EvaluationSettings("reference.zip", "pixels", metrics=("fid",))
    features = Features(torch.arange(12.0).view(6, 2), None, None)
    result = Comparison(inputs, settings, "cpu", features)(made, features)
    ((images, tested),) = seen
    assert images is made and tested.labels.tolist() == [1, 2, 1, 2, 1, 3]
    assert result["class_matching"] == "of the test set by name; the set of images has no elk"
