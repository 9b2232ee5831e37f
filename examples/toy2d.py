"""Train RDUOT and DDGAN on points in the plane: four clean modes, and a fifth one that does not belong.

Both see the same points and use the losses and the diffusion of train_rduot.py, with networks of three small layers.
Prints the share of the samples in each mode, and draws samples and level sets of the potential.

With the defaults, 5% outliers in the data and seeds 0, 1, 2, DDGAN makes 3.45, 3.44 and 3.93% outliers, RDUOT 1.67,
2.15 and 1.87%. Both give each clean mode 23 to 25%.
"""

from __future__ import annotations

import dnnlib.before_torch

import json
import os
import time

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import trange

import dnnlib
from dnnlib.cli import Command, FloatRange, given_options
from torch_utils import misc
from training.noise_levels import DiffusionSteps
from training.objectives.rduot import CONJUGATES, TransportLosses, ema_halflife
from training.trained_network import TrainedNetwork
from training.transport_cost import squared_distance

EXAMPLES = """
Examples:
  python -m examples.toy2d --outdir=toy
  python -m examples.toy2d --outdir=toy_linear --phi1=linear --phi2=linear
"""
CPU = torch.device("cpu")
CLEAN = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
OUTLIER = torch.tensor([[3.0, 3.0]])
MODES, SPREAD = torch.cat([CLEAN, OUTLIER]), 0.1
BATCH, LR, R1, EMA, NZ = 512, 2e-4, 0.1, 0.998, 8
PHI = click.Choice(list(CONJUGATES))
BASELINE = dict(tau=0.0, phi1="softplus", phi2="softplus")  # what DDGAN has in place of options


