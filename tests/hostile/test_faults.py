"""Runs that die, or whose disk fails, at any operation of their saves: all continue and end with the same weights."""

import collections
import errno
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from tests.support.faults import KILLED
from tests.support.paths import ROOT
from tests.support.runs import TINY, assert_same, errors
from tests.support.synth import make_archive, pictures
from torch_utils import checkpoint, persistence
from training.training_loop import last_seconds

DEADLY = ("kill", "torn", "power")
PLAIN = ("plain",)  # every run has a folder of its own
BEST = ("--nosubdir", "--best")  # all runs use one folder and keep only the best snapshot


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """A function that asks `faults.py` for a run and returns what its processes left, as a dict of lists by rank."""
    folder = tmp_path_factory.mktemp("faults")
    data = make_archive(folder / "d.zip", pictures(64, channels=1))
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "support" / "faults.py", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def ask(outdir, *options, ranks=1, duration=0.003, **more):
        args = [
            f"--data={data}",
            f"--outdir={outdir}",
            "--batch=500",
            f"--duration={duration}",
            "--tick=1",
            "--snap=1",
            "--dump=1",
            "--seed=3",
            "--augment=0",
            "--lr_rampup_kimg=0",
            "--device=cpu",
            *options,
        ]
        print(json.dumps(dict(args=args, ranks=ranks, root=str(outdir), **more)), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())

    yield ask
    server.stdin.close()
    assert server.wait() == 0


def given(variant):
    return [option for option in variant if option.startswith("--")]


def newest_run(outdir, variant):
    return outdir if "--nosubdir" in variant else max(path for path in outdir.iterdir() if path.is_dir())


def ended_with(run_dir):
    """Return all that must be the same in the end. Assert that no temporary file is left."""
    state = checkpoint.load_state(checkpoint.states(run_dir)[0])
    snapshots = {path.name: persistence.load_snapshot(path) for path in run_dir.glob("network-snapshot-*.pkl")}
    assert not list(run_dir.glob(".*"))
    return dict(
        objective=state["objective"],
        nimg=state["nimg"],
        best=state["best"],
        states=[path.name for path in checkpoint.states(run_dir)][
            :2
        ],  # a third one may remain from before the last save
        snapshots={name: dict(s["ema"].state_dict(), nimg=s["info"]["nimg"]) for name, s in sorted(snapshots.items())},
        ticks=[json.loads(line)["Progress/kimg"]["mean"] for line in open(run_dir / "stats.jsonl")],
    )


@pytest.fixture(scope="module")
def undisturbed(ask, tmp_path_factory):
    """A function of (ranks, variant) that returns what such a run ends with and the operations of its disk."""
    known = {}

    def undisturbed(ranks, variant):
        if (ranks, variant) not in known:
            outdir = tmp_path_factory.mktemp("undisturbed") / "runs"
            run = ask(outdir, *given(variant), ranks=ranks)
            assert run["codes"] == [0] * ranks, run["err"]
            known[ranks, variant] = ended_with(newest_run(outdir, variant)), run["operations"]
        return known[ranks, variant]

    return undisturbed


def survive(ask, outdir, ranks, variant, fault, expected):
    """Let a run meet the fault, check that its files are undamaged, continue it, compare. Return what happened."""
    run = ask(outdir, *given(variant), ranks=ranks, fault=fault)
    errors = [line for text in run["err"] for line in text.splitlines()]
    assert not [text for text in run["err"] if "Traceback" in text], run
    if fault["kind"] == "short":
        assert run["codes"] == [0] * ranks and not errors, run
    elif fault["kind"] in DEADLY:
        assert run["codes"] == [KILLED] + [1] * (ranks - 1), run
        assert len(errors) == ranks - 1 and all(re.match(r"Error: process 0 \(id \d+\) ended ", e) for e in errors), run
    else:
        reason = os.strerror(getattr(errno, fault["kind"]))
        assert run["codes"] == [1] * ranks and len(errors) == 1, run
        assert re.match(rf"Error: .*{re.escape(str(outdir))}.*{reason}", errors[0]), run
    for path in outdir.rglob("training-state-*.pt"):
        checkpoint.load_state(path)
    for path in outdir.rglob("network-snapshot-*.pkl"):
        persistence.load_snapshot(path)
    if fault["kind"] != "short":
        again = ask(outdir, *given(variant), "--resume=latest", ranks=ranks)
        assert again["codes"] == [0] * ranks, again
        resumed = re.search(r"Resuming at ([\d.]+) kimg", again["out"][0])
        assert 1000 * float(resumed[1] if resumed else 0) >= max(run["promised"], default=0), again
    assert_same(ended_with(newest_run(outdir, variant)), expected)
    return "continued" if fault["kind"] != "short" and run["promised"] else "from the start"


