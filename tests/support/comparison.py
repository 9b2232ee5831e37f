"""Rows of a comparison as `fid.py evaluate` leaves them behind: images of three classes, and tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from reports.comparison import Method
from reports.finding import BASELINE, ORACLE
from tests.support.review import ATTACK
from tests.support.synth import make_archive, pictures

NAMES = ["cat", f"a|$b{ATTACK}", "$x"]
N = 30  # images per row, 10 of each class
WRONG = {"oracle": [], "baseline": [0, 1, 4, 5, 9], "drop": [4], "TDSM": [2, 29]}  # what the judge finds wrong
DISTANCES = {"oracle": 1.0, "baseline": 6.0, "drop": 1.1, "TDSM": 1.5}


def make_rows(folder: Path, distances: dict[str, float | None] = DISTANCES, loss: bool = False) -> list[Method]:
    """Write images and tables of the rows that `distances` names, and return the methods.

    `loss`: each of them also has a run with a loss curve.
    """
    return [_make_row(folder, name, value, loss) for name, value in distances.items()]


def make_data(folder: Path) -> str:
    """Write the training images, of which every third one has a wrong label, and return their path."""
    clean = np.arange(N) % 3
    labels = np.where(np.arange(N) % 9 < 3, (clean + 1) % 3, clean).tolist()
    names = [f"00000/img{i:08d}.png" for i in range(N)]
    extra = dict(class_names=NAMES, clean_labels=[[name, int(c)] for name, c in zip(names, clean, strict=True)])
    return str(make_archive(folder / "data.zip", pictures(N, 8, 1), labels, **extra))


def _make_row(folder: Path, name: str, distance: float | None, loss: bool) -> Method:
    asked = np.arange(N) % 3
    judged = asked.copy()
    judged[WRONG[name]] = (asked[WRONG[name]] + 1) % 3
    right = judged == asked
    archive = make_archive(folder / f"{name}.zip", pictures(N, 8, 1), asked.tolist(), class_names=NAMES)
    classes = {
        str(c): dict(name=NAMES[c], num_images=10, label_accuracy=float(right[asked == c].mean())) for c in range(3)
    }
    own = {"0": dict(accuracy=1.0, num=8), "2": dict(accuracy=0.75, num=4)}  # no image of class 1 was held out
    table = dict(
        metrics=dict(label_accuracy=float(right.mean()), cw_fid=distance, fid=0.5, density_k5=1.0, coverage_k5=0.5),
        intervals={} if distance is None else dict(cw_fid=[distance - 0.05, distance + 0.05]),
        bootstrap=dict(draws=50, level=0.95, of="generated images"),
        classes=classes,
        judge=dict(name="SVM", accuracy=0.9, num=12, on="held-out images", classes=own),
        judged=judged.tolist(),
    )
    (folder / f"{name}.json").write_text(json.dumps(table))
    runs = {}
    if loss:
        (folder / name).mkdir()
        rows = [{"Progress/kimg": {"mean": i}, "Loss/loss": {"mean": 1 / i}} for i in (1, 2, 3)]
        (folder / name / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs[name] = str(folder / name)
    role = dict(oracle=ORACLE, baseline=BASELINE).get(name, "")
    return Method(name, runs, str(archive), str(folder / f"{name}.json"), 60, 5, role, f"what {name} does")
