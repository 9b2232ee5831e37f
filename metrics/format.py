"""Results of `metrics.evaluation.evaluate` as text and as JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

import dnnlib

__all__ = [
    "direction",
    "format_comparison",
    "format_curve",
    "format_paths",
    "format_table",
    "save_json",
    "short",
    "short_names",
]

HIGHER = {"is", "precision", "recall", "density", "coverage", "label_accuracy", "cas"}  # better when higher
LOWER = {"fid", "sfid", "kid", "mifid", "outlier_ratio", "ppl_full", "ppl_end"}  # better when lower
ARROWS = {1: " ↑", -1: " ↓", 0: ""}
LEGEND = "↑ better when higher, ↓ better when lower"
UNRANKED = "may be wrong, so these metrics reward images that repeat the mistakes; do not rank by them"


def format_table(result: dict[str, Any]) -> str:
    """Return one result as text: what was compared, one line per metric, then the notes."""
    lines = [f"images     {result['images']}: {result['num_images']}", *_conditions([result])]
    if "cas" in result:
        lines.append(
            f"cas        {result['cas']['arch']} trained on {result['cas']['num_generated']} images to "
            f"{short(result['cas']['accuracy_on_generated'])}, tested on {result['cas']['num_test']}"
        )
    rows = [
        [_headed(metric, [result]), short(value), _interval(result, metric)]
        for metric, value in result["metrics"].items()
    ]
    return "\n".join([*lines, "", *_columns(rows), "", LEGEND, *_notes([result])])


def format_comparison(results: Sequence[dict[str, Any]]) -> str:
    """Return several results on one reference as text: one line per metric, one column per set, then the notes.

    A star marks the best value of a line, and all that look like it in three digits.
    """
    names = short_names(results)
    rows = [["", *names], ["num_images", *(str(result["num_images"]) for result in results)]]
    for metric in results[0]["metrics"]:
        best = _best(results, metric)
        cells = []
        for result in results:
            value = short(result["metrics"][metric])
            cells.append(f"{value}{'*' if value == best else ''} {_interval(result, metric)}".rstrip())
        rows.append([_headed(metric, results), *cells])
    legend = LEGEND + "; * the best of a line"
    return "\n".join([*_conditions(results), "", *_columns(rows), "", legend, *_notes(results, names)])


def format_curve(result: dict[str, Any]) -> str:
    """Return the result of a sweep as text: one line per snapshot, with a star at the best value."""
    metric, curve = result["metric"], result["curve"]
    tables = [dict(metrics={metric: point["value"]}, unranked=() if result["ranked"] else (metric,)) for point in curve]
    best = _best(tables, metric)
    rows = [[result["unit"], _headed(metric, tables)]]
    for point in curve:
        value = short(point["value"])
        rows.append([f"{point['number']:g}", value + ("*" if value == best else "")])
    notes = [*dict.fromkeys(note for point in curve for note in point.get("notes", ()))]
    if not result["ranked"]:
        notes.append(f"The reference labels {UNRANKED}: {metric}")
    return "\n".join([*_columns(rows), "", LEGEND + "; * the best", *notes])


def format_paths(result: dict[str, Any]) -> str:
    """Return the result of `fid.py ppl` as text."""
    rows = [[metric + ARROWS[direction(metric)], short(value)] for metric, value in result["metrics"].items()]
    return "\n".join(
        [f"{result['num']} steps of {result['epsilon']:g}, distances by {result['detector']}", *_columns(rows), LEGEND]
    )


def direction(metric: str) -> int:
    """Return 1 for a metric that is better when higher, -1 when lower, 0 if neither.

    The class-wise inception score is neither: it grows with the diversity of a class, and with wrong images in it.
    """
    name = re.sub(r"_k\d+$", "", metric.removeprefix("cw_"))
    return 0 if metric == "cw_is" else (name in HIGHER) - (name in LOWER)


def short(value: float | None) -> str:
    """Return a number in three significant digits, or whole from 100 on; 'n/a' for None."""
    if value is None:
        return "n/a"
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _headed(metric: str, results: Sequence[dict[str, Any]]) -> str:
    """Return a metric's name with the arrow of its direction, none where values are not to be ranked."""
    return metric + ("" if metric in _unranked(results) else ARROWS[direction(metric)])


