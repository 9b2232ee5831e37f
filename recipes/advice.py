"""What to do with a set of noisy labels: a decision table with literal commands, by rules with measured numbers."""

from __future__ import annotations

import fnmatch
import math
import os
import shlex
from dataclasses import dataclass

import numpy as np

from archives.archive_set import find_archives
from archives.classes import name_class
from archives.dataset import ImageDataset
from archives.label_file import LabelFile
from archives.listing import some
from archives.relabel import CONFIDENCE
from detection.inspection import confusable_pairs
from detection.quality import disbelieved
from reports.facts import Advice, Confusable
from training.presets import presets_of

__all__ = ["advise", "name_confusable"]

FEW_WRONG = 0.05  # share of wrong labels up to which labels stay as they are
FEW_FOREIGN, MANY_FOREIGN = 0.01, 0.10  # shares of foreign images; above the second one `find_outliers` misses some
MEASURED = 0.45  # the detector states up to so much where 40% are wrong; above, what was measured at 80% is said, too
MEASURED_FOR = 15_000  # images; for more of them, the small presets' lengths grow in proportion
MADE_FOR = 50_000  # images of CIFAR-10; for fewer of them, the large presets' lengths shrink in proportion
SHORTEST = 0.05  # share of the large presets' lengths that the smallest sets have
SMALL = 16  # pixels; up to this side the presets for small images, which were measured on a CPU
LENGTHS = ("lr_rampup_kimg", "ema")  # options that go with the length of training
TICK, SAVES = 50, 10  # thousands of images, without --tick; states and snapshots of a run of another length
TELL = 10  # pairs of classes that are named

SOURCE = (
    "The rules come from measurements on Fashion-MNIST and digits, some of them with smaller batches than these "
    "commands have; your images may behave differently."
)
MEASUREMENTS = (
    "With 40% of the labels wrong, class-wise FD on 60,000 images of Fashion-MNIST (16x16) was 1.63 on the cleaned "
    "archive, 1.92 after relabeling all, 2.01 with labels drawn from their posterior, 2.11 after dropping the images, "
    "3.46 with TDSM, 5.46 with SBDC's guidance, 21.9 without a cure and 2.11 with clean labels; on 1,797 digits "
    "(seed 1) it was 1.03 after relabeling, 1.07 after dropping, 1.21 with TDSM, 1.33 with SBDC, 5.71 without a cure "
    "and 0.99 with clean labels."
)
LARGE = "The commands are made for GPUs. On a CPU make an archive of 16x16 first, and inspect it:"
MEASURED_ABOVE = (
    "With 80% wrong, Fashion-MNIST had 1.88 on the cleaned archive, 2.51 after relabeling all, 3.82 with labels drawn "
    "from their posterior, 8.92 with TDSM and 42.2 without a cure; nothing was measured on small sets."
)


def name_confusable(dataset: ImageDataset, found: LabelFile) -> list[Confusable]:
    """Return the pairs of classes that the detector cannot tell apart, the worst ones first, in words."""
    names = dataset.shown_classes
    return [
        Confusable(
            names[pair.first],
            names[pair.second],
            f"1 in {max(round(1 / pair.share), 2)} looks like the other one; do not relabel automatically",
        )
        for pair in confusable_pairs(found)[:TELL]
    ]


