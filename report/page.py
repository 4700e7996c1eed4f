"""One HTML file that shows figures with captions, opens from disk and needs no network."""
import base64
import html
from dataclasses import dataclass
from pathlib import Path

from quant.files import atomic

_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
figure{margin:2rem 0}img{max-width:100%;height:auto}figcaption{color:#444}table{border-collapse:collapse}
td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}"""


@dataclass(frozen=True)
class Figure:
    """A picture (PNG bytes), the name of its file without extension, and what it shows."""

    name: str
    png: bytes
    caption: str


def html_table(header: list[str], rows: list[list[str]]) -> str:
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def write_page(folder: Path, title: str, intro: str, sections: list[tuple[str, list[Figure]]], table: str = "") -> Path:
    """Write ``report.html`` and every figure as ``<name>.png`` into ``folder``.

    Args:
        sections: headings ("" for none) and their figures.
        table: HTML to show below the introduction.

    Returns:
        The page's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    body = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(intro)}</p>", table]
    for heading, figures in sections:
        body.append(f"<h2>{html.escape(heading)}</h2>" if heading else "")
        for figure in figures:
            with atomic(folder / f"{figure.name}.png") as temporary:
                temporary.write_bytes(figure.png)
            source = base64.b64encode(figure.png).decode()
            body.append(f'<figure><img alt="{html.escape(figure.name)}" src="data:image/png;base64,{source}">'
                        f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>")
    page = folder / "report.html"
    with atomic(page) as temporary:
        temporary.write_text(f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
                             f"<title>{html.escape(title)}</title><style>{_STYLE}</style><body>{''.join(body)}</body></html>", "utf-8")
    return page
