"""Images are encoded and written behind the model's back, on a bounded pool."""
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

THREADS = 2
PENDING_BATCHES = 2


class BackgroundWriter:
    """Calls ``save(index, pixels)`` on a few threads; at most ``PENDING_BATCHES`` batches wait.

    Use as a context manager: leaving waits for all writes. An error of ``save`` is raised by the
    next call, or on leaving.

    Attributes:
        waited: seconds for which ``put`` and leaving held the caller up.
    """

    def __init__(self, save: Callable[[int, np.ndarray], None], batch: int):
        self._save = save
        self._slots = threading.Semaphore(PENDING_BATCHES * batch)
        self._pool = ThreadPoolExecutor(THREADS)
        self._error: BaseException | None = None
        self.waited = 0.0

    def put(self, index: int, pixels: np.ndarray) -> None:
        """Queue one image, uint8 (H, W, 3), that the caller will not change."""
        began = time.perf_counter()
        self._slots.acquire()
        self.waited += time.perf_counter() - began
        self._raise()
        write = self._pool.submit(self._save, index, pixels)
        write.add_done_callback(self._done)

    def _done(self, future: Future) -> None:
        self._error = self._error or future.exception()
        self._slots.release()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        began = time.perf_counter()
        self._pool.shutdown(wait=True)
        self.waited += time.perf_counter() - began
        if kind is None:
            self._raise()
