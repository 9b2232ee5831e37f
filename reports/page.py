"""The comparison report: one self-contained HTML page and its Markdown twin, with the pictures beside them."""

from __future__ import annotations

import base64
import html
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np

from metrics.table import short_names
from torch_utils.checkpoint import atomic_open

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend is chosen first: no display is needed)

__all__ = ["Picture", "Report", "above", "bar_chart", "loss_curves", "markdown_table", "tradeoff", "transition_heatmap"]


@dataclass
class Picture:
    """A PNG of the report: its path, what it shows, and the width on the page in pixels."""

    path: str
    title: str
    text: str = ""
    width: int = 720


@dataclass
class Section:
    """One question and its answer, in this order: title, question, table, notes, pictures."""

    title: str
    question: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    pictures: Sequence[Picture] = ()


@dataclass
class Report:
    """The page: its sections, then the commands; the first section's title is the page's."""

    sections: Sequence[Section]
    commands: Sequence[str] = ()

    def write(self, directory: str) -> tuple[str, str]:
        """Write `report.html` (images inlined) and `report.md` (images by relative path); returns both paths."""
        paths = os.path.join(directory, "report.html"), os.path.join(directory, "report.md")
        for path, text in zip(paths, (self._html(), self._markdown(directory)), strict=True):
            with atomic_open(path, "wt") as f:
                f.write(text)
        return paths

    def _markdown(self, directory: str) -> str:
        lines = []
        for s in self.sections:
            lines += [f"# {s.title}", "", s.question, "", *markdown_table(s.columns, s.rows), ""]
            lines += [f"* {note}" for note in s.notes]
            for p in s.pictures:
                path = os.path.relpath(p.path, directory)
                lines += ["", f"## {p.title}", "", *([p.text, ""] if p.text else []), f"![{p.title}]({path})"]
            lines.append("")
        lines += ["## Commands", "", "```", *self.commands, "```", ""]
        return "\n".join(lines)

    def _html(self) -> str:
        e = html.escape
        commands = "\n".join(e(c) for c in self.commands)
        return (
            f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{e(self.sections[0].title)}</title>"
            f"<style>{STYLE}</style></head><body>{''.join(map(_html_section, self.sections))}"
            f"<h2>Commands</h2><pre>{commands}</pre></body></html>\n"
        )


