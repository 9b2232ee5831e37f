"""Fashion-MNIST with wrong labels: every method, four kinds of noise, equal images and equal compute."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from recipes.steps import AFTER_ANOTHER, CONSTANT, REJECTION, Row, Step, evaluation, measurement
from reports.finding import BASELINE, ORACLE

__all__ = [
    "JUDGE",
    "JUDGE_SEED",
    "LONG_ROWS",
    "ROWS",
    "RUNS",
    "SETTINGS",
    "SHARED",
    "SIZES",
    "SOURCE",
    "kimg",
    "place",
    "plan",
    "recipe",
    "rows",
]

SOURCE = "/usr/share/datasets/fashion-mnist"  # of Debian's package dataset-fashion-mnist
JUDGE_SEED = 1000  # the judge is the same whatever the seed of the run, so that distances compare
CAS_EPOCHS = 20
WEIGHT_2 = "--dg_weight_1st_order=2 --dg_weight_2nd_order=2"
EPOCHS = 12  # of a detection that `scale` shortens


@dataclass(frozen=True)
class Setting:
    """A kind of label noise."""

    title: str
    noise: str  # --noise_type of dataset_tool.py
    rate: float
    known: bool = True  # whether a matrix T describes it, which TDSM's classifier is then told


SETTINGS = {
    "sym40": Setting("symmetric 40%", "sym", 0.4),
    "sym80": Setting("symmetric 80%", "sym", 0.8),
    "asym40": Setting("asymmetric 40%", "asym", 0.4),
    "instance40": Setting("instance-dependent 40%", "instance", 0.4, known=False),
}


@dataclass(frozen=True)
class Size:
    """What a resolution needs."""

    denoiser: str  # options of a denoiser's training
    other: str  # options of the classifier's and the discriminator's
    kimg: dict[str, float]  # script -> length of a training, in thousands of images
    judge: float  # length of the judge's training, likewise
    long: float  # training time of TDSM with its classifier, in plain trainings: how much longer LONG_ROWS are
    seconds: float  # about, for 1,000 images of plain training on two cores


SIZES = {
    16: Size(  # 2,300 small steps make better models than 600 large ones, and take half the time
        "--preset=digits --batch=16 --lr=0.001",
        "--preset=digits",
        {"train.py": 37.5, "train_noise.py": 37.5, "train_classifier.py": 100, "train_discriminator.py": 200},
        judge=900,
        long=2.5,
        seconds=5.0,
    ),
    32: Size(  # for ten minutes on an H100 with four rows, by estimate
        "--preset=digits --arch=ddpmpp --cbase=64 --P_mean=-1 --batch=256 --lr=0.002 --precision=bf16",
        "--preset=digits --P_mean=-1 --precision=bf16",
        {"train.py": 300, "train_noise.py": 300, "train_classifier.py": 200, "train_discriminator.py": 400},
        judge=900,
        long=1.7,
        seconds=0.3,
    ),
}


@dataclass(frozen=True)
class Run:
    """A training. Its options can name what other steps make, as in {detect}."""

    title: str
    script: str
    options: str = ""
    after: tuple[str, ...] = ("noisy",)  # the steps whose results it needs; the first one makes the images
    cost: float = 1.0  # of an image, in plain training steps


def _posterior(mode: str) -> Run:
    options = f"--posterior={{detect}} --posterior_mode={mode}"
    return Run(f"train on labels: {mode}", "train.py", options, ("noisy", "detect"))


def _tdsm(title: str, options: str, cost: float, classifier: str) -> Run:
    return Run(title, "train_noise.py", f"--cls={{{classifier}}} {options}", ("noisy", classifier), cost)


# At noise levels that hide nothing; fid.py asks the classifier at the lowest one.
JUDGE = "--P_mean=-5 --P_std=1 --dropout=0.3 --batch=128 --ema=0.05"

RUNS = {
    "judge": Run("train the judge on clean labels", "train_classifier.py", JUDGE, ("clean",), 0.4),
    "oracle": Run("train on clean labels", "train.py", after=("clean",)),
    "baseline": Run("train the baseline", "train.py"),
    "posterior": _posterior("sample"),
    "cleaned": Run("train on the cleaned archive", "train.py", after=("cleaned-archive",)),
    "drop": _posterior("drop"),
    "relabel": _posterior("relabel"),
    "null": _posterior("null"),
    "teacher": Run(
        "train TDSM's classifier on the posterior",
        "train_classifier.py",
        "--noise_type=auto --label-path={detect}",
        ("noisy", "detect"),
        0.4,
    ),
    "tdsm": _tdsm("train TDSM", "--temp=auto --others=sample", 1.45, "teacher"),
    "tdsm-all": _tdsm("train TDSM with the sum over all classes", "--temp=auto --others=all", 2.3, "teacher"),
    "relabel-tdsm": _tdsm("train TDSM on the noise that relabeling leaves", "--posterior={detect}", 1.1, "teacher"),
    "classifier": Run("train TDSM's classifier as published", "train_classifier.py", "{transition}", cost=0.4),
    "tdsm-paper": _tdsm("train TDSM as published", "--temp=1 --others=all", 2.3, "classifier"),
    "discriminator": Run(
        "train SBDC's discriminator", "train_discriminator.py", "--label-path={detect}", ("noisy", "detect"), 0.4
    ),
    "cep": Run("train with perturbed embeddings", "train.py", "--method=cep"),
    "dmis": Run("train DMIS", "train.py", "--method=dmis", cost=7.7),
    "oracle-long": Run("train longer on clean labels", "train.py", after=("clean",)),
    "posterior-long": _posterior("sample"),
}


@dataclass(frozen=True)
class Kind:
    """A row of the table: images of the network that a run trained, perhaps corrected by SBDC's discriminator."""

    title: str
    run: str = ""  # "": real images
    guidance: str = ""  # options of generate.py
    role: str = ""  # reports.finding.ORACLE, BASELINE or none
    guide: str = "discriminator"  # the step whose network `guidance` means: this run, or "detect"


