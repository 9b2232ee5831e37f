"""Measure how well networks denoise images whose class they are told, and print a table by noise level.

For each network the mean of || D(x + n; sigma, class) - x ||^2 over images x that it has not seen, with the same noise
n for all networks. The classes are the clean ones, also where an archive has wrong labels and records the clean ones.
It prints the first network's error, and by how much the others exceed it.
Where class-wise FD says that two models differ, this says at which noise levels.

\b
  python -m benchmarks.denoising_error --data=benchmark/datasets/test.zip benchmark/oracle benchmark/sym40-posterior
"""

from __future__ import annotations

import dnnlib.before_torch

import os

import click
import torch
from torch.nn.functional import one_hot
from tqdm import tqdm

import dnnlib
import dnnlib.cli
from archives.dataset import ImageDataset, to_float
from dnnlib.cli import FLOAT_LIST
from sampling.loading import load_denoiser
from torch_utils import distributed

BATCH = 200


@torch.no_grad()
def denoising_errors(
    net: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, sigmas: list[float], seed: int = 0
) -> list[float]:
    """Return the mean squared error per pixel of `net` at each noise level.

    `images` [N,C,H,W] in [-1,1], `labels` [N,classes] one-hot, both on the network's device. The noise depends on
    `seed`, on the level's place in the list and on nothing else.
    """
    errors = []
    for i, sigma in enumerate(sigmas):
        generator = torch.Generator().manual_seed(seed + i)
        noise = torch.randn(images.shape, generator=generator).to(images) * sigma
        total = 0.0
        for x, n, y in zip(images.split(BATCH), noise.split(BATCH), labels.split(BATCH), strict=True):
            denoised = net(x + n, torch.full([len(x)], sigma, device=x.device), y)
            total += float((denoised - x).square().sum(dtype=torch.float64))
        errors.append(total / images.numel())
    return errors


@click.command(cls=dnnlib.cli.Command, help=__doc__)
@click.argument("networks", nargs=-1, required=True, metavar="NETWORK...")
@click.option("--data", required=True, metavar="ZIP|DIR", help="Images with clean labels that no network has seen")
@click.option("--sigmas", type=FLOAT_LIST, default="0.05,0.2,0.8,3,15", metavar="LIST", help="Noise levels")
@click.option("--num", type=click.IntRange(min=1), default=800, metavar="INT", help="Images, the first ones")
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="INT", help="Seed of the noise")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", help="Where to compute")
def main(networks: tuple[str, ...], data: str, sigmas: list[float], num: int, seed: int, device: str) -> None:
    dataset, where = ImageDataset(data), distributed.init(device)
    classes = dataset.labels if dataset.clean_labels is None else dataset.clean_labels
    if classes is None:
        raise dnnlib.UserError(f"{data}: has no class labels, one per image")
    items = torch.arange(min(num, len(dataset)))
    images = to_float(dataset.images(items)).to(where)
    labels = one_hot(torch.as_tensor(classes)[items], dataset.label_dim).float().to(where)
    levels = " | ".join(f"sigma {sigma:g}" for sigma in sigmas)
    click.echo(f"| network | {levels} |\n" + "|---" * (len(sigmas) + 1) + "|")
    first = None
    for path in networks:
        net = load_denoiser(path, where)[0]
        for what, made, given in (
            ("classes", net.label_dim, dataset.label_dim),
            ("resolution", net.img_resolution, dataset.resolution),
            ("channels", net.img_channels, dataset.num_channels),
        ):
            if made != given:
                raise dnnlib.UserError(f"{path}: {what} {made}, but {data} has {given}")
        errors = denoising_errors(net, images, labels, sigmas, seed)
        first = first or errors
        cells = [f"{e:.5f}" if first is errors else f"{e / f - 1:+.1%}" for e, f in zip(errors, first, strict=True)]
        tqdm.write(f"| {os.path.basename(os.path.normpath(path))} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
