"""What a detector found: the label file that follows from a posterior, its noise rates, its quality, its picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from archives.dataset import ImageDataset
from archives.label_file import LabelFile, class_noise_rates
from archives.label_noise import row_stochastic
from sampling.grid import save_grid
from torch_utils import distributed

__all__ = [
    "ROWS",
    "confusion",
    "describe",
    "from_rank0",
    "label_file",
    "quality",
    "save_picture",
    "whole_label_file",
]

ROWS = 4096  # of a table [N,C] that are copied at a time
TABLE = 20  # tables of up to so many classes are printed in full
PICTURE = 64  # images in the picture
CAPTION = 9  # letters that fit below a small image


def confusion(classes: np.ndarray, dataset: ImageDataset) -> np.ndarray:
    """Return the share of the images of each class that are observed as each label, float64 [C,C].

    When `classes` int64 [N] are the classes that the images probably have, this estimates the transition T.
    """
    c = dataset.label_dim
    return row_stochastic(np.bincount(classes * c + dataset.labels, minlength=c * c).reshape(c, c))


def whole_label_file(dataset: ImageDataset, own: torch.Tensor) -> LabelFile:
    """Return the label file that follows from a clean posterior, of which each process gives its share of the rows.

    Collective. Rank 0 alone holds the whole posterior, and all get the label file.
    """
    posterior = distributed.rows_to_rank0(own, len(dataset))
    return from_rank0(lambda: label_file(dataset, posterior.numpy()))


def from_rank0(make: Callable[[], LabelFile]) -> LabelFile:
    """Return the label file that `make` makes on rank 0, on every process. Collective."""
    first = distributed.get_rank() == 0
    return distributed.broadcast_object(distributed.together(lambda: make() if first else None))


def label_file(
    dataset: ImageDataset,
    posterior: np.ndarray,
    is_clean: np.ndarray | None = None,
    transition: np.ndarray | None = None,
) -> LabelFile:
    """Return the label file that follows from a clean posterior [N,C].

    By default a label `is_clean` when no class is more probable, and `transition` is the `confusion` of suggested
    and observed labels. That estimate is too close to the identity when the detector misses wrong labels.
    """
    observed = dataset.labels
    score = posterior[np.arange(len(dataset)), observed]
    if is_clean is None:
        is_clean = score >= posterior.max(axis=1)
    suggested, wrong = observed.copy(), np.flatnonzero(~is_clean)
    for rows in np.split(wrong, range(ROWS, len(wrong), ROWS)):
        others = posterior[rows]
        others[np.arange(len(rows)), observed[rows]] = -1
        suggested[rows] = others.argmax(axis=1)
    if transition is None:
        transition = confusion(suggested, dataset)
    return LabelFile(
        dataset.file_names,
        observed,
        is_clean,
        np.clip(score, 0, 1).astype(np.float32),
        suggested,
        float(np.mean(~is_clean)),
        class_noise_rates(observed, is_clean, dataset.label_dim),
        transition,
    )


def quality(is_clean: np.ndarray, labels: np.ndarray, clean_labels: np.ndarray) -> dict[str, float]:
    """Return precision, recall and F1 of the detection against the truth, where a wrong label counts as positive.

    A score whose denominator is 0 is 0.
    """
    found, wrong = ~is_clean, labels != clean_labels
    hits = float((found & wrong).sum())
    return dict(
        precision=hits / max(found.sum(), 1),
        recall=hits / max(wrong.sum(), 1),
        f1=2 * hits / max(found.sum() + wrong.sum(), 1),
    )


def _class_names(dataset: ImageDataset) -> list[str]:
    return dataset.class_names or [str(i) for i in range(dataset.label_dim)]


def describe(dataset: ImageDataset, found: LabelFile) -> str:
    """Return a text with the noise rates and the estimated transition.

    Where the archive knows the clean labels, the text also holds the true rates and the quality of the detection.
    """
    names = _class_names(dataset)
    labels, truth, rates = dataset.labels, dataset.clean_labels, found.per_class_noise_rate

    right = np.ones(len(labels), dtype=bool) if truth is None else labels == truth

    def in_truth(rate: float) -> str:
        return "" if truth is None else f" (in truth {rate:.1%})"

    lines = [
        f"Noise rate:  {found.noise_rate:.1%} of {len(labels):,} labels are believed wrong" + in_truth(np.mean(~right))
    ]
    if truth is not None:
        q = quality(found.is_clean, labels, truth)
        lines.append(
            f"Detection:   precision {q['precision']:.4f}, recall {q['recall']:.4f}, F1 {q['f1']:.4f} "
            "(positive: wrong label)"
        )
    counts, true_rates = np.bincount(labels, minlength=len(names)), class_noise_rates(labels, right, len(names))
    chosen = range(len(names)) if len(names) <= TABLE else np.argsort(-rates, kind="stable")[:TABLE]
    lines.append("Labeled as:" if len(names) <= TABLE else f"Labeled as (the {TABLE} with the most wrong labels):")
    lines += [
        f"  {names[c]:<16.16} {counts[c]:>8,} images, {rates[c]:6.1%} wrong" + in_truth(true_rates[c]) for c in chosen
    ]
    emptied = [names[c] for c in np.flatnonzero((counts > 0) & (rates == 1))]
    if emptied:
        shown = ", ".join(emptied[:5]) + (" ..." if len(emptied) > 5 else "")
        lines.append(
            f"Warning: all images labeled {shown} are believed wrong; without them this class may have no image left. "
            "Look at the picture, or train longer"
        )
    if len(names) <= TABLE and found.transition is not None:
        lines += [
            "Estimated transition, %: one row per class that images probably show, one column per label",
            " " * 18 + " ".join(f"{name:>5.5}" for name in names),
        ]
        lines += [
            f"  {name:<16.16}" + " ".join(f"{100 * p:5.1f}" for p in row)
            for name, row in zip(names, found.transition, strict=True)
        ]
    return "\n".join(lines)


def save_picture(path: str, dataset: ImageDataset, found: LabelFile) -> None:
    """Write a PNG of the images whose labels are most surely wrong, with 'observed > suggested' below each."""
    names = _class_names(dataset)
    wrong = np.flatnonzero(~found.is_clean)
    worst = wrong[np.argsort(found.score[wrong], kind="stable")][:PICTURE]
    captions = [f"{names[found.labels[i]]} > {names[found.suggested[i]]}" for i in worst]
    if max(map(len, captions)) > CAPTION:
        captions = [text.replace(" > ", "\n> ") for text in captions]
    save_grid(dataset.images(worst).permute(0, 2, 3, 1).numpy(), path, captions=captions)
