"""The benchmark on Fashion-MNIST: its plan fits together, its commands parse, its tables say what was measured."""

import json
import re

import pytest

import benchmark
from dnnlib import UserError
from recipes import fashion, fashion_tables
from recipes.fashion import LONG_ROWS, ROWS, SETTINGS, SIZES
from tests.support.commands import callers
from tests.support.plans import check_order, options, parse
from tests.support.published import make_idx
from torch_utils.persistence import save_snapshot
from training.networks_resnet import Classifier

succeed, fail = callers(benchmark.main)


@pytest.mark.parametrize("resolution", fashion.SIZES)
def test_every_command_parses(tmp_path, resolution):
    outdir = f"{tmp_path}/a folder"
    parse(fashion.plan(outdir, ["asym40", "instance40"], source=f"{tmp_path}/a source", resolution=resolution))


@pytest.mark.parametrize("judge", [None, "given/judge"])
def test_a_step_reads_only_what_an_earlier_one_has_made(judge):
    check_order(fashion.plan("out", [*SETTINGS], judge=judge), ["given/judge", fashion.SOURCE])


def test_no_row_is_left_out_and_the_most_important_ones_come_first():
    names = [step.name for step in fashion.plan("out", ["sym40", "sym80"])]
    assert len(set(names)) == len(names)
    rows = {fashion.place(key, setting) for key in ROWS for setting in ("sym40", "sym80")}
    assert {name.removesuffix("-table") for name in names if name.endswith("-table")} == rows
    first = [name for name in names if name.endswith("-table")][:9]
    order = ["real-clean", "real-noisy", "oracle", "baseline", "posterior", "cleaned", "drop", "relabel", "tdsm"]
    assert first == [f"{fashion.place(key, 'sym40')}-table" for key in order]
    for key, kind in ROWS.items():  # a row is measured before the next one trains
        if kind.run and kind.run == key:
            name = fashion.place(key, "sym40")
            assert names[names.index(name) :][:3] == [name, f"{name}-images", f"{name}-table"]


def test_rows_train_on_equally_many_images_and_the_long_ones_on_more():
    lengths = {}
    for step in fashion.plan("out", ["sym40"], scale=0.5):
        script, _, given = options(step)
        if script in ("train.py", "train_noise.py"):
            lengths[step.name.removeprefix("sym40-")] = float(given["duration"])
    usual = 0.5 * 0.0375
    assert {lengths.pop(key) for key in LONG_ROWS} == {usual * SIZES[16].long}
    assert set(lengths.values()) == {usual}
    assert set(lengths) == {kind.run for kind in ROWS.values()} - {"", *LONG_ROWS}


def test_only_the_oracle_and_the_judge_see_clean_labels():
    for step in fashion.plan("out", ["instance40"]):
        script, _, given = options(step)
        if script.startswith(("train", "detect")):
            clean = given["data"] == "out/datasets/clean.zip"
            assert clean == (step.name in ("oracle", "oracle-long", "judge")), step.name


def test_instance_noise_has_no_matrix_to_be_told():
    steps = {step.name: options(step)[2] for step in fashion.plan("out", ["asym40", "instance40"], ["tdsm-paper"])}
    told, estimated = steps["asym40-classifier"], steps["instance40-classifier"]
    assert (told["noise_type"], told["noise_rate"]) == ("asym", "0.4")
    assert estimated["noise_type"] == "matrix" and estimated["noise_matrix"] == "out/instance40-detect/labels.npz"
    assert "instance40-detect" in steps and "asym40-detect" not in steps  # none is needed where T is told
    for setting in ("asym40", "instance40"):  # our own row is told nothing
        steps = {step.name: options(step)[2] for step in fashion.plan("out", [setting], ["tdsm"])}
        ours = steps[f"{setting}-teacher"]
        assert ours["noise_type"] == "auto" and ours["label-path"] == f"out/{setting}-detect/labels.npz"
        assert f"{setting}-classifier" not in steps and steps[f"{setting}-tdsm"]["cls"] == f"out/{setting}-teacher"


