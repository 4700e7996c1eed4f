"""Being asked to stop: SIGTERM from a scheduler, or a launcher that is gone."""
import os
import signal
import threading
import time

STATUS = 128 + signal.SIGTERM  # 143
_CHECK_SECONDS = 0.5


class StopFlag:
    """Becomes true on SIGTERM; the work in progress is finished first."""

    def __init__(self):
        self._set = threading.Event()
        self._before = signal.signal(signal.SIGTERM, lambda *_: self._set.set())

    def __call__(self) -> bool:
        return self._set.is_set()

    def release(self) -> None:
        """Let SIGTERM do again what it did before."""
        signal.signal(signal.SIGTERM, self._before)


def die_with_launcher(launcher: int) -> None:
    """End this process soon after its parent ``launcher`` does.

    A torchrun that is killed by SIGKILL cannot stop its ranks.
    """
    def watch():
        while os.getppid() == launcher:
            time.sleep(_CHECK_SECONDS)
        os._exit(STATUS)

    threading.Thread(target=watch, daemon=True).start()
