"""What opens the files that the commands of `fid.py` with a network name, `sweep` and `ppl`, and measures them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click
import torch

import dnnlib
from dnnlib.cli import blame, given_options
from metrics.curve import (
    GeneratedImages,
    Snapshot,
    choose_snapshots,
    list_snapshots,
    measure_snapshots,
    metric_settings,
)
from metrics.detectors import load_detector
from metrics.format import save_json
from metrics.images import ImageSource, NpzImages
from metrics.options import open_inputs
from metrics.ppl import image_distance, path_distances, path_length
from metrics.settings import EvaluationSettings
from sampling.ddgan import is_generator
from sampling.loading import load_denoiser
from sampling.options import SAMPLER_SETTINGS, sampler_settings
from sampling.samplers import choose_sampler
from torch_utils import distributed, safe_files
from torch_utils.persistence import find_snapshot
from training.config import differences

__all__ = ["curve_of_files", "paths_of_files"]


def curve_of_files(device: torch.device, out: str | None, **o: Any) -> dict[str, Any] | None:
    """Measure the snapshots that the options name; those that the file `out` knows already are not measured again.

    Return the metric, its `unit` of the numbers, `ranked` (may values be ranked?) and the `curve`: for each snapshot
    its path, `number`, `value` and `notes` on which classes the value is about. Processes but rank 0 receive None.
    Every process must call this function.
    """
    with blame("--metric"):
        fields = metric_settings(o["metric"])
    with blame("--network"):
        snapshots = list_snapshots(o["network"])
    snapshots = _choose(snapshots, o)
    settings = EvaluationSettings(
        data=o["data"], detector=o["detector"], precision=o["precision"], batch=o["batch"], judge=o["judge"], **fields
    )
    (metric,) = settings.metrics
    inputs = replace(open_inputs([], settings, device), outlier_record=None)
    names = ("data", "detector", "judge", "precision", "num", *SAMPLER_SETTINGS)
    options: dict[str, Any] = dict(metric=metric, **{name: str(o[name]) for name in names})
    files = {name: o[name] for name in ("detector", "judge")}
    options["contents"] = distributed.from_rank0(lambda: _contents(inputs.reference, files))
    with blame("--out"):
        known = distributed.from_rank0(lambda: _read_curve(out, options))
    hashes = distributed.from_rank0(lambda: {s.path: dnnlib.content_hash(s.path) for s in snapshots})
    found = {point["hash"]: point for point in known}
    missing = [s for s in snapshots if hashes[s.path] not in found]

    def result() -> dict[str, Any]:
        there = [s for s in snapshots if hashes[s.path] in found]
        curve = [found[hashes[s.path]] | dict(snapshot=s.path, number=s.number) for s in there]
        ranked = all(point["ranked"] for point in curve)
        return dict(options=options, metric=metric, unit=snapshots[0].unit, ranked=ranked, curve=curve)

    def report(snapshot: Snapshot, measured: dict[str, Any]) -> None:
        value, ranked = measured["metrics"][metric], metric not in measured["unranked"]
        point = dict(snapshot=snapshot.path, number=snapshot.number, value=value, ranked=ranked)
        found[hashes[snapshot.path]] = point | dict(hash=hashes[snapshot.path], notes=_notes(metric, measured))
        print(f"{metric}  {value:g}", flush=True)
        if out is not None:
            # Snapshots of an earlier call stay, whatever range this one has.
            save_json(result() | dict(curve=sorted(found.values(), key=lambda point: point["number"])), out)

    if missing:
        measure_snapshots(inputs, settings, missing, lambda s: _open_snapshot(s, o, device), device, report)
    return result() if distributed.get_rank() == 0 else None


def _choose(snapshots: Sequence[Snapshot], o: dict[str, Any]) -> list[Snapshot]:
    unit, other = ("epoch", "kimg") if snapshots[0].unit == "epoch" else ("kimg", "epoch")
    for part in ("start", "end", "jump"):
        if o[f"{other}_{part}"] is not None:
            with blame(f"--{other}_{part}"):
                raise dnnlib.UserError(f"the names of snapshots like {snapshots[0].path} count {unit}")
    with blame(f"--{unit}_start, --{unit}_end"):
        return choose_snapshots(snapshots, *(o[f"{unit}_{part}"] for part in ("start", "end", "jump")))


def _read_curve(path: str | None, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what an earlier call of the same sweep measured. UserError: the file is something else."""
    if path is None or not os.path.exists(path):
        return []
    known = safe_files.load_json(dnnlib.read_bytes(path), path)
    curve = known.get("curve") if isinstance(known, dict) else None
    if not isinstance(curve, list) or not all(map(_is_point, curve)):
        raise dnnlib.UserError(f"{path}: is not the result of a sweep; choose another file")
    if other := differences(known.get("options") or {}, options):
        raise dnnlib.UserError(
            f"{path}: is the result of a sweep with other options or files ({'; '.join(other)}); choose another file"
        )
    return curve


