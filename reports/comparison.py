"""Compare methods that were trained on the same data, for a report: tables, charts, samples side by side, losses.

A recipe calls `compare_methods` for a whole section. The parts can be had one by one, too: `find`, `chart_distances`,
`show_samples` and `accuracy_by_class` need no more than the methods.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import dnnlib
from archives.dataset import ImageDataset
from reports.finding import ORACLE, Score, say_finding
from reports.page import Gallery, Picture, Section, Table
from reports.plots import compare_values, loss_curve, transition_heatmap
from sampling.grid import save_grid

__all__ = [
    "METRICS",
    "OUTLIER_METRICS",
    "Method",
    "accuracy_by_class",
    "chart_distances",
    "compare_methods",
    "compare_outliers",
    "find",
    "show_samples",
    "with_interval",
]

SAME_NOISE = "Samples at the same place began with the same noise"
# Metrics of the tables, and their names there.
METRICS = {
    "label_accuracy": "label accuracy",
    "cw_fid": "class-wise FD",
    "fid": "FD",
    "density_k5": "density",
    "coverage_k5": "coverage",
}
OUTLIER_METRICS = {"outlier_ratio": "outliers", "fid": "FD to the clean images", "coverage_k5": "coverage"}
RANKING = "cw_fid"  # what says which method is best
RELATIVE = ("label_accuracy", RANKING)  # metrics that are also given relative to the oracle's
SHEET_ROWS, SHEET_COLUMNS = 8, 12  # images in a picture of samples
CLASSES = 20  # at most, in pictures and tables with one column per class
TILE = 48  # pixels of an image in a picture, about


@dataclass
class Method:
    """A method, which is one row of the table."""

    title: str  # short
    runs: dict[str, str]  # title -> run directory of everything that was trained for it
    images: str  # archive of the images it generated; "": there are none to show
    table: str | dict[str, Any]  # their metrics: JSON file of `fid.py evaluate`, or what it holds
    training_seconds: float
    sampling_seconds: float
    role: str = ""  # reports.finding.ORACLE, BASELINE or none
    text: str = ""  # what it does

    @functools.cached_property
    def result(self) -> dict[str, Any]:
        """The content of `table`."""
        if isinstance(self.table, dict):
            return self.table
        with open(self.table) as f:
            return json.load(f)


def compare_methods(
    directory: str,
    title: str,
    question: str,
    data: str,
    methods: Sequence[Method],
    notes: Sequence[str],
    extra: Sequence[Picture] = (),
    *,
    name: str = "",
    metrics: Mapping[str, str] = METRICS,
) -> Section:
    """Return a section of a report on methods that learn from wrong labels. Write pictures to `directory`/pictures.

    data     archive with wrong labels, which also records the clean ones
    methods  in the order of the rows; the images of each have labels and are in the order of the same seeds
    extra    pictures that come after the samples
    name     what the file names of pictures begin with, where a report has several such sections
    metrics  metrics of the table -> their names there
    """
    place = _Place(directory, name)
    dataset = ImageDataset(data)
    judge = methods[-1].result["judge"]
    header, rows = _main_table(methods, metrics)
    notes = [
        *(f"{method.title}: {method.text}." for method in methods if method.text),
        *notes,
        f"Label accuracy by {judge['name']}, right on {judge['accuracy']:.1%} of {judge['num']:,} {judge['on']}.",
        *_intervals(methods[-1].result),
    ]
    pictures = [chart_distances(directory, methods, name=name), accuracy_by_class(methods)]
    pictures.append(show_samples(directory, methods, data, name=name))
    pictures += [*extra, _losses(place, methods)]
    if dataset.corruption.get("T") is not None:
        heatmap = place.path("transition")
        transition_heatmap(dataset.corruption["T"], heatmap, dataset.shown_classes)
        text = "P(observed given clean label)."
        pictures.append(Picture(heatmap, "Label-transition matrix T", text, width=420))
    return Section(title, question, header, rows, notes, pictures, find(methods))


def find(methods: Sequence[Method]) -> str:
    """Return in one sentence what a comparison found."""
    scores = [Score(m.title, m.result["metrics"][RANKING], m.result["intervals"].get(RANKING), m.role) for m in methods]
    return say_finding(scores, METRICS[RANKING])


def chart_distances(directory: str, methods: Sequence[Method], *, name: str = "") -> Picture:
    """Return a chart of the class-wise FD of each method, with the oracle's as a line."""
    path = _Place(directory, name).path("distances")
    values = {m.title: (m.result["metrics"][RANKING], m.result["intervals"].get(RANKING)) for m in methods}
    compare_values(values, METRICS[RANKING], path, next((m.title for m in methods if m.role == ORACLE), None))
    line = "The line is the oracle. " if any(m.role == ORACLE for m in methods) else ""
    text = f"Lower is better. {line}Bars are the intervals."
    return Picture(path, "Distance from real images, class by class", text, width=640)