# In the order of the plan: what matters most comes first.
ROWS = {
    "real-clean": Kind("real images, clean labels"),
    "real-noisy": Kind("real images, noisy labels"),
    "oracle": Kind("oracle", "oracle", role=ORACLE),
    "baseline": Kind("baseline", "baseline", role=BASELINE),
    "posterior": Kind("posterior", "posterior"),
    "cleaned": Kind("cleaned archive", "cleaned"),
    "drop": Kind("drop", "drop"),
    "relabel": Kind("relabel", "relabel"),
    "tdsm": Kind("TDSM", "tdsm"),
    "sbdc-constant": Kind("SBDC constant", "baseline", CONSTANT),
    "sbdc": Kind("SBDC calibrated", "baseline", "--dg_mode=calibrated"),
    "sbdc-2": Kind("SBDC calibrated, weight 2", "baseline", f"--dg_mode=calibrated {WEIGHT_2}"),
    "sbdc-rejection": Kind("SBDC by rejection", "baseline", REJECTION),
    "rejection": Kind("rejection by the detector", "baseline", REJECTION, guide="detect"),
    "tdsm-paper": Kind("TDSM as published", "tdsm-paper"),
    "null": Kind("null", "null"),
    "tdsm-sbdc": Kind("TDSM + SBDC", "tdsm", AFTER_ANOTHER),
    "posterior-sbdc": Kind("posterior + SBDC", "posterior", AFTER_ANOTHER),
    "relabel-tdsm": Kind("relabel + TDSM", "relabel-tdsm"),
    "tdsm-all": Kind("TDSM, all classes", "tdsm-all"),
    "cep": Kind("CEP", "cep"),
    "oracle-long": Kind("oracle, longer", "oracle-long", role=ORACLE),
    "posterior-long": Kind("posterior, longer", "posterior-long"),
    "dmis": Kind("DMIS", "dmis"),
}
PREPARED = {"detect": ("noisy",), "cleaned-archive": ("detect",)}  # steps without a training -> what they need
LONG_ROWS = ("oracle-long", "posterior-long")  # as expensive as TDSM
SHARED = ("clean", "test", "judge", "real-clean", "oracle", "oracle-long")  # steps and rows that the noise leaves alone


