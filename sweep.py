"""Find the weight of a discriminator: measure label accuracy and FD for each weight, constant and calibrated.

The script writes sweep.png, sweep.md and sweep.json into --outdir. The same command continues an interrupted sweep.
Without clean labels, the judge learns the labels that the detector is surest of, and the table says what that means.
"""

from __future__ import annotations

import dnnlib.before_torch

import functools
import itertools
import os
import pathlib
from collections.abc import Callable

import click
import torch

import dnnlib
from dnnlib.cli import Command, blame
from metrics.options import evaluate_files
from metrics.sure_labels import JudgeLabels, choose_judge_labels
from reports.tradeoff import write_tradeoff
from sampling.generation import generate_images
from sampling.loading import DEFAULT_WEIGHTS, TrainedDiscriminator, guide, load_denoiser, load_discriminator
from sampling.options import check_guidance, gate, sweep_options
from sampling.output import progress, save_images
from sampling.samplers import choose_sampler
from sampling.sweep_results import SweepResults
from torch_utils import distributed
from torch_utils.distributed import print0
from torch_utils.precision import tf32

EXAMPLES = """
Examples:
  python sweep.py --network='training-runs/00000-*' --discriminator='discriminator-runs/00000-*' \\
      --data=datasets/digits.zip --detector=pixels --outdir=sweep
  torchrun --standalone --nproc_per_node=8 sweep.py --network=network.pkl --discriminator=discriminator.pkl \\
      --data=datasets/cifar10-32x32.zip --detector=classifier.pkl --seeds=0-9999 --weights=0.5,1,2,3 --outdir=sweep
"""


@click.command(cls=Command, help=__doc__, epilog=EXAMPLES)
@sweep_options
def main(**opts) -> None:
    o = dnnlib.EasyDict(opts)
    check_guidance(o, "modes")
    o.seeds = list(dict.fromkeys(o.seeds))
    try:
        with tf32(False):
            run(o, distributed.init(o.device))
    finally:
        distributed.shutdown()


def run(o: dnnlib.EasyDict, device: torch.device) -> None:
    """Measure every setting that is not known yet, then write table and plot. Collective."""
    kept = {k: v for k, v in o.items() if k not in ("outdir", "batch", "device", "modes", "weights", "trust_pickle")}
    with blame("--outdir"):
        results = distributed.together(lambda: SweepResults(o.outdir, kept), rank0_first=True)
    modes = [*DEFAULT_WEIGHTS] if o.modes == "both" else [o.modes]
    settings = [("unguided", 0.0), *itertools.product(modes, o.weights)]
    missing = [setting for setting in settings if name_of(*setting) not in results.values]
    if missing:
        networks, names, discriminator = distributed.together(lambda: load(o, device, missing), rank0_first=True)
        judge = distributed.together(lambda: choose_judge(o, discriminator), rank0_first=True)
        results.judge_by(judge.labels, judge.note)
        print0(judge.note)
    for setting in missing:
        name = name_of(*setting)
        print0(f"[{settings.index(setting) + 1}/{len(settings)}] {name}")
        images = os.path.join(o.outdir, "images", f"{name}.zip")
        # An interrupted sweep may have left images of this setting, without their result.
        distributed.on_rank0(functools.partial(pathlib.Path(images).unlink, missing_ok=True))
        generate(o, device, networks[setting], names, images)
        found = measure(o, device, images, judge)
        distributed.on_rank0(functools.partial(results.add, name, found))
    if distributed.get_rank() == 0:
        table = write_tradeoff(o.outdir, settings, results.values, results.note)
        print("\n".join(table) + f"\nWritten to: {o.outdir}")


def name_of(mode: str, weight: float) -> str:
    """Return the name of a setting in files."""
    return f"{mode}-{weight:g}"


def load(
    o: dnnlib.EasyDict, device: torch.device, settings: list[tuple[str, float]]
) -> tuple[dict[tuple[str, float], Callable], list[str] | None, TrainedDiscriminator]:
    """Return the denoiser of each setting, class names or None, and the discriminator; weight 0 is no guidance."""
    with blame("--network"):
        net, class_names = load_denoiser(o.network, device, trust_pickle=o.trust_pickle)
        if not net.label_dim:
            raise dnnlib.UserError(f"{o.network}: was trained without labels, so there are none to correct")
    with blame("--discriminator"):
        given = dict(class_names=class_names, trust_pickle=o.trust_pickle)
        discriminator = load_discriminator(o.discriminator, device, **given)
        form = dict(gate=gate(o), noise_rate=o.noise_rate)
        networks = {
            (mode, weight): guide(net, discriminator, device, mode=mode, weights=(weight, weight), **form)
            if weight
            else net
            for mode, weight in settings
        }
    return networks, class_names, discriminator


def choose_judge(o: dnnlib.EasyDict, discriminator: TrainedDiscriminator) -> JudgeLabels:
    """Return what the judge learns from."""
    with blame("--data" if o.label_path is None else "--label-path"):
        return choose_judge_labels(o.data, o.label_path, discriminator.label_path, o.judge)


def generate(o: dnnlib.EasyDict, device: torch.device, net: Callable, class_names: list[str] | None, path: str) -> None:
    """Write the images of one setting to `path`. Collective."""
    own = [o.seeds[i] for i in distributed.share(len(o.seeds))]
    classes = [seed % net.label_dim for seed in own]
    sampler = choose_sampler(net, num_steps=o.num_steps)
    batches = generate_images(net, own, device=device, class_idx=classes, batch=o.batch, sampler=sampler)
    save_images(progress(batches, len(o.seeds)), path, False, class_names)


def measure(o: dnnlib.EasyDict, device: torch.device, images: str, judge: JudgeLabels) -> dict:
    """Return label accuracy and FD of one setting; an empty dict on all processes but rank 0. Collective."""
    options = dict(data=o.data, detector=o.detector, judge=o.judge, outlier_data=judge.outlier_data)
    found = evaluate_files([images], device, judge.labels, **options)
    values = {name: found[0]["metrics"][name] for name in ("label_accuracy", "fid")} if found else {}
    if None in values.values():
        raise dnnlib.UserError(f"--data={o.data}: gives no label accuracy or no FD: {found[0]['notes']}")
    return values


if __name__ == "__main__":
    main()
