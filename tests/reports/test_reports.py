"""Plots are drawn without global state; the trade-off of guidance in one sentence."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from reports.plots import bar_chart, compare_tradeoffs, loss_curve, tradeoff, transition_heatmap
from tests.support.paths import ROOT

LOW, HIGH = [(1, 1.0, 0.8), (2, 2.0, 0.9)], [(1, 1.2, 0.7), (2, 3.0, 0.8)]


@pytest.mark.parametrize(
    "a, b, words",
    [
        (LOW, HIGH, "over the whole range, FD 0.5 to 2"),
        (HIGH, LOW, "on 0% of the range FD 0.5 to 2; not above it between FD"),
        ([(1, 1.0, 0.8), (2, 2.0, 0.8)], [(1, 1.0, 0.7), (2, 2.0, 0.9)], r"on 6[67]% of the range .* FD 1.5\d? and 2"),
        ([(1, 0.4, 0.8)], [(1, 0.6, 0.9)], "cannot be compared"),
        ([(1, 1.0, 0.3)], [(1, 2.0, 0.4)], "a and b are equal, FD 0.5 to 1"),
    ],
)
def test_where_one_curve_is_above_the_other(a, b, words):
    assert re.search(words, compare_tradeoffs(dict(a=a, b=b), (0.5, 0.5), "a", "b"))


@pytest.mark.slow
def test_plots_are_pictures(tmp_path):
    path = tmp_path / "plot.png"

    def drawn():
        with Image.open(path) as picture:
            return picture.format, len(np.unique(np.asarray(picture.convert("L")))) > 10

    rows = [{"Progress/kimg": {"mean": i}, "Loss/loss": {"mean": 1 / i}} for i in (1, 2, 3)]
    (tmp_path / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {}]))
    loss_curve(str(tmp_path), path)
    assert drawn() == ("PNG", True)
    tradeoff(dict(a=LOW, b=HIGH), (0.5, 0.5), path)
    assert drawn() == ("PNG", True)
    transition_heatmap(np.eye(3), path, ["a", "b", "c"])
    assert drawn() == ("PNG", True)
    results = [
        dict(images="a.zip", metrics=dict(fid=2.0, kid=None), intervals=dict(fid=[1.0, 3.0])),
        dict(images="b$\\x$.zip", metrics=dict(fid=None, kid=None), intervals={}),
    ]
    bar_chart(results, tmp_path / "new" / "bars.png")
    assert (tmp_path / "new" / "bars.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_importing_sets_no_backend():
    modules = "reports.page, reports.plots, reports.comparison, examples.toy2d"
    code = f"import sys, {modules}; print('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"