def _unranked(results: Sequence[dict[str, Any]]) -> dict[str, None]:
    return dict.fromkeys(metric for result in results for metric in result["unranked"])


def _best(results: Sequence[dict[str, Any]], metric: str) -> str | None:
    values = [value for result in results if (value := result["metrics"][metric]) is not None]
    sign = direction(metric)
    if len(values) < 2 or not sign or metric in _unranked(results):
        return None
    return short(sign * max(sign * value for value in values))


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _notes(results: Sequence[dict[str, Any]], names: Sequence[str] = ("",)) -> list[str]:
    """Return each note once, with the metrics and the sets that it is about."""
    about: dict[tuple[str, bool], dict[str, list[str]]] = {}
    for name, result in zip(names, results, strict=True):
        for metric, note in result["notes"].items():
            about.setdefault((note, result["metrics"][metric] is None), {}).setdefault(metric, []).append(name)
    lines = []
    for (note, missing), metrics in about.items():
        groups: dict[tuple[str, ...], list[str]] = {}
        for metric, sets in metrics.items():
            groups.setdefault(tuple(sets), []).append(metric)
        for sets, of_sets in groups.items():
            where = "" if len(sets) == len(results) else f" of {', '.join(sets)}"
            lines.append(f"{', '.join(of_sets)}{where}: {'n/a, ' if missing else ''}{note}")
    return lines


def short_names(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return a name for each set of images: the last part of its path if these differ, else the whole path."""
    last = [os.path.splitext(os.path.basename(os.path.normpath(result["images"])))[0] for result in results]
    return last if len(set(last)) == len(last) else [result["images"] for result in results]


def save_json(result: Any, path: str) -> None:
    """Write one result or a list of them as JSON. Make its folder. The file appears only when it is complete."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with dnnlib.atomic_open(path, "w") as file:
        text = json.dumps(result, indent=2, allow_nan=False) + "\n"
        # Whole numbers, of which a list has one per image, share a line. No text of JSON holds the end of a line.
        lists = r"\[\n\s*(-?\d+(?:,\n\s*-?\d+)*)\n\s*\]"
        file.write(re.sub(lists, lambda match: f"[{' '.join(match[1].split())}]", text))


def _interval(result: dict[str, Any], metric: str) -> str:
    low_high = result["intervals"].get(metric)
    return f"[{short(low_high[0])}, {short(low_high[1])}]" if low_high else ""


def _conditions(results: Sequence[dict[str, Any]]) -> list[str]:
    result = results[0]
    left_out = f", {result['reference_outliers']} outliers left out" if result["reference_outliers"] else ""
    subset = f", {result['reference_subset']} for KID and neighbors" if result["reference_subset"] else ""
    lines = [
        f"reference  {result['data']}: {result['num_reference']}, {result['reference_labels'] or 'no labels'}"
        f"{left_out}{subset}",
        f"detector   {result['detector']}: {result['num_features']} features"
        f"{', computed in bf16' if result['precision'] == 'bf16' else ''}",
    ]
    if result["protocol"]:
        lines.append(f"protocol   {result['protocol']}")
    for matching in dict.fromkeys(r["class_matching"] for r in results if r["class_matching"]):
        lines.append(f"classes    matched {matching}")
    if unranked := _unranked(results):
        lines.append(f"labels     {UNRANKED}: {', '.join(unranked)}")
    judge, bootstrap, outliers = result["judge"], result["bootstrap"], result["outliers"]
    if judge is not None:
        lines.append(f"judge      {judge['name']}: accuracy {short(judge['accuracy'])} on {judge['num']} {judge['on']}")
    if outliers is not None:
        lines.append(
            f"outliers   {outliers['data']}: share {short(outliers['training_share'])}, {outliers['name']}: "
            f"accuracy {short(outliers['accuracy'])} on {outliers['num']} {outliers['on']}"
        )
    if bootstrap is not None:
        lines.append(f"intervals  {bootstrap['level']:.0%} of {bootstrap['draws']} bootstrap draws: {bootstrap['of']}")
    return lines
