"""The classifier's T, given, estimated or learned from an estimate, and its temperature, which TDSM divides by."""

import re

import numpy as np
import pytest
import torch

from archives.label_noise import transition_matrix
from archives.posterior import compress
from dnnlib import UserError
from tests.support.objectives import CPU, Data, FixedClassifier, make_config, ready
from torch_utils import persistence
from torch_utils.training_stats import Stats
from training.learned_transition import LearnedTransition
from training.objectives import classifier
from training.objectives.classifier import REACH, ClassifierObjective
from training.objectives.posterior_labels import PosteriorLabels
from training.objectives.tdsm import TDSM
from training.temperature import Temperature

T = transition_matrix("sym", 0.4, 4)


def data(**kwargs):
    found = Data(**kwargs)
    found.clean_labels = None
    return found


def make(dataset=None, transition=None, noise_levels=None, **kwargs):
    config = make_config(total_nimg=3200, noise_levels=noise_levels or dict(precond="edm"))
    config.network.kwargs = dict(depth="small", model_channels=8, channel_mult=[1, 2, 4], dropout=0.0)
    return ready(ClassifierObjective, config, dataset or data(), CPU, transition=transition, **kwargs)


def test_learned_transition_starts_at_any_transition():
    net = LearnedTransition(4)
    asym = np.eye(4)
    asym[0] = [0.6, 0.4, 0, 0]
    for start in (T, asym):
        net.start_at(torch.tensor(start, dtype=torch.float32))
        np.testing.assert_allclose(net().detach(), start, atol=1e-3)
        assert net.theta.abs().max() < 10  # where the sigmoid still has a slope


def test_learned_transition_begins_with_the_estimate_and_moves(capsys):
    objective = make(learn=True, estimate=lambda: T)
    objective.begin()
    assert re.search(r"Label noise, estimated: 4\d\.\d% of the labels are wrong", capsys.readouterr().out)
    trained = objective.trained["transition"]
    for net in (trained.net, trained.ema):
        np.testing.assert_allclose(net().detach(), T, atol=1e-6)
    rates = [trained.lr * trained.lr_factor(nimg) for nimg in range(0, 3200, 32)]
    # First the classifier learns alone. Then T can go anywhere: Adam moves theta by about the rate in each step.
    assert set(rates[:30]) == {0} and sum(rates[30:60]) == pytest.approx(REACH) and set(rates[75:]) == {0}


def test_estimate_that_turns_classes_into_each_other_is_doubted(capsys):
    make(estimate=lambda: T[[1, 0, 2, 3]]).begin()
    assert "Warning: by this estimate, images of 2 classes carry another label" in capsys.readouterr().out
    make(estimate=lambda: T).begin()
    assert "Warning" not in capsys.readouterr().out


def test_estimate_is_in_the_state_and_not_repeated(capsys):
    objective = make(estimate=lambda: T)
    objective.begin()
    assert objective.info()["posterior"] == "clean"
    np.testing.assert_allclose(objective.info()["transition"], T)
    resumed = make(estimate=lambda: pytest.fail("estimated again"))
    resumed.load_state_dict(objective.state_dict())
    np.testing.assert_array_equal(resumed.info()["transition"], objective.info()["transition"])


def test_estimate_that_excludes_a_label_of_the_data_is_refused():
    excluded = np.eye(4)
    excluded[3] = [1, 0, 0, 0]
    with pytest.raises(UserError, match="label 3 occurs in the data"):
        make(estimate=lambda: excluded).begin()


@pytest.mark.parametrize("transition", [None, T])
def test_snapshot_records_the_temperature_that_held_out_labels_ask_for(transition, tmp_path):
    """The pixels say the class, but the logits are four times too large; the record undoes it, also from the file."""
    dataset, rng = data(n=2000), np.random.default_rng(0)
    levels = torch.tensor([20, 90, 160, 230], dtype=torch.uint8)
    dataset.pixels = levels[torch.from_numpy(dataset.labels)].reshape(-1, 1, 1, 1).expand(2000, 1, 8, 8)
    dataset.labels = (T[dataset.labels].cumsum(1) > rng.random([2000, 1])).argmax(1)
    objective = make(dataset, transition, noise_levels=dict(precond="edm", P_mean=1.0))

    def exact(x, sigma):
        distance = x.mean(dim=[1, 2, 3])[:, None] - (levels / 127.5 - 1)
        clean = -distance.square() / (2 * (sigma[:, None] / 8) ** 2)
        return clean if transition is not None else (clean.softmax(dim=1) @ torch.from_numpy(T).float()).log()

    objective.trained["net"].ema = lambda x, sigma: 4 * exact(x, sigma)
    loss, info = objective.validate(), objective.info()
    found = Temperature.read(info["temperature"], "x.pkl")
    # 500 held-out images do not say for sure that it is 4.
    assert (found(torch.tensor([1.0, 3.0])) > 2).all() and (found(torch.tensor([1.0, 3.0])) < 4.4).all()
    objective.trained["net"].ema = exact
    assert info["calibrated_loss"] == pytest.approx(objective.validate(), abs=0.01)
    assert info["calibrated_loss"] < loss - 0.01

    path = str(tmp_path / "network-snapshot-000000.pkl")
    net = make().trained["net"].export()
    persistence.save_snapshot(path, dict(ema=net, info=dict(info, validation_loss=loss)))
    line = objective.results(path)[0]
    assert line == (f"Temperature: {found}; held-out loss {loss:.4f} without it, {info['calibrated_loss']:.4f} with it")


