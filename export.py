"""Take a trained network elsewhere: to safetensors and back, to diffusers, TorchScript or ONNX, with a model card."""

from __future__ import annotations

import dnnlib.before_torch

import contextlib
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import click

import dnnlib
import dnnlib.cli
import sampling.loading  # noqa: F401  It registers all networks.
from dnnlib.cli import BOOL, blame
from reports.model_card import USES, model_card, read_noise_rate, read_results
from sampling.export.diffusers_folder import write_diffusers
from sampling.export.graph import write_onnx, write_torchscript
from sampling.sheet import save_samples
from torch_utils import checkpoint, persistence, portable
from training.published_ddgan import is_checkpoint

EPILOG = """
Formats:
  safetensors  model.safetensors and config.json. Every script takes the folder in place of a snapshot
  snapshot     a network-snapshot-*.pkl, from a folder of safetensors: the way back
  diffusers    for DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)
  torchscript  model.pt, the denoiser as a graph for torch.jit.load
  onnx         model.onnx; needs pip install onnx onnxscript onnxruntime

Examples:
  python export.py --network=training-runs/00000-digits-cond-ddpmpp_tiny-edm-gpus1-batch128-fp32 --dest=exported
  python export.py --network=network.pkl --dest=for-the-hub --format=diffusers --results=out.json --license=cc-by-4.0
  python export.py --network=exported --dest=back --format=snapshot
"""
PICTURED = ("denoiser", "generator")  # kinds of networks that make images
KINDS = (*PICTURED, "classifier", "discriminator", "potential")


def find_license(_ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Refuse what is not the name of a license, as the Hub spells it."""
    if not re.fullmatch(r"[\w.+-]+", value):
        raise click.BadParameter(f"{value!r}: expected a name such as apache-2.0 or cc-by-4.0", param=param)
    return value


# fmt: off
@click.command(cls=dnnlib.cli.Command, help=__doc__, epilog=EPILOG)
@click.option("--network", metavar="PKL|DIR|URL", required=True,
              help="Snapshot, its run directory, or a folder of safetensors")
@click.option("--dest", metavar="DIR", required=True, help="Folder to write")
@click.option("--format", "form", type=click.Choice(list(USES)), default="safetensors",
              help="What to write. All but safetensors and snapshot are for denoisers")
@click.option("--sheet", type=BOOL, default=True,
              help="Put a sheet of samples beside it: that of the run, else a new one of up to 80 images")
@click.option("--results", metavar="JSON", help="File of fid.py evaluate --out: the model card shows its table")
@click.option("--label-path", metavar="NPZ",
              help="Label file of the training data: the card states the noise that was found")
@click.option("--license", metavar="NAME", default="unknown", callback=find_license,
              help="License of the weights, for the card: apache-2.0, cc-by-4.0, ...")
# fmt: on
def main(**opts: Any) -> None:
    o = dnnlib.EasyDict(opts)
    start, whole = time.time(), o.form in ("safetensors", "snapshot")
    with blame("--network"):
        path = persistence.find_snapshot(o.network)
        if is_checkpoint(path):
            raise dnnlib.UserError(f"{path}: is a published generator, which export.py does not take")
        snapshot = persistence.load_snapshot(path, kind=KINDS if whole else "denoiser")
        checkpoint.warn_if_older(path, snapshot["ema"])
    facts = {}
    with blame("--results"):
        facts["results"] = o.results and read_results(o.results)
    with blame("--label-path"):
        facts["noise_rate"] = o.label_path and read_noise_rate(o.label_path)
    if o.sheet and snapshot["ema"].network_kind in PICTURED and snapshot["ema"].img_channels in (1, 3):
        facts["sheet"] = "samples.png"
    with blame("--network"):  # before the work
        card = model_card(os.path.basename(os.path.abspath(o.dest)), snapshot, o.form, license=o.license, **facts)
    with contextlib.ExitStack() as stack:
        with blame("--dest"):
            folder = stack.enter_context(dnnlib.atomic_folder(o.dest))
        with blame(f"--format={o.form}"):
            lines = write(snapshot, folder, o.form)
        if "sheet" in facts:
            draw(snapshot, path, folder / facts["sheet"])
        (folder / "README.md").write_text(card, encoding="utf-8")
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        sizes = [f"{file.relative_to(folder)} {describe_size(file.stat().st_size)}" for file in files]
    seconds = time.time() - start
    click.echo("\n".join([*lines, f"Written to {o.dest} in {seconds:.1f} s: {', '.join(sizes)}"]))


def write(snapshot: dict[str, Any], folder: Path, form: str) -> list[str]:
    """Write the network into a folder. Return what there is to say about it, as lines."""
    net, info = snapshot["ema"], snapshot["info"]
    if form == "safetensors":
        portable.write(folder, net, {key: value for key, value in snapshot.items() if key != "ema"})
    elif form == "snapshot":
        nimg = info.get("nimg")
        kimg = nimg // 1000 if isinstance(nimg, int) else 0
        persistence.save_snapshot(folder / f"network-snapshot-{kimg:06d}.pkl", snapshot)
    elif form == "diffusers":
        write_diffusers(net, folder, info.get("class_names"))
    else:
        difference = (write_onnx if form == "onnx" else write_torchscript)(net, folder)
        return [f"The graph gives what the network gives, to {difference:.0e} at most"]
    return []


def draw(snapshot: dict[str, Any], path: str, dest: Path) -> None:
    """Write a sheet of samples: a copy of that beside the snapshot `path`, else a new one."""
    folder, name = os.path.split(path)
    number = re.fullmatch(r"network-snapshot-(\d+)\.pkl", name)
    beside = os.path.join(folder, f"samples-{number[1]}.png" if number else dest.name)
    if (number or name == portable.WEIGHTS) and os.path.isfile(beside):
        shutil.copyfile(beside, dest)
    else:
        save_samples(snapshot["ema"], str(dest), snapshot["info"].get("class_names"))


def describe_size(size: int) -> str:
    """Return a size in bytes in words."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


if __name__ == "__main__":
    main()
