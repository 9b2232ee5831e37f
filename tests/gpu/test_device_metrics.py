"""Test that metrics and detectors compute on a GPU: no operation mixes its tensors with the CPU's (fake CUDA).

Metrics end on the host, so waiting is allowed everywhere here.
"""

import numpy as np
import pytest
import torch

from archives.dataset import ImageDataset
from detection.classifier import log_posterior
from detection.cores import regularized_loss
from metrics.detectors import ClassifierDetector, PixelDetector, in_precision
from metrics.features import compute_features, compute_statistics
from metrics.fid import fid_from_features
from metrics.inception_score import inception_score
from metrics.kid import kid_from_features
from metrics.label_accuracy import SvmJudge, label_accuracy
from metrics.network_detectors import NetworkDetector
from metrics.prdc import prdc
from tests.support.fake_cuda import CUDA, FakeCuda
from training.networks_resnet import Classifier
from training.objectives.simix import nearest_partners

CLASSES = 4
RNG = np.random.RandomState(0)
REAL, FAKE = (RNG.randn(24, 6).astype(np.float32) for _ in range(2))


@pytest.fixture
def cuda():
    with FakeCuda() as fake, fake.setting_up():
        yield fake


def classifier():
    return Classifier(8, 3, CLASSES, depth="small", model_channels=8, channel_mult=[1, 1, 1]).eval()


class Network(NetworkDetector):
    name = "network"

    def run(self, images, probs):
        x = images.to(torch.float32)
        return x.mean(dim=[2, 3]), x.mean(dim=[2, 3])


DETECTORS = {
    "pixels": lambda: PixelDetector(),
    "classifier": lambda: ClassifierDetector(classifier(), "c", CUDA),
    "classifier in bf16": lambda: in_precision(ClassifierDetector(classifier(), "c", CUDA), "bf16", CUDA),
    "network": lambda: Network(CUDA),
}


@pytest.mark.parametrize("name", DETECTORS)
def test_features(cuda, path, name):
    detector, source = DETECTORS[name](), ImageDataset(path)
    found = compute_features(source, detector, 6, CUDA, judge=ClassifierDetector(classifier(), "judge", CUDA))
    count, mean, _ = compute_statistics(source, detector, 6, CUDA)
    assert count == 16 and np.allclose(mean, np.asarray(found.features).mean(axis=0), rtol=1e-3, atol=1e-3)
    assert found.judged.shape == (16,)


METRICS = {
    "FID": fid_from_features,
    "KID": kid_from_features,
    "PRDC": lambda real, fake: list(prdc(real, fake, 3).values()),
    "KID of resampled sets": lambda real, fake: kid_from_features(real, fake, np.ones([2, 24], np.int64)),
    "PRDC of resampled sets": lambda real, fake: list(prdc(real, fake, 3, np.ones([2, 24], np.int64)).values()),
    "inception score": lambda real, fake: inception_score(fake.softmax(dim=1)),
    "label accuracy": lambda real, fake: label_accuracy(
        SvmJudge(real, np.arange(24) % 3).predict(fake), np.arange(24) % 3
    ),
}


@pytest.mark.parametrize("name", METRICS)
def test_metric_of_features_on_the_gpu(cuda, name):
    # Ties: the comparisons that rounding could change run as well.
    real, fake = REAL, np.concatenate([FAKE[:12], REAL[:12]])
    value = METRICS[name](torch.from_numpy(real).to(CUDA), torch.from_numpy(fake).to(CUDA))
    assert np.allclose(value, METRICS[name](torch.from_numpy(real), torch.from_numpy(fake)))


def test_detection_and_partners(cuda, path, monkeypatch):
    monkeypatch.setattr("training.objectives.simix.ordered_map", lambda f, items, workers: map(f, items), raising=False)
    dataset, net = ImageDataset(path, use_labels=True), classifier().to(CUDA)
    log_p = log_posterior(net, dataset, CUDA)
    assert cuda.has(log_p)
    observed = torch.from_numpy(dataset.labels).to(CUDA)
    assert cuda.has(regularized_loss(log_p, observed, torch.full([CLASSES], 1 / CLASSES, device=CUDA), 2.0))
    for embed in ("classifier", "pixels"):
        assert np.shape(nearest_partners(dataset, embed, net, CUDA)) == (16, 2)
