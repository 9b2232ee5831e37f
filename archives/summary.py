"""What `dataset_tool.py` says about the archive that it wrote."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

import numpy as np

import dnnlib
from archives.classes import describe_empty, name_class
from archives.listing import some

__all__ = ["Summary", "describe"]

WIDTH, INDENT = 100, " " * 13
SHOWN = 100  # classes of which the images are counted on the screen


@dataclass
class Summary:
    """What was written."""

    path: str  # of the archive
    images: int  # in the archive
    left_out: int  # images that the transform left out
    damaged: int  # images that were left out because they are damaged
    skipped_list: str | None  # the CSV that lists these
    oblong: int  # images that are not square in the source
    enlarged: int  # images that the transform has enlarged
    classes: int  # 0 without labels
    counts: np.ndarray | None  # int64 [classes], images per class; None where images have no classes
    class_names: list[str] | None  # of the classes; None: they are numbers
    shape: tuple[int, ...]  # [H, W, C] of every image
    noise: bool  # whether label noise is on record, of a known rate or not
    realized_rate: float | None  # share of labels that differ from the clean ones; None when unknown
    truth: str | None  # what the clean labels are, in words
    outliers: int | None  # images on record as outliers; None without a record
    label_file: str | None = None  # says which labels people found right, where they were asked
    notes: list[str] = field(default_factory=list)  # what a person should know beside this


def describe(summary: Summary) -> str:
    """Return what was written as a few lines of text."""
    height, width, depth = summary.shape
    rate = "unknown" if summary.noise else "none added"
    if summary.realized_rate is not None:
        rate = f"{summary.realized_rate:.2%} of the labels are wrong, by the {summary.truth}"
    lines = [
        f"Images:      {summary.images:,}" + (f" ({summary.left_out:,} too small)" if summary.left_out else ""),
        f"Classes:     {summary.classes or 'no labels'}" + describe_classes(summary.counts, summary.class_names),
        f"Resolution:  {width}x{height}, {'gray' if depth == 1 else 'RGB'}",
    ]
    if summary.damaged:
        lines.append(f"Damaged:     {summary.damaged:,} more, left out, see {summary.skipped_list}")
    if summary.outliers is not None:
        lines.append(f"Outliers:    {summary.outliers:,} of the images")
    lines.append(f"Label noise: {rate}")
    lines.append(f"Written to:  {summary.path}" + (f", {summary.label_file}" if summary.label_file else ""))
    return "\n".join(lines)


def describe_classes(counts: np.ndarray | None, names: list[str] | None) -> str:
    """Return lines with the images per class, and with the classes that have none, each behind a line break."""
    if counts is None:
        return ""
    lines = [some([f"{name_class(c, names)} ({count:,})" for c, count in enumerate(counts.tolist())], shown=SHOWN)]
    empty = describe_empty(counts, names)
    lines += [] if empty is None else [f"{empty} (--compact_labels leaves them out)"]
    return "".join("\n" + textwrap.fill(dnnlib.one_line(line), WIDTH, initial_indent=INDENT, subsequent_indent=INDENT,
                                        break_long_words=False, break_on_hyphens=False) for line in lines)  # fmt: skip
