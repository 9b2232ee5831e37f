"""From features to the table: every metric of one set of generated images against one reference, as numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch

from archives.listing import some
from metrics.bootstrap import LEVEL, interval, resample
from metrics.class_wise import ClassWise, class_wise
from metrics.features import Features
from metrics.fid import fid_from_features
from metrics.inception_score import MIN_SPLIT, inception_score
from metrics.kid import kid_from_features
from metrics.label_accuracy import SvmJudge, label_accuracy
from metrics.memo import Memo
from metrics.mifid import mifid
from metrics.prdc import prdc
from metrics.settings import EvaluationSettings

__all__ = ["evaluate_features"]

RESAMPLED = "generated images drawn again with replacement, within each class where they have labels"


def evaluate_features(
    real: Features,
    fake: Features,
    real_labels: np.ndarray | None,
    fake_labels: np.ndarray | None,
    settings: EvaluationSettings,
    *,
    class_names: list[str] | None = None,
    device: torch.device | str = "cpu",
    memo: Memo | None = None,
    judge_labels: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return all metrics of features `fake` [M,d] against `real` [N,d], with labels [M] and [N].

    Without labels (None) on one of the sides there are no class-wise metrics and no label accuracy. The dictionary has
    the keys below. `memo` keeps what follows from `real`, its labels and the settings alone, for a call with others
    than `fake`. The judge learns, or is tried on, `judge_labels` [N] in place of `real_labels`, except where they are
    -1. `settings.metrics` names the metrics to compute; None: all that need no option of their own.

    num_images, num_reference, num_features, nearest_k
    reference_subset  how many reference images the pairs of KID and the neighbors come from; None: all
    metrics    name -> value, or None if there is none
    intervals  name -> [low, high]; empty without bootstrap
    bootstrap  how the intervals were made, or None
    notes      name -> why the value is missing, or which classes its mean leaves out
    classes    class -> {"name", "num_reference", "num_images", metric -> value}
    judge      None, or the judge's own `accuracy`, measured on `num` images; `on` says which, and `classes` holds both
               numbers of each class
    judged     None, or the class [M] that the judge sees in each generated image
    """
    # A GPU helps most with distances between features. Other devices gain little, so the features stay on the CPU.
    move = (lambda x: x.to(device)) if torch.device(device).type == "cuda" else (lambda x: x)
    x, y, k = real.features, fake.features, settings.nearest_k
    counts = resample(settings.bootstrap, len(y), fake_labels, settings.seed) if settings.bootstrap else None
    memo = memo or Memo()
    table = _Table(real_labels, fake_labels, class_names, counts, memo, settings.metrics)
    fast_x, fast_y = memo.get("moved", lambda: move(x)), move(y)
    # Time grows with the square of the reference. Those of single classes are small, so they stay whole.
    subset = settings.num_reference if (settings.num_reference or len(x)) < len(x) else None
    few_x = fast_x if subset is None else memo.get("subset", lambda: fast_x[_choose(len(x), subset, settings.seed)])
    table.add(
        ["fid"],
        # The covariances of all classes are too large to be kept.
        lambda *sets, memo: dict(fid=fid_from_features(*sets, memo=memo if memo is table.memo else None)),
        x,
        x,
        y,
        minimum=2,
    )
    if real.spatial is None or fake.spatial is None:
        table.refuse(["sfid", "cw_sfid"], "the detector gives no spatial features")
    else:
        spatial = memo.of("spatial")
        table.add(
            ["sfid"],
            lambda *sets, memo: dict(sfid=fid_from_features(*sets, memo=spatial if memo is table.memo else None)),
            real.spatial,
            real.spatial,
            fake.spatial,
            minimum=2,
        )
    if settings.mifid and table.wants("mifid"):
        fid = table.metrics["fid"] if "fid" in table.metrics else fid_from_features(x, y, memo=memo)
        table.set("mifid", mifid(fast_x, fast_y, fid))
    table.add(
        ["kid"], lambda *sets, memo: dict(kid=kid_from_features(*sets, memo=memo)), few_x, fast_x, fast_y, minimum=2
    )
    if fake.probs is None:
        table.refuse(["is", "cw_is"], "the detector gives no class probabilities")
    else:
        table.add_alone("is", lambda p: inception_score(p, settings.splits, settings.seed), fake.probs)
        if table.wants("is") and settings.splits < min(MIN_SPLIT, len(y)):
            splits = math.ceil(len(y) / settings.splits)
            meant = f"; size {splits:,} would make {settings.splits} splits" if splits >= MIN_SPLIT else ""
            note = f"mean over {splits:,} splits of size {settings.splits}, too small for this score{meant}"
            table.notes["is"] = note
    table.add(
        [f"{name}_k{k}" for name in ("precision", "recall", "density", "coverage")],
        lambda a, b, *counts, memo: {f"{name}_k{k}": v for name, v in prdc(a, b, k, *counts, memo=memo).items()},
        few_x,
        fast_x,
        fast_y,
        minimum=k + 1,
    )
    known = real_labels if judge_labels is None else judge_labels
    judge = None
    if table.wants("label_accuracy"):
        judge = _add_label_accuracy(table, real, fake, known, fake_labels, settings.judge == "svm")
    whole_first = sorted(table.metrics, key=lambda name: (name == "label_accuracy", name.startswith("cw_")))
    return dict(
        num_images=len(y),
        num_reference=len(x),
        reference_subset=subset,
        num_features=x.shape[1],
        nearest_k=k,
        metrics={name: table.metrics[name] for name in whole_first},
        intervals=table.intervals,
        bootstrap=None
        if counts is None
        else dict(draws=settings.bootstrap, level=LEVEL, seed=settings.seed, of=RESAMPLED),
        notes=table.notes,
        classes=table.classes,
        judge=judge,
        judged=table.judged,
    )


