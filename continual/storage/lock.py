"""One process at a time in a directory: a lock that ends with the process that holds it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import IO
from weakref import WeakValueDictionary

from continual.errors import ConfigError

LOCK_NAME = ".lock"


_held: WeakValueDictionary[Path, DirectoryLock] = WeakValueDictionary()


class DirectoryLock:
    """Keeps other processes from writing into a directory; use it in a ``with``, and call ``acquire`` once it is there.

    The file says who holds it. Processes that are forked do not hold it, and it never has to be removed by hand.

    Args:
        directory: The directory.
        what: What it holds, for the message.
    """

    def __init__(self, directory: Path, what: str = "run") -> None:
        self.directory, self.what = directory, what
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock; a second call does nothing. Within one process it passes to the last that asks for it.

        Raises:
            ConfigError: Another process holds it, or the directory cannot be written to.
        """
        if self._file is not None:
            return
        path = self.directory / LOCK_NAME
        own = path.absolute()
        if (holder := _held.get(own)) is not None and holder._file is not None:
            self._file, holder._file, _held[own] = holder._file, None, self
            return
        while True:
            try:
                file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8")  # noqa: SIM115
            except OSError as error:
                raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                with file:
                    raise ConfigError(
                        f"another process ({_holder(file)}) is working on the {self.what} in {self.directory}: "
                        "wait for it, or stop it"
                    ) from error
            if _is_at(file, path):
                break
            file.close()  # whoever held it has removed it meanwhile
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%F %T}"}, file)
        file.flush()
        self._file, _held[own] = file, self

    def release(self) -> None:
        """Let others have it."""
        if self._file is not None:
            (self.directory / LOCK_NAME).unlink(missing_ok=True)
            self._forget()

    def _forget(self) -> None:
        """Close the file; in a forked process that leaves the lock to the parent."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _forget_all() -> None:
    for lock in list(_held.values()):
        lock._forget()


os.register_at_fork(after_in_child=_forget_all)


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(file: IO[str]) -> str:
    try:
        found = json.load(file)
        return f"{found['pid']} on {found['host']}, since {found['since']}"
    except (ValueError, TypeError, KeyError):
        return "it does not say which"
