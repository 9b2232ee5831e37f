"""Keep features in an `.npz`, so that the detector need not see the same images again for other metrics."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import dnnlib
from metrics.detectors import ClassifierDetector, Detector
from metrics.features import Features
from metrics.images import ImageSource
from torch_utils import distributed, safe_files

__all__ = ["FeatureCache"]

SETS = "sets"
PARTS = ("features", "probs", "judged", "spatial")


class FeatureCache:
    """Features of any number of sets of images, kept in the file `path` (None: nothing is kept).

    The file holds `sets`, a JSON list that describes each set, and the arrays `0.features`, `0.probs`, `0.judged`,
    `1.features`, and so on. A set is used again if the images, their number and choice, the detector, its precision,
    and the judge are the same. Files are the same if their size and their time of change are.

    Rank 0 reads and writes the file, but every process must call the methods. Several calls may share the file at the
    same time: what another one has added meanwhile stays. Raise UserError if the file holds something else.
    """

    def __init__(self, path: str | None):
        self.path = path
        self._sets: list[tuple[dict[str, Any], dict[str, np.ndarray]]] = []
        self._new: list[dict[str, Any]] = []  # which of these sets the file does not have yet
        self._seen: list[int] | None = None  # version of the file that was read
        if path is not None:
            distributed.on_rank0(self._read)

    def _read(self) -> None:
        """Read the file. Sets that are not in it yet stay, and take the place of older ones of the same images."""
        self._seen = _version(self.path)
        if self._seen is None:
            return
        new, self._sets = [(what, parts) for what, parts in self._sets if what in self._new], []
        expected = "expected features of 'fid.py evaluate', or no such file yet"
        arrays = safe_files.read_npz(self.path, expected)
        try:
            for i, what in enumerate(json.loads(str(arrays[SETS]))):
                parts = {part: arrays[f"{i}.{part}"] for part in PARTS if f"{i}.{part}" in arrays}
                if not len(parts["features"]) == what["count"]:
                    raise ValueError
                self._sets.append((what, parts))
        except (KeyError, TypeError, ValueError):
            raise dnnlib.UserError(f"{self.path} holds {', '.join(arrays) or 'nothing'}; {expected}") from None
        for what, parts in new:
            self._add(what, parts)

    def _add(self, what: dict[str, Any], parts: dict[str, np.ndarray]) -> bool:
        """Add a set, and return whether it takes the place of one of an older version of the images."""
        same = {key: what[key] for key in ("images", "count", "choice")}
        old = [other for other, _ in self._sets if other | same == other and other["version"] != what["version"]]
        self._sets = [(other, kept) for other, kept in self._sets if other not in (*old, what)] + [(what, parts)]
        return bool(old)

    def get(
        self,
        source: ImageSource,
        extractor: Detector,
        judge: ClassifierDetector | None,
        choice: Any,
        compute: Callable[[], Features],
    ) -> Features | None:
        """Return the features of `source` from the file, or else what `compute()` returns, and keep that.

        Features from the file are returned on rank 0 only; the other processes receive None. `choice` is plain data
        that says how the images were chosen among those of the source.
        """
        if self.path is None:
            return compute()
        what = json.loads(
            json.dumps(
                dict(
                    images=",".join(map(os.path.abspath, source.archives)),
                    version=_version_of_images(source),
                    count=len(source),
                    choice=choice,
                    detector=_named(extractor),
                    judge=None if judge is None else _named(judge),
                )
            )
        )
        known = next((parts for other, parts in self._sets if other == what), None)
        if known is not None and "spatial" not in known and getattr(extractor, "with_spatial", None) is not None:
            known = None  # from before there were spatial features
        if distributed.broadcast_object(known is not None):
            distributed.print0(f"Features of {source.path}: from {self.path}")
            if known is None:
                return None
            features, probs, spatial = (_tensor(known.get(part)) for part in ("features", "probs", "spatial"))
            return Features(features, probs, known.get("judged"), spatial)
        found = compute()
        if distributed.get_rank() == 0:
            arrays = ((part, getattr(found, part)) for part in PARTS)
            if self._add(what, {part: np.asarray(array) for part, array in arrays if array is not None}):
                print(f"Features of {source.path}: computed again, the images have changed since {self.path} was made")
            self._new.append(what)
        return found

    def save(self) -> None:
        """Write the file if there is anything new. It appears only when it is complete."""

        def work() -> None:
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
            with dnnlib.locked(self.path):
                if _version(self.path) != self._seen:
                    self._read()
                sets = self._sets
                arrays = {f"{i}.{part}": array for i, (_, parts) in enumerate(sets) for part, array in parts.items()}
                with dnnlib.atomic_open(self.path) as file:
                    np.savez(file, **{SETS: json.dumps([what for what, _ in sets])}, **arrays)
                self._seen, self._new = _version(self.path), []

        distributed.together(lambda: work() if self._new else None)


def _tensor(array: np.ndarray | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array)


def _named(extractor: Detector) -> list[Any]:
    # Float32 is not mentioned. So files from before there was a choice of precision stay valid.
    return [extractor.name, _version(extractor.name), *([] if extractor.precision == "fp32" else [extractor.precision])]


def _version(path: str) -> list[int] | None:
    """Return the size and the time of the last change of a file, or None if there is no such file."""
    if not os.path.exists(path):
        return None
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def _version_of_images(source: ImageSource) -> Any:
    versions = [_version(path) for path in source.archives]
    if not any(map(os.path.isdir, source.archives)):
        return versions[0] if len(versions) == 1 else versions
    files = [[path, _version(path)] for path in source.archives] if len(versions) > 1 else []
    files += [[name, _version(file)] for name, file in zip(source.file_names, source.files, strict=True)]
    if any(version is None for _, version in files):
        return secrets.token_hex()  # what cannot be looked up counts as changed
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
