"""The settings of an evaluation: what `fid.py evaluate` can be told, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from metrics.cas import CAS_EPOCHS
from metrics.inception_score import IS_SPLIT

__all__ = ["EvaluationSettings"]


@dataclass(frozen=True)
class EvaluationSettings:
    """How generated images are evaluated. File names are not opened here; see `metrics.options.evaluate_files`."""

    data: str  # reference: archive of real images
    detector: str  # what turns images into features; `metrics.detectors.DETECTORS` lists the choices
    precision: str = "fp32"  # arithmetic of the detector: fp32 or bf16
    num: int | None = None  # generated images to use per set; None: all
    num_reference: int | None = None  # reference images for KID and neighbors of the whole sets, at most; None: all
    seed: int = 0  # chooses the images if there are more than `num`; also for bootstrap and CAS
    batch: int = 64  # images per batch and process
    nearest_k: int = 5  # precision, recall, density and coverage use the distance to this neighbor
    splits: int = IS_SPLIT  # images per split of the inception score
    bootstrap: int | None = None  # resampled sets that make the intervals; None: no intervals
    judge: str = "svm"  # label accuracy: "svm", "none", or a classifier snapshot
    features: str | None = None  # file that keeps features for later calls; None: none is kept
    test: str | None = None  # archive of real images for CAS; None: no CAS
    cas_arch: str = "resnet50"  # classifier of CAS, one of `metrics.cas.CAS_ARCHS`
    cas_epochs: int = CAS_EPOCHS  # length of its training
    outlier_data: str | None = None  # archive that records its outliers; None: `data`, if it records any
    mifid: bool = False  # also MiFID, which looks for copies of reference images
    metrics: tuple[str, ...] | None = None  # names of the metrics to compute; None: all that are asked for
    protocol: str | None = None  # name in `metrics.protocols` that other settings come from, for the table
