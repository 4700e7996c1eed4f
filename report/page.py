"""One HTML file that shows figures with captions, opens from disk and needs no network."""
import base64
import html
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from files.atomic import atomic

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;"
    "max-width:76rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}\n"
    "figure{margin:2rem 0}"
    "img{max-width:100%;height:auto}"
    "figcaption{color:#444}"
    "table{border-collapse:collapse;font-size:.85rem;display:block;overflow-x:auto}\n"
    "td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}"
)
_HEAD = (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
)


@dataclass(frozen=True)
class Figure:
    """A picture (PNG bytes), the name of its file without extension, and what it shows."""

    name: str
    png: bytes
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading ("" for none), a table as HTML ("" for none), and figures."""

    heading: str
    table: str
    figures: list[Figure]


def html_table(header: list[str], rows: list[list[str]]) -> str:
    """Write a table as HTML; text is escaped."""
    lines = [_table_line(header, "th"), *(_table_line(row, "td") for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def _table_line(cells: Iterable[str], tag: str) -> str:
    """Write one line of a table."""
    marked = [f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells]
    return f"<tr>{''.join(marked)}</tr>"


def write_page(folder: Path, title: str, intro: str, sections: list[Section]) -> Path:
    """Write ``report.html`` and every figure as ``<name>.png``; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    body = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(intro)}</p>"]
    for section in sections:
        if section.heading:
            body.append(f"<h2>{html.escape(section.heading)}</h2>")
        body.append(section.table)
        for figure in section.figures:
            with atomic(folder / f"{figure.name}.png") as temporary:
                temporary.write_bytes(figure.png)
            body.append(_figure_html(figure))
    page = folder / "report.html"
    text = (
        f"{_HEAD}<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<body>{''.join(body)}</body></html>")
    with atomic(page) as temporary:
        temporary.write_text(text, "utf-8")
    return page


def _figure_html(figure: Figure) -> str:
    """Write a figure with its picture inside the text, so that the page needs no other file."""
    source = base64.b64encode(figure.png).decode()
    return (
        f'<figure><img alt="{html.escape(figure.name)}" src="data:image/png;base64,{source}">'
        f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>")
