"""Test the example in the plane: it runs and counts correctly, and with full training RDUOT leaves outliers out."""

import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from examples import toy2d
from training.noise_levels import DiffusionSteps


def run(tmp_path, *args):
    result = CliRunner().invoke(toy2d.main, [f"--outdir={tmp_path}", *args])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads((tmp_path / "toy2d.json").read_text())


def test_runs_and_draws(tmp_path):
    table = run(tmp_path, "--steps=3", "--num_timesteps=2", "--phi1=linear", "--phi2=chi")
    assert table.keys() == {"DDGAN", "RDUOT"} and all(sum(row) == pytest.approx(1, abs=1e-3) for row in table.values())
    assert Image.open(tmp_path / "toy2d.png").size[0] == 1200


@pytest.mark.parametrize("option", ["--tau=0.1", "--phi1=linear", "--phi2=chi"])
def test_the_baseline_has_none_of_rduots_options(tmp_path, option):
    result = CliRunner().invoke(toy2d.main, [f"--outdir={tmp_path}/out", "--method=ddgan", "--steps=1", option])
    assert result.exit_code == 2 and f"{option}: belongs to RDUOT" in result.stderr, result.output
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_folder_is_refused_before_the_training(tmp_path, monkeypatch):
    (tmp_path / "out").touch()
    monkeypatch.setattr(toy2d, "train", None)
    result = CliRunner().invoke(toy2d.main, [f"--outdir={tmp_path}/out"])
    assert result.exit_code == 1 and result.stderr == f"Error: {tmp_path}/out: File exists\n"


def test_points_samples_and_shares():
    rng = torch.Generator().manual_seed(0)
    counted = toy2d.shares(toy2d.points(20_000, 0.05, rng))
    assert counted == pytest.approx([0.2375] * 4 + [0.05], abs=0.01)

    def generator(x, t, z):  # has learned a single point
        return toy2d.OUTLIER.expand(len(x), 2)

    x = toy2d.sample(generator, DiffusionSteps(4), 100)
    torch.testing.assert_close(x, toy2d.OUTLIER.expand(100, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_rduot_leaves_outliers_out(tmp_path):
    """DDGAN reproduces the outliers, RDUOT makes at most 0.65 times as many, and both keep every mode (three seeds)."""
    tables = [run(tmp_path / str(seed), f"--seed={seed}") for seed in range(3)]
    median = {name: torch.tensor([table[name] for table in tables]).median(dim=0).values for name in ("DDGAN", "RDUOT")}
    assert median["DDGAN"][:4].min() > 0.15 and median["DDGAN"][4] >= 0.03
    assert 0.18 <= median["RDUOT"][:4].min() <= median["RDUOT"][:4].max() <= 0.30
    assert median["RDUOT"][4] <= 0.65 * median["DDGAN"][4]
