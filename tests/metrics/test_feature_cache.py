"""Features kept in a file: of the images as they are now, and of all calls that share the file."""

import json
import zipfile

import numpy as np

from metrics.detectors import PixelDetector
from metrics.feature_cache import FeatureCache
from metrics.features import compute_features
from metrics.images import NpzImages, open_images
from tests.support import synth


def get(cache, source):
    """Return the features of a set of images, and whether they were computed."""
    calls = []

    def compute():
        calls.append(source)
        return compute_features(source, PixelDetector(), 16, "cpu")

    return cache.get(source, PixelDetector(), None, None, compute).features.numpy(), bool(calls)


def test_changed_images_below_the_folder_are_seen(tmp_path):
    """`dataset.json` lies one folder down, so the names of the images begin there."""
    images = synth.pictures(6)
    with zipfile.ZipFile(synth.make_archive(tmp_path / "a.zip", images[:5])) as archive:
        archive.extractall(tmp_path / "outer" / "inner")
    path, results = str(tmp_path / "features.npz"), []
    for _ in range(2):
        cache = FeatureCache(path)
        results.append(get(cache, open_images(str(tmp_path / "outer"))))
        cache.save()
        assert get(FeatureCache(path), open_images(str(tmp_path / "outer")))[1] is False
        image = next((tmp_path / "outer").rglob("*2.png"))
        image.write_bytes(synth.png(images[5]))
    (before, _), (after, computed) = results
    assert computed and (before != after).any(axis=1).tolist() == [False, False, True, False, False]


def test_calls_at_the_same_time_keep_the_features_of_both(tmp_path):
    path = str(tmp_path / "features.npz")
    for name in "abc":
        np.savez(tmp_path / f"{name}.npz", np.full([4, 8, 8, 1], ord(name), np.uint8))
    a, b, c = (NpzImages(str(tmp_path / f"{name}.npz")) for name in "abc")
    first, second = FeatureCache(path), FeatureCache(path)
    for cache, sources in ((first, (a, b)), (second, (b, c))):
        for source in sources:
            assert get(cache, source)[1] is True
        cache.save()
        assert not (tmp_path / ".features.npz.lock").exists()
    kept = FeatureCache(path)
    for source in (a, b, c):
        features, computed = get(kept, source)
        assert not computed and len(np.unique(features)) == 1
    with np.load(path) as file:
        assert len(json.loads(str(file["sets"]))) == 3