def place(name: str, setting: str) -> str:
    """Return what a step, run or row is called among those of several settings."""
    return name if name in SHARED else f"{setting}-{name}"


def kimg(name: str, resolution: int, scale: float) -> float:
    """Return how long a training is, in thousands of images. `name`: key of RUNS; `scale` multiplies all lengths."""
    size = SIZES[resolution]
    length = size.judge if name == "judge" else size.kimg[RUNS[name].script]
    return length * scale * (size.long if name in LONG_ROWS else 1)


def recipe(resolution: int) -> dict[str, object]:
    """Return what a resolution needs (Size). Where two runs differ in it, their results do not compare."""
    size = asdict(SIZES[resolution])
    del size["seconds"]
    return size


def needed(name: str, setting: str) -> list[str]:
    """Return the steps that a step needs, in order and without repetition, and the step itself."""
    after = RUNS[name].after if name in RUNS else PREPARED.get(name, ())
    if name == "classifier" and not SETTINGS[setting].known:
        after = (*after, "detect")
    return [*dict.fromkeys(step for other in after for step in needed(other, setting)), name]


def rows(outdir: str, setting: str, chosen: Sequence[str]) -> dict[str, Row]:
    """Return the rows of a setting by their keys in ROWS, in the order of that table."""
    found = {}
    for key, kind in ROWS.items():
        if key not in chosen:
            continue
        training, sampling = [], ""
        if kind.run:
            sampling = f"--network={outdir}/{place(kind.run, setting)}"
            training = needed(kind.run, setting)
            if kind.guidance:
                network = "/labels-classifier.pkl" if kind.guide == "detect" else ""
                sampling += f" --discriminator={outdir}/{place(kind.guide, setting)}{network} {kind.guidance}"
                training += needed(kind.guide, setting)
        trained = [place(name, setting) for name in dict.fromkeys(training) if name in ("detect", *RUNS)]
        found[key] = Row(place(key, setting), kind.title, trained, sampling, kind.role)
    return found


def plan(
    outdir: str,
    settings: Sequence[str],
    chosen: Sequence[str] = tuple(ROWS),
    *,
    source: str = SOURCE,
    resolution: int = 16,
    seed: int = 0,
    scale: float = 1.0,
    num: int = 2000,
    judge: str | None = None,
) -> list[Step]:
    """List all commands in order: for each row what it needs and is not there yet, its images, its metrics.

    settings    keys of SETTINGS
    chosen      keys of ROWS
    source      Fashion-MNIST's files
    seed        of label noise and training
    scale       multiplies the training lengths
    num         images per row
    judge       snapshot of a classifier that judges; None: one is trained on the clean labels
    """
    paths = [None if path is None else shlex.quote(path) for path in (outdir, source, judge)]  # in command lines
    commands, found = _Commands(*paths, resolution, seed, scale, num), {}

    def add(step: Step) -> None:
        found.setdefault(step.name, step)

    for setting in settings:
        for key, row in rows(paths[0], setting, chosen).items():
            kind = ROWS[key]
            names = ["clean", "test", *([] if judge else ["judge"])]
            names += needed(kind.run, setting) if kind.run else [key.removeprefix("real-")]
            names += needed(kind.guide, setting) if kind.guidance else []
            for name in names:
                add(commands.step(name, setting))
            for step in commands.evaluation(key, row, setting):
                add(step)
    return list(found.values())


