"""Test how many threads a script takes and how long they spin: quotas of containers, and what the user says."""

import ast
import math
import os
import subprocess
import sys

import pytest

from dnnlib import threads
from tests.support.paths import ROOT

SCRIPTS = sorted(p.name for p in ROOT.glob("*.py"))


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    "listing, files, cores",
    [
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        (
            "0::/a/b\n",
            {"cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n", "a/b/cpu.max": "800000 100000\n"},
            1.5,
        ),
        ("0::/host/only/there\n", {"cpu.max": "300000 100000\n"}, 3),
        (
            "4:cpu,cpuacct:/job\n3:memory:/other\n",
            {"cpu,cpuacct/job/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"},
            0.5,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("2:cpuset:/\n", {"cpuset/cpu.max": "100000 100000\n"}, math.inf),
        ("nonsense\n\n0::/\n", {"cpu.max": "nonsense\n"}, math.inf),
        ("0::/\n", {"cpu.max": "100000 0\n"}, math.inf),
    ],
)
def test_quota_of_a_container(tmp_path, listing, files, cores):
    write(tmp_path, {"listing": listing, **{f"fs/{name}": text for name, text in files.items()}})
    assert threads.cpu_quota(str(tmp_path / "listing"), str(tmp_path / "fs")) == cores


def test_no_control_groups_no_quota(tmp_path):
    assert threads.cpu_quota(str(tmp_path / "absent"), str(tmp_path)) == math.inf


@pytest.mark.parametrize("quota, cores", [(math.inf, 6), (2.9, 2), (0.3, 1), (64.0, 6)])
def test_cores_that_may_be_used(monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    assert threads.usable_cores() == cores


@pytest.mark.parametrize(
    "quota, busy, before, chosen",
    [
        (math.inf, True, {}, {"GOMP_SPINCOUNT": threads.SPIN}),
        (math.inf, False, {}, {}),
        (1.0, True, {}, {"GOMP_SPINCOUNT": threads.SPIN, "OMP_NUM_THREADS": "1"}),
        (1.0, False, {"OMP_NUM_THREADS": "7"}, {}),
        (math.inf, True, {"OMP_WAIT_POLICY": "active"}, {}),
        (math.inf, True, {"GOMP_SPINCOUNT": "5"}, {}),
    ],
)
def test_the_user_decides_first(monkeypatch, quota, busy, before, chosen):
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(threads, "others_compute", lambda: busy)
    environ = dict(before)
    threads.choose(environ)
    assert environ == before | chosen


@pytest.mark.parametrize(
    "used, quota, busy",
    [
        ([0, 10, 100, 100], math.inf, False),  # the last two cores are not this process's
        ([40, 20, 0, 0], math.inf, True),
        ([100, 0, 0, 0], 1.0, False),  # one idle core is all that the quota allows
        ([90, 60, 0, 0], 1.0, True),
    ],
)
def test_others_compute_if_too_few_cores_are_idle(monkeypatch, used, quota, busy):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(threads.psutil, "cpu_percent", lambda seconds, percpu: used)
    assert threads.others_compute() == busy


@pytest.mark.parametrize("script", [*SCRIPTS, "cleanscore/api.py"])
def test_scripts_choose_before_pytorch_is_imported(script):
    body = ast.parse((ROOT / script).read_text()).body
    found = [ast.unparse(node) for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert found[:2] == ["from __future__ import annotations", "import dnnlib.before_torch"]


@pytest.mark.skipif(sys.platform != "linux", reason="the OpenMP of PyTorch is libgomp on Linux only")
def test_openmp_reads_the_choice():
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "from dnnlib import threads; threads.BUSY = -100; import dnnlib.before_torch, torch"  # always busy
    command = [sys.executable, "-c", code]
    shown = subprocess.run(
        command, cwd=ROOT, env=clean | {"OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True, check=True
    ).stderr
    assert f"GOMP_SPINCOUNT = '{threads.SPIN}'" in shown
