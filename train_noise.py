"""Train a diffusion model by TDSM: it learns clean-label scores from noisy labels and a classifier of those labels.

T is the transition matrix: T[y,o] is the probability that an image of class y is labeled o. The classifier's snapshot
usually holds it. --noise_type and its companions state it where the snapshot does not.
"""

from __future__ import annotations

import dnnlib.before_torch

import click

import dnnlib.cli
from dnnlib.cli import AutoFloat, FloatRange, blame
from sampling.sheet import save_samples
from torch_utils import persistence
from training import options, run
from training.config import TDSMConfig
from training.objectives.classifier import check_classifier, check_noise_levels
from training.objectives.tdsm import TDSM, known_transition
from training.outlier_options import outlier_options, outlier_rule, outlier_settings
from training.temperature import Temperature

EXAMPLES = """
Examples:
  python train_noise.py --outdir=noise-runs --data=datasets/digits_sym40.zip --preset=digits \\
      --cls='classifier-runs/00000-*/network-snapshot-*.pkl'
  torchrun --standalone --nproc_per_node=8 train_noise.py --outdir=noise-runs --cond=1 --arch=ddpmpp \\
      --data=datasets/cifar10_sym_40-32x32.zip --noise_type=sym --noise_rate=0.4 \\
      --cls='classifier-runs/00000-*/network-snapshot-*.pkl'
"""


# fmt: off
@click.command(cls=dnnlib.cli.Command, help=__doc__, epilog=EXAMPLES + options.preset_help("train_noise.py"))
@options.run_options("train_noise.py", cond=True)
@options.denoiser_options()
@options.noise_options("clean", "sym", "asym", "pair", "matrix")
@options.posterior_options()
@outlier_options()
@click.option("--cls", metavar="PKL|DIR|URL",
              help="Classifier: a snapshot of train_classifier.py, its run directory, or one of TDSM's (required)")
@click.option("--weights", type=click.Choice(["image", "class"]),
              help="Weights of the possible classes by what the classifier sees in the image, or by T and the label "
                   "alone: the ablation S-DSM, for which --noise_type may stand in for --cls  [default: image]")
@click.option("--others", type=click.Choice(["sample", "all"]),
              help="Other possible classes of an image: one drawn by its weight, or their whole sum, as published  "
                   "[default: sample; all with --tau or --pairs]")
@click.option("--tau", metavar="W", type=FloatRange(min=0, max=1), default=0.01,
              help="Ignore other possible classes whose weight is at most this")
@click.option("--pairs", metavar="K", type=click.IntRange(min=1),
              help="Keep at most the K heaviest other classes per image; faster with many  [default: no limit]")
@click.option("--temp", metavar="FLOAT|auto", type=AutoFloat(min=0, min_open=True),
              help="Divide the classifier's logits by this; below 1 makes it more certain. auto: by what its snapshot "
                   "records for each noise level  [default: auto]")
@click.option("--resume_sub", metavar="PKL|URL", help="The same as --transfer")
# fmt: on
def main(**opts) -> None:
    if opts["resume_sub"]:
        if opts["transfer"]:
            raise click.UsageError("--resume_sub and --transfer are the same option; give one")
        opts["transfer"] = opts["resume_sub"]
    cut = [option for option in dnnlib.cli.given_options() if option in ("--tau", "--pairs")]
    if cut and opts["others"] == "sample":
        raise click.UsageError(f"{cut[0]}: shortens the sum over all classes; leave it out or give --others=all")
    posterior, outliers = options.posterior_settings(opts), outlier_settings(opts)
    if posterior is not None and posterior.mode == "sample":
        raise click.UsageError(
            "--posterior_mode=sample: labels drawn from the posterior leave no noise to correct; "
            "give them to train.py, or choose another rule"
        )
    by_class = opts["weights"] == "class"
    if by_class and "--temp" in dnnlib.cli.given_options():
        raise click.UsageError("--temp: belongs to --weights=image; with class there is no classifier to divide")
    if opts["cls"] is None and not (by_class and opts["noise_type"]):
        raise click.UsageError("Missing option '--cls'" + (" or '--noise_type'." if by_class else "."))
    path = None
    if opts["cls"] is not None:
        with blame("--cls"):
            path = persistence.find_snapshot(opts["cls"])

    def make(config, dataset, device):
        snapshot, temperature = dict(ema=None, info=dict(posterior="clean")), None
        if path is not None:
            with blame("--cls"):
                snapshot = persistence.load_snapshot(path, trust_pickle=opts["trust_pickle"], kind="classifier")
                check_classifier(snapshot, dataset, path)
                check_noise_levels(snapshot, path)
                temperature = Temperature.read(snapshot["info"].get("temperature"), path)
        stated = options.stated_transition(**options.noise_settings(opts), dataset=dataset)
        with blame("--noise_type"):
            transition, kind = known_transition(snapshot["info"], stated, dataset, path)
        known = dict(transition=transition, posterior=kind, temperature=temperature)
        known |= dict(outliers=outlier_rule(config, dataset, device))
        labels = options.posterior_labels(config, dataset, device)
        # A continued run has its weights from the state, so the option alone does not say.
        net = None if config.tdsm.weights == "class" else snapshot["ema"]
        return TDSM(config, dataset, device, classifier=net, posterior_labels=labels, **known)

    section = TDSMConfig(
        cls=path or "",
        weights=opts["weights"],
        tau=opts["tau"],
        pairs=opts["pairs"],
        others=opts["others"] or ("all" if cut else None),
        temp=opts["temp"],
        **options.noise_settings(opts),
    )
    sections = dict(tdsm=section, posterior=posterior, outliers=outliers)
    run.start(opts, TDSM.method, make, require_labels=True, draw_samples=save_samples, **sections)


if __name__ == "__main__":
    main()
