"""Rows about training: steps of `train.py` with its defaults against the plain form, each in a process of its own."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator

from benchmarks.archives import write_archive
from benchmarks.core import FormProcess, Row, compare, processes

__all__ = ["rows", "step_row"]

SECONDS = 240
NETWORKS = {"ddpmpp_tiny": ["--arch=ddpmpp_tiny"], "ddpmpp --cbase=32": ["--arch=ddpmpp", "--cbase=32"]}
# Resolution: (images per step, steps per turn), chosen so that turns take about the same time
SIZES = {8: (128, 5), 16: (64, 2), 32: (16, 2)}


def turns_of(process: FormProcess, steps: int):
    """Return a form whose turn is `steps` turns of the process; it measures the seconds per step."""
    return lambda: statistics.mean(process() for _ in range(steps))


def step_row(
    name: str,
    script: str,
    args: list[str],
    plain_args: list[str],
    batch: int,
    repeats: int,
    *,
    steps: int = 1,
    precision: str = "fp32",
    note: str = "",
) -> Row:
    """Measure `script` with `args` against its plain form with `plain_args`, in turns of `steps` steps."""
    with tempfile.TemporaryDirectory() as folder:

        def form(kind: str, args: list[str]) -> tuple:
            return "benchmarks.steps", dict(form=kind, script=script, args=[f"--outdir={folder}", *args])

        with processes(ours=form("ours", args), plain=form("plain", plain_args)) as forms:
            facts = forms["plain"].facts
            seconds = compare({kind: turns_of(process, steps) for kind, process in forms.items()}, repeats, name)
    return Row(
        name,
        seconds["ours"],
        seconds["plain"],
        facts["flops"],
        facts["bytes"],
        note or f"batch {batch}, {facts['parameters'] / 1e6:.2f}M parameters",
        batch,
        precision,
    )


def rows(repeats: int) -> Iterator[Row]:
    """Measure both networks at three sizes, in float32 and bf16, without augmentation."""
    with tempfile.TemporaryDirectory() as folder:
        for network, network_args in NETWORKS.items():
            for resolution, (batch, steps) in SIZES.items():
                data = write_archive(os.path.join(folder, f"{resolution}.zip"), batch, 3, resolution, 10)
                args = [f"--data={data}", "--cond=1", f"--batch={batch}", "--augment=0", "--device=cpu", *network_args]
                for precision in ("fp32", "bf16"):  # The plain form is float32 in both rows.
                    name = f"training step, {network}, {resolution}x{resolution}"
                    yield step_row(
                        name if precision == "fp32" else f"{name}, --precision={precision}",
                        "train",
                        [*args, f"--precision={precision}"],
                        args,
                        batch,
                        repeats,
                        steps=steps,
                        precision=precision,
                    )
