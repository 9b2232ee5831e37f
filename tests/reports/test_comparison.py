"""The comparison of methods: red frames, rows side by side, values relative to the oracle, one sentence first."""

import json

import numpy as np
import pytest
from PIL import Image

from reports import plots
from reports.comparison import accuracy_by_class, chart_distances, compare_methods, show_samples
from reports.finding import BASELINE, ORACLE, Score, say_finding
from reports.page import Report, Section, markdown_table
from reports.tradeoff import draw_tradeoff
from sampling.grid import RED, image_sheet
from tests.support.comparison import DISTANCES, NAMES, WRONG, N, make_data, make_rows
from tests.support.review import ATTACK
from tests.support.synth import make_archive, pictures

ORACLE_IS = Score("oracle", 1.0, (0.9, 1.1), ORACLE)
BASELINE_IS = Score("baseline", 6.0, (5.5, 6.5), BASELINE)


@pytest.mark.parametrize(
    "scores, sentence",
    [
        (
            [ORACLE_IS, BASELINE_IS, Score("TDSM", 1.5), Score("drop", 1.08, (1, 1.2))],
            "Drop came closest to the oracle, the same model trained on clean labels: its FD is 1.08, 8.0% above the "
            "oracle's 1.00 (their intervals overlap); the baseline, which believes every label, has 6.00, 6.00 times "
            "the oracle's.",
        ),
        (
            [ORACLE_IS, BASELINE_IS, Score("SBDC", 3.0, (2.5, 3.5)), Score("TDSM", None)],
            "SBDC came closest to the oracle, the same model trained on clean labels: its FD is 3.00, 3.00 "
            "times the oracle's 1.00; the baseline, which believes every label, has 6.00, 6.00 times the oracle's.",
        ),
        (
            [ORACLE_IS, Score("drop", 0.93)],
            "Drop reached the oracle, the same model trained on clean labels: its FD is 0.930, the oracle's 1.00.",
        ),
        (
            [ORACLE_IS, BASELINE_IS, Score("drop", 6.5)],
            "No method helped: the baseline, which believes every label, has the lowest FD, 6.00, and the next one "
            "is drop with 6.50; the oracle, the same model trained on clean labels, has 1.00.",
        ),
        (
            [BASELINE_IS, Score("TDSM", 1.5)],
            "TDSM has the lowest FD, 1.50; the baseline, which believes every label, has 6.00.",
        ),
        (
            [Score("oracle", 0.0, None, ORACLE), BASELINE_IS, Score("TDSM", 1.5)],
            "TDSM came closest to the oracle, the same model trained on clean labels: its FD is 1.50, beside the "
            "oracle's 0.00; the baseline, which believes every label, has 6.00.",
        ),
        (
            [ORACLE_IS, Score("baseline", 0.95, None, BASELINE), Score("drop", 0.93)],
            "Drop reached the oracle, the same model trained on clean labels: its FD is 0.930, the oracle's 1.00; the "
            "baseline, which believes every label, has 0.950, 5.0% below the oracle's.",
        ),
        (
            [ORACLE_IS, Score("drop", None)],
            "Nothing can be said yet: no method has a FD that could be compared.",
        ),
        (
            [ORACLE_IS, BASELINE_IS],
            "No method yet besides the baseline, whose FD is 6.00, 6.00 times the oracle's 1.00.",
        ),
    ],
    ids=[
        "closest",
        "far",
        "reached",
        "nothing helped",
        "no oracle",
        "oracle 0",
        "both reached",
        "no values",
        "no method",
    ],
)
def test_finding(scores, sentence):
    assert say_finding(scores, "FD") == sentence


