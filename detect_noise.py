"""Find the wrong labels of an archive: a label file, a picture of the most suspicious images, a cleaned archive.

python detect_noise.py --data=datasets/digits_sym_40-8x8.zip --dest=digits-labels.npz
python detect_noise.py --data=datasets/mine-64x64.zip --dest=mine-labels.npz --cleaned=datasets/mine-clean-64x64.zip
torchrun --standalone --nproc_per_node=8 detect_noise.py --data=datasets/cifar10_sym_40-32x32.zip --dest=cifar10.npz
"""

from __future__ import annotations

import os

import click
import numpy as np

import dnnlib
import dnnlib.cli
from archives.build import build_archive, clean_source
from archives.dataset import ImageDataset
from archives.label_file import LabelFile, save_label_file
from archives.sources import open_source
from archives.writer import check_destination, make_transform
from detection import cores
from dnnlib.cli import FloatRange, output_file
from sampling.grid import save_grid
from torch_utils import distributed, persistence
from training.objectives.tdsm import check_classifier
from training.presets import ARCHS

EPILOG = """
--method=cores: a classifier trained on the images whose labels fit it (Cheng et al. 2021); saved beside the label file.
--method=confident: confident learning by the package cleanlab, on out-of-fold probabilities.

Example:
  python detect_noise.py --data=datasets/digits_sym_40-8x8.zip --dest=digits-labels.npz
"""
PICTURE = 64  # images in the picture


# fmt: off
@click.command(cls=dnnlib.cli.Command, epilog=EPILOG)
@click.option("--data", required=True, metavar="ZIP|DIR", help="Archive to examine")
@click.option("--dest", required=True, metavar="NPZ", callback=output_file, help="Label file to write")
@click.option("--method", type=click.Choice(["cores", "confident"]), default="cores", help="How wrong labels are found")
@click.option("--cls", metavar="PKL|DIR|URL", help="Decide by this snapshot of train_classifier.py instead of training")
@click.option("--epochs", type=click.IntRange(min=1), metavar="INT",
              help="Length of training  [default: cores 60; confident 20 for each of 5 parts]")
@click.option("--arch", type=click.Choice(ARCHS), default="ddpmpp", help="Architecture of the classifier")
@click.option("--batch", type=click.IntRange(min=1), default=256, metavar="INT", help="Batch size over all processes")
@click.option("--lr", type=FloatRange(min=0, min_open=True), default=2e-3, metavar="FLOAT", help="Learning rate")
@click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), default=0, metavar="INT", help="Random seed")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", help="Where to train")
@click.option("--cleaned", metavar="ZIP|DIR", help="Write an archive without the wrong labels")
@click.option("--fix", type=click.Choice(["relabel", "drop"]), default="relabel",
              help="In --cleaned: give them the suggested label, or leave the images out")
@click.option("--trust_pickle", is_flag=True,
              help="Run code that the snapshot contains; for files you trust only")
@click.option("--picture", metavar="PNG", callback=output_file,
              help="Picture of the most suspicious images  [default: beside --dest]")
@click.pass_context
# fmt: on
def main(ctx: click.Context, data: str, dest: str, cls: str | None, method: str, cleaned: str | None, fix: str,
         picture: str | None, device: str, trust_pickle: bool, **training) -> None:
    """Find the wrong labels of a data set.

    Writes for each image whether its label is believed right, with what probability, and the class it probably has.
    Prints the noise rates and, where the archive knows the clean labels, how good the detection was.
    """
    given = {name for name in ctx.params if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE}
    check_usage(given, dest, method, cls, training["batch"])
    if cleaned:
        check_destination(cleaned)  # before the work
    ctx.call_on_close(distributed.shutdown)
    device = distributed.init(device)
    dataset = ImageDataset(data)
    net = None
    if cls:
        path = persistence.find_snapshot(cls)
        snapshot = persistence.load_snapshot(path, trust_pickle=trust_pickle, kind="classifier")
        check_classifier(snapshot["ema"], dataset, path)
        found = cores.from_classifier(snapshot["ema"], snapshot["info"], dataset, device)
    elif method == "cores":
        found, net = cores.cores(dataset, device, cores.Settings(**training))
    else:
        found = cores.confident(dataset, device, cores.Settings(**training))

    def write() -> None:
        stem = os.path.splitext(dest)[0]
        for path in (dest, picture or dest):
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        save_label_file(dest, found)
        written = [dest]
        if net is not None:
            written.append(f"{stem}-classifier.pkl")
            persistence.save_snapshot(written[-1], dict(
                ema=net, loss_fn=None, augment_pipe=None, dataset_kwargs=dataset.kwargs(),
                info=dict(method="detector", posterior="clean", class_names=dataset.class_names,
                          version=dnnlib.__version__)))
        if not found.is_clean.all():
            written.append(picture or f"{stem}.png")
            draw(dataset, found, written[-1])
        if cleaned:
            source = open_source(data)
            clean_source(source, found, dataset.label_dim, fix)
            build_archive(source, cleaned, make_transform(None, None))
            written.append(cleaned)
        print(cores.describe(dataset, found))
        print(f"Written to:  {', '.join(written)}")

    distributed.together(lambda: write() if distributed.get_rank() == 0 else None)


def check_usage(given: set[str], dest: str, method: str, cls: str | None, batch: int) -> None:
    """Options that exclude each other; click.UsageError."""
    if not dest.lower().endswith(".npz"):
        raise click.BadParameter(f"{dest}: the name of a label file ends in .npz", param_hint="--dest")
    useless = given & {"epochs", "arch", "batch", "lr", "seed"}
    if cls and useless:
        raise click.UsageError(f"--cls: nothing is trained then; leave out --{sorted(useless)[0]}")
    if cls and method == "confident":
        raise click.UsageError("--cls: --method=confident needs classifiers that have not seen the labels they judge")
    if "fix" in given and "cleaned" not in given:
        raise click.UsageError("--fix needs --cleaned=X.zip")
    if batch % distributed.get_world_size():
        raise click.UsageError(f"--batch={batch} must be divisible by the number of processes "
                               f"({distributed.get_world_size()})")


def draw(dataset: ImageDataset, found: LabelFile, path: str) -> None:
    """The images whose labels are the most surely wrong, with 'observed > suggested' below."""
    names = dataset.class_names or [str(i) for i in range(dataset.label_dim)]
    wrong = np.flatnonzero(~found.is_clean)
    worst = wrong[np.argsort(found.score[wrong], kind="stable")][:PICTURE]
    captions = [f"{names[found.labels[i]]} > {names[found.suggested[i]]}" for i in worst]
    if max(map(len, captions)) > 9:  # wider than a small image
        captions = [text.replace(" > ", "\n> ") for text in captions]
    save_grid(dataset.images(worst).permute(0, 2, 3, 1).numpy(), path, captions=captions)


if __name__ == "__main__":
    main()
