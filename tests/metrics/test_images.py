"""What the metrics take: which images are drawn, when labels matter, and settings that are easily mistaken."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fid
from metrics.features import Features
from metrics.images import open_images
from metrics.settings import EvaluationSettings
from metrics.table import evaluate_features
from tests.support import synth


@pytest.mark.parametrize("seed, edm", [(0, [2, 4, 8, 9]), (2**31 + 3, [1, 2, 4, 5])])
def test_a_subset_is_that_of_edm(tmp_path, seed, edm):
    synth.make_archive(tmp_path / "a.zip", synth.pictures(10))
    np.savez(tmp_path / "b.npz", synth.pictures(10))
    names = open_images(str(tmp_path / "a.zip"), 4, seed).file_names
    assert [int(name[-6:-4]) for name in names] == edm
    images = open_images(str(tmp_path / "b.npz"), 4, seed).images(range(4)).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(images, synth.pictures(10)[edm])


def test_ref_and_calc_need_no_labels(tmp_path):
    """Folders with subfolders in two places tell no classes, and `dataset.json` may miss images."""
    images = synth.pictures(20)
    for i, image in enumerate(images):
        folder = tmp_path / "data" / ("train/a", "train/b", "test/a", "test/b")[i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(synth.png(image))
    half = {f"{i}.png": synth.png(image) for i, image in enumerate(images)}
    synth.make_zip(tmp_path / "half.zip", half | {"dataset.json": b'{"labels": [["0.png", 0]]}'})
    np.savez(tmp_path / "half.npz", images, np.zeros(3))

    def run(command, *args):
        result = CliRunner().invoke(fid.main, [command, *args, "--detector=pixels"], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    run("ref", f"--data={tmp_path / 'data'}", f"--dest={tmp_path / 'ref.npz'}")
    for name in ("data", "half.zip", "half.npz"):
        run("calc", f"--images={tmp_path / name}", f"--ref={tmp_path / 'ref.npz'}", "--num=20")


@pytest.mark.parametrize(
    "splits, note",
    [
        (10, "mean over 100 splits of size 10, too small for this score; size 100 would make 10 splits"),
        (50, "mean over 20 splits of size 50, too small for this score"),
        (100, None),
        (5000, None),
    ],
)
def test_a_number_of_splits_is_not_taken_for_their_size_in_silence(splits, note):
    probs = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(4), 1000))
    sets = [Features(torch.zeros(len(p), 2), p, None) for p in (probs[:9], probs)]
    settings = EvaluationSettings("data.zip", "net", judge="none", splits=splits, metrics=("is",))
    assert evaluate_features(*sets, None, None, settings)["notes"].get("is") == note


@pytest.mark.parametrize("command", ["evaluate", "compare"])
@pytest.mark.parametrize("option", ["--cas_arch=small", "--cas_epochs=3"])
def test_options_of_cas_need_a_test_set(command, option):
    args = [command, "--images=a.zip", "--data=b.zip", "--detector=pixels", option]
    result = CliRunner().invoke(fid.main, args, catch_exceptions=False)
    assert result.exit_code == 2 and f"{option.split('=')[0]}: is for CAS, which needs --test" in result.output
