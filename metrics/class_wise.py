"""Class-wise metrics: a metric of each class's real and generated images, averaged over classes (TDSM paper)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from metrics.memo import Memo

__all__ = ["ClassWise", "class_wise"]


@dataclass(frozen=True)
class ClassWise:
    """Result of `class_wise`: the means, which published tables show, and the values of each class."""

    mean: dict[str, Any]  # metric -> mean over the classes that have a value; empty if no class has one
    per_class: dict[int, dict[str, Any]]  # class -> metric -> value
    missing: list[int]  # classes with too few images on one side; they are not in the mean


def class_wise(
    metric: Callable[..., dict[str, Any]],
    real: Any | None,
    fake: Any,
    real_labels: Any | None,
    fake_labels: Any,
    minimum: int,
    num_classes: int = 0,
    counts: np.ndarray | None = None,
    memo: Memo | None = None,
) -> ClassWise:
    """Return the metrics of each class, and their means over the classes with equal weights.

    `metric(real, fake)` receives the features of one class and returns name -> value. A value may be an array. `real`
    is [N,d], `fake` [M,d], their labels are integers [N] and [M]. The classes are 0 to `num_classes` - 1 and all that
    occur. A class with fewer than `minimum` images on one side has no value and is listed as missing. With `counts`
    [B,M], the metric receives the columns of its class as a third argument. With `memo`, which belongs to `real`, it
    receives the memo of its class as the argument `memo`. If `real` is None, the metric is one of generated images
    alone and receives only those; `real_labels`, if there are any, then say which classes there are.
    """
    fake_labels = np.asarray(fake_labels)
    real_labels = fake_labels[:0] if real_labels is None else np.asarray(real_labels)
    per_class, missing = {}, []
    for c in sorted({*range(num_classes), *real_labels.tolist(), *fake_labels.tolist()}):
        of_real, of_fake = np.flatnonzero(real_labels == c), np.flatnonzero(fake_labels == c)
        if (len(of_fake) if real is None else min(len(of_real), len(of_fake))) < minimum:
            missing.append(c)
        else:
            sets = (fake[of_fake],) if real is None else (real[of_real], fake[of_fake])
            more = () if counts is None else (counts[:, of_fake],)
            known = {} if memo is None else dict(memo=memo.of(c))
            per_class[c] = metric(*sets, *more, **known)
    names = next(iter(per_class.values()), {})
    mean = {name: np.mean([values[name] for values in per_class.values()], axis=0) for name in names}
    return ClassWise(mean, per_class, missing)
