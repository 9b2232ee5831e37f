"""Distances and kernels in bounded memory: the peak of a separate process, compared with the N x N form."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from metrics.prdc import prdc
from tests.support.paths import ROOT

PROGRAM = """
import json, resource, sys
import numpy as np
from metrics.bootstrap import resample
from metrics.kid import kid_from_features
from metrics.prdc import prdc

n, d, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
rng = np.random.default_rng(0)
real, fake = (scale * rng.standard_normal((n, d), dtype=np.float32) for scale in (1.0, 0.95))

def measure(x, y, counts):
    if what == "all":
        kid_from_features(x, y), kid_from_features(x, y, counts), prdc(x, y, 5, counts)
    return prdc(x, y, 5)

counts = resample(10, n)
measure(real[:100], fake[:100], counts[:, :100])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
measure(real, fake, counts)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps(dict(mib=(after - before) / 1024, subset=prdc(real[:3000], fake[:3000], 5))))
"""


def measured(n, d, what):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(n), str(d), what],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_no_array_of_all_pairs():
    """6,000 x 6,000 pairs would be 275 MiB in float64 and 34 MiB as bits."""
    assert measured(6000, 8, "all")["mib"] < 100


@pytest.mark.long
def test_fifty_thousand_images():
    """Memory stays under 1.5 GiB beyond the features. A subset has the values of the form with all pairs at once."""
    found = measured(50_000, 256, "neighbors")
    assert found["mib"] < 1536
    rng = np.random.default_rng(0)
    real, fake = (scale * rng.standard_normal((50_000, 256), dtype=np.float32) for scale in (1.0, 0.95))
    real, fake = real[:3000].astype(np.float64), fake[:3000].astype(np.float64)
    radii = [np.sort(cdist(x, x), axis=1)[:, 5] for x in (real, fake)]
    distances = cdist(real, fake)
    held = distances < radii[0][:, None]
    expected = dict(
        precision=held.any(axis=0).mean(),
        recall=(distances < radii[1]).any(axis=1).mean(),
        density=held.sum() / (5 * 3000),
        coverage=held.any(axis=1).mean(),
    )
    assert found["subset"] == pytest.approx(expected, rel=1e-12) == prdc(real, fake, 5)
