"""Test benchmarks.precision: the gap in closed form, and the command on a few steps."""

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import precision
from benchmarks.precision import gap, smooth


def test_smooth_is_a_moving_mean():
    assert np.allclose(smooth(np.array([1.0, 2, 3, 10]), window=3), [2, 5])


def test_gap_is_relative_and_symmetric():
    a, b = np.array([1.0, 3.0]), np.array([3.0, 1.0])
    assert gap(a, b) == gap(b, a) == pytest.approx(1.0)
    assert gap(10 * a, 10 * b) == pytest.approx(1.0)
    assert gap(a, a) == 0


def run(monkeypatch, *args):
    monkeypatch.setattr(precision, "WINDOW", 2)
    return CliRunner().invoke(precision.main, ["--steps=50", *args])


def test_the_verdict_compares_the_gaps(monkeypatch, tmp_path):
    asked, heights = [], []

    def losses(args, run_dir):
        asked.append([arg for arg in args if arg.startswith(("--precision", "--seed"))])
        return np.ones(4) * heights.pop(0)

    monkeypatch.setattr(precision, "losses_of", losses)
    for half, code in ((1.1, 0), (1.3, 1)):
        asked.clear()
        heights[:] = [1.0, 1.1, half]
        result = run(monkeypatch, f"--plot={tmp_path / 'p.png'}")
        assert result.exit_code == code, result.output
        assert asked == [
            ["--precision=fp32", "--seed=0"],
            ["--precision=fp32", "--seed=1"],
            ["--precision=bf16", "--seed=0"],
        ]
        assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "Error: bf16 trains differently from float32" in result.output
        and "the gap between two float32 seeds" in result.output
    )


def test_losses_are_those_of_the_script(tmp_path):
    precision_archive = tmp_path / "digits.zip"
    CliRunner().invoke(precision.dataset_tool.main, ["--source=digits", f"--dest={precision_archive}"])
    options = [*precision.OPTIONS, f"--data={precision_archive}", "--duration=0.000384", "--cbase=8", "--seed=0"]
    found = precision.losses_of([*options, "--precision=fp32"], str(tmp_path / "run"))
    half = precision.losses_of([*options, "--precision=bf16"], str(tmp_path / "half"))
    assert found.shape == (3,) and np.isfinite(found).all()
    assert 0 < np.abs(found - half).max() < 0.05 * found.max()


def test_plot_must_be_a_picture(monkeypatch):
    result = run(monkeypatch, "--plot=losses.txt")
    assert result.exit_code == 2 and "losses.txt: must end in .png or .svg" in result.output
