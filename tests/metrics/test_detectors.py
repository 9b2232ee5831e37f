"""Detectors made by others: TorchScript, pickles that hold it, torch-fidelity; gray images; missing files."""

import io
import pickle
import sys
import types

import numpy as np
import pytest
import torch

import dnnlib
from metrics.detectors import INCEPTION_URL, load_detector
from metrics.features import compute_features
from metrics.images import NpzImages
from metrics.network_detectors import NetworkDetector, TorchScriptDetector


class ToyInception(torch.nn.Module):
    """Has the arguments of the published Inception-v3. Features are the means of the channels."""

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
    """Gives only features, and takes only images of 16x16 pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape([-1, 3, 16, 16]).to(torch.float32).mean(dim=3)[:, :, :2].reshape(-1, 6, 1, 1)


class HoldsScript:
    """A wrapper around TorchScript by others. Its code is not part of the pickle."""

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
        gray=rng.integers(0, 256, [5, 8, 12, 1]),
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
    """TorchScript as a file and inside a pickle, whose code never runs. Probabilities leave out the last bias."""
    found = compute_features(files["rgb"], load_detector(files[name], "cpu"), 2, "cpu")
    means = files["rgb"].images(np.arange(5)).float().mean(dim=[2, 3])
    torch.testing.assert_close(found.features, means)
    torch.testing.assert_close(found.probs, (means[:, [0, 2]] / 10).softmax(dim=1))


def test_gray_images_become_three_channels(files):
    found = compute_features(files["gray"], load_detector(files["inception"], "cpu"), 4, "cpu")
    gray = files["gray"].images(np.arange(5)).float().mean(dim=[2, 3])
    torch.testing.assert_close(found.features, gray.expand(-1, 3))


def test_module_with_features_only(files):
    found = compute_features(files["square"], load_detector(files["features"], "cpu"), 4, "cpu")
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
def test_unreadable_files_say_what_to_do(files, name, words):
    with pytest.raises(dnnlib.UserError) as e:
        load_detector(files[name], "cpu")
    assert all(word in e.value.message for word in words), e.value.message


def test_module_that_cannot_take_the_images(files):
    with pytest.raises(dnnlib.UserError, match="features.pkl: fails on 12x8 RGB images of .*rgb.npz .*shape"):
        compute_features(files["rgb"], load_detector(files["features"], "cpu"), 2, "cpu")

    class OneRow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.float32).mean().reshape(1, 1)

    with pytest.raises(dnnlib.UserError, match=r"gives \[1, 1\] for 2 images"):
        TorchScriptDetector(torch.jit.script(OneRow()), "one", "cpu").check(files["rgb"])


def test_missing_inception_says_where_it_is_published():
    with pytest.raises(dnnlib.UserError, match="no detector or file 'inception.pkl'") as e:
        load_detector("inception.pkl", "cpu")
    assert INCEPTION_URL in e.value.message


def test_a_detector_must_say_how_its_network_runs():
    with pytest.raises(NotImplementedError):
        NetworkDetector("cpu")(torch.zeros([2, 3, 8, 8], dtype=torch.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# torch-fidelity. The package may be missing, so these tests use a stand-in that works the same way.


class Extractor(torch.nn.Module):
    """What torch-fidelity calls a feature extractor."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__()
        self.features_list = features_list

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return dict(isc="logits_toy", fid="mean")[metric]

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        mean = x.float().mean(dim=[2, 3])
        return tuple(dict(mean=mean, logits_toy=-mean)[name] for name in self.features_list)


class WithoutLogits(Extractor):
    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "mean"


def own_extractor(name, **constants):
    """Return a module and a class that look like torch-fidelity. The constants say which weights the class needs."""
    module = types.ModuleType(f"torch_fidelity.{name.lower()}")
    vars(module).update(constants)

    def init(self, *args, **kwargs):
        Extractor.__init__(self, *args, **kwargs)
        LOADED.append(name)

    return module, type(name, (Extractor,), dict(__init__=init, __module__=module.__name__))


