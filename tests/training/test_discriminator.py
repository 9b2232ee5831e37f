"""SBDC's discriminator: the pairs that it is trained on, and the held-out ones that calibrate it."""

import numpy as np
import pytest
import torch

import dnnlib
from archives.label_file import LabelFile
from archives.label_noise import transition_matrix
from tests.support.objectives import CPU, Data, make_config, ready
from torch_utils import misc
from training.objective import split_items
from training.objectives import discriminator
from training.objectives.discriminator import DiscriminatorObjective, Shuffle, believed, right_shares
from training.objectives.simix import nearest_partners


def factor(sigma):
    """What multiplies the evidence of a discriminator that is too sure, most of all at low noise."""
    return (0.9 - 0.3 * sigma.log()).exp()


class GrayLevels(Data):
    """Images of one gray level per clean class, pixel by pixel; `right` says whose label is the clean class."""

    LEVELS = torch.tensor([-0.6, -0.2, 0.2, 0.6])

    def __init__(self, n=4000):
        super().__init__(n)
        rng = np.random.RandomState(1)
        clean = rng.choice(4, size=n, p=[0.4, 0.3, 0.2, 0.1])
        self.labels = np.where(rng.rand(n) < 0.4, rng.randint(4, size=n), clean)
        self.right = self.labels == clean
        gray = ((self.LEVELS[clean] + 1) * 127.5).round().to(torch.uint8)
        self.pixels = gray.reshape(-1, 1, 1, 1).expand(n, 1, 8, 8)

    def optimal(self, objective, clean):
        """Return the evidence of the best discriminator, given which class each of the pairs shows."""
        labels, right = torch.as_tensor(self.labels), torch.as_tensor(self.right)
        shown = torch.zeros(4, 4, dtype=torch.float64)  # mass of wrong pairs that show c under label o
        shown.index_put_((clean[~right], labels[~right]), torch.ones(1, dtype=torch.float64), accumulate=True)
        flips = torch.bincount(labels[right], minlength=4) * torch.as_tensor(objective.shuffle.flip)
        shown += flips[:, None] * torch.as_tensor(objective.shuffle.rows)

        def evidence(x, sigma, onehot):
            sigma, o = torch.as_tensor(sigma).double(), onehot.argmax(dim=1)
            error = (x.double().flatten(1)[:, :, None] - self.LEVELS).square().sum(dim=1)
            log_p = -error / (2 * sigma.reshape(-1, 1) ** 2)
            wrong = (shown / shown.sum(dim=0)).T[o].log()
            return log_p.gather(1, o[:, None])[:, 0] - torch.logsumexp(log_p + wrong, dim=1)

        return evidence


def test_held_out_pairs_tell_the_temperature():
    """Whatever multiplied the evidence, at each noise level, calibration finds and undoes it."""
    data = GrayLevels()
    split = split_items(data, 0.5, seed=0)
    objective = make_objective(data, data.right, split=split)
    clean = (data.pixels[:, 0, 0, 0].float() / 127.5 - 1).sub(data.LEVELS[:, None]).abs().argmin(dim=0)
    best, share = data.optimal(objective, clean), torch.as_tensor(objective.right_shares)
    assert (share - 0.5).abs().max() > 0.1  # else it would not matter where the evidence begins
    losses = []
    for loud in (lambda sigma: torch.ones([]), factor, lambda sigma: 1 / factor(sigma)):
        objective.trained["net"].ema = lambda x, sigma, y, loud=loud: (
            share.logit()[y.argmax(dim=1)] + loud(sigma) * best(x, sigma, y)
        )
        losses.append(objective.validate())
        # Where nearly all pairs are certain, or none says anything, they do not tell the temperature.
        for sigma in torch.tensor([2.0, 4.0]):
            assert float(objective.temperature(sigma)) == pytest.approx(float(loud(sigma)), rel=0.2)
    assert losses == pytest.approx([losses[0]] * 3, abs=5e-3)
    assert objective.info()["held_out"] == 2000


def test_few_wrong_pairs_of_a_label_do_not_decide_the_temperature():
    data = Data(n=4000)
    data.labels = np.arange(4000) % 4
    T = np.array([[0.6, 0.4, 0, 0], [0.4, 0.6, 0, 0], [0, 0, 1, 0], [0, 0, 0.001, 0.999]])
    objective = make_objective(data, np.ones(4000, dtype=bool), T, split=split_items(data, 0.5, seed=0))
    assert objective.right_shares[2] > 0.99
    seen = []
    objective.trained["net"].ema = lambda x, sigma, y: seen.append(y.argmax(dim=1)) or torch.zeros(len(x))
    weights, label = objective.held_out_evidence()[2], torch.cat(seen)
    assert weights.max() <= 2
    of_labels = torch.stack([weights[label == o].sum(dim=0) for o in range(4)])
    np.testing.assert_allclose(of_labels[:2, 0], of_labels[:2, 1], rtol=0.2)  # right and wrong pairs count the same
    assert of_labels[2:].sum() < 0.01 * of_labels.sum()


