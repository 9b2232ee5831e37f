"""Test `python -m benchmarks.gpu`: on the CPU at a tiny size, and with lines that fail, hang and end their process."""

import json
import os
import time

import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu, gpu_correct
from benchmarks.core import FormProcess, Row
from benchmarks.gpu_lines import Line, Skip, Wrong, lines_of, perform
from benchmarks.gpu_speed import FORMS, _layers
from training.networks import GroupNorm

MACHINE = dict(
    processor="p", cpus=1, threads=1, load=0.0, torch="2", date="2026-01-01", peak_flops={"fp32": 1e9}, bandwidth=1e9
)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["correct", pytest.param("speed", marks=pytest.mark.long)])
def test_a_part_runs_to_its_end(tmp_path, part):
    result = CliRunner().invoke(gpu.main, ["--tiny", f"--part={part}", f"--out={tmp_path}/new/out"])
    lines = json.loads((tmp_path / "new/out.json").read_text())["lines"]
    assert [line["name"] for line in lines] == [line.name for line in lines_of(part, True)]
    assert [line for line in lines if line["status"] == "FAIL"] == [] and result.exit_code == 0, result.output
    # On a CPU without compilation these do not apply.
    skipped = {line["name"] for line in lines if line["status"] == "SKIP"}
    assert all("fp16" in name or "compiled" in name or "suite" in name for name in skipped)
    rows = [line["row"] for line in lines if line["row"]]
    assert all(row["images_per_second"] > 0 and row["reached"] > 0 for row in rows)
    assert len(rows) >= (19 if part == "speed" else 0)
    assert all(f"| {line['name']} | {line['status']} |" in (tmp_path / "new/out.md").read_text() for line in lines)


def test_without_the_tests_their_lines_are_skipped_and_say_why(monkeypatch, tmp_path):
    """A Docker image holds the benchmarks, but no tests."""
    monkeypatch.setattr(gpu_correct, "FIXTURES", str(tmp_path / "fixtures"))
    lines = {line.name: line for line in lines_of("correct", True)}
    assert "published metrics" not in lines
    for name in ("published numbers", "tests of the suite"):
        result = perform(lines[name])
        assert result["status"] == "SKIP" and f"{tmp_path}/fixtures" in result["detail"]


def wrong():
    raise Wrong("distance 1, at most 0.1 allowed")


def skip():
    raise Skip("float16 needs CUDA")


@pytest.mark.parametrize(
    "work, status, detail",
    [
        (lambda: "distance 0", "PASS", "distance 0"),
        (wrong, "FAIL", "distance 1, at most 0.1 allowed"),
        (skip, "SKIP", "float16 needs CUDA"),
        (lambda: 1 / 0, "FAIL", "ZeroDivisionError: division by zero"),
    ],
)
def test_result_of_a_line(work, status, detail):
    result = perform(Line("x", work, 1))
    assert (result["name"], result["status"], result["detail"]) == ("x", status, detail)


class Process(FormProcess):
    """A process whose lines do what their number says: 1 ends it, 2 takes too long, the others pass."""

    started = []

    def __init__(self, module, arguments):
        self.number, self.facts, self.killed = arguments["first"], MACHINE, False
        self.started.append(self.number)

    def __call__(self):
        number, self.number = self.number, self.number + 1
        if number == 1:
            raise gpu.dnnlib.UserError("benchmarks.gpu_process {} ended with code -11: Segmentation fault")
        while number == 2 and not self.killed:
            time.sleep(0.01)
        if self.killed:
            raise gpu.dnnlib.UserError("benchmarks.gpu_process {} ended with code -9: it did not say why")
        return dict(name=str(number), status="PASS", detail="", seconds=0.0, row=None)

    def kill(self):
        self.killed = True

    def close(self):
        pass


def test_a_line_that_fails_stops_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "FormProcess", Process)
    Process.started.clear()
    report = gpu.Report(str(tmp_path / "out"))
    gpu.run_part("correct", True, report, [Line(str(i), None, 0.2) for i in range(4)])
    assert [line["status"] for line in report.lines] == ["PASS", "FAIL", "FAIL", "PASS"]
    assert report.lines[1]["detail"] == "ended with code -11: Segmentation fault"
    assert report.lines[2]["detail"] == "took longer than 0 seconds"
    assert Process.started == [0, 2, 3]
    assert json.loads((tmp_path / "out.json").read_text())["lines"] == report.lines
    gpu.run_part("speed", True, report, [Line("late", None, 1)], minutes=0)
    assert report.lines[-1]["status"] == "SKIP"


def test_a_failed_line_gives_exit_code_1(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "FormProcess", Process)
    monkeypatch.setattr(gpu, "lines_of", lambda part, tiny: [Line(str(i), None, 5) for i in range(2)])
    result = CliRunner().invoke(gpu.main, ["--tiny", "--part=correct", f"--out={tmp_path}/out"])
    assert result.exit_code == 1 and "1 PASS, 1 FAIL, 0 SKIP" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without CUDA")
def test_without_cuda_it_offers_a_tiny_run():
    result = CliRunner().invoke(gpu.main, [])
    assert result.exit_code == 1 and "no CUDA device; --tiny" in result.output


@pytest.mark.parametrize("form", [form for form in FORMS if form.norm], ids=lambda form: form.name)
def test_forms_of_group_norm_compute_the_same(form):
    norm, x = GroupNorm(16), torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last)
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
        wanted = norm(x)
        with _layers(form.norm):
            assert torch.allclose(norm(x), wanted, atol=1e-5)
            assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_rows_keep_what_the_table_needs():
    result = perform(Line("x", lambda: Row("x", 1.0, images=4), 1))
    assert result["row"].images == 4 and os.path.basename(gpu.Report("a/b").start) == "b"
