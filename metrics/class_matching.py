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
    """Images whose classes have the numbers and names of another set. All else is as in the set `source`.

    `numbers` [C] are those numbers by class; None: the numbers stay. `how` says in words how the classes were matched.
    """

    def __init__(self, source: ImageSource, others: Sequence[str], numbers: np.ndarray | None, how: str):
        self._source, self.class_matching = source, how
        self.labels, self.clean_labels = source.labels, source.clean_labels
        self.label_dim, self.class_names = source.label_dim, list(others)
        if numbers is not None:
            self.labels, self.clean_labels = (
                None if labels is None else numbers[labels] for labels in (source.labels, source.clean_labels)
            )
            new = [name for name, number in zip(source.class_names, numbers, strict=True) if number >= len(others)]
            self.class_names = [*others, *new]
            self.label_dim = len(self.class_names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def onehot(self, indices: Any) -> torch.Tensor:
        """Return one-hot labels float32 [B,label_dim]."""
        return torch.nn.functional.one_hot(torch.from_numpy(self.labels[indices]), self.label_dim).float()


def describe_match(names: Sequence[str] | None, others: Sequence[str] | None) -> str | None:
    """Say in words how the classes `names` are matched with `others`; None if nobody can wonder about it."""
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
    return f"by name; the reference has no {shown}" if lacking else "by name"


def match_classes(source: ImageSource, reference: ImageSource) -> ImageSource:
    """Return the images with classes numbered as in `reference`, by name if both sets have names."""
    how = describe_match(source.class_names, reference.class_names)
    if source.labels is None or how is None:
        return source
    return MatchedImages(source, reference.class_names, match_names(source.class_names, reference.class_names), how)