def test_held_out_images_are_not_trained_on():
    data, n = Data(n=100), 100
    held, rest = split = split_items(data, 0.2, seed=3)
    assert len(held) == 20 and torch.equal(torch.cat([held, rest]).sort().values, torch.arange(n))
    objective = make_objective(data, np.arange(n) % 3 < 2, split=split)
    choice = objective.draw(torch.empty([5000, 1, 8, 8], device="meta"), misc.step_generator(0, 0, 0, CPU))["partner"]
    assert set(objective.partners_of(rest[:1].repeat(5000), choice).tolist()) == set(rest.tolist())
    data.path, data.images_on = "toy", lambda device, items: data.pixels[items]
    partners = nearest_partners(data, "pixels", None, CPU, held_out=held)
    assert (partners[held] == -1).all() and np.isin(partners[rest], rest).all() and not np.isin(rest, held).any()
    assert objective.train_indices is rest
    plain = make_objective(data, np.arange(n) % 3 < 2)
    assert plain.train_indices is None and plain.validate() is None and plain.info()["temperature"] is None


def make_objective(data, is_clean, transition=None, **kwargs):
    config = make_config(discriminator=dict(shift=0.0))
    config.network.kwargs = dict(depth="small", model_channels=8, channel_mult=[1, 1])
    return ready(
        DiscriminatorObjective,
        config,
        data,
        CPU,
        right=is_clean,
        noise_rates=np.full(data.label_dim, 0.4),
        transition=transition,
        **kwargs,
    )


def test_the_evidence_is_that_of_the_images_that_were_looked_at(monkeypatch):
    monkeypatch.setattr(discriminator, "CALIBRATION_DRAWS", 100)
    seen = []
    fit = discriminator.fit_temperature
    monkeypatch.setattr(discriminator, "fit_temperature", lambda *a, **k: seen.append(k["images"]) or fit(*a, **k))
    for n, looked_at in ((400, 100), (100, 50)):
        data = Data(n=n)
        objective = make_objective(data, np.ones(n, dtype=bool), split=split_items(data, 0.5, seed=0))
        objective.validate()
        assert seen.pop() == objective.info()["held_out"] == looked_at


def test_one_class_is_not_enough():
    with pytest.raises(dnnlib.UserError, match="toy: has one class"):
        make_objective(Data(classes=1), np.ones(32, dtype=bool))


@pytest.mark.parametrize("transition", [None, transition_matrix("pair", 0.3, 4)])
def test_pairs_are_what_the_shuffle_says(transition):
    data, n = Data(n=400), 400
    data.labels = np.arange(n) % 3  # class 3 never occurs
    is_clean = np.arange(n) % 10 < 7
    objective = make_objective(data, is_clean, transition)
    uniform = torch.rand([500, n, 2], generator=torch.Generator().manual_seed(0))
    items = torch.arange(n)
    drawn = [objective.pairs(items, u) for u in uniform]
    labels = torch.stack([onehot.argmax(dim=1) for onehot, _ in drawn]).numpy()
    targets = torch.stack([t for _, t in drawn]).numpy()
    moved = labels != data.labels
    assert not moved[:, ~is_clean].any() and (targets == (is_clean & ~moved)).all()
    assert abs(targets.mean() - 0.5) < 0.005  # right and wrong come out even
    if transition is None:
        became = np.bincount(labels[moved & (data.labels == 0)], minlength=4)
        np.testing.assert_allclose(became / became.sum(), [0, 1 / 3, 1 / 3, 1 / 3], atol=0.01)
    else:  # wrong pairs as T makes them: class c only ever becomes c + 1, as often as T says of all its images
        assert (labels[moved] == (np.broadcast_to(data.labels, labels.shape)[moved] + 1) % 4).all()
    expected = objective.right_shares
    for c in range(4):
        seen = labels == c
        if seen.any():
            assert abs(targets[seen].mean() - expected[c]) < 0.01
    assert objective.info()["right_shares"] == expected.tolist()


def test_shuffle_keeps_some_pairs_right():
    labels = np.array([0, 1, 1, 1, 1, 1, 2, 2, 2, 2])
    T = np.array([[0.2, 0.8, 0.0], [0.1, 0.9, 0.0], [0, 0, 1.0]])
    shuffle = Shuffle(labels, np.ones(10, dtype=bool), 3, T)
    assert shuffle.flip.max() == pytest.approx(0.9) and shuffle.flip[2] == 0
    assert shuffle.flip[1] / shuffle.flip[0] == pytest.approx((0.1 / 0.9) / (0.8 / 0.2))
    assert np.allclose(shuffle.rows.sum(axis=1), 1) and np.diagonal(shuffle.rows).max() == 0
    for known in (None, T):  # fewer right pairs than wrong ones: nothing to flip
        assert Shuffle(labels, np.arange(10) < 4, 3, known).flip.max() == 0
    assert right_shares(np.array([0, 0, 1]), np.array([True, False, True]), shuffle)[2] == 0.5  # never seen


