"""An RDUOT objective on random images, its batch and the gradients of one step."""

from __future__ import annotations

import numpy as np
import torch

from tests.support.objectives import CPU, Data, make_config, ready
from torch_utils.training_stats import Stats
from training.objectives.rduot import DDGAN, RDUOT


class Images(Data):
    """Random images, the first quarter outliers."""

    def __init__(self, n=8, **kwargs):
        super().__init__(n=n, **kwargs)
        self.outliers = np.arange(n) < n // 4


def contrasts(clean, outlier, n=64):
    """Images of independent pixels with the given deviations, a quarter of them outliers."""
    data = Images(n=n)
    rng = np.random.default_rng(0)
    std = np.where(data.outliers, outlier, clean)[:, None, None, None]
    values = np.clip(std * rng.standard_normal([n, 1, 8, 8]), -1, 1)
    data.pixels = torch.from_numpy((127.5 + 127.5 * values).astype(np.uint8))
    return data


def make(data=None, batch_gpu=None, method="rduot", precision="fp32", **changes):
    settings = (
        dict(
            num_timesteps=4,
            beta_min=0.1,
            beta_max=20.0,
            phi1="softplus",
            phi2="softplus",
            cost="pixels",
            tau=0.01,
            r1_gamma=0.5,
            lazy_reg=3,
            schedule_nimg=None,
        )
        | changes
    )
    config = make_config(
        method=method,
        batch_size=8,
        batch_gpu=batch_gpu,
        noise_levels=None,
        precision=precision,
        network=dict(
            arch=method,
            precond=None,
            kwargs=dict(model_channels=8, z_emb_dim=8, nz=6, n_mlp=1, channel_mult=[1, 2], num_blocks=1),
            potential_kwargs=dict(model_channels=4),
        ),
        optimizer=dict(name="adam", lr=dict(net=1e-3, potential=2e-3), betas=[0.5, 0.9]),
        rduot=settings,
    )
    objective = ready({"rduot": RDUOT, "ddgan": DDGAN}[method], config, data or Images(), CPU)
    rng = torch.Generator().manual_seed(7)
    for trained in objective.trained.values():  # away from the initial weights, where G answers nothing
        for p in trained.net.parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=rng)
    return objective


def batch(objective):
    data = objective.dataset
    x_0 = data.pixels.float() / 127.5 - 1
    return data.pixels, data.onehot(torch.arange(len(data))), x_0, objective.draw(data.pixels, torch.Generator())


def step(objective, images=slice(None)):
    """Gradients of both networks in one step at fixed weights."""
    seen = {}
    for name, trained in objective.trained.items():

        def update(*_args, name=name, trained=trained):
            seen.update({f"{name}.{k}": p.grad.clone() for k, p in trained.net.named_parameters()})
            trained._flat_grads.zero_() if trained._flat_grads is not None else trained.optimizer.zero_grad()

        trained.update = update
    data = objective.dataset
    objective.step(data.pixels[images], data.onehot(torch.arange(len(data)))[images], 0, Stats(CPU))
    return seen
