"""Find the wrong labels of an archive: a label file, a picture of the most suspicious images, a cleaned archive.

python detect_noise.py --data=datasets/digits_sym_40-8x8.zip --dest=digits-labels.npz
python detect_noise.py --data=datasets/mine-64x64.zip --dest=mine-labels.npz --cleaned=datasets/mine-clean-64x64.zip
torchrun --standalone --nproc_per_node=8 detect_noise.py --data=datasets/cifar10_sym_40-32x32.zip --dest=cifar10.npz
"""

from __future__ import annotations

import dnnlib.before_torch

import os

import click
import torch

import dnnlib
import dnnlib.cli
from archives.archive_set import SEVERAL
from archives.build import build_archive, clean_source
from archives.dataset import ImageDataset
from archives.label_file import LabelFile, save_label_file
from archives.sources import open_source
from archives.writer import check_destination, make_transform
from detection import classifier, confident, cores
from detection.quality import describe, save_picture
from detection.trainer import Settings
from dnnlib.cli import FloatRange, blame, output_file
from torch_utils import distributed, persistence
from torch_utils.precision import tf32
from training import options
from training.objectives.classifier import check_classifier
from training.presets import ARCHS

EPILOG = """
--method=cores trains a classifier on the images whose labels fit it (Cheng et al. 2021), and saves it beside the label
file. --method=confident is confident learning by the package cleanlab, on out-of-fold probabilities.

Example:
  python detect_noise.py --data=datasets/digits_sym_40-8x8.zip --dest=digits-labels.npz
"""


# fmt: off
@click.command(cls=dnnlib.cli.Command, epilog=EPILOG + options.preset_help("detect_noise.py"))
@click.option("--data", required=True, metavar="ZIP|DIR", help=f"Archive to examine. {SEVERAL}")
@options.preset_option("detect_noise.py")
@click.option("--dest", required=True, metavar="NPZ", callback=output_file, help="Label file to write")
@click.option("--method", type=click.Choice(["cores", "confident"]), default="cores", help="How to find wrong labels")
@click.option("--cls", metavar="PKL|DIR|URL", help="Decide by this snapshot of train_classifier.py; train nothing")
@click.option("--epochs", type=click.IntRange(min=1), metavar="INT",
              help="Length of training  [default: 60 for cores, 20 for each of the 5 classifiers of confident]")
@click.option("--arch", type=click.Choice(ARCHS), default="ddpmpp", help="Architecture of the classifier")
@click.option("--batch", type=click.IntRange(min=1), default=256, metavar="INT", help="Batch size over all processes")
@click.option("--lr", type=FloatRange(min=0, min_open=True), default=2e-3, metavar="FLOAT", help="Learning rate")
@click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), default=0, metavar="INT", help="Random seed")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", help="Where to train")
@click.option("--cleaned", metavar="ZIP|DIR", help="Also write an archive without the wrong labels")
@click.option("--fix", type=click.Choice(["relabel", "drop"]), default="relabel",
              help="How --cleaned treats wrong labels: replace them by the suggested ones, or leave the images out")
@click.option("--trust_pickle", is_flag=True,
              help="Run code that the snapshot contains; only for files you trust")
@click.option("--picture", metavar="PNG", callback=output_file,
              help="Picture of the most suspicious images  [default: beside --dest]")
# fmt: on
def main(data: str, dest: str, cls: str | None, method: str, cleaned: str | None, fix: str, picture: str | None,
         device: str, trust_pickle: bool, **training) -> None:
    """Find the wrong labels of an archive.

    For each image, the label file says whether its label is believed right, how probable it is, and which class the
    image probably has. The script prints the noise rates. Where the archive knows the clean labels, it also prints how
    good the detection was.
    """
    check_usage(set(dnnlib.cli.given_options()), dest, method, cls, training["batch"])
    if cleaned:
        with blame("--cleaned"):
            check_destination(cleaned)  # before the work
    click.get_current_context().call_on_close(distributed.shutdown)
    click.get_current_context().with_resource(tf32(False))
    device = distributed.init(device)
    dataset = ImageDataset(data)
    with blame("--data"):
        classifier.check_labels(dataset)
    net = None
    if cls:
        found = detect_by_snapshot(cls, trust_pickle, dataset, device)
    elif method == "cores":
        found, net = cores.detect(dataset, device, Settings(**training))
    else:
        found = confident.detect(dataset, device, Settings(**training))

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
            save_picture(written[-1], dataset, found)
        if cleaned:
            source = open_source(data)
            with blame(f"--fix={fix}"):
                clean_source(source, found, dataset.label_dim, fix)
            build_archive(source, cleaned, make_transform(None, None))
            written.append(cleaned)
        print(describe(dataset, found))
        print(f"Written to:  {', '.join(written)}")

    distributed.on_rank0(write)


def detect_by_snapshot(cls: str, trust_pickle: bool, dataset: ImageDataset, device: torch.device) -> LabelFile:
    """Return the label file that follows from the classifier of the snapshot that `cls` means."""
    with blame("--cls"):
        path = persistence.find_snapshot(cls)
        snapshot = persistence.load_snapshot(path, trust_pickle=trust_pickle, kind="classifier")
        check_classifier(snapshot["ema"], dataset, path)
    return classifier.detect(snapshot["ema"], snapshot["info"].get("posterior", "noisy"), dataset, device)


def check_usage(given: set[str], dest: str, method: str, cls: str | None, batch: int) -> None:
    """Raise click.UsageError when the options `given` contradict each other."""
    if not dest.lower().endswith(".npz"):
        raise click.BadParameter(f"{dest}: the name of a label file ends in .npz", param_hint="--dest")
    useless = given & {"--epochs", "--arch", "--batch", "--lr", "--seed"}
    if cls and useless:
        raise click.UsageError(f"--cls: nothing is trained with this option; leave out {sorted(useless)[0]}")
    if cls and method == "confident":
        raise click.UsageError("--cls: --method=confident needs classifiers that have not seen the labels they judge")
    if "--fix" in given and "--cleaned" not in given:
        raise click.UsageError("--fix needs --cleaned=X.zip")
    if batch % distributed.get_world_size():
        raise click.UsageError(f"--batch={batch} must be divisible by the number of processes "
                               f"({distributed.get_world_size()})")


if __name__ == "__main__":
    main()
