"""Print one table of ratios, each ours against a plain form, measured alternately in one run (medians).

python -m benchmarks --only=tdsm,training,archive --out=results.json
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import platform
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable

import click
import numpy as np
import PIL.Image
import scipy.linalg
import torch
from sklearn.datasets import load_sample_images

import dnnlib.cli
from metrics.frechet import trace_of_root
from metrics.neighbours import prdc
from torch_utils import distributed
from torch_utils.checkpoint import atomic_open
from torch_utils.training_stats import Stats
from training.archive_sources import Source, open_source
from training.archive_writer import make_transform
from training.archives import build_archive
from training.objectives.dsm import DSM
from training.objectives.tdsm import TDSM
from training.presets import network_kwargs
from training.transition import transition_matrix

PAIRS = 3  # other classes an image keeps in the TDSM rows


class RandomImages:
    """The part of a data set that objectives read; the pixels are noise."""

    def __init__(self, n: int, channels: int, resolution: int, classes: int):
        rng = np.random.RandomState(0)
        self.num_channels, self.resolution, self.label_dim = channels, resolution, classes
        self.labels = rng.randint(classes, size=n)
        self.pixels = torch.from_numpy(rng.randint(256, size=[n, channels, resolution, resolution]).astype(np.uint8))
        self.name, self.class_names = "random", None

    def onehot(self) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.from_numpy(self.labels), self.label_dim).float()


class KnownPairs(torch.nn.Module):
    """A classifier that costs nothing and always leaves PAIRS other classes above tau."""

    augment_dim = 0

    def __init__(self, labels: np.ndarray, transition: np.ndarray):
        super().__init__()
        observed, classes = torch.from_numpy(labels)[:, None], len(transition)
        index = (observed + torch.arange(PAIRS + 1)) % classes
        # Divided by T[y, o], so that all PAIRS + 1 weights are equal, however many classes there are.
        logits = -torch.from_numpy(transition).float()[index, observed].log()
        self.register_buffer("logits", torch.full([len(labels), classes], -30.0).scatter_(1, index, logits))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.logits


class TDSMClassLoop(TDSM):
    """The plain form: one pass of the whole batch for every class."""

    def combine(self, x, sigma, labels, augment_labels, stats):
        observed = labels.argmax(dim=1)
        w = self.weights(x, sigma, observed, augment_labels)
        total = (
            DSM.combine(self, x, sigma, labels, augment_labels, stats)
            * w.gather(1, observed[:, None])[:, :, None, None]
        )
        for c in range(labels.shape[1]):
            with torch.no_grad():
                onehot = torch.nn.functional.one_hot(torch.full_like(observed, c), labels.shape[1]).float()
                part = self.trained["net"].net(x, sigma, onehot, augment_labels=augment_labels)
            total = total + (w[:, c] * (observed != c))[:, None, None, None] * part
        return total


class PlainStep:
    """The plain form of a training step: eager float32, a Python loop over parameters for gradients, Adam and EMA."""

    def __init__(self, objective: DSM):
        self.objective = objective
        self.net = objective.trained["net"].net
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        for p in self.net.parameters():
            p.grad = None
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3, foreach=False, fused=False)

    def step(self, images: torch.Tensor, labels: torch.Tensor, nimg: int, stats: Stats) -> None:
        draws = self.objective.draw(images, torch.Generator().manual_seed(nimg))
        self.optimizer.zero_grad(set_to_none=True)
        (self.objective.loss(images, labels, draws, stats).sum() / len(images)).backward()
        for p in self.net.parameters():
            torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        self.optimizer.step()
        for a, b in zip(self.ema.parameters(), self.net.parameters(), strict=True):
            a.copy_(b.detach().lerp(a, 0.999))


def make_config(arch: str, cbase: int | None, batch: int) -> dict:
    return dict(
        network=dict(arch=arch, precond="edm", kwargs=network_kwargs(arch, cbase) | dict(dropout=0.1)),
        augment=None,
        noise_levels=dict(precond="edm"),
        optimizer=dict(name="adam", lr=1e-3),
        ema_halflife_nimg=500_000,
        lr_rampup_nimg=0,
        batch_size=batch,
        batch_gpu=None,
        precision="fp32",
        loss_scaling=1.0,
        compile=False,
        seed=0,
        tdsm=dict(tau=0.01, temp=1.0),
    )


def compare(forms: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each form, the forms taking turns so that a busy machine slows all of them."""
    times = {name: [] for name in forms}
    for form in forms.values():
        form()
    for _ in range(repeats):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def stepper(trainer, data: RandomImages) -> Callable[[], None]:
    stats, labels = Stats(torch.device("cpu")), data.onehot()
    return lambda: trainer.step(data.pixels, labels, 10_000, stats)


def tdsm_rows(repeats: int) -> list[dict]:
    """TDSM over DSM at equal pairs per image, for few and many classes, and against the loop over classes."""
    forms, cpu, n = {}, torch.device("cpu"), 64
    for classes in (10, 100):
        data, config = RandomImages(n, 3, 16, classes), make_config("ddpmpp_tiny", None, n)
        transition = transition_matrix("sym", 0.4, classes)
        kwargs = dict(classifier=KnownPairs(data.labels, transition), transition=transition, posterior="clean")
        forms[f"dsm{classes}"] = stepper(DSM(config, data, cpu), data)
        forms[f"tdsm{classes}"] = stepper(TDSM(config, data, cpu, **kwargs), data)
    forms["loop100"] = stepper(TDSMClassLoop(config, data, cpu, **kwargs), data)
    t = compare(forms, repeats)
    rows = [
        dict(name=f"TDSM step / DSM step, {c} classes, {PAIRS} pairs an image", value=t[f"tdsm{c}"] / t[f"dsm{c}"])
        for c in (10, 100)
    ]
    rows.append(dict(name="the two above: 100 classes / 10 classes", value=rows[1]["value"] / rows[0]["value"]))
    rows.append(dict(name="loop over 100 classes / ours", value=t["loop100"] / t["tdsm100"]))
    return rows


