"""Find the wrong labels of an archive: a label file, a picture of the most suspicious images, a cleaned archive.

python detect_noise.py --data=datasets/digits_sym_40-8x8.zip --dest=digits-labels.npz
python detect_noise.py --data=datasets/mine-64x64.zip --dest=mine-labels.npz --cleaned=datasets/mine-clean-64x64.zip
torchrun --standalone --nproc_per_node=8 detect_noise.py --data=datasets/cifar10_sym_40-32x32.zip --dest=cifar10.npz
"""

from __future__ import annotations

import dnnlib.before_torch

import os
import pathlib
from dataclasses import replace

import click
import numpy as np

import dnnlib
import dnnlib.cli
from archives.build import build_archive
from archives.decisions import Decisions, addresses, apply_to_labels, load_decisions
from archives.label_file import LabelFile
from archives.relabel import CONFIDENCE, FIXES, check_cleaned, clean_source
from archives.sources import Source, open_archive
from archives.writer import make_transform
from detection.inspection import look_for_foreign
from detection.options import check_usage, detect_options, find_wrong_labels, open_data, save_results, training_state
from detection.quality import describe, save_picture
from dnnlib.cli import FloatRange, blame, output_file
from torch_utils import distributed
from training.options import preset_help

EPILOG = """
--method=gce trains a classifier with a loss that wrong labels hardly move (Zhang & Sabuncu 2018), and stops when
held-out labels become no more likely. --method=cores is a sample sieve (Cheng et al. 2021). --method=confident is
confident learning by the package cleanlab, on out-of-fold probabilities. All end in Bayes' rule: the label counts as
evidence.

Examples:
  python detect_noise.py --data=datasets/digits_sym_40-8x8.zip --dest=digits-labels.npz
  python detect_noise.py --data=datasets/mine-64x64.zip --labels=check/labels.npz --decisions=decisions.csv \\
      --dest=reviewed.npz --cleaned=datasets/mine-clean-64x64.zip --fix=drop --drop_foreign
"""


# fmt: off
@click.command(cls=dnnlib.cli.Command, epilog=EPILOG + preset_help("detect_noise.py"))
@detect_options()
@click.option("--dest", required=True, metavar="NPZ", callback=output_file,
              help="Label file to write; the same as CSV in cleanlab's columns is written beside it")
@click.option("--decisions", metavar="CSV", help="Believe these decisions of the review page (inspect_data.py)")
@click.option("--cleaned", metavar="ZIP|DIR",
              help="Also write an archive without the wrong labels; it replaces one that was cleaned before")
@click.option("--fix", type=click.Choice(FIXES), default="relabel",
              help="How --cleaned treats wrong labels: replace them by the suggested ones, leave the images out, or "
              "keep them (only together with --drop_foreign)")
@click.option("--confidence", type=FloatRange(0.5, 1), default=CONFIDENCE, metavar="PROB",
              help="Relabel only where the suggested label is right with this probability")
@click.option("--unsure", type=click.Choice(["drop", "keep"]), default="drop",
              help="What becomes of the other images with wrong labels when --fix=relabel")
@click.option("--drop_foreign", is_flag=True, help="Leave foreign images out of --cleaned, too")
@click.option("--picture", metavar="PNG", callback=output_file,
              help="Picture of the most suspicious images  [default: beside --dest]")
