"""--features: wrong and foreign images by the features of a network that others have trained."""

import sys
import types

import numpy as np
import pytest
import torch

import detect_noise
import inspect_data
from archives.dataset import ImageDataset
from archives.label_file import load_label_file
from detection.quality import quality
from tests.support.commands import callers
from tests.support.synth import make_archive, pictures

succeed, fail = callers(detect_noise.main)


class Encoder(torch.nn.Module):
    """Stands for SimCLR's encoder: brightness of three stripes, among features that say nothing."""

    def __init__(self, broken: bool = False):
        super().__init__()
        self.broken = broken

    def forward(self, x):
        stripes = x.float().mean(dim=[1, 3])[:, :, None].reshape(len(x), 4, -1).mean(dim=2)
        noise = x.float()[:, 0, :2].flatten(1)
        features = torch.cat([stripes, noise], dim=1)
        return features / 0 if self.broken else features


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """300 images of three classes, 40% of the labels wrong, 10 images of no class; and an encoder as TorchScript."""
    folder, rng = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
    images, clean = pictures(300, channels=1) // 4, np.arange(300) % 3
    for c in range(3):
        images[clean == c, 2 * c : 2 * c + 2] += 150
    labels = np.where(rng.random(300) < 0.4, (clean + rng.integers(1, 3, 300)) % 3, clean)
    names = [f"00000/img{i:08d}.png" for i in range(300)]
    known = [[name, int(c)] for name, c in zip(names, clean, strict=True)]
    make_archive(folder / "d.zip", images, labels.tolist(), clean_labels=known)
    torch.jit.script(Encoder()).save(str(folder / "encoder.pt"))
    torch.jit.script(Encoder(broken=True)).save(str(folder / "broken.pt"))
    torch.jit.script(torch.nn.Linear(5, 5)).save(str(folder / "odd.pt"))
    return folder


def f1(world, path):
    dataset = ImageDataset(str(world / "d.zip"))
    found = load_label_file(path, dataset)
    return quality(found.is_clean, dataset.labels, dataset.clean_labels)["f1"], found


@pytest.mark.parametrize("length", [[], ["--epochs=20"]])
def test_a_linear_classifier_of_the_features_finds_wrong_labels(world, tmp_path, length):
    args = [f"--data={world}/d.zip", f"--dest={tmp_path}/l.npz", f"--features={world}/encoder.pt", "--device=cpu"]
    for name in ("l-training.pt", "l-classifier.pkl"):
        (tmp_path / name).write_text("of an earlier detection")
    output = succeed(*args, "--batch=32", *length)
    value, found = f1(world, f"{tmp_path}/l.npz")
    assert value > 0.95 and abs(found.noise_rate - 0.4) < 0.08, output
    assert not (tmp_path / "l-classifier.pkl").exists()  # there is no network of ours to keep


def test_features_help_to_tell_foreign_images(world, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "detection.inspection.find_outliers", lambda data, features, seed: seen.append(features) or 1 / 0
    )
    for module, where in ((detect_noise, "--dest={}/l.npz"), (inspect_data, "--outdir={}/page")):
        args = [f"--data={world}/d.zip", where.format(tmp_path), f"--features={world}/encoder.pt", "--epochs=1"]
        with pytest.raises(ZeroDivisionError):
            module.main([*args, "--device=cpu"], standalone_mode=False)
        assert seen.pop().shape == (300, 4 + 16)


def test_clip_is_asked_for_all_images(world, tmp_path, monkeypatch):
    """open_clip by a model that returns the stripes."""

    class Model(torch.nn.Module):
        visual = types.SimpleNamespace(image_size=8, image_mean=[0.5] * 3, image_std=[0.5] * 3)

        def encode_image(self, images, normalize):
            assert normalize and images.shape[1:] == (3, 8, 8)
            return images.mean(dim=[1, 3])

    clip = types.ModuleType("open_clip")
    clip.create_model = lambda name, pretrained, device: Model()
    monkeypatch.setitem(sys.modules, "open_clip", clip)
    succeed(f"--data={world}/d.zip", f"--dest={tmp_path}/l.npz", "--features=clip", "--device=cpu", "--foreign=0")
    assert f1(world, f"{tmp_path}/l.npz")[0] > 0.95


def test_bad_features(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.registry", None)
    good = [f"--data={world}/d.zip", f"--dest={tmp_path}/l.npz", "--device=cpu"]
    fail(1, *good, "--features=clip", "--features|pip install open_clip_torch")
    fail(1, *good, "--features=dino", "--features|pip install torch-fidelity")
    fail(1, *good, "--features=simclr", "--features|no detector or file")
    fail(1, *good, f"--features={world}/broken.pt", "--features|not finite")
    fail(1, *good, f"--features={world}/odd.pt", "--features|odd.pt: fails on")
    fail(2, *good, "--features=clip", "--method=cores", "--features|leave out --method")
    fail(2, *good, "--features=clip", "--encoder=small", "--features|leave out --encoder")
    fail(2, *good, "--features=clip", "--labels=a.npz", "--foreign=0", "--features|--labels decides")
    fail(2, *good, "--encoder=small", "--arch=conv", "--encoder=small and --arch=conv")
    assert not list(tmp_path.iterdir())
