"""The table: every metric of one set of generated images against one reference, as numbers, as text and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import dnnlib
from metrics.bootstrap import LEVEL, interval, resample
from metrics.cas import CAS_ARCHS, check_cas, classification_accuracy_score
from metrics.class_wise import ClassWise, class_wise
from metrics.detectors import ClassifierDetector, Detector, detector
from metrics.feature_cache import FeatureCache
from metrics.features import Features, compute_features
from metrics.fid import fid_from_features, fid_replicates
from metrics.images import ImageSource, describe_shape, open_images
from metrics.inception_score import IS_SPLIT, inception_score
from metrics.kid import kid_from_features, kid_replicates
from metrics.label_accuracy import SvmJudge, label_accuracy
from metrics.outliers import add_outliers, clean_part, open_record
from metrics.prdc import prdc, prdc_replicates
from torch_utils import distributed

__all__ = ["evaluate", "evaluate_features", "format_comparison", "format_table", "save_json", "short_names"]

BOOTSTRAP = "generated images drawn again with replacement, within each class where they have labels"


def evaluate(
    images: Sequence[str],
    data: str,
    detector_name: str,
    *,
    device: torch.device | str,
    precision: str = "fp32",
    num: int | None = None,
    batch: int = 64,
    seed: int = 0,
    nearest_k: int = 5,
    splits: int = IS_SPLIT,
    bootstrap: int | None = None,
    judge: str = "svm",
    features: str | None = None,
    test: str | None = None,
    cas_arch: str = CAS_ARCHS[0],
    outlier_data: str | None = None,
) -> list[dict[str, Any]]:
    """All metrics of each set of images (folder, ZIP, `.npz`) against the archive `data`, less the outliers it records.

    The reference's classes are its clean labels where it has them. `precision`: the detector's arithmetic; `num` of the
    images (None: all), chosen by `seed`;
    `splits`: images a split of the inception score; `bootstrap`: draws of the intervals, chosen by `seed`;
    `judge`: 'svm', 'none' or a classifier snapshot; `features`: file that keeps features for the next time; `test`:
    archive of real images that the classification accuracy score is measured on, of a classifier `cas_arch`;
    `outlier_data`: archive with outliers on record (None: `data`, if it has them) to learn the outlier ratio from.
    Every process must call it; all but rank 0 get []. Returns for each set what `evaluate_features` does, and
    `images`, `data`, `detector`, `precision`, `reference_labels`, `reference_outliers` (how many were left out), what
    `add_outliers` adds, with `test` also `cas`.
    Raises UserError for images, archives and snapshots that cannot be used or do not fit each other.
    """
    sources = [open_images(path, num, seed) for path in images]
    reference = open_images(data, option="--data")
    tested = None if test is None else open_images(test, option="--test")
    for source in sources:
        if source.image_shape != reference.image_shape:
            raise dnnlib.UserError(
                f"--images: {source.path} has {describe_shape(source.image_shape)} images, "
                f"--data: {data} has {describe_shape(reference.image_shape)}"
            )
        if tested is not None:
            check_cas(source, tested, cas_arch)
    extractor = distributed.together(lambda: detector(detector_name, device, precision=precision), rank0_first=True)
    clean = reference.clean_labels is not None
    real_labels = reference.clean_labels if clean else reference.labels
    record = open_record(outlier_data, reference)
    network = None
    if judge not in ("svm", "none"):
        network = _judge_network(judge, extractor, device, real_labels, data)
    cache = FeatureCache(features)

    def look(source: ImageSource, text: str, choice: Any = None) -> Features | None:
        return cache.get(
            source,
            extractor,
            network,
            choice,
            lambda: compute_features(source, extractor, batch, device, network, text),
        )

    # All features before any metric: the other processes are done then and need not wait for rank 0.
    real = look(reference, "reference images")
    fakes = [look(source, "generated images", None if num is None else seed) for source in sources]
    known = real if record in (None, reference) else look(record, "images with outliers")
    cache.save()
    if distributed.get_rank() != 0:
        return []
    left_out = 0
    if reference.outliers is not None:
        real, left_out = clean_part(real, reference.outliers), int(reference.outliers.sum())
        real_labels = None if real_labels is None else real_labels[~reference.outliers]
    named = None if real_labels is None else "clean labels" if clean else "labels as they are, it has no clean ones"
    results = []
    for source, fake in zip(sources, fakes, strict=True):
        result = evaluate_features(
            real,
            fake,
            real_labels,
            source.labels,
            nearest_k=nearest_k,
            splits=splits,
            bootstrap=bootstrap,
            seed=seed,
            class_names=reference.class_names,
            svm=judge == "svm",
            device=device,
        )
        if result["judge"] is not None:
            result["judge"]["name"] = network.name if network else f"SVM on {extractor.name} features"
        if tested is not None:
            result["cas"] = classification_accuracy_score(source, tested, cas_arch, device, seed)
            result["metrics"]["cas"] = result["cas"]["accuracy"]
        add_outliers(result, record, known, fake, extractor.name)
        results.append(
            dict(
                images=source.path,
                data=data,
                detector=extractor.name,
                precision=precision,
                reference_labels=named,
                reference_outliers=left_out,
                **result,
            )
        )
    return results


def _judge_network(
    name: str, extractor: Detector, device: torch.device | str, labels: np.ndarray | None, data: str
) -> ClassifierDetector:
    network = detector(name, device, option="--judge")
    if not isinstance(network, ClassifierDetector):
        raise dnnlib.UserError(f"--judge: {name!r} cannot judge; choose 'svm', 'none' or a classifier snapshot")
    if labels is not None and labels.max() >= network.label_dim:
        raise dnnlib.UserError(
            f"--judge: {network.name} knows {network.label_dim} classes, the labels of {data} go up to {labels.max()}"
        )
    return network


def evaluate_features(
    real: Features,
    fake: Features,
    real_labels: np.ndarray | None,
    fake_labels: np.ndarray | None,
    *,
    nearest_k: int = 5,
    splits: int = IS_SPLIT,
    bootstrap: int | None = None,
    seed: int = 0,
    class_names: list[str] | None = None,
    svm: bool = True,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """All metrics from features and labels (None: without labels, no class-wise ones).

    Returns `metrics` {name: value, None when it cannot be had}, `intervals` {name: [low, high]} and `bootstrap` (how
    they were made, or None), `notes` {name: why not, or which classes are not in the mean}, `classes` {class: {"name",
    "num_reference", "num_images", metric: value}}, `judge` (None or its `accuracy` on `num` images, `on` which),
    `num_images`, `num_reference`, `num_features`, `nearest_k`.
    """
    # Distances gain most from a GPU; features stay where they are on everything else.
    move = (lambda x: x.to(device)) if torch.device(device).type == "cuda" else (lambda x: x)
    x, y = real.features, fake.features
    counts = resample(bootstrap, len(y), fake_labels, seed) if bootstrap else None
    table = _Table(real_labels, fake_labels, class_names, counts)
    fast_x, fast_y = move(x), move(y)
    table.add(
        ["fid"],
        lambda a, b: dict(fid=fid_from_features(a, b)),
        lambda a, b, c: dict(fid=fid_replicates(a, b, c)),
        x,
        y,
        minimum=2,
    )
    table.add(
        ["kid"],
        lambda a, b: dict(kid=kid_from_features(a, b)),
        lambda a, b, c: dict(kid=kid_replicates(a, b, c)),
        fast_x,
        fast_y,
        minimum=2,
    )
    if fake.probs is None:
        table.set("is", None, "the detector gives no class probabilities")
    else:
        table.set("is", inception_score(fake.probs, splits))

    def named(values: dict[str, Any]) -> dict[str, Any]:
        return {f"{name}_k{nearest_k}": value for name, value in values.items()}

    table.add(
        [*named(dict.fromkeys(("precision", "recall", "density", "coverage")))],
        lambda a, b: named(prdc(a, b, nearest_k)),
        lambda a, b, c: named(prdc_replicates(a, b, nearest_k, c)),
        fast_x,
        fast_y,
        minimum=nearest_k + 1,
    )
    judge = _judge(table, real, fake, real_labels, fake_labels, svm)
    whole_first = sorted(table.metrics, key=lambda name: (name == "label_accuracy", name.startswith("cw_")))
    return dict(
        num_images=len(y),
        num_reference=len(x),
        num_features=x.shape[1],
        nearest_k=nearest_k,
        metrics={name: table.metrics[name] for name in whole_first},
        intervals=table.intervals,
        bootstrap=None if counts is None else dict(draws=bootstrap, level=LEVEL, seed=seed, of=BOOTSTRAP),
        notes=table.notes,
        classes=table.classes,
        judge=judge,
    )


class _Table:
    """Collects values, the class-wise ones beside the whole ones, and the reasons why some are missing."""

    def __init__(
        self,
        real_labels: np.ndarray | None,
        fake_labels: np.ndarray | None,
        class_names: list[str] | None,
        counts: np.ndarray | None,
    ):
        self.counts = counts
        self.metrics: dict[str, float | None] = {}
        self.intervals: dict[str, list[float]] = {}
        self.notes: dict[str, str] = {}
        self.classes: dict[str, dict[str, Any]] = {}
        self._real_labels, self._fake_labels = real_labels, fake_labels
        self.without_labels = (
            "the reference has no labels"
            if real_labels is None
            else "the images have no labels"
            if fake_labels is None
            else None
        )
        if self.without_labels is None:
            self._num_classes = len(class_names or ())
            for c in sorted({*range(self._num_classes), *real_labels.tolist(), *fake_labels.tolist()}):
                name = class_names[c] if class_names and c < len(class_names) else str(c)
                self.classes[str(c)] = dict(
                    name=name, num_reference=int((real_labels == c).sum()), num_images=int((fake_labels == c).sum())
                )

    def set(self, name: str, values: Any, note: str | None = None) -> None:
        """`values`: None, the value, or an array of it and its replicates."""
        value, replicates = (values, ()) if np.ndim(values) == 0 else (values[0], values[1:])
        self.metrics[name] = None if value is None else float(value)
        if len(replicates):
            self.intervals[name] = interval(self.metrics[name], replicates)
        if note:
            self.notes[name] = note

    def add(
        self,
        names: list[str],
        metric: Callable[..., dict[str, float]],
        replicates: Callable[..., dict[str, Any]],
        real: torch.Tensor,
        fake: torch.Tensor,
        minimum: int,
    ) -> None:
        """`metric` of the whole sets and of each class; sets with fewer than `minimum` images have no value.

        `replicates`: the same for the sets that a third argument, counts, describes.
        """

        def both(a: torch.Tensor, b: torch.Tensor, counts: np.ndarray | None = None) -> dict[str, Any]:
            values = metric(a, b)
            if counts is None:
                return values
            return {name: np.append(values[name], found) for name, found in replicates(a, b, counts).items()}

        enough = min(len(real), len(fake)) >= minimum
        values = both(real, fake, self.counts) if enough else {}
        for name in names:
            self.set(name, values.get(name), None if enough else f"needs {minimum} images a side")
        if self.without_labels:
            for name in names:
                self.set(f"cw_{name}", None, self.without_labels)
            return
        found = class_wise(
            both, real, fake, self._real_labels, self._fake_labels, minimum, self._num_classes, self.counts
        )
        for name in names:
            self.set(f"cw_{name}", found.mean.get(name), self._missing(found, minimum))
        for c, values in found.per_class.items():
            self.classes[str(c)].update({name: float(np.ravel(value)[0]) for name, value in values.items()})

    def _missing(self, found: ClassWise, minimum: int) -> str | None:
        if not found.missing:
            return None
        return (
            f"mean of {len(found.per_class)} of {len(self.classes)} classes; fewer than {minimum} images a side: "
            f"{', '.join(self.classes[str(c)]['name'] for c in found.missing)}"
        )


def _judge(
    table: _Table,
    real: Features,
    fake: Features,
    real_labels: np.ndarray | None,
    fake_labels: np.ndarray | None,
    svm: bool,
) -> dict[str, Any] | None:
    """Fills in `label_accuracy` and says how good the judge itself is."""

    def refuse(reason: str) -> None:
        table.set("label_accuracy", None, reason)

    if not svm and fake.judged is None:
        return refuse("no judge was asked for")
    if table.without_labels:
        return refuse(table.without_labels)
    if fake.judged is not None:
        judged, on = fake.judged, "reference images, which it may have been trained on"
        accuracy, num = label_accuracy(real.judged, real_labels), len(real_labels)
    else:
        try:
            machine = SvmJudge(real.features, real_labels)
        except ValueError as e:
            return refuse(str(e))
        judged, on = machine.predict(fake.features), "held-out reference images"
        accuracy, num = machine.accuracy, machine.held_out
    accuracy_of_images = label_accuracy(judged, fake_labels)
    if table.counts is not None:
        replicates = table.counts @ (judged == fake_labels).astype(np.int64) / len(judged)
        accuracy_of_images = np.append(accuracy_of_images, replicates)
    table.set("label_accuracy", accuracy_of_images)
    for c, values in table.classes.items():
        if values["num_images"]:
            of_class = fake_labels == int(c)
            values["label_accuracy"] = label_accuracy(judged[of_class], fake_labels[of_class])
    return dict(accuracy=accuracy, num=num, on=on)


def format_table(result: dict[str, Any]) -> str:
    """One result of `evaluate` as text: what was compared, then one line a metric."""
    lines = [f"images     {result['images']}: {result['num_images']}", *_conditions(result)]
    if "cas" in result:
        lines.append(
            "cas        {arch} trained on {num_generated} images to {accuracy_on_generated:.4f}, tested on "
            "{num_test}".format(**result["cas"])
        )
    lines.append("")
    width = max(map(len, result["metrics"]))
    for name, value in result["metrics"].items():
        shown = f"{_number(value):<12}"
        if result["intervals"]:
            low_high = result["intervals"].get(name)
            shown += f"  {'[{:.4g}, {:.4g}]'.format(*low_high) if low_high else '':<22}"
        lines.append(f"{name:<{width}}  {shown}  {result['notes'].get(name, '')}".rstrip())
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.6g}"


def _conditions(result: dict[str, Any]) -> list[str]:
    left_out = f", {result['reference_outliers']} outliers left out" if result["reference_outliers"] else ""
    lines = [
        f"reference  {result['data']}: {result['num_reference']}, {result['reference_labels'] or 'no labels'}"
        f"{left_out}",
        f"detector   {result['detector']}: {result['num_features']} features"
        f"{', computed in bf16' if result['precision'] == 'bf16' else ''}",
    ]
    judge, bootstrap, outliers = result["judge"], result["bootstrap"], result["outliers"]
    if judge is not None:
        lines.append(f"judge      {judge['name']}: accuracy {judge['accuracy']:.4f} on {judge['num']} {judge['on']}")
    if outliers is not None:
        lines.append(
            f"outliers   {outliers['data']}: share {outliers['training_share']:.4f}, {outliers['name']}: "
            f"accuracy {outliers['accuracy']:.4f} on {outliers['num']} {outliers['on']}"
        )
    if bootstrap is not None:
        lines.append(f"intervals  {bootstrap['level']:.0%} of {bootstrap['draws']} bootstrap draws: {bootstrap['of']}")
    return lines


def short_names(results: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each set of images: the last part of its path where that tells them apart, else the path."""
    last = [os.path.splitext(os.path.basename(os.path.normpath(result["images"])))[0] for result in results]
    return last if len(set(last)) == len(last) else [result["images"] for result in results]


def format_comparison(results: Sequence[dict[str, Any]]) -> str:
    """Results of `evaluate` on one reference as text: one line a metric, one column a set; notes at the end."""
    names = short_names(results)
    rows = [["", *names], ["num_images", *(str(result["num_images"]) for result in results)]]
    for metric in results[0]["metrics"]:
        row = [metric]
        for result in results:
            low_high = result["intervals"].get(metric)
            row.append(_number(result["metrics"][metric]) + (" [{:.4g}, {:.4g}]".format(*low_high) if low_high else ""))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [
        f"{name}, {metric}: {note}"
        for name, result in zip(names, results, strict=True)
        for metric, note in result["notes"].items()
    ]
    return "\n".join([*_conditions(results[0]), "", *lines, *([""] if notes else []), *notes])


def save_json(result: Any, path: str) -> None:
    """Write one result or a list of them as JSON, making its folder; the file appears only when it is complete."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with dnnlib.atomic_open(path, "w") as file:
        json.dump(result, file, indent=2, allow_nan=False)
        file.write("\n")
