"""The options of denoisers that say which training images do not belong, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import torch

import dnnlib
from archives.dataset import ImageDataset
from archives.label_table import load_outliers
from dnnlib.cli import add_options, blame
from training.config import OutlierConfig, RunConfig
from training.outlier_rule import MODES, OutlierRule

__all__ = ["outlier_options", "outlier_rule", "outlier_settings"]


# fmt: off
def outlier_options() -> Callable:
    """Return a decorator for --outliers, --drop_outliers and --outlier_data."""
    return add_options([
        click.option("--outliers", type=click.Choice(MODES),
                     help="Images that do not belong: learn them, leave them out, or learn each one only at noise "
                          "levels where nobody can tell it from the others  [default: keep]"),
        click.option("--drop_outliers", is_flag=True, help="The same as --outliers=drop"),
        click.option("--outlier_data", metavar="NPZ|CSV",
                     help="Label file of detect_noise.py that says which images do not belong  "
                          "[default: the archive's record]"),
    ])
# fmt: on


def outlier_settings(opts: dict[str, Any]) -> OutlierConfig | None:
    """Return what the options of `outlier_options` say; None to keep outliers."""
    mode = opts["outliers"]
    if opts["drop_outliers"]:
        if mode not in (None, "drop"):
            raise click.UsageError(f"--drop_outliers contradicts --outliers={mode}")
        mode = "drop"
    if mode in (None, "keep"):
        if opts["outlier_data"] is not None:
            raise click.UsageError("--outlier_data goes with --outliers=drop or ambient")
        return None
    return OutlierConfig(mode, opts["outlier_data"])


def outlier_rule(config: RunConfig, dataset: ImageDataset, device: torch.device) -> OutlierRule | None:
    """Return the rule for outliers; None to keep them."""
    section = config.outliers
    if section is None:
        return None
    flags = dataset.outliers
    if section.path is not None:
        with blame("--outlier_data"):
            flags = load_outliers(section.path, dataset)
    with blame(f"--outliers={section.mode}"):
        if flags is None:
            raise dnnlib.UserError(f"{dataset.path} has no record of outliers; name a label file that finds them")
        return OutlierRule(dataset, flags, section.mode, device)
