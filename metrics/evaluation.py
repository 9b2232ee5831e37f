"""Evaluate sets of generated images: compute all features first, then the table of metrics for each set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

import dnnlib
from archives.classes import name_class
from archives.listing import some
from metrics.cas import classification_accuracy_score
from metrics.class_matching import MatchedImages, describe_match, match_classes, match_names
from metrics.detectors import ClassifierDetector, Detector, load_detector
from metrics.feature_cache import FeatureCache
from metrics.features import Features, compute_features
from metrics.images import ImageSource, best_labels, labels_are_clean
from metrics.memo import Memo
from metrics.outliers import add_outlier_ratio, select_clean
from metrics.protocols import describe_protocol
from metrics.settings import EvaluationSettings
from metrics.table import evaluate_features
from torch_utils import distributed

__all__ = ["Comparison", "Inputs", "evaluate", "features_of", "load_judge"]


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

    Raise UserError if it is no classifier, or if it lacks a class that images of `reference` have.
    """
    judge = load_detector(name, device)
    if not isinstance(judge, ClassifierDetector):
        raise dnnlib.UserError(f"{name!r} cannot judge labels; choose 'svm', 'none' or a classifier snapshot")
    labels = best_labels(reference)
    if labels is not None:
        numbers = match_names(judge.class_names, reference.class_names)
        there = np.unique(labels if reference.outliers is None else labels[~reference.outliers])
        lacking = np.setdiff1d(there, np.arange(judge.label_dim) if numbers is None else numbers)
        if len(lacking):
            names = some((name_class(c, reference.class_names) for c in lacking.tolist()), len(lacking))
            raise dnnlib.UserError(
                f"{judge.name} knows {judge.label_dim} classes, but not all of {reference.path}; it lacks {names}"
            )
    return judge


def evaluate(inputs: Inputs, settings: EvaluationSettings, device: torch.device | str) -> list[dict[str, Any]]:
    """Return all metrics of each set of images against the reference, one dictionary per set.

    Images that the reference records as outliers are left out. The classes of the reference are its clean labels if it
    has them. Every process must call this function; all but rank 0 receive an empty list.

    The classes of each set have the numbers of the reference, by name if both have names (`match_classes`). Each
    dictionary holds what `Comparison` returns. Raise UserError for images that cannot be used.
    """
    reference, record = inputs.reference, inputs.outlier_record
    # All features come before all metrics: after them, the other processes are done and need not wait for rank 0.
    real = features_of(inputs, settings, device, reference, "reference images")
    choice = None if settings.num is None else f"{settings.seed}, as EDM draws"  # earlier files have another draw
    fakes = [features_of(inputs, settings, device, source, "generated images", choice) for source in inputs.images]
    known = real
    if record not in (None, reference):
        known = features_of(inputs, settings, device, record, "images with outliers")
    inputs.cache.save()
    if distributed.get_rank() != 0:
        return []
    compare = Comparison(inputs, settings, device, real, known)
    return [compare(source, fake) for source, fake in zip(inputs.images, fakes, strict=True)]


def features_of(
    inputs: Inputs,
    settings: EvaluationSettings,
    device: torch.device | str,
    source: ImageSource,
    text: str,
    choice: str | None = None,
) -> Features | None:
    """Return the features of a set of images, from the cache or computed; None on all processes but rank 0.

    `text` names the images in the progress bar; `choice` says how they were chosen. Every process must call this
    function. Raise UserError for images that cannot be used.
    """
    return inputs.cache.get(
        source,
        inputs.detector,
        inputs.judge,
        choice,
        lambda: compute_features(source, inputs.detector, settings.batch, device, inputs.judge, text),
    )


