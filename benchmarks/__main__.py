"""Print one table of what our code takes against the plain form, measured alternately in one run, and how near that is
to what this machine allows.

\b
  python -m benchmarks
  python -m benchmarks --only=training,tdsm --repeats=15 --threads=1
"""

from __future__ import annotations

import datetime
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
from benchmarks.table import RESULTS

# A topic is a module here called TOPIC_rows: `rows(repeats)` yields its Rows, SECONDS is about what it takes.
TOPICS = {
    info.name.removesuffix("_rows"): importlib.import_module(f"benchmarks.{info.name}")
    for info in pkgutil.iter_modules(benchmarks.__path__)
    if info.name.endswith("_rows")
}
REPEATS, USUAL_SECONDS = 9, 60


class Topics(click.ParamType):
    """'tdsm,training' -> list of topics."""

    name = "LIST"

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        unknown = [topic for topic in value.split(",") if topic not in TOPICS]
        if unknown:
            self.fail(f"'{unknown[0]}' is not one of {', '.join(TOPICS)}", param, ctx)
        return [topic for topic in TOPICS if topic in value.split(",")]


def dated_file(device: torch.device) -> str:
    """`results/DATE-DEVICE.json`, with a number where that is taken."""
    start = os.path.join(RESULTS, f"{datetime.date.today()}-{device.type}")
    names = [f"{start}.json", *(f"{start}-{i}.json" for i in range(2, 1000))]
    return next(name for name in names if not os.path.exists(name))


@click.command(cls=dnnlib.cli.Command, help=__doc__)
@click.option("--only", metavar="LIST", type=Topics(), default=",".join(TOPICS), help="Topics to measure")
@click.option(
    "--repeats",
    metavar="INT",
    type=click.IntRange(min=5),
    default=REPEATS,
    help="Turns each form takes; the median counts",
)
@click.option(
    "--threads", metavar="INT", type=click.IntRange(min=1), help="Threads of PyTorch  [default: its own choice]"
)
@click.option(
    "--out",
    metavar="JSON",
    callback=dnnlib.cli.output_file,
    help="Where to save the table and the machine  [default: benchmarks/results/DATE-DEVICE.json]",
)
def main(only: list[str], repeats: int, threads: int | None, out: str | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that forms get
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
    out = out or dated_file(device)
    table.save(out, machine, found)
    click.echo(f"\nSaved to {out} after {dnnlib.format_time(time.time() - start)}.")


if __name__ == "__main__":
    main()
