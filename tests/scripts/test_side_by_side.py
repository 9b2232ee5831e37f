"""Plans whose steps run side by side, in processes of their own."""

import importlib
import json
import os
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
    order = pathlib.Path(__file__).with_name("order.txt")
    with open(order, "a") as f:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(print(name, "saves", file=f, flush=True)))
        print(name, "begins", file=f, flush=True)
        if wait == "fail":
            sys.exit("Error: no such thing")
        if wait == "others":  # time for them to begin, if they do not wait
            time.sleep(0.5)
        while wait != "others" and wait not in order.read_text():
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
        return steps.run_plan(plan, scripts, str(tmp_path / "demo"), 1, dict(rows=["a"]), jobs=2)

    yield run, tmp_path / "order.txt"
    sys.modules.pop("worker_of_a_plan", None)


def test_steps_run_side_by_side_unless_one_reads_what_another_writes(side_by_side):
    run, order = side_by_side
    found = run(
        data=("others", "--dest=x/data.zip"),
        a=("b begins", "--data=x/data.zip --outdir=x/a"),
        b=("a begins", "--data=x/data.zip --outdir=x/b"),
        table=("", "--network=x/a --images=x/b"),
    )
    lines = order.read_text().splitlines()
    assert set(found) == {"data", "a", "b", "table"} and all(seconds > 0 for seconds in found.values())
    assert lines[:2] == ["data begins", "data ends"] and lines[-2:] == ["table begins", "table ends"]
    assert {*lines[2:4]} == {"a begins", "b begins"}
    assert run(data=("others", "--dest=x/data.zip"), last=("", "")).keys() == {*found, "last"}
    assert order.read_text().splitlines()[len(lines) :] == ["last begins", "last ends"]


def test_a_step_that_fails_stops_the_others(side_by_side, tmp_path):
    run, order = side_by_side
    with pytest.raises(UserError, match=r"bad ended with code 1: Error: no such thing \(.*logs/bad.txt\)"):
        run(bad=("fail", ""), long=("never", ""), last=("", ""))
    assert "last begins" not in order.read_text()
    assert {"bad", "long"} >= json.loads((tmp_path / "demo/quickstart.json").read_text())["interrupted"].keys()


def test_at_a_signal_the_steps_save_their_work(side_by_side, tmp_path, capsys):
    run, order = side_by_side

    def ask():
        while not order.exists() or order.read_text().count("begins") < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    with pytest.raises(SystemExit):
        run(a=("never", ""), b=("never", ""))
    assert {"a saves", "b saves"} <= {*order.read_text().splitlines()}
    assert "The same command goes on from here." in capsys.readouterr().out
    journal = json.loads((tmp_path / "demo/quickstart.json").read_text())
    assert not journal["seconds"] and journal["interrupted"].keys() == {"a", "b"}
