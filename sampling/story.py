"""Sample or assemble: what the checked command line of sample_merge_TAS.py asks for."""
from cli.stages import stage
from errors import UserError
from files.atomic import writable_folder
from sampling import manifest
from sampling.job import sample_all
from sampling.processes import Processes, reported_full_disk
from sampling.source import Images, Source, make_job


def assemble(source: Source, processes: Processes) -> None:
    """Write the ``.npz`` of the images that are there.

    Needs no model, and no machine like those that made the images.

    Raises:
        UserError: the folder has no manifest of ours, or an image is missing.
    """
    stored = manifest.read(source.folder)
    if not {"batch", "image_size"} <= stored.keys():
        raise UserError(f"'{source.folder / manifest.NAME}' is not a manifest of ours: "
                        "give the --path and --sample-dir that the shards had")
    with reported_full_disk(source.folder):
        sample_all(make_job(source, stored), None, processes.ranks, processes.stopped)


def sample(source: Source, processes: Processes) -> None:
    """Make the images that are missing, then the ``.npz``.

    Raises:
        UserError: weights are missing or damaged, or the folder holds other images.
    """
    with stage("load", quiet=not processes.is_first):
        images = load(source, processes)
    writable_folder(source.folder)
    job = make_job(source, images.settings)
    with stage("sample", quiet=not processes.is_first), reported_full_disk(source.folder):
        sample_all(job, images.make, processes.ranks, processes.stopped)


def load(source: Source, processes: Processes) -> Images:
    """Load what makes the images.

    Raises:
        UserError: weights are missing or damaged, or a file cannot be read.
    """
    try:
        return source.load(processes)
    except OSError as error:
        raise UserError(f"cannot read what makes the images ({error}): "
                        "give files that can be read") from None
