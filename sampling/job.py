"""One sampling run: which batches are missing, who makes them, and what follows when all are there."""
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

GRID_IMAGES, GRID_COLUMNS = 16, 4


class RankDiffers(UserError):
    """A mistake that other ranks may not find."""

    every_rank = True


@dataclass(frozen=True)
class Job:
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
        return self.shard is None or batch % self.shard[1] == self.shard[0]

    def images(self, batch: int) -> range:
        """The wanted ones of a batch."""
        indices = batch_indices(batch, self.batch)
        return range(indices.start, min(indices.stop, self.wanted))

    @property
    def batches(self) -> int:
        return -(-self.wanted // self.batch)

    @property
    def npz(self) -> Path:
        return self.folder.path.with_name(self.folder.path.name + ".npz")


def sample_all(job: Job, make: Callable[[int], np.ndarray], ranks: Ranks, stopped: Callable[[], bool]) -> None:
    """Make what is missing; then rank 0 writes the ``.npz`` and the grid (not for a shard).

    Args:
        make: the images of a batch, uint8 (n, H, W, 3).

    Raises:
        UserError: other settings, another live run, the model made NaN, or an image is missing when assembling.
        Stopped: asked to stop; the batch in progress was finished.
    """
    with ExitStack() as stack:
        settings, missing = ranks.share("work", lambda: (job.settings, prepare(job, stack, stopped)))
        if found := manifest.differences(settings, job.settings):
            raise RankDiffers(f"rank {ranks.index} would make other images than rank 0 ({'; '.join(found)}): use the same files and PyTorch, and give --threads")
        mine = [batch for batch in range(job.batches) if job.mine(batch)]
        progress = stack.enter_context(Progress(ranks, sum(len(job.images(batch)) for batch in mine),
                                                sum(len(job.images(batch)) for batch in missing), job.log_file))
        with BackgroundWriter(job.folder.save, job.batch) as writer:
            for batch in missing[ranks.index::ranks.count]:
                if stopped():
                    raise Stopped
                try:
                    images = make(batch)
                except ValueError as error:
                    raise RankDiffers(f"batch {batch}: {error}") from None
                for index, pixels in zip(job.images(batch), images):
                    writer.put(index, pixels)
                progress.add(len(job.images(batch)))
        ranks.add("made", 1)
        ranks.wait(lambda: progress.add(0) and ranks.add("made", 0) == ranks.count)
        progress.close()
        ranks.share("finished", lambda: None if job.shard is not None else finish(job, stopped, 60 if ranks.count > 1 else 0))


def _unless(stopped: Callable[[], bool], items: Iterable) -> Iterator:
    """``items``, until asked to stop."""
    for item in items:
        if stopped():
            raise Stopped
        yield item


def prepare(job: Job, stack: ExitStack, stopped: Callable[[], bool]) -> list[int]:
    """Lock the folder, agree on settings, clean up, and list the batches that lack an image."""
    stack.enter_context(locked(job.folder.path, job.shard))
    if job.overwrite:
        job.folder.clear()
        job.npz.unlink(missing_ok=True)
    manifest.agree(job.folder.path, job.settings)
    job.folder.remove_leftovers(None if job.shard is None else lambda index: job.mine(index // job.batch))
    if job.assemble:
        return []
    batches = [batch for batch in range(job.batches) if job.mine(batch)]
    indices = [index for batch in batches for index in job.images(batch)]
    return sorted({index // job.batch for index in job.folder.missing(_unless(stopped, tqdm(indices, desc="found", unit="image")))})


def finish(job: Job, stopped: Callable[[], bool], patience: int) -> None:
    """Write the ``.npz`` and a grid of the first images.

    Args:
        patience: seconds to wait for an image that another machine wrote and the shared folder does not show yet.

    Raises:
        UserError: an image is missing.
    """
    for _ in range(patience):
        if all(job.folder.file(index).exists() for index in range(job.wanted)):
            break
        time.sleep(1)
    try:
        job.folder.assemble(job.npz, job.wanted, lambda indices: _unless(stopped, tqdm(indices, desc="npz", unit="image")))
    except ValueError as error:
        raise UserError(str(error)) from None
    first = np.stack([job.folder.load(index) for index in range(min(job.wanted, GRID_IMAGES))])
    with atomic(job.folder.path / "samples.png") as temporary:
        grid(first, GRID_COLUMNS).save(temporary, format="PNG")
    print(f"wrote {job.wanted} images to {job.folder.path}, a grid of the first to {job.folder.path / 'samples.png'} and all of them to {job.npz}")
