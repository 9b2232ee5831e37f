"""--encoder: classifiers, discriminators and detectors of the published depths; and widths that no network has."""

import json
import re

import pytest
import torch
from click.testing import CliRunner

import detect_noise
import train
import train_classifier
import train_discriminator
from archives.dataset import ImageDataset
from detection import options
from detection.trainer import Settings, Trainer
from tests.support.commands import callers
from tests.support.synth import make_archive, pictures
from training.networks_resnet import Classifier, resnet_kwargs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("data") / "d.zip", pictures(24), [i % 2 for i in range(24)])


@pytest.mark.parametrize("script", [train_classifier, train_discriminator])
def test_the_depth_is_the_one_asked_for(script, data, tmp_path):
    common = [f"--data={data}", f"--outdir={tmp_path}/out", "-n", "--arch=ncsnpp"]
    if script is train_discriminator:
        common.append(f"--label-path={data}")
    depths = {}
    for encoder in (None, "small", "resnet18", "resnet34"):
        result = CliRunner().invoke(script.main, [*common, *([f"--encoder={encoder}"] if encoder else [])])
        assert result.exit_code == 0, result.output
        found = json.loads(re.search(r"Training options:\n(\{.*?\n\})", result.output, re.S)[1])["network"]["kwargs"]
        assert found["embedding_type"] == "fourier"  # of the architecture
        depths[encoder] = (found["depth"], found["model_channels"], found["channel_mult"])
    deep = [64, [1, 2, 4, 8]]
    assert depths == {
        None: ("resnet18", *deep),
        "small": ("small", 32, [1, 2, 4]),
        "resnet18": ("resnet18", *deep),
        "resnet34": ("resnet34", *deep),
    }


def test_published_depths():
    """ResNet-18 has 8 blocks of two convolutions, ResNet-34 has 16, and a gray image does not change that."""
    for encoder, blocks in (("resnet18", 8), ("resnet34", 16)):
        net = Classifier(8, 1, 3, **resnet_kwargs("ddpmpp_tiny", 8, 1, 3, cbase=4, encoder=encoder))
        assert sum(len(stage) for stage in net.stages) == blocks


def test_detectors_have_it_too(data, tmp_path, monkeypatch):
    _, fail = callers(detect_noise.main)
    seen = []

    def detect(_dataset, _device, settings):
        seen.append((settings.arch, settings.lr))
        raise ZeroDivisionError

    monkeypatch.setitem(options.METHODS, "cores", detect)
    args = [f"--data={data}", f"--dest={tmp_path}/l.npz", "--device=cpu"]
    for given in (["--method=cores", "--encoder=resnet34"], ["--preset=digits", "--encoder=small"]):
        with pytest.raises(ZeroDivisionError):
            detect_noise.main([*args, *given], standalone_mode=False)
    assert seen == [("resnet34", 2e-3), ("small", 2e-3)]  # the option comes before the network of the preset
    fail(2, *args, "--encoder=resnet34", "--arch=adm", "--encoder=resnet34 and --arch=adm")
    fail(2, *args, "--encoder=resnet34", f"--cls={data}", "--cls|leave out --encoder")
    net = Trainer(ImageDataset(str(data)), torch.device("cpu"), Settings(arch="small")).trained.net
    assert [len(stage) for stage in net.stages] == [1, 1, 1]


@pytest.mark.parametrize(
    "script, args", [(train, ["--arch=ddpmpp_tiny"]), (train_classifier, []), (train, ["--arch=adm", "--cres=1"])]
)
def test_odd_widths_are_refused_before_there_is_a_run(script, args, data, tmp_path):
    _, fail = callers(script.main)
    common = [f"--data={data}", f"--outdir={tmp_path}/out", "--batch=8", "--duration=0.000008"]
    fail(1, *common, *args, "--cbase=63", "--arch, --cbase, --cres|63 channels|even number")
    assert not (tmp_path / "out").exists()
