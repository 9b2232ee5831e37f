"""The quickstart as a whole, trainings of a few steps: all scripts run, the report is complete, a rerun goes on."""

import base64
import dataclasses
import itertools
import json
import re

import pytest
from click.testing import CliRunner

import quickstart
from dnnlib import UserError
from recipes import digits, photos, steps
from reports.page import Report, Section

# Fewer steps of the sampler, fewer draws, fewer weights. The figures are not looked at here.
SHORT = {
    "--class=0-9 ": "--class=0-9 --steps=3 ",
    "--bootstrap=200": "--bootstrap=20",
    "--weights=0.5,1,2,3": "--weights=1,2 --steps=3",
}


@pytest.fixture(scope="module", autouse=True)
def short_commands():
    plan = digits.plan

    def short(*args):
        found = plan(*args)
        for old, new in SHORT.items():
            found = [dataclasses.replace(step, command=step.command.replace(old, new)) for step in found]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "plan", short)
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    outdir = tmp_path_factory.mktemp("quickstart") / "my demo"
    result = CliRunner().invoke(quickstart.main, [f"--outdir={outdir}", "--minutes=0.01", "--seed=1", "--num=20"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return outdir, result.output


def test_report_is_complete(demo):
    outdir, output = demo
    assert re.search(r"\[1/37\].* left", output) and "Report: " in output
    html, markdown = (outdir / "report.html").read_text(), (outdir / "report.md").read_text()
    (finding,) = re.findall("<p class=.finding.>(.*?)</p>", html)
    assert re.search("oracle|No method helped", finding) and markdown.splitlines()[2] in output
    table = list(itertools.takewhile(bool, markdown[markdown.index("| method") :].splitlines()))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]
    assert [row[0] for row in rows] == [
        "oracle",
        "baseline",
        *("drop", "relabel", "posterior", "null"),
        "TDSM",
        "SBDC constant",
        "SBDC calibrated",
        "SBDC by rejection",
        "rejection by the detector",
        "TDSM + SBDC",
    ]
    assert all("n/a" not in row for row in rows) and "\n".join(table) in output
    tdsm = json.loads((outdir / "tables" / "tdsm.json").read_text())
    assert rows[6][1].startswith(f"{tdsm['metrics']['label_accuracy']:.3f}")
    assert len(tdsm["judged"]) == 20 and all(c["num_images"] == 2 for c in tdsm["classes"].values())
    inlined = re.findall(r"data:image/png;base64,([^']+)'", html)
    assert len(inlined) >= 11 and all(base64.b64decode(data).startswith(b"\x89PNG") for data in inlined)
    assert "http" not in html  # self-contained
    linked = re.findall(r"\]\((.*?\.png)\)", markdown)
    assert len(linked) == len(inlined)
    for picture in linked:
        assert (outdir / picture).read_bytes() in map(base64.b64decode, inlined)
    for script in set(quickstart.SCRIPTS) - {"train_rduot.py"}:
        assert f"python {script} " in html and f"python {script} " in markdown


@pytest.mark.parametrize(("jobs", "missing"), [(1, ["tdsm-images", "tdsm-table"]), (2, ["tdsm-table"])])
def test_second_call_goes_on_where_the_first_stopped(demo, jobs, missing, monkeypatch):
    outdir, _ = demo
    monkeypatch.setattr(steps, "_side_by_side" if jobs == 1 else "_one_by_one", None)
    (outdir / "report.html").unlink()
    journal = json.loads((outdir / "quickstart.json").read_text())
    assert sorted(journal["seconds"]) == sorted(s["name"] for s in journal["steps"])
    for name in missing:  # the images are there, but nobody has written down that they are done
        del journal["seconds"][name]
    (outdir / "quickstart.json").write_text(json.dumps(journal))
    options = ["--minutes=0.01", "--seed=1", "--num=20", f"--jobs={jobs}"]
    result = CliRunner().invoke(quickstart.main, [f"--outdir={outdir}", *options])
    assert result.exit_code == 0 and re.findall(r"\[(\d+)/37\]", result.output) == ["25", "26"][-len(missing) :]
    assert (outdir / "report.html").exists()


def test_other_options_and_strange_folders_are_refused(demo, tmp_path):
    outdir, _ = demo
    (tmp_path / "mine.txt").write_text("keep me")
    for folder, words in ((outdir, "other options"), (tmp_path, "files that are not of such a run")):
        result = CliRunner().invoke(quickstart.main, [f"--outdir={folder}", "--seed=2"])
        assert result.exit_code == 1 and result.stderr.startswith("Error: --outdir") and words in result.stderr
    result = CliRunner().invoke(quickstart.main, [f"--outdir={tmp_path}/new", "--only=rduot", "--noise_type=asym"])
    assert result.exit_code == 2 and "--noise_type: --only=rduot trains without labels" in result.stderr


@pytest.mark.parametrize("minutes, seconds", [(15, 1800), (40, 4800), (0.2, 538 + 2.4)])
def test_the_trainings_take_what_the_images_and_tables_leave(minutes, seconds, tmp_path, monkeypatch):
    """Two steps run at a time."""
    planned = []

    def stop(steps, *_, **__):
        planned.extend(steps)
        raise SystemExit

    monkeypatch.setattr(quickstart, "run_plan", stop)
    CliRunner().invoke(quickstart.main, [f"--outdir={tmp_path}/demo", f"--minutes={minutes}"])
    assert sum(step.seconds for step in planned) == pytest.approx(seconds, rel=0.01)
    train = next(step.command for step in planned if step.name == "oracle")
    kimg = 1000 * float(re.search(r"--duration=(\S+)", train)[1])
    assert kimg == pytest.approx(150 * next(step.seconds for step in planned if step.name == "oracle") / 258, rel=0.01)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(130), ValueError("a bug")])
