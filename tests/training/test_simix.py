"""SiMix: which images are similar."""

import pytest
import torch

from training.objectives import simix


@pytest.mark.parametrize("far", [0, 3000])
@pytest.mark.parametrize("keys", [4096, 50])
def test_nearest_rows_are_those_of_exact_distances(monkeypatch, far, keys):
    """Far from the origin, |x|^2 + |y|^2 - 2 x.y in float32 is wrong by more than the distances."""
    monkeypatch.setattr(simix, "KEYS", keys)
    x = torch.randn(230, 6, generator=torch.Generator().manual_seed(0)) + far
    x[7] += 3e4  # moves the mean away from all the others, so that rounding decides between some of them
    distance = (x.double()[:, None] - x.double()).square().sum(dim=2).fill_diagonal_(torch.inf)
    others = torch.arange(230) != 7  # to the float32 distances of row 7, all rows are alike
    assert torch.equal(simix.nearest_rows(x, 230, 3)[others], distance.sort(dim=1).indices[others, :3])


def test_an_image_is_never_its_own_partner():
    found = simix.nearest_rows(torch.zeros(9, 4), 9, 2)
    assert (found != torch.arange(9)[:, None]).all() and (found[:, 0] != found[:, 1]).all()
