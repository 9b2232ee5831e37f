"""Images that do not belong: photographs with 10% digits among them, and the reverse; DDGAN and RDUOT."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from recipes.steps import Row, Step, evaluation, finished
from reports.comparison import compare_outliers
from reports.page import Section
from training.presets import presets_of

__all__ = ["plan", "report"]

STEPS = presets_of("train_rduot.py")["photos"].options["num_timesteps"]


@dataclass
class Setup:
    """Clean images with outliers among them, and the methods that learn from both."""

    name: str
    title: str
    question: str
    source: str  # options of dataset_tool.py
    kimg: float  # length of each training
    seconds: float  # duration of each training on one of two cores
    methods: dict[str, tuple[str, str]]  # name -> title, options of train_rduot.py

    def data(self, outdir: str) -> str:
        """Return the path of its archive."""
        return f"{outdir}/datasets/{self.name}_outliers10.zip"

    def rows(self, outdir: str) -> list[Row]:
        """List the methods of its table."""
        return [
            Row(name, title, [name], f"--network={outdir}/{name}")
            for method, (title, _) in self.methods.items()
            for name in [f"{self.name}-{method}"]
        ]


def rduot(**taus: float) -> dict[str, tuple[str, str]]:
    """Return methods of RDUOT, given as cost=tau."""
    return {
        f"rduot-{cost}": (f"RDUOT, cost {cost}", f"--method=rduot --cost={cost} --tau={tau}")
        for cost, tau in taus.items()
    }


DDGAN = "DDGAN", "--method=ddgan"
SETUPS = [
    Setup(
        "photos",
        "cleanscore: photographs, one in ten replaced by a digit",
        "A diffusion model of a few steps is trained on 16,000 images: 14,400 crops of photographs and 1,600 "
        "digits. How many of the images that it makes are digits?",
        "--source=photos --max-images=16000 --resolution=8x8 --channels=1 --outliers=digits",
        240,
        690,
        {"ddgan": DDGAN} | rduot(pixels=0.03, robust=10),
    ),
    Setup(
        "digits",
        "cleanscore: the reverse, digits with one in ten replaced by a photograph",
        "The paper's cost is the squared distance to noise. It is small for images of low contrast, and here those "
        "are the outliers. RDUOT then has no reason to drop them, unless another cost makes them expensive.",
        "--source=digits --outliers=photos",
        100,
        290,
        {"ddgan": DDGAN} | rduot(pixels=0.03, standardized=0.02, features=0.003, robust=10),
    ),
]


def plan(outdir: str, seed: int, scale: float, num: int) -> list[Step]:
    """List all commands in order. `scale` multiplies the training lengths; `num`: images per row of the tables."""
    outdir = shlex.quote(outdir)  # in command lines
    steps = []
    for setup in SETUPS:
        data, kimg = setup.data(outdir), setup.kimg * scale
        steps.append(
            Step(
                f"{setup.name}-outliers",
                f"archive of {setup.name} with 10% outliers",
                3,
                f"dataset_tool.py {setup.source} --perturb_percent=10 --dest={data} --overwrite",
            )
        )
        for row, (title, options) in zip(setup.rows(outdir), setup.methods.values(), strict=True):
            steps.append(
                Step(
                    row.name,
                    f"train {title} on {setup.name}",
                    setup.seconds * scale,
                    f"train_rduot.py --preset=photos --outdir={outdir}/{row.name} --nosubdir --data={data} {options}"
                    f" --duration={kimg / 1000:.6f} --tick={kimg / 20:.4f} --dump=5 --seed={seed} --resume=latest",
                )
            )
        for row in setup.rows(outdir):
            steps += evaluation(outdir, row, num, data)
    return steps


def report(outdir: str, seed: int, seconds: Mapping[str, float], num: int) -> list[Section]:
    """Return the sections of the report on a finished plan."""
    return [
        compare_outliers(
            outdir,
            setup.name,
            setup.title,
            setup.question,
            setup.data(outdir),
            finished(outdir, setup.rows(outdir), seconds),
            _notes(outdir, setup, seed, num),
        )
        for setup in SETUPS
    ]


def _notes(outdir: str, setup: Setup, seed: int, num: int) -> list[str]:
    notes = [
        f"Each row: {num:,} images, seeds 0 to {num - 1}, {STEPS} steps. Training seed {seed}.",
        "FD: Frechet distance of pixels in [-1,1] to the clean images of the archive; coverage: the share of those"
        " that have a generated image nearby.",
    ]
    for row in setup.rows(outdir):
        with open(f"{outdir}/logs/{row.name}.txt") as f:
            lines = [line.strip() for line in f]
        said = [line for line in lines if ", mean: " in line or line.startswith("Warning: the outliers")]
        notes += [f"{row.title}: {line}." for line in dict.fromkeys(said) if row.name != f"{setup.name}-ddgan"]
    return notes