@dataclass
class _Commands:
    """The commands for one set. Lengths are those of the presets, in proportion for large sets of small images, and for
    small sets of large images."""

    data: str  # as it was given
    labels: str  # the label file
    classifier: str | None  # of the detection
    dataset: ImageDataset

    def __post_init__(self) -> None:
        first = find_archives(self.data)[0].rstrip(os.sep)
        self.stem = first[:-4] if first.lower().endswith(".zip") else first
        self.small = self.dataset.resolution <= SMALL
        n = len(self.dataset)
        self.scale = max(1.0, n / MEASURED_FOR) if self.small else min(max(n / MADE_FOR, SHORTEST), 1.0)

    @property
    def cleaned(self) -> str:
        path = f"{self.stem}-clean.zip"
        again = any(fnmatch.fnmatch(path, part) for part in self.data.split(","))  # a glob would take it for a part
        return f"{self.run('clean')}.zip" if again else path

    def _preset(self, script: str) -> str:
        return ("photos" if script == "train_rduot.py" else "digits") if self.small else "cifar10"

    def _duration(self, script: str) -> float:
        """Return the length of training in millions of images."""
        return presets_of(script)[self._preset(script)].options["duration"] * self.scale

    def passes(self, script: str) -> int:
        """Return how often training passes over the set."""
        return math.ceil(self._duration(script) * 1e6 / len(self.dataset))

    def run(self, part: str) -> str:
        return f"runs/{os.path.basename(self.stem)}-{part}"

    def train(self, script: str, part: str, *rest: str, data: str | None = None) -> str:
        length = [f"--duration={self._duration(script):.3g}"] if self.scale != 1 else []
        if self.scale < 1:
            options = presets_of(script)[self._preset(script)].options
            length += [f"--{name}={options[name] * self.scale:.3g}" for name in LENGTHS if name in options]
            ticks = max(int(1000 * self._duration(script) / options.get("tick", TICK) / SAVES), 1)
            length += [f"--snap={ticks}", f"--dump={ticks}"]
        own = [f"--preset={self._preset(script)}", f"--outdir={self.run(part)}", "--nosubdir", "--resume=latest"]
        return shlex.join(["python", script, *own, f"--data={data or self.data}", *length, *rest])

    def shrink(self) -> str:
        """Return how to make an archive of small images of the set."""
        size = f"{SMALL}x{SMALL}"
        dest = f"--dest={self.stem}-{size}.zip"
        return shlex.join(["python", "dataset_tool.py", f"--source={self.data}", dest, f"--resolution={size}"])

    def posterior(self, foreign: bool, drawn: bool) -> str:
        mode = ["--posterior_mode=sample"] if drawn else []
        outliers = ["--outliers=drop", f"--outlier_data={self.labels}"] if foreign else []
        return self.train("train.py", "posterior", f"--posterior={self.labels}", *mode, *outliers)

    def tdsm(self, known: bool) -> str:
        noise = ["--noise_type=auto", *([f"--label-path={self.labels}"] if known else [])]
        # The large preset is the paper's: the sum over all classes at temperature 1, at twice the cost.
        ours = [] if self.small else ["--others=sample", "--temp=auto"]
        model = self.train("train_noise.py", "tdsm", f"--cls={self.run('classifier')}", *ours)
        return f"{self.train('train_classifier.py', 'classifier', *noise)}\n{model}"

    def correct(self) -> str:
        """Return how to correct the sampling of a trained model."""
        commands = [self.train("train.py", "baseline")]
        if not self.classifier:
            commands.append(self.train("train_discriminator.py", "discriminator", f"--label-path={self.labels}"))
        guide = [f"--network={self.run('baseline')}", f"--discriminator={self.classifier or self.run('discriminator')}"]
        rest = [f"--outdir={self.run('corrected')}", "--seeds=0-99", f"--class=0-{self.dataset.label_dim - 1}"]
        return "\n".join([*commands, shlex.join(["python", "generate.py", *guide, *rest])])

    def rduot(self, known: bool) -> str:
        known_outliers = [f"--outlier_data={self.labels}"] if known else []
        return self.train("train_rduot.py", "rduot", "--cost=robust", *known_outliers)

    def clean(self, foreign: bool, fix: str) -> str:
        dest = f"{self.run('clean-labels')}.npz"
        rest = [f"--dest={dest}", f"--cleaned={self.cleaned}", f"--fix={fix}", *(["--drop_foreign"] if foreign else [])]
        detect = ["python", "detect_noise.py", f"--data={self.data}", f"--labels={self.labels}", *rest]
        return f"{shlex.join(detect)}\n{self.train('train.py', 'clean', data=self.cleaned)}"


