"""Plans: commands of the scripts in order, run one after the other and remembered on disk."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click

import dnnlib
import dnnlib.cli
from dnnlib.signals import ENDING, catching, exit_in_order
from dnnlib.threads import usable_cores
from reports.comparison import Method
from torch_utils import safe_files
from training.training_loop import last_seconds

__all__ = [
    "AFTER_ANOTHER",
    "CONSTANT",
    "REJECTION",
    "Row",
    "Step",
    "evaluation",
    "finished",
    "measurement",
    "read_journal",
    "run_plan",
]

JOURNAL = "quickstart.json"
WRITTEN = ("--dest", "--outdir", "--out", "--cleaned", "--features")  # options of our scripts that name what they write
POLL = 0.2  # seconds between two looks at the processes
# Options of generate.py for SBDC: as in the paper's example, and behind a method that has left 10% wrong labels.
CONSTANT = "--dg_mode=constant --S_clip_min=1.5 --S_clip_max=50 --dg_weight_1st_order=0.9 --dg_weight_2nd_order=0.9"
REJECTION = "--dg_mode=rejection"
AFTER_ANOTHER = "--dg_mode=calibrated --noise_rate=0.1"


@dataclass(frozen=True)
class Step:
    """One command of a plan."""

    name: str  # of its log
    title: str  # on the screen
    seconds: float  # about how long it takes on two cores
    command: str  # script and options


@dataclass
class Row:
    """A method of a table."""

    name: str  # of its files
    title: str  # on the page
    training: Sequence[str]  # the steps that train what it needs
    sampling: str  # options of generate.py
    role: str = ""  # reports.finding.ORACLE, BASELINE or none
    text: str = ""  # what it does


def evaluation(
    outdir: str, row: Row, num: int, data: str, options: str = "", metrics: str = "--detector=pixels"
) -> list[Step]:
    """List the steps that make `num` images of a method and measure them against `data`.

    `options`: further options of generate.py, with a blank at the end. `metrics`: options of fid.py.
    """
    images = f"{outdir}/images/{row.name}.zip"
    return [
        Step(
            f"{row.name}-images",
            f"make {num:,} images ({row.title})",
            8,
            f"generate.py {row.sampling} --outdir={images} {options}--seeds=0-{num - 1} --batch=250",
        ),
        measurement(outdir, row, images, data, metrics),
    ]


def measurement(outdir: str, row: Row, images: str, data: str, metrics: str, title: str = "evaluate them") -> Step:
    """Return the step that measures `images` against `data` and writes the table of a row."""
    table = f"{outdir}/tables/{row.name}.json"
    command = f"fid.py evaluate --images={images} --data={data} {metrics} --bootstrap=200 --out={table}"
    return Step(f"{row.name}-table", title, 2, command)


def finished(outdir: str, rows: Sequence[Row], seconds: Mapping[str, float]) -> list[Method]:
    """Return the rows as methods to compare, given the `seconds` that each step took."""
    return [
        Method(
            row.title,
            {name: f"{outdir}/{name}" for name in row.training if os.path.exists(f"{outdir}/{name}/stats.jsonl")},
            f"{outdir}/images/{row.name}.zip",
            f"{outdir}/tables/{row.name}.json",
            # A step that was killed could not write down how long it had taken, but a training logs its time.
            sum(max(seconds[name], last_seconds(f"{outdir}/{name}")) for name in row.training),
            seconds[f"{row.name}-images"],
            row.role,
            row.text,
        )
        for row in rows
    ]


def run_plan(
    steps: Sequence[Step],
    scripts: Mapping[str, Any],
    outdir: str,
    pace: float,
    about: dict[str, Any] | None = None,
    jobs: int = 1,
) -> dict[str, float]:
    """Run all steps that have not run yet, and return the seconds that each took.

    scripts  name -> module with a click command `main`; their output goes to `outdir`/logs
    pace     expected duration divided by the planned one, for the first estimates of the time left
    about    what the journal says about the plan, for `read_journal`
    jobs     steps that run at the same time: one in this process, with progress bars on the screen, or several in
             processes of their own

    UserError: `outdir` holds something else; or a step failed in its own process.
    """
    with dnnlib.cli.blame("--outdir"):
        journal = Journal(outdir, [asdict(step) for step in steps], about)
    journal.write()  # before the first step, which may be killed: the folder is ours
    start, expected = time.time(), 0.0

    def announce(step: Step) -> None:
        remaining = sum(other.seconds for other in steps if other.name not in journal.seconds)
        left = remaining * ((time.time() - start) / expected if expected > 60 else pace / jobs)
        click.echo(f"[{steps.index(step) + 1}/{len(steps)}] {step.title:<50s} about {dnnlib.format_time(left)} left")

    try:
        with catching(exit_in_order, *ENDING):
            waiting = [step for step in steps if step.name not in journal.seconds]
            how = _one_by_one if jobs == 1 else functools.partial(_side_by_side, jobs=jobs)
            with contextlib.closing(how(waiting, scripts, journal, announce)) as run:
                for step in run:
                    expected += step.seconds
    except (KeyboardInterrupt, SystemExit, click.Abort):
        click.echo("Stopped. The same command goes on from here.")
        raise
    return journal.seconds


def _one_by_one(
    steps: Sequence[Step], scripts: Mapping[str, Any], journal: Journal, announce: Callable[[Step], None]
) -> Iterator[Step]:
    """Run the steps in this process, and yield each one when it is done."""
    for step in steps:
        announce(step)
        with journal.timing(step.name):
            run_step(step, scripts, journal.log(step.name))
        yield step


def _side_by_side(
    steps: Sequence[Step], scripts: Mapping[str, Any], journal: Journal, announce: Callable[[Step], None], jobs: int
) -> Iterator[Step]:
    """Run the steps in processes of their own, and yield each one when it is done.

    A step waits for earlier ones that write what it reads. If one fails, the others stop, as at a signal.
    """
    waiting, running = list(steps), {}  # Step -> its process and what times it, in the order of the plan
    threads = {"OMP_NUM_THREADS": str(max(usable_cores() // jobs, 1))} | os.environ
    with contextlib.ExitStack() as stack:
        stack.callback(_stop, running, journal)
        while waiting or running:
            for step in [*waiting]:
                before = [*running, *waiting[: waiting.index(step)]]
                if len(running) < jobs and not any(_reads(step, other) for other in before):
                    announce(step)
                    waiting.remove(step)
                    running[step] = _start(step, scripts, journal.log(step.name), threads), time.time()
            time.sleep(POLL)
            for step, (process, start) in [*running.items()]:
                if process.poll() is not None:
                    del running[step]
                    journal.add(step.name, time.time() - start, done=process.returncode == 0)
                    if process.returncode:
                        raise dnnlib.UserError(_why(step, process.returncode, journal.log(step.name)))
                    yield step


def _start(step: Step, scripts: Mapping[str, Any], log: str, environ: Mapping[str, str]) -> subprocess.Popen:
    script, *args = shlex.split(step.command)
    os.makedirs(os.path.dirname(log), exist_ok=True)
    with open(log, "a") as f:  # a session of its own, so that Ctrl-C asks this process only, which asks the others
        return subprocess.Popen(
            [sys.executable, scripts[script].__file__, *args],
            stdout=f,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environ,
            start_new_session=True,
        )


def _stop(running: Mapping[Step, tuple[subprocess.Popen, float]], journal: Journal) -> None:
    """Let the processes save what they have, and wait for them."""
    for process, _ in running.values():
        process.terminate()
    for step, (process, start) in running.items():
        process.wait()
        journal.add(step.name, time.time() - start, done=False)


def _reads(step: Step, other: Step) -> bool:
    """Return whether a step reads what another one writes, by their options."""
    words = [word.partition("=")[::2] for word in shlex.split(other.command)[1:]]
    written = [os.path.splitext(value)[0] for name, value in words if name in WRITTEN]
    read = [word.partition("=")[2] for word in shlex.split(step.command)[1:]]
    return any(value.startswith(path) for path in written for value in read)


def _why(step: Step, code: int, log: str) -> str:
    """Return why a process ended, by the last line of its log."""
    with open(log, errors="replace") as f:
        lines = [line.strip() for line in f if line.strip()]
    return f"{step.title} ended with code {code}: {lines[-1] if lines else 'it did not say why'} ({log})"


def read_journal(outdir: str) -> dict[str, Any]:
    """Return what `run_plan` recorded in a folder: steps, seconds and about. UserError: nothing."""
    path = os.path.join(outdir, JOURNAL)
    journal = safe_files.load_json(dnnlib.read_bytes(path), path)
    if not isinstance(journal, dict) or not {"steps", "seconds", "about"} <= set(journal):
        raise dnnlib.UserError(f"{path}: not written by this recipe")
    return journal


def run_step(step: Step, scripts: Mapping[str, Any], log: str) -> None:
    """Call the script's main in this process, with its output in the file `log`."""
    script, *args = shlex.split(step.command)
    os.makedirs(os.path.dirname(log), exist_ok=True)
    with open(log, "a") as f, contextlib.redirect_stdout(f):
        scripts[script].main(args, standalone_mode=False)