class Comparison:
    """Compares sets of generated images with the reference. What follows from the reference alone is computed once.

    `real` are the features of the whole reference, `known` those of the record of outliers.
    """

    def __init__(
        self,
        inputs: Inputs,
        settings: EvaluationSettings,
        device: torch.device | str,
        real: Features,
        known: Features | None = None,
    ):
        self._inputs, self._settings, self._device, self._known, self._memo = inputs, settings, device, known, Memo()
        reference = inputs.reference
        self._labels, self._judge_labels, self._left_out = best_labels(reference), inputs.judge_labels, 0
        if reference.outliers is not None:
            real, self._left_out = select_clean(real, reference.outliers), int(reference.outliers.sum())
            self._labels, self._judge_labels = (
                None if labels is None else labels[~reference.outliers] for labels in (self._labels, self._judge_labels)
            )
        self._real = self._renumber(real, reference.class_names)

    def _renumber(self, features: Features, names: Sequence[str] | None) -> Features:
        """Give the classes that the judge sees their numbers among `names`; -1: they are not among them."""
        judge = self._inputs.judge
        numbers = None if judge is None else match_names(judge.class_names, names)
        if numbers is None:
            return features
        return replace(features, judged=np.where(numbers < len(names), numbers, -1)[features.judged])

    def __call__(self, source: ImageSource, fake: Features) -> dict[str, Any]:
        """Return all metrics of the images `source` with features `fake`.

        The dictionary holds what `evaluate_features` returns, and also: `images` and `data` (paths), `detector`,
        `precision`, `reference_labels` (which labels were used), `reference_outliers` (how many images were left out),
        `class_matching` (how the classes of the sets were matched if their names differ, or None), `unranked` (metrics
        that reward repeating the mistakes of labels, since these are not known to be clean), `protocol` (what it
        chooses, or None), what `add_outlier_ratio` adds, and `cas` if there is a test set.
        """
        inputs, settings = self._inputs, self._settings
        reference = inputs.reference
        # Behind the reference's classes come those that only these images have.
        names = source.class_names if isinstance(source, MatchedImages) else reference.class_names
        fake, real, memo = self._renumber(fake, names or source.class_names), self._real, self._memo
        if reference.class_names is None:  # its numbers count as those of these images
            real = self._renumber(real, source.class_names)
            memo = memo if real is self._real else Memo()
        result = evaluate_features(
            real,
            fake,
            self._labels,
            source.labels,
            settings,
            class_names=names,
            device=self._device,
            memo=memo,
            judge_labels=self._judge_labels,
        )
        if result["judge"] is not None:
            result["judge"]["name"] = inputs.judge.name if inputs.judge else f"SVM on {inputs.detector.name} features"
        test = inputs.test
        if test is not None:
            if reference.class_names is None:  # what is numbered by it need not fit each other
                (test,) = match_classes([test], source, "the set of images")
            result["cas"] = classification_accuracy_score(
                source, test, settings.cas_arch, self._device, settings.seed, settings.cas_epochs
            )
            result["metrics"]["cas"] = result["cas"]["accuracy"]
        add_outlier_ratio(result, inputs.outlier_record, self._known, fake, inputs.detector.name, self._memo)
        about = dict(
            images=source.path,
            data=reference.path,
            detector=inputs.detector.name,
            precision=inputs.detector.precision,
            reference_labels=_describe_labels(reference),
            reference_outliers=self._left_out,
            class_matching=self._describe_matching(source, test),
            unranked=[
                name for name, value in result["metrics"].items() if value is not None and self._rewards_mistakes(name)
            ],
            protocol=settings.protocol and describe_protocol(settings.protocol, asdict(settings)),
        )
        return about | result

    def _describe_matching(self, source: ImageSource, test: ImageSource | None) -> str | None:
        inputs = self._inputs
        names = inputs.reference.class_names or source.class_names
        judge = inputs.judge and describe_match(inputs.judge.class_names, names)
        found = {
            "": getattr(source, "class_matching", None),
            "of the test set ": getattr(test, "class_matching", None),
            "of the judge ": judge,
        }
        return "; ".join(f"{of}{how}" for of, how in found.items() if how) or None

    def _rewards_mistakes(self, metric: str) -> bool:
        """Return whether a metric is better for images that repeat wrong labels, as far as anybody knows."""
        inputs = self._inputs
        if metric == "cas":
            return not labels_are_clean(inputs.test)
        if metric == "label_accuracy" and (inputs.judge is not None or self._judge_labels is not None):
            return False  # A classifier learned from other labels, or the caller says which are right.
        by_label = metric.startswith("cw_") and metric != "cw_is" or metric == "label_accuracy"
        return by_label and not labels_are_clean(inputs.reference)


def _describe_labels(reference: ImageSource) -> str | None:
    if reference.truth is not None:
        return reference.truth
    return None if reference.labels is None else "labels as they are, it has no clean ones"
