"""Images that do not belong: photographs with 10% digits among them, and the other way round; DDGAN and RDUOT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from recipes.steps import Row, Step, evaluation, finished
from reports.comparison import compare_outliers
from reports.page import Section

__all__ = ["plan", "report"]

# Two steps: x_1 is so noisy that the last one decides what an image shows, where the potential sees it without noise.
# Of more steps, the noisy ones hide a dear image's beginnings from the potential, and the later ones go on from there.
STEPS = 2
NETWORKS = (
    f"--num_timesteps={STEPS} --num_channels_dae=16 --ch_mult=1,2 --num_res_blocks=1 --ngf=16 --n_mlp=2 --z_emb_dim=64"
)
# Small networks, for long trainings: most digits are made half-way, before the learning rates have fallen.
TRAINING = "--batch=64 --lr_g=5e-4 --lr_d=5e-4 --r1_gamma=0.2 --lazy_reg=10 --ema_decay=0.999"


@dataclass
class Setup:
    """Clean images with outliers among them, and the methods that learn from both: name -> title, options."""

    name: str
    title: str
    question: str
    source: str  # dataset_tool.py's options
    kimg: float  # length of each training
    seconds: float  # which takes so long on two cores
    methods: dict[str, tuple[str, str]]

    def data(self, outdir: str) -> str:
        """Its archive."""
        return f"{outdir}/datasets/{self.name}_outliers10.zip"

    def rows(self, outdir: str) -> list[Row]:
        """The methods of its table."""
        return [
            Row(name, title, [name], f"--network={outdir}/{name}")
            for method, (title, _) in self.methods.items()
            for name in [f"{self.name}-{method}"]
        ]


def rduot(**taus: float) -> dict[str, tuple[str, str]]:
    """RDUOT's methods, with cost=tau."""
    return {
        f"rduot-{cost}": (f"RDUOT, cost {cost}", f"--method=rduot --cost={cost} --tau={tau}")
        for cost, tau in taus.items()
    }


DDGAN = "DDGAN", "--method=ddgan"
SETUPS = [
    Setup(
        "photos",
        "cleanscore: photographs, one in ten replaced by a digit",
        "A diffusion model of few steps is trained on 16,000 crops of photographs, of which 1,600 are digits in "
        "truth. How many of the images that it makes are digits?",
        "--source=photos --max-images=16000 --resolution=8x8 --channels=1 --outliers=digits",
        240,
        225,
        {"ddgan": DDGAN} | rduot(pixels=0.03, robust=6),
    ),
    Setup(
        "digits",
        "cleanscore: the other way round, digits and one in ten a photograph",
        "The paper's cost is the squared distance to noise, which is small for dull images: here for the outliers. "
        "Nothing makes RDUOT drop them then, unless another cost finds them expensive.",
        "--source=digits --outliers=photos",
        100,
        95,
        {"ddgan": DDGAN} | rduot(pixels=0.03, standardized=0.02, features=0.003, robust=6),
    ),
]


def plan(outdir: str, seed: int, scale: float, num: int) -> list[Step]:
    """All commands in order. Training lengths are in images, times `scale`; `num` images a row of the tables."""
    steps = []
    for setup in SETUPS:
        data, kimg = setup.data(outdir), setup.kimg * scale
        steps.append(
            Step(
                f"{setup.name}-outliers",
                f"archive of {setup.name} with 10% outliers",
                3,
                f"dataset_tool.py {setup.source} --perturb_percent=10 --dest={data}",
            )
        )
        for row, (title, options) in zip(setup.rows(outdir), setup.methods.values(), strict=True):
            steps.append(
                Step(
                    row.name,
                    f"train {title} on {setup.name}",
                    setup.seconds,
                    f"train_rduot.py --outdir={outdir}/{row.name} --nosubdir --data={data} {options}"
                    f" {NETWORKS} {TRAINING}"
                    f" --duration={kimg / 1000:.6f} --tick={kimg / 20:.4f} --snap=10 --dump=5"
                    f" --seed={seed} --resume=latest",
                )
            )
        for row in setup.rows(outdir):
            steps += evaluation(outdir, row, num, data)
    return steps


def report(outdir: str, seed: int, seconds: Mapping[str, float], num: int) -> list[Section]:
    """What the report says of a finished plan."""
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
            said = [line.strip() for line in f if line.startswith(("Transport cost", "Warning: the outliers"))]
        notes += [f"{row.title}: {line}." for line in dict.fromkeys(said) if row.name != f"{setup.name}-ddgan"]
    return notes
