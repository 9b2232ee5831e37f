"""sFID and class-wise inception scores: by their formulas, from detectors that offer what they need."""

import collections
import json
import sys
import types

import numpy as np
import pytest
import scipy.linalg
import torch
from click.testing import CliRunner

import dnnlib
import fid
from metrics.detectors import in_precision, load_detector
from metrics.feature_cache import FeatureCache
from metrics.features import Features, compute_features, compute_statistics
from metrics.images import NpzImages
from metrics.network_detectors import FidelityDetector
from metrics.reference import RunningStatistics, load_reference
from metrics.settings import EvaluationSettings
from metrics.table import evaluate_features
from torch_utils import distributed


class ToyInception(torch.nn.Module):
    """Has the parts of the published Inception-v3 that matter here: `layers` with `mixed_6`, and its arguments."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            collections.OrderedDict(
                conv=torch.nn.Conv2d(3, 8, 60, stride=60),  # 4x4 positions
                mixed_6=torch.nn.Conv2d(8, 9, 1),
                mixed_7=torch.nn.Conv2d(9, 6, 3),
                pool2=torch.nn.AdaptiveAvgPool2d(1),
            )
        )
        self.output = torch.nn.Linear(6, 4)
        self.scale = scale  # of the images: the published network has 1

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        n, c, h, w = img.shape
        theta = torch.tensor([[1.0, 0.0, 1 / w - 1 / 299], [0.0, 1.0, 1 / h - 1 / 299]]).expand(n, 2, 3)
        grid = torch.nn.functional.affine_grid(theta, [n, c, 299, 299], align_corners=False)
        x = torch.nn.functional.grid_sample(
            img.to(torch.float32), grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        features = self.layers((x - 128) / 128 * self.scale).reshape(n, -1)
        return features if return_features else torch.softmax(self.output(features), dim=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("spatial")
    rng = np.random.default_rng(0)
    found = {}
    for name, module in (("net", ToyInception()), ("other", ToyInception(2.0))):
        found[name] = str(root / f"{name}.pt")
        torch.jit.script(module).save(found[name])
    for name, high, n in (("real", 256, 40), ("fake", 200, 30)):
        found[name] = str(root / f"{name}.npz")
        np.savez(found[name], rng.integers(0, high, [n, 8, 12, 3]).astype(np.uint8), np.arange(n) % 2)
    return found


def spatial_by_hand(images):
    """The first seven channels of mixed_6, of images that are resized pixel by pixel."""
    net, (n, h, w, _) = ToyInception(), images.shape
    rows, columns = (np.arange(299) * side / 299 for side in (h, w))  # where the pixels come from: corners stay

    def between(array, at, axis):
        low = np.minimum(at.astype(int), array.shape[axis] - 1)
        high = np.minimum(low + 1, array.shape[axis] - 1)
        part = (at - low).reshape([-1 if a == axis else 1 for a in range(4)])
        return np.take(array, low, axis) * (1 - part) + np.take(array, high, axis) * part

    x = between(between(images.astype(np.float64), rows, 1), columns, 2)
    x = torch.from_numpy((x / 128 - 1).transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        return net.layers.mixed_6(net.layers.conv(x))[:, :7].numpy().transpose(0, 2, 3, 1).reshape(n, -1)


def frechet(x, y):
    """The formula as it is written, with a matrix square root."""
    a, b = (np.cov(z, rowvar=False) for z in (x, y))
    root = scipy.linalg.sqrtm(a @ b + 1e-12 * np.eye(len(a)))
    return np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2) + np.trace(a + b - 2 * root.real)


def test_spatial_features_are_the_first_channels_of_mixed_6(files):
    source = NpzImages(files["real"])
    with np.load(files["real"]) as file:
        expected = spatial_by_hand(file["arr_0"])
    detector = load_detector(files["net"], "cpu")
    found = compute_features(source, detector, 16, "cpu")
    assert found.spatial.shape == (40, 7 * 16)
    np.testing.assert_allclose(found.spatial, expected, atol=2e-4)
    features, probs = detector(source.images(np.arange(40)))
    torch.testing.assert_close(found.features, features)
    torch.testing.assert_close(found.probs, probs)
    bf16 = compute_features(source, in_precision(detector, "bf16", "cpu"), 16, "cpu")
    assert 0 < (bf16.spatial - found.spatial).abs().max() < 0.1
    count, mu, sigma, mu_s, sigma_s = compute_statistics(source, detector, 16, "cpu", spatial=True)
    np.testing.assert_allclose(mu_s, found.spatial.double().mean(dim=0), atol=1e-9)
    np.testing.assert_allclose(sigma_s, np.cov(found.spatial.double().numpy(), rowvar=False), atol=1e-9)
    assert compute_statistics(source, load_detector("pixels", "cpu"), 16, "cpu", spatial=True)[3:] == (None, None)


def test_a_process_without_images_takes_part_in_the_sums(files, monkeypatch):
    summed = []
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "together", lambda work: work())
    monkeypatch.setattr(RunningStatistics, "reduce", lambda self: summed.append(self._mean.shape) or (0, None, None))
    compute_statistics(NpzImages(files["real"]), load_detector(files["net"], "cpu"), 64, "cpu", spatial=True)
    assert summed == [(6,), (112,)]


def test_a_network_that_prepares_images_in_its_own_way_offers_none(files):
    detector = load_detector(files["other"], "cpu")
    assert detector.with_spatial is None
    assert compute_features(NpzImages(files["real"]), detector, 16, "cpu").spatial is None


def test_sfid_and_class_wise_scores_by_their_formulas():
    """Few dimensions and many images, where a matrix square root is exact enough for 1e-6."""
    rng = np.random.default_rng(1)
    labels = [np.arange(n) % 3 for n in (120, 90)]
    spatial = [rng.standard_normal([n, 5]) @ rng.standard_normal([5, 5]) + i for i, n in enumerate((120, 90))]
    p = rng.dirichlet(np.full(4, 0.5), 90)
    p[0] = [1, 0, 0, 0]
    real, fake = (
        Features(torch.from_numpy(rng.standard_normal([len(s), 3])), probs, None, torch.from_numpy(s))
        for s, probs in zip(spatial, (None, torch.from_numpy(p)), strict=True)
    )
    result = evaluate_features(real, fake, *labels, EvaluationSettings("data.zip", "net", judge="none", splits=50))
    metrics, classes = result["metrics"], result["classes"]
    assert metrics["sfid"] == pytest.approx(frechet(*spatial), rel=1e-6)
    of_class = [frechet(*(s[of == c] for s, of in zip(spatial, labels, strict=True))) for c in range(3)]
    assert metrics["cw_sfid"] == pytest.approx(np.mean(of_class), rel=1e-6)
    assert [classes[str(c)]["sfid"] for c in range(3)] == pytest.approx(of_class, rel=1e-6)

    def score(p):
        kl = [sum(a * np.log(a / b) for a, b in zip(row, p.mean(axis=0), strict=True) if a > 0) for row in p]
        return np.exp(np.mean(kl))

    of_class = [score(p[labels[1] == c]) for c in range(3)]
    assert metrics["cw_is"] == pytest.approx(np.mean(of_class), rel=1e-6)
    assert [classes[str(c)]["is"] for c in range(3)] == pytest.approx(of_class, rel=1e-6)
    order = np.random.default_rng(0).permutation(90)
    assert metrics["is"] == pytest.approx(np.mean([score(p[order[:50]]), score(p[order[50:]])]), rel=1e-6)


def test_class_wise_score_needs_no_labels_of_the_reference():
    p = torch.eye(4)[[0, 0, 1, 1, 0, 1]]
    real = Features(torch.zeros([6, 2]), p, None)
    settings = EvaluationSettings("data.zip", "net", metrics=("cw_is",))
    result = evaluate_features(real, real, None, np.array([0, 0, 0, 0, 2, 2]), settings, class_names=["a", "b", "c"])
    assert result["metrics"] == {"cw_is": pytest.approx(2.0)} and result["notes"] == {
        "cw_is": "mean of 2 of 3 classes; fewer than 1 images: b"
    }


def test_only_the_metrics_asked_for_are_computed(monkeypatch):
    monkeypatch.setattr("metrics.table.prdc", None)
    monkeypatch.setattr("metrics.table.kid_from_features", None)
    monkeypatch.setattr("metrics.table.SvmJudge", None)
    x, labels = torch.arange(24.0).view(12, 2), np.arange(12) % 2
    sets = [Features(x, None, None), Features(x + 1, None, None)]
    for names in (("fid",), ("cw_fid",), ("fid", "cw_fid"), ("mifid",)):
        settings = EvaluationSettings("data.zip", "pixels", metrics=names, mifid=True)
        assert tuple(evaluate_features(*sets, labels, labels, settings)["metrics"]) == names


def test_features_kept_before_there_were_spatial_ones_are_computed_again(files, tmp_path):
    path, source, detector = str(tmp_path / "kept.npz"), NpzImages(files["real"]), load_detector(files["net"], "cpu")

    def get(drop=False):
        cache = FeatureCache(path)
        calls = []

        def compute():
            calls.append(1)
            found = compute_features(source, detector, 16, "cpu")
            return Features(found.features, found.probs, None) if drop else found

        found = cache.get(source, detector, None, None, compute)
        cache.save()
        return found, len(calls)

    assert get(drop=True)[1] == 1
    found, calls = get()
    assert calls == 1 and found.spatial is not None
    again, calls = get()
    assert calls == 0 and torch.equal(again.spatial, found.spatial)


def test_reference_with_spatial_features(files, tmp_path):
    def run(*args):
        result = CliRunner().invoke(fid.main, [*args, f"--detector={files['net']}", "--device=cpu"])
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines()

    ref, plain, out = tmp_path / "ref.npz", tmp_path / "plain.npz", tmp_path / "out.json"
    run("ref", f"--data={files['real']}", f"--dest={ref}")
    with np.load(ref) as file:
        assert set(file.files) == {"mu", "sigma", "mu_s", "sigma_s"} and file["mu_s"].shape == (112,)
        np.savez(plain, mu=file["mu"], sigma=file["sigma"])
    lines = run("calc", f"--images={files['fake']}", f"--ref={ref}", "--num=30")
    table = "\n".join(run("evaluate", f"--images={files['fake']}", f"--data={files['real']}", f"--out={out}"))
    metrics = json.loads(out.read_text())["metrics"]
    assert float(lines[-1]) == pytest.approx(metrics["fid"], rel=1e-4)
    assert float(lines[-2].split()[1].rstrip(",")) == pytest.approx(metrics["sfid"], rel=1e-4)
    assert "cw_sfid" in table and "cw_is" in table
    assert len(run("calc", f"--images={files['fake']}", f"--ref={plain}", "--num=30")) == len(lines) - 1
    files = files | dict(net=files["other"])  # offers no spatial features
    lines = run("calc", f"--images={files['fake']}", f"--ref={ref}", "--num=30")
    assert lines[-2].startswith("No sFID") and float(lines[-1]) > 0
    with pytest.raises(dnnlib.UserError, match="has 112 spatial features, but the detector gives 7"):
        load_reference(str(ref)).sfid(np.zeros(7), np.eye(7))


def test_extractors_of_fidelity_are_asked_on_the_way(monkeypatch):
    class Extractor(torch.nn.Module):
        def __init__(self, name, layers, **kwargs):
            super().__init__()
            self.Mixed_6d = torch.nn.Conv2d(3, 9, 2, stride=2)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "mean"

        def forward(self, x):
            return (self.Mixed_6d(x.float()).mean(dim=[2, 3]),)

    registry, utils = types.ModuleType("torch_fidelity.registry"), types.ModuleType("torch_fidelity.utils")
    registry.FEATURE_EXTRACTORS_REGISTRY = {"toy": Extractor}
    utils.create_feature_extractor = lambda name, layers, cuda, verbose: Extractor(name, layers)
    for module in (types.ModuleType("torch_fidelity"), registry, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    detector = FidelityDetector("fidelity:toy", "cpu")
    images = torch.arange(2 * 3 * 4 * 4).remainder(256).to(torch.uint8).view(2, 3, 4, 4)
    features, probs, spatial = detector.with_spatial(images)
    assert probs is None and torch.equal(features, detector(images)[0])
    middle = detector._net.Mixed_6d(images.float())
    torch.testing.assert_close(spatial, middle[:, :7].permute(0, 2, 3, 1).flatten(1))