def _is_point(point: Any) -> bool:
    kinds = dict(snapshot=str, number=(int, float), value=(int, float), ranked=bool, hash=str)
    if not isinstance(point, dict) or not isinstance(point.setdefault("notes", []), list):  # older files have none
        return False
    return all(isinstance(point.get(key), kind) for key, kind in kinds.items())


def _notes(metric: str, measured: dict[str, Any]) -> list[str]:
    """Return which classes a value leaves out, and how classes were matched where the metric depends on them."""
    notes = [measured["notes"][metric]] if metric in measured["notes"] else []
    by_class = metric.startswith("cw_") or metric == "label_accuracy"
    if by_class and measured["class_matching"]:
        notes.append(f"classes matched {measured['class_matching']}")
    return [f"{metric}: {note}" for note in notes]


def _contents(reference: ImageSource, files: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return what identifies the reference and those of `files` that are files, wherever they lie."""
    if isinstance(reference, NpzImages):
        found = dict(data=dict(hash=dnnlib.content_hash(reference.path)))
    else:
        found = dict(data=reference.contents("clean_labels", "outliers"))
    for name, file in files.items():
        with contextlib.suppress(dnnlib.UserError):  # it is no file
            found[name] = dict(hash=dnnlib.content_hash(find_snapshot(file)))
    return found


def _open_snapshot(snapshot: Snapshot, o: dict[str, Any], device: torch.device) -> GeneratedImages:
    with blame("--network"):
        kinds = ("denoiser", "generator")
        net, class_names = load_denoiser(snapshot.path, device, trust_pickle=o["trust_pickle"], kinds=kinds)
    if is_generator(net):
        for option in given_options(besides=click.get_current_context().params.keys() - set(SAMPLER_SETTINGS)):
            with blame(option):
                raise dnnlib.UserError(f"{snapshot.path} holds a generator, whose steps are fixed; leave it out")
    sampler = choose_sampler(net, **sampler_settings(o))
    return GeneratedImages(snapshot.path, net, o["num"], sampler, device, class_names)


def paths_of_files(device: torch.device, **o: Any) -> dict[str, Any]:
    """Return PPL of the generator that the options name, with `network`, `detector`, `num` and `epsilon`.

    Every process must call this function.
    """
    with blame("--network"):
        net, _ = distributed.together(
            lambda: load_denoiser(o["network"], device, trust_pickle=o["trust_pickle"], kinds=("generator",)),
            rank0_first=True,
        )
    with blame("--detector"):
        detector = distributed.together(lambda: load_detector(o["detector"], device), rank0_first=True)
        distance = image_distance(detector, (net.img_channels, net.img_resolution, net.img_resolution), o["network"])
    ends = ("full", "end") if o["sampling"] == "both" else (o["sampling"],)
    found = path_distances(net, range(o["num"]), distance, device, ends=ends, batch=o["batch"], epsilon=o["epsilon"])
    metrics = {f"ppl_{end}": path_length(values) for end, values in found.items()}
    return dict(network=o["network"], detector=detector.name, num=o["num"], epsilon=o["epsilon"], metrics=metrics)