# The disk operations that each fault can meet.
MEETS = dict(
    kill=("open", "write", "fsync", "replace", "unlink"),
    torn=("write",),
    ENOSPC=("open", "write"),
    EACCES=("open", "replace", "unlink"),
    EIO=("write", "fsync"),
    short=("write",),
)
MEETS["power"] = MEETS["EROFS"] = MEETS["kill"]


def try_all(ask, undisturbed, tmp_path, every):
    """Try every `every`-th fault at every operation of the four kinds of run. Return the counts."""
    table = collections.Counter()
    for ranks, variant, sparser in ((1, PLAIN, 1), (1, BEST, 2), (2, PLAIN, 4), (2, BEST, 6)):
        expected, operations = undisturbed(ranks, variant)
        faults = [
            dict(kind=kind, at=at)
            for at, what in enumerate(operations, start=1)
            for kind in MEETS
            if what in MEETS[kind]
        ]
        for fault in faults[:: every * sparser]:
            name = f"{ranks} {fault['kind']} {operations[fault['at'] - 1]}"
            outdir = tmp_path / f"{ranks}{variant[-1]}{fault['at']}{fault['kind']}"
            outcome = survive(ask, outdir, ranks, variant, fault, expected)
            table[name] += 1
            table[f"{ranks} {outcome}"] += 1
            table["all"] += 1
    for name, count in sorted(table.items()):
        print(f"{name:<24s} {count}")
    return table


def test_faults_lose_nothing(ask, undisturbed, tmp_path):
    assert try_all(ask, undisturbed, tmp_path, every=40)["all"] >= 40


@pytest.mark.long
def test_many_faults_lose_nothing(ask, undisturbed, tmp_path):
    assert try_all(ask, undisturbed, tmp_path, every=4)["all"] >= 400


def assert_continues(ask, outdir, expected, *options, ranks=2):
    again = ask(outdir, "--resume=latest", *options, ranks=ranks)
    assert again["codes"] == [0] * ranks and "Resuming at" in again["out"][0], again
    assert_same(ended_with(newest_run(outdir, PLAIN)), expected)


@pytest.mark.parametrize("ranks", [1, 2])
def test_non_finite_steps_are_counted_and_many_stop_the_run(ask, undisturbed, tmp_path, ranks):
    def run(outdir, first, last, **options):
        hook = dict(nan=list(range(first, last)), rank=ranks - 1)  # step n ends at n / 2 + 0.5 kimg
        return ask(tmp_path / outdir, "--max_bad_steps=3", ranks=ranks, hook=hook, **options)

    few = run("few", 3, 4)
    assert few["codes"] == [0] * ranks and "non-finite losses" in few["out"][0]
    folder = newest_run(tmp_path / "few", PLAIN)
    rows = {row["Progress/kimg"]["mean"]: row for row in map(json.loads, open(folder / "stats.jsonl"))}
    bad = {
        kimg: (
            row["Health/bad_losses"]["mean"] * row["Health/bad_losses"]["num"],
            row["Health/bad_gradients"]["mean"] > 0,
        )
        for kimg, row in rows.items()
    }
    pixels = 64 * 500 // ranks
    assert bad == {0.5: (0, False), 1.0: (0, False), 2.0: (pytest.approx(pixels), True), 3.0: (0, False)}
    assert all(abs(row["Loss/loss"]["mean"]) < 2 for row in rows.values())
    assert not (folder / "training-state-000002.pt").exists() and few["promised"] == [1000, 3000]
    assert "Nothing was saved: the last 1 steps" in few["out"][0]

    many = run("many", 4, 99, duration=0.006)
    assert many["codes"] == [1] * ranks and many["promised"] == [1000, 2000]
    assert re.fullmatch(
        r"Error: the last 3 steps, to 3.5 kimg, had non-finite losses or gradients "
        r"\(max_bad_steps is 3\); training-state-000002.pt is saved.*--resume=\S+",
        errors(many)[0],
    )
    assert errors(many)[1:] == [""] * (ranks - 1)
    assert_continues(ask, tmp_path / "many", undisturbed(ranks, PLAIN)[0], "--max_bad_steps=5", ranks=ranks)

    end = run("end", 5, 99)  # too few bad steps to stop the run, but the end of the run must not be saved
    assert end["codes"] == [1] * ranks and end["promised"] == [1000, 2000] and "the last 1 steps" in end["err"][0]


