"""Training runs: the options of small ones, and checks of what they leave."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from tests.support.paths import ROOT
from torch_utils import checkpoint

TINY = [
    "--arch=ddpmpp_tiny",
    "--cbase=8",
    "--batch=32",
    "--tick=0.096",
    "--snap=1",
    "--dump=1",
    "--seed=3",
    "--augment=0",
    "--lr_rampup_kimg=0.1",
]


def final_weights(run_dir):
    return checkpoint.load_state(checkpoint.latest_state(str(run_dir)))


def assert_same(a, b):
    """Assert that two nested states are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def errors(run):
    assert not [text for text in run["err"] if "Traceback" in text or "left behind" in text], run["err"]
    return [text.strip() for text in run["err"]]


def torchrun(script, *args, processes=2):
    """Run a script under torchrun on the CPU; it must succeed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, script, *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result
