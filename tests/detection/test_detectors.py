"""Detectors: the formulas of the sieve, the label file that follows from a posterior, its description and picture."""

import math

import numpy as np
import pytest
import torch

from archives.dataset import ImageDataset, to_float
from detection import classifier, cores, gce
from detection import quality as quality_file
from detection.bayes import Judgment, judge, judge_seen
from detection.classifier import log_posterior
from detection.quality import describe, label_file, quality
from detection.trainer import Settings
from dnnlib import UserError
from sampling.grid import image_sheet
from tests.support.synth import make_archive, pictures
from torch_utils import distributed

LN2 = math.log(2)
P = torch.tensor([[0.5, 0.25, 0.25]] * 3).log()
ALL = torch.arange(3)


def test_loss_by_hand():
    rho = torch.tensor([0.5, 0.25, 0.25])  # E_c CE = 1.5 ln 2
    for beta, expected in ((0, [1, 2, 2]), (1, [-0.5, 0.5, 0.5]), (2, [-2, -1, -1])):
        loss = cores.regularized_loss(P, ALL, rho, beta) / LN2
        torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float32))


def test_loss_has_a_lower_bound_and_finite_gradients():
    logits = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    loss = cores.regularized_loss(torch.log_softmax(logits, 1), torch.tensor([0]), torch.tensor([0, 0.5, 0.5]), 2.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(-2 * math.log(1e8), rel=1e-5) and logits.grad.isfinite().all()


def test_rule_by_hand():
    assert cores.keep(P, ALL).tolist() == [True, False, False]  # ln 2 {1, 2, 2} against a mean of ln 2 * 5/3
    assert cores.keep(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([1])).all()  # equality suffices
    second = torch.tensor([[0.6, 0.4, 1e-9]]).log()  # the rule also accepts the second most probable class
    assert cores.keep(second, torch.tensor([1])).all()


def test_schedule():
    assert [cores.schedule(e, 60) for e in (0, 9, 10, 25, 40, 59)] == [
        (0, False),
        (0, False),
        (0, True),
        (1, True),
        (2, True),
        (2, True),
    ]
    for e in range(60):  # a longer run stays longer at the end
        assert cores.schedule(e, 600) == cores.schedule(e, 60)
    assert cores.schedule(599, 600) == (2, True)
    # A shorter run goes through the same phases.
    assert [cores.schedule(e, 6) for e in range(6)] == [cores.schedule(10 * e, 60) for e in range(6)]


class ScriptedTrainer:
    """Stands in for `cores.Trainer`: its posterior follows a script, and it records its epochs."""

    def __init__(self, dataset, device, settings):
        self.labels = torch.from_numpy(dataset.labels)
        self.ema = "net"
        self.epochs = []
        ScriptedTrainer.last = self

    def close(self):
        pass

    def epoch(self, number, items, loss, advance):
        assert loss.func is cores.regularized_loss
        self.epochs.append((items.tolist(), loss.keywords["rho"].tolist(), loss.keywords["beta"]))

    def posterior(self):
        number = len(self.epochs) - 1
        right = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.8, 0.2]])
        if number < 12:  # early on, image 2 seems wrong and image 3 right
            right = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.2, 0.8]])
        if number == 59:
            right[0] = torch.tensor([0.2, 0.8])
        return right.log()


@pytest.fixture
def four(tmp_path):
    return ImageDataset(str(make_archive(tmp_path / "four.zip", pictures(4), [0, 0, 1, 1])))


@pytest.mark.parametrize("by_heart, rule", [(3, judge), (4, judge_seen)])
def test_cores_trains_on_what_it_keeps_and_averages_the_late_posteriors(four, monkeypatch, by_heart, rule):
    monkeypatch.setattr(cores, "Trainer", ScriptedTrainer)
    monkeypatch.setattr(cores, "BY_HEART", by_heart)
    found, net = cores.detect(four, torch.device("cpu"), Settings())
    epochs = ScriptedTrainer.last.epochs
    assert [items for items, *_ in epochs] == [[0, 1, 2, 3]] * 10 + [[0, 1, 3]] * 3 + [[0, 1, 2]] * 47
    np.testing.assert_allclose([rho for _, rho, _ in epochs], [[0.5, 0.5]] * 10 + [[2 / 3, 1 / 3]] * 50, rtol=1e-6)
    assert [beta for *_, beta in epochs] == [cores.schedule(e, 60)[0] for e in range(60)]
    # Epochs 25 to 59 count, in the last of which image 0 is doubted.
    mean = np.array([[(34 * 0.9 + 0.2) / 35] * 2, [0.9, 0.1], [0.1, 0.9], [0.8, 0.2]])
    mean[0, 1] = 1 - mean[0, 0]
    expected = rule(np.log(mean).astype(np.float32), four.labels)
    np.testing.assert_allclose(found.score, expected.posterior[range(4), four.labels], rtol=1e-4)
    np.testing.assert_allclose(found.transition, expected.transition)
    assert net == "net"


