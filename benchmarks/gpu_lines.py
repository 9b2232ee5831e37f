"""Lines of `python -m benchmarks.gpu`: what they are, and how one becomes a result."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.core import Row

__all__ = ["PARTS", "Line", "Skip", "Wrong", "device_of", "lines_of", "perform"]

PARTS = {"correct": "benchmarks.gpu_correct", "speed": "benchmarks.gpu_speed"}


class Wrong(Exception):
    """What a line found wrong."""


class Skip(Exception):
    """Why a line does not apply here."""


@dataclass(frozen=True)
class Line:
    """One line of the table: what it is called, its work, and the seconds it may take."""

    name: str
    work: Callable[[], str | Row]
    seconds: int


def device_of(tiny: bool) -> torch.device:
    """Return the device that the lines are about."""
    return torch.device("cpu" if tiny else "cuda")


def lines_of(part: str, tiny: bool) -> list[Line]:
    """Return the lines of one of PARTS."""
    return list(importlib.import_module(PARTS[part]).lines(device_of(tiny), tiny))


def perform(line: Line) -> dict[str, Any]:
    """Do the work of a line and return its result as plain data; a line that fails does not raise."""
    start, row = time.perf_counter(), None
    try:
        found, status = line.work(), "PASS"
        row, detail = (found, "") if isinstance(found, Row) else (None, found)
    except Skip as reason:
        status, detail = "SKIP", str(reason)
    except Wrong as reason:
        status, detail = "FAIL", str(reason)
    except Exception as error:  # whatever it is, the other lines follow
        status, detail = "FAIL", f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    result = dict(name=line.name, status=status, detail=detail, seconds=round(time.perf_counter() - start, 2))
    return result | dict(row=row)
