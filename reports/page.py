"""Write a report as one self-contained HTML page, and as Markdown with pictures in separate files."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass

import dnnlib

__all__ = ["Picture", "Report", "Section", "markdown_table"]

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}th,td{padding:.3rem .8rem;border-bottom:1px solid #ccc;text-align:right}
th:first-child,td:first-child{text-align:left}img{max-width:100%;image-rendering:pixelated}
pre{background:#f4f4f4;padding:1rem;overflow-x:auto;font-size:13px}"""


@dataclass
class Picture:
    """A picture of the report."""

    path: str  # PNG file
    title: str
    text: str = ""  # what it shows
    width: int = 720  # on the page, in pixels


@dataclass
class Section:
    """A question and its answer. The page shows the parts in this order."""

    title: str
    question: str
    columns: Sequence[str]  # header of the table
    rows: Sequence[Sequence[str]]  # body of the table
    notes: Sequence[str] = ()  # one list item each
    pictures: Sequence[Picture] = ()


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
            lines += [f"# {s.title}", "", s.question, "", *markdown_table(s.columns, s.rows), ""]
            lines += [f"* {note}" for note in s.notes]
            for p in s.pictures:
                path = os.path.relpath(p.path, directory)
                lines += ["", f"## {p.title}", "", *([p.text, ""] if p.text else []), f"![{p.title}]({path})"]
            lines.append("")
        lines += ["## Commands", "", "```", *self.commands, "```", ""]
        return "\n".join(lines)

    def _html(self) -> str:
        e = html.escape
        commands = "\n".join(e(c) for c in self.commands)
        return (
            f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{e(self.sections[0].title)}</title>"
            f"<style>{STYLE}</style></head><body>{''.join(map(_html_section, self.sections))}"
            f"<h2>Commands</h2><pre>{commands}</pre></body></html>\n"
        )


def _html_section(section: Section) -> str:
    e = html.escape
    head = "".join(f"<th>{e(c)}</th>" for c in section.columns)
    body = "".join("<tr>" + "".join(f"<td>{e(c)}</td>" for c in row) + "</tr>" for row in section.rows)
    notes = "".join(f"<li>{e(n)}</li>" for n in section.notes)
    pictures = "".join(
        f"<h2>{e(p.title)}</h2><p>{e(p.text)}</p><img alt='{e(p.title)}' style='width:{p.width}px' "
        f"src='data:image/png;base64,{_inline(p.path)}'>"
        for p in section.pictures
    )
    return (
        f"<h1>{e(section.title)}</h1><p>{e(section.question)}</p><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table><ul>{notes}</ul>{pictures}"
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _inline(path: str) -> str:
    with open(path, "rb") as f:
        return base64.b64encode(f.read()).decode()
