"""What `dataset_tool.py` says about the archive that it wrote."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Summary", "describe"]


@dataclass
class Summary:
    """What was written."""

    path: str  # of the archive
    images: int  # in the archive
    left_out: int  # images that the transform left out
    classes: int  # 0 without labels
    shape: tuple[int, ...]  # [H, W, C] of every image
    realized_rate: float | None  # share of labels that differ from the clean ones; None when unknown
    outliers: int | None  # images on record as outliers; None without a record


def describe(summary: Summary) -> str:
    """Return what was written as a few lines of text."""
    height, width, depth = summary.shape
    rate = summary.realized_rate
    lines = [
        f"Images:      {summary.images:,}" + (f" ({summary.left_out:,} too small)" if summary.left_out else ""),
        f"Classes:     {summary.classes or 'no labels'}",
        f"Resolution:  {width}x{height}, {'gray' if depth == 1 else 'RGB'}",
    ]
    if summary.outliers is not None:
        lines.append(f"Outliers:    {summary.outliers:,} of the images")
    lines.append("Label noise: " + ("unknown" if rate is None else f"{rate:.2%} of the labels are wrong"))
    lines.append(f"Written to:  {summary.path}")
    return "\n".join(lines)
