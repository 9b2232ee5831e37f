"""Make images with a trained diffusion model, one per seed, and write the class of each into dataset.json."""

from __future__ import annotations

import dnnlib.before_torch

import signal
import sys
import time

import click
import torch

import dnnlib
from dnnlib.cli import Command, blame
from sampling.evaluations import EvaluationMeter, Stopwatch
from sampling.generation import generate_images, share_of
from sampling.guidance import AffineGuidance, ClassifierFreeGuidance
from sampling.loading import guide, load_denoiser, load_discriminator
from sampling.options import check_network, check_precision, check_usage, gate, generate_options, sampler_settings
from sampling.output import check_free, progress, save_images, save_sheet
from sampling.samplers import choose_sampler
from torch_utils import distributed
from torch_utils.distributed import print0

EXAMPLES = """
Examples:
  python generate.py --network=training-runs/00000-digits-cond-ddpmpp_tiny-edm-gpus1-batch128-fp32 --outdir=out
  python generate.py --network=network.pkl --outdir=threes.zip --class=3 --seeds=0-999 --grid=threes.png
  python generate.py --network=network.pkl --outdir=right --discriminator=discriminator.pkl --dg_mode=calibrated
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

    seeds = list(dict.fromkeys(o.seeds))
    own = share_of(seeds, distributed.get_rank(), distributed.get_world_size())
    classes = o.classes and [o.classes[seed % len(o.classes)] for seed in own]
    batches = generate_images(
        net, own, device=device, class_idx=classes, batch=o.batch, sampler=sampler, same_shape=o.compile
    )
    print0(f"Generating {len(seeds)} images to {o.outdir}")

    start, handler = time.time(), signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        save_images(progress(batches, len(seeds)), o.outdir, o.subdirs, class_names)
    finally:
        signal.signal(signal.SIGTERM, handler)
    seconds = time.time() - start
    if o.grid is not None:
        distributed.on_rank0(lambda: save_sheet(o.grid, o.outdir, seeds, o.subdirs))
    print0(
        f"{len(seeds)} images in {dnnlib.format_time(seconds)}, {len(seeds) / seconds:.1f} images/s, "
        f"{meter.count / max(len(own), 1):g} network evaluations per image"
    )
    if correcting is not None and own:
        ratio = 1 + correcting.seconds / meter.stopwatch.seconds
        print0(f"Guided sampling took {ratio:.2f} times the network time of unguided sampling")


def load(o: dnnlib.EasyDict, device: torch.device) -> tuple:
    """Return what generates the images, and what measures it: network with guidance, class names, meter, stopwatch.

    The meter counts evaluations of the networks. The stopwatch runs while a discriminator corrects; None without one.
    """
    with blame("--outdir"):
        check_free(o.outdir)
    form = dict(precision=o.precision, compile=o.compile, trust_pickle=o.trust_pickle)
    with blame("--network"):
        net, class_names = load_denoiser(o.network, device, kinds=("denoiser", "generator"), **form)
    check_network(o, net)
    networks = [net]
    if o.cfg is not None:
        net = ClassifierFreeGuidance(net, o.cfg)
    if o.network_2 is not None:
        with blame("--network_2"):
            networks.append(load_denoiser(o.network_2, device, **form)[0])
            net = AffineGuidance(net, networks[1], o.affine_weight)
    if o.discriminator is None:  # no stopwatch either: some devices wait for it
        return net, class_names, EvaluationMeter(*networks), None
    correcting = Stopwatch(device)
    with blame("--discriminator"):
        net = guide(
            net,
            load_discriminator(o.discriminator, device, trust_pickle=o.trust_pickle),
            device,
            mode=o.dg_mode,
            weights=(o.dg_weight_1st_order, o.dg_weight_2nd_order),
            gate=gate(o),
            noise_rate=o.noise_rate,
            stopwatch=correcting,
        )
    return net, class_names, EvaluationMeter(*networks, stopwatch=Stopwatch(device)), correcting


if __name__ == "__main__":
    main()
