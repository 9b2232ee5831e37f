"""The plot of a metric over the snapshots of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence

from matplotlib.figure import Figure

import dnnlib

__all__ = ["metric_curve"]


def metric_curve(numbers: Sequence[float], values: Sequence[float], unit: str, metric: str, path: str) -> None:
    """Plot a metric of the snapshots of a run against the `numbers` in their names, which count `unit`."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.plot(numbers, values, marker="o")
    axis.set(xlabel=unit, ylabel=metric)
    axis.grid(alpha=0.3)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with dnnlib.atomic_open(path) as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