def advise(
    dataset: ImageDataset, found: LabelFile, data: str, labels: str, classifier: str | None = None
) -> tuple[list[Advice], str]:
    """Return the decision table for a set, and why one of its rows is recommended.

    data        the set, as a script's --data
    labels      the label file `found`, on disk
    classifier  snapshot of the classifier that found it; None: there is none
    """
    foreign = 0 if found.is_outlier is None else int(found.is_outlier.sum())
    here = np.ones(len(found.labels), dtype=bool) if found.is_outlier is None else ~found.is_outlier
    wrong = found.noise_rate
    best, why = _choose(wrong, foreign / len(here), dataset.resolution)
    only_foreign = foreign > 0 and wrong <= FEW_WRONG
    sure = found.suggested != found.labels
    if found.suggested_score is not None:
        sure &= found.suggested_score >= CONFIDENCE
    left = here if only_foreign else (found.is_clean | sure) & here
    emptied = np.setdiff1d(found.labels[here], np.where(sure & ~found.is_clean, found.suggested, found.labels)[left])
    if best == "Clean" and not only_foreign and len(emptied):
        names = some((name_class(c, dataset.class_names) for c in emptied.tolist()), len(emptied))
        best = "TDSM" if found.posterior is None else "Posterior"
        why = f"Cleaning would leave no image of {names}: few of the wrong labels have a right one that is sure."
    share = f"{foreign / len(here):.1%} of the images are foreign"
    if found.is_outlier is None:
        share = "nobody has looked for foreign ones"
    stated = f"About {wrong:.1%} of the labels are wrong, and {share}."
    if classes := disbelieved(found):
        names = some([name_class(c, dataset.class_names) for c in classes], len(classes))
        why += (
            f" But all images labeled {names} are believed wrong. Look at the page: if many of them are right, the "
            "detector has learned too little, and should train for longer."
        )
    why = f"{stated} {why} {SOURCE}"
    c = _Commands(data, labels, classifier, dataset)
    if not c.small:
        why += f" {LARGE} {c.shrink()}"
    model = c.passes("train.py")
    lost = f"{int((~left).sum()):,} of {len(left):,} images are lost"
    rows = [
        Advice(
            "Leave the set as it is",
            "Trains the baseline, which believes every label.",
            f"At most {FEW_WRONG:.0%} of the labels are wrong and at most {FEW_FOREIGN:.0%} of the images are foreign.",
            f"{model:,} training passes over the set",
            c.train("train.py", "baseline"),
        ),
        Advice(
            "Clean",
            "Leaves out the foreign images, and keeps all labels."
            if only_foreign
            else "Replaces wrong labels where the right one is sure, and leaves out the other images with wrong labels"
            + (", and foreign ones." if foreign else "."),
            f"At most {FEW_WRONG:.0%} of the labels are wrong, but images are foreign."
            if only_foreign
            else "Labels are wrong, and the detector finds them: look at the page first.",
            f"No detection again, then {model:,} training passes; {lost}",
            c.clean(foreign > 0, "keep" if only_foreign else "relabel"),
        ),
        Advice(
            "TDSM",
            "Trains on all images, and learns the clean labels' model by the transition matrix.",
            "The labels should stay as they are, and the noise depends on the class.",
            f"{c.passes('train_classifier.py'):,} training passes of the classifier, {c.passes('train_noise.py'):,} of "
            "the model, whose steps take up to 1.5 times as long as the baseline's",
            c.tdsm(found.transition is not None),
        ),
        Advice(
            "Rejection" if c.classifier else "SBDC",
            f"Leaves the model as it is. {'The detector' if c.classifier else 'A discriminator'} has its images drawn "
            "anew until the label is right.",
            "A model is trained already, and training again is too expensive. Leave out the first command then, and "
            "name your model as --network.",
            ("No" if c.classifier else f"{c.passes('train_discriminator.py'):,}")
            + f" training passes besides the baseline's {model:,}; "
            "sampling takes at least 1 / (1 - noise rate) times as long",
            c.correct(),
        ),
        Advice(
            "RDUOT",
            "Leaves out images that are far from what is usual, and trains a GAN of a few steps without classes.",
            "Many images are foreign, and leaving out those that were found is not enough. Measured at 8x8 and 16x16.",
            f"{c.passes('train_rduot.py'):,} training passes of two networks",
            c.rduot(found.is_outlier is not None),
        ),
    ]
    if found.posterior is not None:
        drawn = best == "Posterior"  # the most probable labels may leave a class as empty as cleaning does
        row = Advice(
            "Posterior",
            (
                "Draws the label of each image anew from its posterior, at each use"
                if drawn
                else "Trains on the most probable label of each image"
            )
            + (", and leaves out the foreign images." if foreign else "."),
            "Labels are wrong, and cleaning would empty a class."
            if drawn
            else "Labels are wrong, and all images are to be learned.",
            f"No detection again, then {model:,} training passes; {foreign:,} of {len(left):,} images are lost",
            c.posterior(foreign > 0, drawn),
        )
        rows.insert(2, row)
    for row in rows:
        row.recommended = row.method == best
    return rows, why


def _choose(wrong: float, foreign: float, resolution: int) -> tuple[str, str]:
    """Return the recommended method and the reason. `wrong` and `foreign` are shares of the set."""
    if wrong <= FEW_WRONG and foreign <= FEW_FOREIGN:
        return (
            "Leave the set as it is",
            f"Up to {FEW_WRONG:.0%} and {FEW_FOREIGN:.0%} a cure may do more harm than good: the detector itself is "
            "wrong about as often.",
        )
    if wrong <= FEW_WRONG and foreign > MANY_FOREIGN and resolution <= SMALL:
        return (
            "RDUOT",
            f"Where more than {MANY_FOREIGN:.0%} are foreign, the search misses some of them. Trained on photographs "
            "with 10% digits among them, next to none of RDUOT's images were digits, at 8x8 and at 16x16. A model "
            "without this defense made 12.5% and 7.2% digits.",
        )
    if wrong <= FEW_WRONG:
        return "Clean", "Leaving out only the foreign images loses little."
    above = f" {MEASURED_ABOVE}" if wrong > MEASURED else ""
    return "Clean", f"Correcting labels came closest to clean ones. {MEASUREMENTS}{above}"