def frames(picture, columns, tile=48, gap=8):
    """Return which images of a sheet have a frame, and which have a frame's color beside them but none around."""
    pixels = np.asarray(picture.convert("RGB"))
    red = (pixels == RED).all(axis=2)
    top = len(red) % (tile + gap) - gap  # the height of the headings
    rows = (len(red) - top) // (tile + gap)
    found = []
    for i in range(rows * columns):
        y, x = top + gap + i // columns * (tile + gap), gap + i % columns * (tile + gap)
        assert not red[y : y + tile, x : x + tile].any()  # no frame covers an image
        around = red[y - 1 : y + tile + 1, x - 1 : x + tile + 1]
        found.append(bool(around[0].all() and around[-1].all() and around[:, 0].all() and around[:, -1].all()))
        assert found[-1] or not around.any()  # frames of neighbors keep their distance
    return found


@pytest.mark.parametrize("channels", [1, 3])
def test_a_frame_belongs_to_one_image(channels):
    images = np.random.default_rng(0).integers(0, 250, [9, 8, 8, channels], np.uint8)
    framed = np.ones(9, dtype=bool)
    framed[4] = False  # in the middle of framed ones
    sheet = image_sheet(images, 3, 6, framed=framed)
    assert frames(sheet, 3) == framed.tolist()
    plain = image_sheet(images, 3, 6, framed=framed & False)
    assert plain.size == sheet.size and not any(frames(plain, 3))


def test_wrong_samples_have_a_red_frame(tmp_path):
    methods = make_rows(tmp_path)
    gallery = show_samples(str(tmp_path), methods, make_data(tmp_path))
    assert [picture.title for picture in gallery.pictures] == ["training images", *DISTANCES]
    for picture, method in zip(gallery.pictures[1:], methods, strict=True):
        with Image.open(picture.path) as sheet:
            found = frames(sheet, 3)
        assert np.flatnonzero(found).tolist() == [i for i in WRONG[method.title] if i < 24]  # 8 rows of 3 classes
        assert f"{1 - len(WRONG[method.title]) / N:.2f}" in picture.text
    with Image.open(gallery.pictures[0].path) as sheet:
        assert len(frames(sheet, 3)) == 24 and any(frames(sheet, 3))
    assert len({Image.open(picture.path).size for picture in gallery.pictures}) == 1  # comparable


def test_the_order_of_images_follows_from_their_labels(tmp_path):
    """Images that are not in the order 0, 1, 2, 0, 1, ... stand below their class all the same."""
    methods = make_rows(tmp_path, dict(drop=1.1))
    sheets = []
    for order in (np.arange(N), np.argsort(np.arange(N) % 3, kind="stable")):
        table = json.loads((tmp_path / "drop.json").read_text())
        table["judged"] = np.array(table["judged"])[order].tolist()
        archive = make_archive(tmp_path / "o.zip", pictures(N, 8, 1)[order], (np.arange(N) % 3)[order].tolist())
        methods[0].images, methods[0].__dict__["result"] = str(archive), table
        sheets.append(Image.open(show_samples(str(tmp_path), methods, make_data(tmp_path)).pictures[1].path))
        sheets[-1].load()
    assert sheets[0] == sheets[1]


def test_rows_relative_to_the_oracle(tmp_path):
    section = compare_methods(str(tmp_path), "t", "q", make_data(tmp_path), make_rows(tmp_path), ["a note"])
    rows = {row[0]: dict(zip(section.columns[3:], row[3:], strict=True)) | {"label": row[1:3]} for row in section.rows}
    assert [*rows] == [*DISTANCES]
    assert rows["drop"]["label"] == ["0.967", "0.97"] and rows["baseline"]["label"] == ["0.833", "0.83"]
    assert rows["drop"]["class-wise FD"] == "1.100 ± 0.050" and rows["baseline"]["/ oracle's"] == "6.00"
    assert section.finding.startswith("Drop came closest to the oracle")
    assert "drop: what drop does." in section.notes and "a note" in section.notes


