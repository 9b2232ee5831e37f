"""Write a report as one self-contained HTML page, and as Markdown with pictures in separate files."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass

import dnnlib

__all__ = ["STYLE", "Gallery", "Picture", "Report", "Section", "Table", "markdown_table"]

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}th,td{padding:.3rem .8rem;border-bottom:1px solid #ccc;text-align:right}
th:first-child,td:first-child{text-align:left}img{max-width:100%;image-rendering:pixelated}
pre{background:#f4f4f4;padding:1rem;overflow-x:auto;font-size:13px}"""
# Tables scroll in a box of their own, with the names of the rows in sight. Pictures of a gallery share a row where
# there is room for them.
REPORT_STYLE = """body{max-width:76rem;background:#fff}h1{line-height:1.2;overflow-wrap:anywhere}h2{margin-top:2.5rem}
section+section{margin-top:4rem}p,li,figcaption{max-width:56rem}.finding{font-size:1.2rem;font-weight:600}
.scroll{overflow-x:auto}.scroll table{font-variant-numeric:tabular-nums;font-size:14px;white-space:nowrap;
border-collapse:separate;border-spacing:0}
.scroll :is(th,td){padding:5px 8px}
thead th{vertical-align:bottom;white-space:normal}tbody th{font-weight:600;position:sticky;left:0;background:#fff}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:1.5rem}
.gallery.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,10.5rem),1fr));gap:.8rem}
figure{margin:0}figcaption{font-size:14px;line-height:1.4;margin-bottom:.4rem}figcaption b{font-size:16px;display:block}
.gallery img{width:100%;display:block}img{image-rendering:auto}
@media(max-width:40rem){body{margin:1rem auto}h1{font-size:1.5rem}h2{font-size:1.25rem}.finding{font-size:1.1rem}
pre{padding:.6rem}tbody th{max-width:8rem;white-space:normal}}"""
ACROSS = 3  # pictures of a gallery in a row of Markdown


@dataclass
class Picture:
    """A picture of the report."""

    path: str  # PNG file
    title: str
    text: str = ""  # what it shows
    width: int = 720  # on the page, in pixels


@dataclass
class Gallery:
    """Pictures side by side, to be compared. Those of a wide page may stand one below the other on a narrow one."""

    title: str
    text: str  # what all of them show
    pictures: Sequence[Picture]
    small: bool = False  # whether two of them have room on a narrow page


@dataclass
class Table:
    """A further table. The first cell of a row is its name."""

    title: str
    text: str  # what it shows
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Section:
    """A question and its answer. The page shows `finding` first, then the parts in this order."""

    title: str
    question: str
    columns: Sequence[str]  # header of the table
    rows: Sequence[Sequence[str]]  # body of the table; the first cell of a row is its name
    notes: Sequence[str] = ()  # one list item each
    pictures: Sequence[Picture | Gallery | Table] = ()
    finding: str = ""  # what was found, in one sentence

    def table(self) -> list[str]:
        """Return the lines of the table in Markdown."""
        return markdown_table(self.columns, self.rows)


@dataclass
class Report:
    """A page: first its sections, then the commands. The title of the first section is that of the page."""

    sections: Sequence[Section]
    commands: Sequence[str] = ()  # that were run to get the results

    def write(self, directory: str) -> tuple[str, str]:
        """Write `report.html`, which contains the pictures, and `report.md`, which links them. Return both paths."""
        paths = os.path.join(directory, "report.html"), os.path.join(directory, "report.md")
        for path, text in zip(paths, (self._html(), self._markdown(directory)), strict=True):
            with dnnlib.atomic_open(path, "wt") as f:
                f.write(text)
        return paths

    def _markdown(self, directory: str) -> str:
        lines = []
        for s in self.sections:
            lines += [f"# {s.title}", "", *([s.finding, ""] if s.finding else []), s.question, ""]
            lines += [*s.table(), "", *(f"* {note}" for note in s.notes)]
            for part in s.pictures:
                lines += ["", f"## {part.title}", "", *([part.text, ""] if part.text else [])]
                if isinstance(part, Table):
                    lines += markdown_table(part.columns, part.rows)
                elif isinstance(part, Gallery):
                    lines += _markdown_gallery(part, directory)
                else:
                    lines.append(_link(part, directory))
            lines.append("")
        if self.commands:
            lines += ["## Commands", "", "```", *self.commands, "```", ""]
        return "\n".join(lines)

    def _html(self) -> str:
        e = html.escape
        text = "\n".join(e(c) for c in self.commands)
        commands = f"<h2>Commands</h2><pre tabindex='0'>{text}</pre>" if self.commands else ""
        return (
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>{e(self.sections[0].title)}</title><style>{STYLE}\n{REPORT_STYLE}</style></head><body>"
            f"{''.join(map(_html_section, self.sections))}{commands}"
            "</body></html>\n"
        )


def _html_section(section: Section) -> str:
    e = html.escape
    finding = f"<p class='finding'>{e(section.finding)}</p>" if section.finding else ""
    notes = "".join(f"<li>{e(n)}</li>" for n in section.notes)
    return (
        f"<section><h1>{e(section.title)}</h1>{finding}<p>{e(section.question)}</p>"
        f"{_html_table(section.columns, section.rows)}<ul>{notes}</ul>{''.join(map(_html_part, section.pictures))}"
        "</section>"
    )


def _html_part(part: Picture | Gallery | Table) -> str:
    e = html.escape
    text = f"<h2>{e(part.title)}</h2>" + (f"<p>{e(part.text)}</p>" if part.text else "")
    if isinstance(part, Table):
        return text + _html_table(part.columns, part.rows)
    if isinstance(part, Picture):
        return text + _image(part, f" style='width:{part.width}px'")
    figures = "".join(
        f"<figure><figcaption><b>{e(p.title)}</b>{e(p.text)}</figcaption>{_image(p)}</figure>" for p in part.pictures
    )
    return f"{text}<div class='gallery{' small' * part.small}'>{figures}</div>"


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    e = html.escape
    head = "".join(f"<th scope='col'>{e(c)}</th>" for c in columns)
    body = "".join(
        f"<tr><th scope='row'>{e(row[0])}</th>{''.join(f'<td>{e(c)}</td>' for c in row[1:])}</tr>" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll' tabindex='0'>{table}</div>"


def _image(picture: Picture, style: str = "") -> str:
    with open(picture.path, "rb") as f:
        data = base64.b64encode(f.read()).decode()
    return f"<img alt='{html.escape(picture.title)}'{style} src='data:image/png;base64,{data}'>"


def _link(picture: Picture, directory: str) -> str:
    return f"![{picture.title}]({os.path.relpath(picture.path, directory)})"


def _markdown_gallery(gallery: Gallery, directory: str) -> list[str]:
    lines = []
    for start in range(0, len(gallery.pictures), ACROSS):
        part = gallery.pictures[start : start + ACROSS]
        rows = [[p.text for p in part]] * any(p.text for p in part) + [[_link(p, directory) for p in part]]
        lines += [*([""] if start else []), *markdown_table([p.title for p in part], rows)]
    return lines


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(columns), "|" + "---|" * len(columns), *map(line, rows)]