class Journal:
    """Records on disk which steps are done and how long each took, so that a second call continues.

    With `about`, the plan may have grown since, or have fewer steps. The lists in `about` say what was asked for; all
    else in it must be the same, and steps of the same name must have the same command.
    """

    def __init__(self, outdir: str, steps: list[dict], about: dict[str, Any] | None = None):
        self.path, self.steps, self.seconds, self.before = os.path.join(outdir, JOURNAL), steps, {}, {}
        self.outdir, self.about = outdir, about
        if os.path.exists(self.path):
            known = safe_files.load_json(dnnlib.read_bytes(self.path), self.path)
            # The folder may have moved since, and its name be spelled otherwise.
            before = _placed(known, outdir)
            if about:
                self.steps, self.about = _joined(before, steps), _united(known, about)
            if not (self.about and all(s in self.steps for s in steps) if about else before == steps):
                raise dnnlib.UserError(f"{outdir} holds a run with other options; choose another folder")
            self.seconds, self.before = known["seconds"], known.get("interrupted", {})
        elif os.path.isdir(outdir) and os.listdir(outdir):
            raise dnnlib.UserError(f"{outdir} holds files that are not of a quickstart; choose another folder")

    def log(self, name: str) -> str:
        """Return where the output of a step goes."""
        return os.path.join(self.outdir, "logs", f"{name}.txt")

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Record that the step inside is done, and how long it took, with the times until it was interrupted before."""
        start, done = time.time(), False
        try:
            yield
            done = True
        finally:
            self.add(name, time.time() - start, done)

    def add(self, name: str, seconds: float, done: bool) -> None:
        """Record that a step took some seconds more, and whether it is done now."""
        self.before[name] = self.before.get(name, 0.0) + seconds
        if done:
            self.seconds[name] = self.before.pop(name)
        with contextlib.nullcontext() if done else contextlib.suppress(OSError):
            self.write()

    def write(self) -> None:
        """Write the journal."""
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        before = dict(interrupted=self.before) if self.before else {}
        with dnnlib.atomic_open(self.path, "w") as f:
            about = dict(about=self.about) if self.about else {}
            json.dump(dict(outdir=self.outdir, steps=self.steps, seconds=self.seconds) | before | about, f, indent=1)


def _placed(journal: Any, outdir: str) -> list[dict]:
    """Return the steps of a journal as they would be in `outdir`, an empty list for what is no journal."""
    try:
        there = journal.get("outdir", outdir)
        before, here = (f"={shlex.quote(folder)}/" for folder in (there, outdir))
        return [step | dict(command=step["command"].replace(before, here)) for step in journal["steps"]]
    except (AttributeError, LookupError, TypeError):
        return []


def _joined(before: list[dict], steps: list[dict]) -> list[dict]:
    """Return the steps `before`, with those of `steps` that are new after them."""
    names = {step["name"] for step in before}
    return [*before, *(step for step in steps if step["name"] not in names)]


def _united(journal: Any, about: dict[str, Any]) -> dict[str, Any] | None:
    """Return `about`, its lists after those of a journal; None where anything else in it differs from the journal."""
    known = journal.get("about") if isinstance(journal, dict) else None
    if not isinstance(known, dict):
        return None
    found = {}
    for name, value in about.items():
        before = known.get(name, value)  # older journals know less
        if type(before) is not type(value) or not isinstance(value, list) and before != value:
            return None
        found[name] = [*dict.fromkeys([*before, *value])] if isinstance(value, list) else value
    return found
