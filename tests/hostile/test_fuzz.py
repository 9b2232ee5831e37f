"""Spoiled files and odd command lines: every case soon ends in success or in one `Error:` line, in little memory."""

import collections
import faulthandler
import os
import resource
import shutil
import signal
import time

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings

from dnnlib import downloads
from tests.support import fuzz

LONGEST = 30  # seconds that a case may take
MOST = 2 << 30  # bytes of address space beyond what the imports took
FIGURES = collections.defaultdict(collections.Counter)  # target -> outcome -> cases
SLOWEST = collections.defaultdict(float)


class HangError(BaseException):
    """A case takes too long. No script catches this."""


def hang(*_args):
    raise HangError(f"still running after {LONGEST} s")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    files = fuzz.honest(root)
    return {**files, "targets": fuzz.targets(root, files), "root": root, "new": root / "out" / "new"}


@pytest.fixture(scope="module", autouse=True)
def report(request):
    """Print the outcomes of all cases after the tests."""
    yield
    lines = [
        f"  {name:<22} {sum(found.values()):>5} cases, slowest {SLOWEST[name]:.2f} s: "
        + ", ".join(f"{count} {outcome}" for outcome, count in sorted(found.items()))
        for name, found in FIGURES.items()
    ]
    total = sum(FIGURES.values(), collections.Counter())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    slowest = max(SLOWEST.values(), default=0)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(
            f"\nfuzz: {sum(total.values())} cases, {dict(total)}, slowest {slowest:.2f} s, "
            f"largest memory of the process {peak:.0f} MiB",
            *lines,
            sep="\n",
        )


@pytest.fixture(autouse=True)
def limits(monkeypatch, files):
    """Limit memory and time, and allow no network."""
    monkeypatch.setattr(downloads, "_PAUSE", 0)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(files["root"] / "cache"))
    (files["root"] / "out").mkdir(exist_ok=True)
    monkeypatch.chdir(files["root"] / "out")
    with open("/proc/self/statm") as f:
        size = int(f.read().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (size + MOST, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    signal.signal(signal.SIGALRM, handler)
    faulthandler.cancel_dump_traceback_later()


def run(target, script, args, files):
    """Run one case and record its outcome. Fail unless it is success or one line."""
    for name in os.listdir(files["root"] / "out"):
        path = files["root"] / "out" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    faulthandler.dump_traceback_later(2 * LONGEST, exit=True)  # for code that no signal interrupts
    signal.alarm(LONGEST)
    start = time.monotonic()
    try:
        result = CliRunner().invoke(fuzz.SCRIPTS[script].main, args)
    finally:
        signal.alarm(0)
    seconds = time.monotonic() - start
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{script}.py {' '.join(args)}") from result.exception
    errors = [line for line in result.stderr.splitlines() if not line.startswith("Note: ")]
    if result.exit_code == 0:
        assert not any(line.startswith(("Error", "Traceback")) for line in errors), result.stderr
    else:
        assert result.exit_code in (1, 2) and len(errors) == 1 and errors[0].startswith("Error: "), result.stderr
        assert errors[0].isprintable() and len(errors[0]) < 5000
    outcome = {0: "success", 1: "data error", 2: "usage error"}[result.exit_code]
    FIGURES[target][outcome] += 1
    SLOWEST[target] = max(SLOWEST[target], seconds)


def cases(n):
    return settings(
        max_examples=n,
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )


def spoiled_files(name, n, files):
    target = files["targets"][name]
    path = files["root"] / target.file

    @cases(n)
    @given(target.how)
    def case(how):
        path.write_bytes(target.spoil(target.data, how))
        script, args = target.doors[sum(FIGURES[name].values()) % len(target.doors)]
        run(name, script, [arg.format(file=path, **files) for arg in args.split()], files)

    case()


def odd_commands(n, files):
    @cases(n)
    @given(fuzz.command_lines())
    def case(line):
        script, base, added = line
        args = [arg.format(**files) for arg in base.split()] + [arg.format(**files) for arg in added]
        run("command lines", script, args, files)

    case()


TARGETS = [
    "ZIP", "member of a ZIP", "frames", "dataset.json", "labels .json", "labels .json, bytes", "labels .npy",
    "labels .npz", "labels .pt", "labels .pt, older", "labels .csv", "labels .tsv", "labels .jsonl",
    "labels .jsonl, values",
    "labels .parquet", "metadata.csv", "labels of CIFAR-10N", "decisions", "label table",
    "matrix .npy", "matrix .json", "snapshot", "classifier", "snapshot's info",
    "classifier's info", "state", "state's content", "reference", "images .npz", "images .pk", "images .pk, content",
    "STL-10", "STL-10, labels", "list of Clothing1M", "keys of Clothing1M", "list of WebVision", "list of Food-101N",
    "attributes of CelebA", "attributes of CelebA, CSV", "CIFAR", "CIFAR, packed", "MNIST",
]  # fmt: skip


def test_no_target_is_forgotten(files):
    assert list(files["targets"]) == TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_spoiled_files(name, files):
    spoiled_files(name, 8, files)


def test_odd_command_lines(files):
    odd_commands(60, files)


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_many_spoiled_files(name, files):
    spoiled_files(name, 90, files)


@pytest.mark.long
def test_many_odd_command_lines(files):
    odd_commands(600, files)
    assert sum(sum(found.values()) for found in FIGURES.values()) >= 2000 or len(FIGURES) < len(TARGETS)