@pytest.mark.parametrize("replaced", [0.0, 0.5, 1.0])
def test_wrong_pairs_are_those_of_the_noise_whoever_are_the_right_ones(replaced):
    T = np.array([[0.6, 0.3, 0.1], [0.0, 0.9, 0.1], [0.2, 0.2, 0.6]])
    size = np.array([10_000, 20_000, 30_000])  # of the classes; of wrong labels, a share is replaced by the right ones
    right = size * (np.diagonal(T) + replaced * (1 - np.diagonal(T)))
    labels = np.repeat([0, 1, 2, 0], [*right.astype(int), int((size - right).sum())])
    shuffle = Shuffle(labels, np.arange(len(labels)) < int(right.sum()), 3, T, replaced)
    made = (right * shuffle.flip)[:, None] * shuffle.rows
    of_noise = size[:, None] * T * (1 - np.eye(3))
    np.testing.assert_allclose(made / made.sum(), of_noise / of_noise.sum(), atol=1e-3)


def test_suggestions_that_are_probable_become_right_pairs():
    found = LabelFile(
        list("abcd"),
        labels=np.array([0, 1, 2, 3]),
        is_clean=np.array([True, False, False, False]),
        score=np.array([0.9, 0.2, 0.3, 0.0], dtype=np.float32),
        suggested=np.array([0, 3, 0, 3]),  # the last one: nothing else is suggested
        noise_rate=0.5,
        per_class_noise_rate=np.full(4, 0.5, dtype=np.float32),
        suggested_score=np.array([0.9, 0.7, 0.4, 0.0], dtype=np.float32),
    )
    labels, right, doubt = believed(found, suggested=True).values()
    assert labels.tolist() == [0, 3, 2, 3] and right.tolist() == [True, True, False, False]
    np.testing.assert_allclose(doubt, [0.1, 0.3, 0.3, 0.0], atol=1e-6)
    labels, right, doubt = believed(found, suggested=False).values()  # as published
    assert labels.tolist() == found.labels.tolist() and right.tolist() == found.is_clean.tolist()
    np.testing.assert_allclose(doubt, [0.1, 0.2, 0.3, 0.0], atol=1e-6)
    found.suggested_score = None  # a table of cleanlab: no probabilities
    labels, right, doubt = believed(found, suggested=True).values()
    assert labels.tolist() == [0, 3, 0, 3] and right.tolist() == [True, True, True, False] and doubt is None
    # What the objective draws: the suggested class is a right pair, and may be made wrong like any other.
    data = Data(n=4)
    data.labels = found.labels
    objective = make_objective(data, right, labels=labels)
    onehot, targets = objective.pairs(torch.arange(4), torch.tensor([[0.999, 0.5]] * 4))
    assert onehot.argmax(dim=1).tolist() == labels.tolist() and targets.tolist() == [1, 1, 1, 0]


def test_second_half_of_a_batch_is_mixed_with_partners():
    data = Data(n=8)
    partners = np.stack([(np.arange(8) + 1) % 8, (np.arange(8) + 1) % 8], axis=1)
    objective = make_objective(data, np.ones(8, dtype=bool), partners=partners)
    objective.flip.zero_()
    seen = {}

    class Spy(torch.nn.Module):
        def forward(self, x, sigma, labels, augment_labels=None):
            seen.update(x=x, labels=labels)
            return self.p.expand(len(x))

    spy = Spy()
    spy.p = torch.nn.Parameter(torch.zeros([]))
    objective.trained["net"].forward = spy
    draws = objective.draw(data.pixels, misc.step_generator(0, 0, 0, CPU))
    draws.update(items=torch.arange(8), noise=torch.zeros_like(draws["noise"]))
    from_stats = type("Silent", (), {"add": lambda *a: None})()
    data.images_on = lambda device, items: data.pixels[items]
    objective.loss(data.pixels, data.onehot(torch.arange(8)), draws, from_stats)
    clean, share = data.pixels.float() / 127.5 - 1, draws["mixing"][4:]
    torch.testing.assert_close(seen["x"][:4], clean[:4])
    torch.testing.assert_close(
        seen["x"][4:], clean[4:] * share.reshape(-1, 1, 1, 1) + clean[[5, 6, 7, 0]] * (1 - share.reshape(-1, 1, 1, 1))
    )
    onehot = data.onehot(torch.arange(8))
    expected = onehot[4:] * share[:, None] + onehot[[5, 6, 7, 0]] * (1 - share[:, None])
    torch.testing.assert_close(seen["labels"][4:], expected)
    assert data.pixels.dtype == torch.uint8 and 0 <= share.min() <= share.max() <= 1


def test_nearest_partners_are_the_nearest_others():
    data = Data(n=6)
    data.pixels = torch.tensor([0, 1, 3, 100, 101, 104], dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 1, 8, 8)
    data.path, data.images_on = "toy", lambda device, items: data.pixels[items]
    found = np.sort(nearest_partners(data, "pixels", None, CPU), axis=1)
    assert found.tolist() == [[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [3, 4]]
    data.pixels = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)  # all alike: still never the image itself
    assert all(i not in row and len(set(row)) == 2 for i, row in enumerate(nearest_partners(data, "pixels", None, CPU)))
