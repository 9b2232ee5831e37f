"""Write the review page: what is known about a set, and its most interesting images, to keep, relabel or drop by eye.

The page is one file that needs neither a server nor a network. `review.js` shows the images and records the decisions,
`review.css` is the layout. Names of classes and files are text of strangers. Python escapes what it writes into the
page, the script sets texts only, and a content security policy allows no script but ours.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

import dnnlib
from archives.dataset import ImageDataset
from archives.decisions import addresses, class_keys
from archives.label_file import LabelFile
from reports.facts import Facts
from reports.page import STYLE

__all__ = ["most_interesting", "write_review"]

EXACT = 64  # pixels; up to this side thumbnails are PNGs of all pixels
SIDE = 128  # larger images become JPEGs of at most this side
SHEET = 48  # thumbnails per sprite sheet
CELLS = 25  # up to so many classes the transition is a table of numbers, above a picture


def most_interesting(found: LabelFile, limit: int) -> np.ndarray:
    """Return at most `limit` images that a person should look at, int64, by class and most suspicious first.

    Suspicious, foreign and double images each are a list per class, from the most to the least interesting. The classes
    take turns, and in each class the lists do: so every class and every list gets its share, and what a class does not
    need goes to the others. When the lists are exhausted, the labels follow that come closest to being suspicious.
    """
    doubles, contradicts = _doubles(found)
    lists = [(~found.is_clean, 1 - found.score), (doubles, contradicts + (1 - found.score) / 2)]
    if found.is_outlier is not None:
        lists.append((found.is_outlier, found.is_outlier if found.outlier_score is None else found.outlier_score))
    ranks = [np.where(listed, _rank_per_class(found.labels, listed, key), np.inf) for listed, key in lists]
    best = np.minimum.reduce(ranks)
    # What no list holds comes after what some list holds, by class and score.
    rest = ~np.isfinite(best)
    best[rest] = len(best) + _rank_per_class(found.labels, rest, 1 - found.score)[rest]
    chosen = np.lexsort((found.score, best))[:limit]
    return chosen[np.lexsort((found.score[chosen], found.labels[chosen]))]


def _rank_per_class(labels: np.ndarray, listed: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return the place of each image in its class, int64 [N]: listed ones first, then those with the larger key."""
    order = np.lexsort((-np.asarray(key, dtype=np.float64), ~listed, labels))
    starts = np.searchsorted(labels[order], labels[order])
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - starts
    return rank


def _doubles(found: LabelFile) -> tuple[np.ndarray, np.ndarray]:
    """Return which images have a duplicate, and which of these one with another label, both bool [N]."""
    none = np.zeros(len(found.labels), dtype=bool)
    if found.duplicate_of is None:
        return none, none
    group, count = found.duplicate_of, len(found.labels)
    differs = np.bincount(group[found.labels != found.labels[group]], minlength=count) > 0
    return (np.bincount(group, minlength=count) > 1)[group], differs[group]


