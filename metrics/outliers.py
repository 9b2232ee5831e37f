"""Outlier ratio: the share of images that a classifier of clean versus outlier images calls outliers.

The classifier learns on the fly from an archive that records which of its images were put in from another source.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import dnnlib
from metrics.features import Features
from metrics.images import ImageSource, describe_shape, open_images
from metrics.label_accuracy import SvmJudge

__all__ = ["add_outliers", "clean_part", "open_record", "outlier_ratio"]

MINIMUM = 5  # images of either kind: fewer leave none to measure the classifier


def outlier_ratio(known: Features, outliers: np.ndarray, images: Features) -> tuple[float, dict[str, Any]]:
    """Share of `images` called outliers by an SVM trained on `known` images, of which `outliers` [N] are such.

    With it: `training_share` (of outliers among `known`), `accuracy` (mean of both kinds') on `num` images, `on` which.
    Raises ValueError when `known` has too few images of either kind.
    """
    if min(outliers.sum(), (~outliers).sum()) < MINIMUM:
        raise ValueError(f"needs {MINIMUM} images of either kind, found {outliers.sum()} outliers of {len(outliers)}")
    machine = SvmJudge(known.features, outliers, balanced=True)
    on = "held-out images, outliers and clean ones weighing the same"
    return (
        float(machine.predict(images.features).mean()),
        dict(training_share=float(outliers.mean()), accuracy=machine.accuracy, num=machine.held_out, on=on),
    )


def add_outliers(
    result: dict[str, Any], record: ImageSource | None, known: Features, images: Features, detector: str
) -> None:
    """Puts the outlier ratio into the table `result`: `metrics.outlier_ratio` and `outliers`.

    `outliers` says what `outlier_ratio` says of the classifier, its `name` and its `data`; it is None without a record
    or when the record, whose features are `known`, cannot train one (then `notes.outlier_ratio` says why).
    """
    result["outliers"] = None
    if record is None:
        return
    try:
        ratio, found = outlier_ratio(known, record.outliers, images)
    except ValueError as e:
        result["metrics"]["outlier_ratio"], result["notes"]["outlier_ratio"] = None, str(e)
        return
    result["metrics"]["outlier_ratio"] = ratio
    result["outliers"] = dict(found, name=f"SVM on {detector} features", data=record.path)


def open_record(path: str | None, reference: ImageSource) -> ImageSource | None:
    """The archive with outliers on record: at `path`, else the reference if it records any, else None.

    Raises UserError when there is no record at `path`, when its images are of another shape than the reference's, or
    when the reference has fewer than 2 clean images.
    """
    if reference.outliers is not None and (~reference.outliers).sum() < 2:
        raise dnnlib.UserError(
            f"--data: {reference.path} records {reference.outliers.sum()} of its {len(reference)} "
            "images as outliers, metrics need at least 2 clean ones"
        )
    if path is None:
        return None if reference.outliers is None else reference
    source = open_images(path, option="--outlier_data")
    if source.outliers is None:
        raise dnnlib.UserError(
            f"--outlier_data: {path} records no outliers; 'dataset_tool.py --outliers' makes archives that do"
        )
    if source.image_shape != reference.image_shape:
        raise dnnlib.UserError(
            f"--outlier_data: {path} has {describe_shape(source.image_shape)} images, "
            f"--data: {reference.path} has {describe_shape(reference.image_shape)}"
        )
    return source


def clean_part(features: Features, outliers: np.ndarray) -> Features:
    """The features of the images that are no `outliers` [N]."""
    values = (getattr(features, field.name) for field in dataclasses.fields(features))
    return Features(*(None if value is None else value[~outliers] for value in values))
