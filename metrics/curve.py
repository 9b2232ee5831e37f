"""A metric over the snapshots of a run: images are generated in memory, measured, and forgotten."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import dnnlib
from metrics.class_matching import match_classes
from metrics.evaluation import Comparison, Inputs, features_of
from metrics.features import compute_features
from metrics.images import ImageSource, best_labels, check_same_shape
from metrics.settings import EvaluationSettings
from sampling.generation import drawn_classes, generate_images
from torch_utils import distributed

__all__ = ["GeneratedImages", "Snapshot", "choose_snapshots", "list_snapshots", "measure_snapshots", "metric_settings"]

NEIGHBORS = ("precision", "recall", "density", "coverage")
METRICS = ("fid", "sfid", "kid", "mifid", "is", "label_accuracy", *NEIGHBORS)
WHOLE_ONLY = ("mifid", "label_accuracy")  # have no class-wise mean


@dataclass(frozen=True)
class Snapshot:
    """A snapshot of a run, and the number in its name: kimg, or epochs in RDUOT's `netG_1200.pth`."""

    path: str
    number: float

    @property
    def unit(self) -> str:
        """What the number counts: kimg or epochs."""
        return "epoch" if self.path.endswith(".pth") else "kimg"


def list_snapshots(pattern: str) -> list[Snapshot]:
    """Return the snapshots of a run directory, or of a glob of files, in the order of their numbers.

    Raise UserError if nothing matches, a name has no number, two files have the same one, or units differ.
    """
    found = dnnlib.match_paths(pattern)
    folders = [path for path in found if os.path.isdir(path)]
    if len(folders) > 1:
        raise dnnlib.UserError(f"{pattern}: matches {len(folders)} folders, {folders[0]} and others; name one of them")
    if folders:
        names = ("network-snapshot-*.pkl", "netG_*.pth")
        found = next(filter(None, (dnnlib.match_paths(os.path.join(folders[0], name)) for name in names)), [])
    snapshots = []
    for path in filter(os.path.isfile, found):
        number = re.search(r"([0-9]+(?:\.[0-9]+)?)\.(?:pkl|pth)$", path)
        if number is None:
            raise dnnlib.UserError(f"{path}: its name has no number, such as network-snapshot-000250.pkl has")
        snapshots.append(Snapshot(path, float(number[1])))
    if not snapshots:
        raise dnnlib.UserError(f"{pattern}: no snapshots found; name a run directory or 'DIR/network-snapshot-*.pkl'")
    if len({snapshot.unit for snapshot in snapshots}) > 1:
        raise dnnlib.UserError(f"{pattern}: matches .pkl and .pth files, whose numbers count different things")
    snapshots.sort(key=lambda snapshot: snapshot.number)
    for one, next_one in zip(snapshots[:-1], snapshots[1:], strict=True):
        if one.number == next_one.number:
            raise dnnlib.UserError(f"{one.path} and {next_one.path}: both have the number {one.number:g}")
    return snapshots


def choose_snapshots(
    snapshots: Sequence[Snapshot], start: float | None, end: float | None, jump: float | None
) -> list[Snapshot]:
    """Return the snapshots with numbers from `start` to `end`, each at least `jump` behind the one before.

    Raise UserError if none is left.
    """
    chosen: list[Snapshot] = []
    for snapshot in snapshots:
        inside = (start is None or snapshot.number >= start) and (end is None or snapshot.number <= end)
        if inside and (not chosen or jump is None or snapshot.number - chosen[-1].number >= jump):
            chosen.append(snapshot)
    if not chosen:
        first, last = snapshots[0], snapshots[-1]
        raise dnnlib.UserError(f"no snapshot in this range; there are some from {first.number:g} to {last.number:g}")
    return chosen


class GeneratedImages:
    """Images of a network, made when they are asked for; image i has the seed i. It fits `ImageSource`."""

    workers = 1  # the network makes one batch at a time
    cache = False
    clean_labels = truth = outliers = None

    def __init__(
        self,
        path: str,
        net: torch.nn.Module,
        num: int,
        sampler: Callable[..., torch.Tensor],
        device: torch.device,
        class_names: list[str] | None = None,
    ):
        self.path, self.archives, self.label_dim, self.class_names = path, [path], net.label_dim, class_names
        self.image_shape = (net.img_channels, net.img_resolution, net.img_resolution)
        classes = drawn_classes(net, range(num), device)
        self.labels = None if classes is None else np.array(classes, dtype=np.int64)
        self._net, self._num, self._sampler, self._device = net, num, sampler, device

    def __len__(self) -> int:
        return self._num

    def images(self, indices: Any) -> torch.Tensor:
        """Return images uint8 [B,C,H,W] on the CPU."""
        seeds = np.asarray(indices).tolist()
        batches = generate_images(self._net, seeds, device=self._device, batch=len(seeds), sampler=self._sampler)
        return torch.from_numpy(np.concatenate([images for _, images, _ in batches])).permute(0, 3, 1, 2).contiguous()

    def onehot(self, indices: Any) -> torch.Tensor:
        """Return one-hot labels float32 [B,label_dim]."""
        return torch.nn.functional.one_hot(torch.from_numpy(self.labels[indices]), self.label_dim).float()


