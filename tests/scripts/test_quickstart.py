"""The quickstart as a whole, trainings of a few steps: all scripts run, the report is complete, a rerun goes on."""

import base64
import json
import re

import pytest
from click.testing import CliRunner

import quickstart
from recipes import photos
from reports.page import Report, Section


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    outdir = tmp_path_factory.mktemp("quickstart") / "demo"
    result = CliRunner().invoke(quickstart.main, [f"--outdir={outdir}", "--minutes=0.01", "--seed=1", "--num=20"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return outdir, result.output


def test_report_is_complete(demo):
    outdir, output = demo
    assert re.search(r"\[1/18\].* left", output) and "Report: " in output
    html, markdown = (outdir / "report.html").read_text(), (outdir / "report.md").read_text()
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert len(rows) == 6 and "baseline" in rows[1] and "TDSM" in rows[2] and rows[2] in output
    assert [row.split("|")[1].strip() for row in rows[3:]] == [
        "SBDC, constant weight",
        "SBDC, calibrated weight",
        "SBDC on top of TDSM",
    ]
    assert "n/a" not in rows[1] + rows[2]
    table = json.loads((outdir / "tables" / "tdsm.json").read_text())
    assert f"{table['metrics']['label_accuracy']:.3f}" in rows[2] and all(
        c["num_images"] == 2 for c in table["classes"].values()
    )
    inlined = re.findall(r"data:image/png;base64,([^']+)'", html)
    assert len(inlined) >= 9 and all(base64.b64decode(data).startswith(b"\x89PNG") for data in inlined)
    assert "http" not in html  # self-contained
    for picture in re.findall(r"\]\((.*?\.png)\)", markdown):
        assert (outdir / picture).read_bytes() in map(base64.b64decode, inlined)
    for script in set(quickstart.SCRIPTS) - {"train_rduot.py"}:
        assert f"python {script} " in html and f"python {script} " in markdown


def test_second_call_goes_on_where_the_first_stopped(demo):
    outdir, _ = demo
    (outdir / "report.html").unlink()
    journal = json.loads((outdir / "quickstart.json").read_text())
    assert [*journal["seconds"]] == [s["name"] for s in journal["steps"]]
    del journal["seconds"]["tdsm-table"]
    (outdir / "quickstart.json").write_text(json.dumps(journal))
    result = CliRunner().invoke(quickstart.main, [f"--outdir={outdir}", "--minutes=0.01", "--seed=1", "--num=20"])
    assert result.exit_code == 0 and re.findall(r"\[(\d+)/18\]", result.output) == ["11"]
    assert (outdir / "report.html").exists()


def test_other_options_and_strange_folders_are_refused(demo, tmp_path):
    outdir, _ = demo
    (tmp_path / "mine.txt").write_text("keep me")
    for folder, words in ((outdir, "other options"), (tmp_path, "files that are not of a quickstart")):
        result = CliRunner().invoke(quickstart.main, [f"--outdir={folder}", "--seed=2"])
        assert result.exit_code == 1 and result.stderr.startswith("Error: --outdir") and words in result.stderr


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
    assert len(re.findall(r"data:image/png;base64,", html)) == len(re.findall(r"\]\(.*?\.png\)", markdown)) == 12
    assert "python train.py " not in markdown
