"""Methods side by side: tables, sheets of samples and loss curves of several runs on one data set, as a report."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import dnnlib
from metrics.report import Picture, Report, loss_curves, transition_heatmap
from sampling.grid import save_grid
from training.dataset import ImageDataset

__all__ = ["METRICS", "Method", "compare_methods", "with_interval"]

METRICS = {"label_accuracy": "label accuracy", "fid": "FD", "cw_fid": "class-wise FD", "density_k5": "density",
           "coverage_k5": "coverage"}
SHEET_ROWS = 8


@dataclass
class Method:
    """One row: its name, run directories of all it trained (title -> path), its images, its table, seconds spent."""

    title: str
    runs: dict[str, str]
    images: str
    table: str
    training_seconds: float
    sampling_seconds: float


def compare_methods(directory: str, title: str, question: str, data: str, methods: Sequence[Method],
                    notes: Sequence[str], commands: Sequence[str],
                    extra: Sequence[Picture] = ()) -> tuple[str, str]:
    """Write report.html, report.md and `pictures/` into `directory`; returns the paths of the two.

    `data`: the noisy archive, with clean labels on record. Images: seeds in order, class = seed mod classes. `extra`
    pictures follow the samples.
    """
    dataset = ImageDataset(data)
    folder = os.path.join(directory, "pictures")
    os.makedirs(folder, exist_ok=True)
    pictures = []

    def sheet(name: str, heading: str, text: str, images: np.ndarray) -> None:
        path = os.path.join(folder, f"{name}.png")
        save_grid(images, path, columns=dataset.label_dim, scale=6, column_labels=dataset.class_names)
        pictures.append(Picture(path, heading, text))

    wrong = float(np.mean(dataset.labels != dataset.clean_labels))
    columns = [np.flatnonzero(dataset.labels == c)[:SHEET_ROWS] for c in range(dataset.label_dim)]
    sheet("training", "Training images by their observed label", f"{wrong:.0%} of the labels are wrong.",
          _nhwc(dataset, np.stack(columns, axis=1).ravel()))
    rows = []
    for method in methods:
        with open(method.table) as f:
            table = json.load(f)
        rows.append([method.title, *(with_interval(table, name) for name in METRICS),
                     *map(dnnlib.format_time, (method.training_seconds, method.sampling_seconds))])
        images = ImageDataset(method.images)
        shown = range(min(SHEET_ROWS * dataset.label_dim, len(images)))
        sheet(os.path.splitext(os.path.basename(method.images))[0], f"Samples: {method.title}",
              "One column for each class asked for.", _nhwc(images, shown))
    judge = table["judge"]
    notes = [*notes, f"Label accuracy by {judge['name']}, right on {judge['accuracy']:.1%} of {judge['num']} "
             f"{judge['on']}."]
    if table["bootstrap"] is not None:
        notes.append("± is half the width of the {level:.0%} interval of {draws} bootstrap draws: {of}.".format(
            **table["bootstrap"]))

    pictures += extra
    curves, heatmap = os.path.join(folder, "losses.png"), os.path.join(folder, "transition.png")
    loss_curves({name: run for method in methods for name, run in method.runs.items()}, curves)
    pictures.append(Picture(curves, "Training losses"))
    if dataset.corruption.get("T") is not None:
        names = dataset.class_names or [str(c) for c in range(dataset.label_dim)]
        transition_heatmap(dataset.corruption["T"], heatmap, names)
        pictures.append(Picture(heatmap, "Label-transition matrix T", "P(observed given clean label).", width=420))
    header = ["method", *METRICS.values(), "training", "sampling"]
    return Report(title, question, header, rows, notes, pictures, commands).write(directory)


def with_interval(table: dict, metric: str) -> str:
    """'0.936 ± 0.014', without the interval where there is none."""
    value, (low, high) = table["metrics"][metric], table["intervals"].get(metric, (0, 0))
    return "n/a" if value is None else f"{value:.3f}" + (f" ± {(high - low) / 2:.3f}" if high > low else "")


def _nhwc(dataset: ImageDataset, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    return dataset.images(indices).permute(0, 2, 3, 1).numpy()
