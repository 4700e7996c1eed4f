"""The story of compare.py: find what is compared, fill the rows, write the tables."""
import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cli.pipelines import is_pipeline
from comparison.class_conditional import class_conditionals
from comparison.pipeline_settings import pipeline_settings
from comparison.rows import csv_text, markdown
from comparison.runner import Comparison
from comparison.settings import compare_settings
from comparison.subject import Subject, TableRow
from files.atomic import atomic, writable_folder
from report.page import write_page


def compare(args: argparse.Namespace) -> None:
    """Fill and write the tables that the command line asks for.

    Raises:
        UserError: a flag is wrong, or a file cannot be had.
    """
    # Find what is wrong with recipes and references before any work is done.
    subjects = find_subjects(args)
    settings = subjects[0].settings
    end_with_the_sampling_process()
    # The numbers are to be those of full float32 products.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    comparisons = [Comparison(subject) for subject in subjects]
    for subject in subjects:
        subject.check_reference()

    # Fill the rows.
    texts, table, parts = [], [], []
    for subject, comparison in zip(subjects, comparisons):
        rows = comparison.rows()
        texts.append(as_text(subject, rows))
        table += [[*subject.setting, *row.cells()] for row in rows]
        parts.append((subject, rows))

    # Show them.
    text = "\n".join(texts)
    markdown_file = write_text(settings.output / "table.md", text)
    header = ["model", "image size", "steps", "guidance", *subjects[0].columns]
    csv_file = write_text(settings.output / "table.csv", csv_text(header, table))
    print(f"\n{text}")
    print(f"wrote {markdown_file} and {csv_file}")
    if settings.report is not None:
        # matplotlib takes a second to import.
        from report.comparison import comparison_section
        sections = [comparison_section(*part) for part in parts]
        title = f"Comparison of recipes on {settings.model}"
        page = write_page(
            writable_folder(settings.report), title, subjects[0].describe(), sections)
        print(f"wrote {page}; rows that have a report of their own have it in a folder beside it")


def find_subjects(args: argparse.Namespace) -> Sequence[Subject]:
    """Make what is compared: a table each.

    Raises:
        UserError: a flag is wrong, or a file cannot be had.
    """
    if is_pipeline(args):
        settings = pipeline_settings(args)
        # It loads diffusers.
        from comparison.pipelines import pipelines
        return pipelines(settings)
    return class_conditionals(compare_settings(args))


def end_with_the_sampling_process() -> None:
    """Make SIGTERM an ordinary exit, on which Python also ends a process that it waits for."""
    def leave(*_) -> None:
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)


def as_text(subject: Subject, rows: list[TableRow]) -> str:
    """Write a table's rows as Markdown, under a heading and what the numbers are."""
    lines = markdown(subject.columns, [row.cells() for row in rows])
    return f"### {subject.title}\n\n{subject.describe()}\n\n{lines}\n"


def write_text(path: Path, text: str) -> Path:
    """Write a file that appears whole or not at all; returns its path."""
    with atomic(path) as temporary:
        temporary.write_text(text, "utf-8")
    return path
