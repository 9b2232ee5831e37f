"""Protocols: how published papers measure, as settings of an evaluation. docs/metrics.md names their sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PROTOCOLS", "Protocol", "describe_protocol"]


@dataclass(frozen=True)
class Protocol:
    """What a paper chooses, and what it reports."""

    settings: Mapping[str, int]  # fields of EvaluationSettings
    reports: str  # the metrics of its tables, as they are called here
    source: str


PROTOCOLS = {
    "edm": Protocol(
        dict(num=50000),
        "fid",
        "Karras et al., NeurIPS 2022, and its fid.py: 50,000 images against the training set",
    ),
    "tdsm": Protocol(
        dict(num=50000, nearest_k=3, splits=5000),
        "fid, is, density, coverage, and their means over classes",
        "Na et al., ICLR 2024; density and coverage of Naeem et al., 2020; IS in 10 splits as Salimans et al., 2016",
    ),
    "sbdc": Protocol(
        dict(num=50000, nearest_k=3, splits=5000),
        "fid, is, sfid, precision, recall, density, coverage, and their means over classes",
        "Nguyen Cong et al., ICCV 2025; IS in 10 splits as Salimans et al., 2016; sFID as Nash et al., 2021",
    ),
    "rduot": Protocol(
        dict(num=50000, nearest_k=3),
        "fid, recall, and ppl_full and ppl_end of fid.py ppl",
        "Dao et al., ECCV 2024, after DDGAN (Xiao et al., ICLR 2022): recall with k = 3 of Kynkaanniemi et al., 2019",
    ),
}


def describe_protocol(name: str, used: Mapping[str, Any]) -> str:
    """Say what a protocol chooses and reports, by which source, and which of its choices `used` settings change."""
    protocol = PROTOCOLS[name]
    chosen = ", ".join(f"{key} = {value:,}" for key, value in protocol.settings.items())
    changed = [f"{key} = {used[key]}" for key, value in protocol.settings.items() if used[key] != value]
    but = f", but here {', '.join(changed)}" if changed else ""
    return f"{name}: {chosen}{but}; reports {protocol.reports} ({protocol.source})"
