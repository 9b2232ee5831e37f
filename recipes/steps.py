"""Plans: commands of the scripts in order, run one after the other and remembered on disk."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click

import dnnlib
import dnnlib.cli
from reports.comparison import Method
from torch_utils import safe_files

__all__ = ["Row", "Step", "evaluation", "finished", "run_plan"]


@dataclass
class Step:
    """One command of a plan."""

    name: str  # of its log
    title: str  # on the screen
    seconds: float  # about how long it takes on two cores
    command: str  # script and options


@dataclass
class Row:
    """A method of a table."""

    name: str  # of its files
    title: str  # on the page
    training: Sequence[str]  # the steps that train what it needs
    sampling: str  # options of generate.py


def evaluation(outdir: str, row: Row, num: int, data: str, options: str = "") -> list[Step]:
    """List the steps that make `num` images of a method and measure them against `data`.

    `options`: further options of generate.py, with a blank at the end.
    """
    images, table = f"{outdir}/images/{row.name}.zip", f"{outdir}/tables/{row.name}.json"
    return [
        Step(
            f"{row.name}-images",
            f"make {num:,} images ({row.title})",
            8,
            f"generate.py {row.sampling} --outdir={images} {options}--seeds=0-{num - 1} --batch=250",
        ),
        Step(
            f"{row.name}-table",
            "evaluate them",
            2,
            f"fid.py evaluate --images={images} --data={data} --detector=pixels --bootstrap=200 --out={table}",
        ),
    ]


def finished(outdir: str, rows: Sequence[Row], seconds: Mapping[str, float]) -> list[Method]:
    """Return the rows as methods to compare, given the `seconds` that each step took."""
    return [
        Method(
            row.title,
            {name: f"{outdir}/{name}" for name in row.training if os.path.exists(f"{outdir}/{name}/stats.jsonl")},
            f"{outdir}/images/{row.name}.zip",
            f"{outdir}/tables/{row.name}.json",
            sum(seconds[name] for name in row.training),
            seconds[f"{row.name}-images"],
        )
        for row in rows
    ]


def run_plan(steps: Sequence[Step], scripts: Mapping[str, Any], outdir: str, pace: float) -> dict[str, float]:
    """Run all steps that have not run yet, and return the seconds that each took.

    `scripts`: name -> module with a click command `main`. Their output goes to `outdir`/logs, their progress bars to
    the screen. `pace`: expected duration divided by the planned one, for the first estimates of the time left.
    UserError: `outdir` holds something else.
    """
    with dnnlib.cli.blame("--outdir"):
        journal = Journal(os.path.join(outdir, "quickstart.json"), [asdict(step) for step in steps])
    remaining, spent, expected = sum(step.seconds for step in steps), 0.0, 0.0
    for i, step in enumerate(steps):
        if step.name not in journal.seconds:
            left = remaining * (spent / expected if expected > 60 else pace)
            click.echo(f"[{i + 1}/{len(steps)}] {step.title:<50s} about {dnnlib.format_time(left)} left")
            start = time.time()
            run_step(step, scripts, os.path.join(outdir, "logs", f"{step.name}.txt"))
            journal.add(step.name, time.time() - start)
            spent, expected = spent + journal.seconds[step.name], expected + step.seconds
        remaining -= step.seconds
    return journal.seconds


def run_step(step: Step, scripts: Mapping[str, Any], log: str) -> None:
    """Call the script's main in this process, with its output in the file `log`."""
    script, *args = shlex.split(step.command)
    os.makedirs(os.path.dirname(log), exist_ok=True)
    with open(log, "a") as f, contextlib.redirect_stdout(f):
        scripts[script].main(args, standalone_mode=False)


class Journal:
    """Records on disk which steps are done and how long each took, so that a second call continues."""

    def __init__(self, path: str, steps: list[dict]):
        self.path, self.steps, self.seconds = path, steps, {}
        folder = os.path.dirname(path)
        if os.path.exists(path):
            known = safe_files.load_json(dnnlib.read_bytes(path), path)
            if not isinstance(known, dict) or known.get("steps") != steps:
                raise dnnlib.UserError(f"{folder} holds a run with other options; choose another folder")
            self.seconds = known["seconds"]
        elif os.path.isdir(folder) and os.listdir(folder):
            raise dnnlib.UserError(f"{folder} holds files that are not of a quickstart; choose another folder")

    def add(self, name: str, seconds: float) -> None:
        """Record that a step is done."""
        self.seconds[name] = seconds
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with dnnlib.atomic_open(self.path, "w") as f:
            json.dump(dict(steps=self.steps, seconds=self.seconds), f, indent=1)