@pytest.mark.parametrize("n, images", [(2000, 256), (80, 20)])
def test_the_temperature_counts_the_images_that_it_has_seen(monkeypatch, n, images):
    """256 at a time: of 500 held-out images the first 256 are as many as asked for, and 20 come again and again."""
    seen, fit = [], classifier.fit_temperature
    monkeypatch.setattr(classifier, "CALIBRATION_DRAWS", 200)
    monkeypatch.setattr(classifier, "VALIDATION_DRAWS", 512)
    monkeypatch.setattr(classifier, "fit_temperature", lambda *a, **k: seen.append(k["images"]) or fit(*a, **k))
    objective = make(data(n=n))
    objective.validate()
    objective.info()
    assert seen == [images]


def test_posterior_of_each_image_takes_the_place_of_its_label():
    """The loss is the cross-entropy of P(y | x_0, o), in training and validation, and so is the temperature's."""
    dataset = data(n=400)
    shares = np.random.default_rng(0).dirichlet(np.full(4, 0.5), 400)
    shares = compress(shares, dataset.labels)
    objective = make(dataset, transition=T, targets=shares)
    exact = PosteriorLabels(shares, "sample", CPU).expand(torch.arange(400)).float()
    items = torch.tensor([5, 0, 399])
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    objective.trained["net"].forward = lambda x, sigma, augment_labels=None: logits
    draws = objective.draw(dataset.pixels[items], torch.Generator().manual_seed(0)) | dict(items=items)
    found = objective.loss(dataset.pixels[items], dataset.onehot(items), draws, Stats(CPU))
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits, exact[items], reduction="none"))

    # A network that knows the posterior of each image, but is too sure by a factor of two.
    order = iter(objective.val_indices.repeat(-(-classifier.VALIDATION_DRAWS // len(objective.val_indices))).split(256))
    objective.trained["net"].ema = lambda x, sigma: 2 * exact[next(order)].clamp_min(1e-4).log()
    loss, info = objective.validate(), objective.info()
    sure = torch.log_softmax(2 * exact.clamp_min(1e-4).log(), dim=1)
    expected = -(exact * sure).sum(dim=1)[objective.val_indices].mean()
    assert info["posterior"] == "clean" and np.allclose(info["transition"], T)
    assert loss == pytest.approx(float(expected), rel=1e-4)
    assert float(Temperature.read(info["temperature"], "x")(torch.tensor(1.0))) > 1.3


def tdsm(temp, temperature=None):
    config = make_config(tdsm=dict(tau=0.0, temp=temp))
    kwargs = dict(classifier=FixedClassifier(), transition=T, posterior="clean", temperature=temperature)
    return ready(TDSM, config, data(), CPU, **kwargs)


def test_tdsm_divides_by_the_temperature_of_each_noise_level():
    x, observed = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4
    sigma = torch.tensor([0.1, 1.0, 10.0] * 2).reshape(-1, 1, 1, 1)
    recorded = Temperature((0.0, 1.0), 0.5, 2.0)  # temp = sigma, from 0.5 to 2
    weights = tdsm("auto", recorded).weights(x, sigma, observed, None)
    for row, temp in enumerate([0.5, 1.0, 2.0] * 2):
        alone = tdsm(temp).weights(x, sigma, observed, None)
        torch.testing.assert_close(weights[row], alone[row], rtol=1e-5, atol=1e-6)
    # A number overrides the record, and without a record the logits stay as they are.
    for stated, record, same in ((2.0, recorded, 2.0), ("auto", None, 1.0)):
        torch.testing.assert_close(
            tdsm(stated, record).weights(x, sigma, observed, None), tdsm(same).weights(x, sigma, observed, None)
        )
    assert tdsm("auto", recorded).notes() == [
        "The classifier's temperature: 0.50 at sigma 0.5, 1.00 at sigma 1, 2.00 at sigma 2."
    ]
    assert "no temperature" in tdsm("auto").notes()[0] and tdsm(2.0).notes() == tdsm(1.0, recorded).notes() == []
