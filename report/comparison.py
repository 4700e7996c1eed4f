"""The figures and the page of a comparison."""
from pathlib import Path

from comparison.subject import Subject, TableRow
from files.npz import read_arrays, read_images
from report import figures
from report.page import Figure, Section, html_table

SHOWN = 12  # images per row of the picture


def comparison_section(subject: Subject, rows: list[TableRow]) -> Section:
    """Show a table and its figures."""
    lines = [row.cells() for row in rows]
    drawn = [same_seeds(subject.name, rows)]
    if any(row.fidelity is not None for row in rows):
        drawn.append(sqnr_over_steps(subject.name, rows))
    return Section(subject.title, html_table(list(subject.columns), lines), drawn)


def same_seeds(name: str, rows: list[TableRow]) -> Figure:
    """Show the same seeds from every row."""
    images = {}
    for row in rows:
        path = Path(row.npz)
        images[row.title] = read_images(path, read_arrays(path))[:SHOWN]
    caption = "The same seeds from every row (figures 9 to 13 of the paper's appendix)."
    return Figure(f"{name}-same-seeds", figures.same_seeds(images), caption)


def sqnr_over_steps(name: str, rows: list[TableRow]) -> Figure:
    """Draw the distance from the float model along the trajectory."""
    curves = {row.title: row.fidelity.sqnr_db for row in rows if row.fidelity is not None}
    caption = "SQNR of the latents against the float model's, after each step."
    return Figure(f"{name}-sqnr", figures.sqnr_over_steps(curves), caption)
