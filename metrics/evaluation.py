"""Evaluate sets of generated images: compute all features first, then the table of metrics for each set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import dnnlib
from metrics.cas import classification_accuracy_score
from metrics.detectors import ClassifierDetector, Detector, load_detector
from metrics.feature_cache import FeatureCache
from metrics.features import Features, compute_features
from metrics.images import ImageSource, best_labels
from metrics.memo import Memo
from metrics.outliers import add_outlier_ratio, select_clean
from metrics.settings import EvaluationSettings
from metrics.table import evaluate_features
from torch_utils import distributed

__all__ = ["Inputs", "evaluate", "load_judge"]


@dataclass(frozen=True)
class Inputs:
    """Everything that an evaluation reads, opened and checked. `metrics.options` makes it."""

    images: Sequence[ImageSource]  # sets of generated images
    reference: ImageSource  # real images
    detector: Detector  # turns images into features
    judge: ClassifierDetector | None  # classifier for label accuracy; None: an SVM, or no judge at all
    test: ImageSource | None  # real images that the classifier of CAS is tested on; None: no CAS
    outlier_record: ImageSource | None  # images of which some are recorded as outliers; None: no outlier ratio
    cache: FeatureCache  # keeps features for later calls
    judge_labels: np.ndarray | None = None  # [N] classes of the reference for the judge, -1: unknown; None: its labels


def load_judge(name: str, device: torch.device | str, reference: ImageSource) -> ClassifierDetector:
    """Return the classifier snapshot `name`, which judges labels.

    Raise UserError if it is no classifier, or if it knows fewer classes than the labels of `reference` have.
    """
    judge = load_detector(name, device)
    if not isinstance(judge, ClassifierDetector):
        raise dnnlib.UserError(f"{name!r} cannot judge labels; choose 'svm', 'none' or a classifier snapshot")
    labels = best_labels(reference)
    if labels is not None and labels.max() >= judge.label_dim:
        raise dnnlib.UserError(
            f"{judge.name} knows {judge.label_dim} classes, but the labels of {reference.path} go up to {labels.max()}"
        )
    return judge


def evaluate(inputs: Inputs, settings: EvaluationSettings, device: torch.device | str) -> list[dict[str, Any]]:
    """Return all metrics of each set of images against the reference, one dictionary per set.

    Images that the reference records as outliers are left out. The classes of the reference are its clean labels if it
    has them. Every process must call this function; all but rank 0 receive an empty list.

    Each dictionary holds what `evaluate_features` returns, and also: `images` and `data` (paths), `detector`,
    `precision`, `reference_labels` (which labels were used), `reference_outliers` (how many images were left out), what
    `add_outlier_ratio` adds, and `cas` if there is a test set. Raise UserError for images that cannot be used.
    """
    reference, record = inputs.reference, inputs.outlier_record

    def features_of(source: ImageSource, text: str, choice: int | None = None) -> Features | None:
        return inputs.cache.get(
            source,
            inputs.detector,
            inputs.judge,
            choice,
            lambda: compute_features(source, inputs.detector, settings.batch, device, inputs.judge, text),
        )

    # All features come before all metrics: after them, the other processes are done and need not wait for rank 0.
    real = features_of(reference, "reference images")
    choice = None if settings.num is None else settings.seed
    fakes = [features_of(source, "generated images", choice) for source in inputs.images]
    known = real if record in (None, reference) else features_of(record, "images with outliers")
    inputs.cache.save()
    if distributed.get_rank() != 0:
        return []
    real_labels, judge_labels, left_out = best_labels(reference), inputs.judge_labels, 0
    if reference.outliers is not None:
        real, left_out = select_clean(real, reference.outliers), int(reference.outliers.sum())
        real_labels, judge_labels = (
            None if labels is None else labels[~reference.outliers] for labels in (real_labels, judge_labels)
        )
    results, memo = [], Memo()
    for source, fake in zip(inputs.images, fakes, strict=True):
        result = evaluate_features(
            real,
            fake,
            real_labels,
            source.labels,
            settings,
            class_names=reference.class_names,
            device=device,
            memo=memo,
            judge_labels=judge_labels,
        )
        if result["judge"] is not None:
            result["judge"]["name"] = inputs.judge.name if inputs.judge else f"SVM on {inputs.detector.name} features"
        if inputs.test is not None:
            result["cas"] = classification_accuracy_score(
                source, inputs.test, settings.cas_arch, device, settings.seed, settings.cas_epochs
            )
            result["metrics"]["cas"] = result["cas"]["accuracy"]
        add_outlier_ratio(result, record, known, fake, inputs.detector.name, memo)
        about = dict(
            images=source.path,
            data=reference.path,
            detector=inputs.detector.name,
            precision=inputs.detector.precision,
            reference_labels=_describe_labels(reference),
            reference_outliers=left_out,
        )
        results.append(about | result)
    return results


def _describe_labels(reference: ImageSource) -> str | None:
    if reference.truth is not None:
        return reference.truth
    return None if reference.labels is None else "labels as they are, it has no clean ones"
