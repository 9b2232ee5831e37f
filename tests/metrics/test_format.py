"""The printed table: digits, arrows, the best of a line, each reason once."""

import pytest

from metrics.format import direction, format_comparison, format_curve, format_table, short
from metrics.protocols import PROTOCOLS, describe_protocol
from metrics.settings import EvaluationSettings


def result(images="a.zip", notes=(), unranked=(), intervals=(), **metrics):
    return dict(
        images=images,
        num_images=50,
        data="data.zip",
        num_reference=60,
        reference_labels="clean labels",
        reference_outliers=0,
        reference_subset=None,
        detector="net",
        num_features=5,
        precision="fp32",
        protocol=None,
        class_matching=None,
        unranked=list(unranked),
        judge=None,
        outliers=None,
        bootstrap=None,
        metrics=metrics,
        notes=dict(notes),
        intervals=dict(intervals),
    )


@pytest.mark.parametrize(
    "value, shown",
    [
        (None, "n/a"),
        (0.0, "0.00"),
        (0.92, "0.920"),
        (1 / 3, "0.333"),
        (12.345, "12.3"),
        (99.94, "99.9"),
        (99.96, "100"),
        (1234.5, "1234"),
        (-0.00012345, "-0.000123"),
    ],
)
def test_three_significant_digits(value, shown):
    assert short(value) == shown


def test_directions():
    assert [direction(name) for name in ("fid", "cw_sfid", "kid", "ppl_end", "outlier_ratio")] == [-1] * 5
    assert [direction(name) for name in ("is", "cw_density_k3", "recall_k5", "cas", "label_accuracy")] == [1] * 5
    assert direction("cw_is") == 0


def rows(text):
    return {line.split("  ")[0]: line.split() for line in text.splitlines() if line}


def test_the_best_of_a_line_has_a_star():
    sets = [
        result("a.zip", fid=12.31, **{"is": 2.0, "cw_is": 1.5, "density_k5": 0.5, "kid": -0.001}),
        result("b.zip", fid=12.34, **{"is": 3.0, "cw_is": 1.1, "density_k5": None, "kid": 0.002}),
        result("c.zip", fid=12.60, **{"is": 1.0, "cw_is": 1.9, "density_k5": None, "kid": 0.003}),
    ]
    found = rows(format_comparison(sets))
    assert found["fid ↓"][2:] == ["12.3*", "12.3*", "12.6"]  # what looks the same is not ranked
    assert found["is ↑"][2:] == ["2.00", "3.00*", "1.00"]
    assert found["kid ↓"][2:] == ["-0.00100*", "0.00200", "0.00300"]
    assert found["cw_is"][1:] == ["1.50", "1.10", "1.90"]
    assert found["density_k5 ↑"][2:] == ["0.500", "n/a", "n/a"]  # alone, it is not the best of anything


def test_figures_by_labels_that_nobody_knows_to_be_clean_are_not_ranked():
    sets = [
        result("a.zip", fid=1.0, cw_fid=1.0, unranked=["cw_fid"]),
        result("b.zip", fid=2.0, cw_fid=2.0, unranked=["cw_fid"]),
    ]
    text = format_comparison(sets)
    assert rows(text)["cw_fid"][1:] == ["1.00", "2.00"] and rows(text)["fid ↓"][2:] == ["1.00*", "2.00"]
    for table in (text, format_table(sets[0])):
        (line,) = [line for line in table.split("\n\n")[0].splitlines() if line.startswith("labels ")]
        assert "may be wrong" in line and line.endswith("repeat the mistakes; do not rank by them: cw_fid")
    assert "may be wrong" not in format_table(result(fid=1.0, cw_fid=1.0))


def test_each_reason_stands_once():
    without = "the images have no labels"
    notes = {"is": "no probabilities", "cw_fid": without, "cw_kid": without}
    one = result("a.zip", fid=1.0, **{"is": None}, cw_fid=None, cw_kid=None, notes=notes)
    few = dict(notes, cw_fid="mean of 2 of 3 classes", cw_kid="mean of 2 of 3 classes")
    other = result("b.zip", fid=1.0, **{"is": None}, cw_fid=2.0, cw_kid=0.1, notes=few)
    assert format_table(one).splitlines()[-2:] == ["is: n/a, no probabilities", f"cw_fid, cw_kid: n/a, {without}"]
    assert format_comparison([one, other]).splitlines()[-3:] == [
        "is: n/a, no probabilities",
        f"cw_fid, cw_kid of a: n/a, {without}",
        "cw_fid, cw_kid of b: mean of 2 of 3 classes",
    ]


def test_curve():
    curve = [dict(number=n, value=v) for n, v in ((100, 3.0), (200, 1.5), (300, 2.0))]
    found = format_curve(dict(metric="fid", unit="kimg", ranked=True, curve=curve)).splitlines()
    assert [line.split() for line in found[:4]] == [
        ["kimg", "fid", "↓"],
        ["100", "3.00"],
        ["200", "1.50*"],
        ["300", "2.00"],
    ]
    found = format_curve(dict(metric="cw_fid", unit="kimg", ranked=False, curve=curve))
    assert "1.50*" not in found and "cw_fid ↓" not in found and "reference labels may be wrong" in found


def test_protocols_are_described():
    for name, protocol in PROTOCOLS.items():
        settings = vars(EvaluationSettings("data.zip", "net", **protocol.settings))
        text = describe_protocol(name, settings)
        assert text.startswith(f"{name}: num = 50,000") and protocol.source in text and "but here" not in text
    assert "but here nearest_k = 5" in describe_protocol("tdsm", settings | dict(nearest_k=5, splits=5000))
