"""The table and the plot of a sweep over weights of guidance: label accuracy against FD."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

import dnnlib
from reports import page, plots
from reports.comparison import Method

__all__ = ["draw_tradeoff", "write_tradeoff"]

COLUMNS = ["mode", "weight", "label accuracy", "FD", "FD / unguided"]
Results = Mapping[str, Mapping[str, float]]  # 'mode-weight' -> `label_accuracy` and `fid`


def write_tradeoff(outdir: str, settings: Sequence[tuple[str, float]], results: Results, note: str = "") -> list[str]:
    """Write `sweep.md` and `sweep.png` into a folder, and return the lines of the former.

    `settings` lists (mode, weight), weight 0 for no guidance. `note`: what the reader must know about these numbers.
    """
    rows = []
    base, curves = _curves(settings, results)
    for mode, weight in settings:
        found = results[f"{mode}-{weight:g}"]
        accuracy, fid = found["label_accuracy"], found["fid"]
        rows.append([mode, f"{weight:g}", f"{accuracy:.3f}", f"{fid:.4g}", f"{fid / base[0]:.2f}"])
    lines = page.markdown_table(COLUMNS, rows)
    if note:
        lines += ["", note]
    if verdict := _verdict(curves, base):
        lines += ["", verdict]
    with dnnlib.atomic_open(os.path.join(outdir, "sweep.md"), "wt") as f:
        f.write("\n".join(lines) + "\n")
    plots.tradeoff(curves, base, os.path.join(outdir, "sweep.png"))
    return lines


def draw_tradeoff(sweep: str, path: str, oracle: Method) -> tuple[str, str]:
    """Draw the plot of the finished `sweep` (sweep.json) to `path`, with the oracle's label accuracy as a line.

    Return `path`, and which kind of weight is better in one sentence, "" where only one was tried.
    """
    with open(sweep) as f:
        results = json.load(f)["results"]
    settings = [(mode, float(weight)) for mode, _, weight in (name.rpartition("-") for name in results)]
    base, curves = _curves(settings, results)
    plots.tradeoff(curves, base, path, oracle.result["metrics"]["label_accuracy"])
    return path, _verdict(curves, base)


def _curves(
    settings: Sequence[tuple[str, float]], results: Results
) -> tuple[tuple[float, float], dict[str, plots.Curve]]:
    """Return (FD, label accuracy) without guidance, and the points of each mode."""
    base, curves = results["unguided-0"], {}
    for mode, weight in settings:
        if weight:
            found = results[f"{mode}-{weight:g}"]
            curves.setdefault(mode, []).append((weight, found["fid"], found["label_accuracy"]))
    return (base["fid"], base["label_accuracy"]), curves


def _verdict(curves: Mapping[str, plots.Curve], base: tuple[float, float]) -> str:
    if not {"calibrated", "constant"} <= curves.keys():
        return ""
    return plots.compare_tradeoffs(curves, base, "calibrated", "constant")
