"""Compare methods that were trained on the same data: tables, sheets of samples and loss curves for a report."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import dnnlib
from archives.dataset import ImageDataset
from reports.page import Picture, Section
from reports.plots import loss_curves, transition_heatmap
from sampling.grid import save_grid

__all__ = ["METRICS", "OUTLIER_METRICS", "Method", "compare_methods", "compare_outliers", "with_interval"]

# Metrics of the tables, and their names there.
METRICS = {
    "label_accuracy": "label accuracy",
    "fid": "FD",
    "cw_fid": "class-wise FD",
    "density_k5": "density",
    "coverage_k5": "coverage",
}
OUTLIER_METRICS = {"outlier_ratio": "outliers", "fid": "FD to the clean images", "coverage_k5": "coverage"}
SHEET_ROWS, SHEET_COLUMNS = 8, 12  # images in a picture of samples


@dataclass
class Method:
    """A method, which is one row of the table."""

    title: str
    runs: dict[str, str]  # title -> run directory of everything that was trained for it
    images: str  # archive of the images it generated
    table: str  # JSON file with their metrics
    training_seconds: float
    sampling_seconds: float


def compare_methods(
    directory: str,
    title: str,
    question: str,
    data: str,
    methods: Sequence[Method],
    notes: Sequence[str],
    extra: Sequence[Picture] = (),
) -> Section:
    """Return a section of a report on methods that learn from wrong labels. Write pictures to `directory`/pictures.

    `data` is the archive with wrong labels; it must also record the clean ones. Each method's images must be in the
    order of their seeds, with class = seed modulo number of classes. `extra` pictures come after the samples.
    """
    dataset = ImageDataset(data)
    layout = dict(columns=dataset.label_dim, column_labels=dataset.class_names)
    wrong = float(np.mean(dataset.labels != dataset.clean_labels))
    columns = [np.flatnonzero(dataset.labels == c)[:SHEET_ROWS] for c in range(dataset.label_dim)]
    pictures = [
        _sheet(
            directory,
            "training",
            "Training images by their observed label",
            f"{wrong:.0%} of the labels are wrong.",
            _nhwc(dataset, np.stack(columns, axis=1).ravel()),
            **layout,
        )
    ]
    tables = [_table(method) for method in methods]
    rows = [
        [method.title, *(with_interval(table, name) for name in METRICS), *_durations(method)]
        for method, table in zip(methods, tables, strict=True)
    ]
    pictures += [_samples(directory, method, "One column for each class asked for.", **layout) for method in methods]
    judge = tables[-1]["judge"]
    notes = [
        *notes,
        f"Label accuracy by {judge['name']}, right on {judge['accuracy']:.1%} of {judge['num']} {judge['on']}.",
        *_intervals(tables[-1]),
    ]
    pictures += [*extra, _losses(directory, "losses", methods)]
    if dataset.corruption.get("T") is not None:
        heatmap = os.path.join(directory, "pictures", "transition.png")
        names = dataset.class_names or [str(c) for c in range(dataset.label_dim)]
        transition_heatmap(dataset.corruption["T"], heatmap, names)
        pictures.append(Picture(heatmap, "Label-transition matrix T", "P(observed given clean label).", width=420))
    header = ["method", *METRICS.values(), "training", "sampling"]
    return Section(title, question, header, rows, notes, pictures)


def compare_outliers(
    directory: str, name: str, title: str, question: str, data: str, methods: Sequence[Method], notes: Sequence[str]
) -> Section:
    """Return a section of a report on methods that learn from images of which some do not belong.

    `data` is the archive that records its outliers. Pictures go into `directory`/pictures, with file names that begin
    with `name`.
    """
    dataset = ImageDataset(data)
    shown = range(min(SHEET_ROWS * SHEET_COLUMNS, len(dataset)))
    pictures = [
        _sheet(
            directory,
            f"{name}-training",
            f"Training images: {name}",
            f"{dataset.outliers.mean():.0%} of all are outliers.",
            _nhwc(dataset, shown),
            columns=SHEET_COLUMNS,
        )
    ]
    tables = [_table(method) for method in methods]
    rows = [
        [
            method.title,
            *(with_interval(table, metric) for metric in OUTLIER_METRICS),
            f"{table['outliers']['training_share']:.3f}",
            *_durations(method),
        ]
        for method, table in zip(methods, tables, strict=True)
    ]
    pictures += [_samples(directory, method, "", columns=SHEET_COLUMNS) for method in methods]
    judge = tables[-1]["outliers"]
    notes = [
        *notes,
        f"Outliers by {judge['name']}, right on {judge['accuracy']:.1%} of {judge['num']} {judge['on']}.",
        *_intervals(tables[-1]),
    ]
    pictures.append(_losses(directory, f"{name}-losses", methods))
    header = ["method", *OUTLIER_METRICS.values(), "outliers in training", "training", "sampling"]
    return Section(title, question, header, rows, notes, pictures)


def _table(method: Method) -> dict:
    with open(method.table) as f:
        return json.load(f)


def _durations(method: Method) -> list[str]:
    return [*map(dnnlib.format_time, (method.training_seconds, method.sampling_seconds))]


def _intervals(table: dict) -> list[str]:
    if table["bootstrap"] is None:
        return []
    return [
        "± is half the width of the {level:.0%} interval of {draws} bootstrap draws: {of}.".format(**table["bootstrap"])
    ]


def _sheet(directory: str, name: str, heading: str, text: str, images: np.ndarray, **layout: Any) -> Picture:
    path = os.path.join(directory, "pictures", f"{name}.png")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save_grid(images, path, scale=6, **layout)
    return Picture(path, heading, text)


def _samples(directory: str, method: Method, text: str, **layout: Any) -> Picture:
    images = ImageDataset(method.images)
    name = os.path.splitext(os.path.basename(method.images))[0]
    shown = range(min(SHEET_ROWS * layout["columns"], len(images)))
    return _sheet(directory, name, f"Samples: {method.title}", text, _nhwc(images, shown), **layout)


def _losses(directory: str, name: str, methods: Sequence[Method]) -> Picture:
    path = os.path.join(directory, "pictures", f"{name}.png")
    loss_curves({title: run for method in methods for title, run in method.runs.items()}, path)
    return Picture(path, "Training losses")


def with_interval(table: dict, metric: str) -> str:
    """Return a metric in words: '0.936 ± 0.014', without '±' if there is no interval, 'n/a' if there is no value."""
    value, (low, high) = table["metrics"][metric], table["intervals"].get(metric, (0, 0))
    return "n/a" if value is None else f"{value:.3f}" + (f" ± {(high - low) / 2:.3f}" if high > low else "")


def _nhwc(dataset: ImageDataset, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    return dataset.images(indices).permute(0, 2, 3, 1).numpy()
