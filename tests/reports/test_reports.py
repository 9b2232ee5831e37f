"""The trade-off of guidance in one sentence."""

import re

import pytest

from reports.page import above

LOW, HIGH = [(1, 1.0, 0.8), (2, 2.0, 0.9)], [(1, 1.2, 0.7), (2, 3.0, 0.8)]


@pytest.mark.parametrize(
    "a, b, words",
    [
        (LOW, HIGH, "over the whole range, FD 0.5 to 2"),
        (HIGH, LOW, "on 0% of the range FD 0.5 to 2; below it between FD"),
        ([(1, 1.0, 0.8), (2, 2.0, 0.8)], [(1, 1.0, 0.7), (2, 2.0, 0.9)], r"on 6[67]% of the range .* FD 1.5\d? and 2"),
        ([(1, 0.4, 0.8)], [(1, 0.6, 0.9)], "cannot be compared"),
    ],
)
def test_where_one_curve_is_above_the_other(a, b, words):
    assert re.search(words, above(dict(a=a, b=b), (0.5, 0.5), "a", "b"))
