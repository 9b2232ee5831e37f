"""Measure how fast this code runs, and print a table.

Each row compares our code with a plain form of the same work. The two take turns, so other programs slow both. The row
also says how near our code comes to the limit of this machine. docs/performance.md explains the columns.

\b
  python -m benchmarks
  python -m benchmarks --only=training,tdsm --repeats=15 --threads=1
"""

from __future__ import annotations

import dnnlib.before_torch

import importlib
import os
import pkgutil
import time

import click
import torch
from tqdm import tqdm

import benchmarks
import dnnlib.cli
from benchmarks import table
from benchmarks.roofline import measure_peaks

# Each module here named TOPIC_rows is a topic. Its `rows(repeats)` yields Rows, its SECONDS says how long that takes.
TOPICS = {
    info.name.removesuffix("_rows"): importlib.import_module(f"benchmarks.{info.name}")
    for info in pkgutil.iter_modules(benchmarks.__path__)
    if info.name.endswith("_rows")
}
REPEATS, USUAL_SECONDS = 9, 60


class Topics(click.ParamType):
    """Option type: 'tdsm,training' becomes a list of topics in the order of the table."""

    name = "LIST"

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        unknown = [topic for topic in value.split(",") if topic not in TOPICS]
        if unknown:
            self.fail(f"'{unknown[0]}' is not one of {', '.join(TOPICS)}", param, ctx)
        return [topic for topic in TOPICS if topic in value.split(",")]


@click.command(cls=dnnlib.cli.Command, help=__doc__)
@click.option("--only", metavar="LIST", type=Topics(), default=",".join(TOPICS), help="Topics to measure")
@click.option(
    "--repeats",
    metavar="INT",
    type=click.IntRange(min=5),
    default=REPEATS,
    help="How many times to measure each form; the table shows the median",
)
@click.option(
    "--threads", metavar="INT", type=click.IntRange(min=1), help="Threads that PyTorch uses  [default: its own choice]"
)
@click.option(
    "--out",
    metavar="JSON",
    callback=dnnlib.cli.output_file,
    default=lambda: table.dated_file("cuda" if torch.cuda.is_available() else "cpu"),
    show_default=False,
    help="Where to save the table  [default: benchmarks/results/DATE-DEVICE.json]",
)
def main(only: list[str], repeats: int, threads: int | None, out: str) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes of the forms
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peaks = measure_peaks(device)
    machine = table.machine(device, peaks)
    click.echo(table.describe(machine))
    click.echo(table.HEAD)
    found, start = [], time.time()
    costs = {topic: getattr(TOPICS[topic], "SECONDS", USUAL_SECONDS) * (1 + repeats) / (1 + REPEATS) for topic in only}
    with tqdm(
        total=round(sum(costs.values())),
        bar_format="{desc} {percentage:3.0f}%, {remaining} left",
        position=1,
        leave=False,
        disable=None,
    ) as bar:
        for topic in only:
            bar.set_description(topic)
            for row in TOPICS[topic].rows(repeats):
                found.append(table.record(topic, row, peaks))
                tqdm.write(table.line(found[-1]))
            bar.update(round(costs[topic]))
    table.save(out, machine, found)
    click.echo(f"\nSaved to {out} after {dnnlib.format_time(time.time() - start)}.")


if __name__ == "__main__":
    main()
