"""Class-wise metrics: a metric on each class's real and generated images, their unweighted mean (TDSM paper)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["ClassWise", "class_wise"]


@dataclass(frozen=True)
class ClassWise:
    """Result of `class_wise`: the means that published tables show, and what they are made of."""

    mean: dict[str, Any]  # metric -> mean over the classes that have a value; empty when none has
    per_class: dict[int, dict[str, Any]]  # class -> metric -> value
    missing: list[int]  # classes with too few images on either side, not in the mean


def class_wise(
    metric: Callable[..., dict[str, Any]],
    real: Any,
    fake: Any,
    real_labels: Any,
    fake_labels: Any,
    minimum: int,
    num_classes: int = 0,
    counts: np.ndarray | None = None,
) -> ClassWise:
    """`metric(real of a class, fake of the class) -> {name: value}` for each class and the unweighted means.

    `real` [N,d], `fake` [M,d], labels [N] and [M] integers. A class with fewer than `minimum` images on either side has
    no value and is listed. Classes are those that occur and 0 to `num_classes` - 1. With `counts` [B,M], the metric's
    third argument is the class's part of them. Values may be arrays of any one shape.
    """
    real_labels, fake_labels = np.asarray(real_labels), np.asarray(fake_labels)
    per_class, missing = {}, []
    for c in sorted({*range(num_classes), *real_labels.tolist(), *fake_labels.tolist()}):
        of_real, of_fake = np.flatnonzero(real_labels == c), np.flatnonzero(fake_labels == c)
        if min(len(of_real), len(of_fake)) < minimum:
            missing.append(c)
        else:
            per_class[c] = metric(real[of_real], fake[of_fake], *(() if counts is None else (counts[:, of_fake],)))
    names = next(iter(per_class.values()), {})
    mean = {name: np.mean([values[name] for values in per_class.values()], axis=0) for name in names}
    return ClassWise(mean, per_class, missing)