def test_processes_train_on_what_they_decided_together(four, monkeypatch):
    """One process decides about each image. A process that would round otherwise takes as many steps as the others."""

    def gather(found):
        return [torch.tensor([True, False, True, True])] if torch.is_tensor(found) else [found]

    monkeypatch.setattr(cores, "Trainer", ScriptedTrainer)
    monkeypatch.setattr(distributed, "all_gather_object", gather)
    cores.detect(four, torch.device("cpu"), Settings())
    assert [items for items, *_ in ScriptedTrainer.last.epochs] == [[0, 1, 2, 3]] * 10 + [[0, 2, 3]] * 50


def judgment(posterior, observed):
    """Return a judgment with this posterior of labels, as from a classifier that mixes up nothing."""
    posterior = np.asarray(posterior, dtype=np.float32)
    rate = 1 - float(posterior[np.arange(len(posterior)), observed].mean())
    eye = np.eye(posterior.shape[1])
    return Judgment(posterior, eye, rate, (max(rate - 0.1, 0), min(rate + 0.1, 1)), eye)


class LearningTrainer:
    """Stands in for `gce.Trainer`: it is certain of more labels round by round, up to a round, then of fewer."""

    def __init__(self, dataset, device, settings):
        self.labels, self.epochs, self.ema = dataset.labels, [], torch.nn.Linear(1, 1)
        LearningTrainer.last = self

    def close(self):
        pass

    def state_dict(self):
        return {}

    def epoch(self, number, items, loss, advance):
        assert loss is gce.robust_loss
        self.epochs.append(items.tolist())
        with torch.no_grad():
            self.ema.bias.fill_(number)

    def posterior(self, items=None, reach=0):
        items = np.arange(len(self.labels)) if items is None else items
        known = 1 - 1 / (1 + min(len(self.epochs), 12 - len(self.epochs)))  # best after six epochs
        p = torch.full([len(items), 2], 1 - known)
        p[torch.arange(len(items)), torch.from_numpy(self.labels[items])] = known
        return p.log().log_softmax(dim=1)


def test_training_stops_when_held_out_labels_get_no_more_likely(tmp_path, monkeypatch):
    dataset = ImageDataset(str(make_archive(tmp_path / "a.zip", pictures(40), [0, 1] * 20)))
    monkeypatch.setattr(gce, "Trainer", LearningTrainer)
    monkeypatch.setattr(gce, "ROUND", Settings.batch)  # an epoch sees so many images, however few there are
    _, net = gce.detect(dataset, torch.device("cpu"), Settings())
    epochs = LearningTrainer.last.epochs
    assert len(epochs) == 6 + gce.PATIENCE and net.bias.item() == 5  # the weights after the sixth epoch
    (items,) = {tuple(items) for items in epochs}
    assert len(items) == 36  # a tenth is held out in all epochs
    gce.detect(dataset, torch.device("cpu"), Settings(epochs=2))
    assert LearningTrainer.last.epochs == [list(range(40))] * 2  # a stated length holds nothing out


def test_a_posterior_that_is_too_certain_is_softened():
    rng, c, n = np.random.default_rng(3), 4, 20_000
    clean = rng.integers(0, c, n)
    x = clean * 2.5 + rng.normal(size=n)
    observed = np.where(rng.random(n) < 0.3, (clean + rng.integers(1, c, n)) % c, clean)
    log_p = torch.from_numpy(-((x[:, None] - 2.5 * np.arange(c)) ** 2) / 2)
    exact = judge(log_p.log_softmax(dim=1).float().numpy(), observed, temp=1.0)
    assert exact.rate == pytest.approx(0.3, abs=0.02)
    rates, temps = {}, {}
    for sharpened in (0.25, 1.0, 4.0):
        judged = judge((sharpened * log_p).log_softmax(dim=1).float().numpy(), observed)
        rates[sharpened], temps[sharpened] = judged.rate, judged.temp
        assert judged.interval[0] <= judged.rate <= judged.interval[1]
    assert temps[0.25] < 0.5 < temps[1.0] < 1.5 < temps[4.0]
    assert max(rates.values()) - min(rates.values()) < 0.05  # without a temperature: 0.41