def _choose(count: int, chosen: int, seed: int) -> np.ndarray:
    """Return `chosen` of the numbers 0 .. count - 1, in order."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:chosen])


class _Table:
    """Collects the metrics of the whole sets and of each class, and the reasons why some are missing."""

    def __init__(
        self,
        real_labels: np.ndarray | None,
        fake_labels: np.ndarray | None,
        class_names: list[str] | None,
        counts: np.ndarray | None,
        memo: Memo,
        wanted: Collection[str] | None,
    ):
        self.counts, self.memo, self._wanted = counts, memo, wanted
        self.metrics: dict[str, float | None] = {}
        self.intervals: dict[str, list[float]] = {}
        self.notes: dict[str, str] = {}
        self.classes: dict[str, dict[str, Any]] = {}
        self.judged: list[int] | None = None
        self._real_labels, self._fake_labels = real_labels, fake_labels
        self._num_classes = len(class_names or ())
        self.without_labels = None
        if real_labels is None:
            self.without_labels = "the reference has no labels"
        elif fake_labels is None:
            self.without_labels = "the images have no labels"
        if fake_labels is None:
            return
        known = () if real_labels is None else real_labels.tolist()
        for c in sorted({*range(self._num_classes), *known, *fake_labels.tolist()}):
            name = class_names[c] if class_names and c < len(class_names) else str(c)
            num_reference = None if real_labels is None else int((real_labels == c).sum())
            self.classes[str(c)] = dict(
                name=name, num_reference=num_reference, num_images=int((fake_labels == c).sum())
            )

    def wants(self, name: str) -> bool:
        """Return whether a metric is asked for."""
        return self._wanted is None or name in self._wanted

    def refuse(self, names: list[str], reason: str) -> None:
        """Enter metrics that have no value."""
        for name in filter(self.wants, names):
            self.set(name, None, reason)

    def set(self, name: str, values: Any, note: str | None = None) -> None:
        """Enter a metric. `values` is None, a value, or an array of the value followed by its resampled values."""
        value, replicates = (values, ()) if np.ndim(values) == 0 else (values[0], values[1:])
        self.metrics[name] = None if value is None else float(value)
        if len(replicates):
            self.intervals[name] = interval(self.metrics[name], replicates)
        if note:
            self.notes[name] = note

    def add(
        self,
        names: list[str],
        metric: Callable[..., dict[str, Any]],
        whole: Any,
        real: Any,
        fake: Any,
        minimum: int,
    ) -> None:
        """Enter the metrics `names` of all images `fake` against `whole`, and of each class's against those of `real`.

        `metric(real, fake, memo=...)` returns name -> value, `metric(real, fake, counts, memo=...)` name -> values of
        the resampled sets. Sets with fewer than `minimum` images on one side have no value.
        """

        def values_of(a: Any, b: Any, counts: np.ndarray | None = None, *, memo: Memo) -> dict[str, Any]:
            values = metric(a, b, memo=memo)
            if counts is None:
                return values
            resampled = metric(a, b, counts, memo=memo)
            return {name: np.append(values[name], resampled[name]) for name in resampled}

        wanted = list(filter(self.wants, names))
        if wanted:
            enough = min(len(whole), len(fake)) >= minimum
            values = values_of(whole, fake, self.counts, memo=self.memo) if enough else {}
            for name in wanted:
                self.set(name, values.get(name), None if enough else f"needs {minimum} images on each side")
        if self.without_labels:
            self.refuse([f"cw_{name}" for name in names], self.without_labels)
        elif any(self.wants(f"cw_{name}") for name in names):
            self._add_classes(names, values_of, real, fake, minimum, self.counts, self.memo)

    def add_alone(self, name: str, metric: Callable[[Any], float], fake: Any) -> None:
        """Enter a metric of generated images alone: `metric(fake)` of all of them, and of those of each class."""
        if self.wants(name):
            self.set(name, metric(fake))
        if self._fake_labels is None:
            self.refuse([f"cw_{name}"], "the images have no labels")
        elif self.wants(f"cw_{name}"):
            self._add_classes([name], lambda images: {name: metric(images)}, None, fake, 1)

    def _add_classes(
        self,
        names: list[str],
        metric: Callable[..., dict[str, Any]],
        real: Any | None,
        fake: Any,
        minimum: int,
        counts: np.ndarray | None = None,
        memo: Memo | None = None,
    ) -> None:
        found = class_wise(
            metric, real, fake, self._real_labels, self._fake_labels, minimum, self._num_classes, counts, memo
        )
        side = "" if real is None else " on one side"
        for name in names:
            if self.wants(f"cw_{name}"):
                self.set(f"cw_{name}", found.mean.get(name), self._note_missing(found, minimum, side))
        for c, values in found.per_class.items():
            self.classes[str(c)].update({name: float(np.ravel(value)[0]) for name, value in values.items()})

    def _note_missing(self, found: ClassWise, minimum: int, side: str) -> str | None:
        if not found.missing:
            return None
        return (
            f"mean of {len(found.per_class)} of {len(self.classes)} classes; "
            f"fewer than {minimum} images{side}: "
            f"{', '.join(self.classes[str(c)]['name'] for c in found.missing)}"
        )


def _add_label_accuracy(
    table: _Table,
    real: Features,
    fake: Features,
    real_labels: np.ndarray | None,
    fake_labels: np.ndarray | None,
    svm: bool,
) -> dict[str, Any] | None:
    """Enter the label accuracy, and return how accurate the judge itself is (None if there is no judge).

    The judge is the classifier that has already judged the features, or else an SVM if `svm` asks for one. Where
    `real_labels` are -1, it neither learns nor is tried.
    """

    def refuse(reason: str) -> None:
        table.set("label_accuracy", None, reason)

    if not svm and fake.judged is None:
        return refuse("no judge was asked for")
    if table.without_labels:
        return refuse(table.without_labels)
    known = slice(None) if real_labels.min() >= 0 else real_labels >= 0
    real_labels, note = real_labels[known], None
    if fake.judged is not None:
        judged, on = fake.judged, "reference images, which it may have been trained on"
        tried = real.judged[known], real_labels
        accuracy = label_accuracy(*tried)
    else:
        try:
            machine = table.memo.get("svm", lambda: SvmJudge(real.features[known], real_labels))
        except ValueError as e:
            return refuse(str(e))
        judged, on = machine.predict(fake.features), "held-out reference images"
        accuracy, tried = machine.accuracy, machine.tried
        unknown = [table.classes[str(c)]["name"] for c in np.setdiff1d(fake_labels, machine.classes).tolist()]
        if unknown:
            note = f"the judge never saw these classes, so all their images count as wrong: {some(unknown)}"
    accuracy_of_images = label_accuracy(judged, fake_labels)
    if table.counts is not None:
        replicates = table.counts @ (judged == fake_labels).astype(np.int64) / len(judged)
        accuracy_of_images = np.append(accuracy_of_images, replicates)
    table.set("label_accuracy", accuracy_of_images, note)
    for c, values in table.classes.items():
        if values["num_images"]:
            of_class = fake_labels == int(c)
            values["label_accuracy"] = label_accuracy(judged[of_class], fake_labels[of_class])
    seen, right = tried
    classes = {
        str(c): dict(accuracy=label_accuracy(seen[right == c], right[right == c]), num=int((right == c).sum()))
        for c in np.unique(right).tolist()
    }
    table.judged = np.asarray(judged).tolist()
    return dict(accuracy=accuracy, num=len(right), on=on, classes=classes)
