"""Test benchmarks.operators: the groups of operators, and the profiles of both forms of a step."""

import pytest
from click.testing import CliRunner

from benchmarks import operators
from benchmarks.operators import GROUPS, shares


def test_shares_by_group():
    found = shares(
        {
            "aten::mkldnn_convolution": 3,
            "aten::convolution_backward": 2,
            "aten::addmm": 1,
            "aten::cat": 1,
            "aten::native_group_norm": 1,
            "aten::fill_": 1.5,
            "aten::silu": 0.25,
            "aten::_foreach_lerp_": 0.25,
        }
    )
    assert list(found) == list(GROUPS) and sum(found.values()) == pytest.approx(1)
    assert [found[group] for group in GROUPS] == pytest.approx([0.5, 0.1, 0.1, 0.025, 0, 0.025, 0.1, 0.15])


@pytest.mark.parametrize("form", ["ours", "plain"])
def test_table_of_a_small_network(form, monkeypatch):
    monkeypatch.setattr(operators, "NETWORKS", {"tiny": ["--arch=ddpmpp_tiny", "--cbase=8"]})
    monkeypatch.setattr(operators, "SIZES", {8: (4, 1)})
    result = CliRunner().invoke(operators.main, [f"--form={form}", "--steps=1"])
    assert result.exit_code == 0, result.output
    cells = dict(line.strip("| ").split(" | ") for line in result.output.splitlines() if line.endswith("% |"))
    assert list(cells) == list(GROUPS)
    values = {group: int(cell[:-1]) for group, cell in cells.items()}
    assert abs(sum(values.values()) - 100) <= len(GROUPS) / 2
    assert values["convolution"] > 0 and values["Adam, EMA, gradients"] > 0
