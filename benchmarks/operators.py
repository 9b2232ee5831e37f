"""Profile training steps and print how much time each group of operators takes.

\b
  python -m benchmarks.operators
  python -m benchmarks.operators --form=plain --steps=10
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import click
import torch
from torch.profiler import ProfilerActivity, profile

import dnnlib.cli
from benchmarks import steps
from benchmarks.archives import write_archive
from benchmarks.training_rows import NETWORKS, SIZES

__all__ = ["GROUPS", "shares"]

# An operator belongs to the first group that has a word of its name.
GROUPS = {
    "convolution": ("conv",),
    "matrix product, attention": ("mm", "attention", "einsum", "linear"),
    "group norm": ("group_norm", "norm"),
    "SiLU": ("silu",),
    "dropout": ("dropout", "bernoulli", "rand"),
    "Adam, EMA, gradients": ("adam", "foreach", "lerp", "nan_to_num", "isfinite"),
    "copies, concatenation": ("copy", "cat", "clone", "contiguous"),
    "everything else": ("",),
}


def shares(times: dict[str, float]) -> dict[str, float]:
    """Return the share of each group in the operators' own times {name: time}."""
    found = dict.fromkeys(GROUPS, 0.0)
    for name, time in times.items():
        found[next(group for group, words in GROUPS.items() if any(word in name.lower() for word in words))] += time
    total = sum(found.values())
    return {group: time / total for group, time in found.items()}


def measure(form: str, args: list[str], count: int) -> dict[str, float]:
    """Return the own time of each operator in a step of `train.py ARGS` or of its plain form.

    It is the median of `count` steps, after two that do not count.
    """
    profilers: list[profile] = []

    def turn(_answer: Any = None) -> bool:
        # This runs between two steps, so a profile covers everything from one step to the next.
        if profilers:
            profilers[-1].stop()
        profilers.append(profile(activities=[ProfilerActivity.CPU]))
        going = len(profilers) <= 2 + count
        if going:
            profilers[-1].start()
        return going

    def serve(step: Callable[[], None], _facts: Any) -> None:
        while turn():
            step()

    with contextlib.suppress(SystemExit), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        if form == "plain":
            steps.plain("train", args, serve)
        else:
            steps.ours("train", args, turn)
    averages = [profiler.key_averages() for profiler in profilers[2:-1]]
    found = [{event.key: event.self_cpu_time_total for event in events} for events in averages]
    return {key: statistics.median(times.get(key, 0.0) for times in found) for key in set().union(*found)}


@click.command(cls=dnnlib.cli.Command, help=__doc__)
@click.option("--form", type=click.Choice(["ours", "plain"]), default="ours", help="train.py itself, or its plain form")
@click.option(
    "--steps",
    "count",
    metavar="INT",
    type=click.IntRange(min=1),
    default=5,
    help="How many steps to profile; the table shows the median",
)
def main(form: str, count: int) -> None:
    click.echo(f"Share of a step that operators take ({form}, {torch.get_num_threads()} threads)\n")
    columns = {}
    with tempfile.TemporaryDirectory() as folder:
        for network, network_args in NETWORKS.items():
            for resolution, (batch, _) in SIZES.items():
                data = write_archive(os.path.join(folder, f"{network}{resolution}.zip"), batch, 3, resolution, 10)
                columns[f"{network}, {resolution}x{resolution}"] = shares(
                    measure(
                        form,
                        [
                            f"--outdir={folder}",
                            f"--data={data}",
                            "--cond=1",
                            f"--batch={batch}",
                            "--augment=0",
                            "--device=cpu",
                            *network_args,
                        ],
                        count,
                    )
                )
    click.echo("\n".join(markdown(columns)))


def markdown(columns: dict[str, dict[str, float]]) -> list[str]:
    """Return a Markdown table with a line for each group and a column for each network and size."""
    head = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    return [
        *head,
        *(
            f"| {group} | " + " | ".join(f"{column[group]:.0%}" for column in columns.values()) + " |"
            for group in GROUPS
        ),
    ]


if __name__ == "__main__":
    main()
