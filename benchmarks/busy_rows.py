"""Rows about a busy machine: a training step whose threads spin as our scripts choose, and by OpenMP's default.

The choice depends on what other programs do when a script starts, so the forms start beside the busy programs.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from benchmarks.archives import write_archive
from benchmarks.core import Row, compare, processes
from benchmarks.training_rows import turns_of
from dnnlib.threads import usable_cores

__all__ = ["rows"]

SECONDS = 120
DEFAULT_SPIN = "300000"  # of libgomp when nothing is set and there is a core for each thread
BATCH, RESOLUTION, STEPS = 16, 16, 4
BUSY = 2  # other programs per core


@contextlib.contextmanager
def busy(programs: int) -> Iterator[None]:
    """Keep so many other programs computing."""
    found = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
    try:
        yield
    finally:
        for program in found:
            program.kill()
            program.wait()


def rows(repeats: int) -> Iterator[Row]:
    """Measure a training step of `train.py` alone on the machine and beside two busy programs per core."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_archive(os.path.join(folder, "data.zip"), BATCH, 3, RESOLUTION, 10)
        args = [f"--outdir={folder}", f"--data={data}", "--cond=1", f"--batch={BATCH}", "--device=cpu"]
        form = ("benchmarks.steps", dict(form="ours", script="train", args=[*args, "--arch=ddpmpp_tiny"]))
        for programs, where in ((0, "quiet cores"), (BUSY * usable_cores(), f"beside {BUSY} busy programs per core")):
            name = f"training step, {where}"
            environment = dict(GOMP_SPINCOUNT=DEFAULT_SPIN)
            with busy(programs), processes(ours=form, plain=(*form, environment)) as forms:
                seconds = compare({kind: turns_of(step, STEPS) for kind, step in forms.items()}, repeats, name)
            yield Row(name, seconds["ours"], seconds["plain"], note="plain: OpenMP's default spin", images=BATCH)