def test_without_an_oracle_nothing_is_relative(tmp_path):
    rows = make_rows(tmp_path, dict(baseline=6.0, drop=None))
    section = compare_methods(str(tmp_path), "t", "q", make_data(tmp_path), rows, [])
    assert "/ oracle's" not in section.columns and section.rows[1][2] == "n/a"


def test_the_judge_is_judged_on_real_images_of_each_class(tmp_path):
    table = accuracy_by_class(make_rows(tmp_path))
    assert table.columns == ["", *NAMES]
    assert table.rows[:2] == [["judge, real images", "1.00", "n/a", "0.75"], ["their number", "8", "0", "4"]]
    baseline = [f"{1 - wrong / 10:.2f}" for wrong in (2, 2, 1)]  # images 0, 9; 1, 4; 5
    assert table.rows[3] == ["baseline", *baseline]


def test_the_chart_draws_the_oracle_as_a_line(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure.axes[0]))
    rows = make_rows(tmp_path, DISTANCES | dict(TDSM=None))
    chart_distances(str(tmp_path), rows)
    axis = drawn[0]
    (line,) = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert line.get_xdata() == [1.0, 1.0]
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if line.get_marker() == "o"]
    assert points == [(1.0, 0), (6.0, 1), (1.1, 2)]  # a row without a value keeps its place
    assert [label.get_text() for label in axis.get_yticklabels()] == [*DISTANCES] and axis.get_xscale() == "log"

    results = {"unguided-0": dict(label_accuracy=0.5, fid=1.0), "calibrated-2": dict(label_accuracy=0.8, fid=1.5)}
    (tmp_path / "sweep.json").write_text(json.dumps(dict(results=results)))
    path, verdict = draw_tradeoff(str(tmp_path / "sweep.json"), str(tmp_path / "p" / "sweep.png"), rows[0])
    lines = [line for line in drawn[1].lines if line.get_label() == "oracle"]
    assert [set(line.get_ydata()) for line in lines] == [{1.0}] and verdict == ""


def test_page_and_markdown_say_the_same(tmp_path):
    section = compare_methods(str(tmp_path), "t", "q", make_data(tmp_path), make_rows(tmp_path, loss=True), ["a note"])
    html, markdown = (open(path).read() for path in Report([section], ["python x.py"]).write(str(tmp_path)))
    for text in (html, markdown):
        assert text.index(section.finding.split("'")[0]) < text.index("0.967") < text.index("Label accuracy by class")
        assert text.index("Label accuracy by class") < text.index("training images")
        for words in ("a note", "what drop does", "1.100 ± 0.050", "Training losses", "python x.py"):
            assert words in text, words
    assert ATTACK not in html and "<script" not in html
    pictures = 5 + 1 + 4  # sheets, chart, losses
    assert html.count("data:image/png;base64,") == markdown.count(".png)") == pictures
    cells = [line for line in markdown.splitlines() if line.startswith("| judge, real images")]
    assert cells == ["| judge, real images | 1.00 | n/a | 0.75 |"]


def test_markdown_cells_keep_their_bars():
    assert markdown_table(["a|b"], [["c|d"]])[::2] == ["| a\\|b |", "| c\\|d |"]


def test_several_sections_do_not_share_pictures(tmp_path):
    data, rows = make_data(tmp_path), make_rows(tmp_path)
    sections = [compare_methods(str(tmp_path), "t", "q", data, rows, [], name=name) for name in ("sym40", "sym80")]
    chart, _, gallery, _ = sections[0].pictures
    paths = [chart.path, *(picture.path for picture in gallery.pictures)]
    other = [sections[1].pictures[0].path, *(picture.path for picture in sections[1].pictures[2].pictures)]
    assert len({*paths, *other}) == 2 * len(paths) == 12


def test_a_section_without_a_finding_begins_with_its_question(tmp_path):
    html, markdown = (open(p).read() for p in Report([Section("t", "q", ["m"], [["r"]])]).write(str(tmp_path)))
    assert "class='finding'" not in html and markdown.startswith("# t\n\nq\n")
