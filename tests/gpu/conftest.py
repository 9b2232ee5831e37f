import numpy as np
import pytest

from tests.support.synth import make_archive, pictures


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Write an archive of 16 images, 3x8x8, of 4 classes."""
    labels = np.arange(16) % 4
    return str(make_archive(tmp_path_factory.mktemp("data") / "data.zip", pictures(16, 8, 3), labels.tolist()))
