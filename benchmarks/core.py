"""A row of the table and how its times are taken: forms that take turns, here or each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

import dnnlib

__all__ = ["Form", "FormProcess", "Row", "Turns", "compare", "processes"]

Form = Callable[[], float | None]
PATIENCE = 10  # seconds that a process gets to end by itself


@dataclass(frozen=True)
class Row:
    """One line of the table: ours against its plain form, both in seconds for the same work.

    `plain_seconds` None: there is no plain form. `flops`, `bytes`: what the work needs at least (roofline.py), None:
    not counted. `images`: how many the work handles. `precision`: whose matrix-product peak bounds it.
    """

    name: str
    ours_seconds: float
    plain_seconds: float | None = None
    flops: float | None = None
    bytes: float | None = None
    note: str = ""
    images: int | None = None
    precision: str = "fp32"


def compare(forms: dict[str, Form], repeats: int, text: str = "") -> dict[str, float]:
    """Median seconds of each form over `repeats` rounds, the forms taking turns so that a busy machine slows them all.

    One round before that does not count. A form that returns a number has taken its own time, in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in forms}
    with tqdm(total=(1 + repeats) * len(forms), desc=text, unit="turn", leave=False, disable=None) as bar:
        for _ in range(1 + repeats):
            for name, form in forms.items():
                start = time.perf_counter()
                seconds = form()
                times[name].append(time.perf_counter() - start if seconds is None else seconds)
                bar.update()
    return {name: statistics.median(found[1:]) for name, found in times.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Forms in processes of their own: allocator and backend settings are a process's.


class FormProcess:
    """A form in a process of its own, which lives until `close` and computes only when it is called.

    `module` is run as `python -m module ARGUMENTS` and answers through `Turns`. `facts`: what it said about its work
    when it was ready. UserError: it ended before it was told to.
    """

    def __init__(self, module: str, arguments: dict[str, Any]):
        self._name = f"{module} {json.dumps(arguments)}"
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(arguments)],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self.facts = self._read()

    def _read(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = ([line.strip() for line in self._errors if line.strip()] or ["it does not say why"])[-1]
            self.close()
            raise dnnlib.UserError(f"{self._name} ended with code {self._process.returncode}: {last}")
        return json.loads(line)

    def __call__(self) -> float:
        """One turn: the seconds that the process took for it."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: reading will say so
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process, which has nothing to save."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


@contextlib.contextmanager
def processes(**forms: tuple) -> Iterator[dict[str, FormProcess]]:
    """Named FormProcesses from their arguments, for `compare`; started one after the other, ended with the block."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(contextlib.closing(FormProcess(*form))) for name, form in forms.items()}


class Turns:
    """The other end, in the form's process: `wait` for the next turn, or `serve` all of them.

    Made before anything is printed: the answers take over stdout.
    """

    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w")
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)

    def wait(self, answer: Any) -> bool:
        """Say `answer`, the facts the first time and then the seconds of the last turn; whether there is a next one."""
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()
        return sys.stdin.readline() != ""

    def serve(self, form: Form, facts: Any = None) -> None:
        """Take turns until told to stop. `form` is as in `compare`."""
        going = self.wait(facts)
        while going:
            start = time.perf_counter()
            seconds = form()
            going = self.wait(time.perf_counter() - start if seconds is None else seconds)
