"""A filled row of the table: what is kept of it, and how it is shown."""
import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from evaluation.fidelity import Fidelity
from evaluation.scores import HEADINGS, Scores, cells

COLUMNS = (
    "recipe", "W/A", "MB", "paper MB", "calibration s", "search s", "s/image",
    *HEADINGS, "SQNR dB", "image SQNR dB", "PSNR dB", "LPIPS")


@dataclass(frozen=True)
class Row:
    """A filled row.

    Attributes:
        label: the recipe as it was given.
        bits: weight and activation bits, such as ``4/8``.
        megabytes: of the checkpoint, or of the float weights.
        paper_megabytes: as Q-DiT counts them (``quant.checkpoint.size``).
        seconds: that quantisation took; None for the float model.
        search_seconds: of these the choice of group sizes; None where there was none.
        seconds_per_image: that sampling takes.
        fidelity: None where it was not measured.
        npz: the file of samples.
    """

    label: str
    bits: str
    megabytes: float
    paper_megabytes: float
    seconds: float | None
    search_seconds: float | None
    seconds_per_image: float
    scores: Scores
    fidelity: Fidelity | None
    npz: str

    @property
    def title(self) -> str:
        """What figures call the row."""
        return f"{self.label} {self.bits}"

    def cells(self) -> list[str]:
        """Format the row under ``COLUMNS``."""
        seconds = "-" if self.seconds is None else f"{self.seconds:.0f}"
        search = "-" if self.search_seconds is None else f"{self.search_seconds:.1f}"
        return [
            self.label, self.bits, f"{self.megabytes:.1f}", f"{self.paper_megabytes:.1f}",
            seconds, search, f"{self.seconds_per_image:.3f}",
            *cells(self.scores), *fidelity_cells(self.fidelity),
        ]

    def as_note(self) -> dict:
        """Convert to what JSON can hold."""
        return asdict(self)

    @staticmethod
    def from_note(note: dict) -> "Row | None":
        """Make the row that a note describes; None where another version wrote other fields."""
        values = {name: value for name, value in note.items() if name != "key"}
        try:
            values["scores"] = Scores(**values["scores"])
            if values["fidelity"] is not None:
                values["fidelity"] = Fidelity(**values["fidelity"])
            return Row(**values)
        except (KeyError, TypeError):
            return None


def fidelity_cells(fidelity: Fidelity | None) -> list[str]:
    """Format both SQNRs and PSNR in dB, and LPIPS; "-" where none was measured."""
    if fidelity is None:
        return ["-", "-", "-", "-"]
    lpips = "n/a" if fidelity.lpips is None else f"{fidelity.lpips:.4f}"
    decibels = fidelity.sqnr_db[-1], fidelity.image_sqnr_db, fidelity.psnr_db
    return [*(f"{value:.1f}" for value in decibels), lpips]


def markdown(header: Iterable[str], rows: list[list[str]]) -> str:
    """Write a table in Markdown, its columns aligned."""
    header = list(header)
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    rule = ["-" * width for width in widths]
    lines = []
    for line in (header, rule, *rows):
        padded = [cell.ljust(width) for cell, width in zip(line, widths)]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


def csv_text(header: Iterable[str], rows: list[list[str]]) -> str:
    """Write a table as CSV."""
    buffer = io.StringIO()
    csv.writer(buffer).writerows([header, *rows])
    return buffer.getvalue()
