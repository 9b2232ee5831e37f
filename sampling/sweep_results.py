"""The results of `sweep.py` on disk, and whether they belong to the same sweep (docs/formats.md, "Results")."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from typing import Any

import numpy as np

import dnnlib
from archives.dataset import ImageDataset
from sampling.output import check_free
from torch_utils import persistence, safe_files
from training.config import differences

__all__ = ["SweepResults"]

FILES = ("network", "discriminator", "label_path", "detector", "judge")  # options that name a file, or something else


class SweepResults:
    """What a sweep has measured, in `outdir`/sweep.json: `values`, and a `note` on the judge."""

    def __init__(self, outdir: str, options: dict[str, Any]) -> None:
        """Take over what an earlier call has measured with these options on the same files, wherever they lie now.

        UserError: the folder is in use for something else.
        """
        self._path, self._options, self._contents = os.path.join(outdir, "sweep.json"), options, _contents(options)
        self.values: dict[str, dict[str, float]] = {}
        self.note, self._judged = "", None
        if not os.path.exists(self._path):
            check_free(outdir)
            return
        known = safe_files.load_json(dnnlib.read_bytes(self._path), self._path)
        if not isinstance(known, dict) or not all(isinstance(known.get(key), dict) for key in ("options", "results")):
            raise dnnlib.UserError(f"{self._path}: is not the result of a sweep; choose another folder")
        before = known["options"] | dict(contents=known.get("contents"))
        if other := differences(before, options | dict(contents=self._contents)):
            raise dnnlib.UserError(
                f"{self._path}: is the result of a sweep with other options or files ({'; '.join(other)}); choose "
                "another folder"
            )
        self.values, self.note, self._judged = known["results"], known.get("note", ""), known.get("judge_labels")

    def judge_by(self, labels: np.ndarray | None, note: str) -> None:
        """Remember the classes [N] that the judge learns, None: those of the data, and the `note` on it.

        UserError: the results so far are of a judge that learned others.
        """
        learned = "the data's" if labels is None else hashlib.blake2b(labels.tobytes(), digest_size=16).hexdigest()
        if self.values and self._judged not in (None, learned):
            raise dnnlib.UserError(
                f"{self._path}: its judge learned other labels than the discriminator's label file has now; choose "
                "another folder"
            )
        self._judged, self.note = learned, note

    def add(self, name: str, values: dict[str, float]) -> None:
        """Write down what was measured under a name."""
        self.values[name] = values
        everything = dict(options=self._options, contents=self._contents, results=self.values, note=self.note)
        everything["judge_labels"] = self._judged
        with dnnlib.atomic_open(self._path, "wt") as f:
            json.dump(everything, f, indent=1)


def _contents(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what identifies the files that options name, by option. Whoever reads a file says what ails it."""
    found = {}
    for name in FILES:
        with contextlib.suppress(dnnlib.UserError):
            if options[name]:
                found[name] = dict(hash=dnnlib.content_hash(persistence.find_snapshot(options[name])))
    with contextlib.suppress(dnnlib.UserError):
        found["data"] = ImageDataset(options["data"]).contents("clean_labels", "outliers")
    return found
