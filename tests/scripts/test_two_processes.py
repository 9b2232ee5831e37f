"""What two processes share: who holds what, how much memory that takes, and that one process gets the same."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

PROGRAM = """
import ctypes, json, sys
import numpy as np
import torch
from detection import classifier
from metrics.detectors import PixelDetector
from metrics.features import compute_features
from torch_utils import distributed
from training.objectives import simix

class Images:
    path, label_dim, file_names, source_names = "toy", 100, [], None

    def __init__(self, n, side):
        self.num_raw, self.image_shape, self.read = n, (1, side, side), 0
        self.labels = np.arange(n) % 100
        self.pixels = torch.from_numpy(np.random.default_rng(0).integers(256, size=[n, 1, side, side], dtype=np.uint8))

    def __len__(self):
        return self.num_raw

    def images(self, items):
        self.read += len(items)
        return self.pixels[items]

    def images_on(self, device, items):
        return self.images(items)

class Net(torch.nn.Module):
    def forward(self, x, sigma):
        return x.flatten(1)[:, :1] * torch.linspace(0, 9, 100)

def peak(work):
    # The most memory, in MiB, that `work` takes beyond what is in use before it.
    value = lambda name: int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) / 1024
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = value("VmRSS")
    return work(), value("VmHWM") - before

device = distributed.init("cpu")
similar, seen, judged = Images(300, 4), Images(12000, 32), Images(120000, 4)
result = dict(partners=simix.nearest_partners(similar, "pixels", None, device).tolist(), embedded=similar.read)
compute_features(Images(100, 4), PixelDetector(), 64, device)
classifier.detect(Net(), "clean", Images(100, 4), device)  # all code is in memory now
found, result["features_mib"] = peak(lambda: compute_features(seen, PixelDetector(), 64, device))
result["features"] = None if found is None else [found.features.double().sum().item(), found.features[::99, 7].tolist()]
del found
found, result["detection_mib"] = peak(lambda: classifier.detect(Net(), "clean", judged, device))
result["scores"] = found.score[::999].tolist()
rank = distributed.get_rank()
distributed.shutdown()
json.dump(result, open(f"{sys.argv[1]}{rank}", "w"))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the program finds on one process, and on each of two."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    started = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        place = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=port)
        env = os.environ | place | dict(MASTER_ADDR="127.0.0.1", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        started.append(subprocess.Popen([sys.executable, "-c", PROGRAM, folder / f"{world}-"], env=env, cwd=ROOT))
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    return [json.loads((folder / name).read_text()) for name in ("1-0", "2-0", "2-1")]


def test_one_process_and_two_find_the_same(results):
    one, *two = results
    assert two[0]["features"] == one["features"] and two[1]["features"] is None
    for each in two:
        assert each["partners"] == one["partners"] and each["scores"] == one["scores"]


def test_work_on_similar_images_is_shared(results):
    assert [each["embedded"] for each in results] == [300, 150, 150]


def test_rank_0_alone_holds_all_features(results):
    """They take 47 MiB. Each process used to take 4 times that."""
    whole = 12000 * 32 * 32 * 4 / 2**20
    one, first, second = (each["features_mib"] / whole for each in results)
    assert one < 1.8 and first < 1.8 and second < 0.8, (one, first, second)


def test_rank_0_alone_holds_the_posterior_of_all_images(results):
    """It takes 46 MiB. Each process used to take 4 times that. All get the label file, with the best classes."""
    whole = 120000 * 100 * 4 / 2**20
    one, first, second = (each["detection_mib"] / whole for each in results)
    assert one < 1.8 and first < 2.4 and second < 1.2, (one, first, second)
