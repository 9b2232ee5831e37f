"""What sweep.py refuses before it makes an image. Whole sweeps are in test_train_discriminator.py."""

import pytest

import sweep
from dnnlib import UserError
from sampling.sweep_results import SweepResults
from tests.support.commands import callers
from tests.support.generated import random_network
from tests.support.synth import make_archive, pictures
from torch_utils import persistence
from training.networks_resnet import Discriminator

_, fail = callers(sweep.main)


@pytest.fixture
def args(tmp_path):
    """The arguments of a sweep by a discriminator that says nothing about its training."""
    net = Discriminator(img_resolution=8, img_channels=1, label_dim=3, depth="small", model_channels=8)
    for name, module in (("network", random_network()), ("discriminator", net.eval())):
        persistence.save_snapshot(tmp_path / f"{name}.pkl", dict(ema=module, info={}))
    labels = [0, 1, 2] * 4
    names = [f"00000/img{i:08d}.png" for i in range(12)]
    clean = [[name, label] for name, label in zip(names, labels, strict=True)]
    make_archive(tmp_path / "data.zip", pictures(12, channels=1), labels, clean_labels=clean)
    files = [f"--{name}={tmp_path / name}.pkl" for name in ("network", "discriminator")]
    return [*files, f"--data={tmp_path / 'data.zip'}", "--detector=pixels", f"--outdir={tmp_path / 'out'}"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--S_clip_min=2", "--S_clip_max=1"], "--S_clip_min=2: must not exceed --S_clip_max=1"),
        (["--modes=constant", "--noise_rate=0.2"], "--noise_rate=0.2: --modes=constant does not use it"),
    ],
)
def test_options_that_contradict_each_other(args, tmp_path, options, words):
    fail(2, *args, *options, words)
    assert not (tmp_path / "out").exists()


def test_a_discriminator_that_cannot_guide_is_refused_before_any_image_is_made(args, tmp_path):
    fail(1, *args, "--device=cpu", "--steps=1", "--discriminator|does not say what it was trained on")
    assert not (tmp_path / "out" / "images").exists()


def test_a_seed_counts_once(args, monkeypatch):
    seen = []

    def stop(_results, _outdir, options):
        seen.append(options["seeds"])
        raise UserError("enough")

    monkeypatch.setattr(SweepResults, "__init__", stop)
    fail(1, *args, "--device=cpu", "--seeds=3,1,3,0-1", "enough")
    assert seen == [[3, 1, 0]]
