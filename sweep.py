"""How much guidance? Label accuracy against FD for a list of weights of the discriminator, constant and calibrated.

Writes sweep.png, sweep.md and sweep.json into --outdir; the same command again goes on where the last one stopped.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable

import click
import torch

import dnnlib
from dnnlib.cli import FLOAT_LIST, INT_LIST, Command, FloatRange
from metrics import table
from reports.page import above, markdown_table, tradeoff
from sampling.generation import generate_images, share_of
from sampling.options import DEFAULT_WEIGHTS, choose_sampler, guided, load_denoiser, load_discriminator
from sampling.output import check_free, progress, save_images
from torch_utils import distributed, safe_files
from torch_utils.distributed import print0

EXAMPLES = """
Examples:
  python sweep.py --network=training-runs/00000 --discriminator=discriminator-runs/00000 --data=datasets/digits.zip \\
      --detector=pixels --outdir=sweep
  torchrun --standalone --nproc_per_node=8 sweep.py --network=network.pkl --discriminator=discriminator.pkl \\
      --data=datasets/cifar10-32x32.zip --detector=classifier.pkl --seeds=0-9999 --weights=0.5,1,2,3 --outdir=sweep
"""
COLUMNS = ["mode", "weight", "label accuracy", "FD", "FD / unguided"]


# fmt: off
@click.command(cls=Command, help=__doc__, epilog=EXAMPLES)
@click.option("--network", metavar="PKL|DIR|URL", required=True, help="Snapshot of a denoiser, or its run directory")
@click.option("--discriminator", metavar="PKL|DIR|URL", required=True, help="Snapshot of train_discriminator.py")
@click.option("--data", metavar="PATH", required=True, help="Reference archive, with clean labels for its judge")
@click.option("--detector", metavar="NAME", required=True, help="As in fid.py evaluate")
@click.option("--outdir", metavar="DIR", required=True, help="Where plot, table and images go")
@click.option("--weights", metavar="LIST", type=FLOAT_LIST, default="0.2,0.5,1,1.5,2,3", help="Weights of both orders")
@click.option("--modes", type=click.Choice([*DEFAULT_WEIGHTS, "both"]), default="both", help="Which --dg_mode")
@click.option("--seeds", metavar="LIST", type=INT_LIST, default="0-999", help="Random seeds; classes take turns")
@click.option("--batch", metavar="INT", type=click.IntRange(min=1), default=250, help="Images at a time on a process")
@click.option("--steps", "num_steps", metavar="INT", type=click.IntRange(min=1), default=18, help="Sampling steps")
@click.option("--S_clip_min", "S_clip_min", metavar="SIGMA", type=FloatRange(min=0), help="Correct from this sigma on")
@click.option("--S_clip_max", "S_clip_max", metavar="SIGMA", type=FloatRange(min=0), help="Correct up to this sigma")
@click.option("--noise_rate", metavar="R", type=FloatRange(min=0, max=1), help="Share of wrong labels, calibrated mode "
              "[default: each class's own, from the label file]")
@click.option("--judge", metavar="svm|PKL", default="svm", help="As in fid.py evaluate")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", help="Where to run")
@click.option("--trust_pickle", is_flag=True, help="Run code that a snapshot contains; for files you trust only")
# fmt: on
def main(**opts) -> None:
    o = dnnlib.EasyDict(opts)
    try:
        run(o, distributed.init(o.device))
    finally:
        distributed.shutdown()


def run(o: dnnlib.EasyDict, device: torch.device) -> None:
    path = os.path.join(o.outdir, "sweep.json")
    kept = {k: v for k, v in o.items() if k not in ("outdir", "batch", "device", "modes", "weights", "trust_pickle")}
    results = distributed.together(lambda: known_results(path, kept), rank0_first=True)
    modes = [*DEFAULT_WEIGHTS] if o.modes == "both" else [o.modes]
    settings = [("unguided", 0.0), *itertools.product(modes, o.weights)]
    networks = None
    if {f"{mode}-{weight:g}" for mode, weight in settings} - results.keys():
        networks = distributed.together(lambda: load_networks(o, device), rank0_first=True)
    for i, (mode, weight) in enumerate(settings):
        name = f"{mode}-{weight:g}"
        if name not in results:
            print0(f"[{i + 1}/{len(settings)}] {name}")
            results[name] = measure(o, device, networks, mode, weight, os.path.join(o.outdir, "images", f"{name}.zip"))
            if distributed.get_rank() == 0:
                with dnnlib.atomic_open(path, "wt") as f:
                    json.dump(dict(options=kept, results=results), f, indent=1)
    if distributed.get_rank() == 0:
        write(o.outdir, settings, results)


def known_results(path: str, options: dict) -> dict:
    """What an earlier call of the same sweep measured."""
    if not os.path.exists(path):
        check_free(os.path.dirname(path))
        return {}
    known = safe_files.load_json(dnnlib.read_bytes(path), path)
    if not isinstance(known, dict) or {"options", "results"} - known.keys():
        raise dnnlib.UserError(f"--outdir: {path} is not of a sweep; choose another folder")
    if known["options"] != options:
        raise dnnlib.UserError(f"--outdir: {path} is of a sweep with other options; choose another folder")
    return known["results"]


def load_networks(o: dnnlib.EasyDict, device: torch.device) -> tuple[Callable, dict, list[str] | None]:
    """Denoiser, discriminator's snapshot, class names."""
    net, _, names = load_denoiser(o, device)
    if not net.label_dim:
        raise dnnlib.UserError(f"--network={o.network}: was trained without labels, there are none to correct")
    return net, load_discriminator(o, device), names


