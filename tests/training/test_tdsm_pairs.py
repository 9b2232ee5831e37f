"""TDSM's other classes: which pairs are evaluated, in what sizes, and what --pairs leaves out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from archives.label_noise import transition_matrix
from tests.support.objectives import CPU, Data, FixedClassifier, make_config, ready
from torch_utils.training_stats import Stats
from training.objectives import pair_passes as passes
from training.objectives.pair_passes import pair_passes, pass_size
from training.objectives.tdsm import TDSM, cut_weights

CLASSES = 6


class Posterior(torch.nn.Module):
    """The logits it was given, whatever it sees."""

    augment_dim, label_dim = 0, CLASSES

    def forward(self, x, sigma, augment_labels=None):
        return self.logits


def make_objective(n=32, compile=False, **settings):
    config = make_config(batch_size=n, compile=compile, tdsm=dict(tau=0.01, temp=1.0) | settings)
    config.network.kwargs["dropout"] = 0.0
    torch.manual_seed(0)
    objective = ready(
        TDSM,
        config,
        Data(n, classes=CLASSES),
        CPU,
        classifier=Posterior(),
        posterior="clean",
        transition=transition_matrix("sym", 0.5, CLASSES),
    )
    with torch.no_grad():  # away from the initial weights, where all classes look alike
        for p in objective.trained["net"].net.parameters():
            p.add_(torch.randn(p.shape) * 0.05)
    objective.classifier.logits = torch.randn(n, CLASSES) * 3
    return objective


def combine(objective, n=32):
    """What the objective makes of a batch, and its statistics."""
    g = torch.Generator().manual_seed(1)
    stats = Stats(CPU)
    x, labels = torch.randn(n, 1, 8, 8, generator=g), objective.dataset.onehot(torch.arange(n))
    found = objective.combine(x, torch.full([n, 1, 1, 1], 0.7), labels, None, stats)
    return found.detach(), {k: v["mean"] for k, v in stats.reduce().items()}


@given(
    n=st.integers(1, 6), classes=st.integers(1, 5), share=st.floats(0, 1), size=st.integers(1, 9),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("fixed", [False, True])
def test_passes_hold_every_pair_once(fixed, n, classes, share, size, seed):
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(n, classes, generator=g) * (torch.rand(n, classes, generator=g) < share)
    want = [(int(i), int(c), float(weights[i, c])) for i, c in weights.nonzero()]
    passes = list(pair_passes(weights, len(want), size, fixed))
    assert all(len(row) == size if fixed else len(row) <= size for row, _, _ in passes)
    assert len(passes) == -(-len(want) // size)
    found = [tuple(x.item() for x in entry) for part in passes for entry in zip(*part, strict=True)]
    assert found[: len(want)] == want
    assert all(row == n for row, _, _ in found[len(want) :])


def test_the_size_of_passes_changes_nothing():
    objective = make_objective()
    want, stats = combine(objective)
    assert stats["TDSM/pairs_per_image"] * 32 % 24  # some places stay empty below
    for objective.pass_size, objective.fixed_size in ((7, False), (24, True), (256, True)):
        torch.testing.assert_close(combine(objective)[0], want, rtol=1e-5, atol=1e-6)


def test_empty_places_touch_no_image():
    """They compute something for the last image: not even a NaN of theirs may reach it."""
    objective = make_objective()
    want, _ = combine(objective)
    net = objective.trained["net"].net
    objective.trained["net"].forward = net.forward
    objective.pass_size, objective.fixed_size = 64, True
    pairs = int(combine(objective)[1]["TDSM/pairs_per_image"] * 32 + 0.5)
    assert pairs % 64

    class Spoilt(torch.nn.Module):
        seen = 0

        def forward(self, x, *args, **kwargs):
            out = net(x, *args, **kwargs)
            out[max(pairs - self.seen, 0) :] = float("nan")
            self.seen += len(x)
            return out

    objective.trained["net"].net = Spoilt()
    torch.testing.assert_close(combine(objective)[0], want, rtol=1e-5, atol=1e-6)


def test_pairs_keeps_the_heaviest():
    weights = torch.tensor([[0.3, 0.1, 0.25, 0.35], [0.6, 0.005, 0.15, 0.245]])
    observed = torch.tensor([1, 0])
    cut = cut_weights(weights, observed, 0.01, pairs=1)
    torch.testing.assert_close(cut, torch.tensor([[0, 0.1, 0, 0.35], [0.6, 0, 0, 0.245]]), rtol=0, atol=0)
    torch.testing.assert_close(
        cut_weights(weights, observed, 0.01, pairs=2),
        torch.tensor([[0.3, 0.1, 0, 0.35], [0.6, 0, 0.15, 0.245]]),
        rtol=0,
        atol=0,
    )
    for pairs in (3, 99):
        torch.testing.assert_close(
            cut_weights(weights, observed, 0.01, pairs), cut_weights(weights, observed, 0.01), rtol=0, atol=0
        )


def test_pairs_and_what_it_cuts_off_in_a_step():
    everything = make_objective()
    observed = torch.from_numpy(everything.dataset.labels)
    column = torch.tensor(transition_matrix("sym", 0.5, CLASSES)).float().T[observed]
    weights = torch.softmax(everything.classifier.logits + column.log(), dim=1)
    own = torch.nn.functional.one_hot(observed, CLASSES).bool()
    for pairs in (None, 1, 2):
        objective = make_objective(pairs=pairs)
        found, stats = combine(objective)
        dropped = 0
        for row, mine in zip(weights, own, strict=True):
            others = sorted((float(w) for w, m in zip(row, mine, strict=True) if not m), reverse=True)
            kept = [w for w in others if w > 0.01][:pairs]
            dropped += sum(others) - sum(kept)
        assert stats["TDSM/cut_weight"] == pytest.approx(dropped / 32, abs=1e-6)
        assert stats["TDSM/cut_weight"] > (0.02 if pairs else 1e-4)
        assert stats["TDSM/pairs_per_image"] <= (pairs or CLASSES - 1)
        if pairs is None:
            want = found
    assert not torch.allclose(found, want, atol=1e-3)


class Denoiser(torch.nn.Module):
    """What a U-Net is called with, quick to compile."""

    def __init__(self):
        super().__init__()
        self.labels = torch.nn.Linear(CLASSES, 64)

    def forward(self, x, sigma, class_labels, augment_labels=None):
        return x / (1 + sigma) + self.labels(class_labels).reshape(x.shape)


@pytest.mark.slow
def test_one_compilation_for_any_number_of_pairs():
    objective = make_objective(compile=True)
    assert objective.fixed_size
    net = objective.trained["net"]
    net.net = net.forward = Denoiser()
    objective.pass_size, counter = 16, CompileCounter()
    torch._dynamo.reset()
    net.net.compile(backend=counter)
    objective.classifier.compile(backend="eager")
    numbers, compiled = set(), []
    for scale in (0.0, 1.0, 4.0, 30.0, 2.0):
        objective.classifier.logits = torch.randn(32, CLASSES, generator=torch.Generator().manual_seed(2)) * scale
        numbers.add(combine(objective)[1]["TDSM/pairs_per_image"])
        compiled.append(counter.frame_count)
    assert len(numbers) == 5
    assert compiled == [2] * 5  # with gradients and without


def test_size_of_passes(monkeypatch):
    assert pass_size(64, 16 * 16, "cpu") == 64 and pass_size(512, 32 * 32, "cpu") == 16
    assert pass_size(512, 32 * 32, "cuda") == 256  # half the batch
    assert pass_size(64, 32 * 32, "cuda") == 128 and pass_size(8, 32 * 32, "cuda") == 32  # busy, but within memory
    assert pass_size(1, 256 * 256, "cpu") == 1
    monkeypatch.setitem(passes.PASS_PIXELS, "cpu", 64)
    assert make_objective().pass_size == 1


def test_classifier_runs_in_the_runs_precision():
    seen = {}

    class Classifier(FixedClassifier):
        def forward(self, x, sigma, augment_labels=None):
            seen[torch.is_autocast_enabled("cpu")] = torch.nn.functional.linear(x.flatten(1), torch.ones(4, 64)).dtype
            return super().forward(x, sigma)

    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        objective = ready(
            TDSM,
            make_config(precision=precision),
            Data(),
            CPU,
            classifier=Classifier(),
            posterior="clean",
            transition=transition_matrix("sym", 0.4, 4),
        )
        w = objective.weights(torch.randn(32, 1, 8, 8), torch.ones(32), torch.zeros(32, dtype=torch.int64), None)
        assert w.dtype == torch.float32 and seen[precision == "bf16"] == dtype
