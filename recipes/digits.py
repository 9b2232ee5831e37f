"""Digits with 40% wrong labels: baseline, corrected labels, TDSM, SBDC, and clean labels as the oracle."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from recipes.steps import Row, Step, evaluation, finished
from reports.comparison import compare_methods
from reports.page import Picture, Section
from training.presets import presets_of

__all__ = ["NOISES", "PARTS", "WEIGHT", "plan", "report", "rows"]

PARTS = ("posterior", "tdsm", "sbdc")  # what --only of quickstart.py can choose
# How `train.py` treats the posterior of the labels -> title of the row.
MODES = {
    "drop": "drop the labels that are believed wrong",
    "relabel": "replace them by the most probable ones",
    "sample": "draw labels from their posterior",
}
NOISES = {"sym": "symmetric", "asym": "asymmetric", "instance": "instance-dependent"}

# Of SBDC's calibrated guidance on the digits. 1 is right for an optimal discriminator; where noise decides the class,
# the gradient of this one is half as long as the exact one in its direction.
WEIGHT = 2


def rows(outdir: str, only: Sequence[str]) -> list[Row]:
    """List the methods of the table."""
    baseline, guide = f"--network={outdir}/baseline", f"--discriminator={outdir}/discriminator"
    calibrated = f"--dg_mode=calibrated --dg_weight_1st_order={WEIGHT} --dg_weight_2nd_order={WEIGHT}"
    found = [Row("baseline", "baseline: labels as they are", ["baseline"], baseline)]
    if "posterior" in only:
        found.append(Row("oracle", "oracle: clean labels", ["oracle"], f"--network={outdir}/oracle"))
        found += [Row(mode, title, ["detect", mode], f"--network={outdir}/{mode}") for mode, title in MODES.items()]
    if "tdsm" in only:
        found.append(Row("tdsm", "TDSM", ["classifier", "tdsm"], f"--network={outdir}/tdsm"))
    if "sbdc" in only:
        trained = ["baseline", "detect", "discriminator"]
        constant = (
            "--dg_mode=constant --S_clip_min=1.5 --S_clip_max=50 --dg_weight_1st_order=0.9 --dg_weight_2nd_order=0.9"
        )
        found += [
            Row("sbdc-constant", "SBDC, constant weight", trained, f"{baseline} {guide} {constant}"),
            Row("sbdc", "SBDC, calibrated weight", trained, f"{baseline} {guide} {calibrated}"),
        ]
    if {"tdsm", "sbdc"} <= set(only):
        found.append(
            Row(
                "tdsm-sbdc",
                "SBDC on top of TDSM",
                ["classifier", "tdsm", "detect", "discriminator"],
                f"--network={outdir}/tdsm {guide} --dg_mode=calibrated --noise_rate=0.1",
            )
        )
    return found


def plan(outdir: str, seed: int, scale: float, only: Sequence[str], noise: str, num: int) -> list[Step]:
    """List all commands in order. `scale` multiplies the training lengths; `num`: images per row of the table."""
    clean, noisy = f"{outdir}/datasets/digits.zip", f"{outdir}/datasets/digits_{noise}40.zip"
    labels = f"{outdir}/detect/labels.npz"

    def training(script: str, name: str, rest: str = "", data: str = noisy) -> str:
        kimg = presets_of(script)["digits"].options["duration"] * 1000 * scale
        return (
            f"{script} --preset=digits --outdir={outdir}/{name} --nosubdir --data={data}{rest}"
            f" --duration={kimg / 1000:.6f} --tick={kimg / 20:.4f} --dump=5 --seed={seed} --resume=latest"
        )

    steps = [
        Step("clean", "archive of 1,797 digits", 2, f"dataset_tool.py --source=digits --dest={clean} --overwrite"),
        Step(
            "noisy",
            "the same with 40% of the labels wrong",
            2,
            f"dataset_tool.py --source=digits --dest={noisy} --noise_type={noise} --noise_rate=0.4 --seed={seed}"
            " --overwrite",
        ),
        Step("baseline", "train the baseline", 75, training("train.py", "baseline")),
    ]
    if "tdsm" in only:
        known = f" --noise_type={noise} --noise_rate=0.4" if noise != "instance" else " --noise_type=auto"
        cls = f" --cls={outdir}/classifier"
        steps += [
            Step("classifier", "train TDSM's classifier", 35, training("train_classifier.py", "classifier", known)),
            Step("tdsm", "train TDSM", 270, training("train_noise.py", "tdsm", cls)),
        ]
    if {"posterior", "sbdc"} & set(only):
        epochs = max(round(presets_of("detect_noise.py")["digits"].options["epochs"] * scale), 1)
        command = f"detect_noise.py --preset=digits --data={noisy} --dest={labels} --epochs={epochs} --seed={seed}"
        steps.append(Step("detect", "find the wrong labels", 50, command))
    if "posterior" in only:
        steps.append(Step("oracle", "train on clean labels", 75, training("train.py", "oracle", data=clean)))
        for mode in MODES:
            path = f" --posterior={labels} --posterior_mode={mode}"
            steps.append(Step(mode, f"train on labels: {mode}", 75, training("train.py", mode, path)))
    if "sbdc" in only:
        path = f" --label-path={labels}"
        command = training("train_discriminator.py", "discriminator", path)
        steps.append(Step("discriminator", "train SBDC's discriminator", 80, command))
    for row in rows(outdir, only):
        steps += evaluation(outdir, row, num, clean, "--class=0-9 ")
    if "sbdc" in only:
        steps.append(
            Step(
                "sweep",
                "SBDC for a list of weights",
                100,
                f"sweep.py --network={outdir}/baseline --discriminator={outdir}/discriminator --data={clean}"
                f" --detector=pixels --outdir={outdir}/sweep --seeds=0-{num - 1}",
            )
        )
    return steps


def report(outdir: str, seed: int, only: Sequence[str], seconds: Mapping[str, float], noise: str, num: int) -> Section:
    """Return the section of the report on a finished plan."""
    methods = finished(outdir, rows(outdir, only), seconds)
    notes = [
        f"Each row: {num:,} images, {num // 10} per class, seeds 0 to {num - 1}, 18 steps. Training seed {seed}.",
        "The training time of TDSM includes its classifier. The training time of SBDC includes the model that it"
        " corrects, and the detection.",
        "FD: Frechet distance of pixels in [-1,1] to the whole clean archive; class-wise: the mean over classes.",
    ]
    pictures = []
    if {"posterior", "sbdc"} & set(only):
        with open(f"{outdir}/logs/detect.txt") as f:
            notes += [line.strip() for line in f if line.startswith(("Noise rate:", "Detection:"))][-2:]
        if os.path.exists(f"{outdir}/detect/labels.png"):
            text = "Label in the archive > label that detect_noise.py suggests."
            pictures.append(Picture(f"{outdir}/detect/labels.png", "The most suspicious labels", text))
    if "sbdc" in only:
        notes.append(
            "SBDC with constant weight: 0.9 at 1.5 <= sigma <= 50, as in the paper's example. With calibrated weight: "
            f"{WEIGHT} at all noise levels. On top of TDSM: weight 1, for 10% wrong labels that TDSM has left."
        )
        with open(f"{outdir}/sweep/sweep.md") as f:
            verdict = f.read().splitlines()[-1]
        pictures.append(
            Picture(
                f"{outdir}/sweep/sweep.png",
                "How much guidance?",
                f"SBDC's weights, constant and calibrated, at all noise levels. {verdict}",
            )
        )
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
