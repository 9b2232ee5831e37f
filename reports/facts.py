"""What is known about a set of labeled images: how many, how noisy, what is foreign or double, and what to do."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from archives.dataset import ImageDataset
from archives.label_file import LabelFile
from detection.duplicates import count_groups

__all__ = ["Advice", "Confusable", "Facts", "gather_facts", "summarize"]

SHOWN = 5  # names in a line
WIDTH = 120  # letters
TINY = 10  # a class with fewer images is tiny, and so is one with less than a tenth of the median class


@dataclass
class Advice:
    """One way to go on: a row of the decision table."""

    method: str
    does: str  # what it does
    when: str  # when it is the right choice
    cost: str  # in time or images
    command: str  # to copy; several lines are several commands
    recommended: bool = False


@dataclass
class Confusable:
    """Two classes that the detector cannot tell apart."""

    first: str  # name of a class
    second: str
    text: str  # how often, and what follows from it


@dataclass
class Facts:
    """What the page and the terminal say about a set of C classes."""

    path: str  # what the set is called
    images: int
    shape: tuple[int, int, int]  # channels, height, width
    class_names: list[str]  # [C]
    counts: np.ndarray  # [C] int64, images labeled as each class
    flagged: np.ndarray  # [C] int64, of them those whose label is believed wrong
    class_rates: np.ndarray  # [C] float, estimated share of wrong labels among them
    noise_rate: float  # estimated share of wrong labels
    interval: tuple[float, float] | None  # of the noise rate
    transition: np.ndarray | None  # [C,C], T[clean, observed]
    foreign: int | None  # images believed foreign; None where nobody looked
    duplicates: int | None  # groups of equal or nearly equal images; None where nobody looked
    contradictions: int | None  # those groups whose labels differ
    confusable: Sequence[Confusable] = ()
    advice: Sequence[Advice] = ()
    why: str = ""  # why the recommended row is recommended

    @property
    def empty(self) -> list[str]:
        """The names of the classes without images."""
        return [self.class_names[c] for c in np.flatnonzero(self.counts == 0)]

    @property
    def tiny(self) -> list[str]:
        """The names of the classes with very few images."""
        few = max(TINY, float(np.median(self.counts)) / 10)
        return [self.class_names[c] for c in np.flatnonzero((self.counts > 0) & (self.counts < few))]


def gather_facts(
    dataset: ImageDataset,
    found: LabelFile,
    confusable: Sequence[Confusable] = (),
    advice: Sequence[Advice] = (),
    why: str = "",
) -> Facts:
    """Return the facts about a set that follow from its label file, with the judgments of others."""
    classes = dataset.label_dim
    counts = np.bincount(found.labels, minlength=classes)
    groups = contradictions = None
    if found.duplicate_of is not None:
        groups, contradictions = count_groups(found.labels, found.duplicate_of)
    return Facts(
        path=dataset.path,
        images=len(found.labels),
        shape=dataset.image_shape,
        class_names=dataset.shown_classes,
        counts=counts,
        flagged=np.bincount(found.labels[~found.is_clean], minlength=classes),
        class_rates=found.per_class_noise_rate,
        noise_rate=found.noise_rate,
        interval=found.noise_interval,
        transition=found.transition,
        foreign=None if found.is_outlier is None else int(found.is_outlier.sum()),
        duplicates=groups,
        contradictions=contradictions,
        confusable=confusable,
        advice=advice,
        why=why,
    )


def summarize(facts: Facts) -> str:
    """Return a short text for the terminal: what the set is, what is wrong with it, and the recommended commands."""
    channels, height, width = facts.shape
    interval = "" if facts.interval is None else f" (between {facts.interval[0]:.1%} and {facts.interval[1]:.1%})"
    low, high = facts.counts.min(), facts.counts.max()
    each = f"{low:,} images each" if low == high else f"{low:,} to {high:,} images"
    lines = [
        f"Set:         {facts.images:,} images of {width}x{height}, {'gray' if channels == 1 else 'RGB'}, "
        f"{len(facts.counts):,} classes of {each}",
        f"Labels:      about {facts.noise_rate:.1%} are wrong{interval}",
    ]
    worst = np.argsort(-facts.class_rates, kind="stable")[:SHOWN]
    worst = [f"{facts.class_names[c]} {facts.class_rates[c]:.0%}" for c in worst if facts.class_rates[c] > 0]
    if worst:
        lines.append(f"Worst:       {', '.join(worst)}")
    for title, names in (("Empty", facts.empty), ("Tiny", facts.tiny)):
        if names:
            shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            lines.append(f"{title + ' classes:':<12} {shown}")
    lines += [f"Alike:       {c.first} / {c.second}: {c.text}" for c in facts.confusable]
    for row in facts.advice:
        if row.recommended:
            lines += [f"Recommended: {row.method}", _wrapped("Cost:", row.cost), _wrapped("Why:", facts.why)]
            lines += [f"  {line}" for line in row.command.splitlines()]
    return "\n".join(lines)


def _wrapped(title: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=f"{title:<13}", subsequent_indent=" " * 13)