def write_review(path: str, dataset: ImageDataset, found: LabelFile, facts: Facts, limit: int = 2000) -> None:
    """Write the page, complete or not at all, with the `limit` most interesting images.

    path     the HTML file
    dataset  the images, without mirrored copies; their `class_names` and `file_names` may be any text
    found    the label file of these images
    facts    what the page says about the set
    """
    chosen = most_interesting(found, limit)
    script, style = (Path(__file__).with_name(f"review.{kind}").read_text("utf-8") for kind in ("js", "css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = f"Review of {facts.path}"
    channels, height, width = dataset.image_shape
    scale = 1 if max(height, width) <= EXACT else SIDE / max(height, width, SIDE)
    tile = max(1, round(width * scale)), max(1, round(height * scale))
    kind = "PNG" if max(height, width) <= EXACT else "JPEG"
    with dnnlib.atomic_open(path, "w") as file:
        file.write(
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>{_text(title)}</title><style>{STYLE}\n{style}</style></head><body>"
            f"{_facts(facts)}{REVIEW}"
            f"<script type='application/json' id='data'>{_json(_data(dataset, found, chosen, tile))}</script>\n"
        )
        for sheet in _sheets(dataset, chosen, tile, kind):
            file.write(f"<script type='text/plain' class='sheet'>{sheet}</script>\n")
        file.write(f"<script>{script}</script></body></html>\n")


def _text(value: object) -> str:
    """Return a value as HTML text. What UTF-8 cannot write, in names of damaged archives, becomes a question mark."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


def _json(value: object) -> str:
    """Return JSON that can stand in a script element: no `<`, so nothing in it ends the element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


# ---------------------------------------------------------------------------------------------------------------------
# The images and what the script needs to know about them.


def _data(dataset: ImageDataset, found: LabelFile, chosen: np.ndarray, tile: tuple[int, int]) -> dict[str, object]:
    """Return what the script knows: for each of the `chosen` images one entry in every list."""
    names, classes = addresses(dataset.file_names, dataset.source_names), dataset.label_dim
    files = dataset.source_names or names
    shown = dataset.shown_classes
    # Decisions belong to images and labels, so they live on when the page is made again with other scores.
    identity = hashlib.sha256("\0".join([*shown, *names]).encode("utf-8", "surrogatepass"))
    identity.update(json.dumps(dataset.contents()).encode())
    group = np.arange(len(found.labels)) if found.duplicate_of is None else found.duplicate_of
    doubles, _ = _doubles(found)
    others = _others(group, doubles, chosen)
    probability = np.zeros(len(chosen)) if found.suggested_score is None else found.suggested_score[chosen]
    foreign = np.zeros(len(chosen), dtype=bool) if found.is_outlier is None else found.is_outlier[chosen]
    return dict(
        key=f"cleanscore-review-{identity.hexdigest()[:32]}",
        classes=shown,
        keys=class_keys(dataset.class_names, classes),
        flagged=np.bincount(found.labels[~found.is_clean], minlength=classes).tolist(),
        tile=dict(width=tile[0], height=tile[1], sheet=SHEET, exact=max(tile) <= EXACT),
        names=[names[i] for i in chosen],
        files=[files[i] for i in chosen],  # what a person calls them
        labels=found.labels[chosen].tolist(),
        suggested=found.suggested[chosen].tolist(),
        wrong=np.round(1 - found.score[chosen].astype(np.float64), 3).tolist(),
        probability=None if found.suggested_score is None else np.round(probability.astype(np.float64), 3).tolist(),
        suspicious=(~found.is_clean[chosen]).astype(int).tolist(),
        foreign=foreign.astype(int).tolist(),
        group=np.where(doubles[chosen], group[chosen], -1).tolist(),
        twin=[None if i < 0 else f"{files[i]} ({shown[found.labels[i]]})" for i in others],
    )


def _others(group: np.ndarray, doubles: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return for each of the `chosen` images another one of its group of duplicates, -1 for images without."""
    rows = np.flatnonzero(doubles)
    rows = rows[np.argsort(group[rows], kind="stable")]
    after = np.roll(rows, -1)
    last = group[rows] != group[after]  # of its group: the first one follows
    first = np.searchsorted(group[rows], group[rows])
    other = np.full(len(group), -1)
    other[rows] = np.where(last, rows[first], after)
    return other[chosen]


def _sheets(dataset: ImageDataset, chosen: np.ndarray, tile: tuple[int, int], kind: str) -> Iterator[str]:
    """Yield the sprite sheets as data URIs: SHEET thumbnails from top to bottom, in the order of `chosen`."""
    width, height = tile
    for start in range(0, len(chosen), SHEET):
        images = dataset.images(chosen[start : start + SHEET]).permute(0, 2, 3, 1).numpy()
        images = images[..., 0] if images.shape[3] == 1 else images
        if images.shape[1:3] != (height, width):
            resized = [PIL.Image.fromarray(x).resize(tile, PIL.Image.Resampling.LANCZOS) for x in images]
            images = np.stack([np.asarray(x) for x in resized])
        buffer = io.BytesIO()
        sheet = PIL.Image.fromarray(images.reshape(-1, *images.shape[2:]))
        sheet.save(buffer, kind, **(dict(optimize=True) if kind == "PNG" else dict(quality=80)))
        yield f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---------------------------------------------------------------------------------------------------------------------
# The facts, as HTML.

REVIEW = """<section id='review' aria-label='Look at the images'><h2>Look at the images</h2>
<p id='intro'></p><form id='filters' aria-label='Filters'></form><div id='images'></div>
<div id='panel' role='region' aria-label='Chosen image'></div><div id='live' class='hidden' role='status'></div>
<noscript><p>The images need JavaScript, which this browser does not run.</p></noscript></section>"""


def _facts(facts: Facts) -> str:
    parts = [f"<header><h1>What is in {_text(facts.path)}</h1>{_lead(facts)}</header>", _advice(facts)]
    parts += [_section("facts", "The set", _overview(facts)), _section("classes", "Classes", _classes(facts))]
    if facts.transition is not None:
        parts.append(_section("transition", "Which classes turn into which", _transition(facts)))
    return "".join(parts)


def _section(name: str, title: str, content: str) -> str:
    return f"<section id='{name}'><h2>{title}</h2>{content}</section>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "plain") -> str:
    """Return a table of a `kind` (class of CSS) in a box that scrolls where the page is narrow. Cells are HTML."""
    head = "".join(f"<th scope='col'>{cell}</th>" for cell in header)
    body = "".join(
        f"<tr><th scope='row'>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    table = f"<table class='{kind}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll' tabindex='0'>{table}</div>"


def _rate(facts: Facts) -> str:
    if facts.interval is None:
        return f"{facts.noise_rate:.1%}"
    return f"{facts.noise_rate:.1%} (between {facts.interval[0]:.1%} and {facts.interval[1]:.1%})"


def _lead(facts: Facts) -> str:
    flagged = int(facts.flagged.sum())
    text = f"About <b>{_rate(facts)}</b> of the {facts.images:,} labels are wrong. "
    text += f"<b>{flagged:,}</b> labels are suspicious: more probably wrong than right."
    links = [("advice", "What to do"), ("facts", "The set"), ("classes", "Classes")]
    links += [("transition", "Confusions")] * (facts.transition is not None) + [("review", "Look at the images")]
    items = "".join(f"<a href='#{name}'>{title}</a>" for name, title in links if name != "advice" or facts.advice)
    return f"<p class='lead'>{text}</p><nav aria-label='Sections'>{items}</nav>"


def _advice(facts: Facts) -> str:
    if not facts.advice:
        return ""
    rows = []
    for row in facts.advice:
        mark = " <span class='badge best'>recommended</span>" if row.recommended else ""
        cells = [("What it does", row.does), ("When", row.when), ("Cost", row.cost)]
        kind = "best" if row.recommended else "other"
        rows.append(
            f"<tbody class='{kind}'><tr><th scope='row'>{_text(row.method)}{mark}</th>"
            + "".join(f"<td data-label='{label}'>{_text(value)}</td>" for label, value in cells)
            + f"</tr><tr><td colspan='4'><pre tabindex='0'>{_text(row.command)}</pre></td></tr></tbody>"
        )
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("Method", "What it does", "When", "Cost"))
    why = f"<p>{_text(facts.why)}</p>" if facts.why else ""
    return _section("advice", "What to do", f"{why}<table><thead><tr>{head}</tr></thead>{''.join(rows)}</table>")


def _overview(facts: Facts) -> str:
    channels, height, width = facts.shape
    rows = [
        ("Images", f"{facts.images:,}", f"{width}x{height}, {'gray' if channels == 1 else 'RGB'}"),
        ("Classes", f"{len(facts.counts):,}", _range(facts)),
        ("Wrong labels", f"{facts.noise_rate:.1%}", "estimate of their share" + (
            "" if facts.interval is None else f", between {facts.interval[0]:.1%} and {facts.interval[1]:.1%}")),
        ("Suspicious labels", f"{facts.flagged.sum():,}", "each more probably wrong than right: some wrong labels look "
         "right, and some right ones look wrong"),
    ]  # fmt: skip
    if facts.foreign is not None:
        rows.append(("Foreign images", f"{facts.foreign:,}", "unlike all classes of this set"))
    if facts.duplicates is not None:
        rows.append(("Duplicates", f"{facts.duplicates:,}", "groups of equal or nearly equal images"))
        rows.append(("Contradictions", f"{facts.contradictions:,}", "of these groups with different labels"))
    for title, names, meaning in [
        ("Empty classes", facts.empty, "without images"),
        ("Tiny classes", facts.tiny, "with so few images that a network may not learn them"),
    ]:
        if names:
            shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            rows.append((title, f"{len(names):,}", f"{meaning}: {shown}"))
    return _table(["", "Number", "What it means"], [[_text(cell) for cell in row] for row in rows])


def _range(facts: Facts) -> str:
    low, high = int(facts.counts.argmin()), int(facts.counts.argmax())
    return (
        f"from {facts.counts[low]:,} images ({facts.class_names[low]}) to {facts.counts[high]:,} "
        f"({facts.class_names[high]})"
    )


def _classes(facts: Facts) -> str:
    rows = [
        (_text(name), f"{count:,}", f"{flagged:,}", f"<span class='bar' style='--p:{rate:.3f}'></span>{rate:.1%}")
        for name, count, flagged, rate in zip(
            facts.class_names, facts.counts, facts.flagged, facts.class_rates, strict=True
        )
    ]
    return _table(["Labeled as", "Images", "Suspicious", "Wrong, estimated"], rows)


def _transition(facts: Facts) -> str:
    names, matrix = facts.class_names, facts.transition
    text = "<p>One row per class that images have, one column per label that they carry, in percent.</p>"
    if len(names) <= CELLS:
        text += _heat_map(names, matrix)
    else:
        buffer = io.BytesIO()
        PIL.Image.fromarray(np.rint(255 * np.clip(matrix, 0, 1)).astype(np.uint8)).save(buffer, "PNG")
        source = base64.b64encode(buffer.getvalue()).decode()
        text += f"<img id='heat' alt='Share of each label in each class' src='data:image/png;base64,{source}'>"
        away = np.where(np.eye(len(names), dtype=bool), 0, matrix)
        places = np.argsort(-away, axis=None, kind="stable")[:20]
        rows = [(_text(names[i]), _text(names[j]), f"{away[i, j]:.1%}") for i, j in zip(
            *np.unravel_index(places, away.shape), strict=True) if away[i, j] > 0]  # fmt: skip
        text += f"<p>The most frequent ones:</p>{_table(['Images of', 'are labeled as', 'Share'], rows)}"
    if facts.confusable:
        rows = [(f"{_text(c.first)} / {_text(c.second)}", _text(c.text)) for c in facts.confusable]
        text += f"<h3>Classes that are hard to tell apart</h3>{_table(['Classes', 'What to know'], rows)}"
    return text


def _heat_map(names: Sequence[str], matrix: np.ndarray) -> str:
    rows = [
        [_text(name), *(_cell(p, names[i], names[j]) for j, p in enumerate(matrix[i]))] for i, name in enumerate(names)
    ]
    return _table(["", *(f"<span>{_text(name)}</span>" for name in names)], rows, "heat")


def _cell(p: float, clean: str, label: str) -> str:
    title = _text(f"{p:.1%} of {clean} carry the label {label}")
    dark = " class='dark'" if p > 0.9 else ""
    return f"<span style='--p:{min(max(p, 0), 1):.3f}' title='{title}'{dark}>{100 * p:.0f}</span>"
