"""The table: every metric of one set of generated images against one reference, as numbers, as text and as JSON."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import torch

import dnnlib
from metrics.class_wise import ClassWise, class_wise
from metrics.features import (
    ClassifierDetector,
    Detector,
    Features,
    compute_features,
    describe_shape,
    detector,
    open_images,
)
from metrics.frechet import fid_from_features
from metrics.inception_score import inception_score
from metrics.judge import SvmJudge, label_accuracy
from metrics.kernel import kid_from_features
from metrics.neighbours import prdc
from metrics.outliers import add_outliers, clean_part, open_record
from torch_utils import distributed

__all__ = ["evaluate", "evaluate_features", "format_table", "save_json"]


def evaluate(images: str, data: str, detector_name: str, *, device: torch.device | str, num: int | None = None,
             batch: int = 64, seed: int = 0, nearest_k: int = 5, judge: str = "svm",
             outlier_data: str | None = None) -> dict[str, Any]:
    """All metrics of the images at `images` (folder, ZIP, `.npz`) against the archive `data`, less recorded outliers.

    The reference's classes are its clean labels where it has them. `outlier_data`: an archive with outliers on record
    (None: `data`, if it has them) to learn the outlier ratio from. `num` of the images (None: all), chosen by `seed`;
    `judge`: 'svm', 'none' or a classifier snapshot. Every process must call it; all but rank 0 get {}.
    Returns what `evaluate_features` does, and `images`, `data`, `detector`, `reference_labels`, `reference_outliers`
    (how many were left out), and what `add_outliers` adds.
    Raises UserError for images, archives and snapshots that cannot be used or do not fit each other.
    """
    fake_images, real_images = open_images(images, num, seed), open_images(data, option="--data")
    if fake_images.image_shape != real_images.image_shape:
        raise dnnlib.UserError(f"--images: {images} has {describe_shape(fake_images.image_shape)} images, "
                               f"--data: {data} has {describe_shape(real_images.image_shape)}")
    extractor = detector(detector_name, device)
    clean = real_images.clean_labels is not None
    real_labels = real_images.clean_labels if clean else real_images.labels
    record = open_record(outlier_data, real_images)
    network = None
    if judge not in ("svm", "none"):
        network = _judge_network(judge, extractor, device, real_labels, data)
    real = compute_features(real_images, extractor, batch, device, network, "reference images")
    fake = compute_features(fake_images, extractor, batch, device, network, "generated images")
    known = real
    if record not in (None, real_images):
        known = compute_features(record, extractor, batch, device, None, "images with outliers")
    if distributed.get_rank() != 0:
        return {}
    left_out = 0
    if real_images.outliers is not None:
        real, left_out = clean_part(real, real_images.outliers), int(real_images.outliers.sum())
        real_labels = None if real_labels is None else real_labels[~real_images.outliers]
    result = evaluate_features(real, fake, real_labels, fake_images.labels, nearest_k=nearest_k,
                               class_names=real_images.class_names, svm=judge == "svm", device=device)
    if result["judge"] is not None:
        result["judge"]["name"] = network.name if network else f"SVM on {extractor.name} features"
    add_outliers(result, record, known, fake, extractor.name)
    source = None if real_labels is None else "clean labels" if clean else "labels as they are, it has no clean ones"
    return dict(images=images, data=data, detector=extractor.name, reference_labels=source, reference_outliers=left_out,
                **result)


def _judge_network(name: str, extractor: Detector, device: torch.device | str, labels: np.ndarray | None,
                   data: str) -> ClassifierDetector:
    network = detector(name, device, option="--judge")
    if not isinstance(network, ClassifierDetector):
        raise dnnlib.UserError(f"--judge: {name!r} cannot judge; choose 'svm', 'none' or a classifier snapshot")
    if labels is not None and labels.max() >= network.label_dim:
        raise dnnlib.UserError(f"--judge: {network.name} knows {network.label_dim} classes, "
                               f"the labels of {data} go up to {labels.max()}")
    return network


def evaluate_features(real: Features, fake: Features, real_labels: np.ndarray | None, fake_labels: np.ndarray | None, *,
                      nearest_k: int = 5, class_names: list[str] | None = None, svm: bool = True,
                      device: torch.device | str = "cpu") -> dict[str, Any]:
    """All metrics from features and labels (None: without labels, no class-wise ones).

    Returns `metrics` {name: value, None when it cannot be had}, `notes` {name: why not, or which classes are not in the
    mean}, `classes` {class: {"name", "num_reference", "num_images", metric: value}}, `judge` (None or its `accuracy`
    on `num` images, `on` which), `num_images`, `num_reference`, `num_features`, `nearest_k`.
    """
    # Distances gain most from a GPU; features stay where they are on everything else.
    move = (lambda x: x.to(device)) if torch.device(device).type == "cuda" else (lambda x: x)
    table = _Table(real_labels, fake_labels, class_names)
    x, y = real.features, fake.features
    fast_x, fast_y = move(x), move(y)
    table.add(["fid"], lambda a, b: dict(fid=fid_from_features(a, b)), x, y, minimum=2)
    table.add(["kid"], lambda a, b: dict(kid=kid_from_features(a, b)), fast_x, fast_y, minimum=2)
    if fake.probs is None:
        table.set("is", None, "the detector gives no class probabilities")
    else:
        table.set("is", inception_score(fake.probs))
    names = [f"{name}_k{nearest_k}" for name in ("precision", "recall", "density", "coverage")]
    table.add(names, lambda a, b: {f"{name}_k{nearest_k}": value for name, value in prdc(a, b, nearest_k).items()},
              fast_x, fast_y, minimum=nearest_k + 1)
    judge = _judge(table, real, fake, real_labels, fake_labels, svm)
    whole_first = sorted(table.metrics, key=lambda name: (name == "label_accuracy", name.startswith("cw_")))
    return dict(num_images=len(y), num_reference=len(x), num_features=x.shape[1], nearest_k=nearest_k,
                metrics={name: table.metrics[name] for name in whole_first}, notes=table.notes,
                classes=table.classes, judge=judge)


class _Table:
    """Collects values, the class-wise ones beside the whole ones, and the reasons why some are missing."""

    def __init__(self, real_labels: np.ndarray | None, fake_labels: np.ndarray | None, class_names: list[str] | None):
        self.metrics: dict[str, float | None] = {}
        self.notes: dict[str, str] = {}
        self.classes: dict[str, dict[str, Any]] = {}
        self._real_labels, self._fake_labels = real_labels, fake_labels
        self.without_labels = ("the reference has no labels" if real_labels is None else
                               "the images have no labels" if fake_labels is None else None)
        if self.without_labels is None:
            self._num_classes = len(class_names or ())
            for c in sorted({*range(self._num_classes), *real_labels.tolist(), *fake_labels.tolist()}):
                name = class_names[c] if class_names and c < len(class_names) else str(c)
                self.classes[str(c)] = dict(name=name, num_reference=int((real_labels == c).sum()),
                                            num_images=int((fake_labels == c).sum()))

    def set(self, name: str, value: float | None, note: str | None = None) -> None:
        self.metrics[name] = value
        if note:
            self.notes[name] = note

    def add(self, names: list[str], metric: Any, real: torch.Tensor, fake: torch.Tensor, minimum: int) -> None:
        """`metric` of the whole sets and of each class; sets with fewer than `minimum` images have no value."""
        enough = min(len(real), len(fake)) >= minimum
        values = metric(real, fake) if enough else {}
        for name in names:
            self.set(name, values.get(name), None if enough else f"needs {minimum} images a side")
        if self.without_labels:
            for name in names:
                self.set(f"cw_{name}", None, self.without_labels)
            return
        found = class_wise(metric, real, fake, self._real_labels, self._fake_labels, minimum, self._num_classes)
        for name in names:
            self.set(f"cw_{name}", found.mean.get(name), self._missing(found, minimum))
        for c, values in found.per_class.items():
            self.classes[str(c)].update(values)

    def _missing(self, found: ClassWise, minimum: int) -> str | None:
        if not found.missing:
            return None
        return (f"mean of {len(found.per_class)} of {len(self.classes)} classes; fewer than {minimum} images a side: "
                f"{', '.join(self.classes[str(c)]['name'] for c in found.missing)}")


def _judge(table: _Table, real: Features, fake: Features, real_labels: np.ndarray | None,
           fake_labels: np.ndarray | None, svm: bool) -> dict[str, Any] | None:
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
    table.set("label_accuracy", label_accuracy(judged, fake_labels))
    for c, values in table.classes.items():
        if values["num_images"]:
            of_class = fake_labels == int(c)
            values["label_accuracy"] = label_accuracy(judged[of_class], fake_labels[of_class])
    return dict(accuracy=accuracy, num=num, on=on)


def format_table(result: dict[str, Any]) -> str:
    """The result of `evaluate` as text: what was compared, then one line a metric."""
    labels = result["reference_labels"] or "no labels"
    left_out = f", {result['reference_outliers']} outliers left out" if result["reference_outliers"] else ""
    lines = [f"images     {result['images']}: {result['num_images']}",
             f"reference  {result['data']}: {result['num_reference']}, {labels}{left_out}",
             f"detector   {result['detector']}: {result['num_features']} features"]
    judge = result["judge"]
    if judge is not None:
        lines.append(f"judge      {judge['name']}: accuracy {judge['accuracy']:.4f} on {judge['num']} {judge['on']}")
    outliers = result["outliers"]
    if outliers is not None:
        lines.append(f"outliers   {outliers['data']}: share {outliers['training_share']:.4f}, {outliers['name']}: "
                     f"accuracy {outliers['accuracy']:.4f} on {outliers['num']} {outliers['on']}")
    lines.append("")
    width = max(map(len, result["metrics"]))
    for name, value in result["metrics"].items():
        shown = "n/a" if value is None else f"{value:.6g}"
        lines.append(f"{name:<{width}}  {shown:<12}  {result['notes'].get(name, '')}".rstrip())
    return "\n".join(lines)


def save_json(result: dict[str, Any], path: str) -> None:
    """Write a result as JSON, making its folder; the file appears only when it is complete."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with dnnlib.atomic_open(path, "w") as file:
        json.dump(result, file, indent=2, allow_nan=False)
        file.write("\n")