# fmt: on
def main(**opts) -> None:
    """Find the wrong labels of an archive.

    For each image, the label file says whether its label is believed right, how probable it is, which class the image
    probably has, whether the image is foreign to all classes, and which image it doubles. The script prints the noise
    rates. Where the archive knows the clean labels, it also prints how good the detection was.
    """
    o = dnnlib.EasyDict(opts)
    check_options(set(dnnlib.cli.given_options()), o)
    dataset, device, features = open_data(o)
    if o.cleaned:
        with blame("--cleaned"):
            check_cleaned(o.cleaned, dataset.archives)  # before the work
    decisions = None
    if o.decisions:
        with blame("--decisions"):
            images = addresses(dataset.file_names, dataset.source_names)
            decisions = load_decisions(o.decisions, images, dataset.labels, dataset.class_names, dataset.label_dim)
    found, snapshot = find_wrong_labels(o, dataset, device, o.dest, features)

    def write() -> None:
        lines = look_for_foreign(dataset, found, o.seed, features) if o.foreign else []
        if o.drop_foreign and found.is_outlier is None:  # decisions know about some images only
            raise dnnlib.UserError("--drop_foreign: nobody has looked which images are foreign")
        judged = found if decisions is None else apply_to_labels(found, decisions)
        source = open_archive(o.data) if o.cleaned else None
        if source is not None:  # before anything is written: there may be nothing left
            lines.append(clean(source, judged, decisions, dataset.label_dim, o))
        picture = o.picture or f"{os.path.splitext(o.dest)[0]}.png"
        written = save_results(o.dest, dataset, judged, snapshot, not (o.labels or o.cls))
        if not judged.is_clean.all():
            written.append(picture)
            save_picture(picture, dataset, judged)
        elif not o.picture:  # an earlier one would show labels that are believed now
            pathlib.Path(picture).unlink(missing_ok=True)
        if source is not None:
            build_archive(source, o.cleaned, make_transform(None, None), overwrite=True)
            written.append(o.cleaned)
        print("\n".join([describe(dataset, judged), *lines]))
        if decisions is not None:
            kept, relabeled, dropped = (len(x) for x in (decisions.keep, decisions.relabel, decisions.drop))
            print(f"Decisions:   {kept:,} kept, {relabeled:,} relabeled, {dropped:,} dropped")
        if not (o.labels or o.cls):
            pathlib.Path(training_state(o.dest)).unlink(missing_ok=True)
        print(f"Written to:  {', '.join(written)}")

    distributed.on_rank0(write)


def clean(source: Source, found: LabelFile, decisions: Decisions | None, classes: int, o: dnnlib.EasyDict) -> str:
    """Correct the labels of a source, and say what it gains. What a person decided is done in any case."""
    drop_foreign, decided = o.drop_foreign, () if decisions is None else decisions.relabel
    if not drop_foreign and decisions is not None and len(decisions.drop):
        dropped = np.zeros(len(found.labels), dtype=bool)
        dropped[decisions.drop] = True
        found = replace(found, is_outlier=dropped)
        drop_foreign = True
    settings = dict(confidence=o.confidence, unsure=o.unsure, decided=decided)
    with blame(f"--fix={o.fix}"):
        c = clean_source(source, found, classes, o.fix, drop_foreign, **settings)
    text = f"Cleaned:     {c.relabeled:,} relabeled, {c.left_out:,} left out"
    if o.fix == "keep":
        return text
    text += f"; by estimate, {c.before:.1%} of the labels were right before and {c.after:.1%} are now"
    return text if c.after > c.before else f"{text}\nWarning: the cleaned labels are no better than before"


def check_options(given: set[str], o: dnnlib.EasyDict) -> None:
    """Raise click.UsageError when the options `given` contradict each other."""
    if not o.dest.lower().endswith(".npz"):
        raise click.BadParameter(f"{o.dest}: the name of a label file ends in .npz", param_hint="--dest")
    check_usage(given, o)
    for option in ("--fix", "--confidence", "--unsure", "--drop_foreign"):
        if option in given and not o.cleaned:
            raise click.UsageError(f"{option} needs --cleaned=X.zip")
    if o.fix != "relabel" and given & {"--confidence", "--unsure"}:
        raise click.UsageError(f"--fix={o.fix} relabels nothing: leave out --confidence and --unsure")
    if o.fix == "keep" and (not o.drop_foreign or o.decisions):
        raise click.UsageError("--fix=keep only leaves out foreign images: with --drop_foreign, without --decisions")
    if o.drop_foreign and not o.foreign and not o.labels:
        raise click.UsageError("--drop_foreign needs --foreign=1, or a label file that knows foreign images")


if __name__ == "__main__":
    main()
