"""A process that has imported what runs need, and forks one for each command: a new one would import for ten seconds.

As a script it reads a request a line, and writes an answer a line:

    {"call": "module:function", "arguments": [...], "environment": {...}, "streams": [PATH or null, PATH or null]}
        -> the process's id
    {"wait": PID, "seconds": N}
        -> its exit status, -N for signal N; it is killed once the seconds have passed
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HELPERS = [ROOT / "tests" / name for name in ("engine", "strategies")]


class Forks:
    """Starts processes that have imported everything.

    Args:
        process: This file at work as a script.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def start(
        self, call: str, *arguments: Any, output: Path | None = None, errors: Path | None = None, **environment: str
    ) -> int:
        """Call "module:function" in a process group of its own and return the process's id.

        Args:
            call: The function; the process's exit status is what it returns.
            arguments: Its arguments, of types that JSON has.
            output: Where standard output goes; nowhere unless given.
            errors: Where standard error goes; to this process's unless given.
            environment: Further environment variables.
        """
        streams = [str(output or os.devnull), errors and str(errors)]
        return self._ask({"call": call, "arguments": arguments, "environment": environment, "streams": streams})

    def wait(self, pid: int, seconds: float = 100) -> int:
        """Return a process's exit status, -N for signal N; kill it once the seconds have passed."""
        return self._ask({"wait": pid, "seconds": seconds})

    def kill(self, pid: int) -> int:
        """Kill a process, as kill -9 does, and return its exit status."""
        os.kill(pid, signal.SIGKILL)
        return self.wait(pid)

    def _ask(self, request: dict[str, Any]) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextmanager
def forks() -> Iterator[Forks]:
    """Start such a process, and end it."""
    paths = os.pathsep.join(map(str, [ROOT, *HELPERS]))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Forks(process)
        process.kill()


def execute(code: str) -> int:
    """Execute Python, which is what a process may be started for."""
    exec(code, {})
    return 0


def _serve() -> None:
    import torch

    import tasks  # noqa: F401
    from continual.commands.run import import_engine

    import_engine()
    torch.set_num_threads(1)
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(_status(request["wait"], time.monotonic() + request["seconds"]), flush=True)
        elif child := os.fork():
            print(child, flush=True)
        else:
            sys.exit(_call(**request))


def _call(call: str, arguments: list[Any], environment: dict[str, str], streams: list[str | None]) -> int:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(streams, start=1):
        if path is not None:
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), number)
    os.environ.update(environment)
    module, _, function = call.partition(":")
    return getattr(importlib.import_module(module), function)(*arguments)


def _status(pid: int, end: float) -> int:
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


if __name__ == "__main__":
    _serve()