def accuracy_by_class(methods: Sequence[Method]) -> Table:
    """Return a table of the label accuracy in each class, with the accuracy of the judge itself on real images."""
    result = methods[-1].result
    judge, classes = result["judge"], dict(list(result["classes"].items())[:CLASSES])
    own = [judge["classes"].get(c, {}) for c in classes]
    rows = [
        ["judge, real images", *(_short(values.get("accuracy")) for values in own)],
        ["their number", *(f"{values.get('num', 0):,}" for values in own)],
    ]
    rows += [[m.title, *(_short(m.result["classes"][c].get("label_accuracy")) for c in classes)] for m in methods]
    text = f"The first row is the judge's own accuracy on real images: {judge['on']}. In a class where it is low, the "
    text += "rows below say as much about the judge as about the methods."
    return Table("Label accuracy by class", text, ["", *(values["name"] for values in classes.values())], rows)


def show_samples(directory: str, methods: Sequence[Method], data: str, *, name: str = "") -> Gallery:
    """Return sheets of the training images and of each method's samples, with the wrong ones in a red frame.

    `data` is the archive with wrong labels, as in `compare_methods`.
    """
    place, dataset = _Place(directory, name), ImageDataset(data)
    wrong = dataset.labels != dataset.clean_labels
    columns = dict(class_names=dataset.shown_classes)
    text = f"By observed label: {wrong.mean():.0%} of all are wrong."
    sheets = [place.class_sheet("training", "training images", text, dataset, wrong, **columns)]
    for method in methods:
        if method.images:
            images = ImageDataset(method.images)
            texts = [f"{METRICS[m]} {_short(method.result['metrics'][m])}" for m in RELATIVE]
            wrong = np.asarray(method.result["judged"]) != images.labels
            file = os.path.splitext(os.path.basename(method.images))[0]
            sheets.append(place.class_sheet(file, method.title, ", ".join(texts), images, wrong, **columns))
    text = (
        "One column for each class asked for. A red frame: the label is wrong, or the judge sees another class in the "
    )
    text += f"sample. {SAME_NOISE}, unless rejection drew them anew."
    return Gallery("Samples", text, sheets)


def compare_outliers(
    directory: str, name: str, title: str, question: str, data: str, methods: Sequence[Method], notes: Sequence[str]
) -> Section:
    """Return a section of a report on methods that learn from images of which some do not belong.

    `data` is the archive that records its outliers. Pictures go into `directory`/pictures, with file names that begin
    with `name`.
    """
    place, dataset = _Place(directory, name), ImageDataset(data)
    text = f"{dataset.outliers.mean():.0%} of all are outliers: red frames."
    sheets = [place.sheet("training", f"Training images: {name}", text, dataset, framed=dataset.outliers)]
    rows = [
        [
            method.title,
            *(with_interval(method.result, metric) for metric in OUTLIER_METRICS),
            f"{method.result['outliers']['training_share']:.3f}",
            *_durations(method),
        ]
        for method in methods
    ]
    for method in methods:
        file = os.path.splitext(os.path.basename(method.images))[0]
        text = f"{OUTLIER_METRICS['outlier_ratio']} {with_interval(method.result, 'outlier_ratio')}"
        sheets.append(place.sheet(file, method.title, text, ImageDataset(method.images)))
    judge = methods[-1].result["outliers"]
    notes = [
        *notes,
        f"Outliers by {judge['name']}, right on {judge['accuracy']:.1%} of {judge['num']} {judge['on']}.",
        *_intervals(methods[-1].result),
    ]
    header = ["method", *OUTLIER_METRICS.values(), "outliers in training", "training", "sampling"]
    samples = Gallery("Samples", f"{SAME_NOISE}.", sheets)
    return Section(title, question, header, rows, notes, [samples, _losses(place, methods)])


