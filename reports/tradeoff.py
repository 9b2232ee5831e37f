"""The table and the plot of a sweep over weights of guidance: label accuracy against FD."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import dnnlib
from reports import page, plots

__all__ = ["write_tradeoff"]

COLUMNS = ["mode", "weight", "label accuracy", "FD", "FD / unguided"]


def write_tradeoff(
    outdir: str, settings: Sequence[tuple[str, float]], results: Mapping[str, Mapping[str, float]], note: str = ""
) -> list[str]:
    """Write `sweep.md` and `sweep.png` into a folder, and return the lines of the former.

    `settings` lists (mode, weight), weight 0 for no guidance. `results` maps 'mode-weight' to `label_accuracy` and
    `fid`. `note`: what the reader must know about these numbers.
    """
    rows, curves = [], {}
    base = results["unguided-0"]
    for mode, weight in settings:
        found = results[f"{mode}-{weight:g}"]
        accuracy, fid = found["label_accuracy"], found["fid"]
        rows.append([mode, f"{weight:g}", f"{accuracy:.3f}", f"{fid:.4g}", f"{fid / base['fid']:.2f}"])
        if weight:
            curves.setdefault(mode, []).append((weight, fid, accuracy))
    lines = page.markdown_table(COLUMNS, rows)
    if note:
        lines += ["", note]
    if {"calibrated", "constant"} <= curves.keys():
        lines += ["", plots.compare_tradeoffs(curves, (base["fid"], base["label_accuracy"]), "calibrated", "constant")]
    with dnnlib.atomic_open(os.path.join(outdir, "sweep.md"), "wt") as f:
        f.write("\n".join(lines) + "\n")
    plots.tradeoff(curves, (base["fid"], base["label_accuracy"]), os.path.join(outdir, "sweep.png"))
    return lines
