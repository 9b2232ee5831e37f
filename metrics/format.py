"""Results of `metrics.evaluation.evaluate` as text and as JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

import dnnlib

__all__ = ["format_comparison", "format_table", "save_json", "short_names"]


def format_table(result: dict[str, Any]) -> str:
    """Return one result as text: what was compared, then one line per metric."""
    lines = [f"images     {result['images']}: {result['num_images']}", *_conditions(result)]
    if "cas" in result:
        lines.append(
            "cas        {arch} trained on {num_generated} images to {accuracy_on_generated:.4f}, tested on "
            "{num_test}".format(**result["cas"])
        )
    lines.append("")
    width = max(map(len, result["metrics"]))
    for name, value in result["metrics"].items():
        shown = f"{_number(value):<12}"
        if result["intervals"]:
            shown += f"  {_interval(result, name):<22}"
        lines.append(f"{name:<{width}}  {shown}  {result['notes'].get(name, '')}".rstrip())
    return "\n".join(lines)


def format_comparison(results: Sequence[dict[str, Any]]) -> str:
    """Return several results on one reference as text: one line per metric, one column per set, then the notes."""
    names = short_names(results)
    rows = [["", *names], ["num_images", *(str(result["num_images"]) for result in results)]]
    for metric in results[0]["metrics"]:
        rows.append([metric, *(f"{_number(r['metrics'][metric])} {_interval(r, metric)}".rstrip() for r in results)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [
        f"{name}, {metric}: {note}"
        for name, result in zip(names, results, strict=True)
        for metric, note in result["notes"].items()
    ]
    return "\n".join([*_conditions(results[0]), "", *lines, *([""] if notes else []), *notes])


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


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.6g}"


def _interval(result: dict[str, Any], metric: str) -> str:
    low_high = result["intervals"].get(metric)
    return "[{:.4g}, {:.4g}]".format(*low_high) if low_high else ""


def _conditions(result: dict[str, Any]) -> list[str]:
    left_out = f", {result['reference_outliers']} outliers left out" if result["reference_outliers"] else ""
    subset = f", {result['reference_subset']} for KID and neighbors" if result["reference_subset"] else ""
    lines = [
        f"reference  {result['data']}: {result['num_reference']}, {result['reference_labels'] or 'no labels'}"
        f"{left_out}{subset}",
        f"detector   {result['detector']}: {result['num_features']} features"
        f"{', computed in bf16' if result['precision'] == 'bf16' else ''}",
    ]
    judge, bootstrap, outliers = result["judge"], result["bootstrap"], result["outliers"]
    if judge is not None:
        lines.append(f"judge      {judge['name']}: accuracy {judge['accuracy']:.4f} on {judge['num']} {judge['on']}")
    if outliers is not None:
        lines.append(
            f"outliers   {outliers['data']}: share {outliers['training_share']:.4f}, {outliers['name']}: "
            f"accuracy {outliers['accuracy']:.4f} on {outliers['num']} {outliers['on']}"
        )
    if bootstrap is not None:
        lines.append(f"intervals  {bootstrap['level']:.0%} of {bootstrap['draws']} bootstrap draws: {bootstrap['of']}")
    return lines
