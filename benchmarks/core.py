"""Rows of the table and how they are timed: forms take turns, in this process or each in a process of its own."""

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
PATIENCE = 10  # seconds that a process has to end by itself


@dataclass(frozen=True)
class Row:
    """One line of the table: our form and the plain form of the same work."""

    name: str
    ours_seconds: float
    plain_seconds: float | None = None  # None: there is no plain form
    flops: float | None = None  # least number that the work needs (roofline.py); None: not counted
    bytes: float | None = None  # least number that the work must move; None: not counted
    note: str = ""
    images: int | None = None  # images that the work handles
    precision: str = "fp32"  # the peak of matrix products in this precision limits the work


def compare(forms: dict[str, Form], repeats: int, text: str = "") -> dict[str, float]:
    """Return the median seconds of each form over `repeats` rounds, after one round that does not count.

    The forms take turns in each round, so a busy machine slows all of them. A form that returns a number has measured
    its own seconds.
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
# Forms in processes of their own, because the settings of memory allocator and backends hold for a whole process


class FormProcess:
    """A form in a process of its own, which lives until `close` and computes only when it is called.

    The process runs `python -m module ARGUMENTS` and answers through `Turns`. `facts` is its first answer, a
    description of its work. `environment` is added to this process's. Raises UserError if the process ends too early.
    """

    def __init__(self, module: str, arguments: dict[str, Any], environment: dict[str, str] | None = None):
        self._name = f"{module} {json.dumps(arguments)}"
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(arguments)],
            text=True,
            env=os.environ | (environment or {}),
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
            last = ([line.strip() for line in self._errors if line.strip()] or ["it did not say why"])[-1]
            self.close()
            raise dnnlib.UserError(f"{self._name} ended with code {self._process.returncode}: {last}")
        return json.loads(line)

    def __call__(self) -> float:
        """Let the process take one turn, and return the seconds it took."""
        with contextlib.suppress(BrokenPipeError):  # The process has ended; `_read` reports it.
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        return self._read()

    def kill(self) -> None:
        """End the process at once, so that a running call raises UserError."""
        self._process.kill()

    def close(self) -> None:
        """End the process. It has nothing to save."""
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
    """Start a FormProcess from the arguments of each, by name, for `compare`. End them with the block."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(contextlib.closing(FormProcess(*form))) for name, form in forms.items()}


class Turns:
    """The form's end of the conversation with a FormProcess: `serve` all turns, or `wait` for each one.

    Create it before the process prints anything. Answers go to the original stdout, everything else to nowhere.
    """

    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w")
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)

    def wait(self, answer: Any) -> bool:
        """Send `answer`, first the facts and later the seconds of each turn. Return whether another turn follows."""
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()
        return sys.stdin.readline() != ""

    def serve(self, form: Form, facts: Any = None) -> None:
        """Call `form` once per turn until there are no more; it is a form as in `compare`."""
        going = self.wait(facts)
        while going:
            start = time.perf_counter()
            seconds = form()
            going = self.wait(time.perf_counter() - start if seconds is None else seconds)
