"""One sampling run: which batches are missing, who makes them, and what follows."""
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from diffusion.generate import batch_indices
from errors import UserError
from files.atomic import atomic
from files.images import grid
from sampling import manifest
from sampling.folder import ImageFolder
from sampling.lock import locked
from sampling.progress import Progress
from sampling.ranks import Ranks, Stopped
from sampling.writer import BackgroundWriter

GRID_IMAGES = 16
GRID_COLUMNS = 4
PATIENCE_SECONDS = 60  # for an image that another machine wrote

Make = Callable[[int], np.ndarray]  # a batch's number to its images, uint8 (n, H, W, 3)


class RankDiffers(UserError):
    """A mistake that other ranks may not find."""

    every_rank = True


@dataclass(frozen=True)
class SamplingJob:
    """What to make.

    Attributes:
        folder: of the images.
        settings: everything that can change a pixel.
        wanted: number of images.
        batch: images per batch; batch ``k`` is always computed in its full composition.
        shard: (k, K): only batches ``k, k + K, …``; None for all.
        overwrite: delete what is there.
        assemble: make no image, only the ``.npz``.
        log_file: a line is appended to it whenever images were made.
    """

    folder: ImageFolder
    settings: manifest.Settings
    wanted: int
    batch: int
    shard: tuple[int, int] | None
    overwrite: bool
    assemble: bool
    log_file: Path | None

    def mine(self, batch: int) -> bool:
        """Say whether this shard makes a batch."""
        if self.shard is None:
            return True
        number, count = self.shard
        return batch % count == number

    def my_batches(self) -> list[int]:
        """List the batches that this shard makes."""
        return [batch for batch in range(self.batches) if self.mine(batch)]

    def images(self, batch: int) -> range:
        """List the wanted images of a batch."""
        indices = batch_indices(batch, self.batch)
        return range(indices.start, min(indices.stop, self.wanted))

    def count_images(self, batches: Iterable[int]) -> int:
        """Count the wanted images of some batches."""
        return sum(len(self.images(batch)) for batch in batches)

    @property
    def batches(self) -> int:
        """Number of batches, the last one perhaps cut short."""
        return -(-self.wanted // self.batch)

    @property
    def npz(self) -> Path:
        """Where all images go in the end."""
        return self.folder.path.with_name(self.folder.path.name + ".npz")


def sample_all(
    job: SamplingJob,
    make: Make | None,  # None: nothing is made (``job.assemble``)
    ranks: Ranks,
    stopped: Callable[[], bool],
) -> None:
    """Make what is missing; then rank 0 writes the ``.npz`` and the grid (not for a shard).

    Raises:
        UserError: other settings, another live run, the model made NaN, or an image is missing
            when assembling.
        Stopped: asked to stop; the batch in progress was finished.
    """
    with ExitStack() as stack:
        # Rank 0 holds the lock and looks at the folder for all.
        settings, missing = ranks.share(
            "work", lambda: (job.settings, prepare(job, stack, stopped)))
        check_same_settings(job, settings, ranks)

        # Every rank makes its share of what is missing.
        total = job.count_images(job.my_batches())
        left = job.count_images(missing)
        progress = stack.enter_context(Progress(ranks, total, left, job.log_file))
        make_batches(job, make, missing[ranks.index::ranks.count], progress, stopped)
        wait_for_all(ranks, progress)
        progress.close()

        patience = PATIENCE_SECONDS if ranks.count > 1 else 0
        ranks.share(
            "finished", lambda: None if job.shard is not None else finish(job, stopped, patience))


def check_same_settings(job: SamplingJob, settings: manifest.Settings, ranks: Ranks) -> None:
    """Make sure that this rank would make the images that rank 0 makes.

    Raises:
        RankDiffers: it would not; lists the differences.
    """
    differences = manifest.differences(settings, job.settings)
    if differences:
        raise RankDiffers(
            f"rank {ranks.index} would make other images than rank 0 ({'; '.join(differences)}): "
            "use the same files and PyTorch, and give --threads")


def make_batches(
    job: SamplingJob,
    make: Make | None,
    batches: list[int],
    progress: Progress,
    stopped: Callable[[], bool],
) -> None:
    """Make batches one after the other; the images are written meanwhile.

    Raises:
        RankDiffers: the model made NaN.
        Stopped: asked to stop.
    """
    with BackgroundWriter(job.folder.save, job.batch) as writer:
        for batch in batches:
            if stopped():
                raise Stopped
            try:
                images = make(batch)
            except ValueError as error:
                raise RankDiffers(f"batch {batch}: {error}") from None
            for index, pixels in zip(job.images(batch), images):
                writer.put(index, pixels)
            progress.add(len(job.images(batch)))


def wait_for_all(ranks: Ranks, progress: Progress) -> None:
    """Wait until every rank has made its share."""
    ranks.add("ranks done", 1)

    def all_done() -> bool:
        progress.refresh()  # rank 0 goes on showing what the others make
        return ranks.read("ranks done") == ranks.count

    ranks.wait(all_done)


def prepare(job: SamplingJob, stack: ExitStack, stopped: Callable[[], bool]) -> list[int]:
    """Lock the folder, agree on settings, clean up, and list the batches that lack an image."""
    stack.enter_context(locked(job.folder.path, job.shard))
    if job.overwrite:
        job.folder.clear()
        job.npz.unlink(missing_ok=True)
    manifest.agree(job.folder.path, job.settings)

    def is_mine(index: int) -> bool:
        return job.mine(index // job.batch)

    job.folder.remove_leftovers(None if job.shard is None else is_mine)
    if job.assemble:
        return []
    indices = [index for batch in job.my_batches() for index in job.images(batch)]
    shown = _unless(stopped, tqdm(indices, desc="found", unit="image"))
    return sorted({index // job.batch for index in job.folder.missing(shown)})


def finish(job: SamplingJob, stopped: Callable[[], bool], patience: int) -> None:
    """Write the ``.npz`` and a grid of the first images.

    Args:
        patience: seconds to wait for an image that another machine wrote and the shared folder
            does not show yet.

    Raises:
        UserError: an image is missing.
    """
    folder = job.folder
    for _ in range(patience):
        if all(folder.file(index).exists() for index in range(job.wanted)):
            break
        time.sleep(1)

    def shown(indices: Iterable[int]) -> Iterator[int]:
        return _unless(stopped, tqdm(indices, desc="npz", unit="image"))

    try:
        folder.assemble(job.npz, job.wanted, shown)
    except ValueError as error:
        raise UserError(str(error)) from None
    picture = folder.path / "samples.png"
    first = np.stack([folder.load(index) for index in range(min(job.wanted, GRID_IMAGES))])
    with atomic(picture) as temporary:
        grid(first, GRID_COLUMNS).save(temporary, format="PNG")
    print(f"wrote {job.wanted} images to {folder.path}, a grid of the first to {picture} "
          f"and all of them to {job.npz}")


def _unless(stopped: Callable[[], bool], items: Iterable[int]) -> Iterator[int]:
    """Yield ``items``, until asked to stop."""
    for item in items:
        if stopped():
            raise Stopped
        yield item