def _html_section(section: Section) -> str:
    e = html.escape
    head = "".join(f"<th>{e(c)}</th>" for c in section.columns)
    body = "".join("<tr>" + "".join(f"<td>{e(c)}</td>" for c in row) + "</tr>" for row in section.rows)
    notes = "".join(f"<li>{e(n)}</li>" for n in section.notes)
    pictures = "".join(
        f"<h2>{e(p.title)}</h2><p>{e(p.text)}</p><img alt='{e(p.title)}' style='width:{p.width}px' "
        f"src='data:image/png;base64,{_inline(p.path)}'>"
        for p in section.pictures
    )
    return (
        f"<h1>{e(section.title)}</h1><p>{e(section.question)}</p><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table><ul>{notes}</ul>{pictures}"
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}th,td{padding:.3rem .8rem;border-bottom:1px solid #ccc;text-align:right}
th:first-child,td:first-child{text-align:left}img{max-width:100%;image-rendering:pixelated}
pre{background:#f4f4f4;padding:1rem;overflow-x:auto;font-size:13px}"""


def _inline(path: str) -> str:
    with open(path, "rb") as f:
        return base64.b64encode(f.read()).decode()


def _save(figure, path: str) -> None:
    with atomic_open(path) as f:
        figure.savefig(f, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)


def loss_curves(runs: dict[str, str], path: str, statistic: str = "Loss/loss") -> None:
    """Plot a statistic of `stats.jsonl` against kimg, one panel a run. `runs`: title -> run directory."""
    figure, axes = plt.subplots(1, len(runs), figsize=(4 * len(runs), 3), squeeze=False, layout="constrained")
    for axis, (title, run_dir) in zip(axes[0], runs.items(), strict=True):
        with open(os.path.join(run_dir, "stats.jsonl")) as f:
            rows = [json.loads(line) for line in f]
        rows = [r for r in rows if statistic in r]
        axis.plot([r["Progress/kimg"]["mean"] for r in rows], [r[statistic]["mean"] for r in rows])
        axis.set(title=title, xlabel="kimg", ylabel="loss" if axis is axes[0, 0] else None)
        axis.grid(alpha=0.3)
    _save(figure, path)


def above(
    curves: dict[str, list[tuple[float, float, float]]], unguided: tuple[float, float], first: str, second: str
) -> str:
    """In one sentence: at equal FD, where is the label accuracy of `first` above that of `second`? (see `tradeoff`)"""
    lines = []
    for name in (first, second):
        points = np.array(sorted([unguided, *((fd, accuracy) for _, fd, accuracy in curves[name])]))
        # The best accuracy to be had at no more than this FD: a curve may turn back.
        lines.append((points[:, 0], np.maximum.accumulate(points[:, 1])))
    low, high = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    if not high > low:
        return f"At equal FD {first} and {second} cannot be compared: they have none in common."
    grid = np.linspace(low, high, 201)[1:]
    better = np.interp(grid, *lines[0]) >= np.interp(grid, *lines[1])
    where = f"FD {low:.3g} to {high:.3g}"
    if better.all():
        return f"At equal FD the label accuracy of {first} is above that of {second} over the whole range, {where}."
    return (
        f"At equal FD the label accuracy of {first} is above that of {second} on {better.mean():.0%} of the range "
        f"{where}; below it between FD {grid[~better].min():.3g} and {grid[~better].max():.3g}."
    )


def tradeoff(curves: dict[str, list[tuple[float, float, float]]], unguided: tuple[float, float], path: str) -> None:
    """Plot label accuracy against FD, a line a mode. `curves`: mode -> (weight, FD, label accuracy); `unguided`: FD,
    label accuracy without guidance, where every line begins."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for mode, points in curves.items():
        fd, accuracy = zip(unguided, *((fd, accuracy) for _, fd, accuracy in points), strict=True)
        axis.plot(fd, accuracy, marker="o", label=mode)
        for weight, x, y in points:
            axis.annotate(f"{weight:g}", (x, y), textcoords="offset points", xytext=(5, -10), fontsize=8)
    axis.plot(*unguided, marker="s", color="black", linestyle="none", label="unguided")
    axis.set(xlabel="FD (lower is better)", ylabel="label accuracy")
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)


def transition_heatmap(transition: np.ndarray, path: str, class_names: Sequence[str]) -> None:
    """Draw T [C,C]: rows the clean, columns the observed label."""
    transition = np.asarray(transition)
    figure, axis = plt.subplots(figsize=(4, 3.4))
    picture = axis.imshow(transition, vmin=0, vmax=1, cmap="viridis")
    axis.set(xlabel="observed label", ylabel="clean label")
    axis.set_xticks(range(len(class_names)), class_names)
    axis.set_yticks(range(len(class_names)), class_names)
    figure.colorbar(picture)
    _save(figure, path)


def bar_chart(results: Sequence[dict[str, Any]], path: str) -> None:
    """Draw tables of `metrics.table.evaluate`: one panel a metric, one bar a set of images, intervals as whiskers."""
    names = short_names(results)
    shown = [m for m in results[0]["metrics"] if any(result["metrics"][m] is not None for result in results)]
    columns = min(5, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.4 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, metric in zip(axes.flat, shown, strict=False):
        values = [result["metrics"][metric] for result in results]
        for i, (value, result) in enumerate(zip(values, results, strict=True)):
            if value is not None:
                low, high = result["intervals"].get(metric, (value, value))
                whiskers = [[max(value - low, 0)], [max(high - value, 0)]] if metric in result["intervals"] else None
                axis.bar(i, value, yerr=whiskers, capsize=3, color=f"C{i % 10}")
        axis.set(title=metric)
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize="small")
        axis.grid(axis="y", alpha=0.3)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    _save(figure, path)