@dataclass
class _Commands:
    """The commands of a plan. Paths are quoted."""

    outdir: str
    source: str
    judge: str | None
    resolution: int
    seed: int
    scale: float
    num: int

    def archive(self, name: str, setting: str) -> str:
        return f"{self.outdir}/datasets/{place(name, setting)}.zip"

    def labels(self, name: str, setting: str) -> str:
        return f"{self.outdir}/{place(name, setting)}/labels.npz"

    def step(self, name: str, setting: str) -> Step:
        """Return the step of this name. Equal steps of two settings are the same step."""
        title, seconds, command = self.run(name, setting) if name in RUNS else self.preparation(name, setting)
        return Step(place(name, setting), title, seconds, command)

    def preparation(self, name: str, setting: str) -> tuple[str, float, str]:
        """Return title, seconds and command of an archive or of the detection."""
        kind = SETTINGS[setting]
        archive = (
            f"dataset_tool.py --source={self.source} --dest={self.archive(name, setting)} --overwrite "
            f"--resolution={self.resolution}x{self.resolution}"
        )
        noise = f"--noise_type={kind.noise} --noise_rate={kind.rate} --seed={self.seed}"
        detect = f"detect_noise.py --data={self.archive('noisy', setting)} --dest={self.labels(name, setting)}"
        short = f" --epochs={max(round(EPOCHS * self.scale), 1)}" if self.scale < 1 else ""
        clean = f"--labels={self.labels('detect', setting)} --foreign=0 --cleaned={self.archive(name, setting)}"
        return {
            "clean": ("archive of the training images", 10, archive),
            "test": ("archive of the test images", 3, f"{archive} --eval"),
            "noisy": (f"label noise: {kind.title}", 10, f"{archive} {noise}"),
            "cleaned-archive": ("archive with corrected labels", 10, f"{detect} {clean}"),
            "detect": ("find the wrong labels", 300 * min(self.scale, 1), f"{detect} --seed={self.seed}{short}"),
        }[name]

    def run(self, name: str, setting: str) -> tuple[str, float, str]:
        """Return title, seconds and command of a training."""
        run, size, kind = RUNS[name], SIZES[self.resolution], SETTINGS[setting]
        length = kimg(name, self.resolution, self.scale)
        seed = JUDGE_SEED if name == "judge" else self.seed
        labels = self.labels("detect", setting)
        transition = f"--noise_type={kind.noise} --noise_rate={kind.rate}"
        if not kind.known:
            transition = f"--noise_type=matrix --noise_matrix={labels}"
        made = {name: f"{self.outdir}/{place(name, setting)}" for name in ("classifier", "teacher")}
        options = [
            size.denoiser if run.script in ("train.py", "train_noise.py") else size.other,
            f"--outdir={self.outdir}/{place(name, setting)} --nosubdir --data={self.archive(run.after[0], setting)}",
            run.options.format(detect=labels, transition=transition, **made),
            f"--duration={length / 1000:.6f} --tick={length / 20:.4f} --dump=2 --seed={seed} --resume=latest",
        ]
        return run.title, size.seconds * length * run.cost, " ".join([run.script, *filter(None, options)])

    def evaluation(self, key: str, row: Row, setting: str) -> list[Step]:
        """Return the steps that make the images of a row and measure them; real images are there already."""
        judge, test = self.judge or f"{self.outdir}/judge", self.archive("test", setting)
        metrics = (
            f"--detector={judge} --judge={judge} --features={self.outdir}/features.npz "
            f"--test={test} --cas_arch=small --cas_epochs={max(round(CAS_EPOCHS * min(self.scale, 1)), 1)}"
        )
        if ROWS[key].run:
            steps = evaluation(self.outdir, row, self.num, test, "--class=0-9 ", metrics)
        else:
            images = self.archive(key.removeprefix("real-"), setting)
            title, metrics = f"evaluate {row.title}", f"{metrics} --num={self.num}"
            steps = [measurement(self.outdir, row, images, test, metrics, title)]
        image = SIZES[self.resolution].seconds / 1000
        sampling = image * 35 / 3 * (2 if ROWS[key].guidance else 1)  # 35 forward passes
        cas = image / 3 * CAS_EPOCHS  # of a small classifier
        expected = [sampling, cas][-len(steps) :]
        return [replace(step, seconds=self.num * s) for step, s in zip(steps, expected, strict=True)]