def with_interval(table: dict, metric: str) -> str:
    """Return a metric in words: '0.936 ± 0.014', without '±' if there is no interval, 'n/a' if there is no value."""
    value, (low, high) = table["metrics"][metric], table["intervals"].get(metric, (0, 0))
    return "n/a" if value is None else f"{value:.3f}" + (f" ± {(high - low) / 2:.3f}" if high > low else "")


def _main_table(methods: Sequence[Method], metrics: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows. With an oracle, columns say how its values and a method's compare."""
    oracle = next((m.result["metrics"] for m in methods if m.role == ORACLE), None)
    header, rows = ["method"], [[method.title] for method in methods]
    for metric, title in metrics.items():
        header.append(title)
        relative = oracle is not None and metric in RELATIVE
        if relative:
            header.append("/ oracle's")
        for row, method in zip(rows, methods, strict=True):
            row.append(with_interval(method.result, metric))
            if relative:
                row.append(_ratio(method.result["metrics"][metric], oracle[metric]))
    for row, method in zip(rows, methods, strict=True):
        row += _durations(method)
    return [*header, "training", "sampling"], rows


def _ratio(value: float | None, oracle: float | None) -> str:
    return "n/a" if value is None or not oracle else f"{value / oracle:.2f}"


def _short(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


def _durations(method: Method) -> list[str]:
    return [*map(dnnlib.format_time, (method.training_seconds, method.sampling_seconds))]


def _intervals(table: dict) -> list[str]:
    if table["bootstrap"] is None:
        return []
    return [
        "± is half the width of the {level:.0%} interval of {draws} bootstrap draws: {of}.".format(**table["bootstrap"])
    ]


def _losses(place: _Place, methods: Sequence[Method]) -> Gallery:
    pictures = []
    for title, run in {title: run for method in methods for title, run in method.runs.items()}.items():
        path = place.path(f"loss-{title}")
        loss_curve(run, path)
        pictures.append(Picture(path, title))
    return Gallery("Training losses", "Against thousands of images.", pictures, small=True)


@dataclass(frozen=True)
class _Place:
    """Where the pictures of a section are."""

    directory: str
    name: str

    def path(self, picture: str) -> str:
        folder = os.path.join(self.directory, "pictures")
        os.makedirs(folder, exist_ok=True)
        prefix = f"{self.name}-" if self.name and not picture.startswith(f"{self.name}-") else ""
        return os.path.join(folder, f"{prefix}{picture}.png")

    def sheet(
        self,
        picture: str,
        title: str,
        text: str,
        images: ImageDataset,
        indices: np.ndarray | None = None,
        framed: np.ndarray | None = None,
        **layout: Any,
    ) -> Picture:
        """Write a picture of some images: of the first ones, if not of `indices`."""
        if indices is None:
            indices, layout = np.arange(min(SHEET_ROWS * SHEET_COLUMNS, len(images))), dict(columns=SHEET_COLUMNS)
        pixels = images.images(indices).permute(0, 2, 3, 1).numpy()
        scale = max(TILE // max(pixels.shape[1:3]), 1)
        save_grid(pixels, self.path(picture), scale=scale, framed=None if framed is None else framed[indices], **layout)
        return Picture(self.path(picture), title, text)

    def class_sheet(
        self,
        picture: str,
        title: str,
        text: str,
        images: ImageDataset,
        framed: np.ndarray,
        class_names: Sequence[str],
    ) -> Picture:
        """Write a picture with a column of images per class that has any. Columns are equally long."""
        columns = [np.flatnonzero(images.labels == c)[:SHEET_ROWS] for c in range(min(len(class_names), CLASSES))]
        shown = [(column, name) for column, name in zip(columns, class_names, strict=False) if len(column)]
        rows = min(len(column) for column, _ in shown)
        indices = np.stack([column[:rows] for column, _ in shown], axis=1).ravel()
        names = [name for _, name in shown]
        return self.sheet(picture, title, text, images, indices, framed, columns=len(names), column_labels=names)
