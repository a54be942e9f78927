"""Programs that a model wrote, run apart from everything else and asked one thing: do they pass their tests?

Each program gets a Python process of its own, without site-packages, in an empty temporary folder, with an empty
environment, a limit on CPU seconds, memory, open files, processes and file size, and a limit on the clock, after which
its whole process group is killed. Before its first line runs, two more things are switched off in that process:

    kernel        a seccomp filter (Linux on x86-64 and arm64) refuses sockets, new processes and programs, signals,
                  and every way to write, move or delete a file. It needs no privilege, and holds for any code.
    interpreter   an audit hook, everywhere, refuses the same to Python code, and ctypes, which could get around it.

Where the kernel's filter is not to be had (``isolation`` says so) only the hook stands between a program and the
machine. That stops what a model writes by chance, not an attacker. In neither case is reading files refused, only
their way out: use a container or a machine of its own for models that you do not trust. A pass is told by a secret
that the process hands back after the last test, so that leaving early or printing anything is none; a program that
searches its own interpreter's frames for that secret could still forge one.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

_CHILD = Path(__file__).with_name("child.py")
# -s, -S and -P: nothing but the standard library can be imported. -B: no byte code is written.
_FLAGS = ("-s", "-S", "-P", "-B")

Isolation = Literal["kernel", "interpreter"]


class SandboxError(RuntimeError):
    """Programs cannot be run here; the message is one line."""


@dataclass(frozen=True)
class Limits:
    """What one program may take.

    Attributes:
        seconds: Time on the clock, its tests included; CPU time is held to the next whole second.
        memory_mib: Address space, in MiB.
    """

    seconds: float = 5.0
    memory_mib: int = 512


def passes(program: str, tests: Sequence[str], limits: Limits | None = None) -> bool:
    """Say whether ``program`` runs and then passes every one of ``tests``, statements run in its own namespace."""
    return bool(_run(program, tests, limits or Limits()))


def isolation(limits: Limits | None = None) -> Isolation:
    """Run an empty program and return what holds back programs on this machine.

    Raises:
        SandboxError: Not even that one runs, so that every program would seem to fail.
    """
    if os.name != "posix":
        raise SandboxError("generated code is run under POSIX resource limits, which this system does not have")
    held = _run("", ["assert True"], limits or Limits())
    if held is None:
        raise SandboxError("an empty program does not pass: memory_mib or seconds is too small, or no process starts")
    return held


def _run(program: str, tests: Sequence[str], limits: Limits) -> Isolation | None:
    """Return what held the program back if it passed, None if it did not."""
    secret = secrets.token_hex(16)
    task = json.dumps({"program": program, "tests": list(tests), "secret": secret, **asdict(limits)})
    verdict, handed = os.pipe()
    try:
        with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
            _live_and_die([sys.executable, *_FLAGS, str(_CHILD), str(handed)], task, folder, handed, limits.seconds)
        os.set_blocking(verdict, False)
        told = os.read(verdict, 256).decode("ascii", "replace")
    except BlockingIOError:
        return None
    finally:
        os.close(verdict)
        os.close(handed)
    return {f"{secret} kernel": "kernel", f"{secret} interpreter": "interpreter"}.get(told)  # type: ignore[return-value]


def _live_and_die(command: Sequence[str], task: str, folder: str, handed: int, seconds: float) -> None:
    """Run the process to its end, or to its limit."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={"PYTHONHASHSEED": "0"},  # the one setting: sets keep their order, so that a second run says the same
        pass_fds=(handed,),
        start_new_session=True,
    )
    try:
        process.communicate(task.encode(), timeout=seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
