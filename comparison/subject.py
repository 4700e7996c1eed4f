"""What is compared: a model at one setting, as far as tables have to know it."""
from pathlib import Path
from typing import Any, Protocol

from cli.quantize import QuantizedFile
from comparison.jobs import Job
from comparison.settings import TableSettings
from evaluation.fidelity import Fidelity


class TableRow(Protocol):
    """A filled row.

    Attributes:
        title: what figures call it.
        npz: the file of samples.
        fidelity: along the trajectory; None where it was not measured.
    """

    title: str
    npz: str
    fidelity: Fidelity | None

    def cells(self) -> list[str]:
        """Format the row under the subject's columns."""

    def as_note(self) -> dict[str, Any]:
        """Convert to what JSON can hold."""


class Subject(Protocol):
    """A model at one setting: a table's.

    Attributes:
        settings: what tables of any model have in common.
        place: the name of the folder of its rows.
        note: the file name of what is kept of a row.
        name: of its figures.
        title: of its table.
        columns: of its table.
        setting: what the table of all tables says of it: model, image size, steps, guidance.
        jobs: the rows to fill, the float model's first.
    """

    settings: TableSettings
    place: str
    note: str
    name: str
    title: str
    columns: tuple[str, ...]
    setting: tuple[str, str, str, str]
    jobs: list[Job]

    def check_reference(self) -> None:
        """Check the real images, before any work is done.

        Raises:
            UserError: they cannot be read, or do not go with the samples.
        """

    def describe(self) -> str:
        """Say what the numbers of the table are."""

    def output(self, folder: Path) -> Path:
        """Say where QuantDiT.py writes, in the folder of a row."""

    def marker_file(self, output: Path) -> Path:
        """Name the file that is there when QuantDiT.py has written ``output``."""

    def digest(self, output: Path) -> str:
        """Digest what QuantDiT.py wrote."""

    def quantising_arguments(self, job: Job, output: Path) -> list[str]:
        """Write the command line of QuantDiT.py; ``--output`` comes last."""

    def report_arguments(self, folder: Path) -> list[str]:
        """Write what QuantDiT.py needs to draw a report; nothing where it draws none."""

    def sampling_arguments(self, output: Path | None) -> list[str]:
        """Write the command line of sample_merge_TAS.py, without what says how many and where.

        Args:
            output: what is sampled; None: the float model.
        """

    def float_identity(self) -> list[str]:
        """Identify the float weights, as far as arguments do not."""

    def judging_identity(self) -> list[str]:
        """List what decides the numbers of a row, beside its images."""

    def judge(
        self, job: Job, quantised: QuantizedFile | None, images: Path, float_images: Path,
    ) -> TableRow:
        """Measure the images of a row.

        Args:
            images, float_images: files of samples, the row's and the float model's.
        """

    def read_row(self, note: dict[str, Any]) -> TableRow | None:
        """Make the row that a note describes; None where another version wrote other fields."""
