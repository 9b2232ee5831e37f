"""Digits with 40% wrong labels: baseline, corrected labels, TDSM, SBDC, and clean labels as the oracle."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence

from recipes.steps import AFTER_ANOTHER, CONSTANT, REJECTION, Row, Step, evaluation, finished
from reports.comparison import compare_methods
from reports.finding import BASELINE, ORACLE
from reports.page import Picture, Section
from reports.tradeoff import draw_tradeoff
from training.presets import presets_of

__all__ = ["NOISES", "PARTS", "WEIGHT", "plan", "report", "rows"]

PARTS = ("posterior", "tdsm", "sbdc")  # what --only of quickstart.py can choose
# Title of a row -> how `train.py` treats the posterior of the labels, and what that does.
MODES = {
    "drop": ("drop", "leave out images whose label is believed wrong"),
    "relabel": ("relabel", "replace every label by the most probable one"),
    "posterior": ("sample", "draw every label from its posterior, anew for each use"),
    "null": ("null", "relabel, and train without a label where none is probable"),
}
NOISES = {"sym": "symmetric", "asym": "asymmetric", "instance": "instance-dependent"}

# Of SBDC's calibrated guidance on the digits. 1 is right for an optimal discriminator; where noise decides the class,
# the gradient of this one is half as long as the exact one in its direction. Rejection needs no weight.
WEIGHT = 2
SHORT = 0.25  # a shorter detection than this share may find no class probable, and then no image would have a label
SWEEP = 500  # images for each weight that the sweep tries


def rows(outdir: str, only: Sequence[str]) -> list[Row]:
    """List the methods of the table."""
    baseline, guide = f"--network={outdir}/baseline", f"--discriminator={outdir}/discriminator"
    calibrated = f"--dg_mode=calibrated --dg_weight_1st_order={WEIGHT} --dg_weight_2nd_order={WEIGHT}"
    found = [
        Row("oracle", "oracle", ["oracle"], f"--network={outdir}/oracle", ORACLE, "trained on the clean labels"),
        Row("baseline", "baseline", ["baseline"], baseline, BASELINE, "trained on the labels as they are"),
    ]
    if "posterior" in only:
        found += [
            Row(name, name, ["detect", name], f"--network={outdir}/{name}", text=text)
            for name, (_, text) in MODES.items()
        ]
    if "tdsm" in only:
        text = "learn the clean labels' model from all images, by the transition matrix"
        found.append(Row("tdsm", "TDSM", ["detect", "classifier", "tdsm"], f"--network={outdir}/tdsm", text=text))
    if "sbdc" in only:
        trained = ["baseline", "detect", "discriminator"]
        text = "correct the baseline's sampling by a discriminator, with"
        found += [
            Row(
                "sbdc-constant",
                "SBDC constant",
                trained,
                f"{baseline} {guide} {CONSTANT}",
                text=f"{text} weight 0.9 at 1.5 <= sigma <= 50, as in the paper's example",
            ),
            Row(
                "sbdc",
                "SBDC calibrated",
                trained,
                f"{baseline} {guide} {calibrated}",
                text=f"{text} calibrated weight {WEIGHT} at all noise levels",
            ),
            Row(
                "sbdc-rejection",
                "SBDC by rejection",
                trained,
                f"{baseline} {guide} {REJECTION}",
                text="draw the baseline's images anew until the discriminator takes them for right",
            ),
            Row(
                "rejection",
                "rejection by the detector",
                ["baseline", "detect"],
                f"{baseline} --discriminator={outdir}/detect/labels-classifier.pkl {REJECTION}",
                text="the same by the detector's classifier, without another training",
            ),
        ]
    if {"tdsm", "sbdc"} <= set(only):
        found.append(
            Row(
                "tdsm-sbdc",
                "TDSM + SBDC",
                ["detect", "classifier", "tdsm", "discriminator"],
                f"--network={outdir}/tdsm {guide} {AFTER_ANOTHER}",
                text="SBDC on top of TDSM with weight 1, for 10% wrong labels that TDSM has left",
            )
        )
    return found


def plan(outdir: str, seed: int, scale: float, only: Sequence[str], noise: str, num: int) -> list[Step]:
    """List all commands in order. `scale` multiplies the training lengths; `num`: images per row of the table."""
    outdir = shlex.quote(outdir)  # in command lines
    clean, noisy = f"{outdir}/datasets/digits.zip", f"{outdir}/datasets/digits_{noise}40.zip"
    labels = f"{outdir}/detect/labels.npz"

    def training(script: str, name: str, rest: str = "", data: str = noisy) -> str:
        kimg = presets_of(script)["digits"].options["duration"] * 1000 * scale
        return (
            f"{script} --preset=digits --outdir={outdir}/{name} --nosubdir --data={data}{rest}"
            f" --duration={kimg / 1000:.6f} --tick={kimg / 20:.4f} --dump=5 --seed={seed} --resume=latest"
        )

    # Seconds are those of a step on one of two cores, beside another step on the other one.
    steps = [
        Step("clean", "archive of 1,797 digits", 2, f"dataset_tool.py --source=digits --dest={clean} --overwrite"),
        Step(
            "noisy",
            "the same with 40% of the labels wrong",
            2,
            f"dataset_tool.py --source=digits --dest={noisy} --noise_type={noise} --noise_rate=0.4 --seed={seed}"
            " --overwrite",
        ),
        Step("oracle", "train on clean labels", 258 * scale, training("train.py", "oracle", data=clean)),
        Step("baseline", "train the baseline", 258 * scale, training("train.py", "baseline")),
    ]
    epochs = max(round(presets_of("detect_noise.py")["digits"].options["epochs"] * scale), 1)
    command = f"detect_noise.py --preset=digits --data={noisy} --dest={labels} --epochs={epochs} --seed={seed}"
    steps.append(Step("detect", "find the wrong labels", 49 * scale, command))
    if "tdsm" in only:
        known, cls = f" --noise_type=auto --label-path={labels}", f" --cls={outdir}/classifier"
        steps += [
            Step(
                "classifier",
                "train TDSM's classifier",
                94 * scale,
                training("train_classifier.py", "classifier", known),
            ),
            Step("tdsm", "train TDSM", 570 * scale, training("train_noise.py", "tdsm", cls)),
        ]
    if "posterior" in only:
        for name, (mode, text) in MODES.items():
            path = f" --posterior={labels} --posterior_mode={mode}"
            if mode == "null" and scale < SHORT:
                path += " --posterior_min=0"
            steps.append(Step(name, f"train: {text}", 258 * scale, training("train.py", name, path)))
    if "sbdc" in only:
        path = f" --label-path={labels}"
        command = training("train_discriminator.py", "discriminator", path)
        steps.append(Step("discriminator", "train SBDC's discriminator", 135 * scale, command))
    for row in rows(outdir, only):
        steps += evaluation(outdir, row, num, clean, "--class=0-9 ")
    if "sbdc" in only:
        steps.append(
            Step(
                "sweep",
                "SBDC for a list of weights",
                114,
                f"sweep.py --network={outdir}/baseline --discriminator={outdir}/discriminator --data={clean}"
                f" --detector=pixels --outdir={outdir}/sweep --seeds=0-{min(num, SWEEP) - 1} --weights=0.5,1,2,3",
            )
        )
    return steps


def report(outdir: str, seed: int, only: Sequence[str], seconds: Mapping[str, float], noise: str, num: int) -> Section:
    """Return the section of the report on a finished plan."""
    methods = finished(outdir, rows(outdir, only), seconds)
    notes = [
        f"Each row: {num:,} images, {num // 10} per class, seeds 0 to {num - 1}, 18 steps. Training seed {seed}.",
        "The training time of a row includes all that it needs: its classifier, the detection, the model that it"
        " corrects.",
        "FD: Frechet distance of pixels in [-1,1] to the whole clean archive; class-wise: the mean over classes.",
    ]
    pictures = []
    with open(f"{outdir}/logs/detect.txt") as f:
        notes += [line.strip() for line in f if line.startswith(("Noise rate:", "Detection:"))][-2:]
    if os.path.exists(f"{outdir}/detect/labels.png"):
        text = "Label in the archive > label that detect_noise.py suggests."
        pictures.append(Picture(f"{outdir}/detect/labels.png", "The most suspicious labels", text))
    if "sbdc" in only:
        path, verdict = draw_tradeoff(f"{outdir}/sweep/sweep.json", f"{outdir}/pictures/sweep.png", methods[0])
        text = f"SBDC's weights at all noise levels, {min(num, SWEEP)} images each. {verdict}"
        pictures.append(Picture(path, "How much guidance?", text, width=640))
    return compare_methods(
        outdir,
        f"cleanscore: digits with 40% wrong labels, {NOISES[noise]} noise",
        "A class-conditional diffusion model is trained on 1,797 digits, four in ten of them with a wrong label. "
        "Does it make the digit that it is asked for?",
        f"{outdir}/datasets/digits_{noise}40.zip",
        methods,
        notes,
        pictures,
    )