def test_the_judge_is_the_same_for_all_seeds():
    one, two = ({s.name: s.command for s in fashion.plan("out", ["sym40"], seed=seed)} for seed in (1, 2))
    assert one["judge"] == two["judge"] and one["sym40-noisy"] != two["sym40-noisy"]


CLASSES = [*"0123456789"]


def write_run(folder, values, *, settings=("sym40",), seed=0, num=100, passes=3.0, right=0.91, **about):
    """Write the journal and the tables of a run as `benchmark.py` leaves them: row -> class-wise FD."""
    (folder / "tables").mkdir(parents=True)
    about = dict(recipe=fashion.recipe(16)) | about
    about |= dict(settings=[*settings], rows=[*ROWS], resolution=16, seed=seed, scale=1.0, num=num)
    seconds = {}
    for setting in settings:
        for key, row in fashion.rows(str(folder), setting, [*values]).items():
            table = dict(
                metrics=dict.fromkeys(fashion_tables.METRICS, 0.5) | dict(cw_fid=values[key]),
                intervals=dict(cw_fid=[values[key] - 0.1, values[key] + 0.1]),
                classes={c: dict(name=f"kind {c}", label_accuracy=values[key] / 10, cw_fid=1.0) for c in CLASSES},
                judge=dict(
                    accuracy=right,
                    num=10000,
                    on="test images",
                    classes={c: dict(accuracy=0.9, num=100) for c in CLASSES},
                ),
            )
            (folder / f"tables/{row.name}.json").write_text(json.dumps(table))
            seconds |= {name: 60.0 for name in (*row.training, f"{row.name}-images", f"{row.name}-table")}
            if ROWS[key].run:
                run = folder / fashion.place(ROWS[key].run, setting)
                run.mkdir(exist_ok=True)
                stats = {"Progress/kimg": {"mean": 1}, "Timing/total_sec": {"mean": 1.0}}
                tdsm = {"TDSM/pairs_per_image": {"mean": passes}} if "tdsm" in key else {}
                (run / "stats.jsonl").write_text(json.dumps(stats | tdsm) + "\n")
    (folder / "quickstart.json").write_text(json.dumps(dict(steps=[], seconds=seconds, about=about)))
    return folder


