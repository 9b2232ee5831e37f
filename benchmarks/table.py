"""The table of results: rows as plain data, as lines of text, and as a JSON file."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from typing import Any

import torch

import dnnlib
from benchmarks.core import Row
from benchmarks.roofline import Peaks, bound

__all__ = ["HEAD", "RESULTS", "dated_file", "describe", "line", "machine", "record", "save"]

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")  # tables from real machines, by date
COLUMNS = {
    "": "<62",
    "ours": ">9",
    "plain": ">9",
    "plain/ours": ">10",
    "images/s": ">9",
    "bound": ">9",
    "reached": ">7",
}
HEAD = "  ".join(f"{name:{form}}" for name, form in COLUMNS.items())


def dated_file(name: str) -> str:
    """Return the path `results/DATE-NAME.json`, with a number at the end if that file exists."""
    start = os.path.join(RESULTS, f"{datetime.date.today()}-{name}")
    names = [f"{start}.json", *(f"{start}-{i}.json" for i in range(2, 1000))]
    return next(name for name in names if not os.path.exists(name))


def machine(device: torch.device, peaks: Peaks) -> dict[str, Any]:
    """Return a description of this machine, as plain data."""
    return dict(
        date=str(datetime.date.today()),
        device=device.type,
        processor=_processor(device),
        cpus=os.cpu_count(),
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0],
        torch=torch.__version__,
        python=platform.python_version(),
        peak_flops=peaks.flops,
        bandwidth=peaks.bandwidth,
    )


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") if os.path.exists("/proc/cpuinfo") else open(os.devnull) as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe(machine: dict[str, Any]) -> str:
    """Return the description of a machine as two lines of text."""
    peaks = ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in machine["peak_flops"].items())
    return (
        f"{machine['processor']}, {machine['cpus']} CPUs, {machine['threads']} threads, load "
        f"{machine['load']:.1f}, torch {machine['torch']}, {machine['date']}\n"
        f"matrix product GFLOP/s: {peaks}; memory {machine['bandwidth'] / 1e9:,.0f} GB/s\n"
    )


def record(topic: str, row: Row, peaks: Peaks) -> dict[str, Any]:
    """Return a row as plain data, with `ratio`, `images_per_second`, `bound_seconds` and `reached` (None: unknown)."""
    limit = bound(row, peaks)
    return dict(
        topic=topic,
        **dataclasses.asdict(row),
        ratio=None if row.plain_seconds is None else row.plain_seconds / row.ours_seconds,
        images_per_second=None if row.images is None else row.images / row.ours_seconds,
        bound_seconds=limit,
        reached=None if limit is None else limit / row.ours_seconds,
    )


def line(record: dict[str, Any]) -> str:
    """Return a record as a line that fits under HEAD, with its note in the next line."""
    cells = [
        record["name"],
        _seconds(record["ours_seconds"]),
        _seconds(record["plain_seconds"]),
        _number(record["ratio"], ".2f"),
        _number(record["images_per_second"], ",.1f"),
        _seconds(record["bound_seconds"]),
        _number(record["reached"], ".0%"),
    ]
    text = "  ".join(f"{cell:{form}}" for cell, form in zip(cells, COLUMNS.values(), strict=True)).rstrip()
    return f"{text}\n    {record['note']}" if record["note"] else text


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def save(path: str, machine: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Write the table as JSON, {"machine": ..., "rows": [...]}. The file appears only when it is complete."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with dnnlib.atomic_open(path, "w") as file:
        json.dump(dict(machine=machine, rows=records), file, indent=1, allow_nan=False)
        file.write("\n")