LOADED = []
OWN = {
    "inception-v3-compat": own_extractor(
        "FeatureExtractorInceptionV3", URL_INCEPTION_V3="https://a.b/v1/weights-1.pth"
    ),
    "vgg16": own_extractor("FeatureExtractorVGG16"),
    "clip-rn50": own_extractor(
        "FeatureExtractorCLIP",
        MODEL_METADATA={"clip-rn50": dict(hash="abc", filename="RN50")},
        MODEL_URLS={"clip-rn50": "https://a.b/abc/RN50.pt"},
    ),
    "dinov2-vit-s-14": own_extractor("FeatureExtractorDinoV2", MODEL_METADATA={"dinov2-vit-s-14": "dinov2_vits14"}),
    "new": own_extractor("FeatureExtractorNew"),
}


@pytest.fixture
def fidelity(tmp_path, monkeypatch):
    """Install the stand-in, and return the folder where torch.hub keeps weights."""
    registry, utils = types.ModuleType("torch_fidelity.registry"), types.ModuleType("torch_fidelity.utils")
    registry.FEATURE_EXTRACTORS_REGISTRY = {"toy": Extractor, "toy-without-logits": WithoutLogits}
    for name, (module, cls) in OWN.items():
        monkeypatch.setitem(sys.modules, module.__name__, module)
        registry.FEATURE_EXTRACTORS_REGISTRY[name] = cls
    utils.create_feature_extractor = lambda name, layers, cuda, verbose: registry.FEATURE_EXTRACTORS_REGISTRY[name](
        name, layers
    )
    for module in (types.ModuleType("torch_fidelity"), registry, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    LOADED.clear()
    return tmp_path / "hub"


def test_fidelity_extractors(files, fidelity):
    assert compute_features(files["rgb"], load_detector("fidelity:toy-without-logits", "cpu"), 2, "cpu").probs is None
    found = compute_features(files["gray"], load_detector("fidelity:toy", "cpu"), 2, "cpu")
    gray = files["gray"].images(np.arange(5)).float().mean(dim=[2, 3])
    torch.testing.assert_close(found.features, gray.expand(-1, 3))
    torch.testing.assert_close(found.probs, torch.full([5, 3], 1 / 3))
    with pytest.raises(dnnlib.UserError, match="no extractor 'best'; there are .*inception-v3-compat"):
        load_detector("fidelity:best", "cpu")


@pytest.mark.parametrize(
    "name, needed",
    [
        ("inception-v3-compat", ["checkpoints/weights-1.pth"]),
        ("vgg16", ["checkpoints/vgg16-397923af.pth"]),
        ("clip-rn50", ["checkpoints/clip-rn50-abc.pt"]),
        ("dinov2-vit-s-14", ["checkpoints/dinov2_vits14_pretrain.pth", "facebookresearch_dinov2_main"]),
    ],
)
def test_fidelity_weights_must_be_there(fidelity, name, needed):
    """Each file in turn is missing, then none is. The extractor is only made when it has nothing to download."""
    for file in needed:
        message = f"needs {fidelity / file}, published at https://.*nothing is downloaded unasked"
        with pytest.raises(dnnlib.UserError, match=message):
            load_detector(f"fidelity:{name}", "cpu")
        (fidelity / file).parent.mkdir(parents=True, exist_ok=True)
        (fidelity / file).touch()
        assert not LOADED
    load_detector(f"fidelity:{name}", "cpu")
    assert len(LOADED) == 1


def test_unknown_fidelity_extractors_are_refused(fidelity):
    with pytest.raises(dnnlib.UserError, match="fidelity:new: .*does not say which weights"):
        load_detector("fidelity:new", "cpu")
    assert not LOADED


def test_fidelity_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.registry", None)
    with pytest.raises(dnnlib.UserError, match="^fidelity:vgg16 needs the package torch-fidelity: pip install"):
        load_detector("fidelity:vgg16", "cpu")


def test_every_extractor_of_the_installed_fidelity_is_known(monkeypatch, tmp_path):
    pytest.importorskip(
        "torch_fidelity",
        reason="the optional package torch-fidelity is not installed",
        exc_type=(ImportError, RuntimeError),
    )
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in FEATURE_EXTRACTORS_REGISTRY:
        with pytest.raises(dnnlib.UserError, match="published at https.*nothing is downloaded"):
            load_detector(f"fidelity:{name}", "cpu")
