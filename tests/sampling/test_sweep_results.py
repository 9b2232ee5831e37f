"""A sweep that was interrupted goes on with the same files, wherever they lie, and refuses others."""

import json
import shutil

import numpy as np
import pytest

from dnnlib import UserError
from sampling.sweep_results import FILES, SweepResults
from tests.support import synth


def test_files_may_move_but_not_change(tmp_path):
    for name in ("net.pkl", "disc.pkl"):
        (tmp_path / name).write_bytes(name.encode())
    synth.make_archive(tmp_path / "data.zip", synth.pictures(4), [0, 1, 0, 1])
    options = {name: str(tmp_path / f"{file}") for name, file in
               (("network", "net.pkl"), ("discriminator", "disc.pkl"), ("data", "data.zip"))}  # fmt: skip
    options |= dict(detector="pixels", judge="svm", label_path=None, seeds=[0, 1])
    out = tmp_path / "sweep"
    out.mkdir()
    SweepResults(str(out), options).add("unguided-0", dict(fid=1.0))
    for name in ("network", "data"):
        moved = shutil.copy(options[name], tmp_path / f"moved-{name}.zip")
        assert SweepResults(str(out), options | {name: str(moved)}).values == {"unguided-0": dict(fid=1.0)}
    for name, word in (("network", "contents"), ("data", "labels")):
        if name == "network":
            (tmp_path / "net.pkl").write_bytes(b"trained anew")
        else:
            (tmp_path / "net.pkl").write_bytes(b"net.pkl")
            synth.make_archive(tmp_path / "data.zip", synth.pictures(4), [0, 1, 1, 1])
        with pytest.raises(UserError, match=f"other options or files .{name}: .* holds other {word}"):
            SweepResults(str(out), options)
    clean = [[f"00000/img{i:08d}.png", i % 2] for i in range(4)]
    synth.make_archive(tmp_path / "data.zip", synth.pictures(4), [0, 1, 0, 1], clean_labels=clean)
    with pytest.raises(UserError, match="data: .* holds other clean labels"):
        SweepResults(str(out), options)
    synth.make_archive(tmp_path / "data.zip", synth.pictures(4), [0, 1, 0, 1])
    with pytest.raises(UserError, match="seeds"):
        SweepResults(str(out), options | dict(seeds=[0, 2]))
    # Files of a finished sweep may be gone; then their path counts.
    for name in ("net.pkl", "data.zip"):
        (tmp_path / name).unlink()
    assert SweepResults(str(out), options).values
    with pytest.raises(UserError, match="network: .*elsewhere.pkl here"):
        SweepResults(str(out), options | dict(network="elsewhere.pkl"))


def test_all_rows_have_one_judge(tmp_path):
    """The label file that a discriminator names may have changed since the first rows were measured."""
    options, labels = dict.fromkeys([*FILES, "data"], ""), np.array([0, 1, -1])
    results = SweepResults(str(tmp_path), options)
    results.judge_by(labels, "learned 2")
    results.judge_by(labels[:2], "learned 2")  # nothing is measured yet
    results.add("unguided-0", dict(fid=1.0))
    SweepResults(str(tmp_path), options).judge_by(labels[:2], "learned 2")
    for other in (labels, None):
        with pytest.raises(UserError, match="sweep.json: its judge learned other labels"):
            SweepResults(str(tmp_path), options).judge_by(other, "")


@pytest.mark.parametrize("found", [[], {}, dict(options=[1], results={}), dict(options={}, results=None)])
def test_another_json_is_not_the_result_of_a_sweep(tmp_path, found):
    (tmp_path / "sweep.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="sweep.json: is not the result of a sweep"):
        SweepResults(str(tmp_path), dict.fromkeys([*FILES, "data"], ""))