def test_an_interrupted_step_says_how_to_go_on_and_its_time_adds_up(tmp_path, monkeypatch, capsys, error):
    clock, errors = [0.0], [error]

    class Script:
        @staticmethod
        def main(args, standalone_mode):
            clock[0] += 40
            if errors:
                raise errors.pop()

    monkeypatch.setattr(steps.time, "time", lambda: clock[0])
    plan = [steps.Step("train", "train", 60, "a.py --x=1"), steps.Step("table", "evaluate", 2, "a.py --x=2")]
    with pytest.raises(type(error)):
        steps.run_plan(plan, {"a.py": Script}, str(tmp_path / "demo"))
    said = "Stopped. The same command goes on from here." in capsys.readouterr().out
    assert said == (not isinstance(error, ValueError))
    assert steps.run_plan(plan, {"a.py": Script}, str(tmp_path / "demo")) == {"train": 80, "table": 40}
    assert "interrupted" not in json.loads((tmp_path / "demo/quickstart.json").read_text())


def test_a_moved_or_respelled_folder_goes_on(tmp_path, monkeypatch):
    ran = []

    class Script:
        main = staticmethod(lambda args, standalone_mode: ran.append(args))

    def run(outdir, option=1):
        plan = [steps.Step("train", "train", 60, f"a.py --outdir={outdir}/train --x={option}")]
        steps.run_plan(plan, {"a.py": Script}, str(outdir))

    monkeypatch.chdir(tmp_path)
    run("demo")
    run("./demo")
    run(tmp_path / "demo")
    (tmp_path / "demo").rename(tmp_path / "moved")
    run("moved")
    assert ran == [["--outdir=demo/train", "--x=1"]]
    with pytest.raises(UserError, match="moved holds a run with other options"):
        run("moved", option=2)
    (tmp_path / "moved/quickstart.json").write_text('{"steps": 3}')
    with pytest.raises(UserError, match="other options"):
        run("moved")