def metric_settings(metric: str) -> dict[str, Any]:
    """Return the fields of EvaluationSettings that compute one metric, such as 'fid', 'cw_fid' or 'density_k3'.

    Without `_k`, neighbors are counted up to the fifth. Raise UserError if there is no such metric.
    """
    name = metric.removeprefix("cw_")
    neighbor = re.fullmatch(rf"({'|'.join(NEIGHBORS)})(?:_k([1-9]\d{{0,5}}))?", name)
    if name not in METRICS and neighbor is None or (name in WHOLE_ONLY and name != metric):
        raise dnnlib.UserError(
            f"no metric {metric!r}; there are {', '.join(METRICS)}, with cw_ in front for the mean over classes (but "
            f"for {' and '.join(WHOLE_ONLY)}), and with _k3 behind {', '.join(NEIGHBORS)} for other neighbors than the "
            "fifth"
        )
    k = EvaluationSettings.nearest_k if neighbor is None else int(neighbor[2] or EvaluationSettings.nearest_k)
    prefix = metric[: len(metric) - len(name)]
    full = metric if neighbor is None else f"{prefix}{neighbor[1]}_k{k}"
    return dict(metrics=(full,), nearest_k=k, mifid=name == "mifid")


def measure_snapshots(
    inputs: Inputs,
    settings: EvaluationSettings,
    snapshots: Sequence[Snapshot],
    open_snapshot: Callable[[Snapshot], ImageSource],
    device: torch.device,
    report: Callable[[Snapshot, dict[str, Any]], None],
) -> None:
    """Measure the one metric of `settings.metrics` for each snapshot, and call `report` on rank 0 with each result.

    A result is what `Comparison` returns. `open_snapshot` returns the images of a snapshot. Every process must call
    this function. Raise UserError if the metric has no value, as soon as this is known.
    """
    (metric,) = settings.metrics
    real = features_of(inputs, settings, device, inputs.reference, "reference images")
    inputs.cache.save()
    compare = Comparison(inputs, settings, device, real) if real is not None else None
    distributed.together(lambda: compare and _check(metric, inputs, settings, real))
    for snapshot in snapshots:
        source = distributed.together(lambda snapshot=snapshot: _open(open_snapshot, snapshot, inputs, metric))
        distributed.print0(f"{snapshot.unit} {snapshot.number:g}: {snapshot.path}")
        fake = compute_features(source, inputs.detector, settings.batch, device, inputs.judge, "generated images")

        def measure(snapshot: Snapshot = snapshot, source: ImageSource = source, fake: Any = fake) -> None:
            result = compare(source, fake)
            if result["metrics"][metric] is None:
                raise dnnlib.UserError(f"{snapshot.path}: no {metric}: {result['notes'].get(metric)}")
            report(snapshot, result)

        distributed.on_rank0(measure)


def _open(
    open_snapshot: Callable[[Snapshot], ImageSource], snapshot: Snapshot, inputs: Inputs, metric: str
) -> ImageSource:
    source = open_snapshot(snapshot)
    check_same_shape(inputs.reference, source)
    if source.labels is None and (metric.startswith("cw_") or metric == "label_accuracy"):
        raise dnnlib.UserError(f"{snapshot.path}: was trained without labels, so there is no {metric}")
    return match_classes([source], inputs.reference)[0]


def _check(metric: str, inputs: Inputs, settings: EvaluationSettings, real: Any) -> None:
    """Raise UserError if the reference, the detector or the judge rules the metric out, before images are made."""
    lacks = {"is": real.probs is None and "class probabilities", "sfid": real.spatial is None and "spatial features"}
    lack = lacks.get(metric.removeprefix("cw_"))
    if lack:
        raise dnnlib.UserError(f"{inputs.detector.name} gives no {lack}, so there is no {metric}")
    needs_labels = (metric.startswith("cw_") and metric != "cw_is") or metric == "label_accuracy"
    if needs_labels and inputs.reference.labels is None:
        raise dnnlib.UserError(f"{inputs.reference.path} has no labels, so there is no {metric}")
    if metric == "label_accuracy" and settings.judge == "none":
        raise dnnlib.UserError("no judge was asked for, so there is no label_accuracy")
    if metric.startswith("cw_") and metric != "cw_is":
        labels, outliers = best_labels(inputs.reference), inputs.reference.outliers
        largest = np.bincount(labels if outliers is None else labels[~outliers]).max()
        needed = 1 + (settings.nearest_k if metric.removeprefix("cw_").startswith(NEIGHBORS) else 1)
        if largest < needed:
            raise dnnlib.UserError(
                f"no class of {inputs.reference.path} has more than {largest} images, and {metric} needs {needed}"
            )
