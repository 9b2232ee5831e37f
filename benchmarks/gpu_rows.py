"""Rows about a CUDA device: training steps, TDSM, discriminator and sampling at CIFAR-10's shape, in each precision."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import tempfile
from collections.abc import Callable, Iterator

import click
import numpy as np
import torch

from benchmarks.archives import write_archive
from benchmarks.core import Row, compare
from benchmarks.plain import plain_layers
from benchmarks.roofline import count, precision_of
from benchmarks.training_rows import step_row
from sampling.generation import generate_images
from sampling.samplers import heun_sampler
from torch_utils.persistence import save_snapshot
from training.networks import EDMPrecond
from training.networks_resnet import Classifier, resnet_kwargs
from training.presets import network_kwargs

__all__ = ["prepare", "rows", "sampling_rows", "step_rows"]

SECONDS = 1200
RESOLUTION, CHANNELS, CLASSES, IMAGES = 32, 3, 10, 2048
BATCH, BATCH_GPU = 512, 128  # 128 images at a time fit in float32 for two processes on 80 GB.
# Name of a form: (options of the script, precision whose peak limits it). The script chooses the memory format.
FORMS = {
    "tf32": (["--precision=tf32"], "tf32"),
    "bf16": (["--precision=bf16"], "bf16"),
    "bf16, compiled": (["--precision=bf16", "--compile=1"], "bf16"),
}
STEPS = {
    "train": "training step",
    "train_noise": "TDSM step, 1 pair per image",
    "train_discriminator": "discriminator step",
}


def prepare(folder: str, images: int = IMAGES) -> dict[str, list[str]]:
    """Write the files that the scripts need into `folder`. Return the options of each, without device and batch."""
    data = write_archive(os.path.join(folder, "data.zip"), images, CHANNELS, RESOLUTION, CLASSES)
    # The classifier is untrained. With `pair` noise, each image then has two possible classes: one pair per image.
    classifier = Classifier(RESOLUTION, CHANNELS, CLASSES, **resnet_kwargs("ddpmpp", RESOLUTION, CHANNELS, CLASSES))
    save_snapshot(os.path.join(folder, "classifier.pkl"), dict(ema=classifier, info=dict(posterior="clean")))
    np.savez(os.path.join(folder, "labels.npz"), np.random.RandomState(0).rand(images) < 0.6)
    common = [f"--data={data}", "--cond=1", "--arch=ddpmpp"]
    return {
        "train": common,
        "train_noise": [*common, f"--cls={folder}/classifier.pkl", "--noise_type=pair", "--noise_rate=0.4"],
        "train_discriminator": [*common, f"--label-path={folder}/labels.npz"],
    }


def step_rows(script: str, args: list[str], batch: int, repeats: int) -> Iterator[Row]:
    """Measure a step in eager float32, and in every other form against it.

    Only two processes live at a time, so that both fit on the device.
    """
    for i, (form, (options, precision)) in enumerate(FORMS.items()):
        row = step_row(
            f"{STEPS[script]}, {form}", script, [*args, *options], args, batch, repeats, steps=2, precision=precision
        )
        if i == 0:
            yield Row(f"{STEPS[script]}, eager float32", row.plain_seconds, None, row.flops, row.bytes, row.note, batch)
        yield row


def sampling_rows(
    device: torch.device, repeats: int, *, batch: int = BATCH, steps: int = 18, **network: object
) -> Iterator[Row]:
    """Measure EDM's sampler in eager float32, and in every other form against it.

    `network`: keyword arguments of the preconditioner that replace those of ddpmpp.
    """
    net = EDMPrecond(RESOLUTION, CHANNELS, CLASSES, **network_kwargs("ddpmpp") | network).eval().requires_grad_(False)
    net.to(device)
    compiled = copy.deepcopy(net)
    compiled.compile()
    sampler = functools.partial(heun_sampler, num_steps=steps)

    def form(net: torch.nn.Module, precision: str, layers: Callable = contextlib.nullcontext) -> Callable[[], None]:
        def generate() -> None:
            half = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
            with layers(), precision_of(precision), half:
                for _ in generate_images(net, range(batch), device=device, batch=batch, sampler=sampler):
                    pass  # The images are arrays on the CPU, so the device has finished.

        return generate

    x, sigma = torch.zeros(batch, CHANNELS, RESOLUTION, RESOLUTION, device=device), torch.ones(batch, device=device)
    work = count(lambda: net(x, sigma))
    flops, nbytes = work.flops * (2 * steps - 1), work.bytes * (2 * steps - 1)
    forms = {
        "eager float32": form(net, "fp32", plain_layers),
        "tf32": form(net, "tf32"),
        "bf16": form(net, "bf16"),
        "bf16, compiled": form(compiled, "bf16"),
    }
    t = compare(forms, repeats, "sampling")
    plain = t["eager float32"]
    yield Row("sampling, eager float32", plain, None, flops, nbytes, f"batch {batch}, {steps} steps", batch)
    for name, (_, precision) in FORMS.items():
        yield Row(f"sampling, {name}", t[name], plain, flops, nbytes, images=batch, precision=precision)


def rows(repeats: int) -> Iterator[Row]:
    """Measure everything with `ddpmpp`. Without a CUDA device there are no rows, and a line says so."""
    if not torch.cuda.is_available():
        click.echo("gpu: no CUDA device here, so these rows are left out")
        return
    with tempfile.TemporaryDirectory() as folder:
        for script, args in prepare(folder).items():
            sizes = [f"--batch={BATCH}", f"--batch-gpu={BATCH_GPU}", "--device=cuda"]
            yield from step_rows(script, [*args, *sizes], BATCH, repeats)
    yield from sampling_rows(torch.device("cuda"), repeats)
