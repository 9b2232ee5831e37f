"""Where a training step's time goes, operator by operator, as torch.profiler sees it.

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

# The first group whose words an operator's name contains gets its time.
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
    """Each group's share of the operators' own times {name: time}."""
    found = dict.fromkeys(GROUPS, 0.0)
    for name, time in times.items():
        found[next(group for group, words in GROUPS.items() if any(word in name.lower() for word in words))] += time
    total = sum(found.values())
    return {group: time / total for group, time in found.items()}


def measure(form: str, args: list[str], count: int) -> dict[str, float]:
    """Own time of each operator in a step of `train.py ARGS` or its plain form: median of `count` steps after two."""
    profilers: list[profile] = []

    def turn(_answer: Any = None) -> bool:
        # Between two steps: what is profiled is all that happens from one to the next.
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
@click.option("--form", type=click.Choice(["ours", "plain"]), default="ours", help="train.py itself, or the plain form")
@click.option("--steps", "count", metavar="INT", type=click.IntRange(min=1), default=5, help="Steps; the median counts")
def main(form: str, count: int) -> None:
    click.echo(f"Own time of operators, share of a step, {form}, {torch.get_num_threads()} threads\n")
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
    """A line a group, a column a network and size."""
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