def test_label_file_of_a_posterior(tmp_path):
    labels = [0, 0, 1, 1, 2]
    path = make_archive(tmp_path / "a.zip", pictures(5), labels, class_names=list("abcd"))
    dataset = ImageDataset(str(path))
    posterior = np.array([[0.7, 0.3, 0, 0], [0.2, 0.5, 0.3, 0], [0, 1, 0, 0], [0, 0.5, 0.5, 0], [0.4, 0.35, 0.25, 0]])
    found = label_file(dataset, judgment(posterior, labels))
    assert found.is_clean.tolist() == [True, False, True, True, False]  # one half counts for the label
    assert found.suggested.tolist() == [0, 1, 1, 1, 0]
    np.testing.assert_allclose(found.score, [0.7, 0.2, 1, 0.5, 0.25])
    np.testing.assert_allclose(found.suggested_score, [0.7, 0.5, 1, 0.5, 0.4])
    np.testing.assert_allclose(found.per_class_noise_rate, [0.55, 0.25, 0.75, 0])
    assert found.noise_rate == pytest.approx(1 - 2.65 / 5) and found.noise_interval[0] < found.noise_rate
    best, probability = found.posterior.best()
    assert best.tolist() == [0, 1, 1, 1, 0]
    np.testing.assert_allclose(probability, [0.7, 0.5, 1, 0.5, 0.4], atol=1e-3)


def test_bayes_rule_by_hand():
    T = np.array([[0.8, 0.2], [0.4, 0.6]])
    p = np.log(np.array([[0.5, 0.5], [0.1, 0.9], [0.5, 0.5]], dtype=np.float32))
    judged = judge(p, np.array([0, 1, 1]), T, temp=1.0)
    expected = [[0.4 / 0.6, 0.2 / 0.6], [0.02 / 0.56, 0.54 / 0.56], [0.1 / 0.4, 0.3 / 0.4]]
    np.testing.assert_allclose(judged.posterior, expected, rtol=1e-5)
    assert judged.rate == pytest.approx(1 - np.mean([0.4 / 0.6, 0.54 / 0.56, 0.3 / 0.4]), abs=1e-6)
    w, q = np.array(expected), np.array([[0.5, 0.5], [0.1, 0.9], [0.5, 0.5]])
    np.testing.assert_allclose(judged.confusion, (w.T @ q) / w.sum(axis=0)[:, None], rtol=1e-5)


def test_a_posterior_over_shifts_is_the_mean_of_the_shifted_images_probabilities(tmp_path):
    class Corner(torch.nn.Module):
        def forward(self, x, sigma):
            return x[:, :1, 0, 0].expand(-1, 2) * torch.tensor([1.0, 0.0])

    dataset = ImageDataset(str(make_archive(tmp_path / "a.zip", pictures(3), [0, 1, 0])))
    x = to_float(dataset.images(np.arange(3)))
    # Shifts down and right repeat the border, so the corner keeps its value; up and left bring in its neighbors.
    corner = x[:, 0, [0, 0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0, 0, 1]]
    expected = torch.sigmoid(corner).mean(dim=1)
    found = log_posterior(Corner(), dataset, torch.device("cpu"), reach=1).exp()
    torch.testing.assert_close(found[:, 0], expected)
    torch.testing.assert_close(
        log_posterior(Corner(), dataset, torch.device("cpu"))[:, 0], torch.sigmoid(x[:, 0, 0, 0]).log()
    )


def test_a_posterior_that_has_seen_the_labels_counts_as_it_is():
    p = np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.2, 0.3, 0.5]])
    judged = judge_seen(np.log(np.maximum(p, 1e-30)).astype(np.float32), np.array([0, 0, 1]))
    np.testing.assert_allclose(judged.posterior, p, atol=1e-6)
    assert judged.rate == pytest.approx(1 - (0.9 + 0.2 + 0.3) / 3)
    T = [[1.1 / 1.3, 0.2 / 1.3, 0], [0.9 / 1.2, 0.3 / 1.2, 0], [0, 0, 1]]  # no label names the third class
    np.testing.assert_allclose(judged.transition, T, atol=1e-5)
    looks = (p.T @ p) / p.sum(axis=0)[:, None]
    np.testing.assert_allclose(judged.confusion, [*looks[:2], [0, 0, 1]], rtol=1e-5)
    assert judged.interval[0] < min(judged.rate, 2 / 3) and judged.interval[1] == 1  # two are not the most probable


