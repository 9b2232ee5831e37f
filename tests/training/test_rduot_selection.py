"""The robust cost selects training images, all of them if the set looks clean; what stays is trained on as by DDGAN."""

import numpy as np
import pytest
import torch

from archives.dataset import ImageDataset
from archives.posterior import compress
from dnnlib import UserError
from tests.support.objectives import CPU
from tests.support.rduot import Images, contrasts, make, step
from tests.support.synth import make_archive
from training.left_out import Selection
from training.objectives import rduot
from training.objectives.posterior_labels import PosteriorLabels
from training.objectives.rduot import CONJUGATES, RDUOT, slope


def test_the_robust_cost_selects_among_the_training_images(tmp_path):
    data = contrasts(0.2, 0.8)
    objective = make(data, cost="robust", tau=10.0)
    assert not set(objective.train_indices.tolist()) & set(np.flatnonzero(data.outliers))
    assert objective.losses.tau == 0 and 40 < len(objective.train_indices) < 48
    (line,) = (line for line in objective.notes() if line.startswith("The cost leaves out"))
    assert "100.0% of the outliers" in line
    mean = objective.cost.of_training(torch.from_numpy(np.flatnonzero(data.outliers))).mean()
    assert f"{mean:.4g} for outliers" in objective.notes()[-1]
    drawn = []
    objective.draw_sheet = lambda images, path: drawn.append(images)
    assert "expensive" in objective.finish(str(tmp_path))[0]
    order = drawn[0].astype(float).std(axis=(1, 2, 3))
    assert order[:16].min() > order[16:].max()


def test_where_nothing_is_foreign_the_robust_cost_trains_as_ddgan_does():
    data = Images(n=40)  # so few that all are core
    wants = step(make(data, method="ddgan", tau=0.0), slice(0, 8))
    objective = make(data, cost="robust", tau=10.0, balanced=True)
    assert any("So all images stay" in line for line in objective.notes())
    for name, gradient in step(objective, slice(0, 8)).items():
        assert torch.equal(gradient, wants[name]), name
    before = step(make(data, cost="robust", tau=10.0, balanced=False), slice(0, 8))  # as runs of earlier versions
    assert not any(torch.equal(before[name], wants[name]) for name in before if name.startswith("net."))


def test_a_set_of_one_image():
    with pytest.raises(UserError, match="compares images, and there is only one"):
        make(Images(n=1), cost="robust", tau=10.0)


def test_a_share_as_of_clean_sets_stays(monkeypatch):
    data = contrasts(0.2, 0.8)
    for clean in (True, False):
        monkeypatch.setattr(rduot, "is_clean", lambda *_, clean=clean: clean)
        objective = make(data, cost="robust", tau=10.0, balanced=True)
        assert (objective.train_indices is None) == objective.selected.all() == clean
        assert make(data, cost="robust", tau=10.0).train_indices is not None  # runs of earlier versions


@pytest.mark.parametrize("clean", [True, False])
def test_why_all_images_stay_is_said(clean):
    """A tiny tau leaves no image out, though a group of them is expensive."""
    data = Images(n=40) if clean else contrasts(0.2, 0.8, n=128)
    objective = make(data, cost="robust", tau=1e-9, balanced=True)
    assert objective.selected.all()
    (line,) = (line for line in objective.notes() if "So all images stay" in line)
    assert line.startswith("The set looks clean" if clean else "No image is so expensive at this tau")


def test_images_that_cost_something_stay_in_proportion_to_their_weights():
    selection = Selection(np.repeat([0.0, 0.1], [9000, 1000]), 10.0, *2 * [slope(CONJUGATES["softplus"])])
    w = selection(torch.tensor([0.0, 0.1]))
    kept = selection.draw(np.repeat([0.0, 0.1], [100, 100_000]), seed=0)
    assert kept[:100].all() and kept[100:].mean() == pytest.approx(float(w[1] / w[0]), abs=0.01)
    assert 0.2 < w[1] / w[0] < 0.6
    assert (selection.draw(np.full(999, 0.1), 1) == selection.draw(np.full(999, 0.1), 1)).all()


def test_with_posterior_labels_what_both_leave_is_learned():
    data = contrasts(0.2, 0.8)
    wrong = np.arange(64) % 2 == 0
    classes = np.where(wrong, (data.labels + 1) % 4, data.labels)
    labels = PosteriorLabels(compress(np.eye(4)[classes], data.labels), "drop", CPU)
    config = make(data, cost="robust", tau=10.0).config
    both, alone = RDUOT(config, data, CPU, posterior_labels=labels), RDUOT(config, data, CPU)
    assert set(both.train_indices.tolist()) == set(alone.train_indices.tolist()) - set(np.flatnonzero(wrong))


def test_a_state_keeps_the_selection_and_a_class_that_loses_most_of_its_images_is_named():
    data = contrasts(0.2, 0.8)
    one, other = make(data, cost="robust", tau=10.0), make(data, cost="robust", tau=10.0)
    one._choose_items(data.labels != 2)  # as another version might select
    assert not torch.equal(one.train_indices, other.train_indices)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.train_indices, other.train_indices)
    line = next(line for line in other.notes() if line.startswith("Warning: most images of these classes"))
    assert line.count("%") == 1 and " 2 (100%)." in line
    assert not any(line.startswith("Warning: most") for line in make(data, cost="robust", tau=10.0).notes())


@pytest.mark.parametrize("labels, named", [([0, 1] * 16 + [2] * 8, True), ([0.5] * 40, False)])
def test_a_run_without_labels_names_the_classes_of_the_archive(tmp_path, labels, named):
    pixels = contrasts(0.2, 0.8, n=40).pixels.permute(0, 2, 3, 1).numpy()
    path = make_archive(tmp_path / "a.zip", pixels, labels, class_names=["cat", "dog", "elk"] if named else None)
    objective = make(ImageDataset(str(path), use_labels=False, xflip=True), cost="robust", tau=10.0)
    objective._choose_items(np.arange(80) % 40 < 32)
    lines = [line for line in objective.notes() if line.startswith("Warning: most")]
    assert len(lines) == named and all("left out: elk (100%)." in line for line in lines)
