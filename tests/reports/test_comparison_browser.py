"""The report in a real browser: sheets side by side where the page is wide, nothing wider than the page."""

import pytest

from reports.comparison import compare_methods
from reports.page import Report
from tests.support.browser import MISSING, chromium
from tests.support.comparison import make_data, make_rows

pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]
PLACES = "return [...document.querySelectorAll(arguments[0])].map((e) => e.getBoundingClientRect().{})"


def test_report_in_a_browser(tmp_path):
    rows = make_rows(tmp_path, loss=True)
    section = compare_methods(str(tmp_path), "t", "q", make_data(tmp_path), rows, ["note"])
    Report([section], ["python train.py --outdir=" + "a" * 300]).write(str(tmp_path))
    with chromium(tmp_path) as page:
        for width, beside in ((1200, 3), (400, 1)):
            page.size(width, 900)
            page.open(tmp_path / "report.html")
            assert page.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
            assert page.run("return document.querySelector('h1').nextElementSibling.className") == "finding"
            tops = page.run(PLACES.replace("{}", "top"), ".gallery:not(.small) img")
            assert sum(abs(top - tops[0]) < 1 for top in tops) == beside and len(tops) == 5
            sizes = page.run(PLACES.replace("{}", "width"), ".gallery:not(.small) img")
            assert max(sizes) - min(sizes) < 1 and min(sizes) > 300
            small = page.run(PLACES.replace("{}", "top"), ".gallery.small img")
            assert sum(abs(top - small[0]) < 1 for top in small) >= 2
        # The names of the rows stay in sight while a table scrolls.
        page.run("document.querySelector('.scroll').scrollLeft = 200")
        assert page.run(PLACES.replace("{}", "left"), ".scroll tbody th")[0] >= 0
        assert not page.log()
