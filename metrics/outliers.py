"""Outlier ratio: the share of images that a classifier takes for outliers.

The classifier tells clean images from outliers. It learns on the fly, from an archive that records which of its images
come from another source.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import dnnlib
from archives.dataset import ImageDataset
from archives.label_table import load_outliers
from metrics.features import Features
from metrics.images import ImageSource, check_same_shape, open_images
from metrics.label_accuracy import SvmJudge
from metrics.memo import Memo

__all__ = ["add_outlier_ratio", "check_reference", "open_record", "outlier_ratio", "select_clean"]

MINIMUM = 5  # images of each kind: with fewer, no held-out ones remain to measure the classifier with


def outlier_ratio(known: Features, outliers: np.ndarray, images: Features, memo: Memo) -> tuple[float, dict[str, Any]]:
    """Return the share of `images` that an SVM takes for outliers, and a description of the SVM.

    The SVM is trained on `known` images; `outliers` [N] (bool) says which of them are outliers. The description holds
    `training_share` (of outliers among `known`), and the `accuracy` (mean over both kinds) on `num` images; `on` says
    which images these are. `memo` keeps the SVM. Raise ValueError if `known` has too few images of one kind.
    """
    if min(outliers.sum(), (~outliers).sum()) < MINIMUM:
        raise ValueError(f"needs {MINIMUM} images of either kind, found {outliers.sum()} outliers of {len(outliers)}")
    machine = memo.get("outlier_svm", lambda: SvmJudge(known.features, outliers, balanced=True))
    on = "held-out images, outliers and clean ones weighing the same"
    return (
        float(machine.predict(images.features).mean()),
        dict(training_share=float(outliers.mean()), accuracy=machine.accuracy, num=machine.held_out, on=on),
    )


def add_outlier_ratio(
    result: dict[str, Any], record: ImageSource | None, known: Features, images: Features, detector: str, memo: Memo
) -> None:
    """Add the outlier ratio of `images` to the table `result`, as `metrics.outlier_ratio` and `outliers`.

    `known` are the features of `record`. `outliers` describes the classifier as the function `outlier_ratio` does, and
    adds its `name` and `data`. Without a record it is None and there is no ratio. If the record has too few images to
    train a classifier, both are None, and `notes.outlier_ratio` says why.
    """
    result["outliers"] = None
    if record is None:
        return
    try:
        ratio, found = outlier_ratio(known, record.outliers, images, memo)
    except ValueError as e:
        result["metrics"]["outlier_ratio"], result["notes"]["outlier_ratio"] = None, str(e)
        return
    result["metrics"]["outlier_ratio"] = ratio
    result["outliers"] = dict(found, name=f"SVM on {detector} features", data=record.path)


def check_reference(reference: ImageSource) -> None:
    """Raise UserError if fewer than 2 images of the reference remain without the outliers that it records."""
    if reference.outliers is not None and (~reference.outliers).sum() < 2:
        raise dnnlib.UserError(
            f"{reference.path} records {reference.outliers.sum()} of its {len(reference)} "
            "images as outliers, metrics need at least 2 clean ones"
        )


def open_record(path: str | None, reference: ImageSource) -> ImageSource | None:
    """Return the archive that records its outliers: the one at `path`, or else the reference if it records any.

    Return None if there is no such archive. A label file (`.npz`, or `.csv` in cleanlab's columns) at `path` takes the
    place of the reference's record. Raise UserError if the archive at `path` records no outliers, if its images have
    another shape than those of the reference, or if the label file does not fit the reference.
    """
    if path is None:
        return None if reference.outliers is None else reference
    if path.lower().endswith((".npz", ".csv")):
        if not isinstance(reference, ImageDataset):
            raise dnnlib.UserError(f"{path}: cannot be used with {reference.path}, whose images have no names")
        reference.outliers = load_outliers(path, reference)
        check_reference(reference)
        return reference
    source = open_images(path)
    if source.outliers is None:
        raise dnnlib.UserError(f"{path} records no outliers; 'dataset_tool.py --outliers' makes archives that do")
    check_same_shape(source, reference)
    return source


def select_clean(features: Features, outliers: np.ndarray) -> Features:
    """Return the features without those of the `outliers` [N] (bool)."""
    values = (getattr(features, field.name) for field in dataclasses.fields(features))
    return Features(*(None if value is None else value[~outliers] for value in values))