def measure(o: dnnlib.EasyDict, device: torch.device, networks: tuple, mode: str, weight: float, images: str) -> dict:
    """Label accuracy and FD of one setting; collective. Weight 0: without guidance."""
    net, discriminator, names = networks
    distributed.together(lambda: discard(images) if distributed.get_rank() == 0 else None)
    if weight:
        setting = dnnlib.EasyDict(o, dg_mode=mode, dg_weight_1st_order=weight, dg_weight_2nd_order=weight)
        net = distributed.together(lambda: guided(net, discriminator, setting, device))
    own = share_of(o.seeds, distributed.get_rank(), distributed.get_world_size())
    batches = generate_images(net, own, device=device, class_idx=[s % net.label_dim for s in own], batch=o.batch,
                              sampler=choose_sampler(o, net))
    save_images(progress(batches, len(o.seeds)), images, False, names)
    found = table.evaluate([images], o.data, o.detector, device=device, judge=o.judge)
    values = {name: found[0]["metrics"][name] for name in ("label_accuracy", "fid")} if found else {}
    if None in values.values():
        raise dnnlib.UserError(f"--data={o.data}: label accuracy and FD cannot be had from it: {found[0]['notes']}")
    return values


def discard(path: str) -> None:
    """Images of a setting that was interrupted before it was measured."""
    if os.path.exists(path):
        os.remove(path)


def write(outdir: str, settings: list[tuple[str, float]], results: dict) -> None:
    """Table and plot."""
    rows, curves = [], {}
    base = results["unguided-0"]
    for mode, weight in settings:
        found = results[f"{mode}-{weight:g}"]
        rows.append([mode, f"{weight:g}", f"{found['label_accuracy']:.3f}", f"{found['fid']:.4g}",
                     f"{found['fid'] / base['fid']:.2f}"])
        if weight:
            curves.setdefault(mode, []).append((weight, found["fid"], found["label_accuracy"]))
    lines = markdown_table(COLUMNS, rows)
    if {"calibrated", "constant"} <= curves.keys():
        lines += ["", above(curves, (base["fid"], base["label_accuracy"]), "calibrated", "constant")]
    with dnnlib.atomic_open(os.path.join(outdir, "sweep.md"), "wt") as f:
        f.write("\n".join(lines) + "\n")
    tradeoff(curves, (base["fid"], base["label_accuracy"]), os.path.join(outdir, "sweep.png"))
    print("\n".join(lines) + f"\nWritten to: {outdir}")


if __name__ == "__main__":
    main()