@pytest.mark.parametrize(
    ("hook", "found"),
    [(dict(drift=1, at=3), "their weights differ"), (dict(miscompute=1.2), "their losses on the same images are")],
)
def test_processes_that_drift_apart_are_stopped(ask, tmp_path, hook, found):
    run = ask(tmp_path, ranks=2, hook=dict(hook, rank=1))
    where = 2.0 if "at" in hook else 0.5
    assert run["codes"] == [1, 1] and run["promised"] == ([1000] if "at" in hook else [])
    assert re.match(f"Error: processes 0 and 1 have drifted apart at {where} kimg: {found}", errors(run)[0])
    assert errors(run)[1] == ""


@pytest.mark.parametrize(
    ("number", "code", "rank", "ranks"),
    [(signal.SIGTERM, 143, 1, 2), (signal.SIGINT, 130, 0, 2), (signal.SIGHUP, 129, 0, 1)],
)
def test_a_signal_to_one_process_ends_all_with_its_code(ask, undisturbed, tmp_path, number, code, rank, ranks):
    run = ask(tmp_path, ranks=ranks, hook=dict(signal=number, at=4 - ranks, rank=rank))
    assert run["codes"] == [code] * ranks and errors(run) == [""] * ranks
    hint = rf"Stopped by {number.name} at 2.0 kimg; training-state-000002.pt is saved. .*--resume={tmp_path}"
    assert re.search(hint, run["out"][0])  # the ranks learn of the signal one step later
    assert_continues(ask, tmp_path, undisturbed(ranks, PLAIN)[0], ranks=ranks)


