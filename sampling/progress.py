"""One bar for all ranks."""
import time
from pathlib import Path

from tqdm import tqdm

from sampling.ranks import Ranks

COUNTER = "images"


class Progress:
    """Counts the images of all ranks; rank 0 shows them on a bar and in a log file.

    Args:
        total: images of the job.
        missing: those of them that this run has to make.
    """

    def __init__(self, ranks: Ranks, total: int, missing: int, log_file: Path | None):
        self._ranks = ranks
        self._total = total
        self._there = total - missing  # images that were made before this run
        self._seen = 0  # images of this run on the bar
        self._began = time.monotonic()
        silent = ranks.index > 0
        self._bar = tqdm(
            total=total, initial=self._there, desc="sampling", unit="image", disable=silent)
        self._log = None
        if log_file is not None and not silent:
            self._log = open(log_file, "a")  # noqa: SIM115 (``close`` closes it)

    def add(self, images: int) -> None:
        """Count ``images`` more that this rank made."""
        self._show(self._ranks.add(COUNTER, images))

    def refresh(self) -> None:
        """Show what other ranks made."""
        self._show(self._ranks.read(COUNTER))

    def _show(self, done: int) -> None:
        if done <= self._seen:
            return
        self._bar.update(done - self._seen)
        if self._log is not None:
            now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            rate = done / (time.monotonic() - self._began)
            print(f"{now} {self._there + done}/{self._total} images, {rate:.2f} images/s",
                  file=self._log, flush=True)
        self._seen = done

    def close(self) -> None:
        """End the bar and the log."""
        self._bar.close()
        if self._log is not None:
            self._log.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()