def points(n: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """Draw training data [n,2], of which the share `share` are outliers."""
    mode = torch.randint(len(CLEAN), [n], generator=generator)
    mode[torch.rand(n, generator=generator) < share] = len(CLEAN)
    return MODES[mode] + SPREAD * torch.randn([n, 2], generator=generator)


class MLP(torch.nn.Module):
    """Network of three layers that receives the time step as a one-hot vector."""

    def __init__(self, inputs: int, outputs: int, num_timesteps: int, width: int = 128):
        super().__init__()
        self.num_timesteps = num_timesteps
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(inputs + num_timesteps, width),
            torch.nn.LeakyReLU(0.2),
            torch.nn.Linear(width, width),
            torch.nn.LeakyReLU(0.2),
            torch.nn.Linear(width, outputs),
        )

    def forward(self, a: torch.Tensor, t: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        onehot = torch.nn.functional.one_hot(t, self.num_timesteps).to(a.dtype)
        return self.layers(torch.cat([a, b, onehot], dim=1))


class Potential(MLP):
    """Potential D(x_t, t, x_{t+1}) -> [N]."""

    def forward(self, a: torch.Tensor, t: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return super().forward(a, t, b).flatten()


def train(losses: TransportLosses, share: float, seed: int, num_steps: int) -> tuple[MLP, Potential]:
    """Train for `num_steps` steps. Return the generator's moving average and the potential."""
    torch.manual_seed(seed)
    timesteps = losses.steps.num_timesteps
    settings = dict(lr=LR, betas=(0.5, 0.9))
    generator = TrainedNetwork(MLP(2 + NZ, 2, timesteps), CPU, ema_halflife=ema_halflife(EMA, BATCH), **settings)
    potential = TrainedNetwork(Potential(4, 1, timesteps), CPU, **settings)
    for step in trange(num_steps, unit="step", disable=None, leave=False):
        rng = misc.step_generator(seed, 0, step, CPU)
        x_0 = points(BATCH, share, rng)
        loss, _ = losses.potential(potential.net, generator.net, x_0, losses.draw(x_0, NZ, rng), penalize=True)
        loss.mean().backward()
        potential.update(step * BATCH, BATCH)
        potential.net.requires_grad_(False)
        losses.generator(potential.net, generator.net, x_0, losses.draw(x_0, NZ, rng)).mean().backward()
        generator.update(step * BATCH, BATCH)
        potential.net.requires_grad_(True)
    return generator.ema, potential.net.requires_grad_(False)


@torch.no_grad()
def sample(generator: MLP, steps: DiffusionSteps, n: int, seed: int = 0) -> torch.Tensor:
    """Return n samples [n,2]."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn([n, 2], generator=rng)
    for i in reversed(range(steps.num_timesteps)):
        t = torch.full([n], i)
        x_0 = generator(x, t, torch.randn([n, NZ], generator=rng))
        x = steps.posterior(x_0, x, t, torch.randn([n, 2], generator=rng))
    return x


def shares(x: torch.Tensor) -> list[float]:
    """Return the share of the points that lie nearest to each mode; the last share is that of the outliers."""
    nearest = torch.cdist(x, MODES).argmin(dim=1)
    return (nearest.bincount(minlength=len(MODES)) / len(x)).tolist()


@torch.no_grad()
def level_sets(potential: Potential, steps: DiffusionSteps, grid: torch.Tensor, draws: int = 32) -> torch.Tensor:
    """Return D(x, t=0, x_1) for each x of `grid` [N,2], averaged over `draws` draws of x_1 given x."""
    rng, t = torch.Generator().manual_seed(0), torch.zeros(len(grid), dtype=torch.int64)
    pairs = (steps.pair(grid, t, *torch.randn([2, len(grid), 2], generator=rng)) for _ in range(draws))
    return torch.stack([potential(x, t, x_next) for x, x_next in pairs]).mean(dim=0)


def draw(path: str, results: dict, data: torch.Tensor, steps: DiffusionSteps) -> None:
    """Draw one panel per method: level sets of the potential, data in gray, samples in red."""
    side = torch.linspace(-2, 4, 101)
    grid = torch.cartesian_prod(side, side)
    figure = Figure(figsize=(6 * len(results), 5.5))
    axes = figure.subplots(1, len(results), squeeze=False)
    for ax, (name, (x, potential)) in zip(axes[0], results.items(), strict=True):
        values = level_sets(potential, steps, grid).reshape(len(side), len(side)).T
        filled = ax.contourf(side, side, values, levels=20, cmap="viridis", alpha=0.6)
        figure.colorbar(filled, ax=ax, label="potential D at t = 0")
        ax.scatter(*data[:2000].T, s=3, color="0.4", label="data")
        ax.scatter(*x[:2000].T, s=3, color="crimson", label="samples")
        ax.set(
            title=f"{name}: {shares(x)[-1]:.1%} outliers (data {shares(data)[-1]:.1%})",
            xlim=(-2, 4),
            ylim=(-2, 4),
            aspect="equal",
        )
        ax.legend(loc="upper left")
    figure.tight_layout()
    with dnnlib.atomic_open(path) as file:
        figure.savefig(file, format="png", dpi=100)


@click.command(cls=Command, help=__doc__, epilog=EXAMPLES)
@click.option("--outdir", metavar="DIR", required=True, help="Where to write toy2d.png and toy2d.json")
@click.option("--method", type=click.Choice(["both", "ddgan", "rduot"]), default="both", help="What to train")
@click.option("--outliers", metavar="SHARE", type=FloatRange(min=0, max=1), default=0.05, help="Outliers in the data")
@click.option("--tau", metavar="FLOAT", type=FloatRange(min=0), default=0.08, help="RDUOT: weight of the cost")
@click.option("--phi1", type=PHI, default="softplus", help="RDUOT: conjugate on generated pairs")
@click.option("--phi2", type=PHI, default="softplus", help="RDUOT: conjugate on real pairs")
@click.option("--num_timesteps", metavar="INT", type=click.IntRange(min=1), default=4, help="Steps of the diffusion")
@click.option("--steps", "num_steps", metavar="INT", type=click.IntRange(min=1), default=15000, help="Training steps")
@click.option("--seed", metavar="INT", type=click.IntRange(min=0), default=0, help="Random seed")
def main(
    outdir: str,
    method: str,
    outliers: float,
    tau: float,
    phi1: str,
    phi2: str,
    num_timesteps: int,
    num_steps: int,
    seed: int,
) -> None:
    chosen, given = dict(tau=tau, phi1=phi1, phi2=phi2), given_options()
    for name, own in BASELINE.items():
        if method == "ddgan" and f"--{name}" in given and chosen[name] != own:
            raise click.UsageError(f"--{name}={chosen[name]}: belongs to RDUOT; the baseline has {own}")
    os.makedirs(outdir, exist_ok=True)  # before the work: a file of that name is refused
    steps = DiffusionSteps(num_timesteps)
    methods = {
        "DDGAN": TransportLosses(steps, squared_distance, *BASELINE.values(), R1, log_sigmoid=True),
        "RDUOT": TransportLosses(steps, squared_distance, *chosen.values(), R1),
    }
    results, table = {}, {}
    for name, losses in methods.items():
        if method in ("both", name.lower()):
            start = time.time()
            generator, potential = train(losses, outliers, seed, num_steps)
            x = sample(generator, steps, 50_000)
            results[name], table[name] = (x, potential), np.round(shares(x), 4).tolist()
            *clean, outlier = (f"{share:.2%}" for share in table[name])
            seconds = dnnlib.format_time(time.time() - start)
            click.echo(f"{name}: modes {' '.join(clean)}, outliers {outlier} ({seconds})")
    with dnnlib.atomic_open(os.path.join(outdir, "toy2d.json"), "w") as file:
        json.dump(table, file, indent=1)
    draw(os.path.join(outdir, "toy2d.png"), results, points(50_000, outliers, torch.Generator().manual_seed(0)), steps)


if __name__ == "__main__":
    main()
