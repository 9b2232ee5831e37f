"""The main job on data that ships with a dependency: digits with 40% wrong labels in, right digits out, one table.

Runs the scripts that a user would run, and writes report.html, report.md and the pictures into --outdir. The same
command again goes on where the last one stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import time
from dataclasses import asdict, dataclass

import click

import dataset_tool
import dnnlib.cli
import fid
import generate
import train
import train_classifier
import train_noise
from dnnlib.cli import FloatRange
from metrics.comparison import Method, compare_methods

EXAMPLES = "Example:\n  python quickstart.py --outdir=demo"

SCRIPTS = {"dataset_tool.py": dataset_tool, "train.py": train, "train_classifier.py": train_classifier,
           "train_noise.py": train_noise, "generate.py": generate, "fid.py": fid}
METHODS = {"baseline": "baseline: labels as they are", "tdsm": "TDSM"}
TRAINING = {"baseline": ["baseline"], "tdsm": ["classifier", "tdsm"]}   # what each method trains
DEFAULT_MINUTES = 8.0


@dataclass
class Step:
    """One command of the plan, and about how many seconds it takes on two cores."""

    name: str
    title: str
    seconds: float
    command: str


def plan(outdir: str, seed: int, minutes: float) -> list[Step]:
    """All commands in order. Training lengths are in images, scaled by `minutes` over the default."""
    clean, noisy = f"{outdir}/datasets/digits.zip", f"{outdir}/datasets/digits_sym40.zip"

    def training(script: str, name: str, kimg: float, rest: str) -> str:
        kimg *= minutes / DEFAULT_MINUTES
        return (f"{script} --outdir={outdir}/{name} --nosubdir --data={noisy} --cond=1 --arch=ddpmpp_tiny --augment=0"
                f" {rest} --duration={kimg / 1000:.6f} --tick={kimg / 20:.4f} --dump=5 --seed={seed}"
                " --resume=latest")

    # Higher noise levels decide about the class at 8x8 than at 32x32: --P_mean. A classifier of few images stays unsure
    # where it could be certain, and T's large diagonal multiplies its doubt: --temp.
    unet = "--P_mean=-0.4 --batch=128 --lr=3e-3 --lr_rampup_kimg=2 --ema=0.02 --dropout=0 --snap=10"
    resnet = ("--noise_type=sym --noise_rate=0.4 --P_mean=-0.4 --batch=256 --lr=2e-3 --lr_rampup_kimg=10 --ema=0.01"
              " --dropout=0.5 --snap=1")
    steps = [
        Step("clean", "archive of 1,797 digits", 2, f"dataset_tool.py --source=digits --dest={clean}"),
        Step("noisy", "the same with 40% of the labels wrong", 2,
             f"dataset_tool.py --source=digits --dest={noisy} --noise_type=sym --noise_rate=0.4 --seed={seed}"),
        Step("baseline", "train the baseline", 75, training("train.py", "baseline", 150, unet)),
        Step("classifier", "train TDSM's classifier", 35, training("train_classifier.py", "classifier", 200, resnet)),
        Step("tdsm", "train TDSM", 270,
             training("train_noise.py", "tdsm", 280, f"{unet} --cls={outdir}/classifier --temp=0.5")),
    ]
    for name, title in METHODS.items():
        images, table = f"{outdir}/images/{name}.zip", f"{outdir}/tables/{name}.json"
        steps += [
            Step(f"{name}-images", f"make 1,000 images ({title})", 8,
                 f"generate.py --network={outdir}/{name} --outdir={images} --class=0-9 --seeds=0-999 --batch=250"),
            Step(f"{name}-table", "evaluate them", 2,
                 f"fid.py evaluate --images={images} --data={clean} --detector=pixels --out={table}")]
    return steps


@click.command(cls=dnnlib.cli.Command, help=__doc__, epilog=EXAMPLES)
@click.option("--outdir", metavar="DIR", required=True, help="Where everything goes")
@click.option("--minutes", metavar="M", type=FloatRange(min=0.01), default=DEFAULT_MINUTES,
              help="Aim for this duration on two cores; scales all training lengths")
@click.option("--seed", metavar="INT", type=click.IntRange(min=0), default=0,
              help="Seed of the label noise and all training")
def main(outdir: str, minutes: float, seed: int) -> None:
    steps = plan(outdir, seed, minutes)
    journal = Journal(os.path.join(outdir, "quickstart.json"), [asdict(step) for step in steps])
    remaining, spent, expected = sum(step.seconds for step in steps), 0.0, 0.0
    for i, step in enumerate(steps):
        if step.name not in journal.seconds:
            pace = spent / expected if expected > 60 else minutes / DEFAULT_MINUTES
            click.echo(f"[{i + 1}/{len(steps)}] {step.title:<50s} about {dnnlib.format_time(remaining * pace)} left")
            start = time.time()
            run(step, os.path.join(outdir, "logs", f"{step.name}.txt"))
            journal.add(step.name, time.time() - start)
            spent, expected = spent + journal.seconds[step.name], expected + step.seconds
        remaining -= step.seconds
    t = journal.seconds
    methods = [Method(title, {run: f"{outdir}/{run}" for run in TRAINING[name]}, f"{outdir}/images/{name}.zip",
                      f"{outdir}/tables/{name}.json", sum(t[run] for run in TRAINING[name]), t[f"{name}-images"])
               for name, title in METHODS.items()]
    html, markdown = compare_methods(
        outdir, "cleanscore: digits with 40% wrong labels",
        "A class-conditional diffusion model is trained on 1,797 digits, four in ten of them with a wrong label. "
        "Does it make the digit that it is asked for?", f"{outdir}/datasets/digits_sym40.zip", methods,
        [f"Each row: 1,000 images, 100 a class, seeds 0 to 999, 18 steps. Training seed {seed}. "
         "The training time of TDSM includes its classifier's.",
         "FD: Frechet distance of pixels in [-1,1] to the whole clean archive; class-wise: the mean over classes."],
        [f"python {step.command}" for step in steps])
    with open(markdown) as f:
        click.echo("\n" + "".join(line for line in f if line.startswith("|")))
    click.echo(f"Report: {html}")


class Journal:
    """Which steps are done and how long each took, on disk, so that a second call goes on."""

    def __init__(self, path: str, steps: list[dict]):
        self.path, self.steps, self.seconds = path, steps, {}
        folder = os.path.dirname(path)
        if os.path.exists(path):
            with open(path) as f:
                known = json.load(f)
            if known["steps"] != steps:
                raise dnnlib.UserError(f"--outdir: {folder} holds a run with other options; choose another folder")
            self.seconds = known["seconds"]
        elif os.path.isdir(folder) and os.listdir(folder):
            raise dnnlib.UserError(f"--outdir: {folder} is not empty and no quickstart's; choose another folder")

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = seconds
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with dnnlib.atomic_open(self.path, "w") as f:
            json.dump(dict(steps=self.steps, seconds=self.seconds), f, indent=1)


def run(step: Step, log: str) -> None:
    """Call the script's own main; what it prints goes to `log`, its progress bar to the screen."""
    script, *args = shlex.split(step.command)
    os.makedirs(os.path.dirname(log), exist_ok=True)
    with open(log, "a") as f, contextlib.redirect_stdout(f):
        SCRIPTS[script].main(args, standalone_mode=False)


if __name__ == "__main__":
    main()
