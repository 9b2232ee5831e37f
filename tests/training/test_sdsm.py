"""S-DSM, the ablation of TDSM with class-level weights: P(clean = c | observed = o), the same for all images."""

import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import train_noise
from tests.support.objectives import CPU, Data, FixedClassifier, make_config, ready
from tests.support.runs import TINY
from tests.support.synth import make_archive, pictures
from torch_utils import persistence
from torch_utils.training_stats import Stats
from training.objectives.tdsm import TDSM

T = np.array([[0.7, 0.1, 0.1, 0.1], [0.2, 0.8, 0, 0], [0, 0.3, 0.6, 0.1], [0.25, 0.25, 0.25, 0.25]])


class Constant(FixedClassifier):
    """A classifier that sees nothing in the images: always the shares of the classes."""

    def __init__(self, shares):
        super().__init__()
        self.shares = torch.as_tensor(shares).log().float()

    def forward(self, x, sigma, augment_labels=None):
        return self.shares.expand(len(x), -1)


def labeled(shares, n=4000):
    """Data whose labels come from classes with these shares by T, as exactly as whole images allow."""
    data = Data(n=n)
    data.labels = np.repeat(np.arange(4), np.round(n * shares @ T).astype(int))[:n]
    data.pixels = data.pixels[: len(data.labels)]
    return data


def make(data, classifier, others="all"):
    config = make_config(method="tdsm", tdsm=dict(tau=0.01, temp=1.0, others=others))
    objective = ready(TDSM, config, data, CPU, classifier=classifier, transition=T, posterior="clean")
    rng = torch.Generator().manual_seed(1)
    for p in objective.trained["net"].net.parameters():  # away from the initial weights, where all classes look alike
        p.data += 0.2 * torch.randn(p.shape, generator=rng)
    return objective


@pytest.mark.parametrize("others", ["all", "sample"])
def test_the_loss_is_that_of_a_classifier_that_only_knows_the_shares(others):
    shares = np.array([0.4, 0.3, 0.2, 0.1])
    data = labeled(shares)
    blind, seeing, by_class = (make(data, c, others) for c in (Constant(shares), FixedClassifier(), None))
    images, items = data.pixels[:64], torch.arange(0, 4000, 63)[:64]
    labels, draws = data.onehot(items), blind.draw(images, torch.Generator().manual_seed(0))
    losses = []
    for objective in (blind, seeing, by_class):
        torch.manual_seed(0)  # for dropout
        losses.append(objective.loss(images, labels, draws, Stats(CPU)))
    torch.testing.assert_close(losses[2], losses[0], rtol=2e-3, atol=1e-3)  # the shares are found from the labels
    assert (losses[2] - losses[1]).abs().max() > 0.1


def test_weights_are_the_shares_of_classes_behind_a_label():
    shares = np.array([0.4, 0.3, 0.2, 0.1])
    joint = shares[:, None] * T
    found = make(labeled(shares), None).class_weights
    np.testing.assert_allclose(found, (joint / joint.sum(axis=0)).T, atol=2e-3)


def test_the_script_needs_no_classifier_where_the_noise_is_stated(tmp_path):
    data = make_archive(tmp_path / "d.zip", pictures(32, channels=1), [i % 2 for i in range(32)])
    common = [f"--data={data}", f"--outdir={tmp_path}/out", "--cond=1", *TINY, "--duration=0.000032"]
    noise = ["--noise_type=sym", "--noise_rate=0.2"]

    def run(*args):
        result = CliRunner().invoke(train_noise.main, [*common, *args])
        return result.exit_code, result.output

    for args, message in [
        (["--weights=class"], r"Missing option '--cls' or '--noise_type'\.$"),
        (noise, r"Missing option '--cls'\.$"),
        (["--weights=class", *noise, "--temp=2"], "--temp: belongs to --weights=image"),
    ]:
        code, output = run(*args)
        assert code == 2 and re.search(f"^Error: {message}", output, re.M), output
    assert not (tmp_path / "out").exists()
    code, output = run("--weights=class", *noise)
    assert code == 0 and "Weights by class (S-DSM)" in output, output
    (run_dir,) = (tmp_path / "out").iterdir()
    options = json.loads((run_dir / "training_options.json").read_text())["tdsm"]
    assert options["weights"] == "class" and options["cls"] == ""
    info = persistence.load_snapshot(persistence.find_snapshot(str(run_dir)))["info"]
    np.testing.assert_allclose(info["transition"], [[0.8, 0.2], [0.2, 0.8]])
    code, output = run("--weights=class", *noise, "--resume=latest", "--duration=0.000064")
    assert code == 0 and "Resuming at" in output, output
    code, output = run("--weights=image", *noise, f"--cls={run_dir}", "--resume=latest")
    assert code == 1 and "tdsm.weights: class there, image here" in output