def test_a_plan_may_grow(tmp_path):
    ran, out = [], str(tmp_path / "demo")

    class Script:
        main = staticmethod(lambda args, standalone_mode: ran.append(args[0]))

    def run(*names, option="", **about):
        plan = [steps.Step(name, f"{name} {len(ran)}", 60 + len(ran), f"a.py {name}{option}") for name in names]
        steps.run_plan(plan, {"a.py": Script}, out, about)

    run("data", "train", "table", rows=["b"], seed=0)
    run("data", "other", "train", rows=["a", "b"], seed=0)
    run("other", rows=["a"], seed=0)
    assert ran == ["data", "train", "table", "other"]
    journal = steps.read_journal(out)
    assert journal["about"] == dict(rows=["b", "a"], seed=0)
    assert [step["name"] for step in journal["steps"]] == ["data", "train", "table", "other"] == [*journal["seconds"]]
    for name, changes in (("new", dict(seed=1)), ("new", dict(rows=3)), ("train", dict(option=" --x=2")), ("new", {})):
        with pytest.raises(UserError, match="other options"):
            run(name, **(dict(rows=["a"], seed=0) | changes) if changes else {})
    path = tmp_path / "demo/quickstart.json"
    for damaged in ('{"steps": 3}', '{"steps": [], "seconds": {}, "about": 3}', "[]"):
        path.write_text(damaged)
        with pytest.raises(UserError, match="other options"):
            run("data", rows=["a"], seed=0)


def test_a_quickstart_killed_in_its_first_step_goes_on(tmp_path):
    """Its folder holds a log by then."""
    plan = [steps.Step("train", "train", 60, "a.py")]

    class Killed:
        @staticmethod
        def main(args, standalone_mode):
            assert (tmp_path / "demo/logs").exists()
            journal = (tmp_path / "demo/quickstart.json").read_text()
            raise RuntimeError(journal)

    with pytest.raises(RuntimeError, match='"seconds": {}'):
        steps.run_plan(plan, {"a.py": Killed}, str(tmp_path / "demo"))


def test_a_killed_training_counts_the_time_that_it_logged(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/stats.jsonl").write_text('{"Progress/kimg": {"mean": 1}, "Timing/total_sec": {"mean": 70.0}}\n')
    row = steps.Row("a", "A", ["train", "detect"], "")
    seconds = {"train": 20.0, "detect": 5.0, "a-images": 1.0}
    assert steps.finished(str(tmp_path), [row], seconds)[0].training_seconds == 75


def test_report_escapes_what_it_shows(tmp_path):
    html, _ = Report([Section("<b>t</b>", "q & a", ["m"], [["<script>"]])]).write(str(tmp_path))
    text = open(html).read()
    assert "<script>" not in text and "&lt;script&gt;" in text and "q &amp; a" in text


@pytest.mark.long
def test_outliers_have_their_own_sections(tmp_path, monkeypatch):
    setup = photos.SETUPS[0]
    monkeypatch.setattr(setup, "source", setup.source.replace("--max-images=16000", "--max-images=1000"))
    outdir = tmp_path / "demo"
    result = CliRunner().invoke(quickstart.main, [f"--outdir={outdir}", "--only=rduot", "--minutes=0.01", "--num=20"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    html, markdown = (outdir / "report.html").read_text(), (outdir / "report.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if len(row) == len(rows[0])]  # the others are pictures
    assert [row[0] for row in rows] == [
        "method",
        "DDGAN",
        "RDUOT, cost pixels",
        "RDUOT, cost robust",
        "method",
        "DDGAN",
        "RDUOT, cost pixels",
        "RDUOT, cost standardized",
        "RDUOT, cost features",
        "RDUOT, cost robust",
    ]
    own = rows[0].index("outliers in training")
    assert rows[1][own] == rows[3][own] == "0.100" and rows[5][own] == f"{180 / 1797:.3f}"
    for i, name in ((3, "photos-rduot-robust"), (6, "digits-rduot-pixels"), (9, "digits-rduot-robust")):
        metrics = json.loads((outdir / "tables" / f"{name}.json").read_text())["metrics"]
        assert rows[i][1] == f"{metrics['outlier_ratio']:.3f}" and rows[i][2].startswith(f"{metrics['fid']:.3f}")
    # Only digits by the paper's cost have outliers that are cheap.
    assert re.findall(r"^\* (.*): Warning: the outliers cost less", markdown, re.M) == ["RDUOT, cost pixels"]
    assert len(re.findall(r"data:image/png;base64,", html)) == len(re.findall(r"\]\(.*?\.png\)", markdown)) == 10 + 8
    assert "python train.py " not in markdown
