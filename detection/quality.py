"""What a detector found: the label file that follows from a posterior, its noise rates, its quality, its picture."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch

from archives.dataset import ImageDataset
from archives.label_file import LabelFile, class_noise_rates
from archives.label_noise import row_stochastic
from archives.listing import some
from archives.posterior import compress
from detection.bayes import Judgment, judge
from sampling.grid import CELL, save_grid
from torch_utils import distributed
from training.transition_estimate import transition_table

__all__ = [
    "ROWS",
    "confusion",
    "describe",
    "disbelieved",
    "label_file",
    "quality",
    "save_picture",
    "whole_label_file",
]

Rule = Callable[[np.ndarray, np.ndarray], Judgment]  # log-posterior [N,C] and labels [N] -> judgment

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


def whole_label_file(dataset: ImageDataset, own: torch.Tensor, rule: Rule = judge) -> LabelFile:
    """Return the label file that follows from a clean log-posterior, of which each process gives its share of the rows.

    `rule`: `judge` or `judge_seen`. Collective. Rank 0 alone holds the whole posterior, and all get the label file.
    """
    log_probs = distributed.rows_to_rank0(own, len(dataset))
    return distributed.from_rank0(lambda: label_file(dataset, rule(log_probs.numpy(), dataset.labels)))


def label_file(dataset: ImageDataset, judged: Judgment) -> LabelFile:
    """Return the label file that follows from a judgment.

    A label `is_clean` unless it is wrong with a probability above one half. For a wrong label, the most probable other
    class is suggested.
    """
    observed, rows = dataset.labels, np.arange(len(dataset))
    score = judged.posterior[rows, observed]
    is_clean = score >= 0.5
    suggested, wrong = observed.copy(), np.flatnonzero(~is_clean)
    for part in np.split(wrong, range(ROWS, len(wrong), ROWS)):
        others = judged.posterior[part]
        others[np.arange(len(part)), observed[part]] = -1
        suggested[part] = others.argmax(axis=1)
    return LabelFile(
        dataset.file_names,
        observed,
        is_clean,
        np.clip(score, 0, 1).astype(np.float32),
        suggested,
        judged.rate,
        class_noise_rates(observed, score, dataset.label_dim),
        source_names=dataset.source_names,
        transition=judged.transition,
        noise_interval=judged.interval,
        suggested_score=judged.posterior[rows, suggested],
        posterior=compress(judged.posterior, observed),
        looks_like=judged.confusion,
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


def disbelieved(found: LabelFile) -> list[int]:
    """Return the classes whose labels are all believed wrong."""
    return np.setdiff1d(found.labels, found.labels[found.is_clean]).tolist()


def describe(dataset: ImageDataset, found: LabelFile) -> str:
    """Return a text with the noise rates and the estimated transition.

    Where the archive knows the clean labels, the text also holds the true rates and the quality of the detection.
    """
    names = dataset.shown_classes
    labels, truth, rates = dataset.labels, dataset.clean_labels, found.per_class_noise_rate

    right = np.ones(len(labels), dtype=bool) if truth is None else labels == truth

    def in_truth(rate: float) -> str:
        return "" if truth is None else f" (in truth {rate:.1%})"

    interval = "" if found.noise_interval is None else "{:.1%} to {:.1%}".format(*found.noise_interval)
    known = "" if truth is None else f"in truth {np.mean(~right):.1%}"
    notes = "; ".join(filter(None, [interval, known]))
    lines = [
        f"Noise rate:  about {found.noise_rate:.1%} of {len(labels):,} labels are wrong"
        + (f" ({notes})" if notes else ""),
        f"Flagged:     {np.sum(~found.is_clean):,} labels ({np.mean(~found.is_clean):.1%}), each probably wrong",
    ]
    if truth is not None:
        q = quality(found.is_clean, labels, truth)
        lines.append(
            f"Detection:   precision {q['precision']:.4f}, recall {q['recall']:.4f}, F1 {q['f1']:.4f} "
            "(positive: wrong label)"
        )
        lines.append(f"Truth:       {dataset.truth}")
    counts, true_rates = np.bincount(labels, minlength=len(names)), class_noise_rates(labels, right, len(names))
    chosen = range(len(names)) if len(names) <= TABLE else np.argsort(-rates, kind="stable")[:TABLE]
    lines.append("Labeled as:" if len(names) <= TABLE else f"Labeled as (the {TABLE} with the most wrong labels):")
    lines += [
        f"  {names[c]:<16.16} {counts[c]:>8,} images, {rates[c]:6.1%} wrong" + in_truth(true_rates[c]) for c in chosen
    ]
    if emptied := disbelieved(found):
        lines.append(
            f"Warning: all images labeled {some([names[c] for c in emptied])} are believed wrong; without them "
            f"{'this class' if len(emptied) == 1 else 'these classes'} may have no image left. "
            "Look at the picture, or train longer"
        )
    if found.transition is not None:
        lines += transition_table(found.transition, names)
    return "\n".join(lines)


def save_picture(path: str, dataset: ImageDataset, found: LabelFile) -> None:
    """Write a PNG of the images whose labels are most surely wrong, with 'observed > suggested' below each and the file
    that it came from where that is known."""
    names = dataset.shown_classes
    wrong = np.flatnonzero(~found.is_clean)
    worst = wrong[np.argsort(found.score[wrong], kind="stable")][:PICTURE]
    captions = [f"{names[found.labels[i]]} > {names[found.suggested[i]]}" for i in worst]
    if max(map(len, captions)) > CAPTION:
        captions = [text.replace(" > ", "\n> ") for text in captions]
    if (origins := dataset.source_names) is not None:  # so that a person finds the files
        room = CAPTION * max(1, dataset.image_shape[2] // CELL)
        captions = [f"{text}\n{_short_name(origins[i], room)}" for text, i in zip(captions, worst, strict=True)]
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    save_grid(dataset.images(worst).permute(0, 2, 3, 1).numpy(), path, captions=captions)


def _short_name(path: str, room: int) -> str:
    """Return the end of a file's name, without folders and ending, in at most `room` letters that the font has."""
    name = os.path.splitext(path.rsplit("/", 1)[-1])[0].encode("latin-1", "replace").decode("latin-1")
    return name if len(name) <= room else f"..{name[-room + 2 :]}"