def read_rows(page):
    """Return the cells of each row, of the first table that has it."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    found = {}
    for line in lines:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found.setdefault(name, cells)
    return found


def test_tables_state_value_interval_and_cost(tmp_path):
    values = {"real-clean": 0.3, "oracle": 0.67, "posterior": 0.7, "tdsm-paper": 1.5, "dmis": 2.0, "oracle-long": 0.6}
    values["posterior-long"] = 0.61
    write_run(tmp_path / "a", values)
    succeed(f"--outdir={tmp_path}/page", f"--merge={tmp_path}/a")
    page = tmp_path / "page/report.md"
    rows = read_rows(page)
    assert rows["oracle"][:2] == ["0.670 ± 0.100", "1.00"] and rows["oracle"][9:11] == ["37,500", "1.00"]
    assert rows["posterior"][1] == "1.04" and rows["posterior, longer"][1] == "1.02"  # relative to their oracles
    assert rows["TDSM as published"][10] == "2.00"  # 1, and a third for each of three passes without gradients
    assert rows["DMIS"][10] == "7.67" and rows["oracle, longer"][9] == f"{37_500 * SIZES[16].long:,.0f}"
    assert rows["real images, clean labels"][0] == "0.300 ± 0.100" and rows["real images, clean labels"][9] == ""
    assert rows["posterior"][11] == "2m 00s"  # with the detection
    text = page.read_text()
    assert "\nPosterior came closest to the oracle" in text and "right on 91.0% of the 10,000" in text
    assert "\nPosterior, longer came closest to the oracle" in text
    assert text.index("equal images") < text.index("equal compute")
    assert text.index("equal compute") < text.rindex("| TDSM as published |")
    assert "Commands" not in text and "<h2>Commands" not in (tmp_path / "page/report.html").read_text()  # none ran
    assert "| judge, real images | 0.90 |" in text and "| oracle | 0.07 |" in text
    assert (tmp_path / "page/pictures/sym40-distances.png").exists()


def test_tables_begin_with_real_images_and_the_best_row(tmp_path):
    values = {"oracle": 0.7, "baseline": 30.6, "real-noisy": 9.0, "dmis": 2.0, "tdsm": 1.5, "drop": 0.6}
    folder = write_run(tmp_path / "a", values)
    table = folder / "tables/sym40-dmis.json"
    found = json.loads(table.read_text())
    table.write_text(json.dumps(found | dict(metrics=found["metrics"] | dict(cw_fid=None), intervals={})))
    section, *_ = fashion_tables.sections(fashion_tables.load(str(folder)))
    order = ["real images, noisy labels", "drop", "oracle", "TDSM", "baseline", "DMIS"]
    assert [cells[0] for cells in section.rows] == order


def test_an_unfinished_run_has_the_rows_that_are_measured(tmp_path):
    folder = write_run(tmp_path / "a", {"oracle": 0.67, "baseline": 30.6})
    journal = json.loads((folder / "quickstart.json").read_text())
    del journal["seconds"]["sym40-baseline-table"]
    (folder / "quickstart.json").write_text(json.dumps(journal))
    assert [result.row for result in fashion_tables.load(str(folder))] == ["oracle"]


def test_seeds_become_one_row_and_the_oracle_serves_all_settings(tmp_path):
    write_run(tmp_path / "a", {"oracle": 0.6, "drop": 1.0})
    write_run(tmp_path / "b", {"oracle": 0.8}, seed=1)
    write_run(tmp_path / "c", {"drop": 5.0}, settings=["sym80"])
    succeed(f"--outdir={tmp_path}/page", "--merge=" + ",".join(f"{tmp_path}/{name}" for name in "abc"))
    text = (tmp_path / "page/report.md").read_text()
    first, second = re.split("# Fashion-MNIST, symmetric 80%", text)
    # Relative to the oracle of the same seed.
    for text, drop in ((first, "1.000 ± 0.100 | 1.67"), (second, "5.000 ± 0.100 | 8.33")):
        assert "| oracle (2 seeds) | 0.700 (0.600 to 0.800) | 1.00 |" in text and f"| drop | {drop} |" in text


def test_rows_of_several_seeds_compare_by_the_oracle_of_the_same_seed(tmp_path):
    write_run(tmp_path / "a", {"oracle": 2.0, "drop": 1.9, "relabel": 1.8, "baseline": 20.0})
    write_run(tmp_path / "b", {"oracle": 3.0, "relabel": 2.4}, seed=1)  # on average above the one seed of drop
    results = fashion_tables.load(str(tmp_path / "a")) + fashion_tables.load(str(tmp_path / "b"))
    section, *_ = fashion_tables.sections(results)
    order = ["relabel (2 seeds)", "drop", "oracle (2 seeds)", "baseline"]
    assert [cells[0] for cells in section.rows] == order
    assert "its class-wise FD is 1.80, the oracle's 2.00" in section.finding and "10.0 times" in section.finding
    assert any("the seeds that all rows have" in note for note in section.notes)


def test_results_travel_as_one_file(tmp_path):
    write_run(tmp_path / "a", {"real-clean": 0.3, "oracle": 0.6, "tdsm-paper": 1.5})
    write_run(tmp_path / "b", {"oracle": 0.8, "drop": 1.0}, seed=1)
    succeed(f"--outdir={tmp_path}/page", f"--merge={tmp_path}/a,{tmp_path}/b")
    saved = tmp_path / "page/results.json"
    assert str(tmp_path) not in saved.read_text()
    succeed(f"--outdir={tmp_path}/again", f"--merge={saved}")
    for name in ("report.md", "results.json"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "page" / name).read_text()
    fail(1, f"--outdir={tmp_path}/none", f"--merge={write_text(saved, '[]')}", "--merge|no row is finished")


def write_text(path, text):
    path.write_text(text)
    return path


DAMAGE = [
    ("setting", "sym41"),
    ("row", "none"),
    ("row", "real-clean"),  # which was not trained
    ("outdir", "a"),
    ("images", "many"),
    ("passes", None),
    ("images", 10**400),
    ("sampling_seconds", 10**400),
    ("table.metrics.fid", -(10**400)),
    ("training_seconds", None),
    ("about", {}),
    ("about.seed", [1]),
    ("about.resolution", 64),
    ("about.num", "2"),
    ("table", 3),
    ("table.metrics", {}),
    ("table.metrics.fid", "1"),
    ("table.metrics.cas", float("nan")),
    ("table.intervals", []),
    ("table.intervals.cw_fid", 5),
    ("table.intervals.cw_fid", [1, None]),
    ("table.classes", []),
    ("table.classes.3", {}),
    ("table.judge", {}),
    ("table.judge.accuracy", None),
    ("table.judge.classes", 1),
]


@pytest.mark.parametrize("where, value", DAMAGE, ids=lambda value: str(value)[:20])
def test_damaged_results_are_refused(tmp_path, where, value):
    results = fashion_tables.load(str(write_run(tmp_path / "a", {"oracle": 0.6})))
    fashion_tables.write(f"{tmp_path}/page", results)
    saved = tmp_path / "page/results.json"
    [row] = json.loads(saved.read_text())
    *path, last = where.split(".")
    part = row
    for name in path:
        part = part[name]
    part[last] = value
    saved.write_text(json.dumps([row]))
    fail(1, f"--outdir={tmp_path}/none", f"--merge={saved}", "--merge|results.json")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("text", ["{}", "[{}]", "[1]", "nothing"])
def test_files_that_hold_no_results_are_refused(tmp_path, text):
    fail(
        1, f"--outdir={tmp_path}/out", f"--merge={write_text(tmp_path / 'results.json', text)}", "--merge|results.json"
    )


def test_runs_of_other_recipes_are_refused(tmp_path):
    folder = write_run(tmp_path / "a", {"oracle": 0.6})
    journal = json.loads((folder / "quickstart.json").read_text())
    for about in (None, [], {}, dict(sets=["fashion"], methods=["ddgan"], seed=0), dict(resolution=64)):
        known = journal["about"] | about if about == dict(resolution=64) else about
        (folder / "quickstart.json").write_text(json.dumps(journal | dict(about=known)))
        fail(1, f"--outdir={tmp_path}/page", f"--merge={folder}", "--merge|not written by this recipe")


def test_runs_with_different_judges_are_marked(tmp_path):
    write_run(tmp_path / "a", {"oracle": 0.6, "posterior": 0.6})
    write_run(tmp_path / "b", {"drop": 0.8}, right=0.9)
    for names, marked in (("a", False), ("ab", True)):
        succeed(f"--outdir={tmp_path}/page", "--merge=" + ",".join(f"{tmp_path}/{name}" for name in names))
        text = (tmp_path / "page/report.md").read_text()
        assert ("different judges" in text) == ("right on 90.0% of" in text) == marked and "right on 91.0% of" in text
        assert ("reached the oracle" in text) == (not marked) and "1.33" not in text


def test_a_page_does_not_replace_the_files_of_others(tmp_path):
    write_run(tmp_path / "a", {"oracle": 0.6})
    for name in ("results.json", "report.html"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        mine = tmp_path / "mine" / name
        mine.write_text("{}")
        fail(1, f"--outdir={tmp_path}/mine", f"--merge={tmp_path}/a", f"--outdir|{name}")
        assert mine.read_text() == "{}" and len(list(mine.parent.iterdir())) == 1
        mine.unlink()
    succeed(f"--outdir={tmp_path}/mine", f"--merge={tmp_path}/a")
    succeed(f"--outdir={tmp_path}/mine", f"--merge={tmp_path}/a")


def test_runs_that_do_not_compare_are_refused(tmp_path):
    write_run(tmp_path / "a", {"oracle": 0.6})
    write_run(tmp_path / "b", {"oracle": 0.8}, seed=1, num=200)
    write_run(tmp_path / "none", {})
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/quickstart.json").write_text('{"steps": [], "seconds": {}}')
    write_run(tmp_path / "old", {"oracle": 0.8}, recipe=None)
    page = f"--outdir={tmp_path}/page"
    fail(1, page, f"--merge={tmp_path}/a,{tmp_path}/old", "--merge|another version made it")
    fail(1, page, f"--merge={tmp_path}/a,{tmp_path}/b", "--merge|differ in the resolution")
    fail(1, page, f"--merge={tmp_path}/none", "--merge|no row is finished")
    fail(1, page, f"--merge={tmp_path}/demo", "--merge|not written by this recipe")
    fail(1, page, f"--merge={tmp_path}/missing", "--merge|missing")
    fail(2, page, f"--merge={tmp_path}/a", "--seed=1", "--seed|--merge runs nothing")
    assert not (tmp_path / "page").exists()


def test_bad_options_fail_before_the_work(tmp_path):
    out = f"--outdir={tmp_path}/out"
    fail(2, out, "--setting=sym40,sym41", "'sym41' is not one of sym40")
    fail(2, out, "--rows=", "--rows")
    fail(1, out, f"--judge={tmp_path}/none", "--judge")
    judge = tmp_path / "judge.pkl"
    save_snapshot(str(judge), dict(ema=Classifier(8, 1, 10, depth="small", model_channels=8, channel_mult=[1])))
    fail(1, out, f"--judge={judge}", "--judge|takes 8x8 images|knows 10 classes|here they are 16x16")
    fail(1, out, f"--source={tmp_path}/nothing", "--source|nothing")
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_tiny_run_is_complete_and_goes_on(tmp_path):
    source = tmp_path / "fashion"
    make_idx(source, 60)
    make_idx(source, 60, part="t10k", seed=1)
    command = [f"--outdir={tmp_path}/out", f"--source={source}", "--scale=0.0005", "--num=20",
               "--rows=real-noisy,baseline"]  # fmt: skip
    assert "[1/" in succeed(*command, "--jobs=2")
    rows = read_rows(tmp_path / "out/report.md")
    assert {"real images, noisy labels", "baseline"} <= set(rows)
    assert rows["baseline"][8] == "19" and 0 <= float(rows["baseline"][7]) <= 1
    assert (tmp_path / "out/pictures/sym40-baseline.png").exists()
    journal = json.loads((tmp_path / "out/quickstart.json").read_text())
    for name in ("images", "table"):  # the images are there, but nobody has written down that they are done
        del journal["seconds"][f"sym40-baseline-{name}"]
    (tmp_path / "out/quickstart.json").write_text(json.dumps(journal))
    assert len(re.findall(r"^\[", succeed(*command), re.MULTILINE)) == 2
    with pytest.raises(UserError, match="other options"):  # 5,000 images in place of 20
        benchmark.run_plan(fashion.plan(f"{tmp_path}/out", ["sym40"]), benchmark.SCRIPTS, f"{tmp_path}/out")
    assert "real images, clean labels" not in rows
    succeed(*command[:-1], "--rows=real-clean")
    assert {"real images, clean labels", *rows} <= set(read_rows(tmp_path / "out/report.md"))
