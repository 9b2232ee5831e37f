"""fid.py --precision=bf16: results and files say that features are in bfloat16, and never mix them with float32."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fid
from metrics.detectors import in_precision, load_detector
from tests.support.synth import make_archive, pictures
from tests.support.tf32 import SimulatedTF32
from torch_utils.persistence import save_snapshot
from torch_utils.precision import tf32
from training.networks_conv import ConvClassifier
from training.networks_resnet import Classifier


class FirstProduct(torch.nn.Module):
    """A network for TorchScript: one product of the pixels."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1).to(torch.float32) / 255)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("precision")
    data = make_archive(root / "data.zip", pictures(24, seed=1), [i % 3 for i in range(24)])
    images = make_archive(root / "images.zip", pictures(20, seed=2), [i % 3 for i in range(20)])
    torch.manual_seed(0)
    net = Classifier(8, 3, 3, depth="small", model_channels=8, channel_mult=(1, 2))
    torch.nn.init.normal_(net.head.weight)
    save_snapshot(root / "net.pkl", {"ema": net})
    torch.jit.script(FirstProduct()).save(root / "net.pt")
    save_snapshot(root / "conv.pkl", {"ema": ConvClassifier(8, 3, 3, model_channels=8)})
    return dict(
        root=root, data=data, images=images, net=root / "net.pkl", script=root / "net.pt", conv=root / "conv.pkl"
    )


def run(*args, code=0):
    result = CliRunner().invoke(fid.main, [*map(str, args), "--device=cpu"])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("net", ["net", "script", "conv"])
def test_features_are_rounded_and_little_else(files, net):
    images = torch.from_numpy(pictures(6)).permute(0, 3, 1, 2)
    exact, half = (in_precision(load_detector(str(files[net]), "cpu"), p, "cpu") for p in ("fp32", "bf16"))
    (a, _), (b, probabilities) = exact(images), half(images)
    assert (exact.precision, half.precision, half.name) == ("fp32", "bf16", exact.name)
    assert b.dtype == torch.float32 and (probabilities is None or probabilities.dtype == torch.float32)
    assert 0 < (a - b).abs().max() < 0.03 * a.abs().max()
    assert exact(images)[0].equal(a)  # autocast ends with the call


def test_float32_is_not_tf32(files, tmp_path):
    with tf32(True), SimulatedTF32() as products:
        run("ref", f"--data={files['data']}", f"--dest={tmp_path / 'ref.npz'}", f"--detector={files['net']}")
    assert len(products.seen) > 5 and not any(products.seen)


def test_the_table_says_so_and_the_judge_stays_exact(files):
    def evaluate(*args):
        out = files["root"] / "table.json"
        text = run(
            "evaluate",
            f"--images={files['images']}",
            f"--data={files['data']}",
            f"--detector={files['net']}",
            f"--judge={files['net']}",
            f"--out={out}",
            *args,
        )
        return json.loads(out.read_text()), text

    exact, text = evaluate()
    half, half_text = evaluate("--precision=bf16")
    assert (exact["precision"], half["precision"]) == ("fp32", "bf16")
    assert "features, computed in bf16" in half_text and "bf16" not in text
    assert half["metrics"]["fid"] != exact["metrics"]["fid"] == pytest.approx(half["metrics"]["fid"], rel=0.1)
    assert half["metrics"]["label_accuracy"] == exact["metrics"]["label_accuracy"]


@pytest.mark.parametrize("net", ["net", "conv"])
def test_kept_features_of_different_precision_never_mix(files, tmp_path, net):
    def used(*args):
        text = run(
            "evaluate",
            f"--images={files['images']}",
            f"--data={files['data']}",
            f"--detector={files[net]}",
            "--judge=none",
            f"--features={tmp_path / 'features.npz'}",
            *args,
        )
        return sum(line.startswith("Features of ") for line in text.splitlines())

    assert [used(), used("--precision=bf16"), used("--precision=bf16"), used()] == [0, 0, 2, 2]
    with np.load(tmp_path / "features.npz") as file:
        # Features in float32 are recorded as they were before there was a choice.
        assert [what["detector"][2:] for what in json.loads(str(file["sets"]))] == [[], [], ["bf16"], ["bf16"]]


def test_references_of_different_precision_never_mix(files, tmp_path):
    common = f"--detector={files['net']}"
    for precision in ("fp32", "bf16"):
        ref = tmp_path / f"{precision}.npz"
        run("ref", f"--data={files['data']}", f"--dest={ref}", common, f"--precision={precision}")
        value = run("calc", f"--images={files['data']}", f"--ref={ref}", common, f"--precision={precision}", "--num=24")
        assert abs(float(value.splitlines()[-1])) < 1e-6
        other = {"fp32": "bf16", "bf16": "fp32"}[precision]
        message = run("calc", f"--images={files['data']}", f"--ref={ref}", common, f"--precision={other}", code=1)
        assert f"Error: --precision={other}: the features of {ref} were computed in {precision}" in message
    with np.load(tmp_path / "fp32.npz") as file:
        assert set(file.files) == {"mu", "sigma"}


def test_pixels_have_no_precision(files):
    message = run(
        "evaluate",
        f"--images={files['images']}",
        f"--data={files['data']}",
        "--detector=pixels",
        "--precision=bf16",
        code=1,
    )
    assert "Error: --precision=bf16: the detector pixels computes nothing" in message
