"""A process that holds a run's lock until it is killed."""

from __future__ import annotations

import time
from pathlib import Path

from continual.storage.lock import DirectoryLock


def hold(run_dir: str, held: str) -> None:
    """Take the lock of a run, write the file ``held`` and wait."""
    with DirectoryLock(Path(run_dir)) as lock:
        lock.acquire()
        Path(held).touch()
        time.sleep(600)
