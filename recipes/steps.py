"""Plans: commands of the scripts in order, run one after the other or side by side, and remembered on disk."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
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
LOCK = ".lock"  # beside the journal: the file that a call and its steps hold
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
            0.027 * num,
            f"generate.py {row.sampling} --outdir={images} {options}--seeds=0-{num - 1} --batch=250 --resume",
        ),
        measurement(outdir, row, images, data, metrics),
    ]


def measurement(outdir: str, row: Row, images: str, data: str, metrics: str, title: str = "evaluate them") -> Step:
    """Return the step that measures `images` against `data` and writes the table of a row."""
    table = f"{outdir}/tables/{row.name}.json"
    command = f"fid.py evaluate --images={images} --data={data} {metrics} --bootstrap=200 --out={table}"
    return Step(f"{row.name}-table", title, 8, command)


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
    about: dict[str, Any] | None = None,
    jobs: int = 1,
) -> dict[str, float]:
    """Run all steps that have not run yet, and return the seconds that each took.

    scripts  name -> module with a click command `main`; their output goes to `outdir`/logs
    about    what the journal says about the plan, for `read_journal`
    jobs     steps that run at the same time: one in this process, with progress bars on the screen, or several in
             processes of their own

    UserError: `outdir` holds something else; another call, or a step that has outlived it, runs there; or a step failed
    in its own process.
    """
    with contextlib.ExitStack() as at_end:
        with dnnlib.cli.blame("--outdir"):
            args = outdir, [asdict(step) for step in steps], about
            Journal(*args)  # refuses a folder of others before there is a lock in it
            lock = at_end.enter_context(_alone(outdir))
            journal = Journal(*args)  # as the call before has left it
        journal.write()  # before the first step, which may be killed: the folder is ours
        return _run(steps, scripts, journal, jobs, lock)


@contextlib.contextmanager
def _alone(outdir: str) -> Iterator[int]:
    """Keep other calls out of a folder, and yield the descriptor that does it in all processes that have it.

    The lock goes when the last of these processes ends, however it dies. UserError: another one has it.
    """
    os.makedirs(outdir, exist_ok=True)
    fd = os.open(os.path.join(outdir, LOCK), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise dnnlib.UserError(f"{outdir}: a call or one of its steps is still running here") from None
        except OSError:  # a file system without locks
            pass
        yield fd
    finally:
        os.close(fd)


def _run(steps: Sequence[Step], scripts: Mapping[str, Any], journal: Journal, jobs: int, lock: int) -> dict[str, float]:
    """Run the steps that the journal does not know as done. Their processes hold the `lock`, too."""
    by_name = {step.name: step for step in steps}

    def announce(step: Step) -> None:
        done = [name for name in by_name if name in journal.seconds]
        planned = sum(by_name[name].seconds for name in done)
        rate = sum(journal.seconds[name] for name in done) / planned if planned > 60 else 1.0
        remaining = [max(s.seconds * rate - journal.spent(s.name), 0.0) for s in steps if s.name not in journal.seconds]
        left = dnnlib.format_time(sum(remaining) / jobs)
        click.echo(f"[{steps.index(step) + 1}/{len(steps)}] {step.title:<50s} about {left} left")

    waiting = [step for step in steps if step.name not in journal.seconds]
    try:
        with catching(exit_in_order, *ENDING):
            if jobs == 1:
                _one_by_one(waiting, scripts, journal, announce)
            else:
                _side_by_side(waiting, scripts, journal, announce, jobs, lock)
    except (KeyboardInterrupt, SystemExit, click.Abort):
        click.echo("Stopped. The same command goes on from here.")
        raise
    return journal.seconds


def _one_by_one(
    steps: Sequence[Step], scripts: Mapping[str, Any], journal: Journal, announce: Callable[[Step], None]
) -> None:
    """Run the steps in this process."""
    for step in steps:
        announce(step)
        with journal.timing(step.name):
            run_step(step, scripts, journal.log(step.name))


def _side_by_side(
    steps: Sequence[Step],
    scripts: Mapping[str, Any],
    journal: Journal,
    announce: Callable[[Step], None],
    jobs: int,
    lock: int,
) -> None:
    """Run the steps in processes of their own.

    A step waits for earlier ones that write what it reads. If one fails, the others stop, as at a signal.
    """
    needs = {step: {other for other in steps[:i] if _reads(step, other)} for i, step in enumerate(steps)}
    waiting, running = list(steps), {}  # step -> its process, in the order of the plan
    environ, cores = dict(os.environ), usable_cores()
    if environ.get("OMP_NUM_THREADS") in (None, str(cores)):  # all cores: for a CPU quota `dnnlib.threads` has set it
        environ["OMP_NUM_THREADS"] = str(max(cores // jobs, 1))
    try:
        while waiting or running:
            for step in [*waiting]:
                if len(running) < jobs and needs[step].isdisjoint([*running, *waiting]):
                    announce(step)
                    waiting.remove(step)
                    running[step] = _Process(step, scripts, journal, environ, lock)
            time.sleep(POLL)
            for step, process in [*running.items()]:
                if process.ended():
                    del running[step]
                    process.check()
    finally:
        _stop([*running.values()])


class _Process:
    """A step in a process of its own, which holds the `lock`, with its output at the end of its log."""

    def __init__(self, step: Step, scripts: Mapping[str, Any], journal: Journal, environ: Mapping[str, str], lock: int):
        script, *args = shlex.split(step.command)
        self.step, self.journal, self.path = step, journal, journal.log(step.name)
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        self.written = os.path.getsize(self.path) if os.path.exists(self.path) else 0
        journal.begin(step.name)
        with open(self.path, "a") as f:  # in a session of its own: Ctrl-C reaches us alone, and we ask it to stop
            self.process = subprocess.Popen(
                [sys.executable, scripts[script].__file__, *args],
                stdout=f,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environ,
                start_new_session=True,
                pass_fds=[lock],  # it may outlive us: a second one must not write to the same files
            )

    def ended(self) -> bool:
        """Return whether it has ended. The journal then says how."""
        if self.process.poll() is None:
            return False
        self.journal.end(self.step.name, done=self.process.returncode == 0)
        return True

    def check(self) -> None:
        """Raise UserError if it failed, with the last line that it wrote."""
        code = self.process.returncode
        if code:
            with open(self.path, errors="replace") as f:
                f.seek(self.written)
                lines = [line.strip() for line in f if line.strip()] or ["it did not say why"]
            how = f"code {code}" if code > 0 else signal.Signals(-code).name
            raise dnnlib.UserError(f"{self.step.title} ended with {how}: {lines[-1]} ({self.path})")


def _stop(processes: Sequence[_Process]) -> None:
    """Let processes save what they have, and wait for them. A second signal kills them."""
    try:
        for one in processes:
            one.process.terminate()
        for one in processes:
            one.process.wait()
    except BaseException:
        for one in processes:
            one.process.kill()
        raise
    finally:
        for one in processes:
            one.process.wait()
            one.ended()


def _reads(step: Step, other: Step) -> bool:
    """Return whether a step reads what another one writes, by their options."""

    def values(command: str) -> list[tuple[str, str]]:
        return [word.partition("=")[::2] for word in shlex.split(command)[1:]]

    read = [value for _, value in values(step.command)]
    for name, path in values(other.command):
        # A run, a file, or the classifier beside a label file.
        beside = f"{path.removesuffix('.npz')}-" if path.endswith(".npz") else f"{path}/"
        if name in WRITTEN and any(value == path or value.startswith(beside) for value in read):
            return True
    return False


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
        self.outdir, self.about, self.begun = outdir, about, {}
        if os.path.exists(self.path):
            known = safe_files.load_json(dnnlib.read_bytes(self.path), self.path)
            # The folder may have moved since, and its name be spelled otherwise.
            before = _placed(known, outdir)
            there, here = ({step["name"]: step["command"] for step in some} for some in (before, steps))
            same = there == here  # but for titles and estimates
            if about:
                self.steps, self.about = _joined(before, steps), _united(known, about)
                same = self.about and there | here == here | there  # no command of theirs has changed
            if not same:
                raise dnnlib.UserError(f"{outdir} holds a run with other options; choose another folder")
            self.seconds, self.before = known["seconds"], known.get("interrupted", {})
        elif os.path.isdir(outdir) and {*dnnlib.list_contents(outdir)} - {LOCK}:
            raise dnnlib.UserError(f"{outdir} holds files that are not of such a run; choose another folder")

    def log(self, name: str) -> str:
        """Return where the output of a step goes."""
        return os.path.join(self.outdir, "logs", f"{name}.txt")

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Record that the step inside is done, and how long it took, with the times until it was interrupted before."""
        done = False
        self.begin(name)
        try:
            yield
            done = True
        finally:
            self.end(name, done)

    def begin(self, name: str) -> None:
        """Record that a step begins."""
        self.begun[name] = time.time()

    def end(self, name: str, done: bool) -> None:
        """Record that a step has ended, and whether it is done."""
        self.before[name] = self.spent(name)
        del self.begun[name]
        if done:
            self.seconds[name] = self.before.pop(name)
        with contextlib.nullcontext() if done else contextlib.suppress(OSError):
            self.write()

    def spent(self, name: str) -> float:
        """Return the seconds that an unfinished step took until now."""
        now = time.time()
        return self.before.get(name, 0.0) + now - self.begun.get(name, now)

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
