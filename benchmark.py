"""Compare all methods for wrong labels on Fashion-MNIST, by the commands that a user would run.

It trains a judge, finds the wrong labels, trains with each method, makes images and measures them against the test
images, what matters most first. The same command given again continues where the last one stopped. With other --rows
or another --setting it adds to what is there. With --merge it runs nothing, and writes one page from several runs.
"""

from __future__ import annotations

import dnnlib.before_torch

import os

import click

import dnnlib.cli
from archives.layouts.mnist import open_mnist
from archives.source import Choice
from dnnlib.cli import FloatRange, NameList
from quickstart import SCRIPTS
from recipes import fashion, fashion_tables
from recipes.steps import read_journal, run_plan
from torch_utils import persistence

EXAMPLES = """
Examples:
  python benchmark.py --outdir=benchmark --jobs=2
  python benchmark.py --outdir=benchmark-others --setting=sym80,asym40,instance40 --judge=benchmark/judge
  python benchmark.py --outdir=benchmark-seed1 --seed=1 --rows=oracle,posterior,relabel
  python benchmark.py --outdir=benchmark-gpu --resolution=32 --rows=oracle,baseline,posterior,tdsm
  python benchmark.py --outdir=all --merge=benchmark,benchmark-others,benchmark-seed1
"""


# fmt: off
@click.command(cls=dnnlib.cli.Command, help=__doc__, epilog=EXAMPLES)
@click.option("--outdir", metavar="DIR", required=True, help="Folder for everything that it makes")
@click.option("--source", metavar="DIR", default=fashion.SOURCE,
              help="Fashion-MNIST's files; Debian has them in the package dataset-fashion-mnist")
@click.option("--setting", metavar="LIST", type=NameList(fashion.SETTINGS), default="sym40",
              help=f"Kinds of label noise: {', '.join(fashion.SETTINGS)}, or all")
@click.option("--rows", metavar="LIST", type=NameList(fashion.ROWS), default="all",
              help=f"Rows of the table: {', '.join(fashion.ROWS)}")
@click.option("--resolution", type=click.Choice([str(side) for side in fashion.SIZES]), default="16",
              help="Side of the images: 16 for a CPU, 32 for a GPU")
@click.option("--seed", metavar="INT", type=click.IntRange(min=0), default=0,
              help="Seed of the label noise and all training")
@click.option("--num", metavar="INT", type=click.IntRange(min=20), default=2000, help="Images per row")
@click.option("--scale", metavar="FLOAT", type=FloatRange(min=0, min_open=True, max=1000), default=1.0,
              help="Multiplies all training lengths")
@click.option("--judge", metavar="PKL|DIR",
              help="Classifier that judges and gives the features  [default: one is trained on the clean labels]")
@click.option("--jobs", metavar="INT", type=click.IntRange(min=1), default=1,
              help="Commands that run at the same time, each on its share of the cores: 2 for two cores")
@click.option("--merge", metavar="LIST",
              help="Folders of runs, or the results.json in them, separated by commas: write one page from them into "
              "--outdir, run nothing. If two have the same row and seed, the first one counts")
# fmt: on
def main(
    outdir: str, setting: list[str], rows: list[str], resolution: str, jobs: int, merge: str | None, **options
) -> None:
    if merge is not None:
        useless = [option for option in dnnlib.cli.given_options() if option not in ("--outdir", "--merge")]
        if useless:
            raise click.UsageError(f"{useless[0]}: --merge runs nothing; leave it out")
        with dnnlib.cli.blame("--outdir"):
            fashion_tables.check_page(outdir)
        with dnnlib.cli.blame("--merge"):
            results = [result for folder in merge.split(",") for result in fashion_tables.load(folder)]
            page = fashion_tables.write(outdir, results)
        click.echo(f"Tables: {page}")
        return
    options["resolution"] = int(resolution)
    if options["judge"]:
        with dnnlib.cli.blame("--judge"):
            check_judge(options["judge"], options["resolution"])  # before the work
    if not os.path.exists(os.path.join(outdir, "datasets", "clean.zip")):  # before anything is written
        with dnnlib.cli.blame("--source"):
            for test in (False, True):
                open_mnist(options["source"], Choice(test=test))
    steps = fashion.plan(outdir, setting, rows, **options)
    about = dict(settings=setting, rows=rows, recipe=fashion.recipe(options["resolution"])) | options
    run_plan(steps, SCRIPTS, outdir, about, jobs)
    journal = read_journal(outdir)
    commands = [f"python {step['command']}" for step in journal["steps"] if step["name"] in journal["seconds"]]
    page = fashion_tables.write(outdir, fashion_tables.load(outdir), commands)
    click.echo(f"Tables: {page}")


def check_judge(path: str, side: int) -> None:
    """Raise UserError unless a classifier takes gray images of this side and knows as many classes as there are."""
    net = persistence.load_snapshot(persistence.find_snapshot(path), kind="classifier")["ema"]
    found = net.img_resolution, net.img_channels, net.label_dim
    if found != (side, 1, fashion_tables.CLASSES):
        raise dnnlib.UserError(
            f"{path}: takes {found[0]}x{found[0]} images with {found[1]} channels and knows {found[2]} classes; "
            f"here they are {side}x{side} images with 1 channel, in {fashion_tables.CLASSES} classes"
        )


if __name__ == "__main__":
    main()
