"""What all commands share at the terminal: one line for whatever is wrong, and an exit status that says what kind.

Exit status: 0 done; 2 the configuration or an input is wrong; 1 something failed while work was under way, and what was
finished is kept; 130 it was interrupted, 143 terminated, likewise.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from continual.errors import ConfigError, RunError, one_line
from continual.storage.records import RecordError
from tasks import TaskError

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""A full disk, one that cannot be written to, or one that fails."""


class OneLineParser(argparse.ArgumentParser):
    """Raises what is wrong with a command line, for ``guarded`` to print."""

    def add_accept_data(self) -> None:
        """Add the option of every command that takes up a run: to go on although its rows are others than before."""
        self.add_argument("--accept-data", action="store_true", help="take rows that have changed since the run began")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def guarded(work: Callable[[], Path]) -> int:
    """Do the work, print the directory it returns, and turn errors and signals into one line and an exit status."""
    for stream in (sys.stdout, sys.stderr):  # a terminal without the letters of a stage's name
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with _stopped_by_sigterm():
            print(work(), flush=True)
    except (ConfigError, TaskError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except (RunError, RecordError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # ``| head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may Python's own last flush fail
        print("error: nobody reads the output any more; go on with --resume", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        print(f"error: {one_line(error)}; what was finished is kept", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns the one into the other while a trainer is at work.
        cause = error if isinstance(error, KeyboardInterrupt) else error.__context__
        if not isinstance(cause, KeyboardInterrupt):
            raise
        terminated = isinstance(cause, _Terminated)
        print(f"{'terminated' if terminated else 'interrupted'}; go on with --resume", file=sys.stderr)
        return 143 if terminated else 130
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM came: from ``timeout``, a container that is stopped, or a cluster that wants its machine back."""


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Stop the work at SIGTERM.

    Left to themselves, Lightning's trainers go on scoring, and end a training as if all of it were done.
    """

    def stop(*_: Any) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # which alone takes signals
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
