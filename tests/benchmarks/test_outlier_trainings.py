"""Test `python -m benchmarks.outlier_trainings`: its commands, and the archive of its judge."""

import shlex

import numpy as np
import pytest
from click.testing import CliRunner

from archives.dataset import ImageDataset
from benchmarks.outlier_trainings import METHODS, SETS, Plan, main, number_outliers
from dataset_tool import main as dataset_tool
from tests.support.plans import check_order, options, parse


def plan_of(outdir, judge):
    plan = Plan(outdir, "a source", "mnist.npz", judge, seed=3, duration=0.01)
    if judge is None:
        plan.train_judge()
    for part in SETS:
        for method in METHODS[part]:
            plan.row(part, method)
    return [*plan.steps.values()]


@pytest.mark.parametrize("judge", [None, "other/judge"])
def test_commands_parse_and_read_what_is_there(tmp_path, judge):
    steps = plan_of(f"{tmp_path}/some where", judge)
    known = ["other/judge", "a source", "mnist.npz", "photos", "digits", "pixels"]
    own = [i for i, step in enumerate(steps) if step.command.startswith("kinds ")]
    assert len(own) == (judge is None)
    parse(step for i, step in enumerate(steps) if i not in own)
    assert all(options(step)[2]["duration"] == "0.01" for step in steps if step.command.startswith("train_rduot.py"))
    for start, i in zip([-1, *own], [*own, len(steps)], strict=True):  # those before, between and after our own
        known = check_order(steps[start + 1 : i], known)
        if i < len(steps):
            _, *sources, dest = shlex.split(steps[i].command)
            assert {*sources} <= known
            known.add(dest)


@pytest.mark.parametrize("words, message", [(["--methods=tdsm"], "--methods"), (["--only=clean"], "--mnist")])
def test_a_choice_without_any_row_or_its_files_is_refused(tmp_path, words, message):
    result = CliRunner().invoke(main, [f"--outdir={tmp_path}/out", "--only=photos", *words])
    assert result.exit_code == 2 and message in result.output and not (tmp_path / "out").exists()


def test_the_judges_archive_has_its_outliers_as_a_class(tmp_path):
    data, dest = f"{tmp_path}/data.zip", f"{tmp_path}/kinds.npz"
    args = ["--source=digits", "--outliers=photos", "--perturb_percent=20", f"--dest={data}", "--max-images=50"]
    for command, words in ((dataset_tool, args), (number_outliers, [data, dest])):
        assert CliRunner().invoke(command, words).exit_code == 0
    source, arrays = ImageDataset(data), np.load(dest)
    assert (arrays["labels"] == 10).tolist() == source.outliers.tolist() and source.outliers.sum() == 10
    assert (arrays["labels"] == source.labels)[~source.outliers].all()
    np.testing.assert_array_equal(arrays["images"], source.images(np.arange(50)))