def training_rows(repeats: int) -> list[dict]:
    """Training images/s of what the code does by default over the plain eager form."""
    rows = []
    for arch, cbase, channels, resolution, n in (("ddpmpp_tiny", None, 1, 8, 128), ("ddpmpp", 32, 3, 32, 16)):
        data, config = RandomImages(n, channels, resolution, 10), make_config(arch, cbase, n)
        cpu = torch.device("cpu")
        t = compare(
            {"ours": stepper(DSM(config, data, cpu), data), "plain": stepper(PlainStep(DSM(config, data, cpu)), data)},
            repeats,
        )
        label = f"{arch}{f' --cbase={cbase}' if cbase else ''}, {resolution}x{resolution}"
        rows += [
            dict(name=f"training images/s, {label}", value=n / t["ours"]),
            dict(name=f"plain step / ours, {label}", value=t["plain"] / t["ours"]),
        ]
    return rows


def archive_rows(repeats: int) -> list[dict]:
    """Images/s into an archive: JPEG photographs on all cores over one, raw images over Pillow and zipfile."""
    rng = np.random.RandomState(0)
    images = rng.randint(256, size=[5000, 32, 32, 3]).astype(np.uint8)
    photo = load_sample_images().images[0]
    repeats = max(repeats // 2, 3)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        os.mkdir(os.path.join(folder, "photos"))
        for i in range(64):
            PIL.Image.fromarray(np.roll(photo, 7 * i, axis=1)).save(os.path.join(folder, "photos", f"{i:03d}.jpg"))
        dest = os.path.join(folder, "x.zip")

        def build(workers: int) -> None:
            source = open_source(os.path.join(folder, "photos"))
            build_archive(source, dest, make_transform("center-crop", (64, 64)), None, None, workers)

        def plain() -> None:
            with zipfile.ZipFile(dest, "w") as file:
                for i, image in enumerate(images):
                    data = io.BytesIO()
                    PIL.Image.fromarray(image).save(data, format="png", compress_level=0)
                    file.writestr(f"{i}.png", data.getvalue())

        def ours() -> None:
            build_archive(
                Source("random", len(images), images.__getitem__), dest, make_transform(None, None), None, None, 1
            )

        t = compare(
            {"all": lambda: build(os.cpu_count() or 1), "one": lambda: build(1), "ours": ours, "plain": plain}, repeats
        )
    return [
        dict(name="archive images/s, photographs to 64x64, all cores", value=64 / t["all"]),
        dict(name="one core / all cores", value=t["one"] / t["all"]),
        dict(name="archive images/s, raw 32x32", value=len(images) / t["ours"]),
        dict(name="Pillow and zipfile / ours", value=t["plain"] / t["ours"]),
    ]


def metrics_rows(repeats: int) -> list[dict]:
    """The trace term of FID over SciPy's general matrix root, and the four ratios from nearest neighbours."""
    rng = np.random.default_rng(0)
    scales = np.geomspace(1, 1e-2, 2048)
    s1, s2 = (np.cov(rng.standard_normal((5000, 2048)) * scales, rowvar=False) for _ in range(2))
    difference = abs(trace_of_root(s1, s2) / np.trace(scipy.linalg.sqrtm(s1 @ s2)).real - 1)
    t = compare(
        {"ours": lambda: trace_of_root(s1, s2), "plain": lambda: scipy.linalg.sqrtm(s1 @ s2)}, max(repeats // 4, 1)
    )
    real, fake = (rng.standard_normal((10_000, 256), dtype=np.float32) for _ in range(2))
    start = time.perf_counter()
    prdc(real, fake)
    seconds = time.perf_counter() - start
    return [
        dict(name="scipy.linalg.sqrtm / ours, trace of the root, 2048 features", value=t["plain"] / t["ours"]),
        dict(name="decimal digits in which the two agree", value=-math.log10(difference + 1e-16)),
        dict(name="seconds of prdc, 10,000 x 10,000 images, 256 features", value=seconds),
    ]


ROWS = dict(tdsm=tdsm_rows, training=training_rows, archive=archive_rows, metrics=metrics_rows)


@click.command(cls=dnnlib.cli.Command, help=__doc__)
@click.option("--only", metavar="LIST", default=",".join(ROWS), help="Which groups of rows")
@click.option(
    "--repeats", metavar="INT", type=click.IntRange(min=3), default=9, help="Measurements a form; the median counts"
)
@click.option("--out", metavar="JSON", help="Also write the table here, with the machine's description")
def main(only: str, repeats: int, out: str | None) -> None:
    unknown = set(only.split(",")) - set(ROWS)
    if unknown:
        raise click.BadParameter(f"{', '.join(sorted(unknown))}; there are {', '.join(ROWS)}", param_hint="--only")
    distributed.init("cpu")
    machine = dict(
        cpus=os.cpu_count(),
        processor=platform.processor() or platform.machine(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
    )
    click.echo(" ".join(f"{k}={v}" for k, v in machine.items()))
    rows = []
    for group in only.split(","):
        for row in ROWS[group](repeats):
            rows.append(row)
            click.echo(f"{row['name']:<64s} {row['value']:10.2f}")
    if out:
        with atomic_open(out, "wt") as f:
            json.dump(dict(machine=machine, rows=rows), f, indent=1)


if __name__ == "__main__":
    main()
