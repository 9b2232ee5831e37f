"""Show what cleanscore does, on data that ships with scikit-learn: digits with 40% wrong labels.

It trains on clean labels (the oracle), on the labels as they are (the baseline) and on corrected labels, and with TDSM
and SBDC. It generates digits with each, and says which came closest to the oracle. --only=all adds DDGAN and RDUOT, on
photographs with 10% digits among them and the other way round; --only=rduot trains these alone.

It runs the commands that a user would run, and writes report.html, report.md and the pictures into --outdir. The same
command given again continues where the last one stopped.
"""

from __future__ import annotations

import dnnlib.before_torch

import click

import dataset_tool
import detect_noise
import dnnlib.cli
import fid
import generate
import sweep
import train
import train_classifier
import train_discriminator
import train_noise
import train_rduot
from dnnlib.cli import FloatRange, NameList
from recipes import digits, photos
from recipes.steps import Step, run_plan
from reports.page import Report

EXAMPLES = """
Examples:
  python quickstart.py --outdir=demo
  python quickstart.py --outdir=demo-asym --noise_type=asym --only=sbdc
  python quickstart.py --outdir=demo-rduot --only=rduot
"""

SCRIPTS = {
    "dataset_tool.py": dataset_tool,
    "train.py": train,
    "train_classifier.py": train_classifier,
    "train_noise.py": train_noise,
    "detect_noise.py": detect_noise,
    "train_discriminator.py": train_discriminator,
    "train_rduot.py": train_rduot,
    "generate.py": generate,
    "fid.py": fid,
    "sweep.py": sweep,
}
PARTS = (*digits.PARTS, "rduot")


@click.command(cls=dnnlib.cli.Command, help=__doc__, epilog=EXAMPLES)
@click.option("--outdir", metavar="DIR", required=True, help="Folder for everything that it makes")
@click.option(
    "--only",
    metavar="LIST",
    type=NameList(PARTS),
    default="posterior,tdsm,sbdc",
    help="Methods to compare with the baseline, or all",
)
@click.option("--noise_type", type=click.Choice(list(digits.NOISES)), default="sym", help="How labels become wrong")
@click.option(
    "--minutes",
    metavar="M",
    type=FloatRange(min=0.01),
    help="Aim for this duration on two cores with --jobs=2; scales all training lengths  "
    "[default: 25 for posterior, tdsm and sbdc together, 9 to 15 for one of them, half an hour more for rduot]",
)
@click.option(
    "--seed", metavar="INT", type=click.IntRange(min=0), default=0, help="Seed of the label noise and all training"
)
@click.option("--num", metavar="INT", type=click.IntRange(min=20), default=1000, help="Images per row of the table")
@click.option(
    "--jobs",
    metavar="INT",
    type=click.IntRange(min=1),
    default=1,
    help="Commands that run at the same time, each on its share of the cores",
)
def main(outdir: str, only: list[str], noise_type: str, minutes: float | None, seed: int, num: int, jobs: int) -> None:

    def plan(scale: float) -> list[Step]:
        steps = digits.plan(outdir, seed, scale, only, noise_type, num) if wrong_labels else []
        return steps + (photos.plan(outdir, seed, scale, num) if "rduot" in only else [])

    wrong_labels = bool(set(digits.PARTS) & set(only))
    if not wrong_labels and "--noise_type" in dnnlib.cli.given_options():
        raise click.UsageError("--noise_type: --only=rduot trains without labels; leave it out")
    scale = 1.0
    if minutes:  # images and tables take the same time however short the trainings are; these get a tenth at least
        fixed, whole = (sum(step.seconds for step in plan(length)) / 2 for length in (0.0, 1.0))
        scale = max(60 * minutes - fixed, 6 * minutes) / (whole - fixed)
    steps = plan(scale)
    seconds = run_plan(steps, SCRIPTS, outdir, jobs=jobs)
    sections = [digits.report(outdir, seed, only, seconds, noise_type, num)] if wrong_labels else []
    sections += photos.report(outdir, seed, seconds, num) if "rduot" in only else []
    html, _ = Report(sections, [f"python {step.command}" for step in steps]).write(outdir)
    for section in sections:
        click.echo("\n".join(["", *([section.finding, ""] if section.finding else []), *section.table()]))
    click.echo(f"\nReport: {html}")


if __name__ == "__main__":
    main()
