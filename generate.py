"""Make images with a trained diffusion model, one per seed, and write the class of each into dataset.json."""

from __future__ import annotations

import dnnlib.before_torch

import functools
import time

import click
import torch

import dnnlib
from dnnlib.cli import Command, blame
from dnnlib.signals import ENDING, catching, exit_in_order
from sampling.evaluations import EvaluationMeter, Stopwatch, report, start_over, uncounted
from sampling.generation import generate_images
from sampling.guidance import AffineGuidance, ClassifierFreeGuidance
from sampling.loading import guide, load_denoiser, load_discriminator
from sampling.options import (
    PUBLISHED_SETTINGS,
    check_network,
    check_precision,
    check_usage,
    find_classes,
    gate,
    generate_options,
    sampler_settings,
)
from sampling.output import Batches, check_free, progress, save_images, save_sheet
from sampling.rejection import LabelJudge, Rejection
from sampling.resume import Asked, check_others, find_earlier
from sampling.samplers import choose_sampler
from sampling.trajectory import Trajectories
from torch_utils import distributed
from torch_utils.distributed import print0

EXAMPLES = """
Examples:
  python generate.py --network=training-runs/00000-digits-cond-ddpmpp_tiny-edm-gpus1-batch128-fp32 --outdir=out
  python generate.py --network=network.pkl --outdir=threes.zip --class=3 --seeds=0-999 --grid=threes.png
  python generate.py --network=network.pkl --outdir=right --discriminator=discriminator.pkl
  torchrun --standalone --nproc_per_node=2 generate.py --network=network.pkl --outdir=out --seeds=0-49999 --batch=64
"""


@click.command(cls=Command, help=__doc__, epilog=EXAMPLES)
@generate_options
def main(**opts) -> None:
    o = dnnlib.EasyDict(opts)
    check_usage(o)
    try:
        run(o, distributed.init(o.device))
    finally:
        distributed.shutdown()


def run(o: dnnlib.EasyDict, device: torch.device) -> None:
    """Load, guide, choose the sampler, generate, save. Collective."""
    check_precision(o.precision, device)
    net, class_names, meter, correcting = distributed.together(lambda: load(o, device), rank0_first=True)
    sampler = choose_sampler(net, **sampler_settings(o))
    if o.trajectory and isinstance(net, Rejection):
        instead = "leave it out" if isinstance(net.discriminator, LabelJudge) else "add --dg_mode=calibrated"
        raise click.UsageError(f"--trajectory: rejection draws an image several times; {instead}")
    trajectories = Trajectories(o.trajectory) if o.trajectory else None
    sampler = sampler if trajectories is None else trajectories.record(sampler)
    seeds = missing = list(dict.fromkeys(o.seeds))

    def make(some: list[int]) -> Batches:
        classes = o.classes and [o.classes[seed % len(o.classes)] for seed in some]
        form = dict(batch=o.batch, sampler=sampler, same_shape=o.compile)
        return generate_images(net, some, device=device, class_idx=classes, **form)

    earlier, asked = None, Asked(o.subdirs, net, device, o.classes, make)
    if o.resume:
        with blame("--outdir"):
            earlier = find_earlier(o.outdir, asked)
        there = set(earlier.seeds)
        missing = [seed for seed in seeds if seed not in there]
        print0(f"{len(seeds) - len(missing)} of {len(seeds)} images are there already")
    own = [missing[i] for i in distributed.share(len(missing))]
    if o.classes and class_names:
        print0(f"Classes: {', '.join(f'{class_names[c]} ({c})' for c in dict.fromkeys(o.classes))}")
    print0(f"Generating {len(missing)} images to {o.outdir}")

    start_over(meter, correcting, net)  # the images that --resume made again do not count
    start = time.time()
    try:
        with catching(exit_in_order, *ENDING):
            batches = progress(make(own), len(missing))
            batches = batches if trajectories is None else trajectories.watch(batches)
            folder, listed = (earlier.folder, earlier.listed) if earlier else (o.outdir, ())
            order = functools.partial(earlier.list_all, seeds) if earlier else None
            check = uncounted(functools.partial(check_others, folder, asked), meter, correcting, net)
            save_images(batches, folder, o.subdirs, class_names, order, check, listed)
            if earlier:
                distributed.on_rank0(earlier.pack)
    except (KeyboardInterrupt, SystemExit):
        print0("Interrupted: " + ("the same command goes on" if o.resume else "with --resume, the images would stay"))
        raise
    seconds = time.time() - start
    if trajectories is not None:
        trajectories.save()
    if o.grid is not None:
        distributed.on_rank0(lambda: save_sheet(o.grid, o.outdir, seeds, o.subdirs))
    report(len(missing), seconds, meter, correcting, net)


def load(o: dnnlib.EasyDict, device: torch.device) -> tuple:
    """Return what generates the images, and what measures it: network with guidance, class names, meter, stopwatch.

    The meter counts evaluations of the networks. The stopwatch runs while a discriminator corrects; None without one.
    """
    if not o.resume:
        with blame("--outdir"):
            check_free(o.outdir, ", or make the missing images with --resume")
    form = dict(precision=o.precision, compile=o.compile, trust_pickle=o.trust_pickle)
    first = dict(kinds=("denoiser", "generator"), published={name: o[name] for name in PUBLISHED_SETTINGS})
    with blame("--network"):
        net, class_names = load_denoiser(o.network, device, **first, **form)
    check_network(o, net)
    o.classes = o.classes and find_classes(o.classes, net.label_dim, class_names)
    networks = [net]
    if o.cfg is not None:
        net = ClassifierFreeGuidance(net, o.cfg)
    if o.network_2 is not None:
        with blame("--network_2"):
            networks.append(load_denoiser(o.network_2, device, class_names=class_names, **form)[0])
            net = AffineGuidance(net, networks[1], o.affine_weight)
    if o.discriminator is None:  # no stopwatch either: some devices wait for it
        return net, class_names, EvaluationMeter(*networks), None
    correcting = Stopwatch(device)
    with blame("--discriminator"):
        net = guide(
            net,
            load_discriminator(o.discriminator, device, class_names=class_names, trust_pickle=o.trust_pickle),
            device,
            mode=o.dg_mode,
            weights=(o.dg_weight_1st_order, o.dg_weight_2nd_order),
            gate=gate(o),
            noise_rate=o.noise_rate,
            published=bool(o.dg_published),
            stopwatch=correcting,
        )
    return net, class_names, EvaluationMeter(*networks, stopwatch=Stopwatch(device)), correcting


if __name__ == "__main__":
    main()
