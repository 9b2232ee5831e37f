"""The review page: which images it shows, the facts it states, and that names of strangers stay text."""

import base64
import hashlib
import html.parser
import io
import json
import re

import numpy as np
import PIL.Image
import pytest

from archives.dataset import ImageDataset
from archives.label_file import LabelFile
from reports.facts import Advice, Confusable, gather_facts, summarize
from reports.review import most_interesting, write_review
from tests.support.review import ATTACK, CLASSES, DOUBLE, FOREIGN, LABELS, judge, make_set
from tests.support.synth import make_archive, pictures


class Page(html.parser.HTMLParser):
    """The elements of a page as a browser sees them, and the text of its scripts."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.text = [], [], [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.text += data


def labels_of(labels, score, **fields):
    labels, score = np.asarray(labels), np.asarray(score, np.float32)
    names = [str(i) for i in range(len(labels))]
    return LabelFile(names, labels, score >= 0.5, score, labels, 0.5, np.zeros(labels.max() + 1, np.float32), **fields)


def test_every_class_gets_its_share():
    labels, score = np.repeat([0, 1, 2], [900, 90, 10]), np.tile(np.linspace(0, 0.4, 10), 100)
    chosen = most_interesting(labels_of(labels, score), 100)
    assert np.bincount(labels[chosen]).tolist() == [45, 45, 10]  # what class 2 lacks goes to the others
    for c in range(2):  # the most suspicious of each class, in this order
        part, own = score[chosen[labels[chosen] == c]], np.sort(score[labels == c])
        np.testing.assert_array_equal(part, own[:45])
    assert (np.diff(labels[chosen]) >= 0).all()


def test_every_kind_gets_its_share_and_calm_images_come_last():
    n = 100
    score = np.linspace(0, 1, n)  # the first half is suspicious
    outlier_score, is_outlier, duplicate_of = np.linspace(5, 6, n), np.arange(n) >= 60, np.arange(n)
    duplicate_of[[56, 58]] = 56
    found = labels_of([0] * n, score, outlier_score=outlier_score, is_outlier=is_outlier, duplicate_of=duplicate_of)
    assert set(most_interesting(found, 8)) == {0, 1, 2, 56, 58, 97, 98, 99}
    calm = [50, 51, 52, 53, 54, 55, 57, 59]
    assert not set(calm) & set(most_interesting(found, n - len(calm)))
    assert set(calm[:3]) <= set(most_interesting(found, n - len(calm) + 3))


def test_contradictions_come_before_other_duplicates():
    duplicate_of = np.arange(8)
    duplicate_of[[0, 1]], duplicate_of[[4, 7]] = 0, 4
    found = labels_of([0] * 7 + [1], [0.9] * 8, duplicate_of=duplicate_of)
    assert 4 in most_interesting(found, 2) and 7 in most_interesting(found, 2)


def test_names_of_strangers_stay_text(tmp_path):
    dataset = make_set(tmp_path)
    found = judge(dataset)
    advice = [Advice("Clean" + ATTACK, ATTACK, ATTACK, ATTACK, "python train.py " + ATTACK, True)]
    facts = gather_facts(dataset, found, [Confusable(CLASSES[1], CLASSES[2], ATTACK)], advice, ATTACK)
    write_review(tmp_path / "report.html", dataset, found, facts)
    page = Page(tmp_path / "report.html")
    kinds = [value for name, value in page.attributes if name == "type" and "/" in value]
    assert kinds == ["application/json", *["text/plain"] * (len(kinds) - 1)] and len(page.scripts) == len(kinds) + 1
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(ATTACK) >= 8
    data = json.loads(page.scripts[0])
    assert data["classes"] == data["keys"] == CLASSES and sorted(data["names"]) == dataset.file_names


def test_only_our_script_may_run(tmp_path):
    dataset = make_set(tmp_path)
    write_review(tmp_path / "report.html", dataset, judge(dataset), gather_facts(dataset, judge(dataset)))
    page = Page(tmp_path / "report.html")
    policy = next(value for name, value in page.attributes if name == "content" and "script-src" in value)
    digest = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    links = [value for name, value in page.attributes if name in ("src", "href")]
    assert all(link.startswith("#") for link in links)


def sheets(page):
    for text in page.scripts[1:-1]:
        kind, _, data = text.partition(";base64,")
        yield kind, np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize("channels", [1, 3])
def test_thumbnails_are_the_images(tmp_path, channels):
    images = pictures(100, 8, channels)
    dataset = ImageDataset(str(make_archive(tmp_path / "a.zip", images, [i % 3 for i in range(100)])))
    found = labels_of(dataset.labels, np.random.default_rng(0).random(100))
    write_review(tmp_path / "report.html", dataset, found, gather_facts(dataset, found), limit=60)
    page = Page(tmp_path / "report.html")
    shown = np.concatenate([pixels.reshape(-1, 8, 8, channels) for _, pixels in sheets(page)])
    np.testing.assert_array_equal(shown, images[most_interesting(found, 60)])
    assert [kind for kind, _ in sheets(page)] == ["data:image/png"] * 2


def test_large_images_become_small(tmp_path):
    images = np.repeat(np.repeat(pictures(3, 8), 32, axis=1), 32, axis=2)
    dataset = ImageDataset(str(make_archive(tmp_path / "a.zip", images, [0, 1, 1])))
    found = labels_of(dataset.labels, [0.1, 0.2, 0.3])
    write_review(tmp_path / "report.html", dataset, found, gather_facts(dataset, found))
    ((kind, pixels),) = sheets(Page(tmp_path / "report.html"))
    assert kind == "data:image/jpeg" and pixels.shape == (3 * 128, 128, 3)
    middle = pixels[8:128:16, 8:128:16].astype(int)  # of each block of one color
    assert np.abs(middle - images[0, 16::32, 16::32]).mean() < 20


def test_facts_follow_from_the_label_file(tmp_path):
    dataset = make_set(tmp_path)
    facts = gather_facts(dataset, judge(dataset))
    assert facts.images == 50 and facts.shape == (3, 8, 8) and facts.counts.tolist() == np.bincount(LABELS).tolist()
    assert facts.flagged.tolist() == [15, 5, 4, 1] and (facts.foreign, facts.duplicates) == (1, 1)
    assert facts.contradictions == 1 and facts.empty == [] and facts.tiny == [CLASSES[2], CLASSES[3]]
    assert f"Tiny classes: {CLASSES[2]}, {CLASSES[3]}" in summarize(facts)
    page = tmp_path / "report.html"
    write_review(page, dataset, judge(dataset), facts)
    text = Page(page).text
    for words in ("50.0% (between 40.0% and 60.0%) of the 50 labels", "25 labels are suspicious", "8x8, RGB"):
        assert words in text, words
    data = json.loads(Page(page).scripts[0])
    row = {name: i for i, name in enumerate(data["names"])}
    foreign, first = row[dataset.file_names[FOREIGN]], row[dataset.file_names[DOUBLE[0]]]
    assert [i for i, flag in enumerate(data["foreign"]) if flag] == [foreign]
    assert (
        data["group"][first] == DOUBLE[0] and data["twin"][first] == f"{dataset.file_names[DOUBLE[1]]} ({CLASSES[1]})"
    )
    assert sum(group >= 0 for group in data["group"]) == len(DOUBLE)


def test_many_classes_make_a_picture_not_a_table(tmp_path):
    dataset = ImageDataset(str(make_archive(tmp_path / "a.zip", pictures(30, 8, 1), list(range(30)))))
    found = labels_of(dataset.labels, [0.1] * 30, transition=np.eye(30) * 0.7 + 0.01)
    found.transition[3, 5] = 0.31
    write_review(tmp_path / "report.html", dataset, found, gather_facts(dataset, found))
    text = (tmp_path / "report.html").read_text()
    assert re.search(r"id='heat'[^>]*src='data:image/png;base64,", text)
    assert "<tr><th scope='row'>3</th><td>5</td><td>31.0%</td></tr>" in text
