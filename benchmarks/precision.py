"""Check that bfloat16 trains like float32, and draw the losses.

Trains the digits three times: in float32 with two seeds, and in bfloat16 with the first seed. Fails if the smoothed
losses of bfloat16 and float32 differ by more than 1.5 times the difference between the seeds.

\b
  python -m benchmarks.precision
  python -m benchmarks.precision --steps=100 --plot=precision.png
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import tempfile

import click
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import dataset_tool
import dnnlib
import dnnlib.cli
import train
from benchmarks.table import RESULTS

__all__ = ["gap", "smooth"]

# How the three runs differ. Everything else is the same, including the random numbers of a seed.
RUNS = {
    "float32, seed 0": ["--precision=fp32", "--seed=0"],
    "float32, seed 1": ["--precision=fp32", "--seed=1"],
    "bf16, seed 0": ["--precision=bf16", "--seed=0"],
}
BATCH = 128
OPTIONS = [
    "--cond=1",
    "--arch=ddpmpp_tiny",
    f"--batch={BATCH}",
    "--augment=0",
    "--lr=3e-3",
    "--lr_rampup_kimg=2",
    "--ema=0.02",
    "--dropout=0",
    "--P_mean=-0.4",
    "--device=cpu",
    "--snap=1000000",
    "--dump=1000000",
    f"--tick={BATCH / 1000}",
]  # Each step is a tick, so stats.jsonl has the loss of every step.
ALLOWED = 1.5  # largest gap between the precisions, in multiples of the gap between the seeds
WINDOW = 25  # steps over which losses are averaged


def smooth(losses: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Return the means of all `window` consecutive losses: [N] -> [N-window+1]."""
    return np.convolve(losses, np.full(window, 1 / window), mode="valid")


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean distance of two smoothed curves, relative to their mean height."""
    return float(np.abs(a - b).mean() / ((a + b) / 2).mean())


def losses_of(script_args: list[str], run_dir: str) -> np.ndarray:
    """Run `train.py` with these options, and return the loss of every step [steps]."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        train.main([*script_args, f"--outdir={run_dir}", "--nosubdir"], standalone_mode=False)
    with open(os.path.join(run_dir, "stats.jsonl")) as file:
        return np.array([json.loads(line)["Loss/loss"]["mean"] for line in file])


def plot(curves: dict[str, np.ndarray], path: str) -> None:
    """Draw smoothed losses by step, as PNG or SVG according to the ending of the name."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for (name, curve), style in zip(curves.items(), ("-", "-", "--"), strict=True):
        axis.plot(np.arange(len(curve)) + WINDOW, curve, style, label=name, linewidth=1.2)
    axis.set(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with dnnlib.atomic_open(path) as file:
        figure.savefig(file, format=os.path.splitext(path)[1][1:], dpi=120)


def picture(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Callback of an option: check that the file name is that of a PNG or SVG that can be written."""
    if value is not None and not value.endswith((".png", ".svg")):
        raise click.BadParameter(f"{value}: must end in .png or .svg", param=param)
    return dnnlib.cli.output_file(ctx, param, value)


@click.command(cls=dnnlib.cli.Command, help=__doc__)
@click.option("--steps", metavar="INT", type=click.IntRange(min=2 * WINDOW), default=500, help="Length of each run")
@click.option(
    "--plot",
    "path",
    metavar="PNG|SVG",
    callback=picture,
    help="Where to draw the losses  [default: benchmarks/results/precision-DATE.png]",
)
def main(steps: int, path: str | None) -> None:
    path = path or os.path.join(RESULTS, f"precision-{datetime.date.today()}.png")
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        data = os.path.join(folder, "digits.zip")
        with contextlib.redirect_stdout(None):
            dataset_tool.main(["--source=digits", f"--dest={data}"], standalone_mode=False)
        options = [*OPTIONS, f"--data={data}", f"--duration={steps * BATCH / 1e6}"]
        for i, (name, args) in enumerate(tqdm(RUNS.items(), unit="run", leave=False, disable=None)):
            curves[name] = smooth(losses_of([*options, *args], os.path.join(folder, str(i))))
            click.echo(f"{name}: {curves[name][0]:.4g} after {WINDOW} steps, {curves[name][-1]:.4g} after {steps}")
    plot(curves, path)
    first, second, half = curves.values()
    of_seeds, of_precision = gap(first, second), gap(first, half)
    click.echo(
        f"Gap between two float32 seeds {of_seeds:.4f}, between bf16 and float32 {of_precision:.4f}: "
        f"{of_precision / of_seeds:.2f} times (limit {ALLOWED})\nPlot: {path}"
    )
    if of_precision > ALLOWED * of_seeds:
        raise dnnlib.UserError(
            f"bf16 trains differently from float32: the gap is {of_precision / of_seeds:.2f} times "
            f"the gap between two float32 seeds, more than {ALLOWED}"
        )


if __name__ == "__main__":
    main()
