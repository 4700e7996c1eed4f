"""One bar for all ranks."""
import time
from pathlib import Path

from tqdm import tqdm

from sampling.ranks import Ranks


class Progress:
    """Counts the images of all ranks; rank 0 shows them on a bar and in a log file.

    Args:
        total: images of the job.
        missing: those of them that this run has to make.
    """

    def __init__(self, ranks: Ranks, total: int, missing: int, log_file: Path | None):
        self._ranks, self._total, self._begin = ranks, total, total - missing
        self._bar = tqdm(total=total, initial=self._begin, desc="sampling", unit="image", disable=ranks.index > 0)
        self._log = None if log_file is None or ranks.index > 0 else open(log_file, "a")
        self._began, self._seen = time.monotonic(), 0

    def add(self, images: int) -> bool:
        """``images`` more were made by this rank; returns True."""
        done = self._ranks.add("images", images)
        if done > self._seen:
            self._bar.update(done - self._seen)
            if self._log is not None:
                rate = done / (time.monotonic() - self._began)
                print(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {self._begin + done}/{self._total} images, {rate:.2f} images/s", file=self._log, flush=True)
            self._seen = done
        return True

    def close(self) -> None:
        self._bar.close()
        if self._log is not None:
            self._log.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()