@pytest.mark.parametrize("rule", [judge, judge_seen])
def test_a_classifier_that_has_diverged_judges_nothing(rule):
    log_probs = np.log(np.full([9, 3], 1 / 3, dtype=np.float32))
    log_probs[4] = np.nan
    with pytest.raises(UserError, match="diverged"):
        rule(log_probs, np.arange(9) % 3)


@pytest.mark.parametrize("noise", ["symmetric", "one class turns into the next", "none"])
def test_the_rate_and_the_flags_of_an_exact_posterior_are_right(noise):
    """Images are numbers with a normal density per class, so the posterior is known; T is counted from the labels."""
    rng, c, n = np.random.default_rng(3), 4, 20_000
    T = np.eye(c)
    if noise != "none":
        T = 0.6 * T + 0.4 * (np.roll(T, 1, axis=1) if noise != "symmetric" else (1 - T) / (c - 1))
    clean = rng.integers(0, c, n)
    x = clean * 3.0 + rng.normal(size=n)
    observed = (rng.random(n)[:, None] > np.cumsum(T[clean], axis=1)).sum(axis=1)
    log_p = -((x[:, None] - 3.0 * np.arange(c)) ** 2) / 2
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    judged = judge(log_p.astype(np.float32), observed)
    wrong = observed != clean
    assert abs(judged.rate - wrong.mean()) < 0.015
    assert judged.interval[0] - 0.01 < wrong.mean() < judged.interval[1] + 0.01
    flagged = judged.posterior[np.arange(n), observed] < 0.5
    w = np.exp(log_p) * T.T[observed]
    best = w[np.arange(n), observed] / w.sum(axis=1) < 0.5  # with the true T
    assert np.mean(flagged != best) < 0.01
    if noise != "none":
        argmax = quality(log_p.argmax(axis=1) == observed, observed, clean)["f1"]
        assert quality(~flagged, observed, clean)["f1"] > argmax + 0.01  # the label is evidence


def test_robust_loss_by_hand():
    p = torch.tensor([[0.5, 0.5], [0.01, 0.99]])
    observed = torch.tensor([0, 0])
    for q in (0.7, 1.0):
        loss = gce.robust_loss(p.log(), observed, q)
        torch.testing.assert_close(loss, (1 - p[:, 0] ** q) / q)
    logits = p.log().requires_grad_()
    gce.robust_loss(torch.log_softmax(logits, dim=1), observed, 0.9).sum().backward()
    gradient = logits.grad[:, 0].abs()
    assert gradient[1] < gradient[0] / 10  # a label that the classifier contradicts hardly moves it


class BrightnessClassifier(torch.nn.Module):
    """Answers with a row of a matrix as the posterior: the row of the image's class, which is its brightness / 50."""

    def __init__(self, rows):
        super().__init__()
        self.rows = torch.tensor(rows).float()

    def forward(self, x, sigma):
        assert (sigma == 0.002).all() and sigma.shape == x.shape[:1]
        return self.rows[((x.mean(dim=[1, 2, 3]) + 1) * 127.5 / 50).round().long()].log()


def test_given_classifier(tmp_path):
    T = np.array([[0.75, 0.25], [0.25, 0.75]])
    classes, observed = np.repeat([0, 1], 200), np.tile([0, 0, 0, 1], 100)
    observed[200:] = 1 - observed[200:]  # exactly T
    images = np.broadcast_to(50 * classes[:, None, None, None], [400, 8, 8, 1]).astype(np.uint8)
    dataset = ImageDataset(str(make_archive(tmp_path / "a.zip", images, observed.tolist())))
    net = BrightnessClassifier(T)
    found = classifier.detect(net, "noisy", dataset, torch.device("cpu"))
    np.testing.assert_allclose(found.transition, T, atol=0.1)  # from a quarter of the images
    assert ((found.score > 0.5) == (classes == observed)).all() and (found.suggested == classes).all()
    found = classifier.detect(net, "clean", dataset, torch.device("cpu"))
    expected = judge(np.log(T[classes]).astype(np.float32), observed)
    np.testing.assert_allclose(found.score, expected.posterior[np.arange(400), observed], rtol=1e-4)


