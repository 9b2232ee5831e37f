"""Plots of a report: loss curves, the trade-off of guidance, a transition matrix, bars and curves of metrics.

The figures are made without pyplot, so no display is needed and no setting of matplotlib changes for other code.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

import dnnlib
from metrics.format import short_names

__all__ = [
    "bar_chart",
    "compare_tradeoffs",
    "compare_values",
    "loss_curve",
    "metric_curve",
    "tradeoff",
    "transition_heatmap",
]

Curve = Sequence[tuple[float, float, float]]  # (weight, FD, label accuracy) of one way to guide, for several weights


def _save(figure: Figure, path: str) -> None:
    """Write a figure as PNG. Make its folder. The file appears only when it is complete."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with dnnlib.atomic_open(path) as f:
        figure.savefig(f, format="png", dpi=120, bbox_inches="tight")


def loss_curve(run_dir: str, path: str, statistic: str = "Loss/loss") -> None:
    """Plot a statistic from `stats.jsonl` of a run directory against thousands of images (kimg)."""
    figure = Figure(figsize=(2.6, 1.8), layout="constrained")
    axis = figure.subplots()
    with open(os.path.join(run_dir, "stats.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    rows = [r for r in rows if statistic in r]
    axis.plot([r["Progress/kimg"]["mean"] for r in rows], [r[statistic]["mean"] for r in rows])
    axis.grid(alpha=0.3)
    _save(figure, path)


def compare_values(
    values: dict[str, tuple[float | None, Sequence[float] | None]], metric: str, path: str, line: str | None = None
) -> None:
    """Draw a point per method, with its interval and its number, and a line at the value of the method `line`.

    `values` maps titles to (value, interval), both None where there is none. `metric` names the values.
    """
    known = {title: found for title, found in values.items() if found[0] is not None}
    figure = Figure(figsize=(5.2, 0.6 + 0.32 * max(len(values), 1)), layout="constrained")
    axis = figure.subplots()
    numbers = [value for value, _ in known.values()]
    if numbers and min(numbers) > 0 and max(numbers) > 4 * min(numbers):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    if line in known:
        axis.axvline(known[line][0], color="black", linewidth=1, linestyle="--")
    for y, title in enumerate(values):
        if title not in known:
            continue
        value, interval = known[title]
        if interval:
            axis.plot(interval, (y, y), color="C0", linewidth=4, alpha=0.35, solid_capstyle="butt")
        axis.plot(value, y, "o", color="black" if title == line else "C0")
        axis.annotate(f"{value:.3g}", (max([value, *(interval or [])]), y), (6, -4), textcoords="offset points")
    axis.set_yticks(range(len(values)), values, parse_math=False)
    axis.set(xlabel=metric, ylim=(len(values) - 0.5, -0.5))
    axis.margins(x=0.15)
    axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def tradeoff(curves: dict[str, Curve], unguided: tuple[float, float], path: str, oracle: float | None = None) -> None:
    """Plot label accuracy against FD, one line per mode of guidance.

    `curves` maps modes to their points. `unguided` is (FD, label accuracy) without guidance, where every line begins.
    `oracle` is the label accuracy of a model that was trained on clean labels.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for mode, points in curves.items():
        fd, accuracy = zip(unguided, *((fd, accuracy) for _, fd, accuracy in points), strict=True)
        axis.plot(fd, accuracy, marker="o", label=mode)
        for weight, x, y in points:
            axis.annotate(f"{weight:g}", (x, y), textcoords="offset points", xytext=(5, -10), fontsize=8)
    axis.plot(*unguided, marker="s", color="black", linestyle="none", label="unguided")
    if oracle is not None:
        axis.axhline(oracle, color="black", linewidth=1, linestyle="--", label="oracle")
    axis.set(xlabel="FD (lower is better)", ylabel="label accuracy")
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)


def compare_tradeoffs(curves: dict[str, Curve], unguided: tuple[float, float], first: str, second: str) -> str:
    """Say in one sentence where the label accuracy of `first` is above that of `second` at equal FD.

    The other arguments are those of `tradeoff`.
    """
    lines = []
    for name in (first, second):
        points = np.array(sorted([unguided, *((fd, accuracy) for _, fd, accuracy in curves[name])]))
        # A curve may turn back. What counts is the best accuracy at this FD or a lower one.
        lines.append((points[:, 0], np.maximum.accumulate(points[:, 1])))
    low, high = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    if not high > low:
        return f"At equal FD {first} and {second} cannot be compared: they have none in common."
    grid = np.linspace(low, high, 201)[1:]
    difference = np.interp(grid, *lines[0]) - np.interp(grid, *lines[1])
    better = difference > 0
    where = f"FD {low:.3g} to {high:.3g}"
    if not difference.any():
        return f"At equal FD the label accuracies of {first} and {second} are equal, {where}."
    if better.all():
        return f"At equal FD the label accuracy of {first} is above that of {second} over the whole range, {where}."
    return (
        f"At equal FD the label accuracy of {first} is above that of {second} on {better.mean():.0%} of the range "
        f"{where}; not above it between FD {grid[~better].min():.3g} and {grid[~better].max():.3g}."
    )


def transition_heatmap(transition: np.ndarray, path: str, class_names: Sequence[str]) -> None:
    """Draw a transition matrix T [C,C]: rows are clean labels, columns observed ones."""
    transition = np.asarray(transition)
    figure = Figure(figsize=(4, 3.4))
    axis = figure.subplots()
    picture = axis.imshow(transition, vmin=0, vmax=1, cmap="viridis")
    axis.set(xlabel="observed label", ylabel="clean label")
    turned = 90 if max(map(len, class_names)) > 3 else 0
    axis.set_xticks(range(len(class_names)), class_names, rotation=turned, parse_math=False)
    axis.set_yticks(range(len(class_names)), class_names, parse_math=False)
    figure.colorbar(picture)
    _save(figure, path)


def bar_chart(results: Sequence[dict[str, Any]], path: str) -> None:
    """Draw results of `metrics.evaluation.evaluate`: one panel per metric, one bar per set, intervals as whiskers."""
    names = short_names(results)
    shown = [m for m in results[0]["metrics"] if any(result["metrics"][m] is not None for result in results)]
    columns = min(5, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(2.6 * columns, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, metric in zip(axes.flat, shown, strict=False):
        for i, result in enumerate(results):
            value, low_high = result["metrics"][metric], result["intervals"].get(metric)
            if value is not None:
                whiskers = low_high and [[max(value - low_high[0], 0)], [max(low_high[1] - value, 0)]]
                axis.bar(i, value, yerr=whiskers, capsize=3, color=f"C{i % 10}")
        axis.set(title=metric)
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize="small", parse_math=False)
        axis.grid(axis="y", alpha=0.3)
    _save(figure, path)


def metric_curve(numbers: Sequence[float], values: Sequence[float], unit: str, metric: str, path: str) -> None:
    """Plot a metric of the snapshots of a run against the `numbers` in their names, which count `unit`."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.plot(numbers, values, marker="o")
    axis.set(xlabel=unit, ylabel=metric)
    axis.grid(alpha=0.3)
    _save(figure, path)