@pytest.mark.parametrize("variant", [PLAIN, BEST])
def test_a_signal_between_two_snapshots_saves_one_and_the_time_adds_up(ask, undisturbed, tmp_path, variant):
    options = [*given(variant), "--snap=3"]
    run = ask(tmp_path, *options, hook=dict(signal=signal.SIGTERM, at=2))
    assert run["codes"] == [143] and run["promised"] == [1000, 1500]
    folder = newest_run(tmp_path, variant)
    snapshot = persistence.load_snapshot(persistence.find_snapshot(folder))
    best = checkpoint.load_state(checkpoint.latest_state(folder))["best"]
    stays = variant is BEST and "the best stays" in run["out"][0]
    assert snapshot["info"]["nimg"] == (500 if stays else 1500) and best["name"] == "network-snapshot-000000.pkl"

    # Let the first part have taken long: the second one adds its own time.
    lines = (folder / "stats.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    last["Timing/total_sec"]["mean"] = 5000.0
    (folder / "stats.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    again = ask(tmp_path, *options, "--resume=latest")
    assert again["codes"] == [0] and "1h 23m" in again["out"][0], again
    ticks = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert [tick["Progress/kimg"]["mean"] for tick in ticks] == [0.5, 1, 1.5, 2, 3]
    assert all(5000 < tick["Timing/total_sec"]["mean"] < 5100 for tick in ticks[3:]) and last_seconds(folder) > 5000
    assert_same(ended_with(folder)["objective"], undisturbed(1, variant)[0]["objective"])


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_process_that_dies_is_named_by_one_of_the_others(ask, undisturbed, tmp_path, ranks):
    batch = [] if ranks == 2 else ["--batch=600"]
    run = ask(tmp_path, *batch, ranks=ranks, hook=dict(signal=signal.SIGKILL, at=4, rank=1))
    assert run["codes"] == [1, -signal.SIGKILL, 1][:ranks]
    kimg = 2.0 if ranks == 2 else 2.4
    # A third process may have stopped by then, too.
    ended = rf" ended at {kimg} kimg, so the other processes stop"
    named = r"Error: process 1 \(id \d+\)( and process 2 \(id \d+\))?" + ended
    assert re.fullmatch(named, errors(run)[0])
    # A third process may notice it only after the first one has stopped too. Then it names both.
    late = re.compile(r"Error: process 0 \(id \d+\) and process 1 \(id \d+\) ended at .*")
    assert errors(run)[1] == "" and all(e == "" or late.fullmatch(e) for e in errors(run)[2:])
    if ranks == 2:
        assert_continues(ask, tmp_path, undisturbed(2, PLAIN)[0])


def test_a_process_that_fails_alone_says_so_and_leaves_no_handlers(ask, tmp_path):
    run = ask(tmp_path / "a", ranks=2, hook=dict(error="OSError", at=1, rank=1))
    assert run["codes"] == [1, 1]
    assert errors(run)[1] == "Error: process 1, at 0.5 kimg: digits.zip: Input/output error"
    assert "process 1" in errors(run)[0] and errors(run)[0].count("\n") == 0
    run = ask(tmp_path / "b", hook=dict(error="OSError", at=1))
    assert run["codes"] == [1] and errors(run) == ["Error: digits.zip: Input/output error"]
    run = ask(tmp_path / "c", ranks=2, hook=dict(error="ArithmeticError", at=1, rank=1))
    assert run["codes"] == [1, 70] and "ArithmeticError" in run["err"][1] and "left behind" not in run["err"][1]
    assert re.match(r"Error: process 1 \(id \d+\) ended at 0.5 kimg", run["err"][0])


def test_a_save_that_cannot_fit_is_not_begun(ask, undisturbed, tmp_path):
    run = ask(tmp_path, ranks=2, hook=dict(free=1000, at=3, rank=0))
    assert run["codes"] == [1, 1] and run["promised"] == [1000] and errors(run)[1] == ""
    assert re.match(
        r"Error: \S+network-snapshot-000002.pkl: needs 0.0 MiB and 0.0 MiB are free, so it was not begun; "
        "training-state-000001.pt is saved. To continue",
        errors(run)[0],
    )
    assert_continues(ask, tmp_path, undisturbed(2, PLAIN)[0])


def test_a_finished_run_without_states_is_not_overwritten(ask, tmp_path):
    assert ask(tmp_path, "--nosubdir", duration=0.001)["codes"] == [0]
    checkpoint.states(tmp_path)[0].unlink()
    again = ask(tmp_path, "--nosubdir", "--resume=latest", duration=0.001)
    assert again["codes"] == [1] and "already holds a run" in errors(again)[0]
    again = ask(tmp_path, "--nosubdir", "--resume=latest")  # a run that did not finish starts again
    assert again["codes"] == [0], again


def test_loss_scaling_is_undone_on_two_processes(ask, undisturbed, tmp_path):
    run = ask(tmp_path, "--ls=128", ranks=2)  # a power of two, so the scaling is exact
    assert run["codes"] == [0, 0], run
    assert_same(ended_with(newest_run(tmp_path, PLAIN))["objective"], undisturbed(2, PLAIN)[0]["objective"])


# After each restart but the last, one rank of train.py kills itself. `kills` lists (rank, step) in order of restarts.
ELASTIC = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
from training.objectives.dsm import DSM
kills = {kills!r}
step = DSM.step
def dying(self, images, labels, nimg, *rest):
    life = int(os.environ['TORCHELASTIC_RESTART_COUNT'])
    if kills[life:] and kills[life] == (int(os.environ['RANK']), nimg // 32):
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, images, labels, nimg, *rest)
DSM.step = dying
train.main()
"""


@pytest.mark.long
def test_elastic_restarts_end_with_the_weights_of_an_undisturbed_run(tmp_path):
    data = make_archive(tmp_path / "d.zip", pictures(64, channels=1))
    ends = {}
    for name, kills in dict(undisturbed=[], killed=[(1, 5), (0, 8), (1, 13)]).items():
        (tmp_path / f"{name}.py").write_text(ELASTIC.format(root=str(ROOT), kills=kills))
        run = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node=2",
                "--max-restarts=3",
                tmp_path / f"{name}.py",
                f"--data={data}",
                f"--outdir={tmp_path / name}",
                "--duration=0.00048",
                *TINY,
                "--resume=latest",
            ],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert run.returncode == 0, run.stderr
        log = (newest_run(tmp_path / name, PLAIN) / "log.txt").read_text()
        assert len(list((tmp_path / name).iterdir())) == 1 and log.count("Resuming at") == len(kills)
        for rank, step in kills:
            # We report it, or torchrun does when it stops the others before they notice.
            ours = rf"Error: process {rank} \(id \d+\) ended at {step * 32 / 1000:.1f} kimg"
            assert re.search(rf"{ours}|failed \(exitcode: -9\) local_rank: {rank}", run.stderr)
        ends[name] = ended_with(newest_run(tmp_path / name, PLAIN))
    assert_same(ends["killed"], ends["undisturbed"])
