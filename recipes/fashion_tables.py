"""The results of the benchmark on Fashion-MNIST: read from the folders of runs, merged, written as tables."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

import dnnlib
from recipes.fashion import LONG_ROWS, ROWS, RUNS, SETTINGS, SHARED, SIZES, kimg, place, recipe, rows
from recipes.steps import finished, read_journal
from reports.comparison import Method, accuracy_by_class, chart_distances, show_samples, with_interval
from reports.finding import ORACLE, Score, say_finding
from reports.page import Report, Section
from torch_utils import safe_files
from training.objectives.dmis import LEVELS

__all__ = ["Result", "check_page", "load", "sections", "write"]

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
EQUAL_IMAGES = tuple(key for key in ROWS if key not in LONG_ROWS)
TABLES = {"equal images": EQUAL_IMAGES, "equal compute": (*LONG_ROWS, "tdsm", "tdsm-paper")}
FORWARD = 1 / 3  # of a training step: its backward pass takes as long as two forward passes
COMMON = ("resolution", "recipe", "scale", "num")  # what runs on one page have in common
FILE = "results.json"  # what `write` leaves for other pages, without the path of anything


@dataclass
class Result:
    """One row of a run."""

    setting: str  # key of SETTINGS
    row: str  # key of ROWS
    about: dict[str, Any]  # the run: seed, and COMMON
    table: dict[str, Any]  # metrics, intervals, classes and judge, as `fid.py evaluate` wrote them
    training_seconds: float
    sampling_seconds: float
    images: float | None = None  # that trained the denoiser; None: nothing was trained
    passes: float | None = None  # network passes per image of that training, in plain training steps
    outdir: str = ""  # where its images and its table are; "": not known


def check_page(outdir: str) -> None:
    """Raise UserError if `write` would replace files in a folder that it has not written."""
    path = os.path.join(outdir, FILE)
    if os.path.lexists(path):
        load(path)
    elif os.path.lexists(page := os.path.join(outdir, "report.html")):
        raise dnnlib.UserError(f"{page}: exists, and is no page of this recipe; choose another folder")


def load(path: str) -> list[Result]:
    """Return the results of a run, which may be unfinished, or of a page. UserError: they are not of this recipe.

    path    folder of the run, or the results.json that `write` left
    """
    found = _read(path) if path.endswith(".json") else _measured(path)
    if not all(map(_valid, found)):
        raise dnnlib.UserError(f"{path}: not written by this recipe, or by another version of it")
    return found


def _measured(path: str) -> list[Result]:
    """Return the results in the folder of a run."""
    journal, found = read_journal(path), []
    known = journal["about"] if isinstance(journal["about"], dict) else {}
    about = {name: known.get(name) for name in ("seed", *COMMON)}
    settings, keys = (known.get(name) or [""] for name in ("settings", "rows"))
    if about["resolution"] not in SIZES or not (set(settings) <= SETTINGS.keys() and set(keys) <= ROWS.keys()):
        raise dnnlib.UserError(f"{path}: not written by this recipe")
    if about["recipe"] != recipe(about["resolution"]):
        raise dnnlib.UserError(f"{path}: another version made it, with trainings of other lengths or options")
    for setting in settings:
        for key, row in rows(path, setting, keys).items():
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

    def some(values: dict[str, Any], *names: str) -> dict[str, Any]:
        return {name: values[name] for name in names if name in values}

    return {
        "metrics": some(table["metrics"], *METRICS),
        "intervals": some(table["intervals"], *METRICS),
        "classes": {c: some(values, "name", "label_accuracy") for c, values in table["classes"].items()},
        "judge": some(table["judge"], "accuracy", "num", "on", "classes"),
    }


def _read(path: str) -> list[Result]:
    """Return the results in a results.json."""
    saved = safe_files.load_json(dnnlib.read_bytes(path), path)
    names = {field.name for field in fields(Result)} - {"outdir"}
    if not isinstance(saved, list) or not all(isinstance(row, dict) and row.keys() == names for row in saved):
        raise dnnlib.UserError(f"{path}: not written by this recipe")
    return [Result(**row) for row in saved]


def _valid(result: Result) -> bool:
    """Return whether a result holds all that the tables need."""

    def numbers(*values: Any) -> bool:
        return all(isinstance(v, (int, float)) and math.isfinite(v) for v in values if v is not None)

    try:
        table, about = result.table, result.about
        judge, classes = table["judge"], table["classes"]
        return (
            result.setting in SETTINGS
            and result.row in ROWS
            and isinstance(about["seed"], int)
            and about.keys() == {"seed", *COMMON}
            and about["resolution"] in SIZES
            and numbers(about["num"], about["scale"], result.training_seconds + result.sampling_seconds)
            and numbers(result.images, result.passes)
            and (result.images is None) == (result.passes is None) == (not ROWS[result.row].run)
            and table["metrics"].keys() == METRICS.keys()
            and numbers(*table["metrics"].values())
            and all(name in METRICS and numbers(low + high) for name, (low, high) in table["intervals"].items())
            and len(classes) == CLASSES
            and all(isinstance(c["name"], str) and numbers(c.get("label_accuracy")) for c in classes.values())
            and numbers(judge["accuracy"] + judge["num"])
            and isinstance(judge["on"], str)
            and all(numbers(c.get("accuracy"), c.get("num")) for c in judge["classes"].values())
        )
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):  # the first: integers beyond any float
        return False


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
    for setting in _settings(results):
        for title, keys in TABLES.items():
            runs = _runs(results, setting, keys)
            if runs and (keys is EQUAL_IMAGES or set(runs) & set(LONG_ROWS)):
                found.append(_section(_title(setting, title), runs))
    return found


def _settings(results: Sequence[Result]) -> list[str]:
    return [setting for setting in SETTINGS if any(result.setting == setting for result in results)]


def _runs(results: Sequence[Result], setting: str, keys: Sequence[str]) -> dict[str, list[Result]]:
    """Return the rows of a table that there are: key -> results, one for each seed, in the order of the seeds.

    Real images come first, then the best row: by the ratio to the oracle of the same seed, since seeds differ.
    """
    found = {}
    for key in keys:
        same = [r for r in results if r.row == key and (r.setting == setting or key in SHARED)]
        first = {result.about["seed"]: result for result in reversed(same)}
        if first:
            found[key] = [first[seed] for seed in sorted(first)]

    oracle = _oracle(found)
    reached = _mean(oracle)["metrics"][RANKING] if oracle else None

    def rank(key: str) -> tuple[bool, float]:
        value, ratio = _mean(found[key])["metrics"][RANKING], _ratio(found[key], oracle)
        if value is not None and ratio is None and reached:
            ratio = value / reached
        best = value if ratio is None else ratio
        return bool(ROWS[key].run), math.inf if best is None else best

    return {key: found[key] for key in sorted(found, key=rank)}


def _oracle(runs: dict[str, list[Result]]) -> list[Result]:
    return next((results for key, results in runs.items() if ROWS[key].role == ORACLE), [])


def _same_seeds(runs: dict[str, list[Result]]) -> dict[str, list[Result]]:
    """Return the rows with the seeds that all trained ones have, as far as there are any: what can be compared."""
    seeds = [{result.about["seed"] for result in results} for key, results in runs.items() if ROWS[key].run]
    shared = set.intersection(*seeds) if seeds else set()
    return {key: [r for r in results if r.about["seed"] in shared] or results for key, results in runs.items()}


def _title(setting: str, title: str) -> str:
    return f"Fashion-MNIST, {SETTINGS[setting].title}, {title}"


def _section(title: str, runs: dict[str, list[Result]]) -> Section:
    oracle = _oracle(runs)
    alike = _same_seeds(runs)
    header, body, scores = ["row"], [], []
    for name, metric in METRICS.items():
        header += [metric, "/ oracle's"] if oracle and name == RANKING else [metric]
    for key, results in runs.items():
        table = _mean(alike[key])
        value, low_high = table["metrics"][RANKING], table["intervals"].get(RANKING)
        if ROWS[key].run and value is not None:
            scores.append(Score(ROWS[key].title, value, low_high if len(alike[key]) == 1 else None, ROWS[key].role))
        body.append(_row(key, results, oracle))
    header += ["images", "passes per image", "training", "sampling"]
    everything = [result for results in runs.values() for result in results]
    about, side = everything[0].about, everything[0].about["resolution"]
    judges = {_judge(result): result.table["judge"] for result in everything}
    notes = [
        f"{about['num']:,} images per row, {side}x{side} pixels.",
        *(
            f"The judge is right on {judge['accuracy']:.1%} of the {judge['num']:,} test images."
            for judge in judges.values()
        ),
        *(["The runs have different judges, so their rows do not compare."] if len(judges) > 1 else []),
        "A pass with gradients counts as 1, one without them as 1/3. The training time includes all that a row needs.",
    ]
    seeds = sorted({result.about["seed"] for result in everything})
    if len(seeds) > 1:
        notes.append(
            f"Rows with several seeds ({', '.join(map(str, seeds))}): the mean, the lowest and the highest value."
        )
    if alike != runs and len(judges) == 1:
        notes.append("The sentence above, the chart and the accuracy by class are about the seeds that all rows have.")
    return Section(
        title,
        "Class-conditional diffusion models are trained on wrong labels. Do they make what they are asked for?",
        header,
        body,
        notes,
        finding=say_finding(scores, METRICS[RANKING]) if len(judges) == 1 else "",
    )


def _row(key: str, results: Sequence[Result], oracle: Sequence[Result]) -> list[str]:
    cells = [ROWS[key].title + ("" if len(results) == 1 else f" ({len(results)} seeds)")]
    for name in METRICS:
        cells += [_cell(results, name), *([_relative(results, oracle)] if oracle and name == RANKING else [])]
    if results[0].images is None:
        return [*cells, "", "", "", ""]
    passes = np.mean([result.passes for result in results])
    training = np.mean([result.training_seconds for result in results])
    sampling = np.mean([result.sampling_seconds for result in results])
    times = [dnnlib.format_time(float(seconds)) for seconds in (training, sampling)]
    return [*cells, f"{results[0].images:,.0f}", f"{passes:.2f}", *times]


def _cell(results: Sequence[Result], metric: str) -> str:
    """Return a value and its interval; of several seeds the mean, the lowest and the highest value."""
    mean = _mean(results)
    if len(results) == 1 or mean["metrics"][metric] is None:
        return with_interval(mean, metric)
    low, high = mean["intervals"][metric]
    return f"{mean['metrics'][metric]:.3f} ({low:.3f} to {high:.3f})"


def _relative(results: Sequence[Result], oracle: Sequence[Result]) -> str:
    ratio = _ratio(results, oracle)
    return "n/a" if ratio is None else f"{ratio:.2f}"


def _ratio(results: Sequence[Result], oracle: Sequence[Result]) -> float | None:
    """Return the mean ratio of a row to the oracle, over the seeds where both have one judge; None without any."""
    best = {(result.about["seed"], _judge(result)): result.table["metrics"][RANKING] for result in oracle}
    pairs = [(r.table["metrics"][RANKING], best.get((r.about["seed"], _judge(r)))) for r in results]
    ratios = [value / reached for value, reached in pairs if value is not None and reached]
    return float(np.mean(ratios)) if ratios else None


def _judge(result: Result) -> float:
    """Return what tells judges apart: the share of test images on which one is right."""
    return result.table["judge"]["accuracy"]


def _mean(results: Sequence[Result]) -> dict[str, Any]:
    """Return the table of one seed, or the mean of several with the lowest and the highest values as intervals."""
    tables = [result.table for result in results]
    if len(tables) == 1:
        return tables[0]
    metrics, intervals = {}, {}
    for name in METRICS:
        values = [table["metrics"][name] for table in tables]
        metrics[name] = None if None in values else float(np.mean(values))
        if None not in values:
            intervals[name] = min(values), max(values)
    classes = {}
    for c, first in tables[0]["classes"].items():
        right = [table["classes"][c].get("label_accuracy") for table in tables]
        classes[c] = dict(name=first["name"], label_accuracy=None if None in right else float(np.mean(right)))
    return dict(metrics=metrics, intervals=intervals, classes=classes, judge=tables[0]["judge"])


def write(outdir: str, results: Sequence[Result], commands: Sequence[str] = ()) -> str:
    """Write the tables as report.html and report.md into a folder, and return the path of the latter.

    A chart and the accuracy by class follow the table of each setting, unless its rows have different judges; where all
    results come from one run, its samples do as well. The folder also gets the results themselves, for `load`.
    """
    found = sections(results)
    os.makedirs(outdir, exist_ok=True)
    folders = {result.outdir for result in results}
    folder = folders.pop() if len(folders) == 1 else ""
    for setting in _settings(results):
        runs = _runs(results, setting, [key for key in EQUAL_IMAGES if ROWS[key].run])
        section = next((s for s in found if s.title == _title(setting, "equal images")), None)
        if section is None or not runs or len({_judge(r) for of_seeds in runs.values() for r in of_seeds}) > 1:
            continue
        methods = [
            Method(ROWS[key].title, {}, "", _mean(of_seeds), 0.0, 0.0, ROWS[key].role)
            for key, of_seeds in _same_seeds(runs).items()
        ]
        section.pictures = [chart_distances(outdir, methods, name=setting), accuracy_by_class(methods)]
        data = f"{folder}/datasets/{place('noisy', setting)}.zip"
        if folder and os.path.exists(data):
            shown = finished(folder, [*rows(folder, setting, [*runs]).values()], read_journal(folder)["seconds"])
            section.pictures.append(show_samples(outdir, shown, data, name=setting))
    saved = [asdict(result) for result in results]
    for row in saved:
        del row["outdir"]
    with dnnlib.atomic_open(os.path.join(outdir, FILE), "w") as f:
        f.write("[\n" + ",\n".join(map(json.dumps, saved)) + "\n]\n")
    return Report(found, commands).write(outdir)[1]
