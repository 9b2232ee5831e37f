"""Check a GPU and measure it, without a network: two parts of at most six minutes each.

The part `correct` compares the GPU with the CPU and with published numbers: PASS, FAIL or SKIP for each line. The part
`speed` measures training and sampling at the shape of CIFAR-10. docs/performance.md explains both.

\b
  python -m benchmarks.gpu
  python -m benchmarks.gpu --part=speed --out=a100
"""

from __future__ import annotations

import dnnlib.before_torch  # noqa: F401  (PyTorch reads once what it sets)

import json
import os
import threading
import time
from typing import Any

import click
import torch

import dnnlib
import dnnlib.cli
from benchmarks import table
from benchmarks.core import FormProcess
from benchmarks.gpu_lines import PARTS, Line, device_of, lines_of

__all__ = ["Report", "run_part"]

MINUTES = 6  # of a part
EXPLANATIONS = {
    "correct": "Distances are relative to the same work in float32 on the CPU.",
    "speed": "`reached` is the share of the least time that the measured peaks allow.",
}


class Report:
    """The results as they come, in a JSON file and a Markdown file."""

    def __init__(self, start: str):
        self.start, self.machine, self.lines = start, {}, []

    def add(self, part: str, result: dict[str, Any]) -> None:
        """Add the result of a line and write both files."""
        self.lines.append(dict(part=part, **result))
        os.makedirs(os.path.dirname(os.path.abspath(self.start)), exist_ok=True)
        with dnnlib.atomic_open(f"{self.start}.json", "w") as file:
            json.dump(dict(machine=self.machine, lines=self.lines), file, indent=1)
            file.write("\n")
        with dnnlib.atomic_open(f"{self.start}.md", "w") as file:
            file.write(self.markdown())

    def markdown(self) -> str:
        """Return the tables as Markdown."""
        text = [f"# GPU: {self.machine.get('processor', 'unknown')}\n", table.describe(self.machine)]
        for part in PARTS:
            of_part = [line for line in self.lines if line["part"] == part]
            if of_part:
                head = ("line", "result", "seconds", "found") if part == "correct" else _SPEED_HEAD
                text += [f"## {part.capitalize()}\n", f"{EXPLANATIONS[part]}\n", _row(head), _row(["---"] * len(head))]
                text += [_row(_cells(part, line)) for line in of_part] + [""]
        return "\n".join(text)


_SPEED_HEAD = ("line", "result", "ms", "images/s", "reached", "found")


def _cells(part: str, line: dict[str, Any]) -> list[str]:
    if part == "correct":
        return [line["name"], line["status"], f"{line['seconds']:.1f}", line["detail"]]
    row = line["row"]
    if row is None:
        return [line["name"], line["status"], "", "", "", line["detail"]]
    reached = "" if row["reached"] is None else f"{row['reached']:.0%}"
    rate = f"{row['images_per_second']:,.1f}"
    return [line["name"], line["status"], f"{row['ours_seconds'] * 1e3:,.1f}", rate, reached, row["note"]]


def _row(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def _limited(seconds: float, process: FormProcess) -> dict[str, Any]:
    """Let the process perform its next line, and end the process if that takes longer."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        return process()
    finally:
        timer.cancel()


def run_part(part: str, tiny: bool, report: Report, lines: list[Line], minutes: float = MINUTES) -> None:
    """Perform the lines of a part and report each one. A process that dies or takes too long is replaced."""
    process, end = None, time.monotonic() + 60 * minutes
    for number, line in enumerate(lines):
        left = end - time.monotonic()
        if left < 1:
            result = dict(status="SKIP", detail=f"no time is left of the {minutes:g} minutes", seconds=0.0)
        else:
            start, limit = time.monotonic(), min(line.seconds, left)
            try:
                if process is None:
                    process = FormProcess("benchmarks.gpu_process", dict(part=part, tiny=tiny, first=number))
                    report.machine = process.facts
                    start = time.monotonic()
                result = _limited(limit, process)
            except dnnlib.UserError as error:
                seconds, process = time.monotonic() - start, None
                late = f"took longer than {limit:.0f} seconds"
                why = late if seconds >= limit else error.format_message().rpartition("}")[2].strip()
                result = dict(status="FAIL", detail=why, seconds=round(seconds, 1))
        result = dict(name=line.name, row=None) | result
        report.add(part, result)
        click.echo("  ".join([f"{result['status']:<4}", f"{line.name:<44}", *_cells(part, result)[2:]]).rstrip())
    if process is not None:
        process.close()


def find_place(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    """Return the start of the paths of both files, and refuse one that cannot be written, before the measurement."""
    if value is None:
        value = table.dated_file("gpu-tiny" if ctx.params["tiny"] else "gpu").removesuffix(".json")
    for end in ("json", "md"):
        dnnlib.cli.output_file(ctx, param, value and f"{value}.{end}")
    return value


@click.command(cls=dnnlib.cli.Command, help=__doc__)
@click.option("--part", type=click.Choice([*PARTS, "all"]), default="all", help="What to do")
@click.option("--tiny", is_flag=True, help="Run on the CPU at a tiny size, to see that everything works")
@click.option(
    "--out",
    metavar="PATH",
    callback=find_place,
    help="Where to write PATH.json and PATH.md  [default: benchmarks/results/DATE-gpu]",
)
def main(part: str, tiny: bool, out: str) -> None:
    if not tiny and not torch.cuda.is_available():
        raise dnnlib.UserError("this machine has no CUDA device; --tiny runs everything on the CPU at a tiny size")
    report = Report(out)
    for name in PARTS if part == "all" else [part]:
        click.echo(f"\n{name.capitalize()} ({device_of(tiny)})")
        run_part(name, tiny, report, lines_of(name, tiny))
    statuses = [line["status"] for line in report.lines]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in ("PASS", "FAIL", "SKIP"))
    click.echo(f"\n{counts}. Saved to {report.start}.json and {report.start}.md.")
    if "FAIL" in statuses:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