def test_quality_by_hand():
    labels, clean = np.array([0, 1, 2, 0, 1]), np.array([0, 1, 0, 1, 2])  # the last three are wrong
    q = quality(np.array([True, False, False, False, True]), labels, clean)
    assert q == dict(precision=2 / 3, recall=2 / 3, f1=2 / 3)
    assert quality(np.ones(5, bool), labels, clean) == dict(precision=0, recall=0, f1=0)
    assert quality(labels == clean, labels, clean)["f1"] == 1


def test_tables_of_many_classes_are_short(tmp_path):
    path = make_archive(tmp_path / "a.zip", pictures(30), list(range(30)), class_names=[f"class{i}" for i in range(30)])
    dataset = ImageDataset(str(path))
    posterior = np.eye(30)
    posterior[7] = posterior[8]
    text = describe(dataset, label_file(dataset, judgment(posterior, dataset.labels)))
    assert text.count(" images, ") == 20 and "class7 " in text and "T, %" not in text and "truth" not in text
    assert text.startswith(
        "Noise rate:  about 3.3% of 30 labels are wrong (0.0% to 13.3%)\nFlagged:     1 labels (3.3%)"
    )


def test_a_class_that_would_be_lost_is_named(tmp_path):
    path = make_archive(tmp_path / "a.zip", pictures(4), [0, 0, 1, 1], class_names=["cat", "dog"])
    dataset = ImageDataset(str(path))
    all_dogs, one_dog = np.array([[0.1, 0.9]] * 4), np.array([[0.9, 0.1], [0.1, 0.9], [0.1, 0.9], [0.1, 0.9]])
    assert "Warning: all images labeled cat are believed wrong" in describe(
        dataset, label_file(dataset, judgment(all_dogs, dataset.labels))
    )
    assert "Warning" not in describe(dataset, label_file(dataset, judgment(one_dog, dataset.labels)))
    swapped = np.array([[0.1, 0.9], [0.1, 0.9], [0.9, 0.1], [0.9, 0.1]])
    assert "labeled cat, dog are believed wrong; without them these classes may have no image left" in describe(
        dataset, label_file(dataset, judgment(swapped, dataset.labels))
    )


@pytest.mark.parametrize(
    "names, captions", [(None, ["1 > 0", "0 > 1"]), (["a", "longer"], ["longer\n> a", "a\n> longer"])]
)
def test_the_picture_shows_the_most_suspicious_images_first(tmp_path, monkeypatch, names, captions):
    dataset = ImageDataset(str(make_archive(tmp_path / "a.zip", pictures(3), [0, 0, 1], class_names=names)))
    found = label_file(dataset, judgment([[0.4, 0.6], [0.9, 0.1], [0.7, 0.3]], dataset.labels))
    seen = {}
    monkeypatch.setattr(quality_file, "save_grid", lambda images, path, **kwargs: seen.update(kwargs, images=images))
    quality_file.save_picture("x.png", dataset, found)
    assert seen["captions"] == captions
    np.testing.assert_array_equal(seen["images"], dataset.images([2, 0]).permute(0, 2, 3, 1))


def test_captions_stand_below_their_images():
    images = np.zeros([3, 8, 8, 1], np.uint8)
    plain = image_sheet(images, columns=2)
    two = image_sheet(images, columns=2, captions=["", "x\nyyyyyyyyyyyyyyyy", "z"])
    extra = (two.height - plain.height) // 2
    assert extra > 16 and two.width == plain.width
    pixels, gap = np.asarray(two), 64 // 12
    row = gap + 64 + extra
    assert (pixels[gap : gap + 64, gap : gap + 64] == 0).all()  # the image itself
    assert (pixels[row + gap : row + gap + 64, gap : gap + 64] == 0).all()
    below = [pixels[64 + gap : row, left : left + 64 + gap] for left in (0, 64 + gap)]
    assert (below[0] == 255).all() and (below[1] < 128).any() and (pixels[row + gap + 64 :, : 64 + gap] < 128).any()
    assert (pixels[:, 2 * (64 + gap) + gap // 2 :] == 255).all()  # a line that is too long is cut off
