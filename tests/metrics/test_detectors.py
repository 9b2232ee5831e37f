"""Detectors made by others: TorchScript, pickles that hold it, torch-fidelity's; grey images; what is missing."""

import io
import pickle

import numpy as np
import pytest
import torch

import dnnlib
from metrics.detectors import INCEPTION_URL, TorchScriptDetector, detector
from metrics.features import compute_features
from metrics.images import NpzImages


class ToyInception(torch.nn.Module):
    """The calling convention of the published Inception-v3: means of the channels, and probabilities made of them."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)
        self.fc.weight.data = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        self.fc.bias.data.fill_(100.0)

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        assert img.dtype == torch.uint8 and img.shape[1] == 3
        x = img.to(torch.float32).mean(dim=[2, 3])
        if return_features:
            return x
        logits = torch.nn.functional.linear(x, self.fc.weight) if no_output_bias else self.fc(x) * 0.0
        return torch.softmax(logits / 10.0, dim=1)


class ToyFeatures(torch.nn.Module):
    """Only features; 16x16 images only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape([-1, 3, 16, 16]).to(torch.float32).mean(dim=3)[:, :, :2].reshape(-1, 6, 1, 1)


class HoldsScript:
    """A stranger's wrapper around TorchScript; its code is not part of the pickle."""

    def __init__(self, script):
        self.state = {"nested": [{"script": script}], "note": "x"}


class Mischief:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def script(module):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("detectors")
    rng = np.random.default_rng(0)
    images = dict(
        rgb=rng.integers(0, 256, [5, 8, 12, 3]),
        grey=rng.integers(0, 256, [5, 8, 12, 1]),
        square=rng.integers(0, 256, [5, 16, 16, 3]),
    )
    content = dict(inception=script(ToyInception()), features=script(ToyFeatures()), zip=b"PK\x03\x04 and then nothing")
    content["wrapped"] = pickle.dumps(HoldsScript(script(ToyInception())))
    content["hostile"] = pickle.dumps({"a": Mischief(), "b": script(ToyInception())})
    content["empty"] = pickle.dumps(HoldsScript(b"no script"))
    content["two"] = pickle.dumps([script(ToyInception()), script(ToyFeatures())])
    found = {}
    for name, data in content.items():
        (root / f"{name}.pkl").write_bytes(data)
        found[name] = str(root / f"{name}.pkl")
    for name, data in images.items():
        np.savez(root / f"{name}.npz", data.astype(np.uint8))
        found[name] = NpzImages(str(root / f"{name}.npz"))
    return found


@pytest.mark.parametrize("name", ["inception", "wrapped", "hostile"])
def test_published_layouts(files, name):
    """As a file and inside a pickle, whose code is never run; features, and probabilities without the last bias."""
    found = compute_features(files["rgb"], detector(files[name], "cpu"), 2, "cpu")
    means = files["rgb"].images(np.arange(5)).float().mean(dim=[2, 3])
    torch.testing.assert_close(found.features, means)
    torch.testing.assert_close(found.probs, (means[:, [0, 2]] / 10).softmax(dim=1))


def test_grey_images_become_three_channels(files):
    found = compute_features(files["grey"], detector(files["inception"], "cpu"), 4, "cpu")
    grey = files["grey"].images(np.arange(5)).float().mean(dim=[2, 3])
    torch.testing.assert_close(found.features, grey.expand(-1, 3))


def test_module_with_features_only(files):
    found = compute_features(files["square"], detector(files["features"], "cpu"), 4, "cpu")
    assert found.features.shape == (5, 6) and found.probs is None


def test_logits_become_probabilities(files):
    class Logits(ToyInception):
        def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            x = img.to(torch.float32).mean(dim=[2, 3])
            return x if return_features else torch.log(x) - 1000.0

    found = TorchScriptDetector(torch.jit.script(Logits()), "logits", "cpu")(files["rgb"].images(np.arange(5)))
    torch.testing.assert_close(found[1], found[0] / found[0].sum(dim=1, keepdim=True), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name, words",
    [
        ("zip", ["zip.pkl", "TorchScript"]),
        ("empty", ["empty.pkl", "not run", "torch.jit.script"]),
        ("two", ["two.pkl", "torch.jit.script"]),
    ],
)
def test_what_cannot_be_read_says_what_to_do(files, name, words):
    with pytest.raises(dnnlib.UserError) as e:
        detector(files[name], "cpu")
    assert all(word in e.value.message for word in words), e.value.message


def test_module_that_cannot_take_the_images(files):
    with pytest.raises(dnnlib.UserError, match="features.pkl: fails on 12x8 RGB images of .*rgb.npz .*shape"):
        compute_features(files["rgb"], detector(files["features"], "cpu"), 2, "cpu")

    class OneRow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.float32).mean().reshape(1, 1)

    with pytest.raises(dnnlib.UserError, match=r"gives \[1, 1\] for 2 images"):
        TorchScriptDetector(torch.jit.script(OneRow()), "one", "cpu").check(files["rgb"])


def test_missing_inception_says_where_it_is_published():
    with pytest.raises(dnnlib.UserError, match="no detector or file 'inception.pkl'") as e:
        detector("inception.pkl", "cpu")
    assert INCEPTION_URL in e.value.message


def test_fidelity_extractors(files, tmp_path, monkeypatch):
    fidelity = pytest.importorskip(
        "torch_fidelity",
        reason="the optional package torch-fidelity is not installed",
        exc_type=(ImportError, RuntimeError),
    )

    class Toy(fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return "mean", "logits_toy"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return dict(isc="logits_toy", fid="mean")[metric]

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.shape[1] == 3
            mean = x.float().mean(dim=[2, 3])
            return tuple(dict(mean=mean, logits_toy=-mean)[name] for name in self.features_list)

    class WithoutLogits(Toy):
        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "mean"

    fidelity.register_feature_extractor("toy", Toy)
    fidelity.register_feature_extractor("toy-without-logits", WithoutLogits)
    assert compute_features(files["rgb"], detector("fidelity:toy-without-logits", "cpu"), 2, "cpu").probs is None
    found = compute_features(files["grey"], detector("fidelity:toy", "cpu"), 2, "cpu")
    grey = files["grey"].images(np.arange(5)).float().mean(dim=[2, 3])
    torch.testing.assert_close(found.features, grey.expand(-1, 3))
    torch.testing.assert_close(found.probs, torch.full([5, 3], 1 / 3))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(dnnlib.UserError, match="needs .*weights-inception.*published at https.*nothing is downloaded"):
        detector("fidelity:inception-v3-compat", "cpu")
    with pytest.raises(dnnlib.UserError, match="no extractor 'best'; there are .*inception-v3-compat"):
        detector("fidelity:best", "cpu")
