"""Statistics and seeds of a run. Two processes: test_distributed.py."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_utils import misc
from torch_utils.training_stats import Stats


def test_statistics_match_closed_forms_and_start_again():
    stats = Stats("cpu")
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)) + 1000
    stats.add("Loss/x", x[:2].requires_grad_())
    stats.add("Loss/x", x[2:])
    stats.add("count", torch.tensor([1, 2, 3]))
    stats.add("flag", torch.tensor(True))
    stats.add("number", 2.5)
    stats.add("bad", torch.tensor([1.0, math.nan]))
    stats.add("none", torch.zeros(0))
    values = stats.reduce()
    assert list(values) == ["Loss/x", "bad", "count", "flag", "none", "number"]
    assert values["Loss/x"]["num"] == 12
    assert values["Loss/x"]["mean"] == pytest.approx(x.double().mean().item(), rel=1e-12)
    assert values["Loss/x"]["std"] == pytest.approx(x.double().std(correction=0).item(), rel=1e-6)
    assert values["count"] == {"num": 3, "mean": 2.0, "std": pytest.approx((2 / 3) ** 0.5)}
    assert values["flag"] == {"num": 1, "mean": 1.0, "std": 0.0} and values["number"]["mean"] == 2.5
    assert math.isnan(values["bad"]["mean"]) and math.isnan(values["none"]["mean"]) and values["none"]["num"] == 0
    assert stats.reduce() == {}
    stats.add("number", 4)
    assert stats.reduce() == {"number": {"num": 1, "mean": 4.0, "std": 0.0}}


def test_names_of_one_process_agree_also_in_float32():
    """As on MPS, which has nothing wider: the check of the names must not be rounded into a difference."""
    stats = Stats("cpu")
    stats._dtype = torch.float32
    for name in ("Health/bad_gradients", "Health/bad_losses", "Loss/loss"):
        stats.add(name, 2.0)
    assert [value["mean"] for value in stats.reduce().values()] == [2.0] * 3


def test_many_names():
    stats = Stats("cpu")
    for i in range(150):
        stats.add(f"{i:03d}", float(i))
    assert [v["mean"] for v in stats.reduce().values()] == list(range(150))


@given(st.integers(0, 2**63), st.integers(0, 64), st.integers(0, 10**10), st.integers(0, 5))
def test_step_seeds_differ_in_every_argument(seed, rank, nimg, stream):
    value = misc.step_seed(seed, rank, nimg, stream)
    assert 0 <= value < 2**63 and value == misc.step_seed(seed, rank, nimg, stream)
    others = {
        misc.step_seed(seed + 1, rank, nimg, stream),
        misc.step_seed(seed, rank + 1, nimg, stream),
        misc.step_seed(seed, rank, nimg + 1, stream),
        misc.step_seed(seed, rank, nimg, stream + 1),
        value,
    }
    assert len({v & 0xFFFFFFFF for v in others}) == 5  # CPU generators use the low half


def test_step_seeds_of_a_long_run_collide_as_rarely_as_random_ones():
    seeds = {misc.step_seed(0, rank, 512 * step) & 0xFFFFFFFF for rank in range(8) for step in range(5000)}
    assert len(seeds) >= 40000 - 5  # expected: 0.2 collisions


def test_step_generator_and_count_of_parameters():
    a, b = (torch.rand(3, generator=misc.step_generator(1, 0, n, "cpu")) for n in (512, 1024))
    assert torch.equal(a, torch.rand(3, generator=misc.step_generator(1, 0, 512, torch.device("cpu"))))
    assert not torch.equal(a, b)
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    net.tied = net[0]
    assert misc.count_parameters(net) == 15
