"""The results of the benchmark on Fashion-MNIST: read from the folders of runs, merged, written as tables."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import dnnlib
from recipes.fashion import LONG_ROWS, ROWS, RUNS, SETTINGS, SHARED, SIZES, place, rows
from recipes.steps import finished, read_journal
from reports.comparison import with_interval
from reports.page import Report, Section
from torch_utils import safe_files
from training.objectives.dmis import LEVELS

__all__ = ["Result", "load", "tables", "write"]

CLASSES = 10
METRICS = {
    "cw_fid": "class-wise FD",
    "fid": "FD",
    "precision_k5": "precision",
    "recall_k5": "recall",
    "density_k5": "density",
    "coverage_k5": "coverage",
    "label_accuracy": "label accuracy",
    "cas": "CAS",
}
FORWARD = 1 / 3  # of a training step: the backward pass costs twice the forward pass


@dataclass
class Result:
    """One row of a run."""

    setting: str  # key of SETTINGS
    row: str  # key of ROWS
    seed: int
    made: dict[str, Any]  # resolution, scale and num of the run
    metrics: dict[str, float | None]
    intervals: dict[str, list[float]]
    judge: dict[str, Any] | None
    kimg: float | None = None  # thousands of images that trained the denoiser; None: real images
    passes: float | None = None  # network passes per image of that training, in plain training steps
    training_seconds: float | None = None  # of everything that was trained for this row
    sampling_seconds: float | None = None


def load(outdir: str) -> list[Result]:
    """Return the results in the folder of a run, which may be unfinished. UserError: it is no run of this recipe."""
    journal = read_journal(outdir)
    about, seconds, found = journal["about"], journal["seconds"], []
    made = {name: about[name] for name in ("resolution", "scale", "num")}
    for setting in about["settings"]:
        for key, row in rows(outdir, setting, about["rows"]).items():
            if f"{row.name}-table" not in seconds:
                continue
            path = f"{outdir}/tables/{row.name}.json"
            table = safe_files.load_json(dnnlib.read_bytes(path), path)
            metrics = {name: table["metrics"][name] for name in METRICS}
            result = Result(setting, key, about["seed"], made, metrics, table["intervals"], table["judge"])
            if ROWS[key].run:
                run = RUNS[ROWS[key].run]
                result.kimg = SIZES[made["resolution"]].kimg[run.script] * run.images * made["scale"]
                result.passes = 1 + FORWARD * _extra_passes(f"{outdir}/{place(ROWS[key].run, setting)}", run.options)
                (method,) = finished(outdir, [row], seconds)
                result.training_seconds, result.sampling_seconds = method.training_seconds, method.sampling_seconds
            found.append(result)
    return found


def _extra_passes(run: str, options: str) -> float:
    """Return the mean number of passes without gradients per training image of a run."""
    if "--method=dmis" in options:
        return CLASSES * LEVELS
    with open(f"{run}/stats.jsonl") as f:
        pairs = [
            stats["TDSM/pairs_per_image"]["mean"] for stats in map(json.loads, f) if "TDSM/pairs_per_image" in stats
        ]
    return float(np.mean(pairs)) if pairs else 0.0


def tables(results: Sequence[Result]) -> list[Section]:
    """Return the tables of all settings: rows of equal images, then rows of equal compute.

    Several runs may differ in settings, rows and seeds. UserError: they differ in more than that.
    """
    if any(result.made != results[0].made for result in results):
        raise dnnlib.UserError("these runs differ in the resolution, the length or the number of images")
    found = []
    for setting in SETTINGS:
        if not any(result.setting == setting for result in results):
            continue
        for title, keys in (
            ("equal images", [key for key in ROWS if key not in LONG_ROWS]),
            ("equal compute", [*LONG_ROWS, "tdsm"]),
        ):
            body = []
            for key in keys:
                same = [r for r in results if r.row == key and (r.setting == setting or key in SHARED)]
                runs = list({result.seed: result for result in reversed(same)}.values())
                if runs:
                    body.append(_row(key, sorted(runs, key=lambda result: result.seed)))
            if body and (keys[0] not in LONG_ROWS or len(body) > 1):
                header = ["row", *METRICS.values(), "images", "passes", "training"]
                name = SETTINGS[setting].title
                question = f"{name[0].upper()}{name[1:]} label noise, {title}."
                found.append(Section(f"{name}, {title}", question, header, body, _notes(results)))
    return found


def _row(key: str, runs: Sequence[Result]) -> list[str]:
    seeds = "" if len(runs) == 1 else f" ({len(runs)} seeds)"
    cells = [ROWS[key].title + seeds, *(_cell(runs, name) for name in METRICS)]
    if runs[0].kimg is None:
        return [*cells, "", "", ""]
    spent, seconds = (float(np.mean([getattr(r, name) for r in runs])) for name in ("passes", "training_seconds"))
    return [*cells, f"{runs[0].kimg * 1000:,.0f}", f"{spent:.2f}", dnnlib.format_time(seconds)]


def _cell(runs: Sequence[Result], metric: str) -> str:
    """Return a value and its interval; the mean over several seeds, with the lowest and the highest value."""
    values = [run.metrics[metric] for run in runs]
    if len(runs) == 1 or None in values:
        return with_interval(dict(metrics=runs[0].metrics, intervals=runs[0].intervals), metric)
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _notes(results: Sequence[Result]) -> list[str]:
    made, judge = results[0].made, next((r.judge for r in results if r.judge), None)
    notes = [f"{made['num']:,} images per row of {made['resolution']}x{made['resolution']} pixels."]
    if judge:
        notes.append(f"The judge is right on {judge['accuracy']:.1%} of the {judge['num']:,} test images.")
    return notes


def write(outdir: str, results: Sequence[Result], commands: Sequence[str] = ()) -> str:
    """Write the tables as report.html and report.md into a folder, and return the path of the latter."""
    os.makedirs(outdir, exist_ok=True)
    return Report(tables(results), commands).write(outdir)[1]
