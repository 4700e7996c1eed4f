"""Fills the rows of a comparison: quantise, sample, judge; what is done is kept."""
import hashlib
import json
import shlex
import shutil
from pathlib import Path

import torch

from cli.quantize import QuantizedFile
from comparison.arguments import flags
from comparison.jobs import Job
from comparison.judging import default_device
from comparison.kept import KeptStep
from comparison.quantdit import quantize
from comparison.sampling import sample
from comparison.subject import Subject, TableRow
from files.atomic import writable_folder


class Comparison:
    """All rows of a subject's table.

    Attributes:
        subject: what is compared.

    Raises:
        UserError: the output folder cannot be written to.
    """

    def __init__(self, subject: Subject):
        self.subject = subject
        self._settings = subject.settings
        self._folder = writable_folder(self._settings.output / subject.place)

    def rows(self) -> list[TableRow]:
        """Fill all rows, the float model's first."""
        rows: list[TableRow] = []
        for job in self.subject.jobs:
            rows.append(self.row(job, Path(rows[0].npz) if rows else None))
        return rows

    def row(self, job: Job, float_images: Path | None) -> TableRow:
        """Quantise, sample and judge.

        What an earlier call did with the same settings is kept, each of the three by itself.

        Args:
            float_images: samples of the float model; None: the row's are those.
        """
        subject = self.subject
        folder = writable_folder(self._folder / job.name)
        quantised = None if job.arguments is None else self.quantise(job, folder)
        sampling = subject.sampling_arguments(None if quantised is None else quantised.path)
        images_key = self._images_key(job, quantised, sampling)
        amount = str(self._settings.num_fid_samples)
        key = [*images_key, amount, *subject.judging_identity()]
        step = KeptStep(folder / subject.note, key, [])
        kept = self._kept_row(step)
        if kept is not None:
            print(f"{job.name}: done before, in {folder}", flush=True)
            return kept

        # Images of other settings have another folder, so that they never meet its manifest.
        digest = hashlib.sha256(json.dumps(images_key).encode()).hexdigest()
        images = self.sample(sampling, folder / f"samples-{digest[:8]}")
        row = subject.judge(job, quantised, images, float_images or images)
        step.keep(**row.as_note())
        return row

    def quantise(self, job: Job, folder: Path) -> QuantizedFile:
        """Write a quantised model, and its report if one is wanted, unless both are there."""
        subject = self.subject
        path = subject.output(folder)
        arguments = subject.quantising_arguments(job, path)
        results, pages = [subject.marker_file(path)], []
        if self._settings.report is not None:
            report = self._settings.report / subject.place / job.name
            pages = subject.report_arguments(report)
            results += [report / "report.html"] if pages else []
        step = KeptStep(
            path.with_suffix(".json"), [*arguments, *subject.float_identity()], results)
        note = step.load()
        if note is not None and {"seconds", "search_seconds"} <= note.keys():
            return QuantizedFile(path, note["seconds"], note["search_seconds"])

        # The old note has to go first: an interruption must not leave it beside a new result.
        step.forget()
        shutil.rmtree(path, ignore_errors=True)
        command = [*arguments, *pages]
        print(f"\n$ python QuantDiT.py {shlex.join(command)}", flush=True)
        quantised = quantize(command)
        step.keep(seconds=quantised.seconds, search_seconds=quantised.search_seconds)
        return quantised

    def sample(self, arguments: list[str], folder: Path) -> Path:
        """Sample on ``--nproc`` processes; returns the ``.npz``.

        A folder that an earlier call filled in part is completed.
        """
        amount = flags(num_fid_samples=self._settings.num_fid_samples, sample_dir=folder)
        sample([*arguments, *amount], self._settings.nproc)
        return next(folder.glob("*.npz"))

    def _images_key(
        self, job: Job, quantised: QuantizedFile | None, sampling: list[str],
    ) -> list[str]:
        """Everything that decides the images of a row but their number."""
        machine = [torch.__version__, default_device().type]
        if quantised is None:
            return [*sampling, *self.subject.float_identity(), *machine]
        quantising = self.subject.quantising_arguments(job, quantised.path)
        digest = self.subject.digest(quantised.path)
        return [*quantising, *sampling, digest, *machine]

    def _kept_row(self, step: KeptStep) -> TableRow | None:
        """Read a finished row whose images are still there; None where there is none."""
        note = step.load()
        row = None if note is None else self.subject.read_row(note)
        return row if row is not None and Path(row.npz).is_file() else None
