"""Look at a set of labeled images that you do not know yet: what is wrong with it, and what to do.

It finds wrong labels, foreign images, duplicates and classes that are hard to tell apart. It writes report.html, a page
to look through the images and to decide about them, and beside it labels.npz, and labels.csv in cleanlab's columns.
"""

from __future__ import annotations

import dnnlib.before_torch

import os
import pathlib

import click

import dnnlib
import dnnlib.cli
from detection.inspection import look_for_foreign
from detection.options import check_usage, detect_options, find_wrong_labels, open_data, save_results, training_state
from dnnlib.cli import blame
from recipes.advice import advise, name_confusable
from reports.facts import gather_facts, summarize
from reports.review import write_review
from torch_utils import distributed
from torch_utils.distributed import print0
from training.options import preset_help

EPILOG = """
Examples:
  python inspect_data.py --data=datasets/mine-64x64.zip --outdir=check
  python inspect_data.py --data=datasets/mine-64x64.zip --outdir=check-again --labels=check/labels.npz
"""
# What a call writes, and replaces.
OWN = {"report.html", "labels.npz", "labels.csv", "labels-classifier.pkl", "labels-training.pt"}


@click.command(cls=dnnlib.cli.Command, help=__doc__, epilog=EPILOG + preset_help("detect_noise.py"))
@click.option("--outdir", required=True, metavar="DIR", help="Folder for the page and the label file")
@click.option(
    "--images", type=click.IntRange(min=1), default=2000, metavar="INT", help="At most this many images on the page"
)
@detect_options()
def main(**opts) -> None:
    o = dnnlib.EasyDict(opts)
    check_usage(set(dnnlib.cli.given_options()), o)
    with blame("--outdir"):
        check_outdir(o.outdir)
    dataset, device, features = open_data(o)
    print0(f"Step 1 of 3: {'read the label file' if o.labels else 'find wrong labels'}")
    labels, classifier = (os.path.join(o.outdir, name) for name in ("labels.npz", "labels-classifier.pkl"))
    found, snapshot = find_wrong_labels(o, dataset, device, labels, features)

    def write() -> None:
        lines = []
        if o.foreign:
            print(f"Step 2 of 3: find foreign images and duplicates among {len(dataset):,} images", flush=True)
            lines = look_for_foreign(dataset, found, o.seed, features)
        print("Step 3 of 3: write the page", flush=True)
        written = save_results(labels, dataset, found, snapshot, not (o.labels or o.cls))
        # A classifier beside the label file judges images by what that says only if it has judged these labels.
        own = os.path.isfile(classifier) and dnnlib.content_hash(classifier) == found.classifier
        advice, why = advise(dataset, found, o.data, labels, classifier if own else None)
        facts = gather_facts(dataset, found, name_confusable(dataset, found), advice, why)
        report = os.path.join(o.outdir, "report.html")
        write_review(report, dataset, found, facts, o.images)
        if not (o.labels or o.cls):
            pathlib.Path(training_state(labels)).unlink(missing_ok=True)
        print("\n".join([summarize(facts), *lines, f"Written to:  {', '.join([report, *written])}"]))

    distributed.on_rank0(write)


def check_outdir(outdir: str) -> None:
    """Raise UserError when nothing can be written there, or the folder holds files of others.

    Its own ones are those of an earlier call, and decisions about its page.
    """
    if os.path.lexists(outdir) and not os.path.isdir(outdir):
        raise dnnlib.UserError(f"{outdir}: is a file, expected a folder")
    if not dnnlib.cli.writable(outdir):
        raise dnnlib.UserError(f"{outdir}: cannot be written")
    for name in dnnlib.list_contents(outdir) if os.path.isdir(outdir) else []:
        mine = name in OWN or (name.startswith(".") and name.endswith(".tmp"))  # also what a killed call has left
        if not mine and not (name.startswith("decisions") and name.endswith(".csv")):
            raise dnnlib.UserError(f"{outdir}: holds {name}; choose an empty folder")


if __name__ == "__main__":
    main()
