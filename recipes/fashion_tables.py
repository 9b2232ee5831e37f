"""The results of the benchmark on Fashion-MNIST: read from the folders of runs, merged, written as tables."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import dnnlib
from recipes.fashion import LONG_ROWS, ROWS, RUNS, SETTINGS, SHARED, kimg, place, rows
from recipes.steps import finished, read_journal
from reports.comparison import Method, accuracy_by_class, chart_distances, show_samples, with_interval
from reports.finding import Score, say_finding
from reports.page import Report, Section
from torch_utils import safe_files
from training.objectives.dmis import LEVELS

__all__ = ["Result", "load", "sections", "write"]

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
RANKING = "cw_fid"
FORWARD = 1 / 3  # of a training step: its backward pass takes as long as two forward passes
COMMON = ("resolution", "scale", "num")  # what runs on one page have in common
FILE = "results.json"  # what `write` leaves for other pages, without the path of anything


@dataclass
class Result:
    """One row of a run."""

    setting: str  # key of SETTINGS
    row: str  # key of ROWS
    about: dict[str, Any]  # the run: seed, and COMMON
    table: dict[str, Any]  # metrics, intervals and judge, as `fid.py evaluate` wrote them
    training_seconds: float
    sampling_seconds: float
    images: float | None = None  # that trained the denoiser; None: nothing was trained
    passes: float | None = None  # network passes per image of that training, in plain training steps
    outdir: str = ""  # where its images and its table are; "": not known


def load(path: str) -> list[Result]:
    """Return the results of a run, which may be unfinished, or of a page. UserError: they are not of this recipe.

    path    folder of the run, or the results.json that `write` left
    """
    if path.endswith(".json"):
        return _read(path)
    journal = read_journal(path)
    about = {name: journal["about"][name] for name in ("seed", *COMMON)}
    found = []
    for setting in journal["about"]["settings"]:
        for key, row in rows(path, setting, journal["about"]["rows"]).items():
            if f"{row.name}-table" not in journal["seconds"]:
                continue
            images = passes = None
            if ROWS[key].run:
                [method] = finished(path, [row], journal["seconds"])
                images = 1000 * kimg(ROWS[key].run, about["resolution"], about["scale"])
                passes = 1 + FORWARD * _extra_passes(
                    f"{path}/{place(ROWS[key].run, setting)}", RUNS[ROWS[key].run].options
                )
            else:
                method = Method(row.title, {}, "", f"{path}/tables/{row.name}.json", 0.0, 0.0)
            times = method.training_seconds, method.sampling_seconds
            found.append(Result(setting, key, about, _shorten(method.result), *times, images, passes, path))
    return found


def _shorten(table: dict[str, Any]) -> dict[str, Any]:
    """Return what the tables here need of one of `fid.py evaluate`."""
    parts = ("metrics", "intervals")
    short = {part: {name: table[part][name] for name in METRICS if name in table[part]} for part in parts}
    return short | dict(judge={name: table["judge"][name] for name in ("accuracy", "num")})


def _read(path: str) -> list[Result]:
    saved = safe_files.load_json(dnnlib.read_bytes(path), path)
    try:
        results = [Result(**row) for row in saved]
        for result in results:  # what the tables read
            SETTINGS[result.setting], ROWS[result.row], [result.about[name] for name in ("seed", *COMMON)]
            [result.table["metrics"][name] for name in METRICS], result.table["judge"]["accuracy"]
    except (KeyError, TypeError):
        raise dnnlib.UserError(f"{path}: not written by this recipe") from None
    return results


def _extra_passes(run: str, options: str) -> float:
    """Return the mean number of passes without gradients per training image of a run."""
    if "--method=dmis" in options:
        return CLASSES * LEVELS
    lines = dnnlib.read_bytes(f"{run}/stats.jsonl").decode().splitlines()
    pairs = [
        stats["TDSM/pairs_per_image"]["mean"] for stats in map(json.loads, lines) if "TDSM/pairs_per_image" in stats
    ]
    return float(np.mean(pairs)) if pairs else 0.0


def sections(results: Sequence[Result]) -> list[Section]:
    """Return the tables of all settings: first the rows of equal images, then those of equal compute.

    The results may come from several runs with other settings, rows and seeds. UserError: they differ in more.
    """
    if not results:
        raise dnnlib.UserError("no row is finished")
    if any(result.about[name] != results[0].about[name] for result in results for name in COMMON):
        raise dnnlib.UserError("these runs differ in the resolution, the lengths or the number of images")
    found = []
    for setting in SETTINGS:
        if not any(result.setting == setting for result in results):
            continue
        same = [result for result in results if result.setting == setting or result.row in SHARED]
        for title, keys in (
            ("equal images", [key for key in ROWS if key not in LONG_ROWS]),
            ("equal compute", [*LONG_ROWS, "tdsm"]),
        ):
            runs = {key: _seeds(key, same) for key in keys}
            runs = {key: of_seeds for key, of_seeds in runs.items() if of_seeds}
            if runs and (keys[0] not in LONG_ROWS or set(runs) & set(LONG_ROWS)):
                found.append(_section(_title(setting, title), runs))
    return found


def _title(setting: str, title: str) -> str:
    return f"Fashion-MNIST, {SETTINGS[setting].title}, {title}"


def _seeds(key: str, results: Sequence[Result]) -> list[Result]:
    """Return the results of a row, one for each seed, in the order of the seeds."""
    first = {result.about["seed"]: result for result in reversed(results) if result.row == key}
    return [first[seed] for seed in sorted(first)]


def _section(title: str, runs: dict[str, list[Result]]) -> Section:
    header = ["row", *METRICS.values(), "images", "passes per image", "training", "sampling"]
    scores, body = [], []
    for key, results in runs.items():
        values = [result.table["metrics"][RANKING] for result in results]
        low_high = results[0].table["intervals"].get(RANKING) if len(results) == 1 else None
        if ROWS[key].run and None not in values:
            scores.append(Score(ROWS[key].title, float(np.mean(values)), low_high, ROWS[key].role))
        body.append(_row(key, results))
    everything = [result for results in runs.values() for result in results]
    about, side = everything[0].about, everything[0].about["resolution"]
    judges = {result.table["judge"]["accuracy"]: result.table["judge"] for result in everything}
    notes = [
        f"{about['num']:,} images per row, {side}x{side} pixels.",
        *(
            f"The judge is right on {judge['accuracy']:.1%} of the {judge['num']:,} test images."
            for judge in judges.values()
        ),
        *(["The runs have different judges, so their values do not compare."] if len(judges) > 1 else []),
        "A pass with gradients counts as 1, one without them as 1/3. The training time includes all that a row needs.",
    ]
    seeds = sorted({result.about["seed"] for result in everything})
    if len(seeds) > 1:
        notes.append(
            f"Rows with several seeds ({', '.join(map(str, seeds))}): the mean, the lowest and the highest value."
        )
    return Section(
        title,
        "Class-conditional diffusion models are trained on wrong labels. Do they make what they are asked for?",
        header,
        body,
        notes,
        finding=say_finding(scores, METRICS[RANKING]),
    )


def _row(key: str, results: Sequence[Result]) -> list[str]:
    cells = [ROWS[key].title + ("" if len(results) == 1 else f" ({len(results)} seeds)")]
    cells += [_cell(results, name) for name in METRICS]
    if results[0].images is None:
        return [*cells, "", "", "", ""]
    passes = np.mean([result.passes for result in results])
    training = np.mean([result.training_seconds for result in results])
    sampling = np.mean([result.sampling_seconds for result in results])
    times = [dnnlib.format_time(float(seconds)) for seconds in (training, sampling)]
    return [*cells, f"{results[0].images:,.0f}", f"{passes:.2f}", *times]


def _cell(results: Sequence[Result], metric: str) -> str:
    """Return a value and its interval; of several seeds the mean, the lowest and the highest value."""
    values = [result.table["metrics"][metric] for result in results]
    if len(values) == 1:
        return with_interval(results[0].table, metric)
    if None in values:
        return "n/a"
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def write(outdir: str, results: Sequence[Result], commands: Sequence[str] = ()) -> str:
    """Write the tables as report.html and report.md into a folder, and return the path of the latter.

    Where all results come from one run, its samples and a chart follow the table of each setting. The folder also gets
    the results themselves, for `load`.
    """
    found = sections(results)
    os.makedirs(outdir, exist_ok=True)
    saved = [asdict(result) for result in results]
    for row in saved:
        del row["outdir"]
    with dnnlib.atomic_open(os.path.join(outdir, FILE), "w") as f:
        json.dump(saved, f, indent=1)
    folders = {result.outdir for result in results}
    if len(folders) == 1 and "" not in folders:
        [folder] = folders
        seconds = read_journal(folder)["seconds"]
        for setting in dict.fromkeys(result.setting for result in results):
            section = next((s for s in found if s.title == _title(setting, "equal images")), None)
            shown = [r.row for r in results if r.setting == setting and r.images is not None and r.row not in LONG_ROWS]
            methods = finished(folder, [*rows(folder, setting, shown).values()], seconds)
            data = f"{folder}/datasets/{place('noisy', setting)}.zip"
            if section is not None and methods and os.path.exists(data):
                section.pictures = [
                    chart_distances(outdir, methods, name=setting),
                    accuracy_by_class(methods),
                    show_samples(outdir, methods, data, name=setting),
                ]
    return Report(found, commands).write(outdir)[1]
