"""Classes of two sets of images, matched by name: the same class may have another number in each set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from metrics.images import ImageSource

__all__ = ["MatchedImages", "describe_match", "match_classes", "match_names"]


def match_names(names: Sequence[str] | None, others: Sequence[str] | None) -> np.ndarray | None:
    """Return for each of the classes `names` its number among `others`, int64 [C].

    Names that `others` lack get numbers behind theirs. Return None where numbers are right as they are or all there
    is: one side has no names, both have the same ones, a name occurs twice, or no name occurs in both.
    """
    if not names or not others or list(names) == list(others):
        return None
    if len({*names}) < len(names) or len({*others}) < len(others) or not {*names} & {*others}:
        return None
    number = {name: i for i, name in enumerate(others)}
    for name in names:
        number.setdefault(name, len(number))
    return np.array([number[name] for name in names])


class MatchedImages:
    """Images whose classes have the numbers and the `names` of several sets. All else is as in the set `source`.

    `numbers` [C] are those numbers by class; None: the numbers stay. `how` says in words how the classes were matched.
    """

    _vectors = None  # label vectors have the numbers of the source: what reads batches takes `labels`

    def __init__(self, source: ImageSource, names: Sequence[str], numbers: np.ndarray | None, how: str):
        self._source, self.class_matching = source, how
        self.labels, self.clean_labels = source.labels, source.clean_labels
        self.label_dim, self.class_names = source.label_dim, list(names)
        if numbers is not None:
            self.labels, self.clean_labels = (
                None if labels is None else numbers[labels] for labels in (source.labels, source.clean_labels)
            )
            self.label_dim = len(self.class_names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def onehot(self, indices: Any) -> torch.Tensor:
        """Return one-hot labels float32 [B,label_dim]."""
        return torch.nn.functional.one_hot(torch.from_numpy(self.labels[indices]), self.label_dim).float()


def describe_match(
    names: Sequence[str] | None, others: Sequence[str] | None, whose: str = "the reference"
) -> str | None:
    """Say in words how the classes `names` are matched with `others`; None if nobody can wonder about it.

    `whose` says to which set the others belong.
    """
    if not names or not others or list(names) == list(others):
        return None
    numbers = match_names(names, others)
    if numbers is None:
        why = "a name occurs twice" if {*names} & {*others} else "no name occurs in both sets"
        return f"by number, since {why}: {names[0]!r} is taken for {others[0]!r}"
    lacking = [name for name in names if name not in {*others}]
    if not lacking and (numbers == np.arange(len(names))).all():  # the others are more
        return None
    shown = f"{', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else ''}"
    return f"by name; {whose} has no {shown}" if lacking else "by name"


def match_classes(
    sources: Sequence[ImageSource], reference: ImageSource, whose: str = "the reference"
) -> list[ImageSource]:
    """Return the sets with classes numbered as in `reference`, by name if both have names.

    A class that the reference lacks has the same number in all `sources`.
    """
    others, matched = reference.class_names, []
    known = {name: number for number, name in enumerate(others or [])}
    for source in sources:
        names, how = source.class_names, describe_match(source.class_names, others, whose)
        if source.labels is None or how is None:
            matched.append(source)
        elif match_names(names, others) is None:
            matched.append(MatchedImages(source, others, None, how))
        else:
            numbers = np.array([known.setdefault(name, len(known)) for name in names])
            matched.append(MatchedImages(source, list(known), numbers, how))
    return matched
