"""The review page in a real browser: filter, decide by click and key, reload, download, and apply the decisions."""

import csv
import time

import numpy as np
import pytest

from archives.dataset import ImageDataset
from reports.facts import gather_facts
from reports.review import write_review
from tests.support.browser import KEYS, MISSING, chromium
from tests.support.review import CLASSES, FOREIGN, LABELS, judge, make_set
from tests.support.synth import run_dataset_tool

pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("review"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("downloads")) as started:
        yield started


@pytest.fixture
def page(dataset, browser, tmp_path):
    """The browser with a fresh page, which shows the set."""
    path, found = tmp_path / "report.html", judge(dataset)
    write_review(path, dataset, found, gather_facts(dataset, found))
    browser.size(1200, 900)
    browser.open(path)
    browser.run("localStorage.clear()")
    browser.open(path)
    yield browser
    assert not browser.log()  # nothing failed, nothing was blocked


def shown(page):
    """Return the rows of the images that the page shows, in its order."""
    names = page.run("return [...document.querySelectorAll('.card')].map((c) => itemOf(c).name)")
    return [int(name[:2]) for name in names]


def focus(page, row):
    page.run("choose(items.find((i) => i.name.startsWith(arguments[0])), true)", f"{row:02d}")


def test_from_page_to_archive(page, dataset, tmp_path):
    suspicious = np.flatnonzero(~judge(dataset).is_clean)
    assert sorted(shown(page)) == suspicious.tolist()
    page.choose("#filter-label", "1")
    wanted = [i for i in suspicious if LABELS[i] == 1]
    assert shown(page) == wanted  # most suspicious first
    page.choose("#filter-label", "")
    page.run("const s = document.getElementById('filter-wrong'); s.value = 85; s.dispatchEvent(new Event('change'))")
    assert shown(page) == [i for i in suspicious if judge(dataset).score[i] <= 0.15]
    page.run("const s = document.getElementById('filter-wrong'); s.value = 0; s.dispatchEvent(new Event('change'))")

    focus(page, wanted[0])
    page.press("r")  # relabels as suggested, and goes on to the next image
    page.press("k" + KEYS["right"] + "ud")  # keeps it; takes that back; drops it
    focus(page, 0)
    page.choose("#new-label", "3")
    page.click(".card:nth-child(2) button.relabel")
    relabeled, dropped = {wanted[0]: 2, 0: 3, 2: 1}, wanted[1]
    assert page.run("return document.getElementById('counter').textContent") == "4 decided: 0 keep, 3 relabel, 1 drop."

    page.call("POST", "/refresh")  # decisions survive
    page.choose("#filter-decision", "relabel")
    assert sorted(shown(page)) == sorted(relabeled)
    path = download(page, tmp_path)
    with open(path, newline="", encoding="utf-8") as file:
        rows = {int(row["file"].lstrip("'")[:2]): row for row in csv.DictReader(file)}
    assert {i: (row["decision"], row["new_label"]) for i, row in rows.items()} == {
        wanted[0]: ("relabel", "'" + CLASSES[2]),
        0: ("relabel", "'" + CLASSES[3]),
        2: ("relabel", CLASSES[1]),
        dropped: ("drop", ""),
    }

    dest = tmp_path / "reviewed.zip"
    code, _, err = run_dataset_tool(f"--source={dataset.path}", f"--dest={dest}", f"--labels={path}")
    assert code == 0, err
    labels = LABELS.copy()
    labels[list(relabeled)] = list(relabeled.values())
    left = np.flatnonzero(np.arange(len(LABELS)) != dropped)
    reviewed = ImageDataset(str(dest))
    assert reviewed.labels.tolist() == labels[left].tolist() and reviewed.class_names == CLASSES
    assert (reviewed.images(range(len(left))) == dataset.images(left)).all()


def test_keys_decide_after_a_class_was_chosen_from_the_list(page):
    def at_card():
        return page.run("return document.activeElement === cards.get(current.index)")

    decided = "return [...decisions.values()].map((d) => d.kind)"
    focus(page, shown(page)[0])
    page.choose("#new-label", "3")
    assert at_card()
    page.press("d")
    assert page.run(decided) == ["drop"]
    page.run("document.getElementById('new-label').focus()")
    page.press(KEYS["down"])  # whoever moves through the list goes on in it
    assert not at_card()
    page.press(KEYS["escape"])
    assert at_card()


def download(page, folder):
    """Click the button. Return the file once it is there."""
    page.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    page.click("#download")
    for _ in range(100):
        if (folder / "decisions.csv").exists():
            return folder / "decisions.csv"
        time.sleep(0.05)
    raise AssertionError("nothing was downloaded")


def test_kinds_and_arrows(page, dataset):
    page.choose("#filter-kind", "foreign")
    assert shown(page) == [FOREIGN]
    page.choose("#filter-kind", "duplicate")
    assert sorted(shown(page)) == [0, 31, 32]
    page.choose("#filter-kind", "all")
    assert len(shown(page)) == 24 + 10 + 8 + 2  # the first class shows a part of its 30
    page.click(".more")
    assert sorted(shown(page)) == list(range(50))
    assert page.run("return [...document.querySelectorAll('.more')].every((b) => b.offsetParent === null)")
    focus(page, shown(page)[0])
    page.press(KEYS["right"] + KEYS["down"] + KEYS["left"] + KEYS["up"])
    assert page.run("return document.activeElement === document.querySelector('.card')")
    page.press(KEYS["down"])
    assert page.run("return itemOf(document.activeElement).label") == 0


def test_many_at_once_and_back(page):
    page.choose(".group select", "relabel")
    assert page.run("return [...decisions.values()].map((d) => d.kind + d.to)") == ["relabel1"] * 15
    # In the list, the next key would decide about all once more.
    assert page.run("return document.activeElement === document.body")
    page.click("#undo")
    assert page.run("return decisions.size") == 0


def test_another_tab_decides_too(page):
    page.run(
        "const one = [items[0].name, {kind: 'drop', to: null, label: items[0].label}];"
        "localStorage.setItem(data.key, JSON.stringify([one]));"
        "window.dispatchEvent(new StorageEvent('storage', {key: data.key}))"
    )
    assert page.run("return document.getElementById('counter').textContent") == "1 decided: 0 keep, 0 relabel, 1 drop."


def test_strangers_run_nothing(page):
    assert page.run("return typeof window.stolen") == "undefined"
    assert page.run("return document.images.length") == 0
    assert (
        page.run("return document.querySelector('.group:nth-child(2) h3').firstChild.data") == f"Labeled {CLASSES[1]}"
    )


def test_pictures_appear_when_they_are_seen(page, dataset):
    box = page.run(
        "const r = document.querySelector('.card .thumb').getBoundingClientRect(); return [r.width, r.height]"
    )
    assert box == [112, 112]
    sheets = "return getComputedStyle(document.querySelector('.card .thumb')).backgroundImage.slice(0, 15)"
    page.run("document.querySelector('#review').scrollIntoView()")
    deadline = time.monotonic() + 5
    while page.run(sheets) != 'url("data:image' and time.monotonic() < deadline:
        time.sleep(0.05)
    assert page.run(sheets) == 'url("data:image'


@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_is_wider_than_the_page(page, width):
    page.size(width, 800)
    page.choose("#filter-kind", "all")
    assert page.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    outside = (
        "return [...document.querySelectorAll('.card')].filter((c) => [...c.querySelectorAll('button')]"
        ".some((b) => b.getBoundingClientRect().right > c.getBoundingClientRect().right)).length"
    )
    assert page.run(outside) == 0
