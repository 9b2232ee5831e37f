"""Plans whose steps run side by side, in processes of their own."""

import importlib
import json
import os
import re
import signal
import sys
import threading
import time

import pytest

from dnnlib import UserError
from recipes import steps

WORKER = """
import pathlib, signal, sys, time

if __name__ == "__main__":
    name, wait, *_ = (word.partition("=")[2] for word in sys.argv[1:])
    order, end = pathlib.Path(__file__).with_name("order.txt"), time.time() + 60
    with open(order, "a") as f:

        def stop(*_):
            print(name, "saves", file=f, flush=True)
            if wait == "deaf":
                time.sleep(60)
            sys.exit(143)

        signal.signal(signal.SIGTERM, stop)
        print(name, "begins", file=f, flush=True)
        if wait == "fail":
            sys.exit("Error: no such thing")
        if wait == "others":  # time for them to begin, if they do not wait
            time.sleep(0.5)
        while wait != "others" and wait not in order.read_text() and time.time() < end:
            time.sleep(0.02)
        print(name, "ends", file=f)
"""


@pytest.fixture
def side_by_side(tmp_path, monkeypatch):
    """Return a function that runs steps, name -> (what they wait for, options), two at a time, and what they noted."""
    (tmp_path / "worker_of_a_plan.py").write_text(WORKER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(steps, "POLL", 0.01)
    scripts = {"a.py": importlib.import_module("worker_of_a_plan")}

    def run(**plan):
        plan = [
            steps.Step(name, name, 60, f"a.py --name={name} --wait='{wait}' {rest}")
            for name, (wait, rest) in plan.items()
        ]
        return steps.run_plan(plan, scripts, str(tmp_path / "demo"), dict(rows=["a"]), jobs=2)

    yield run, tmp_path / "order.txt"
    sys.modules.pop("worker_of_a_plan", None)


def test_steps_run_side_by_side_unless_one_reads_what_another_writes(side_by_side):
    run, order = side_by_side
    found = run(
        data=("others", "--dest=x/data.zip"),
        one=("two begins", "--data=x/data.zip --outdir=x/a"),
        two=("one begins", "--data=x/data.zip --outdir=x/b"),
        table=("", "--network=x/a --images=x/b"),
    )
    lines = order.read_text().splitlines()
    assert set(found) == {"data", "one", "two", "table"} and all(seconds > 0 for seconds in found.values())
    assert lines[:2] == ["data begins", "data ends"] and lines[-2:] == ["table begins", "table ends"]
    assert {*lines[2:4]} == {"one begins", "two begins"}
    assert run(data=("others", "--dest=x/data.zip"), last=("", "")).keys() == {*found, "last"}
    assert order.read_text().splitlines()[len(lines) :] == ["last begins", "last ends"]


def test_a_step_that_fails_stops_the_others(side_by_side, tmp_path):
    run, order = side_by_side
    with pytest.raises(UserError, match=r"bad ended with code 1: Error: no such thing \(.*logs/bad.txt\)"):
        run(bad=("fail", ""), long=("never", ""), last=("", ""))
    assert "last begins" not in order.read_text()
    journal = json.loads((tmp_path / "demo/quickstart.json").read_text())
    assert journal["interrupted"].keys() in ({"bad", "long"}, {"bad"}) and not journal["seconds"]


@pytest.mark.parametrize("a", ["never", "deaf"])
def test_at_a_signal_the_steps_save_their_work_and_at_a_second_one_they_die(side_by_side, tmp_path, capsys, a):
    run, order = side_by_side

    def ask():
        for words, times in (("begins", 2), ("a saves", 1 if a == "deaf" else 0)):
            while times and (not order.exists() or order.read_text().count(words) < times):
                time.sleep(0.02)
            if times:
                os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(SystemExit):
        run(a=(a, ""), b=("never", ""))
    assert time.monotonic() - start < 50  # less than it is deaf
    assert {"a saves", "b saves"} <= {*order.read_text().splitlines()}
    assert "The same command goes on from here." in capsys.readouterr().out
    journal = json.loads((tmp_path / "demo/quickstart.json").read_text())
    assert not journal["seconds"] and journal["interrupted"].keys() == {"a", "b"}


def test_while_a_step_outlives_a_killed_call_a_second_call_refuses(side_by_side, tmp_path):
    run, order = side_by_side
    plan = dict(a=("go", ""), b=("go", ""))
    call = os.fork()
    if not call:
        try:
            run(**plan)
        finally:
            os._exit(1)
    while not order.exists() or order.read_text().count("begins") < 2:
        time.sleep(0.02)
    os.kill(call, signal.SIGKILL)
    os.waitpid(call, 0)
    with pytest.raises(UserError, match="demo: a call or one of its steps is still running here"):
        run(**plan)
    with open(order, "a") as f:
        print("go", file=f)
    found, until = None, time.monotonic() + 50
    while found is None:
        try:
            found = run(**plan)
        except UserError:  # they write that they end a moment before they do
            assert time.monotonic() < until
            time.sleep(0.02)
    assert found.keys() == {"a", "b"} and order.read_text().count("begins") == 4


def test_the_lock_of_a_call_that_was_killed_at_once_is_no_file_of_others(tmp_path):
    (tmp_path / steps.LOCK).touch()
    assert steps.run_plan([], {}, str(tmp_path)) == {}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine").touch()
    with pytest.raises(UserError, match="not of such a run"):
        steps.run_plan([], {}, str(tmp_path / "other"))
    assert os.listdir(tmp_path / "other") == ["mine"]


def test_cores_are_shared_unless_the_user_says_how_many_threads(tmp_path, monkeypatch):
    seen = []

    class Gone:
        returncode = 0
        poll = wait = terminate = staticmethod(lambda: 0)

    monkeypatch.setattr(steps.subprocess, "Popen", lambda words, env, **_: seen.append(env["OMP_NUM_THREADS"]) or Gone)
    monkeypatch.setattr(steps, "usable_cores", lambda: 8)
    plan = [steps.Step("a", "a", 1, "a.py")]
    for i, given in enumerate((None, "8", "3")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        steps.run_plan(plan, {"a.py": sys.modules[__name__]}, str(tmp_path / str(i)), jobs=2)
    assert seen == ["4", "4", "3"]


@pytest.mark.parametrize(
    "step, other, reads",
    [
        ("--data=x/a.zip", "--dest=x/a.zip", True),
        ("--network=x/oracle", "--outdir=x/oracle", True),
        ("--network=x/oracle/network-snapshot-000001.pkl", "--outdir=x/oracle", True),
        ("--network=x/oracle-long --outdir=x/b", "--outdir=x/oracle", False),
        ("--discriminator=x/labels-classifier.pkl", "--dest=x/labels.npz", True),
        ("--data=x/a.zip --outdir=x/c", "--data=x/a.zip --outdir=x/b", False),
        ("--features=x/f.npz", "--features=x/f.npz", True),
    ],
)
def test_what_a_step_waits_for(step, other, reads):
    steps_of = [steps.Step(name, name, 1, f"a.py {options}") for name, options in (("a", step), ("b", other))]
    assert steps._reads(*steps_of) == reads


def test_the_time_left_follows_from_what_is_done(tmp_path, monkeypatch, capsys):
    clock = [0.0]

    class Script:
        @staticmethod
        def main(args, standalone_mode):
            clock[0] += 40

    monkeypatch.setattr(steps.time, "time", lambda: clock[0])
    plan = [steps.Step(name, name, seconds, f"a.py {name}") for name, seconds in (("a", 100), ("b", 50), ("c", 60))]
    steps.run_plan(plan[:1], {"a.py": Script}, str(tmp_path / "demo"), dict(rows=["a"]))
    assert "about 1m 40s left" in capsys.readouterr().out  # nothing is known but the plan
    steps.run_plan(plan, {"a.py": Script}, str(tmp_path / "demo"), dict(rows=["a"]))
    output = capsys.readouterr().out
    assert re.findall("about (.*) left", output) == ["44s", "32s"]  # 0.4 of 110, then 80 / 150 of 60
