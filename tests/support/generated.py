"""Running generate.py in this process on random networks, and reading what it wrote."""

from __future__ import annotations

import numpy as np
import torch
from click.testing import CliRunner

import generate
from archives.dataset import ImageDataset
from training.networks import EDMPrecond

FAST = ["--steps=3", "--device=cpu"]


def random_network(seed=0, **kwargs):
    torch.manual_seed(seed)
    kwargs = dict(img_resolution=8, img_channels=1, label_dim=3) | kwargs
    net = EDMPrecond(
        **kwargs, model_type="SongUNet", model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[]
    )
    for p in net.parameters():  # As they are initialized, U-Nets answer nearly zero, whatever the label.
        p.data += 0.05 * torch.randn_like(p)
    return net.eval().requires_grad_(False)


def run(*args):
    return CliRunner().invoke(generate.main, [str(arg) for arg in args])


def make(outdir, *args):
    result = run(f"--outdir={outdir}", *FAST, *args)
    assert result.exit_code == 0, result.output
    return result.output


def read(outdir):
    """All images [N,C,H,W] and labels [N] or None of a folder or ZIP."""
    dataset = ImageDataset(str(outdir))
    return torch.stack([torch.as_tensor(dataset.image(i)) for i in range(len(dataset))]).numpy(), dataset.labels


def assert_same_images(a, b):
    """At most one gray level on at most 0.1% of the pixels."""
    difference = np.abs(a.astype(int) - b.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3
