"""CIFAR-10N and CIFAR-100N: labels by people, in a file of torch.save that has CIFAR's own labels as `clean_label`."""

from __future__ import annotations

import numpy as np

import dnnlib
from archives.source import Source
from torch_utils import safe_files

__all__ = ["published_clean_labels"]

CLEAN = "clean_label"
FAMILIES = ("cifar10", "cifar100")


def published_clean_labels(source: Source, path: str) -> np.ndarray | None:
    """Return the clean labels that a file of CIFAR-N has for a source, int64 [N]; None for other files and sources.

    UserError: they are not the labels of the source, so its images have another order or are others.
    """
    own = source.labels
    if source.corruption.get("family") not in FAMILIES or source.clean_labels is not None or own is None:
        return None
    found = safe_files.load_pt(dnnlib.read_bytes(path), path) if path.lower().endswith(".pt") else None
    clean = found.get(CLEAN) if isinstance(found, dict) else None
    if clean is None:
        return None
    clean = np.asarray(clean)
    if clean.shape != own.shape:
        raise dnnlib.UserError(
            f"{path}: '{CLEAN}' has {clean.size} labels, but the source has {len(own)} images (the training part of "
            "CIFAR has 50000)"
        )
    differ = np.flatnonzero(clean != own)
    if len(differ):
        i = differ[0]
        raise dnnlib.UserError(
            f"{path}: '{CLEAN}' differs from the labels of {source.path} for {len(differ)} of {len(own)} images, first "
            f"number {i}: {clean[i]} here, {own[i]} there; the file has another order, or belongs to another set"
        )
    return own
